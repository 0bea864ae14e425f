"""The tests: python -m pytest -q. Behaviour only, on a Qwen3-VL of random weights; the last ones run the real commands."""

import argparse
import copy
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import benchmark
import common
import evaluate
import make_data
import runtime
import toy
from common import (IVT_PROMPT, PRESETS, VLM, advantages, box_complete, build_trajectory, draw_overlay, encode_images,
                    format_box, grpo_loss, iou, mrope_positions, normalize_box, parse_box, reward, rollout, trajectory_logprobs)

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def vlm():
    """A small Qwen3-VL with random weights."""
    runtime.quiet()
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, layers=2, vision_layers=2).requires_grad_(False)
    language = model.model.language_model  # as toy.py begins it, it would repeat its last word
    language.embed_tokens.weight.normal_(0, 0.08)
    language.embed_tokens.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 4  # ends some steps early
    language.norm.weight.fill_(1.0)
    return VLM(model, tokenizer, toy.make_image_processor())


def picture(width, height, seed=0):
    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# ------------------------------------------------------------------------------------------------------------------
# Boxes
# ------------------------------------------------------------------------------------------------------------------
def test_boxes_are_normalized_by_floor_and_back():
    assert normalize_box([0, 10.9, 320, 480], 640, 480) == [0, 22, 500, 1000]
    assert normalize_box([-3, 0, 700, 481], 640, 480) == [0, 0, 1000, 1000]
    rng = random.Random(0)
    for _ in range(200):
        w, h = rng.randint(1, 4000), rng.randint(1, 4000)
        bbox = [rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0, h)]
        back = common.denormalize_box(normalize_box(bbox, w, h), w, h)
        assert all(0 <= a - b < s / 1000 + 1e-6 for a, b, s in zip(bbox, back, (w, h, w, h)))


def test_iou_by_hand():
    assert iou([0, 0, 10, 10], [5, 5, 15, 15]) == pytest.approx(25 / 175)
    assert iou([0, 0, 10, 10], [0, 0, 10, 10]) == 1 and iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    sample = {"width": 200, "height": 100, "bbox": [0, 0, 100, 50]}
    assert common.box_iou([0, 0, 500, 500], sample) == 1 and common.box_iou(None, sample) == 0
    assert common.box_iou([0, 0, 500, 1000], sample) == pytest.approx(0.5)


@pytest.mark.parametrize("text, box", [
    ('{"bbox_2d": [1, 2, 30, 40]}', [1, 2, 30, 40]),
    ('```json\n[\n  {"bbox_2d": [1, 2, 30, 40], "label": "a cat"}\n]\n```', [1, 2, 30, 40]),
    ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8], "la', [1, 2, 30, 40]),   # cut short
    ('{"bbox_2d": [1, 2, 30, 40]} That is the cat, about 3 of 10.', [1, 2, 30, 40]),
    ('{"bbox_2d": [1, 2, 30, 40,],}', [1, 2, 30, 40]),
    ("(1, 2, 30, 40)", [1, 2, 30, 40]), ("(1,2),(30,40)", [1, 2, 30, 40]), ("[[1, 2], [30, 40]]", [1, 2, 30, 40]),
    ("<|box_start|>(1,2),(30,40)<|box_end|>", [1, 2, 30, 40]),
    ("<think>It was [9, 9, 99, 99], of 4 cats.</think>\n[1, 2, 30, 40]", [1, 2, 30, 40]),
    ("<think>I say [1, 2, 30, 40]", None), ("<think>a</think>b</think>[1, 2, 30, 40]", [1, 2, 30, 40]),
    ("[30, 40, 1, 2]", [1, 2, 30, 40]), ("[1.0, 2, 30, 40]", [1, 2, 30, 40]), ("[0, 0, 1000, 1000]", [0, 0, 1000, 1000]),
    ("[1, 2, 30, 1001]", None), ("[-1, 2, 30, 40]", None), ("[1.5, 2, 30, 40]", None), ("[1, 2, 1, 40]", None),
    ("[1, 2, 30]", None), ("[1, 2, 30, 40, 50]", None), ("[1, 2, 30, 40", None), ("", None), ("no box", None),
    (f"[{'9' * 5000}, 2, 30, 40]", None), ("[1, 2, 30, 40]\x00\ud800", [1, 2, 30, 40]),
])
def test_parse_box(text, box):
    assert parse_box(text) == box


def test_parse_box_never_raises():
    rng = random.Random(0)
    pieces = ["[", "]", "(", ")", ",", " ", "-", ".", "1", "20", "999", "1e5", "{", "}", '"bbox_2d": ', "<think>", "</think>",
              "<|box_start|>", "٣", "\n", "nan"]
    for _ in range(5000):
        box = parse_box("".join(rng.choices(pieces, k=rng.randint(0, 30))))
        assert box is None or (len(box) == 4 and all(type(v) is int and 0 <= v <= 1000 for v in box)
                               and box[0] < box[2] and box[1] < box[3])


def test_a_step_ends_with_its_object():
    assert not box_complete('<think>[1, 2, 30, 40]') and not box_complete('</think>{"bbox_2d": [1, 2, 30, 40]')
    assert box_complete('</think>{"bbox_2d": [1, 2, 30, 40]}') and box_complete("[1, 2, 30, 40]")


def test_overlay_pixels():
    plain = Image.new("RGB", (100, 100), (0, 0, 200))
    drawn = draw_overlay(plain, [200, 300, 600, 700])
    assert drawn.getpixel((20, 30)) == (255, 0, 0)              # the line
    assert drawn.getpixel((40, 50)) == (64, 0, 150)             # the fill, a quarter red
    assert drawn.getpixel((10, 10)) == drawn.getpixel((65, 75)) == (0, 0, 200)
    assert plain.getpixel((40, 50)) == (0, 0, 200) and draw_overlay(plain, None).tobytes() == plain.tobytes()


# ------------------------------------------------------------------------------------------------------------------
# Sequences, positions, the mask
# ------------------------------------------------------------------------------------------------------------------
TEXTS = ["<think>I look for it.</think>\n" + common.format_box([1, 2, 30, 40]),
         "<think>The red box is too low.</think>\n" + common.format_box([5, 6, 70, 800])]


def test_positions_equal_the_models_own(vlm):
    images = encode_images(vlm, [picture(96, 80), picture(48, 144, 1)])
    t = build_trajectory(vlm, "Find it.", images, TEXTS)
    ids = torch.tensor([t.ids])
    grid = torch.tensor([[1, 2 * i.rows, 2 * i.columns] for i in images])
    own, _ = vlm.base.model.get_rope_index(ids, (ids == vlm.base.config.image_token_id).int(), image_grid_thw=grid)
    whole, end = mrope_positions(t.ids, images, vlm.base.config.image_token_id)
    assert torch.equal(whole, own[:, 0]) and end == own.max() + 1
    # a continuation computed from the running offset is the same as the whole
    cut = len(common.prompt_ids(vlm, images[0], "Find it."))
    head, offset = mrope_positions(t.ids[:cut], images[:1], vlm.base.config.image_token_id)
    tail, _ = mrope_positions(t.ids[cut:], images[1:], vlm.base.config.image_token_id, offset)
    assert torch.equal(torch.cat([head, tail], 1), whole)


def test_loss_mask_token_by_token(vlm):
    t = build_trajectory(vlm, IVT_PROMPT.format(expression="the cat"), encode_images(vlm, [picture(32, 32)] * 2), TEXTS)
    assert [p + 1 for p in t.predictor] == sorted(p + 1 for p in t.predictor) and t.boxes == [[1, 2, 30, 40], [5, 6, 70, 800]]
    assert [t.ids[p + 1] for p in t.predictor] == t.target      # each target is the token after its predictor
    learnt = {p + 1 for p in t.predictor}
    shown = "".join(f"[{vlm.tokenizer.decode([token])}]" if i in learnt else vlm.tokenizer.decode([token])
                    for i, token in enumerate(t.ids))
    print(shown)
    boxed = lambda text: "".join(f"[{vlm.tokenizer.decode([token])}]" for token in vlm.encode(text))
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert shown == ("<|im_start|>user\n" + image + IVT_PROMPT.format(expression="the cat") + "<|im_end|>\n<|im_start|>assistant\n"
                     + boxed(TEXTS[0]) + "\n" + image + "\n" + common.CORRECTION + "\n" + boxed(TEXTS[1]))
    assert "".join(vlm.tokenizer.decode([v]) for v, s in zip(t.target, t.step) if s == 1) == TEXTS[1]


