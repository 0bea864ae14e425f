"""Tests of the core: boxes, sequences, the rollout, log-probabilities, reward and loss.

python -m pytest -q        these and those in tests/, on a Qwen3-VL of random weights
"""

import random
import timeit
from dataclasses import replace

import common
from common import IVT, box_complete, build_trajectory, encode_images, parse_box, rollout
from tests.small import TEXTS, picture, sampler_gap, vlm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper


# Boxes --------------------------------------------------------------------------------------------
def test_boxes_are_normalized_by_floor_and_back():
    assert common.normalize_box([0, 10.9, 320, 480], 640, 480) == [0, 22, 500, 1000]
    assert common.normalize_box([-3, 0, 700, 481], 640, 480) == [0, 0, 1000, 1000]
    rng = random.Random(0)
    for _ in range(200):
        sizes = rng.randint(1, 4000), rng.randint(1, 4000)
        bbox = [rng.uniform(0, size) for size in sizes * 2]
        back = common.denormalize_box(common.normalize_box(bbox, *sizes), *sizes)
        for before, after, size in zip(bbox, back, sizes * 2):
            assert 0 <= before - after < size / 1000 + 1e-6


def test_iou_by_hand():
    assert common.iou([0, 0, 10, 10], [5, 5, 15, 15]) == pytest.approx(25 / 175)
    assert common.iou([0, 0, 10, 10], [0, 0, 10, 10]) == 1
    assert common.iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    sample = {"width": 200, "height": 100, "bbox": [0, 0, 100, 50]}
    assert common.box_iou([0, 0, 500, 500], sample) == 1
    assert common.box_iou([0, 0, 500, 1000], sample) == pytest.approx(0.5)
    assert common.box_iou(None, sample) == 0


WHOLE = [1, 2, 30, 40]
VALID_TEXTS = [
    '{"bbox_2d": [1, 2, 30, 40]}',
    '```json\n[\n  {"bbox_2d": [1, 2, 30, 40], "label": "a cat"}\n]\n```',
    '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8], "la',  # cut short
    '{"bbox_2d": [1, 2, 30, 40]} That is the cat, about 3 of 10.',
    '{"bbox_2d": [1, 2, 30, 40,],}',
    "(1, 2, 30, 40)",
    "(1,2),(30,40)",
    "[[1, 2], [30, 40]]",
    "<|box_start|>(1,2),(30,40)<|box_end|>",
    "<think>It was [9, 9, 99, 99], of 4 cats.</think>\n[1, 2, 30, 40]",
    "<think>a</think>b</think>[1, 2, 30, 40]",
    "[30, 40, 1, 2]",
    "[1.0, 2, 30, 40]",
    "[1, 2, 30, 40]\x00\ud800",
    '[{"bbox_2d": [1, 2, 30, 40], "label": "the <think> sign"}]',
    '[{"label": "the [5, 6, 70, 80] sign", "bbox_2d": [1, 2, 30, 40]}]',
    '<think>a</think>[{"label": "a </think> \\" <think>", "bbox_2d": [1, 2, 30, 40]}]',
]
INVALID_TEXTS = [
    "<think>I say [1, 2, 30, 40]",
    "[1, 2, 30, 1001]",
    "[-1, 2, 30, 40]",
    "[1.5, 2, 30, 40]",
    "[1, 2, 1, 40]",
    "[1, 2, 30]",
    "[1, 2, 30, 40, 50]",
    "[1, 2, 30, 40",
    "no box",
    f"[{'9' * 5000}, 2, 30, 40]",
]


@pytest.mark.parametrize("text", VALID_TEXTS)
def test_a_box_is_read_as_models_write_it(text):
    assert parse_box(text) == WHOLE


@pytest.mark.parametrize("text", INVALID_TEXTS)
def test_what_is_no_box(text):
    assert parse_box(text) is None


PIECES = '{}[]()",:.-0123456789ebox_2d <|think>/\n`'
CUT_SHORT = common.format_box([1, 2, 3, 4])[:20]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(PIECES), st.text().map(lambda text: CUT_SHORT + text)))
def test_any_text_gives_a_valid_box_or_none(text):
    box = parse_box(text)
    box_complete(text)
    if box is not None:
        assert len(box) == 4
        assert all(type(v) is int and 0 <= v <= 1000 for v in box)
        assert box[0] < box[2] and box[1] < box[3]


