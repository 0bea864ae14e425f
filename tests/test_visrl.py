"""VisRL: its crop, loop and loss, the controller, the critics, the pairs, the data, the report."""

import copy
import json
import math
import random
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import common
from support.data.samples import VISRL_FIELDS, read_samples
from support.model import adapters
from support.running.files import write_jsonl
from tests.small import ANY_BOX, GOOD, picture, sampler_gap, vlm
from toy import questions, world
from visrl import critics, loop, make_pairs, report, sources
from visrl.loop import ASK, END, LOOPS, VISRL, crop, path_trajectory, step_logprobs

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

BOXES = [[100, 100, 500, 480], [0, 0, 900, 170]]


# The crop -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((640, 480), [250, 500, 500, 1000], (160, 240, 320, 480)),
        ((640, 480), None, (0, 0, 640, 480)),  # no valid box, nothing is left out
        ((1002, 501), [100, 100, 200, 300], (100, 50, 201, 151)),  # rounded outwards
        ((640, 480), [500, 500, 501, 501], (306, 226, 335, 255)),  # one unit, grown to 28 pixels
        ((640, 480), [999, 999, 1000, 1000], (612, 452, 640, 480)),  # moved into the image
        ((20, 10), [0, 0, 1, 1], (0, 0, 20, 10)),  # an image that is smaller than that
        ((4200, 420), [0, 500, 1000, 501], (0, 189, 4200, 232)),  # no longer than 100 to 1
    ],
)
def test_a_crop_is_cut_out_of_the_full_size_image(size, box, expected):
    image = picture(*size)
    assert crop(image, box).tobytes() == image.crop(expected).tobytes()


@settings(max_examples=200, deadline=None)
@given(st.integers(6, 900), st.integers(6, 900), ANY_BOX, st.booleans())
def test_any_crop_holds_its_box_and_can_be_encoded(width, height, box, square):
    left, top, right, bottom = loop.crop_bbox(box, width, height, square)
    x1, y1, x2, y2 = common.denormalize_box(box, width, height)
    assert 0 <= left <= x1 + 1e-5 and x2 - 1e-5 <= right <= width
    assert 0 <= top <= y1 + 1e-5 and y2 - 1e-5 <= bottom <= height
    sides = right - left, bottom - top
    assert max(sides) <= 151 * min(sides)  # the image processor refuses 200


def test_the_toys_crop_is_the_one_that_its_base_has_learnt_to_read():
    image = picture(world.SIDE, world.SIDE)
    for bbox in ([80.0, 96.0, 160.0, 144.0], [0.0, 0.0, 64.0, 64.0], [256.0, 160.0, 320.0, 224.0]):
        box = common.normalize_box(bbox, *image.size)
        x1, y1, x2, y2 = questions.crop_square(common.denormalize_box(box, *image.size))
        by_hand = image.crop((math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)))
        assert LOOPS["square"].feedback(image, box).tobytes() == by_hand.tobytes()


# The loop -----------------------------------------------------------------------------------------
def test_a_path_token_by_token(vlm):
    images = common.encode_images(vlm, [picture(96, 80), picture(32, 32)])
    t = path_trajectory(vlm, "What is it?", images, BOXES[0], "a {dot}")
    said = [vlm.tokenizer.decode([y for y, s in zip(t.target, t.step) if s == k]) for k in (0, 1)]
    assert said == [common.format_box(BOXES[0]), "a {dot}" + END]
    assert [t.ids[p + 1] for p in t.predictor] == t.target
    whole = vlm.tokenizer.decode(t.ids).replace("<|image_pad|>", "")
    shown = "<|vision_start|><|vision_end|>"
    assert whole == (
        f"<|im_start|>user\n{shown}{loop.PROMPT.format(text='What is it?')}<|im_end|>\n"
        f"<|im_start|>assistant\n{said[0]}\n{shown}\n{loop.CONTINUATION}\n{said[1]}"
    )
    # Stage 1 has the box alone as target, and no crop
    t = path_trajectory(vlm, "What is it?", images, BOXES[0], None)
    assert vlm.tokenizer.decode(t.target) == common.format_box(BOXES[0]) and len(t.images) == 1
    t = loop.answer_trajectory(vlm, "What is it?", images[0], "a dot")
    assert vlm.tokenizer.decode(t.target) == "a dot" + END and set(t.step) == {0}