# ------------------------------------------------------------------------------------------------------------------
# Rollout
# ------------------------------------------------------------------------------------------------------------------
def test_cached_decoding_equals_one_full_pass(vlm, monkeypatch):
    images = [picture(96, 80), picture(48, 144, 1), picture(32, 32, 2)]
    expressions = ["the cat", "a much longer description of a dog that sits", "x"]
    rows = rollout(vlm, images, expressions, 2, 24, group_size=2, temperatures=(1.0, 0.7), seeds=[3, 1, 2])
    lengths = [sum(s == t for s in r.step) for r in rows for t in range(3)]
    assert len(rows) == 6 and all(len(r.images) == len(r.texts) == 3 for r in rows)
    assert rows[0].ids != rows[1].ids and len({len(r.ids) for r in rows}) > 1 and len(set(lengths)) > 1, lengths
    logprob, entropy = trajectory_logprobs(vlm, rows)
    sampled = torch.tensor([p for r in rows for p in r.logprob])
    assert (logprob - sampled).abs().max() < 1e-4 and (entropy > 0).all()
    alone = rollout(vlm, images[1:2], expressions[1:2], 2, 24, group_size=2, temperatures=(1.0, 0.7), seeds=[1])
    assert [r.target for r in alone] == [r.target for r in rows[2:4]]  # what it samples does not depend on its batch
    monkeypatch.setattr(common, "box_complete", lambda text: len(text) > 9)  # steps that end at a box, which random words lack
    monkeypatch.setattr(vlm.tokenizer, "decode", lambda ids: "]" * len(ids))
    boxed = rollout(vlm, images, expressions, 2, 24, group_size=2, temperatures=(1.0, 0.7), seeds=[3, 1, 2])
    monkeypatch.undo()
    assert {sum(s == 1 for s in r.step) for r in boxed} >= {10}
    assert (trajectory_logprobs(vlm, boxed)[0] - torch.tensor([p for r in boxed for p in r.logprob])).abs().max() < 1e-4
    for r in rows:  # the end of turn is a target, and never enters the context
        assert vlm.token("<|im_end|>") not in r.ids[r.predictor[0] + 1:]


@pytest.mark.parametrize("temperature", (0.0, 0.2))
def test_guessing_ahead_changes_nothing_but_the_passes(vlm, monkeypatch, temperature):
    whole, passes, images = common.hidden_states, [], [picture(96, 80), picture(48, 144, 1)]
    monkeypatch.setattr(common, "hidden_states", lambda *args: passes.append(1) or whole(*args))
    logits, few = common.text_logits, torch.zeros(vlm.base.config.text_config.vocab_size).fill_(-1e30).index_fill(0, torch.arange(300, 304), 0)
    monkeypatch.setattr(common, "text_logits", lambda *args: logits(*args) + few)  # who knows four words repeats himself

    def play(at_once):
        passes.clear()
        rows = rollout(vlm, images, ["the cat", "a dog"], 2, 20, group_size=2, temperatures=(temperature,) * 2, seeds=[0, 1], at_once=at_once)
        return [r.target for r in rows], [r.predictor for r in rows], torch.tensor([p for r in rows for p in r.logprob]), len(passes), rows

    plain, guessed = play(0), play(1000)
    assert plain[:2] == guessed[:2] and (plain[2] - guessed[2]).abs().max() < 1e-4
    assert guessed[3] < plain[3] == 3 * 20
    assert (trajectory_logprobs(vlm, guessed[4])[0] - guessed[2]).abs().max() < 1e-4


def test_an_end_of_turn_that_was_guessed_does_not_enter_the_context(vlm, monkeypatch):
    """The prompt holds one, behind words that the model may repeat."""
    end, words = vlm.token("<|im_end|>"), vlm.encode(IVT_PROMPT)[-2:]
    script = iter([*words, end, *words, end])
    monkeypatch.setattr(common, "choose", lambda logits, *_: torch.tensor([next(script)] + [end] * (len(logits) - 1)))
    row, = rollout(vlm, [picture(96, 80)], ["a"], 1, 9, at_once=32)
    assert row.target == [*words, end] * 2
    assert (trajectory_logprobs(vlm, [row])[0] - torch.tensor(row.logprob)).abs().max() < 1e-4


def test_lora_is_merged_while_decoding_and_the_weights_come_back(vlm, monkeypatch):
    lora, picked = VLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.image_processor), []
    for adapter in ("reference", "policy"):
        runtime.new_adapter(lora, 4, 8, adapter)
    for name, p in lora.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    lora.model.set_adapter("policy")
    layer, whole = lora.base.model.language_model.layers[0].mlp.up_proj, common.hidden_states
    before = copy.deepcopy(lora.model.state_dict())
    monkeypatch.setattr(common, "hidden_states", lambda *args: picked.append(layer.merged) or whole(*args))

    def play():
        picked.clear()
        rows = rollout(lora, [picture(96, 80)], ["the cat"], 1, 8)
        return rows, set(picked)

    def as_before():
        now = lora.model.state_dict()
        return not layer.merged and all(torch.equal(now[name], before[name]) for name in before)

    rows, merged = play()
    assert merged == {True} and as_before()
    sampled = torch.tensor(rows[0].logprob)
    assert (trajectory_logprobs(lora, rows)[0] - sampled).abs().max() < 1e-4 < (trajectory_logprobs(vlm, rows)[0] - sampled).abs().max()
    monkeypatch.setattr(common, "parse_box", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play()
    assert as_before()
    monkeypatch.undo()
    monkeypatch.setattr(common, "hidden_states", lambda *args: picked.append(layer.merged) or whole(*args))
    lora.model.to(torch.bfloat16)
    assert play()[1] == {False}  # the sum would be rounded


def test_guesses_are_what_came_after_the_same_two_tokens():
    ids = [1, 2, 3, 4, 9, 5, 1, 2, 7, 8, 1, 2]
    assert common.guess_next(ids, 3, stop=9) == [7, 8, 1] and common.guess_next(ids[:8], 8, stop=9) == [3, 4]
    assert common.guess_next(ids, 0, stop=9) == common.guess_next([1, 2, 3], 4, stop=9) == common.guess_next([1], 4, stop=9) == []


def test_a_trajectory_ends_when_its_boxes_agree(vlm, monkeypatch):
    """Rows that have left change nothing in the others."""
    images, texts = [picture(96, 80), picture(48, 144, 1), picture(32, 32, 2)], ["a", "b", "c"]
    whole = rollout(vlm, images, texts, 3, 6)
    boxes = iter([[0, 0, 500, 500], [0, 0, 300, 300], [0, 0, 100, 100], [0, 0, 500, 490], None, [0, 0, 900, 900], None, [0, 0, 910, 900], None])
    monkeypatch.setattr(common, "parse_box", lambda text: next(boxes))
    rows = rollout(vlm, images, texts, 3, 6, overlay=lambda image, box: image, agree=0.9)
    assert [len(r.boxes) for r in rows] == [2, 4, 3]
    assert rows[1].target == whole[1].target and [len(r.images) for r in rows] == [2, 4, 3]


def test_logits_a_few_at_a_time_give_the_same_gradient(vlm, monkeypatch):
    rows, weight = rollout(vlm, [picture(96, 80), picture(48, 144, 1)], ["a", "b"], 1, 9), vlm.base.model.language_model.norm.weight
    weight.requires_grad_(True)

    def run():
        logprob, entropy = trajectory_logprobs(vlm, rows)
        (logprob.sum() + entropy.sum()).backward()
        grad, weight.grad = weight.grad, None
        return torch.cat([logprob, entropy, grad]).detach()

    whole = run()
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 7 * vlm.base.config.text_config.vocab_size)
    parts = run()
    weight.requires_grad_(False)
    assert torch.allclose(whole, parts, atol=1e-4) and weight.grad is None


def test_memory_is_that_of_tensors_alive():
    def work():
        a = torch.zeros(1000)      # 4,000 bytes
        b = a + 1                  # 8,000
        a = b.view(10, 100).t()    # the same memory as b; a's first is free
        return (a * 2).sum()       # 8,004 with the product and the sum, next to b
    assert benchmark.take_turns({"work": work}, 1)["work"][1] == 8004
    weight = torch.ones(1000, requires_grad=True)
    with benchmark.Tally() as tally:
        (weight * 2).sum().backward()
        assert tally.now == 4000  # the gradient
        weight.grad = None
    assert tally.now == 0 and tally.most == 4008


