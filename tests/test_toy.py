"""The toy: its world, its tokenizer, what its base learns from, the recipe, its skills."""

import random
import re
from dataclasses import replace

from common import CORRECTION, IVT_PROMPT, NO_BOX, SINGLE_PROMPT, encode_images, parse_box
from support.data.teacher import template_trace
from support.model.views import CLOSER
from tests.small import TEXTS, vlm
from toy.model import BASE, VOCABULARY, make_model
from toy.questions import FRAMES, RELATED, compare, draw_frame, is_inside, view
from toy.recipe import lessons, skills, train
from toy.world import SIDE, SOURCES, SUPERLATIVES, center, make_samples, make_scene, refer

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessorPil


def fits(o, phrase):
    """Whether all words of "the large red circle", superlatives aside, are true of the object."""
    return {*phrase.split()[1:]} - {*SUPERLATIVES} <= {o["kind"], o["color"], o["size"]}


def related(objects, relation):
    """The objects for which "to the left of the star" is true."""
    where, _, name = relation.rpartition(" the ")
    [anchor] = [o for o in objects if fits(o, f"the {name}")]
    axis, sign = (0 if "of" in where else 1), (1 if where in ("to the right of", "below") else -1)
    edge = center(anchor["box"])[axis]
    return [o for o in objects if sign * (center(o["box"])[axis] - edge) > 0]


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
            some = [o for o in related(objects, relation) if o in some]
        for word in set(head.split()) & set(SUPERLATIVES):
            assert len(some) > 1
            some = [max(some, key=lambda o: SUPERLATIVES[word](o["box"]))]
        assert some == [target], expression


def test_the_world_is_seeded(tmp_path):
    first = make_samples(tmp_path / "a", 4, 0)
    assert first == make_samples(tmp_path / "b", 4, 0) and len(first) == 12
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
    labels = lessons.token_labels(draw_frame(scene, "cyan", target["box"], 0.25))
    x, y = (int(v * lessons.CELLS / 1000) for v in center(target["box"]))
    token, cyan = y * lessons.CELLS + x, list(FRAMES).index("cyan")
    words = {lessons.WORDS[i] for i in np.flatnonzero(labels["words"][token])}
    assert words - {target["mark"]} == {target["color"], target["kind"], target["size"]}
    assert labels["digits"][token].tolist() == lessons.digits(target["box"])
    assert labels["frame"][token] == cyan
    assert labels["related"][token, cyan, -2:].tolist() == [1, 1]  # well, in
    empty = labels["digits"][:, 0] < 0
    assert empty.any() and not labels["words"][empty, : -len(lessons.MARKS)].any()


def test_a_conversation_is_a_chat_whose_boxes_are_right(vlm):
    rng, kinds = random.Random(1), set()
    for _ in range(40):
        said, turns = [], lessons.conversation(rng, 2, vlm.encode, True)
        assert turns[0][0] is not None
        for _, question in turns:
            kinds.add(question.kind)
            if question.kind in ("find", "frame"):
                assert parse_box(question.answer) == (question.object or question.frame)
            if question.kind == "repeat":
                assert question.answer in said + [question.text[15:-17]]
            said.append(question.answer)
    assert kinds >= {"find", "frame", "repeat", "words", "compare", "is_inside", "mark", "count"}


def test_the_base_learns_from_no_prompt_and_no_sentence_of_the_methods(vlm):
    """No four words in a row of theirs, but those that say how a frame lies: the skill's own."""
    sentences = [IVT_PROMPT, CORRECTION, NO_BOX, CLOSER, *TEXTS]
    boxes = [[300, 300, 500, 500], [100, 100, 350, 250], [700, 500, 990, 990]]
    sentences += [template_trace(boxes, [310, 320, 480, 510], t) for t in (0, 1, 2)]
    runs = set()
    for sentence in sentences:
        words = re.findall(r"[a-z]+", sentence.lower().replace("think", ""))
        runs |= {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}
    allowed = " ".join(re.findall(r"[a-z]+", SINGLE_PROMPT.lower()))
    runs = {run for run in runs if run not in allowed and not set(run.split()) <= set(RELATED)}
    for seed in range(3):
        batch = lessons.chat_batch(random.Random(seed), 2, vlm.tokenizer, True)
        text = " ".join(re.findall(r"[a-z]+", vlm.tokenizer.decode(batch["ids"].flatten()).lower()))
        assert not [run for run in runs if f" {run} " in text]


def test_the_base_is_of_the_tokens_and_the_shape_that_the_code_makes(vlm):
    for word in VOCABULARY:
        assert 1 in (len(vlm.encode(word)), len(vlm.encode(f" {word}"))), word
    shapes = {name: p.shape for name, p in skills.load(BASE).model.named_parameters()}
    assert shapes == {name: p.shape for name, p in make_model().named_parameters()}


def test_the_recipe_sees_as_the_model_does(vlm):
    """Its tower, on many pictures at once, against transformers' through the image processor."""
    scenes = [make_scene(random.Random(i))["image"] for i in range(2)]
    patches = torch.from_numpy(np.stack([lessons.patches_of(image) for image in scenes]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, deepstack = train.see(vlm.base.model.visual, patches)
    processor = Qwen2VLImageProcessorPil.from_pretrained(BASE)
    images = encode_images(replace(vlm, image_processor=processor), scenes)
    theirs = [torch.cat(level) for level in zip(*([i.embeds, *i.deepstack] for i in images))]
    for our, their in zip([features, *deepstack], theirs, strict=True):
        assert (our - their).norm() <= 0.03 * their.norm()  # ours are in bfloat16


def test_a_recipe_that_was_killed_goes_on_to_the_same_base(tmp_path, monkeypatch, capsys):
    for name in ("PICTURES", "ROWS", "WORDED", "CROPS"):
        monkeypatch.setattr(lessons, name, 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)

    def run(folder, steps):
        argv = ["train", "--out", str(tmp_path / folder), "--steps", *steps.split()]
        monkeypatch.setattr("sys.argv", argv)
        train.main()
        return {f.name: f.read_bytes() for f in (tmp_path / folder / "base").iterdir()}

    def killed(step, steps, rate_of=train.rate_of):
        if step == 3:
            raise KeyboardInterrupt
        return rate_of(step, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "rate_of", killed)
        run("killed", "2 1 2 1")
    with pytest.raises(SystemExit, match="another --out"):  # its first stages are another run's
        run("killed", "1 2 2 1")
    again, whole = run("killed", "2 1 2 1"), run("whole", "2 1 2 1")
    assert again == whole and "going on from step 2" in capsys.readouterr().out
    assert set(whole) == {f.name for f in BASE.iterdir()}


SKILLS = {  # the least that the shipped base may reach on this sample: well below what it does
    "find an object, crowded scene": 0.75,  # Acc@0.5
    "  the same in a view enlarged 1.5 to 3 times": 0.85,
    "find a frame, plain or translucent": 0.7,
    "what is inside the frame": 0.85,
    "is X inside the frame": 0.8,
    "how the frame lies around X": 0.65,
    "the mark, in a crop": 0.8,
    "how many marks of a kind, in a view": 0.6,
}


def test_the_base_has_the_skills():
    with torch.inference_mode():
        found = {skill: value for skill, _, value, _ in skills.table(skills.load(BASE), 50)}
    assert not {skill: found[skill] for skill, least in SKILLS.items() if found[skill] < least}
    assert found["the mark, in the whole scene"] < 0.4  # only a crop shows it