def test_a_box_ends_step_0_and_the_turn_step_1():
    for one in LOOPS.values():
        assert one.ends(common.format_box(BOXES[0]), 0) and not one.ends("{", 0)
        assert not one.ends(common.format_box(BOXES[0]), 1)
    assert not ASK.ends("anything", 0)


def test_an_answer_goes_on_from_a_given_box_as_its_pair_is_learnt(vlm):
    image = picture(160, 160)
    texts = [common.format_box(box) for box in BOXES]
    options = dict(temperatures=(1.0, 1.0), seeds=[0, 1], first_texts=texts, loop=VISRL)
    rows = common.rollout(vlm, [image] * 2, ["q"] * 2, 1, max_tokens=6, group_size=2, **options)
    assert sampler_gap(vlm, rows) < 1e-4
    for row, box in zip(rows, [BOXES[0]] * 2 + [BOXES[1]] * 2, strict=True):
        images = common.encode_images(vlm, [image, VISRL.feedback(image, box)])
        pair = path_trajectory(vlm, "q", images, box, "")
        assert row.ids[: len(pair.ids) - 1] == pair.ids[:-1]  # up to where the answer begins
        assert row.boxes[0] == box and set(row.step) == {1}  # the box was not sampled


# Step-level DPO -----------------------------------------------------------------------------------
def test_sums_of_each_step_by_hand():
    row, step = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 1]])
    logprob = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    scores = common.TokenScores(logprob, torch.zeros(5), row, step)
    assert step_logprobs(scores, 2, 2).tolist() == [[-3.0, -4.0], [-8.0, -16.0]]


def test_the_loss_of_each_stage_by_hand():
    def loss_of(margin):
        return math.log(1 + math.exp(-margin))

    # Stage 1, K = 1: (-3 + 4) - (-2 + 1.5) = 1.5, and with both the same 0
    policy = torch.tensor([[[-3.0], [-2.0]], [[-1.0], [-1.0]]])
    reference = torch.tensor([[[-4.0], [-1.5]], [[-1.0], [-1.0]]])
    losses, margins = loop.dpo_loss(policy, reference, 0.1)
    assert margins.flatten().tolist() == pytest.approx([0.15, 0.0])
    assert losses.flatten().tolist() == pytest.approx([loss_of(0.15), math.log(2)])
    # Stage 2, K = 2: each step has a sigmoid of its own, which is not that of their sum
    policy = torch.tensor([[[-3.0, -6.0], [-2.0, -9.0]]])
    reference = torch.tensor([[[-4.0, -5.0], [-1.5, -5.0]]])
    losses, margins = loop.dpo_loss(policy, reference, 0.1)
    assert margins.tolist()[0] == pytest.approx([0.15, 0.3])
    assert losses.mean(1).item() == pytest.approx((loss_of(0.15) + loss_of(0.3)) / 2)


def test_the_loss_of_kto_by_hand():
    policy = torch.tensor([[-3.0], [-2.0]], requires_grad=True)  # chosen, rejected
    loss = loop.kto_loss(policy, torch.tensor([[-4.0], [-1.5]]), torch.tensor(0.25), 0.1)
    loss.sum().backward()

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    by_hand = 1 - (sigmoid(0.1 * (1 - 0.25)) + sigmoid(0.1 * (0.25 + 0.5))) / 2
    assert loss.flatten().tolist() == pytest.approx([by_hand])
    assert policy.grad[0] < 0 < policy.grad[1]  # the chosen one rises, the rejected one falls


def test_the_chosen_paths_own_loss_by_hand():
    """--nll: each pair weighs the same, whatever its length or batch; no rejected token has a
    gradient."""
    rows = torch.tensor([0, 0, 1, 2, 3, 3])  # two pairs of two trajectories
    logprob = torch.tensor([-1.0, -2.0, -4.0, -9.0, -5.0, -7.0], requires_grad=True)
    scores = common.TokenScores(logprob, torch.zeros(6), rows, torch.zeros(6))
    loop.chosen_nll(scores, 2).sum().backward()
    assert loop.chosen_nll(scores, 2).tolist() == [1.5, 9.0]
    assert logprob.grad.tolist() == [-0.5, -0.5, 0, -1, 0, 0]


