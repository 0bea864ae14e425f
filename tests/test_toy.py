"""The toy: its world, its tokenizer, what its base learns from, the recipe, its skills."""

import argparse
import functools
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from common import CORRECTION, IVT_PROMPT, SINGLE_PROMPT, encode_images, parse_box
from support.data.teacher import template_trace
from support.model.views import CLOSER
from tests.small import TEXTS, vlm
from toy.model import make_image_processor, make_model, make_tokenizer
from toy.questions import FRAMES, RELATED, compare, draw_frame, is_inside, view
from toy.recipe import lessons, skills, train
from toy.recipe.train import BASE
from toy.world import SIDE, SOURCES, SUPERLATIVES, center, make_samples, make_scene, refer

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent


def fits(o, phrase):
    """Whether all words of "the large red circle", superlatives aside, are true of the object."""
    words = [word for word in phrase.split()[1:] if word not in SUPERLATIVES]
    return all(word in (o["kind"], o["color"], o["size"]) for word in words)


def related(objects, relation):
    """The objects for which "to the left of the star" is true."""
    start = relation.index("of") if "of" in relation else 0
    where = relation[: relation.index(" the ", start)]
    anchors = [o for o in objects if fits(o, relation[len(where) + 1 :])]
    assert len(anchors) == 1, relation
    directions = {
        "to the left of": (0, -1),
        "to the right of": (0, 1),
        "above": (1, -1),
        "below": (1, 1),
    }
    axis, sign = directions[where]
    edge = center(anchors[0]["box"])[axis]
    others = [o for o in objects if o is not anchors[0]]
    return [o for o in others if sign * (center(o["box"])[axis] - edge) > 0]


def test_no_expression_is_ambiguous():
    """Reads the expression anew, by its words alone, and finds the one object that it fits."""
    rng = random.Random(0)
    for i in range(900):
        objects = make_scene(rng, distractors=True if i % 3 == 1 else None)["objects"]
        found = refer(rng, objects, SOURCES[i % 3])
        if not found:
            continue
        expression, target = found
        head, _, relation = expression.partition(" that is ")
        some = [o for o in objects if fits(o, head)]
        if relation:
            near = related(objects, relation)
            some = [o for o in some if o in near]
        for word, key in SUPERLATIVES.items():
            if word in head.split():
                assert len(some) > 1
                some = [max(some, key=lambda o: key(o["box"]))]
        assert some == [target], expression


def test_the_world_is_seeded(tmp_path):
    first = make_samples(tmp_path / "a", 4, 0)
    again = make_samples(tmp_path / "b", 4, 0)
    assert first == again and len(first) == 12
    for sample in first:
        image = (tmp_path / "a" / sample["image"]).read_bytes()
        assert image == (tmp_path / "b" / sample["image"]).read_bytes()
    assert make_samples(tmp_path / "c", 2, 0) == first[:6]  # does not depend on how many there are
    assert make_samples(tmp_path / "d", 4, 1) != first


def test_a_view_holds_what_lies_in_it_at_its_place():
    scene = make_scene(random.Random(0))
    left = min(scene["objects"], key=lambda o: o["bbox"][0])
    corner = [left["bbox"][0] - 8.1, left["bbox"][1] - 8.1]  # 50 of 1000, and a little
    part = view(scene, [*corner, corner[0] + 160, corner[1] + 160])
    [same] = [o for o in part["objects"] if o["bbox"] == left["bbox"]]
    assert part["zoom"] == 2 and same["seen"] == 1 and same["box"][:2] == [50, 50]
    x, y = (round(v * SIDE / 1000) for v in center(same["box"]))
    x0, y0 = (round(v) for v in center(left["bbox"]))
    pixels = np.asarray(part["image"], int), np.asarray(scene["image"], int)
    assert abs(pixels[0][y, x] - pixels[1][y0, x0]).max() < 130  # up to the mark upon it


def test_how_a_frame_lies_around_an_object():
    box = [400, 400, 600, 600]
    assert compare(box, box) == ["well"]
    assert compare([430, 400, 630, 600], box) == ["right"]
    assert compare([300, 340, 700, 540], box) == ["high", "wide"]
    assert compare([450, 450, 550, 550], box) == ["narrow", "short"]
    assert compare([0, 700, 100, 900], box) == ["apart", "left", "low"]
    assert is_inside(box, [390, 390, 610, 610]) is True
    assert is_inside(box, [0, 0, 450, 1000]) is False
    assert is_inside(box, [0, 0, 500, 1000]) is None


def test_each_image_token_is_taught_what_it_shows():
    scene = make_scene(random.Random(3), low=2, high=2)
    target = max(scene["objects"], key=lambda o: o["bbox"][2] - o["bbox"][0])
    framed = draw_frame(scene, "cyan", target["box"], 0.25)
    labels = lessons.token_labels(framed)
    x, y = (int(v * lessons.CELLS / 1000) for v in center(target["box"]))
    token = y * lessons.CELLS + x
    words = [lessons.WORDS[i] for i in np.flatnonzero(labels["words"][token])]
    assert set(words) - {target["mark"]} == {target["color"], target["kind"], target["size"]}
    assert labels["digits"][token].tolist() == lessons.digits(target["box"])
    assert labels["frame"][token] == list(FRAMES).index("cyan")
    assert labels["related"][token, list(FRAMES).index("cyan"), -2:].tolist() == [1, 1]  # well, in
    empty = labels["digits"][:, 0] < 0
    assert empty.any() and not labels["words"][empty, : -len(lessons.MARKS)].any()