def test_benchmark_times_nothing_before_both_ways_agree(capsys, monkeypatch):
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=64,
                rope_parameters=dict(rope_type="default", rope_theta=1e5, mrope_section=[6, 5, 5], mrope_interleaved=True))
    vision = dict(depth=3, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=64, deepstack_visual_indexes=[0, 1])
    vlm = benchmark.random_vlm(text, vision, 1024, torch.float32, torch.device("cpu"), 4, checkpointing=True)
    images, expressions = [picture(96, 80), picture(64, 160, 1)], ["a", "the cat"]
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 5 * 1024)
    benchmark.check(vlm, vlm, images, expressions, 6)
    assert "2 of 2 greedy trajectories" in capsys.readouterr().out
    row, = rollout(vlm, images[:1], expressions[:1], 2, 6)
    assert sum(new + written for new, written in benchmark.lengths(row)) == len(row.ids)
    one, group = (benchmark.rollout_floor(vlm, (1e9, 1e9), [row] * n, n) for n in (1, 6))
    assert one < group < 6 * one  # the prompt is shared
    monkeypatch.setattr(common, "mrope_positions", lambda ids, images, token, start=0: (torch.arange(len(ids)).expand(3, -1) + start, start + len(ids)))
    with pytest.raises(SystemExit, match="do not agree"):
        benchmark.check(vlm, vlm, images, expressions, 6)


def test_greedy_rollout_equals_generate(vlm):
    image = picture(96, 80)
    row = rollout(vlm, [image, picture(32, 32)], ["the cat", "a dog on a sofa"], 0, 12)[0]
    ids = torch.tensor([common.prompt_ids(vlm, row.images[0], IVT_PROMPT.format(expression="the cat"))])
    batch = vlm.image_processor(images=[image], return_tensors="pt")
    out = vlm.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                            mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(), **batch)
    assert out[0, ids.shape[1]:].tolist()[:len(row.target)] == row.target


def test_the_last_valid_box_is_drawn(vlm, monkeypatch):
    """Step 1 gives a box, step 2 none: step 3 still sees the box of step 1."""
    answers, drawn = iter([None, [1, 2, 30, 40], None, None]), []
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    rollout(vlm, [picture(32, 32)], ["x"], 3, 2, overlay=lambda image, box: drawn.append(box) or image)
    assert drawn == [None, [1, 2, 30, 40], [1, 2, 30, 40]]


def test_sft_shows_what_the_rollout_shows(vlm, monkeypatch):
    """Step t sees box t - 1, drawn on the original image, in training as in the rollout."""
    boxes, image = [[0, 0, 300, 300], [500, 500, 900, 900], [100, 100, 200, 900]], picture(48, 64)
    answers = iter(boxes)
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    row, = rollout(vlm, [image], ["x"], 2, 2)
    trained = encode_images(vlm, common.views(image, boxes))
    assert len(row.images) == 3 and not torch.equal(row.images[1].embeds, row.images[2].embeds)
    assert all(torch.allclose(a.embeds, b.embeds, atol=1e-5) for a, b in zip(row.images, trained))


def test_lora_gradients_through_4_bit_weights(vlm, tmp_path):
    """NF4 with gradient checkpointing, as the paper preset loads it, after decoding, against the same weights in float32."""
    import bitsandbytes as bnb
    from peft import get_peft_model
    vlm.base.save_pretrained(tmp_path), vlm.tokenizer.save_pretrained(tmp_path), vlm.image_processor.save_pretrained(tmp_path)
    loaded = [runtime.load_vlm(argparse.Namespace(model=str(tmp_path), dtype="float32", max_pixels=2 ** 20, quantize=q, checkpointing=c))
              for q, c in (("nf4", "on"), ("none", "off"))]
    layers = [x.base.model.language_model.layers[1].mlp for x in loaded]
    assert isinstance(layers[0].down_proj, bnb.nn.Linear4bit)
    for name, module in loaded[0].base.model.language_model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            whole = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            loaded[1].base.model.language_model.get_submodule(name).weight.data.copy_(whole)
    gradients = []
    for x in loaded:
        torch.manual_seed(0)
        x.model = get_peft_model(x.model, runtime.lora_config(4, 8)).train()
        row, = rollout(x, [picture(32, 32)], ["x"], 1, 4)
        t = build_trajectory(x, "Find it.", encode_images(x, [picture(32, 32)] * 2), TEXTS)
        trajectory_logprobs(x, [t])[0].mean().backward()
        gradients.append({n: p.grad for n, p in x.model.named_parameters() if "lora_B" in n})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7
    for name, g in gradients[0].items():
        assert g.abs().max() > 1e-4 and torch.allclose(g, gradients[1][name], rtol=1e-2, atol=1e-4), name


# ------------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------------
def test_accumulation_equals_one_large_batch(vlm):
    images = encode_images(vlm, [picture(32, 32), picture(48, 64, 1)])
    batch = [build_trajectory(vlm, "Find it.", images[:n], TEXTS[:n]) for n in (1, 2, 2, 1)]
    weight = vlm.base.model.language_model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    tokens, gradients = sum(len(t.target) for t in batch), []
    for size in (4, 1):
        weight.grad = None
        for i in range(0, 4, size):
            (-trajectory_logprobs(vlm, batch[i:i + size])[0].sum() / tokens).backward()
        gradients.append(weight.grad)
    weight.requires_grad_(False)
    assert gradients[0].abs().max() > 1e-3 and torch.allclose(*gradients, atol=1e-6)


def test_reward_and_advantage_by_hand():
    sample = {"width": 100, "height": 100, "bbox": [0, 0, 50, 100]}
    assert reward([None, [0, 0, 1000, 1000], [0, 0, 500, 500]], sample) == pytest.approx(0.5 + 0.1 * 2 / 3)
    assert reward([[0, 0, 500, 1000], [0, 0, 500, 1000], None], sample) == pytest.approx(0.1 * 2 / 3)
    a = advantages(torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.3, 0.3]]))
    deviation = (1 / 6) ** 0.5
    assert torch.allclose(a, torch.tensor([[-0.5, 0.5, 0], [0, 0, 0]]) / (deviation + 1e-4), atol=1e-6)


def test_the_composite_reward_by_hand():
    sample, good, poor = {"width": 100, "height": 100, "bbox": [0, 0, 50, 100]}, [0, 0, 500, 1000], [0, 0, 1000, 1000]
    score = common.six_component_reward                # the IoU of poor is 0.5
    assert score([poor, good, good], sample) == pytest.approx(0.5 * 0.5 + 0.3 + 0.2 * (1 - 1 / 3) + 0.1)
    assert score([poor, poor, poor], sample) == pytest.approx(0.3 / 3 + 0.1 - 0.2)
    assert score([good, poor, None], sample) == pytest.approx(-0.5 + 0.2 + 0.1 * 2 / 3 - 0.5 * (0.49 + 0.49))


def test_each_term_of_the_grpo_loss_by_hand():
    logprob, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    advantage, entropy = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    loss, policy, kl, h = grpo_loss(logprob, ref, advantage, entropy, 0.04, 0.01)
    assert (policy.item(), kl.item(), h.item()) == pytest.approx((0.0, 1.5, 0.75))
    assert loss.item() == pytest.approx(0.04 * 1.5 - 0.01 * 0.75)
    e = 2.718281828
    assert grpo_loss(logprob, ref, advantage, entropy, 1, 0, "k3")[2].item() == pytest.approx(e ** -0.5 + 0.5 - 1 + e - 1 - 1)
    # the gradient of the policy term alone raises what was better than its group
    logprob.requires_grad_(True)
    grpo_loss(logprob, ref, advantage, entropy, 0, 0)[0].backward()
    assert logprob.grad.tolist() == [-2.0, 1.0]


