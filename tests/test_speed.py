"""The benchmark: that it times nothing before both ways agree, and its rows."""

import re
from types import SimpleNamespace

import common
from common import rollout
from speed import against_trl, benchmark, random_checkpoint
from support.model.adapters import new_adapter, save_adapter
from support.model.loading import load_vlm
from support.running.flags import EMBEDDED, model_path
from support.running.presets import settings_of
from tests.small import picture

import pytest
import torch


def args_of(preset, phase=None, **more):
    values = {name: getattr(row, preset) for name, row in settings_of(phase).items()}
    return SimpleNamespace(**{**values, "preset": preset, **more})


def test_a_random_checkpoint_is_one_that_the_phases_load(tmp_path, monkeypatch):
    text = dict(hidden_size=80, num_hidden_layers=3, head_dim=32, intermediate_size=64)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, vocab_size=1024)
    rope = random_checkpoint.TEXT["rope_parameters"]
    text |= dict(rope_parameters=dict(rope, mrope_section=[6, 5, 5]))
    vision = dict(depth=4, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=80)
    vision |= dict(deepstack_visual_indexes=[0, 1, 2])
    monkeypatch.setattr(random_checkpoint, "TEXT", random_checkpoint.TEXT | text)
    monkeypatch.setattr(random_checkpoint, "VISION", random_checkpoint.VISION | vision)
    assert random_checkpoint.save_random(tmp_path) > 100_000
    vlm = load_vlm(args_of("paper"), str(tmp_path))
    assert vlm.model.config.text_config.hidden_size == 80
    assert rollout(vlm, [picture(96, 80)], ["a"], 1, max_tokens=3)[0].target


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "TOKENS", 6)
    monkeypatch.setattr(benchmark, "TURNS", 1)
    return args_of("toy", model=model_path(EMBEDDED), out=tmp_path)


def test_nothing_is_timed_before_both_ways_agree(args, capsys, monkeypatch):
    def without_images(ids, images, image_token_id, start=0):  # an image's tokens as if text
        positions = [(start + i,) * 3 for i in range(len(ids))]
        return positions, start + len(ids)

    monkeypatch.setattr(common, "mrope_positions", without_images)
    with pytest.raises(SystemExit, match="do not agree"):
        benchmark.main(args)
    assert "faster" not in capsys.readouterr().out


def test_the_row(args, capsys):
    """With an adapter in --out, which was not trained."""
    vlm = load_vlm(args)
    new_adapter(vlm, 4, 8)
    save_adapter(vlm, args.out / "sft")
    benchmark.main(args)
    said = capsys.readouterr().out
    assert "12 of 12 trajectories are the same" in said
    assert re.search(r"rollout of 2 prompts.* [\d.]+ s, ours [\d.]+ s, [\d.]+ times faster", said)


def test_against_trl(capsys, monkeypatch):
    """Both learn from the same prompts and reward, and write as much."""
    pytest.importorskip("trl")
    monkeypatch.setattr(against_trl, "TURNS", 2)
    against_trl.main(args_of("toy", "grpo", model=model_path(EMBEDDED)))
    said = capsys.readouterr().out
    found = re.search(r"GRPO .* times faster; tokens a completion ([\d.]+), ([\d.]+)", said)
    theirs, ours = map(float, found.groups())
    assert abs(theirs - ours) < 4  # the base's answers are boxes on both sides


def test_trl_is_given_our_reward():
    truth = dict(bbox=[0, 0, 50, 100], width=100, height=100)
    texts = ['{"bbox_2d": [0, 0, 1000, 1000]}', '{"bbox_2d": [0, 0, 500, 1000]}', "no box"]
    given = against_trl.trl_reward([[{"content": text}] for text in texts], [truth] * 3)
    assert given == pytest.approx([0.5 + 0.1, 1 + 0.1, 0.0])