@pytest.mark.parametrize("answers", [(None, None), ("a dot", "not a dot, but a ring")])
def test_a_step_raises_the_chosen_against_the_rejected(vlm, answers):
    """On pairs of different lengths and images, each stage; the reference stays where it is."""
    own = replace(vlm, model=copy.deepcopy(vlm.base))
    adapters.policy_and_reference(own, None, (4, 8))
    optimizer = torch.optim.AdamW([p for p in own.model.parameters() if p.requires_grad], lr=0.01)
    batch = []
    for seed, size in ((0, (96, 80)), (1, (48, 144))):
        image = picture(*size, seed)
        for box, answer in zip(BOXES, answers):
            images = common.encode_images(own, [image, crop(image, box)])
            batch.append(path_trajectory(own, "q" * (seed + 1), images, box, answer))
    steps = 1 if answers[0] is None else 2

    def logprobs(adapter):
        with adapters.using(own, adapter):
            return step_logprobs(common.trajectory_logprobs(own, batch), 4, steps)

    before = logprobs("reference").detach()
    loop.dpo_loss(logprobs("policy"), before, 0.1)[0].mean().backward()
    optimizer.step()
    change = (logprobs("policy") - before).detach()
    assert (change[::2] - change[1::2] > 0).all(), change  # chosen, rejected, chosen, ...
    assert torch.equal(logprobs("reference").detach(), before)


# Diversity controller -----------------------------------------------------------------------------
def test_the_other_box_lies_outside_and_is_as_large():
    rng = random.Random(0)
    for _ in range(200):
        first = [100, 100, rng.randint(200, 700), rng.randint(200, 700)]
        second = [150, 120, 150 + rng.randint(1, 300), 120 + rng.randint(1, 300)]
        box = make_pairs.box_outside(rng, first, second)
        if box:
            assert common.iou(box, first) == 0 and 0 <= min(box) and max(box) <= 1000
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, second)]
            assert abs(areas[0] - areas[1]) <= 0.4 * areas[1]
    assert make_pairs.box_outside(rng, [0, 0, 1000, 1000], [1, 1, 9, 9]) is None


def test_only_boxes_that_overlap_are_replaced():
    near, far = [0, 0, 200, 200], [500, 500, 600, 700]
    everywhere = [0, 0, 1000, 1000]
    boxes = [near, far, near, near, None, far, far, None, everywhere, near]
    kept, counts = make_pairs.controlled(random.Random(0), boxes, 0.05)
    assert kept[:3] == [near, far, near] and common.iou(kept[3], near) == 0 and len(kept) == 6
    # [0, 0, 1000, 1000] and near have an IoU of 0.04: above no threshold, so both stay
    assert kept[4:] == [everywhere, near]
    assert counts == {"second boxes replaced": 1, "attempts lost: invalid box": 2}
    kept, counts = make_pairs.controlled(random.Random(0), boxes, 0.03)
    assert len(kept) == 4 and counts["attempts lost: no room for another box"] == 1
    kept, counts = make_pairs.controlled(random.Random(0), boxes, None)  # the ablation
    assert kept == [near, far, near, near, everywhere, near]
    assert "second boxes replaced" not in counts


# Critics ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, score",
    [
        ('{"score": 0.8}', 0.8),
        ('Here:\n```json\n{"score": 1}\n```', 1.0),
        ("```\n0.25\n```", 0.25),
        ('{"score": 1.5}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ("The score is 0.8", None),
        ("[" * 100_000, None),
    ],
)
def test_what_a_critic_may_reply(text, score):
    assert critics.parse_score(text) == score


def items_of(image):
    """Without a true box: no critic may look at one."""
    sample = {"question": "What mark?", "answer": "a dot"}
    paths = [{"box": BOXES[0], "answer": "A dot."}, {"box": BOXES[1], "answer": "a ring"}]
    return [(image, sample, path) for path in paths]