@pytest.mark.parametrize("start", ["[", "[1,1],", "[1,1,1,1", '"label": "', "<think>"])
@pytest.mark.parametrize("filling", [" ", "\n", "[", "1", "[1,", '"label":"\\\\'])
def test_the_time_of_reading_grows_with_the_text_alone(start, filling):
    def seconds(length):
        text = start + filling * (length // len(filling))
        return min(timeit.repeat(lambda: box_complete(text) or parse_box(text), number=1))

    assert seconds(16_000) < 64 * seconds(1_000)  # not 256 times


def test_a_step_ends_with_its_object():
    assert box_complete('[{"bbox_2d": [1, 2, 3, 4], "label": "the <think> sign"}]')
    assert not box_complete('{"bbox_2d": [1, 2, 3, 4]')
    assert not box_complete('[{"label": "the {[1, 2, 3, 4]} sign", ')
    assert box_complete('{"bbox_2d": [1, 2, 3, 4]}')
    assert box_complete("[1, 2, 3, 4]")
    assert not box_complete("<think>It is at [1, 2, 3, 4].")
    assert not box_complete("<think>a</think> <think>No, it was at [1, 2, 3, 4].")


def test_overlay_pixels():
    image = picture(100, 100)
    drawn = common.draw_overlay(image, [200, 300, 600, 700])
    assert drawn.getpixel((20, 30)) == (255, 0, 0)  # the outline
    inside = [0.75 * a + 0.25 * b for a, b in zip(image.getpixel((40, 50)), (255, 0, 0))]
    assert drawn.getpixel((40, 50)) == pytest.approx(inside, abs=2)
    assert drawn.getpixel((80, 50)) == image.getpixel((80, 50))
    whole = common.draw_overlay(image, [0, 0, 1000, 1000])  # its outline lies within the image too
    assert {whole.getpixel(at) for at in ((0, 9), (9, 0), (99, 9), (9, 99))} == {(255, 0, 0)}
    unmarked = common.draw_overlay(image, None)
    assert unmarked is not image
    assert unmarked.tobytes() == image.tobytes()


# Sequences ----------------------------------------------------------------------------------------
def test_positions_equal_the_models_own(vlm):
    images = encode_images(vlm, [picture(96, 80), picture(48, 144, 1)])
    t = build_trajectory(vlm, images, "it", TEXTS, IVT)
    ids = torch.tensor([t.ids])
    grid = torch.tensor([[1, 2 * image.rows, 2 * image.columns] for image in images])
    token = vlm.base.config.image_token_id
    kinds = (ids == token).int()
    own, _ = vlm.base.model.get_rope_index(ids, kinds, image_grid_thw=grid)  # [3, 1, L]
    whole, end = common.mrope_positions(t.ids, images, token)
    assert torch.equal(torch.tensor(whole).T, own[:, 0])
    assert end == own.max() + 1
    # A continuation computed from the running offset is the same as the whole
    cut = len(common.prompt_ids(vlm, images[0], "it", IVT))
    head, offset = common.mrope_positions(t.ids[:cut], images[:1], token)
    tail, _ = common.mrope_positions(t.ids[cut:], images[1:], token, offset)
    assert head + tail == whole


def test_loss_mask_token_by_token(vlm):
    images = encode_images(vlm, [picture(32, 32)] * 2)
    t = build_trajectory(vlm, images, "the cat", TEXTS, replace(IVT, continuation="Look."))
    assert t.boxes == [[1, 2, 30, 40], [5, 6, 70, 800]]
    assert t.predictor == sorted(t.predictor)
    assert [t.ids[p + 1] for p in t.predictor] == t.target  # the token after its predictor
    targets = {p + 1 for p in t.predictor}
    text = ""
    for i, token in enumerate(t.ids):
        word = vlm.tokenizer.decode([token])
        text += f"[{word}]" if i in targets else word

    def bracketed(words):
        return "".join(f"[{vlm.tokenizer.decode([token])}]" for token in vlm.encode(words))

    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    prompt = common.IVT_PROMPT.format(text="the cat")
    user = f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    instruction = f"\n{image}\nLook.\n"
    assert text == user + bracketed(TEXTS[0]) + instruction + bracketed(TEXTS[1])
    second = [token for token, step in zip(t.target, t.step) if step == 1]
    assert vlm.tokenizer.decode(second) == TEXTS[1]


# Rollout ------------------------------------------------------------------------------------------
SAMPLED = dict(group_size=2, temperatures=(1.0, 0.7))


def test_cached_decoding_equals_one_full_pass(vlm):
    images = [picture(96, 80), picture(48, 144, 1), picture(32, 32, 2)]
    texts = ["the cat", "a much longer description of a dog that sits", "x"]
    # Random words hold no boxes, so this loop ends some steps at other places than the others
    loop = replace(IVT, ends=lambda text, t: t == 1 and len(text) > 30)
    rows = rollout(vlm, images, texts, 2, max_tokens=24, seeds=[3, 1, 2], loop=loop, **SAMPLED)
    lengths = {t.step.count(step) for t in rows for step in range(3)}
    assert len(rows) == 6 and all(len(t.images) == len(t.texts) == 3 for t in rows)
    assert rows[0].ids != rows[1].ids and len(lengths) > 2, lengths
    scores = common.trajectory_logprobs(vlm, rows)
    assert sampler_gap(vlm, rows) < 1e-4  # no mask hides that shorter rows are padded
    assert (scores.entropy > 0).all()
    assert scores.row.tolist() == [i for i, t in enumerate(rows) for _ in t.target]
    assert scores.step.tolist() == [step for t in rows for step in t.step]
    alone = rollout(vlm, images[1:2], texts[1:2], 2, max_tokens=24, seeds=[1], loop=loop, **SAMPLED)
    assert [t.target for t in alone] == [t.target for t in rows[2:4]]  # whatever its batch


def test_sampling_takes_seeds(vlm):
    with pytest.raises(ValueError, match="a seed for each prompt"):
        rollout(vlm, [picture(32, 32)], ["x"], 0, max_tokens=2, temperatures=(1.0, 1.0))


def test_what_the_noise_chooses():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    for noise, token in ((0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.999, 2)):
        assert common.choose(logits, 1.0, torch.tensor([noise])).item() == token
    assert common.choose(logits, 0, torch.tensor([0.0])).item() == 2


@pytest.mark.parametrize("top_p, top_k", [(0.7, 10), (0.7, 0), (1.0, 10), (0.01, 99)])
def test_what_is_cut_is_what_generate_cuts(top_p, top_k):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    left = logits / 2
    for warper, size in ((TopKLogitsWarper, min(top_k, 40)), (TopPLogitsWarper, top_p)):
        left = warper(size)(None, left) if size else left
    noise = torch.arange(5000) / 5000
    tokens = common.choose(logits.expand(5000, -1), 2.0, noise, top_p, top_k)
    shares = tokens.bincount(minlength=40) / 5000
    assert torch.allclose(shares, left.softmax(-1)[0], atol=1e-3)


def test_log_probabilities_know_no_cut(vlm):
    """log pi is of the whole distribution at temperature 1, as the losses take it."""
    options = dict(max_tokens=12, temperatures=(2.0, 2.0), seeds=[0])
    one, cut = ([picture(32, 32)], ["x"], 1), dict(top_p=0.7, top_k=1)
    [row] = rollout(vlm, *one, **cut, **options)
    assert row.target == rollout(vlm, *one, max_tokens=12)[0].target  # the likeliest is left
    assert row.target != rollout(vlm, *one, **options)[0].target
    assert sampler_gap(vlm, [row]) < 1e-4
    assert max(row.logprob) < -1e-3


def test_whatever_ends_the_turn_ends_the_step(vlm, monkeypatch):
    """Qwen3-VL's generation_config.json lists two tokens."""
    options = dict(max_tokens=9, temperatures=(2.0, 2.0), seeds=[0])
    tokens = rollout(vlm, [picture(32, 32)], ["x"], 0, **options)[0].target
    end = tokens[3]
    assert len(tokens) > 4 and end not in tokens[:3]
    for listed in ([end, vlm.token("<|im_end|>")], end):
        monkeypatch.setattr(vlm.base.generation_config, "eos_token_id", listed)
        [row] = rollout(vlm, [picture(32, 32)], ["x"], 0, **options)
        assert row.target == tokens[:4] and row.texts == [vlm.tokenizer.decode(tokens[:3])]
        assert row.ids[-1] == tokens[2]  # the end is a target, and never enters the context


def test_a_greedy_single_shot_equals_generate(vlm):
    image = picture(96, 80)
    images = [image, picture(32, 32)]
    row, _ = rollout(vlm, images, ["the cat", "a dog"], 0, max_tokens=12, loop=common.SINGLE_SHOT)
    cut = row.predictor[0] + 1
    prompt = vlm.tokenizer.decode(row.ids[:cut])
    assert common.SINGLE_PROMPT.format(text="the cat") in prompt and len(row.boxes) == 1
    ids = torch.tensor([row.ids[:cut]])
    out = vlm.base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(),
        max_new_tokens=12,
        do_sample=False,
        **vlm.image_processor(images=[image], return_tensors="pt"),
    )
    assert out[0, cut:].tolist()[: len(row.target)] == row.target


