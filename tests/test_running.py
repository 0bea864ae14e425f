"""Flags, files, Ctrl-C, memory: what a run does when something is not right."""

import argparse
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import IVT, SINGLE_SHOT
from support.report.rows import Row, loaded, play_row
from support.running import errors, files, processes
from support.running.flags import ROOT, Flag, check_path, command, flags, model_path
from support.running.presets import PRESETS
from tests.small import GOOD, one_line

import pytest
import torch

# Flags --------------------------------------------------------------------------------------------
EXTRA = {
    "data": Flag(help="files", kind="files"),
    "folder": Flag(help="a folder", kind="folder"),
    "merge": Flag(help="100 % new", kind="new folder"),
    "init": Flag(help="where from", default="sft", choices=("sft", "base")),
    "ablations": Flag(help="more rows", kind="switch"),
}


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(phase, words) -> Namespace, of a run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGINT)

    def run(phase, words="", out="run"):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as if started by path
        monkeypatch.setattr(sys, "argv", ["sft.py", *words.split(), "--out", str(tmp_path / out)])
        return flags(phase, "A phase.\n\nMore.", **EXTRA)

    yield run
    signal.signal(signal.SIGINT, handler)


def test_flags_are_the_rows_of_the_presets_and_those_of_the_script(parse, tmp_path, capsys):
    args = parse("sft", "--lr 0.5 --folder . --ablations")
    assert (args.lr, args.epochs, args.seed) == (0.5, PRESETS["sft"]["epochs"].toy, 0)
    assert args.folder == "." and args.ablations is True and args.init == "sft"
    assert args.out == tmp_path / "run" and args.data is None and args.merge is None
    assert args.model == str(ROOT / "toy/base")
    printed = capsys.readouterr().out
    assert printed.startswith("python sft.py --preset toy") and "seed=0" in printed
    assert parse("sft", "--preset paper", out="other").lr == PRESETS["sft"]["lr"].paper
    assert parse("grpo", "--steps 0", out="third").steps == 0
    assert not hasattr(parse(None, out="fourth"), "lr")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr nan", "--lr is nan; expected 1e-09 to 1"),
        ("--steps 50", "--steps is 50; expected 1 to 20"),
        ("--epochs 0", "--epochs is 0; expected 1 to 1000000000"),
        ("--ep 1", "unrecognized arguments"),  # no abbreviations
    ],
)
def test_values_out_of_range_are_refused(parse, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        parse("sft", words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, kind, reason",
    [
        ("none", "file", "no such file or directory"),
        ("folder", "file", "is a directory"),
        ("file", "folder", "not a directory"),
        ("folder", "new file", "is a directory"),
        ("file", "new folder", "file exists"),
        ("pipe", "file", "not a regular file"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_in_one_line(
    tmp_path, monkeypatch, value, kind, reason
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    os.mkfifo("pipe")
    message = f"error: --flag {value}: {reason}; give a path that can be used as a {kind}"
    assert message == one_line(check_path, "--flag", value, kind)
    for good in (("file", "file"), ("folder", "folder")):
        check_path("--flag", *good)
    for new in (("new/file", "new file"), ("new/folder", "new folder"), ("file", "new file")):
        check_path("--flag", *new)
    assert not Path("new/file").exists()  # a run that is stopped leaves no empty one


@pytest.mark.parametrize("console", ["ascii", "cp1252", "gbk", "utf-8"])
def test_printing_never_ends_a_run(console):
    program = r"import support.running.errors; print('\u4e2d \u05e9 \U0001f600 \ud800 \xe9')"
    environment = {**os.environ, "PYTHONIOENCODING": console}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_flags_check_their_paths_before_any_work(parse):
    Path("file").touch()
    assert "--data nope.jsonl: no such file" in one_line(parse, "sft", "--data nope.jsonl")
    assert "--folder file: not a directory" in one_line(parse, "sft", "--folder file")
    assert "/file/run: not a directory" in one_line(parse, "sft", out="file/run")


def test_scripts_without_a_run_check_their_paths_too(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for script, flag in (("toy.recipe.skills", "--model"), ("speed.random_checkpoint", "--out")):
        monkeypatch.setattr(sys, "argv", [script, flag, str(tmp_path / "file")])
        assert f"{flag} " in one_line(runpy.run_module, script, run_name="__main__")


def test_another_phase_is_named_with_the_runs_own_flags():
    args = argparse.Namespace(preset="toy", out=Path("runs/toy"), model=model_path("toy/base"))
    assert command(args, "python sft.py") == "python sft.py"
    args.model = "runs/toy_base/base"
    assert command(args, "python sft.py") == "python sft.py --model runs/toy_base/base"
    model = "Qwen/Qwen3-VL-4B-Instruct"
    args = argparse.Namespace(preset="paper", out=Path("my runs/1"), model=model)
    assert command(args, "python grpo.py --steps 0").endswith("0 --preset paper --out 'my runs/1'")
    args.out = Path("runs/visrl_paper")
    args.seed, args.steps = 10, 0  # no steps: the single-step control's own
    assert command(args, "python -m visrl.sft") == "python -m visrl.sft --preset paper --seed 10"


# Files of a run -----------------------------------------------------------------------------------
def test_resumed_rows_belong_to_their_samples(tmp_path, capsys):
    """Rows count while their ids are the samples', whatever line ends a text holds; a line cut
    short does not."""
    rows_of = [{"id": str(i), "width": 1, "height": 1} for i in range(5)]
    path = tmp_path / "log"
    asked = []

    def work(batch):
        asked.extend(number for number, _ in batch)
        return [{"id": sample["id"], "text": "a\u2028b\u0085"} for _, sample in batch]

    def run():
        return files.resumable(path, rows_of, 2, "x", work)

    rows = run()
    assert [row["id"] for row in rows] == list("01234") and asked == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == "x: about 0.0 min in all\n"  # after the second batch
    assert run() == rows and len(asked) == 5
    path.write_bytes(path.read_bytes()[:-4])
    capsys.readouterr()
    assert run() == rows and asked[5:] == [4] and capsys.readouterr().out == ""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b", 1))  # still JSON, and another text
    assert run() == rows and asked[6:] == [0, 1, 2, 3, 4]
    assert f"{path}:1: damaged; made again from here" in capsys.readouterr().out
    assert path.read_bytes() == content
    path.write_bytes(b"")  # as of a phase that was killed in its first batch
    assert run() == rows and path.read_bytes() == content
    del asked[6:]
    del rows_of[2]  # the batch of 0 and 1 stays
    assert [row["id"] for row in run()] == list("0134") and asked[6:] == [2, 3]


def test_one_run_at_a_time_under_one_configuration(tmp_path):
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", lr=0.1)
    files.begin(args, "sft")
    files.begin(args, "sft")
    args.lr = 0.2
    with pytest.raises(SystemExit, match="lr: 0.1 then, 0.2 now(.|\n)*--restart"):
        files.begin(args, "sft")
    files.lock(tmp_path)
    with pytest.raises(SystemExit, match="another run works in"):
        files.lock(tmp_path)
    for content in ("[" * 100_000, "[1]", "7"):
        (tmp_path / "log/sft.config.json").write_text(content)
        assert "sft.config.json cannot be read" in one_line(files.begin, args, "sft")


def test_a_row_is_played_again_when_what_it_depends_on_changes(tmp_path, monkeypatch):
    files.write_jsonl(tmp_path / "data/test.jsonl", [GOOD])
    given = dict(guard="off", seed=0, batch_size=1)
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", **given)
    made = []

    def work(batch):
        made.extend(batch)
        return [{"id": sample["id"]} for _, sample in batch]

    def plays(name, *flags):
        made.clear()
        play_row(args, Row(name, name), [GOOD], work, *flags)
        return len(made)

    assert plays("once") == 1 and plays("refined", "guard") == 1
    args.seed, args.guard = 1, "on"  # nothing is sampled, and one box is not refined
    assert plays("once") == 0
    with pytest.raises(SystemExit, match="guard: off then, on now"):
        plays("refined", "guard")
    args.restart = True
    assert plays("refined", "guard") == 1 and plays("refined", "guard") == 0
    args.guard = "off"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write_text", mock.Mock(side_effect=KeyboardInterrupt))
        plays("refined", "guard")  # killed before its configuration is written
    assert not (tmp_path / "log/evaluate_refined.jsonl").exists()  # no line of the other

    (tmp_path / "sft").mkdir()
    for content in (b"{}", b'{"r": 8}'):  # the same weights, another scale
        (tmp_path / "sft/adapter_config.json").write_bytes(content)
        made.clear()
        play_row(args, Row("SFT", "sft", adapter="sft"), [GOOD], work)
        assert len(made) == 1


def test_the_first_row_tells_the_time_of_all(tmp_path, monkeypatch, capsys):
    two = [GOOD, {**GOOD, "id": "2"}]
    files.write_jsonl(tmp_path / "data/test.jsonl", two)
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", batch_size=1, max_tokens=120)
    rows = [Row("a", "a", SINGLE_SHOT), Row("b", "b", IVT, 2), Row("c", "c", IVT, 2, "missing")]
    clock = itertools.count(step=60)
    monkeypatch.setattr(files, "time", SimpleNamespace(time=lambda: next(clock)))

    def work(batch):
        loaded["model"] = None
        return [{"id": sample["id"]} for _, sample in batch]

    loaded.clear()
    for row in rows[:2]:
        play_row(args, row, two, work, rows=rows)
    loaded.clear()
    # 1 + 3 steps with words, three times each, of two batches
    assert capsys.readouterr().out == "evaluation: about 20.0 min in all\n"


# Ctrl-C and memory --------------------------------------------------------------------------------
WORKER = """
import torch
from support.running.errors import working_on
from support.running.flags import flags
from support.running.processes import RANK, WORLD, gather, program

flags(None, "Runs out of memory.")
print(program())
working_on([{"id": "7", "width": 20, "height": 10}])
if RANK == WORLD - 1:
    torch.empty(10**15)
gather([1])
"""


def test_ctrl_c_while_libraries_load_says_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 2); os.getpid()")
    for script in ([str(ROOT / "sft.py")], ["-m", "visrl.sft"]):
        start, environment = [sys.executable, *script], {"PYTHONPATH": str(tmp_path)}
        ran = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True)
        assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")
    prefix = f"{ROOT}/.venv"  # whose pytest or notebook is to know what was interrupted
    program = f"import sys; sys.prefix, sys.argv = {prefix!r}, ['{prefix}/bin/pytest']"
    start = [sys.executable, "-c", f"{program}; import common"]
    ran = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True)
    assert b"KeyboardInterrupt" in ran.stderr


def test_variables_of_other_launchers_are_no_traceback(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)  # as a cluster sets it, and no MASTER_ADDR
    assert "start them with torchrun" in one_line(processes.start_processes)
    monkeypatch.setenv("RANK", "x")
    assert "RANK or WORLD_SIZE is no number" in one_line(importlib.reload, processes)


def test_ctrl_c_waits_for_the_batch_and_a_second_one_ends_at_once(monkeypatch):
    monkeypatch.setattr(processes, "stop_asked", [])
    processes.ask_to_stop(signal.SIGINT, None)
    assert processes.interrupted()
    with pytest.raises(SystemExit) as ended:
        processes.ask_to_stop(signal.SIGINT, None)
    assert ended.value.code == 130


def test_running_out_of_memory_names_what_is_at_work_and_the_flag(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: others.append(arguments))

    def end_with(error):
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err

    errors.explain_errors("--max-pixels", "a smaller --model, or --quantize nf4")
    errors.working_on([])
    end = ". What was saved before is whole\n"
    message = "error: out of memory before the first sample; give a smaller --model, or "
    assert end_with(MemoryError()) == f"{message}--quantize nf4{end}"
    errors.working_on([dict(GOOD, id=str(i)) for i in range(5)])
    cuda = end_with(torch.OutOfMemoryError("CUDA out of memory"))
    assert f"3 (20 x 10), ...; lower --max-pixels{end}" in cuda
    assert others == []
    assert end_with(OSError(28, "No space left", "x")).startswith("error: [Errno 28] No space left")
    error = RuntimeError("another")
    assert end_with(error) == "" and others == [(RuntimeError, error, None)]


@pytest.mark.parametrize("count", (1, 2))
def test_running_out_of_memory_ends_all_processes(tmp_path, count):
    """The last of them runs out; alone it prints nothing but the message. A script in a folder is
    named as it was started."""
    script = tmp_path / "rooms/worker.py"
    script.parent.mkdir()
    script.write_text(WORKER)
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    start += ["rooms.worker", "--out", "run"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ran = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True)
    message = "error: out of memory with the samples 7 (20 x 10); lower --max-pixels."
    assert ran.returncode == 1 and message in ran.stderr, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "python -m rooms.worker --preset toy --out run", ran
    assert lines[-1] == "python -m rooms.worker"
    if count == 1:
        assert len(ran.stderr.splitlines()) == 1
