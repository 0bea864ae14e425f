"""The door of the training phases: resuming, saving, Ctrl-C, the order of the samples, the rate."""

import os
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import support.run
from support.model.adapters import adapter_state
from support.run import Run, shuffled
from support.running import errors, files, flags, processes

import pytest
import torch
from peft import LoraConfig, get_peft_model

ROWS = [{"id": str(n), "width": 20, "height": 10} for n in range(9)]  # an epoch is 4 + 4 + 1
FLAGS = "--epochs 2 --batch-size 2 --grad-accum 2 --save-every 2 --warmup 0.5 --lr 0.1"
LORA = LoraConfig(target_modules=["0"])


@pytest.fixture
def phase(monkeypatch, tmp_path):
    """phase(more flags) -> (Run, a stand-in for the model, optimizer), begun as sft.py begins."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(flags, "lock", lambda folder: None)  # it would last as long as pytest
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def begin(*more):
        monkeypatch.setattr(processes, "stop_asked", [])
        monkeypatch.setattr(sys, "argv", ["sft.py", "--out", str(tmp_path), *FLAGS.split(), *more])
        run = Run("sft", "A phase.")
        run.reads()
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LORA)
        return run, SimpleNamespace(model=model), torch.optim.AdamW(model.parameters())

    yield begin
    for name, handler in handlers.items():
        signal.signal(name, handler)


def train(run, vlm, optimizer):
    """Yields the ids of each batch when its step is made, and not yet saved."""
    for batch in run.epochs(ROWS, vlm, optimizer):
        vlm.model(torch.ones(1, 3)).square().sum().backward()
        run.log(epoch=run.epoch, lr=run.set_rate(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        run.best = max(run.best, (1 / (1 + run.update), run.update))
        yield [row["id"] for row in batch]


def test_a_stopped_run_goes_on_as_one_that_never_stopped(phase, monkeypatch, capsys):
    seen = [ids for _, ids in zip(range(4), train(*phase()))][:2]  # killed: two are not saved
    for name in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as ended:
            for ids in train(*phase()):
                seen.append(ids)
                os.kill(os.getpid(), name)
        assert ended.value.code == 130 and "stopped; to go on: " in capsys.readouterr().out
    run, vlm, _ = begun = phase()
    seen += train(*begun)
    assert [row["update"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    log, best, state = run.lines.path.read_bytes(), run.best, adapter_state(vlm.model)
    run.finish(then="python grpo.py")
    with pytest.raises(SystemExit, match="sft was finished and is gone; --restart makes it again"):
        phase()
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    with pytest.raises(SystemExit):
        phase()
    assert "sft is finished; --restart begins again" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "begin", mock.Mock(side_effect=KeyboardInterrupt))
        phase("--restart", "--seed", "1")  # killed before its configuration is written
    assert not run.checkpoint.exists()  # which would have gone on under another seed
    run, vlm, _ = begun = phase("--restart")
    assert list(train(*begun)) == seen and run.best == best
    assert run.lines.path.read_bytes() == log
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(vlm.model).items())


def test_the_first_update_tells_the_time_of_all(phase, monkeypatch, capsys):
    run, vlm, optimizer = phase("--save-every", "9")
    now = [0]
    monkeypatch.setattr(support.run, "time", SimpleNamespace(time=lambda: now[0]))
    run.args.val_every = 3
    for update in run.updates(6, vlm, optimizer):
        if update % 3 == 0:
            now[0] += 600
            run.log(update=update, val_reward=0.5)
        now[0] += 60
    assert "\nsft: about 36.0 min in all\n" in capsys.readouterr().out  # 6 and 3 validations


def test_the_order_and_the_rate_of_each_update(phase):
    run, *_ = begun = phase()
    seen = sum(train(*begun), [])
    epochs = shuffled(ROWS, 0, 0), shuffled(ROWS, 0, 1)  # of a seed and an epoch
    assert seen == [row["id"] for epoch in epochs for row in epoch]
    assert epochs[0] != epochs[1] and set(seen[:9]) == set(seen[9:]) == set("012345678")
    run.update = 2  # of an endless stream, four a time
    assert run.stream(ROWS, 4) == [epochs[0][8], *epochs[1][:3]]
    rates = [row["lr"] for row in files.read_jsonl(run.lines.path, "")]
    # Three of six warm it up, then a cosine to zero
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.075, 0.025], abs=1e-6)


def test_a_batch_is_shared_and_named_where_it_would_spoil_the_weights(phase, monkeypatch):
    run, *_ = phase()
    with pytest.raises(SystemExit, match=r"^error: update 1: loss nan.*\['0', '1'\]; lower --lr"):
        run.check(float("nan"), 1.0, ROWS[:2])
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "RANK", 1)
    assert run.share(ROWS) == errors.at_work == ROWS[5:]
