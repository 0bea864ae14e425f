"""The benchmark: that it times nothing before both ways agree, and a row of each kind."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
from common import rollout
from speed import against_trl, benchmark, random_checkpoint
from speed.work import random_work
from support.model.adapters import new_adapter, save_adapter
from support.model.loading import load_vlm
from support.running.presets import PRESETS
from tests.small import picture
from toy.recipe.train import BASE
from toy.world import make_samples

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = dict(
    hidden_size=80,  # LoRA of rank 2
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=64,
    vocab_size=1024,
)
VISION = dict(depth=4, hidden_size=64, intermediate_size=64, num_heads=2)


@pytest.fixture
def small(monkeypatch):
    for name in random_checkpoint.CONFIGS:
        monkeypatch.setitem(random_checkpoint.CONFIGS, name, (TEXT, VISION))


def test_a_random_checkpoint_is_one_that_the_phases_load(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["random_checkpoint", "--out", str(tmp_path / "x")])
    random_checkpoint.main()
    assert "billion parameters" in capsys.readouterr().out
    names = ("quantize", "dtype", "checkpointing", "max_pixels")
    args = SimpleNamespace(**{name: PRESETS["all"][name].paper for name in names})
    vlm = load_vlm(args, str(tmp_path / "x"))
    assert vlm.model.config.text_config.hidden_size == 80
    assert rollout(vlm, [picture(96, 80)], ["a"], 1, max_tokens=3)[0].target


def test_nothing_is_timed_before_both_ways_agree(small, capsys, monkeypatch):
    args = SimpleNamespace(config="small", dtype="float32", quantize="none", checkpointing="on")
    work = random_work(args, 2)
    work.images = [picture(96, 80), picture(64, 160, 1)]
    work.texts = ["a", "the cat"]
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 5 * 1024)
    benchmark.check(work, 6)
    assert "2 of 2 greedy trajectories" in capsys.readouterr().out

    def without_images(ids, images, image_token_id, start=0):  # an image's tokens as if text
        positions = [(start + i,) * 3 for i in range(len(ids))]
        return positions, start + len(ids)

    monkeypatch.setattr(common, "mrope_positions", without_images)
    with pytest.raises(SystemExit, match="do not agree"):
        benchmark.check(work, 6)


def test_benchmark_of_a_run(tmp_path):
    """A row of each kind but TRL's, of test samples and an adapter that was not trained."""
    samples = make_samples(tmp_path / "data", 1, 0)
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    vlm = load_vlm(SimpleNamespace(**against_trl.PRESET), str(BASE))
    new_adapter(vlm, 4, 8)
    save_adapter(vlm, tmp_path / "sft")
    argv = [sys.executable, "-m", "speed.benchmark", "--run", str(tmp_path), "--rows", *"4132"]
    argv += ["--checkpointing", "off", "--repeats", "1", "--sizes", "1", "--tokens", "2"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0 and not re.search(r"warn|Traceback|deprecat", said, re.I), said
    numbers = [line[0] for line in said.splitlines() if re.match(r"[1-5]\. ", line)]
    assert numbers == list("1234") and "2 of 2 greedy" in said, said


def test_against_trl(capsys):
    """Row 5: both learn from the same prompts and reward, and write as much."""
    pytest.importorskip("trl")
    against_trl.against_trl(None, SimpleNamespace(repeats=2))
    said = capsys.readouterr().out
    found = re.search(r"5\. GRPO .* times faster .* tokens a completion ([\d.]+), ([\d.]+)", said)
    theirs, ours = map(float, found.groups())
    assert abs(theirs - ours) < 4  # the base's answers are boxes on both sides


def test_trl_is_given_our_reward():
    truth = dict(bbox=[0, 0, 50, 100], width=100, height=100)
    texts = ['{"bbox_2d": [0, 0, 1000, 1000]}', '{"bbox_2d": [0, 0, 500, 1000]}', "no box"]
    given = against_trl.trl_reward([[{"content": text}] for text in texts], [truth] * 3)
    assert given == pytest.approx([0.5 + 0.1, 1 + 0.1, 0.0])


def test_a_folder_without_a_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        benchmark.main()
    message = error.value.code
    assert message.startswith(f"error: --run {tmp_path}") and "\n" not in message