def test_a_conversation_is_a_chat_whose_boxes_are_right(tokenizer):
    rng = random.Random(1)
    kinds = set()
    for _ in range(40):
        said = []
        turns = lessons.conversation(rng, 2, tokenizer.tokenize, True)
        assert turns[0][0] is not None
        for _, question in turns:
            kinds.add(question.kind)
            if question.kind in ("find", "frame"):
                assert parse_box(question.answer) == (question.object or question.frame)
            if question.kind == "repeat":
                assert question.answer in said + [question.text[15:-17]]
            said.append(question.answer)
    assert kinds >= {"find", "frame", "repeat", "words", "compare", "is_inside", "mark", "count"}


def test_the_base_learns_from_no_prompt_and_no_sentence_of_the_methods(tokenizer):
    """Its text, as the recipe makes it: no four words in a row of a sentence of theirs. The words
    that a trace begins with are the skill's own: how a frame lies."""
    sentences = [IVT_PROMPT, CORRECTION, CLOSER, *TEXTS]
    boxes = [[[300, 300, 500, 500], [100, 100, 350, 250], [700, 500, 990, 990]]] * 3
    sentences += [template_trace(row, [310, 320, 480, 510], t) for row in boxes for t in (0, 1, 2)]
    runs = set()
    for sentence in sentences:
        words = re.findall(r"[a-z]+", sentence.lower().replace("think", ""))
        runs |= {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}
    allowed = " ".join(re.findall(r"[a-z]+", SINGLE_PROMPT.lower()))
    runs = {run for run in runs if run not in allowed and not set(run.split()) <= set(RELATED)}
    for seed in range(3):
        batch = lessons.chat_batch(random.Random(seed), 2, tokenizer, True)
        text = " ".join(re.findall(r"[a-z]+", tokenizer.decode(batch["ids"].flatten()).lower()))
        assert not [run for run in runs if f" {run} " in text]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_tokenizer_of_the_base_is_the_one_that_the_code_makes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / file).read_text() == (BASE / file).read_text()


def test_the_base_is_of_the_shape_that_the_code_makes(tokenizer):
    base = Qwen3VLForConditionalGeneration.from_pretrained(BASE)
    made = make_model(tokenizer)
    shapes = {name: p.shape for name, p in base.named_parameters()}
    assert shapes == {name: p.shape for name, p in made.named_parameters()}
    assert all(torch.isfinite(p).all() for p in base.parameters())


def test_the_recipe_sees_as_the_model_does(vlm):
    """Its tower, on many pictures at once, against transformers' through the image processor."""
    scenes = [make_scene(random.Random(i)) for i in range(2)]
    patches = torch.from_numpy(np.stack([lessons.patches_of(s["image"]) for s in scenes]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, deepstack = train.see(vlm.base.model.visual, patches)
    own = replace(vlm, image_processor=make_image_processor())
    images = encode_images(own, [s["image"] for s in scenes])
    levels = [torch.cat(level) for level in zip(*(image.deepstack for image in images))]
    for ours, theirs in zip(
        [features, *deepstack], [torch.cat([image.embeds for image in images]), *levels]
    ):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()  # the recipe's are in bfloat16


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_the_recipes_muon_is_torchs(shape):
    """Up to the bfloat16 of torch's products: a hundredth of a step."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, *shape, generator=generator)  # of one shape: they are done together
    gradients = torch.randn(4, 2, *shape, generator=generator)
    ends = []
    for muon in (train.Muon, functools.partial(torch.optim.Muon, weight_decay=0.0)):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = muon(weights, lr=0.02)
        for gradient in gradients:
            for weight, part in zip(weights, gradient):
                weight.grad = part.clone()
            optimizer.step()
        ends.append(torch.stack([weight.detach() for weight in weights]) - start)
    ours, theirs = ends
    assert (ours - theirs).norm() < 0.08 * theirs.norm()


def test_the_recipe_does_not_go_on_from_another_run(tmp_path):
    args = argparse.Namespace(seed=0, dtype="float32", steps=[8, 4, 2])
    path = tmp_path / "checkpoint.pt"
    parts = torch.nn.ModuleDict()
    train.save(path, 3, parts, [], args)
    assert train.restore(path, parts, [], args) == 3
    args.seed = 1
    with pytest.raises(SystemExit, match="'seed': 0(.|\n)*'seed': 1(.|\n)*another --folder"):
        train.restore(path, parts, [], args)


def test_the_recipe_ends_with_a_checkpoint_and_goes_on(tmp_path):
    def run(*steps):
        argv = [sys.executable, "-m", "toy.recipe.train", "--folder", str(tmp_path), "--steps"]
        ran = subprocess.run([*argv, *steps], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    run("1", "1", "1")
    assert {f.name for f in (tmp_path / "base").iterdir()} == {f.name for f in BASE.iterdir()}
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["model_type"] == "qwen3_vl"
    assert "going on from step 3" in run("1", "1", "2")


LEAST = {  # what the shipped base can do, with room for chance: 60 questions of each kind
    ("find an object, crowded scene", "mean IoU"): 0.65,
    ("find it, scene not crowded", "mean IoU"): 0.75,
    ("find a frame, plain or translucent", "mean IoU"): 0.75,
    ("what is inside the frame", "exact"): 0.85,
    ("is X inside the frame", "balanced accuracy"): 0.75,
    ("how the frame lies around X", "mean F1 of words"): 0.7,
    ("repeat a box of the conversation", "exact"): 0.95,
    ("the mark, in a crop", "exact"): 0.8,
}


def test_the_base_has_its_skills():
    with torch.inference_mode():
        rows = list(skills.table(skills.load(BASE), 60))
    found = {(skill, measure): value for skill, measure, value, _ in rows}
    for skill, least in LEAST.items():
        assert found[skill] >= least, skill
    assert found["the mark, in the whole scene", "exact"] < 0.5  # what a crop is for