def test_the_prompted_critics_see_crop_or_image(vlm):
    calls = []
    replies = iter(['{"score": 0.9}', "no idea", "0.75", '{"score": 0}'])

    def answer(vlm, images, prompts, steps, **options):
        calls.append((images, prompts))
        assert options == dict(max_tokens=9, loop=ASK)  # greedy
        return [common.Trajectory(texts=[next(replies)]) for _ in prompts]

    image = picture(90, 60)
    options = dict(critic="prompted", crop=crop, max_tokens=9, roll=answer)
    scored = critics.score_paths(vlm, items_of(image), **options)
    assert [(p["box_score"], p["response_score"]) for p in scored] == [(0.9, 0.75), (None, 0.0)]
    (crops, of_box), (images, of_response) = calls
    assert [c.tobytes() for c in crops] == [crop(image, box).tobytes() for box in BOXES]
    assert all(one is image for one in images)
    assert all("What mark?" in prompt and "a dot" in prompt for prompt in of_box + of_response)
    assert "a ring" in of_response[1] and "a ring" not in "".join(of_box)


def test_the_likelihood_of_an_answer_by_hand(vlm):
    image = picture(90, 60)
    scored = critics.score_paths(vlm, items_of(image), critic="likelihood", crop=crop, max_tokens=9)
    assert [path["response_score"] for path in scored] == [1.0, 0.0]
    [shown] = common.encode_images(vlm, [crop(image, BOXES[0])])
    true_answer = loop.answer_trajectory(vlm, "What mark?", shown, "a dot")
    by_hand = common.trajectory_logprobs(vlm, [true_answer]).logprob.sum().exp().item()
    assert scored[0]["box_score"] == pytest.approx(by_hand, rel=1e-3)
    assert scored[0]["box_score"] != scored[1]["box_score"]


def test_when_an_answer_is_right():
    for response, answer in ((" A  Dot.", "dot"), ("A", "a"), ("zwölf", "Zwölf!")):
        assert loop.is_right(response, answer)
    for response, answer in (("dots", "dot"), ("a dot or a ring", "a dot"), ("", "a")):
        assert not loop.is_right(response, answer)


# Filter and pairs ---------------------------------------------------------------------------------
def scored(*scores):
    return [{"n": n, "box_score": b, "response_score": r} for n, (b, r) in enumerate(scores)]


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([(0.8, 0.9), (0.9, 1.0), (0.1, 0.0), (0.2, 0.2)], (1, 2)),  # the extremes of both
        ([(0.9, 0.9), (0.8, 1.0), (0.1, 0.1)], "no path is extreme in both scores"),
        ([(0.9, 0.9), (0.2, 0.1), (0.1, 0.2)], "no path is extreme in both scores"),
        ([(0.9, 0.1), (0.1, 0.1)], "no winning path"),
        ([(0.8, 0.8), (0.1, 0.9)], "no losing path"),
        ([(0.8, 0.8), (0.2, 0.2)], (0, 1)),  # the thresholds belong to both sets
        ([(0.9, None), (0.1, 0.1)], "no winning path"),
        ([(None, None)], "no path with scores"),
        ([(0.9, 1.0), (0.9, 1.0), (0.0, 0.0), (0.0, 0.0)], (0, 2)),  # of equals the first
    ],
)
def test_which_paths_make_a_pair(scores, expected):
    pair = make_pairs.choose_pair(scored(*scores), 0.8, 0.2)
    assert pair == expected or tuple(path["n"] for path in pair) == expected


def test_without_the_box_critic_the_answer_decides():
    paths = scored((0.0, 1.0), (None, 0.0))
    chosen, rejected = make_pairs.choose_pair(paths, 0.8, 0.2, ("response_score",))
    assert (chosen["n"], rejected["n"]) == (0, 1)
    assert make_pairs.choose_pair(scored((0.5, 0.5)), 0, 1) == "one path is both"