def test_the_last_valid_box_is_shown_in_the_rollout_as_in_sft(vlm, monkeypatch):
    """Drawn on the original image. Step 2 gives no box: step 3 still sees that of step 1. Before
    step 1 there is none to be seen, and none is spoken of."""
    boxes = [None, [0, 0, 300, 300], None, [500, 500, 900, 900], None]
    image = picture(48, 64)
    answers = iter(boxes)
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    [row] = rollout(vlm, [image], ["x"], 4, max_tokens=2)
    drawn = [common.draw_overlay(image, box) for box in (None, None, boxes[1], boxes[1], boxes[3])]
    for shown in (drawn, common.feedback_pictures(image, boxes)):
        for a, b in zip(row.images, encode_images(vlm, shown), strict=True):
            assert torch.allclose(a.embeds, b.embeds, atol=1e-5)
    injected = vlm.tokenizer.decode(row.ids).split("<|vision_start|>")[2:]
    assert [text.count("The red box") for text in injected] == [0, 1, 1, 1]
    assert common.NO_BOX.format(text="x") in injected[0]


# Log-probabilities --------------------------------------------------------------------------------
def test_entropy_logprob_and_their_gradient_by_hand(vlm, monkeypatch):
    """Of logits that are made a part at a time, against the model's own forward pass."""
    pictures = [picture(32, 32), picture(48, 64)]
    t = build_trajectory(vlm, encode_images(vlm, pictures), "it", TEXTS, IVT)
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 7 * vlm.base.lm_head.out_features)
    weight = vlm.base.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    scores = common.trajectory_logprobs(vlm, [t])
    ids = torch.tensor([t.ids])
    logits = vlm.base(
        input_ids=ids,
        mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(),
        **vlm.image_processor(images=pictures, return_tensors="pt"),
    ).logits[0, t.predictor]  # [M, V]
    logits[:, vlm.base.config.image_token_id] = -1e30  # never a word
    p = logits.softmax(-1)
    by_hand = p[range(len(t.target)), t.target].log(), -(p * p.clamp(1e-30).log()).sum(-1)
    for ours, other in zip((scores.logprob, scores.entropy), by_hand):
        assert torch.allclose(ours, other, atol=1e-4)
        gradients = [
            torch.autograd.grad(v.mean(), weight, retain_graph=True)[0] for v in (ours, other)
        ]
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()
    weight.requires_grad_(False)


