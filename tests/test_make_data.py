"""Tests of phase 0: trajectories of boxes and the two teachers."""

import random
from functools import partial
from types import SimpleNamespace

import make_data
from common import IVT, Trajectory, draw_overlay, format_box, iou, parse_box
from support.data.teacher import perturb, template_trace, trace_fault
from tests.small import ANY_BOX, picture

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

WORDS = SimpleNamespace(encode=str.split)  # a VLM, as far as a trace is measured


@given(ANY_BOX, ANY_BOX, st.integers(1, 5))
@example([100, 0, 101, 10], [103, 0, 104, 10], 2)
def test_no_box_between_is_without_an_area(first, last, steps):
    for box in make_data.interpolate(first, last, steps):
        assert parse_box(format_box(box)) == box


def test_which_predictions_become_a_straight_line_to_the_truth():
    sample = {"id": "1", "expression": "x", "width": 100, "height": 100, "bbox": [0, 0, 50, 50]}
    args = SimpleNamespace(iou_max=0.85, start="student", steps=2, right_boxes="drop")

    def row(box, iou=0.0, **changes):
        prediction = {"box": box, "iou": iou}
        return make_data.boxes_to_the_truth({**sample, **changes}, prediction, args, IVT)

    boxes = [[100, 40, 300, 201], [50, 20, 400, 350], [0, 0, 500, 500]]  # on a straight line
    assert row(boxes[0])["boxes"] == boxes
    assert row(None) == "no valid box" and row([0, 0, 500, 490], 0.98) == "IoU above 0.85"
    assert "below a thousandth" in row([0, 0, 9, 9], bbox=[0, 0, 0.05, 50])
    args.right_boxes = "keep"
    assert row([0, 0, 500, 490], 0.98)["boxes"] == [[0, 0, 500, 490]]
    args.start, args.seed = "perturbed", 0  # from the truth: a box of the student is not needed
    assert row(None)["boxes"][2] == [0, 0, 500, 500]


def test_perturbed_boxes_keep_to_the_filter():
    rng = random.Random(0)
    box = [400, 300, 600, 900]
    ious = [iou(perturb(rng, box, 0.85), box) for _ in range(50)]
    assert 0.1 < min(ious) and max(ious) <= 0.85 and max(ious) - min(ious) > 0.3
    with pytest.raises(SystemExit, match="raise --iou-max"):
        perturb(rng, [0, 0, 1, 1], 0.11)


def test_template_traces_say_what_the_geometry_is():
    truth = [400, 400, 600, 600]

    for before, trace in (
        ([360, 400, 560, 600], "left: the red box is too far left. I move it right."),
        ([400, 440, 600, 560], "short: the red box is too short. I make it taller."),
        (
            [450, 330, 700, 530],
            "right, high, wide: the red box is too far right, too high and too wide. "
            "I move it left and down and make it narrower.",
        ),
        (
            [100, 700, 200, 800],
            "apart, left, low: the red box is on the wrong object. I see the target at the middle. "
            "I move the box right and up.",
        ),
        (truth, "well: the red box fits. I keep it."),
        ([401, 400, 600, 600], "well: the red box is nearly right. I tighten it slightly."),
    ):
        assert template_trace([before, truth], truth, 1) == trace
    first = template_trace([[0, 0, 100, 100]], truth, 0)
    assert first == "I look for the object. I see it at the upper left."


def test_teacher_traces_may_not_leak():
    fault = partial(trace_fault, WORDS, max_tokens=30)
    assert fault("The box is too low. I move it up.", "the cat") is None
    assert fault("Number 23 is left.", "player 23") is None
    assert fault("Move it to 312.", "the cat") == "coordinates"
    assert fault("", "the cat") == fault("A <tool_call> is left.", "the cat") == "no words"
    assert fault("The ground truth is higher.", "the cat") == "leak"
    assert fault("It is too low. So I", "the cat") == "unfinished"
    assert fault("A. B. C. D. E.", "the cat") == "sentences"
    # The box, five words here, has to fit behind the trace
    assert fault("so " * 25 + "end.", "the cat") == "too long"
    assert fault("so " * 24 + "end.", "the cat") is None


def test_the_vlm_teacher_asks_again_and_sees_the_overlay(capsys):
    good = "I see it at the left. It is the only one."
    rows = [
        {"id": "1", "expression": "the cat", "boxes": [[0, 0, 500, 500], [500, 500, 900, 900]]},
        {"id": "2", "expression": "a dog", "boxes": [[0, 0, 100, 100]] * 2},
    ]
    texts = {
        "the cat": ["Go to 312.", good, good],
        "a dog": [good, "no full stop", "", good],
    }
    calls = []

    def answer(vlm, images, prompts, steps, *, seeds, **options):
        calls.append((images, prompts, seeds))
        names = ["the cat" if "the cat" in prompt else "a dog" for prompt in prompts]
        return [Trajectory(texts=[texts[name].pop(0)]) for name in names]

    images = [picture(32, 32), picture(32, 32, 1)]
    made = make_data.vlm_traces(WORDS, images, rows, [10, 20], max_tokens=30, roll=answer)
    assert [row["traces"] for row in made] == [[good, good], [good, good]]
    assert [row["rejected"] for row in made] == [["coordinates"], ["unfinished", "no words"]]
    assert "refused, coordinates: 'Go to 312.'\n" in capsys.readouterr().out
    # Only what was rejected is asked for again, with another seed
    assert [len(call[0]) for call in calls] == [2, 1, 2, 1, 1]
    assert calls[1][2] == [11]
    # Step 0 sees the plain image, step 1 the overlay of box 0, and is told box 1
    assert calls[0][0][0].tobytes() == images[0].tobytes()
    assert calls[2][0][0].tobytes() == draw_overlay(images[0], [0, 0, 500, 500]).tobytes()
    assert "[500, 500, 900, 900]" in calls[2][1][0]
    # A box that holds still is not to be found fault with
    assert "it is right" in calls[2][1][1]
    texts["a dog"] = ["1"] * 3 + [good]
    [row] = make_data.vlm_traces(WORDS, images[1:], rows[1:], [20], max_tokens=30, roll=answer)
    assert row["traces"] is None