def test_entropy_and_logprob_by_hand(vlm):
    t = build_trajectory(vlm, "Find it.", encode_images(vlm, [picture(32, 32)]), TEXTS[:1])
    logprob, entropy = trajectory_logprobs(vlm, [t])
    ids = torch.tensor([t.ids])
    logits = vlm.base(input_ids=ids, mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(),
                      **vlm.image_processor(images=[picture(32, 32)], return_tensors="pt")).logits[0].double()
    logits[:, vlm.base.config.image_token_id] = -torch.inf      # never a word
    p = logits[t.predictor].softmax(-1)
    assert torch.allclose(logprob.double(), p[range(len(t.target)), t.target].log(), atol=1e-4)
    assert torch.allclose(entropy.double(), -(p * p.log()).nansum(-1), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------
# Phase 0
# ------------------------------------------------------------------------------------------------------------------
def test_interpolation():
    assert make_data.interpolate([0, 0, 9, 9], [1, 2, 3, 4], 2, "direct") == [[0, 0, 9, 9], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert make_data.interpolate([0, 0, 100, 100], [100, 50, 300, 101], 2) == [[0, 0, 100, 100], [50, 25, 200, 100], [100, 50, 300, 101]]


def test_perturbed_boxes_keep_to_the_filter():
    rng, box = random.Random(0), [400, 300, 600, 900]
    ious = [iou(make_data.perturb(rng, box, 0.85), box) for _ in range(50)]
    assert 0.1 < min(ious) and max(ious) <= 0.85 and max(ious) - min(ious) > 0.3


def test_template_traces_say_what_the_geometry_is():
    truth, say = [400, 400, 600, 600], lambda before, after: make_data.template_trace([before, after], [400, 400, 600, 600], 1)
    assert say([360, 400, 560, 600], truth) == "The red box is too far left. I move it right."
    assert say([400, 440, 600, 560], truth) == "The red box is too short. I make it taller."
    assert say([100, 700, 200, 800], truth) == ("The red box is on the wrong object. I see the target at the middle. "
                                                "I move the box right and up.")
    assert say(truth, truth) == "The red box fits well. I keep it."
    assert make_data.template_trace([[0, 0, 100, 100]], truth, 0) == "I look for the object. I see it at the upper left."


def test_teacher_traces_may_not_leak():
    fault = make_data.trace_fault
    assert fault("The box is too low. I move it up.", "the cat") is None and fault("Number 23 is left.", "player 23") is None
    assert fault("Move it to 312.", "the cat") == "coordinates" and fault("", "the cat") == "empty"
    assert fault("The ground truth is higher.", "the cat") == "leak" and fault("It is too low. So I", "the cat") == "unfinished"


def test_vlm_teacher_asks_again_and_shows_the_overlay(vlm, monkeypatch):
    args, good = argparse.Namespace(steps=1, max_tokens=4), "I see it at the left. It is the only one."
    rows = [{"expression": "the cat", "boxes": [[0, 0, 500, 500], [500, 500, 900, 900]]}, {"expression": "a dog", "boxes": [[0, 0, 100, 100]] * 2}]
    texts, shown = {"the cat": ["Go to 312.", good, good], "a dog": [good, "no full stop", "", good]}, []

    def said(vlm, images, prompts, *_, seeds, **__):
        shown.append((images, prompts, seeds))
        return [common.Trajectory(texts=[texts["the cat" if "the cat" in p else "a dog"].pop(0)]) for p in prompts]

    monkeypatch.setattr(make_data, "rollout", said)
    images = [picture(32, 32), picture(32, 32, 1)]
    traces, rejected = make_data.vlm_traces(vlm, images, rows, args, [10, 20])
    assert traces == [[good, good], [good, good]] and rejected == {"coordinates": 1, "unfinished": 1, "empty": 1}
    assert [len(call[0]) for call in shown] == [2, 1, 2, 1, 1] and shown[1][2] == [11]         # only what was rejected is asked again
    assert shown[0][0][0].tobytes() == images[0].tobytes()                                     # step 0 sees no overlay
    assert shown[2][0][0].tobytes() == draw_overlay(images[0], [0, 0, 500, 500]).tobytes() and "[500, 500, 900, 900]" in shown[2][1][0]
    texts["a dog"] = ["1"] * 3 + [good]
    traces, _ = make_data.vlm_traces(vlm, images[1:], rows[1:], args, [20])
    assert traces == [None]


def test_split_is_by_image_and_balanced():
    samples = [{"source": "abc"[i % 3], "image": f"{i // 2}.png", "id": i} for i in range(120)]
    sides = make_data.split(samples, {"train": 60, "val": 14, "test": 13}, 0)
    assert {k: len(v) for k, v in sides.items()} == {"train": 60, "val": 14, "test": 13}
    seen = {side: {s["image"] for s in rows} for side, rows in sides.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert [sum(s["source"] == x for s in sides["test"]) for x in "abc"] == [5, 4, 4]
    with pytest.raises(ValueError, match="too few samples"):
        make_data.split(samples, {"train": 119, "val": 1, "test": 3}, 0)


def test_no_expression_is_ambiguous():
    """Reads the expression anew, by its words alone, and finds the one object that it fits."""
    rng = random.Random(0)
    for i in range(900):
        objects = toy.make_scene(rng, distractors=True if i % 3 == 1 else None)
        found = toy.refer(rng, objects, toy.SOURCES[i % 3])
        if not found:
            continue
        words, target = found
        head, _, relation = words.partition(" that is ")

        def fits(o, phrase):
            named = phrase.split()[1:]
            return all(w in (o["kind"], o["color"], o["size"]) for w in named if w not in toy.SUPERLATIVES)

        some = [o for o in objects if fits(o, head)]
        if relation:
            where, anchor = re.match(r"(.*?) (the (?:small |large )?(?:\w+ )?\w+)$", relation).groups()
            where = relation[:relation.index(" the ", relation.index("of") if "of" in relation else 0)]
            anchor = relation[len(where) + 1:]
            anchors = [o for o in objects if fits(o, anchor)]
            assert len(anchors) == 1, words
            axis, sign = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[where]
            some = [o for o in some if o is not anchors[0] and sign * (o["center"][axis] - anchors[0]["center"][axis]) > 0]
        for word, key in toy.SUPERLATIVES.items():
            if word in head.split():
                assert len(some) > 1
                some = [max(some, key=key)]
        assert some == [target], words


# ------------------------------------------------------------------------------------------------------------------
# Phase 3, files, inputs
# ------------------------------------------------------------------------------------------------------------------
def test_tables_by_hand():
    ious = np.array([[0.4, 0.9, 0.5], [0.7, 0.7, 0.705], [0.9, 0.2, 0.0], [0.0, 0.0, 0.1]])
    a, b, far = [0, 0, 500, 500], [0, 0, 500, 450], [600, 600, 900, 900]
    chosen = evaluate.choices(ious, [[far, a, b], [a, a, a], [a, b, None], [None, None, None]])
    assert chosen["best of steps"].tolist() == [0.9, 0.705, 0.9, 0.1] and chosen["first step"].tolist() == [0.4, 0.7, 0.9, 0.0]
    assert chosen["last step"].tolist() == [0.5, 0.705, 0.0, 0.1] and chosen["last valid"].tolist() == [0.5, 0.705, 0.2, 0.0]
    assert chosen["medoid"].tolist() == [0.5, 0.705, 0.2, 0.0]         # a and b agree, the later one counts
    assert evaluate.metrics(ious[:, 0]).mean(0).tolist() == pytest.approx([0.5, 0.5, 0.25, 0.5])
    two = evaluate.changes(ious)
    assert [two[k][0] for k in ("first", "last", "delta")] == pytest.approx([0.5, 0.32625, -0.17375])
    assert [two[k][0] for k in ("improved", "stagnated", "degraded")] == [0.5, 0.25, 0.25] and two["n"] == 4


def test_intervals_against_known_answers():
    hits = np.arange(500) < 400
    mean, low, high = evaluate.estimate(hits)
    half = 1.96 * (0.8 * 0.2 / 500) ** 0.5                             # the normal approximation of a share
    assert mean == pytest.approx(0.8) and low == pytest.approx(0.8 - half, abs=0.004) and high == pytest.approx(0.8 + half, abs=0.004)
    rng = np.random.default_rng(1)
    a, shift = rng.random(500), rng.normal(0.03, 0.05, 500)
    _, low, high = evaluate.estimate((a + shift) - a)                  # paired: what both share cancels
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 500 ** 0.5, rel=0.1)
    assert evaluate.estimate(hits) == evaluate.estimate(hits.reshape(-1, 1))[0]                 # seeded


def test_strata_and_adaptive_stopping():
    samples = [dict(GOOD, source="ab"[i % 2], bbox=[0, 0, 2 + i, 4], width=20, height=10) for i in range(6)]
    parts = evaluate.strata(samples, np.array([0.2, 0.49, 0.5, 0.74, 0.75, 1.0]))
    assert [v.sum() for v in parts["step-0 IoU"].values()] == [2, 2, 2] and [v.sum() for v in parts["source"].values()] == [3, 3]
    assert parts["size"]["small third"].tolist() == [True] * 2 + [False] * 4
    a, near, far = [0, 0, 100, 100], [0, 0, 100, 90], [500, 500, 600, 600]
    assert evaluate.stop_step([a, far, near, near, near], 0.8, 4) == 3 and evaluate.stop_step([a, near, far], 0.8, 2) == 1
    assert evaluate.stop_step([a, None, a, a], 0.8, 2) == 2 and evaluate.stop_step([a, a, a], 1.0, 2) == 2
    rows = [{"boxes": [far, a, a], "read": [100, 150, 200]}, {"boxes": [a, a, far], "read": [100, 150, 200]}]
    at = {(r["threshold"], r["T"]): r for r in evaluate.adaptive(np.array([[0, 0.6, 0.6], [0.8, 0.8, 0]]), rows)}
    assert (at[0.9, 2]["steps"], at[0.9, 2]["cost"], at[0.9, 2]["mean IoU"][0]) == pytest.approx((1.5, 1.75, 0.7))
    assert (at[1.0, 2]["steps"], at[1.0, 2]["mean IoU"][0], at[0.5, 0]["cost"]) == pytest.approx((2, 0.3, 1))


def test_a_file_of_predictions_is_scored_or_refused(tmp_path):
    samples = [dict(GOOD, id=str(i)) for i in range(2)]                 # the truth: [0, 0, 250, 500]
    right, half = [0, 0, 250, 500], [0, 0, 250, 250]
    rows = [{"method": m, "id": i, "boxes": boxes} for m, i, boxes in
            (("one", "1", [right]), ("one", "0", [half]), ("two", "0", [half, right]), ("two", "1", [None, right]))]
    path = tmp_path / "p.jsonl"
    runtime.write_jsonl(path, rows)
    results = evaluate.analyse(samples, evaluate.read_predictions(path, samples), 1)
    assert results["table1"]["one"]["its only box"]["mean IoU"][0] == 0.75
    assert results["table2"]["two"]["iou"][0][0] == 0.25 and results["table2"]["two"]["iou"][1][0] == 1
    assert results["differences"]["two"]["last step"]["mean IoU"][0] == 0.25
    assert "two" in evaluate.report({"n": 2, "seed": 0, "steps": 2, "model": "m", "ablations": {}, **evaluate.analyse(
        samples, evaluate.read_predictions(path, samples), 2, "two")})  # fewer boxes than T + 1
    for bad, words in ((dict(rows[0], id="7"), "line 5: id '7'"), (rows[0], "second line for 'one'"), (dict(rows[0], method="x"), "1 of the 2"),
                       (dict(rows[0], boxes=[[5, 0, 0, 5]]), "line 5: box"), (dict(rows[0], boxes=["abcd"]), "line 5: box"), ({"id": "1"}, "expected"),
                       (dict(rows[0], boxes=[]), "expected"), (dict(rows[0], texts=None), "expected"), (dict(rows[0], method=3), "expected"), (3, "expected")):
        runtime.write_jsonl(path, rows + [bad])
        with pytest.raises(ValueError, match=words):
            evaluate.read_predictions(path, samples)


def test_resumed_rows_belong_to_their_samples(tmp_path):
    """Rows count while their ids are the samples', whatever line ends a text holds; a line cut short does not."""
    samples, path, asked = [{"id": str(i), "width": 1, "height": 1} for i in range(5)], tmp_path / "log", []
    work = lambda batch: asked.extend(number for number, _ in batch) or [{"id": s["id"], "text": "a\u2028b\u0085"} for _, s in batch]
    rows = runtime.resumable(path, samples, 2, "x", work)
    assert [r["id"] for r in rows] == list("01234") and asked == [0, 1, 2, 3, 4]
    assert runtime.resumable(path, samples, 2, "x", work) == rows and len(asked) == 5
    path.write_bytes(path.read_bytes()[:-4])
    assert runtime.resumable(path, samples, 2, "x", work) == rows and asked[5:] == [4]
    del samples[2]                                                     # the batch of 0 and 1 stays
    assert [r["id"] for r in runtime.resumable(path, samples, 2, "x", work)] == list("0134") and asked[6:] == [2, 3]


GOOD = {"id": "1", "source": "s", "image": "a.png", "width": 20, "height": 10, "expression": "x", "bbox": [0, 0, 5, 5]}


def test_bad_samples_are_all_reported_at_once(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    bad = [dict(GOOD, bbox=[5, 0, 0, 5]), dict(GOOD, width=30, bbox=[0, 0, 25, 5]), dict(GOOD, image="b.png"),
           dict(GOOD, bbox=[0, 0, float("nan"), 1]), {k: v for k, v in GOOD.items() if k != "expression"}, dict(GOOD, image="cut.png"), GOOD,
           dict(GOOD, expression="a <|image_pad|>"), dict(GOOD, width=4200), dict(GOOD, source="\ud800")]
    path = tmp_path / "s.jsonl"
    runtime.write_jsonl(path, [GOOD])
    assert runtime.read_samples(path, "") == [GOOD]
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD] + bad) + "{oops\n")
    with pytest.raises(SystemExit) as e:
        runtime.read_samples(path, "")
    for line, words in enumerate(["inverted", "20 x 10", "cannot be read", "finite", "expression is 'None'", "cut.png cannot be read",
                                  "id '1' is on line 1", "special tokens", "200 to 1", "surrogate", "not JSON"], 2):
        assert re.search(f"s.jsonl, line {line}: .*{words}", str(e.value)), words
    assert runtime.read_samples(path, "", skip_bad=True) == [GOOD]
    assert len((tmp_path / "s.jsonl.skipped").read_text().splitlines()) == 12
    with pytest.raises(SystemExit, match="first run: python make_data.py"):
        runtime.read_samples(tmp_path / "none.jsonl", "python make_data.py")