# Data ---------------------------------------------------------------------------------------------
def test_the_toys_questions_are_about_marks(tmp_path):
    made = sources.toy_samples(tmp_path, 4, 0)
    write_jsonl(tmp_path / "s.jsonl", made)
    assert read_samples(tmp_path / "s.jsonl", "", fields=sources.BOXED) == made
    assert [sample["source"] for sample in made[:3]] == list(sources.TOY_SOURCES)
    for sample in made:
        assert sample["question"].startswith("What mark is on the ")
        assert sample["answer"].removeprefix("a ") in world.MARKS
        relation = " that is " in sample["question"]
        assert relation == (sample["source"] == "relation")
    assert sources.toy_samples(tmp_path, 4, 0) == made != sources.toy_samples(tmp_path, 4, 1)


def test_the_sides_share_no_image_and_a_source_that_runs_out_is_short_on_all():
    rng = random.Random(0)
    rows = []
    for i in range(600):
        rows.append({"image": f"{rng.randrange(150)}.png", "source": rng.choice("abc"), "n": i})
        if rng.random() < 0.7:
            rows[-1]["bbox"] = [0, 0, 1, 1]
    wanted = {"sft": {"a": 40, "b": 40}, "train": {"a": 400, "b": 40}, "test": {"a": 20, "b": 20}}
    sides = sources.split(rows, wanted, 0)
    assert sides == sources.split(rows, wanted, 0) != sources.split(rows, wanted, 1)
    images = [{row["image"] for row in part} for part in sides.values()]
    assert len(set.union(*images)) == sum(map(len, images))
    assert all("bbox" in row for row in sides["sft"])
    for side, part in sides.items():
        counts = {source: sum(row["source"] == source for row in part) for source in "abc"}
        assert 0 < counts["a"] <= wanted[side]["a"] and counts["c"] == 0
        assert counts["b"] >= 0.8 * wanted[side]["b"], (side, counts)


REQUEST = "Please provide the bounding box coordinate of the region that can help you answer"
CONVERSATION = [
    {"from": "human", "value": f"<image>\nWhat is the dog on? {REQUEST} the question better."},
    {"from": "gpt", "value": "[0.282, 0.316, 0.794, 0.738]"},
    {"from": "human", "value": "<image>"},
    {"from": "gpt", "value": "A sofa."},
]


def conversation(image, box, dataset="flickr30k", turns=CONVERSATION, split="train"):
    row = {"dataset": dataset, "split": split, "question_id": 1, "conversations": turns}
    return {**row, "image": [image, f"{image}###{box}"]}


@pytest.fixture
def viscot(tmp_path):
    """Visual CoT as it is published, a few rows; the benchmark's are of the names in its files."""

    def photo(name):
        path = tmp_path / "cot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(500, 357).save(path)
        return f"cot/{name}"

    box = [141, 87, 397, 298]
    silent = [*CONVERSATION[:3], {"from": "gpt", "value": " "}]
    rows = [
        conversation(photo("flickr30k/1.jpg"), box),
        conversation(photo("textvqa/b.jpg"), [-5, 0, 600, 100], "textcap"),  # clipped
        conversation(photo("v7w/v7w_3.jpg"), box, "v7w"),
        conversation("cot/flickr30k/1.jpg", [600, 87, 700, 298]),
        conversation("cot/flickr30k/none.jpg", box),
        conversation("cot/flickr30k/1.jpg", box, turns=silent),
        conversation(photo("textvqa/0353aa.jpg"), box, "textvqa"),  # openimages' test photo
        conversation(photo("v7w/v7w_7.jpg"), box, "v7w"),  # gqa's
        conversation("cot/docvqa/none.png", box, "docvqa"),  # of no side of Table 7
    ]
    (tmp_path / "viscot_363k.json").write_text(json.dumps(rows))
    names = {"gqa": "gqa/7.jpg", "openimages": "openimages/0353aa.jpg", "cub": "cub/001.A/a.jpg"}
    (tmp_path / "viscot_benchmark/benchmark").mkdir(parents=True)
    for name in [*sources.TABLE_2, "visual7w", "emotic"]:
        place = names.get(name, f"{name.replace('textcap', 'textvqa')}/{name}_1.jpg")
        rows = [conversation(photo(place), box, name, split="val")] * 3
        path = tmp_path / f"viscot_benchmark/benchmark/{name}.json"
        path.write_text(json.dumps(rows))
    return tmp_path


