"""The toy: its world, its tokenizer, its base and the recipe."""

import json
import random
import subprocess
import sys
from pathlib import Path

from common import parse_box
from toy import train
from toy.conversations import FRAMES, compare, conversation
from toy.model import make_model, make_tokenizer
from toy.train import BASE, token_labels
from toy.world import SOURCES, SUPERLATIVES, make_samples, make_scene, refer

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
    center = anchors[0]["center"]
    others = [o for o in objects if o is not anchors[0]]
    return [o for o in others if sign * (o["center"][axis] - center[axis]) > 0]


def test_no_expression_is_ambiguous():
    """Reads the expression anew, by its words alone, and finds the one object that it fits."""
    rng = random.Random(0)
    for i in range(900):
        objects = make_scene(rng, distractors=True if i % 3 == 1 else None)
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
                some = [max(some, key=key)]
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


def test_how_a_frame_lies_around_an_object():
    box = [400, 400, 600, 600]
    assert compare(box, box) == "well"
    assert compare([430, 400, 630, 600], box) == "right"
    assert compare([300, 340, 700, 540], box) == "high, wide"
    assert compare([450, 450, 550, 550], box) == "narrow, short"
    assert compare([0, 700, 100, 900], box) == "apart, left, low"


def test_each_image_token_is_taught_what_it_shows():
    circle = {"kind": "circle", "color": "orange", "size": "large", "bbox": [20, 36, 40, 56]}
    labels = token_labels([circle], [("blue", [0, 0, 1000, 1000])]).reshape(2, 5, 5, 11)
    of_object, of_frame = labels
    assert of_object[2, 1].tolist() == [1, 0, 1, 2, 4, 5, 7, 5, 5, 0, 0]  # [250, 450, 500, 700]
    assert (of_object[0] == -1).all() and (of_object[:, 4] == -1).all()
    assert of_frame[0, 0, 0] == list(FRAMES).index("blue")
    assert of_frame[2, 2, 0] == -1  # the line is taught, not the inside


@pytest.mark.parametrize("think", [False, True])
def test_a_conversation_is_a_chat_whose_boxes_are_right(think):
    rng = random.Random(1)
    thoughts = 0
    for _ in range(30):
        segments = conversation(rng, 2, 5, images=2, think=think)
        assert [kind for kind, _ in segments].count("image") == 2
        box = None
        for kind, value in segments:
            if kind == "expression":
                box = value[1]
            if kind == "answer":
                assert value.endswith("<|im_end|>") and parse_box(value) == box
                thoughts += "<think>" in value
    assert (thoughts > 0) == think


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


def test_the_recipe_ends_with_a_checkpoint(tmp_path):
    argv = [sys.executable, "-m", "toy.train", "--folder", str(tmp_path / "base")]
    argv += ["--vision-batches", "1", "--language-batches", "1"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {f.name for f in (tmp_path / "base").iterdir()} == {f.name for f in BASE.iterdir()}
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["model_type"] == "qwen3_vl"


def test_a_folder_that_is_a_file_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train", "--folder", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="--folder .* is a file"):
        train.main()