# Reward, advantage and loss -----------------------------------------------------------------------
def test_reward_and_advantage_by_hand():
    sample = {"width": 100, "height": 100, "bbox": [0, 0, 50, 100]}
    boxes = [None, [0, 0, 1000, 1000], [0, 0, 500, 500]]
    assert common.reward(boxes, sample) == pytest.approx(0.5 + 0.1 * 2 / 3)
    right = [0, 0, 500, 1000]
    assert common.reward([right, right, None], sample) == pytest.approx(0.1 * 2 / 3)
    a = common.advantages(torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.3, 0.3]]))
    deviation = (1 / 6) ** 0.5
    by_hand = torch.tensor([[-0.5, 0.5, 0], [0, 0, 0]]) / (deviation + 1e-4)
    assert torch.allclose(a, by_hand, atol=1e-6)


def test_each_term_of_the_grpo_loss_by_hand():
    logprob = torch.tensor([-1.0, -2.0])
    tensors = (torch.tensor([-1.5, -1.0]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25]))
    loss, policy, kl, entropy = common.grpo_loss(logprob, *tensors, beta=0.04, entropy_weight=0.01)
    assert (policy.item(), kl.item(), entropy.item()) == pytest.approx((0.0, 1.5, 0.75))
    assert loss.item() == pytest.approx(0.04 * 1.5 - 0.01 * 0.75)
    e = 2.718281828
    k3 = common.grpo_loss(logprob, *tensors, beta=1, entropy_weight=0, kl="k3")[2]
    assert k3.item() == pytest.approx(e**-0.5 + 0.5 - 1 + e - 1 - 1)
    # The gradient of the policy term alone raises what was better than its group
    logprob.requires_grad_(True)
    common.grpo_loss(logprob, *tensors, beta=0, entropy_weight=0)[0].backward()
    assert logprob.grad.tolist() == [-2.0, 1.0]
