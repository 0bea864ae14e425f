"""The benchmark: what it counts, and that it times nothing before both ways agree."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import common
from common import VLM, rollout
from speed import against_trl, benchmark
from speed.floor import lengths, rollout_floor
from speed.measure import Rates, Tally, take_turns
from speed.work import Work, random_vlm
from support.model.adapters import new_adapter, save_adapter
from support.model.loading import load_vlm
from support.running.presets import PRESETS
from tests.small import picture
from toy.model import make_image_processor
from toy.recipe.train import BASE
from toy.world import make_samples

import pytest
import torch
from peft.tuners.lora import LoraLayer

ROOT = Path(__file__).resolve().parent.parent


def test_memory_is_that_of_tensors_alive():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        a = b.view(10, 100).t()  # the same memory as b; a's first is free
        return (a * 2).sum()  # 8,004 with the product and the sum, next to b

    assert take_turns({"work": work}, 1)["work"][1] == 8004
    weight = torch.ones(1000, requires_grad=True)
    with Tally() as tally:
        (weight * 2).sum().backward()
        assert tally.now == 4000  # the gradient
        weight.grad = None
    assert tally.now == 0 and tally.most == 4008


TEXT = dict(
    hidden_size=80,  # LoRA of rank 2
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=64,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e5, mrope_section=[6, 5, 5], mrope_interleaved=True
    ),
)
VISION = dict(
    depth=3,
    hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    out_hidden_size=80,
    deepstack_visual_indexes=[0, 1],
)


@pytest.fixture(scope="module")
def work():
    vlm = random_vlm(TEXT, VISION, 1024, torch.float32, checkpointing=True)
    images = [picture(96, 80), picture(64, 160, 1)]
    return Work(vlm, vlm, images, ["a", "the cat"], tokens=6, repeats=1, sizes=[2], alone=1)


def test_a_random_checkpoint_is_one_that_the_phases_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("speed.work.CONFIGS", {"4b": (TEXT, VISION)})
    monkeypatch.setattr("speed.work.VOCABULARY", 1024)
    monkeypatch.setattr("sys.argv", ["random_checkpoint", "--out", str(tmp_path / "x")])
    runpy.run_module("speed.random_checkpoint", run_name="__main__")
    assert "billion parameters" in capsys.readouterr().out
    names = ("quantize", "dtype", "checkpointing", "max_pixels")
    args = SimpleNamespace(**{name: PRESETS["all"][name].paper for name in names})
    vlm = load_vlm(args, str(tmp_path / "x"))
    assert vlm.model.config.text_config.hidden_size == 80
    assert rollout(vlm, [picture(96, 80)], ["a"], 1, max_tokens=3)[0].target


def test_nothing_is_timed_before_both_ways_agree(work, capsys, monkeypatch):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 5 * 1024)
    benchmark.check(work, 6)
    assert "2 of 2 greedy trajectories" in capsys.readouterr().out

    def without_images(ids, images, image_token_id, start=0):  # an image's tokens as if text
        positions = [(start + i,) * 3 for i in range(len(ids))]
        return positions, start + len(ids)

    monkeypatch.setattr(common, "mrope_positions", without_images)
    with pytest.raises(SystemExit, match="do not agree"):
        benchmark.check(work, 6)


def test_the_floor_counts_a_groups_prompt_once(work):
    (row,) = rollout(work.vlm, work.images[:1], work.texts[:1], 2, max_tokens=6)
    assert sum(new + written for new, written in lengths(row)) == len(row.ids)
    rates = Rates(1e9, 1e9)
    one = rollout_floor(work.vlm, rates, [row], 1)
    group = rollout_floor(work.vlm, rates, [row] * 6, 6)
    assert one < group < 6 * one


def test_floors_are_not_trusted_when_the_rate_has_changed():
    assert benchmark.doubt(160e9, 150e9) == ""
    assert "87 GFLOP/s before, 160 after; do not trust" in benchmark.doubt(87e9, 160e9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run: test samples, and an adapter that was not trained."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    out = tmp_path_factory.mktemp("speed") / "run"
    samples = make_samples(out / "data", 1, 0)
    lines = [json.dumps(sample) + "\n" for sample in samples]
    (out / "data/test.jsonl").write_text("".join(lines))
    model = Qwen3VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    vlm = VLM(model, AutoTokenizer.from_pretrained(BASE), make_image_processor())
    new_adapter(vlm, 4, 8)
    save_adapter(vlm, out / "sft")
    return out


def row_numbers(said):
    return [line[0] for line in said.splitlines() if re.match(r"[1-7]\. ", line)]


def test_benchmark_of_a_run(run):
    argv = [sys.executable, "-m", "speed.benchmark", "--run", str(run), "--checkpointing", "off"]
    argv += ["--rows", "1", "4", "5", "6", "--repeats", "1", "--sizes", "1", "--tokens", "2"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0 and not re.search(r"warn|Traceback|deprecat", said, re.I), said
    assert row_numbers(said) == list("1456") and "2 of 2 greedy" in said, said


def test_rows_can_be_chosen(run, monkeypatch, capsys):
    flags = ["--rows", "6", "3", "2", "--repeats", "1", "--sizes", "1", "--tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--run", str(run), *flags])
    benchmark.main()
    assert row_numbers(capsys.readouterr().out) == ["2", "3", "6"]


def test_a_pass_is_split_by_what_it_does(work):
    _, ours = benchmark.decoders(work, 2, steps=0)
    spent = benchmark.seconds_by_kind(ours)
    assert set(spent) == {"attention", "projections", "other operations"}
    assert min(spent.values()) > 0
    (said,) = benchmark.cost_of_a_pass(work)
    assert re.match(r"8\. a decoding pass of 2 prompts: .*attention.*Python -?\d+%$", said), said


def test_lora_in_the_weights_is_the_only_difference(work, monkeypatch):
    """Row 9: the same tokens; and LoRA is a part of the weights on one side alone."""
    ways = {}
    monkeypatch.setattr(
        benchmark, "take_turns", lambda both, _: ways.update(both) or dict.fromkeys(both, (1, 1))
    )
    timed = replace(work, rates=Rates(1e9, 1e9))
    assert list(benchmark.weights_for_decoding(timed))[0].startswith("9. LoRA in the weights")
    layers = [m for m in work.vlm.model.modules() if isinstance(m, LoraLayer)]
    seen = []
    language = work.vlm.base.model.language_model
    hook = language.register_forward_hook(lambda *_: seen.append(all(m.merged for m in layers)))
    plain = [row.target for row in ways["plain"]()]
    beside = seen.copy()
    ours = [row.target for row in ways["ours"]()]
    hook.remove()
    assert plain == ours
    assert beside and not any(beside) and all(seen[len(beside) :])


def test_against_trl(monkeypatch):
    """Row 7: both learn from the same prompts and reward, for as many updates as are asked for."""
    pytest.importorskip("trl")
    work = Work(None, None, [], [], tokens=60, repeats=2, sizes=[], alone=0)
    turns = []
    compare = benchmark.compare
    monkeypatch.setattr(
        benchmark, "compare", lambda *args: turns.append(compare(*args)) or turns[0]
    )
    (said,) = benchmark.against_trl(work)
    assert re.match(r"7\. GRPO step on the toy, TRL .* times faster", said), said
    [(theirs, ours, tokens)] = turns
    assert len(theirs) == len(ours) == 2
    assert abs(tokens[0] - tokens[1]) < 4, said  # the base's answers are boxes on both sides


def test_trl_is_given_our_reward():
    truth = dict(bbox=[[0, 0, 50, 100]], width=[100], height=[100])
    for text, value in (
        ('{"bbox_2d": [0, 0, 1000, 1000]}', 0.5 + 0.1),
        ('{"bbox_2d": [0, 0, 500, 1000]}', 1 + 0.1),
        ("no box", 0.0),
    ):
        [given] = against_trl.trl_reward([[{"content": text}]], **truth)
        assert given == pytest.approx(value)


def test_a_wrong_flag_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path in ("nope", "file", "empty"):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--run", str(tmp_path / path)])
        with pytest.raises(SystemExit) as error:
            benchmark.main()
        message = error.value.code
        assert message.startswith(f"error: --run {tmp_path / path}") and "\n" not in message
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tokens", "0"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "expected 1 or more" in capsys.readouterr().err