def test_every_kind_of_image_is_read_or_refused_by_name(tmp_path, monkeypatch):
    load = lambda name, w=20, h=10: runtime.load_image({"image": name, "width": w, "height": h}, tmp_path)
    color = Image.new("RGB", (20, 10), (200, 100, 50))
    for mode, name in (("L", "grey.png"), ("P", "palette.png"), ("CMYK", "cmyk.jpg"), ("1", "bits.png")):
        color.convert(mode).save(tmp_path / name)
        assert load(name).mode == "RGB" and load(name).size == (20, 10)
    assert max(abs(a - b) for a, b in zip(load("cmyk.jpg").getpixel((3, 3)), (200, 100, 50))) < 12
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load("clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(torch.full((10, 20), 128 * 256, dtype=torch.int32).numpy().astype("uint16")).save(tmp_path / "deep.png")
    assert load("deep.png").getpixel((0, 0)) == (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6                                             # the camera was turned: shown as 10 x 20
    color.save(tmp_path / "turned.jpg", exif=exif)
    assert load("turned.jpg").size == (20, 10) and load("turned.jpg", 10, 20).size == (10, 20)
    color.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[color.resize((4, 2))])
    assert load("phone.jpg").size == (20, 10)
    color.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 10))])
    Image.new("F", (20, 10)).save(tmp_path / "float.tiff")
    color.save(tmp_path / "big.png")
    for name, words in (("moving.gif", "animation"), ("float.tiff", "floating-point"), ("big.png", "Pillow's limit")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 if name == "big.png" else 10 ** 9)
        with pytest.raises(ValueError, match=words):
            load(name)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text('{}[]()",:.-0123456789ebox_2d <|think>/\n`'), st.text().map(lambda x: format_box([1, 2, 3, 4])[:20] + x)))
def test_fuzz_parse_box(text):
    box = parse_box(text)
    assert box is None or len(box) == 4 and all(type(v) is int and 0 <= v <= 1000 for v in box) and box[0] < box[2] and box[1] < box[3]
    box_complete(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.builds(
    lambda field, value: json.dumps(dict(GOOD, **{field: value})).encode(), st.sampled_from(list(GOOD)),
    st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=6))))
def test_fuzz_the_manifest(tmp_path, line):
    (tmp_path / "s.jsonl").write_bytes(line)
    picture(20, 10).save(tmp_path / "a.png")
    try:
        assert len(runtime.read_samples(tmp_path / "s.jsonl", "")) == 1
    except SystemExit as e:
        assert "problems in" in str(e)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints, models, adapters