def test_visual_cot_is_read_as_published(viscot, capsys):
    train, test = sources.viscot_samples(viscot)
    first, second, third = train
    assert first["bbox"] == [141.0, 87.0, 397.0, 298.0]  # pixels, and not the padded square's
    assert (first["question"], first["answer"]) == ("What is the dog on?", "A sofa.")
    assert (first["source"], first["width"], first["height"]) == ("flickr30k", 500, 357)
    assert second["bbox"] == [0.0, 0.0, 500.0, 100.0] and second["source"] == "textcap"
    assert third["source"] == "visual7w"  # "v7w" in its rows
    assert [sample["source"] for sample in test[::3]] == sorted(sources.TABLE_2)
    # Neither a photo of the tests under another data set's name, nor a data set without a share
    assert not {s["key"] for s in train} & {s["key"] for s in test}
    printed = capsys.readouterr().out
    faults = ("a box inside the image", "a readable image", "words")
    for words in (*(f"1 without {fault}" for fault in faults), "33 kept; dropped: none"):
        assert words in printed and "training: 6 read, 3 kept" in printed, printed
    write_jsonl(viscot / "s.jsonl", train + test)
    assert read_samples(viscot / "s.jsonl", "", fields=VISRL_FIELDS) == train + test


def test_visual_cots_shares_are_the_papers(viscot):
    sizes = dict(sft_samples=1, train_samples=2, test_samples=11)
    sides = sources.make_sides(SimpleNamespace(viscot=str(viscot), seed=0, **sizes), None)
    assert sorted(sample["source"] for sample in sides["test"]) == sorted(sources.TABLE_2)
    sizes = dict(sft_samples=30647, train_samples=180000, test_samples=8281)
    sides = sources.make_sides(SimpleNamespace(viscot=str(viscot), seed=0, **sizes), None)
    assert len(sides["test"]) == 33 and len(sides["sft"]) == 3