# ------------------------------------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_checkpoint_is_data_and_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runtime.save_checkpoint("c", update=1, weight=torch.ones(3))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))     # what a full disk is to a program
    try:
        with pytest.raises(SystemExit, match="c cannot be written .*make room"):
            runtime.save_checkpoint("c", update=2, weight=torch.ones(100_000))
        with pytest.raises(SystemExit, match="log cannot be written"):
            log = runtime.Log("log")
            for _ in range(3):
                log.write(text="x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert runtime.load_checkpoint("c")["update"] == 1
    torch.save({"update": Evil()}, "c")
    with pytest.raises(SystemExit, match="no checkpoint of this code"):
        runtime.load_checkpoint("c")
    assert not Path("evil").exists()


def test_foreign_models_and_adapters_are_refused(vlm, tmp_path):
    args = argparse.Namespace(model=str(tmp_path), dtype="float32", max_pixels=2 ** 20, quantize="none", checkpointing="off")
    with pytest.raises(SystemExit, match="model_type qwen3_vl"):
        runtime.load_vlm(args)
    vlm.base.save_pretrained(tmp_path), vlm.image_processor.save_pretrained(tmp_path)
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="tokenizer has no .*image_pad"):
        runtime.load_vlm(args)
    vlm.tokenizer.save_pretrained(tmp_path)
    from peft import get_peft_model
    one, other = runtime.load_vlm(args), runtime.load_vlm(args)
    one.model = get_peft_model(one.model, runtime.lora_config(4, 8))
    runtime.save_adapter(one, tmp_path / "adapter")
    other.base.model.language_model.norm.weight.data.mul_(2)
    with pytest.raises(SystemExit, match="another base model"):
        runtime.add_adapter(other, tmp_path / "adapter", "sft")
    with pytest.raises(SystemExit, match="adapter_config.json"):
        runtime.add_adapter(one, tmp_path, "sft")


def test_one_run_at_a_time_under_one_configuration(tmp_path):
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", lr=0.1)
    runtime.begin(args, "sft")
    runtime.begin(args, "sft")
    args.lr = 0.2
    with pytest.raises(SystemExit, match="lr: 0.1 then, 0.2 now"):
        runtime.begin(args, "sft")
    runtime.lock(tmp_path)
    with pytest.raises(SystemExit, match="another run works in"):
        runtime.lock(tmp_path)


def test_running_out_of_memory_names_the_sample_and_the_flag():
    with pytest.raises(SystemExit, match=r"1 \(20 x 10\); lower --batch-size"):
        with runtime.memory_for([GOOD], "--batch-size"):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_leaving_the_healthy_range_warns_once():
    healthy, warned = {"kl": (0, 0.5, "lower --lr"), "valid": (0.9, 1, "x")}, set()
    assert runtime.unhealthy([{"kl": 0.9, "valid": 1.0}] * 4, healthy, warned) == []
    said = runtime.unhealthy([{"kl": 0.9, "valid": 1.0}] * 5, healthy, warned)
    assert said == ["warning: kl is 0.900 (healthy: 0 to 0.5): lower --lr"]
    assert runtime.unhealthy([{"kl": 0.9, "valid": 1.0}] * 5, healthy, warned) == []


def test_presets_hold_the_papers_values():
    paper = {name: row[0] for table in PRESETS.values() for name, row in table.items()}
    assert [PRESETS[p][k][0] for p, k in (("sft", "lr"), ("sft", "epochs"), ("sft", "batch_size"), ("sft", "grad_accum"), ("sft", "warmup"),
            ("sft", "lora_rank"), ("sft", "lora_alpha"), ("grpo", "lr"), ("grpo", "grad_accum"), ("grpo", "group_size"))] == \
        [2e-5, 10, 4, 4, 0.1, 64, 128, 2e-6, 8, 6]
    assert (paper["temperature_first"], paper["temperature"], paper["beta"], paper["entropy"]) == (1.0, 0.7, 0.04, 0.01)
    assert [PRESETS["make_data"][f"{side}_samples"][0] for side in ("train", "val", "test")] == [2400, 510, 505]
    assert PRESETS["grpo"]["max_tokens"][0] == PRESETS["make_data"]["max_tokens"][0] == 160
    assert (paper["max_tokens"], paper["iou_max"], paper["quantize"], PRESETS["all"]["steps"][0]) == (160, 0.85, "nf4", 2)


def test_what_the_readme_states():
    text = (HERE / "README.md").read_text()
    tree = re.search(r"```text\n(README.md .*?)```", text, re.S)[1]
    assert all((HERE / line.split()[0]).exists() for line in tree.splitlines())
    packages = re.split(r"\s+", re.search(r"requirements.txt +(torch .*)", tree)[1])
    assert [re.match(r"\w+", line)[0] for line in (HERE / "requirements.txt").read_text().split()] == packages
    flags = {"--" + name.replace("_", "-") for table in PRESETS.values() for name in table}
    own = {"--preset", "--out", "--restart", "--skip-bad", "--data", "--init", "--help", "--teacher-model", "--image", "--expression", "--predictions",
           "--from-predictions", "--ablations", "--compare", "--merge"}
    foreign = {"--repo-type", "--local-dir", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    own |= {"--" + name for name in make_data.DATASETS} | set(re.findall(r'add_argument\("(--[a-z]+)"', (HERE / "benchmark.py").read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= flags | own | foreign
    assert "python make_data.py && python sft.py && python grpo.py && python evaluate.py" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (HERE / picture).exists()


# ------------------------------------------------------------------------------------------------------------------
# The paper's three datasets: small files in exactly the published types
# ------------------------------------------------------------------------------------------------------------------
COLUMNS = {  # the published columns, in Arrow's words
    "refcocog": {"image_id": "int64", "split": "string", "file_name": "string", "category_id": "int64", "ann_id": "int64",
                 "sentences": [{"raw": "string", "sent": "string", "sent_id": "int64", "tokens": ["string"]}],
                 "sent_ids": ["int64"], "ref_id": "int64", "raw_anns": "string", "raw_image_info": "string", "raw_sentences": "string",
                 "image_path": "string", "bbox": ["float64"], "captions": ["string"], "global_image_id": "string", "anns_id": "string"},
    "refadv": {"image": {"bytes": "binary", "path": "string"}, "file_name": "string", "normal_caption": "string", "solution": ["float64"],
               "width": "int64", "height": "int64", "image_source": "string", "human_authored": "bool", "use_negation": "bool",
               "distractors": "string"},
    "refl4": {"id": "int64", "caption": "string", "bbox": ["float64"], "bbox_area": "float64", "bbox_id": "string",
              "ori_category_id": "string", "image_id": "string", "height": "int64", "width": "int64", "file_name": "string",
              "is_rewrite": "bool", "split": "string"}}


def encoded(mode="RGB", format="JPEG", size=(20, 10), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(file, format, **options)
    return file.getvalue()


def a_ref(ref_id, image_id, sents, split="train"):
    return {"ref_id": ref_id, "ann_id": ref_id, "category_id": 1, "image_id": image_id, "split": split,
            "sent_ids": list(range(len(sents))), "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
            "sentences": [{"raw": s.upper(), "sent": s, "sent_id": i, "tokens": s.split()} for i, s in enumerate(sents)]}


@pytest.fixture(params=["parquet", "stand-in"])
def folders(request, tmp_path, monkeypatch):
    """The three downloads, COCO 9 in two of them; `stand-in` hands out the rows itself, for a machine without pyarrow."""
    if request.param == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
    tables = {}

    def arrow(kind):
        return (pyarrow.list_(arrow(kind[0])) if isinstance(kind, list) else getattr(pyarrow, kind + "_" * (kind == "bool"))()
                if isinstance(kind, str) else pyarrow.struct([(k, arrow(v)) for k, v in kind.items()]))

    def parquet(path, columns, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{name: row.get(name) for name in columns} for row in rows]
        tables[path] = rows
        if request.param == "parquet":
            schema = pyarrow.schema([(name, arrow(kind)) for name, kind in columns.items()])
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
        else:
            path.touch()

    if request.param == "stand-in":
        monkeypatch.setattr(make_data, "read_parquet", lambda path, names: [{name: row[name] for name in names} for row in tables[path]])
    g, adv, l4, coco = (tmp_path / name for name in make_data.DATASETS)
    refs = [a_ref(7, 9, ["the cat", "a cat on the left"]), a_ref(8, 9, ["gone"], "val"), a_ref(9, 30, [" "], "test")]
    boxes, sizes = {7: [12, 2, 8, 8.5], 8: [25, 2, 8, 8], 9: [0, 0, 5, 5]}, {9: (20, 10), 30: (20, 10)}
    g.mkdir(), (coco / "train2014").mkdir(parents=True)
    (g / "refs(umd).p").write_bytes(pickle.dumps(refs, 2))
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": w, "height": h} for i, (w, h) in sizes.items()]
    (g / "instances.json").write_text(json.dumps({"images": images, "categories": [], "annotations": [
        {"id": i, "image_id": 9, "category_id": 1, "bbox": box} for i, box in boxes.items()]}))
    parquet(tmp_path / "jxu124/data/train.parquet", COLUMNS["refcocog"], [dict(
        ref, bbox=make_data.xyxy(boxes[ref["ref_id"]]), raw_anns=json.dumps({"bbox": boxes[ref["ref_id"]]}),
        raw_image_info=json.dumps(next(i for i in images if i["id"] == ref["image_id"]))) for ref in refs])
    (coco / "train2014/COCO_train2014_000000000009.jpg").write_bytes(encoded("L"))
    parquet(adv / "data/train-00000-of-00001.parquet", COLUMNS["refadv"], [
        {"image": {"bytes": content, "path": None}, "file_name": name, "normal_caption": "the one", "solution": [1.0, 2.0, 20.0, 9.0],
         "width": 20, "height": 10, "image_source": source, "human_authored": True, "use_negation": False, "distractors": "[1, 2, 3]"}
        for name, source, content in (("000000000139.jpg", "coco_val2017", encoded("P", "PNG")),
                                      ("0007786c9352aac1.jpg", "openimages", encoded("CMYK")))])
    turned = Image.Exif()
    turned[0x0112] = 6
    photos = {"objects365_v2_00922765.jpg": encoded(exif=turned), "COCO_train2014_000000000009.jpg": encoded("L"), "not_asked_for.jpg": b""}
    for split, number, image_id, name, size in (("val", 0, "o365_922765", "objects365_v2_00922765.jpg", (10, 20)),
                                                ("test", 1, "coco_9", "COCO_train2014_000000000009.jpg", (20, 10))):
        parquet(l4 / f"ref-l4-{split}.parquet", COLUMNS["refl4"], [
            {"id": number, "caption": "this", "bbox": [1.5, 2.0, 3.0, 4.0], "image_id": image_id, "width": size[0], "height": size[1],
             "file_name": name, "is_rewrite": False, "split": split}])
    with tarfile.open(l4 / "images.tar.gz", "w:gz") as tar:
        for name, content in photos.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {"refcocog": g, "refadv": adv, "refl4": l4, "coco": coco}


def test_the_published_files_become_samples(folders, tmp_path, capsys):
    samples = {s["id"]: s for s in make_data.paper_samples(folders, 0)}
    said = capsys.readouterr().out
    assert "refcocog: 4 read, 2 kept; dropped: 1 without a box inside the image, 1 without words\n" in said
    assert "refadv: 2 read, 2 kept; dropped: none\n" in said
    assert {i: (s["key"], s["bbox"], s["expression"]) for i, s in samples.items()} == {
        "refcocog_7-0": ("coco 9", [12, 2, 20, 10], "the cat"), "refcocog_7-1": ("coco 9", [12, 2, 20, 10], "a cat on the left"),
        "refadv_0": ("coco 139", [1, 2, 20, 9], "the one"), "refadv_1": ("openimages 0007786c9352aac1", [1, 2, 20, 9], "the one"),
        "refl4_0": ("o365 922765", [1.5, 2, 4.5, 6], "this"), "refl4_1": ("coco 9", [1.5, 2, 4.5, 6], "this")}
    assert normalize_box(samples["refadv_0"]["bbox"], 20, 10)[2] == 1000
    data = tmp_path / "data"
    make_data.write_images([s for i, s in samples.items() if i != "refadv_1"], data, folders)
    assert sorted(f.name for f in (data / "images").iterdir()) == ["000000000139.jpg", "COCO_train2014_000000000009.jpg",
                                                                   "objects365_v2_00922765.jpg"]
    make_data.write_images(list(samples.values()), data, folders)
    runtime.write_jsonl(data / "s.jsonl", list(samples.values()))
    assert runtime.read_samples(data / "s.jsonl", "") == list(samples.values())        # every image is what its sample says
    assert runtime.load_image(samples["refl4_0"], data).size == (10, 20)
    (folders["coco"] / "train2014/COCO_train2014_000000000009.jpg").unlink()
    with pytest.raises(SystemExit, match="1 images are missing, .*000009.jpg, which --coco should hold(.|\n)*curl"):
        make_data.write_images(list(samples.values()), data, folders)


def test_both_forms_of_refcocog_give_the_same(folders):
    forms = folders["refcocog"], folders["refcocog"].parent / "jxu124"
    original, parquet = (list(make_data.refcocog(form, folders["coco"])) for form in forms)
    assert len(original) == 4 and original == parquet


def test_an_image_of_two_sources_stays_on_one_side():
    """Ref-Adv-s as it is: 1,142 rows, up to six of an image; the other two, as large, share half of their images."""
    samples = [{"source": "refadv", "image": f"{i}", "key": f"openimages {i // 6 if i < 600 else i}"} for i in range(1142)]
    samples += [{"source": source, "image": f"{source} {i}", "key": f"coco {i // 2 + (source == 'refl4') * 285}"}
                for source in ("refcocog", "refl4") for i in range(1142)]
    sizes = {"train": 2400, "val": 510, "test": 505}
    for seed in range(3):
        sides = make_data.split(samples, sizes, seed)
        assert {side: len(rows) for side, rows in sides.items()} == sizes
        keys = [{s["key"] for s in rows} for rows in sides.values()]
        assert len(set.union(*keys)) == sum(map(len, keys))
    assert sides == make_data.split(samples, sizes, 2) != make_data.split(samples, sizes, 3)
    assert [sum(s["source"] == x for s in sides["test"]) for x in ("refadv", "refcocog", "refl4")] == [169, 168, 168]


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("refs").write_bytes(b"\x80\x02](U\x04caf\xe9K\x07e.")            # as Python 2 writes it
    assert make_data.read_refs("refs") == ["caf\xe9", 7]
    for protocol in range(5):
        Path("refs").write_bytes(pickle.dumps([Evil()], protocol))
        with pytest.raises(SystemExit, match="refs is not the plain list .*needs no code"):
            make_data.read_refs("refs")
    Path("refs").write_bytes(b"\x80\x02](U\x04ca")
    with pytest.raises(SystemExit, match="refs is not the plain list"):
        make_data.read_refs("refs")
    assert not Path("evil").exists()


def test_missing_files_are_named_with_what_gets_them(tmp_path):
    (tmp_path / "refs(umd).p").touch()
    said = make_data.missing_files({"refcocog": tmp_path, "refadv": None, "refl4": tmp_path / "my data", "coco": tmp_path})
    assert [problem.split(":")[0] for problem in said] == ["--refcocog", "--refadv", "--refl4", "--coco"]
    for problem, words in zip(said, (
            ("has no instances.json.", "jxu124/refcocog", "hf download"),
            ("not given", "about 255 MB, CC BY 4.0", "--local-dir datasets/refadv"),
            ("has no ref-l4-val.parquet and no ref-l4-test.parquet and no images.tar.gz", "(3.5 GB), hub id JierunChen/Ref-L4",
             "CC BY-NC 4.0", f"--local-dir '{tmp_path}/my data'"),
            ("has no COCO_train2014_*.jpg", "curl -LO http://images.cocodataset.org/zips/train2014.zip"))):
        assert all(w in problem for w in words), problem


# ------------------------------------------------------------------------------------------------------------------
# The real commands, very small
# ------------------------------------------------------------------------------------------------------------------
SMALL = {"make_data.py": "--train-samples 24 --val-samples 6 --test-samples 7 --max-tokens 60", "sft.py": "--epochs 1 --batch-size 2 --grad-accum 2 --save-every 2",
         "grpo.py": "--updates 2 --val-every 2 --val-prompts 3 --grad-accum 2 --group-size 2 --max-tokens 60", "evaluate.py": "--pictures 2 --max-tokens 60 --longest 3"}


server = multiprocessing.get_context("forkserver")  # forks from a process that has loaded the libraries: seconds a start less
server.set_forkserver_preload(["peft", "bitsandbytes", "transformers.models.qwen3_vl.modeling_qwen3_vl", "test_common"])


def arguments(script, out):
    return [str(HERE / script), *SMALL[script].split(), "--out", str(out)]


def child(argv, folder, output, environment):
    """`python argv` in `folder`, in this process; what it prints goes to the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2), os.chdir(folder), os.environ.update(environment)
    for ours in ("common", "runtime", "toy", "make_data", "evaluate"):
        sys.modules.pop(ours, None)
    torch.set_num_threads(1 if environment else torch.get_num_threads())  # of two processes on two cores
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def start(argv, folder, **environment):
    """-> the running process; its output is in the file process.output."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output_{time.time_ns()}"
    output.touch()
    process = server.Process(target=child, args=(argv, folder, output, environment))
    process.start()
    process.output = output
    return process


def command(script, out, *more):
    """-> (exit status, what it printed)."""
    process = start([*arguments(script, out), *more], out.parent)
    process.join()
    return process.exitcode, process.output.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The four commands, each started once and never stopped: (folder, seconds of each)."""
    out, seconds = tmp_path_factory.mktemp("whole") / "run", {}
    code, said = command("sft.py", out)
    assert code == 1 and "first run: python make_data.py" in said and "Traceback" not in said
    for script in SMALL:
        began = time.time()
        ran = subprocess.run([sys.executable, *arguments(script, out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds[script] = time.time() - began
        assert ran.returncode == 0, ran.stdout
        assert not re.search(r"warn|Traceback|deprecat|failed", ran.stdout, re.I), ran.stdout
    return out, seconds


def test_the_four_commands(run):
    out, _ = run
    text = (out / "results.md").read_text()
    assert all(row[0] in text for row in evaluate.CONFIGURATIONS[:5]) and "Table 2" in text
    assert all((out / f).exists() for f in ("figures/corrections.png", "figures/failures.png", "grpo/adapter_model.safetensors",
                                            "grpo_single/adapter_config.json", "log/grpo.jsonl", "log/sft.jsonl"))
    rows = [json.loads(line) for line in (out / "log/grpo.jsonl").read_text().splitlines()]
    updates, validations = [r for r in rows if "reward" in r], [r["val_reward"] for r in rows if "val_reward" in r]
    assert len(updates) == 2 and len(validations) == 2
    assert updates[0]["kl"] < 1e-5 < updates[1]["kl"]          # the reference is the adapter that training began from
    saved = load_file(out / "grpo/adapter_model.safetensors")  # the best by validation: here the first or the last
    best, last = validations.index(max(validations)), runtime.load_checkpoint(out / "grpo.checkpoint")["adapter"]
    other = last if best else load_file(out / "sft/adapter_model.safetensors")
    assert all(torch.equal(saved[k], other[k]) for k in saved)
    for code, words, *more in ((0, "is finished"), (1, "epochs: 1 then, 2 now", "--epochs", "2"), (2, "--learning-rate", "--learning-rate", "1"),
                               (2, "expected 1e-09 to 1", "--lr", "nan")):
        ended, said = command("sft.py", out, *more)
        assert ended == code and words in said, said


def test_predictions_of_others_and_a_picture_of_your_own(run):
    out, _ = run
    own, file = out.parent / "own", out.parent / "p.jsonl"
    shutil.copytree(out, own)
    code, said = command("evaluate.py", own, "--ablations", "--compare", str(out), "--predictions", str(file))
    assert code == 0, said
    before = json.loads((own / "results.json").read_text())
    assert len(before["ablations"]) == 3 + 3 + 2 and (own / "log/evaluate_grpo_random_text.jsonl").exists()
    assert all(before["ablations"]["SFT + GRPO + IVT"][k] == before["ablations"][f"{out}: SFT + GRPO + IVT"][k] for k in ("first", "validation"))
    code, said = command("evaluate.py", own, "--from-predictions", str(file))
    assert code == 0, said
    after = json.loads((own / "p/results.json").read_text())
    assert all(after[k] == before[k] for k in ("table1", "table2", "differences", "strata", "adaptive", "findings")) and before["table2"]
    picture(90, 70).save(out.parent / "photo.png")
    code, said = command("evaluate.py", own, "--image", str(out.parent / "photo.png"), "--expression", "the red star")
    assert code == 0 and "step 2: " in said and (own / "figures/photo.png").exists(), said
    code, said = command("evaluate.py", out, "--merge", str(out.parent / "merged"))
    assert code == 0 and load_file(out.parent / "merged/model.safetensors"), said
    code, said = command("evaluate.py", out, "--image", "none.png", "--expression", "x")
    assert code == 1 and "none.png" in said and "Traceback" not in said


def test_benchmark_of_a_run(run):
    argv = [sys.executable, str(HERE / "benchmark.py"), "--run", str(run[0]), "--repeats", "1", "--sizes", "1", "--tokens", "8"]
    ran = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0 and not re.search(r"warn|Traceback|deprecat", ran.stdout, re.I), ran.stdout
    rows = [line for line in ran.stdout.splitlines() if re.match(r"[1-6]\. ", line)]
    assert [row[0] for row in rows] == list("126345") and "2 of 2 greedy" in ran.stdout, ran.stdout


def test_a_trajectory_may_hold_still_and_leave_mistakes_unlearnt(run, tmp_path):
    out, rows = tmp_path / "run", lambda name: [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
    assert command("make_data.py", out, "--keep", "all", "--path", "direct")[0] == 0
    made = rows("data/sft.jsonl")
    student = {row["id"]: row for row in rows("data/student.jsonl")}
    held = [row for row in made if student[row["id"]]["iou"] > 0.85]
    assert held and all(row["boxes"] == [student[row["id"]]["box"]] * 3 for row in held)
    moved = [row for row in made if student[row["id"]]["iou"] <= 0.85]
    assert moved and all(row["boxes"] == [student[row["id"]]["box"]] + [row["truth"]] * 2 for row in moved)
    assert any(row["iou"] < 0.5 for row in made)                    # what the next lines are about
    seen = []
    for which in ("all", "right"):
        assert command("sft.py", out, "--first-step", which, "--restart")[0] == 0
        seen.append(sum(row["tokens"] for row in rows("log/sft.jsonl")))
    assert seen[1] < seen[0]


def test_two_processes_do_what_one_does(run, tmp_path):
    """The same global batches, shared by two processes: the same boxes, and losses up to rounding."""
    one, _ = run
    out = tmp_path / "run"

    def together(argv):  # as torchrun starts them
        port = str(random.randrange(20000, 30000))
        return [start(argv, tmp_path, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port) for rank in "01"]

    for script in SMALL:
        processes = together(arguments(script, out))
        for process in processes:
            process.join()
            assert process.exitcode == 0, process.output.read_text()
    read = lambda folder, name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    assert read(out, "data/student.jsonl") == read(one, "data/student.jsonl")
    for name in ("log/sft.jsonl", "log/grpo.jsonl", "log/grpo_single.jsonl"):
        rows = list(zip(read(out, name), read(one, name), strict=True))
        assert all(a.keys() == b.keys() and a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4) for a, b in rows for k in a), rows
    for a, b in zip(read(out, "log/evaluate_base.jsonl"), read(one, "log/evaluate_base.jsonl"), strict=True):
        assert a["id"] == b["id"] and a["boxes"] == b["boxes"]
    odd = together([*arguments("sft.py", out), "--grad-accum", "3"])[0]
    odd.join()
    assert odd.exitcode == 1 and "not a multiple of the 2 processes" in odd.output.read_text()


def interrupted(script, out, when, number=signal.SIGKILL):
    """Starts a command and sends a signal as soon as `when()` is true; returns (exit code, its output)."""
    process = start(arguments(script, out), out.parent)
    while process.is_alive() and not when():
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode, process.output.read_text()


def test_a_stopped_run_ends_as_one_that_never_stopped(run, tmp_path):
    """Each phase killed at a random moment, SFT in the middle of a write and by Ctrl-C too."""
    whole, seconds = run
    out, seed = tmp_path / "run", random.randrange(10 ** 6)
    print("seed", seed)
    rng = random.Random(seed)
    for script in SMALL:
        if script == "sft.py":
            temporary = out / "sft.checkpoint.tmp"
            code, said = interrupted(script, out, temporary.exists)
            assert code == -signal.SIGKILL, said
            began, file = time.time(), out / "sft.checkpoint"
            code, said = interrupted(script, out, lambda: file.exists() and file.stat().st_mtime > began, signal.SIGINT)
            assert code == 130 and "to go on: python" in said and "Traceback" not in said, said
        moment = time.time() + rng.uniform(0, 0.6) * seconds[script]  # a start is faster here
        interrupted(script, out, lambda: time.time() > moment)
        code, said = command(script, out)
        assert code == 0, said
    files = [f.relative_to(whole) for f in whole.rglob("*") if f.is_file() and f.suffix in (".jsonl", ".json", ".safetensors", ".md", ".png")]
    assert len(files) > 40
    for file in files:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), f"{file}, seed {seed}"