def test_what_lacks_of_visual_cot_is_named_before_an_image_is_opened(viscot, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    (viscot / "viscot_benchmark/benchmark/dude.json").rename(viscot / "dude.json")
    with pytest.raises(SystemExit, match="has no viscot_benchmark/benchmark/dude.json. It takes"):
        sources.viscot_samples(viscot)
    (viscot / "dude.json").rename(viscot / "viscot_benchmark/benchmark/dude.json")
    (viscot / "cot/sroie").rename(viscot / "sroie")
    with pytest.raises(SystemExit, match="has no cot/sroie. It takes .*deepcs233/Visual-CoT"):
        sources.viscot_samples(viscot)
    (viscot / "viscot_363k.json").write_text('[{"dataset": "gqa", "image": "one"}]')
    with pytest.raises(SystemExit, match="not as published .*deepcs233/Visual-CoT"):
        sources.viscot_samples(viscot)


def test_your_own_samples_need_no_box_but_for_sft(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    own = {name: ASKED[name] for name in VISRL_FIELDS}
    write_jsonl(tmp_path / "s.jsonl", [own])
    assert read_samples(tmp_path / "s.jsonl", "", fields=VISRL_FIELDS) == [own]
    with pytest.raises(SystemExit, match="line 1: bbox is 'None'; expected list"):
        read_samples(tmp_path / "s.jsonl", "", fields=sources.BOXED)
    write_jsonl(tmp_path / "bad.jsonl", [dict(own, bbox=[0, 0, 30, 5])])
    with pytest.raises(SystemExit, match="bad.jsonl, line 1: .*in pixels of the 20 x 10 image"):
        read_samples(tmp_path / "bad.jsonl", "", fields=VISRL_FIELDS)
    # Without any box nothing is left for SFT
    args = dict(data=[tmp_path / "s.jsonl"], images=None, boxes=None, viscot=None, skip_bad=False)
    args |= dict(sft_samples=1, train_samples=1, test_samples=1, seed=0)
    args = SimpleNamespace(**args)
    with pytest.raises(SystemExit, match="no sample is left for sft"):
        sources.prepare(args, tmp_path / "data")


# Report -------------------------------------------------------------------------------------------
PlainRow = namedtuple("PlainRow", "name box")
RIGHT, WRONG = [0, 0, 500, 1000], [600, 0, 900, 900]
ASKED = {**GOOD, "question": "What mark?", "answer": "a dot", "bbox": [0, 0, 10, 10]}
SAMPLES = [{**ASKED, "id": str(i), "source": "ab"[i % 2]} for i in range(40)]


def log_lines(right, hit=None):
    """Of a row that answers the first `right` samples, and finds the first `hit` boxes."""
    lines = []
    for number, sample in enumerate(SAMPLES):
        line = {"id": sample["id"], "answer": "a dot", "right": number < right, "box": None}
        if hit is not None:
            line |= {"box": RIGHT, "iou": 1.0 if number < hit else 0.5, "first_text": ""}
        else:
            line["score"] = (number < right) / 2  # a judge's
        lines.append(line)
    return lines


def test_the_findings_are_judged_by_their_intervals():
    second = f"{report.RL2}, iteration 2"
    rows = {
        report.BASE: log_lines(20),
        report.SFT: log_lines(10, 10),
        report.RL1: log_lines(20, 20),
        report.RL2: log_lines(30, 20),
        report.ONLY: log_lines(31, 10),
        report.PLAIN: log_lines(20),
        second: log_lines(30, 20),
        "true": log_lines(40, 40),
    }

    def analyse(rows, pairs):
        boxes = {name: "true" if name == "true" else "own" for name in rows}
        lines_of = {PlainRow(name, boxes[name]): lines for name, lines in rows.items()}
        return report.analyse(SAMPLES, lines_of, pairs)

    def pairs(*counts):
        """So many pairs of each kind, of chosen and rejected boxes."""
        kinds = ((RIGHT, WRONG), (RIGHT, RIGHT), (WRONG, WRONG))
        made = sum(([kind] * count for kind, count in zip(kinds, counts)), [])
        return [{**SAMPLES[0], "chosen": {"box": a}, "rejected": {"box": b}} for a, b in made]

    results = analyse(rows, {"pairs": pairs(30, 0, 10), "pairs_no_controller": pairs(5, 25)})
    assert results["answers"][report.SFT][0] == pytest.approx(0.25)
    assert results["boxes"][report.RL1][0] == pytest.approx(0.5)
    assert results["well-formed"][report.RL1][0] == 1 and report.BASE not in results["well-formed"]
    assert results["judge"][report.BASE][0] == pytest.approx(0.25)
    assert results["boxes by source"][report.SFT]["a"][0] == pytest.approx(5 / 20)
    # A box is right above 0.5, not from there on; a control's box is not the policy's
    assert results["boxes"][report.SFT][0] == pytest.approx(10 / 40)
    assert "true" not in results["boxes"]
    assert results["pairs"]["pairs"]["WP-LN"][0] == pytest.approx(0.75)
    found = {sentence[:20]: word for sentence, _, word in results["findings"]}
    assert len(found) == 7 and set(found.values()) == {"holds", "NOT SETTLED"}
    open_ones = [key for key in found if found[key] != "holds"]
    assert open_ones == ["In answers SFT < RL2", "A second iteration r"]
    without = [{key: value for key, value in pair.items() if key != "bbox"} for pair in pairs(3)]
    worse = analyse({**rows, report.RL1: log_lines(20, 2)}, {"pairs": without})
    assert "DOES NOT HOLD" in {w for s, _, w in worse["findings"] if s.startswith("RL1 raises")}
    assert worse["pairs"] == {}  # nothing to judge them by


def test_pairs_are_read_with_their_samples(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", SAMPLES)
    side = {"box": [0, 0, 5, 5], "answer": "x"}
    sides = {"chosen": side, "rejected": side}
    rows = [{"id": name, **sides} for name in ("0", "of an earlier run")]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    write_jsonl(tmp_path / "pairs_no_controller_2.jsonl", rows[1:])
    assert report.read_pairs(tmp_path) == {"pairs": [{**SAMPLES[0], **rows[0]}]}


def test_a_pair_without_a_box_score_is_shown():
    """As --ablation no_box_critic makes them."""
    args = SimpleNamespace(crop="box")
    path = {"box": RIGHT, "answer": "a dot", "box_score": None, "response_score": 0.25}
    assert report.pair_line(args, SAMPLES[0], path)["words"] == "answer critic 0.25"
