"""The loop that looks closer: its guard, its training-free form, what an ablation shows instead of
the view, and how phase 0 writes for it."""

import argparse

import common
import make_data
from common import IVT, SINGLE_PROMPT, encode_images, format_box, read_box, rollout
from support.data import teacher
from support.model.views import asked_again, guarded, implausible, loop_of, view_of, zoom
from tests.small import ANY_BOX, picture, sampler_gap, vlm
from tests.test_make_data import WORDS

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

BOX = [400, 400, 600, 500]  # its view, twice the longer side, is [300, 250, 700, 650]


def test_the_flags_name_the_loop():
    args = argparse.Namespace(feedback="overlay", surroundings=2.0)  # phases 0 and 1 have no guard
    assert loop_of(args) is IVT
    args.feedback = "zoom"
    assert loop_of(args).view(BOX) == [300, 250, 700, 650]
    args.guard = "off"
    assert not loop_of(args).refuses([0, 0, 500, 500], BOX)
    args.guard = "on"
    assert loop_of(args).refuses([0, 0, 500, 500], BOX)


# Views: the surroundings of a box, and coordinates there and back ---------------------------------
@pytest.mark.parametrize(
    "box, view, inside",
    [
        ([400, 400, 600, 500], [300, 250, 700, 650], [250, 375, 750, 625]),
        ([0, 0, 100, 200], [0, 0, 400, 400], [0, 0, 250, 500]),  # moved into the image
        ([900, 950, 1000, 1000], [800, 800, 1000, 1000], [500, 750, 1000, 1000]),
        ([100, 0, 700, 90], [0, 0, 1000, 1000], [100, 0, 700, 90]),  # twice its side is too much
        ([500, 500, 502, 501], [451, 450, 551, 550], [490, 500, 510, 510]),  # the smallest view
    ],
)
def test_a_view_by_hand(box, view, inside):
    assert view_of(box, 2.0) == view
    assert common.box_in_view(box, view) == inside


@settings(max_examples=300, deadline=None)
@given(ANY_BOX, ANY_BOX, st.floats(1, 5))
def test_coordinates_go_there_and_back(box, other, surroundings):
    view = view_of(box, surroundings)
    assert view[2] - view[0] == view[3] - view[1] <= 1000 and 0 <= min(view) <= max(view) <= 1000
    assert all(0 <= v <= 1000 for v in common.box_in_view(box, view))
    assert common.box_in_image(common.box_in_view(box, view), view) == box
    # Whatever is written in the view is a box within it, or none at all
    found = common.box_in_image(other, view)
    if found:
        assert view[0] <= found[0] < found[2] <= view[2]
        assert view[1] <= found[1] < found[3] <= view[3]


def test_the_zoomed_loop_shows_the_surroundings_of_the_box():
    """The box lies in the blue quarter of a photo: the view of it shows nothing else."""
    image = Image.new("RGB", (400, 200), "white")
    image.paste("blue", (200, 100, 400, 200))
    loop = zoom(2.0)
    box = [750, 750, 875, 875]  # 50 x 25 pixels
    shown = loop.feedback(image, box)
    assert shown.size == image.size
    assert shown.getpixel((1, 1)) == shown.getpixel((398, 198)) == (0, 0, 255)
    assert shown.getpixel((200, 100)) != (0, 0, 255)  # under the box, which is in the middle
    assert common.box_in_view(box, loop.view(box)) == [252, 252, 752, 752]
    assert shown.getpixel((101, 100)) == (255, 0, 0)  # its outline, at 0.252 of 400
    # Before there is a box: the whole image, in its own coordinates
    assert loop.feedback(image, None).tobytes() == image.tobytes()
    assert read_box(format_box(box), None, loop) == common.box_in_view(box, loop.view(None)) == box
    for one in (loop, guarded(loop)):
        assert read_box("[0, 0, 1, 1]", [0, 0, 10, 10], one) is None  # no area in the image


def test_the_zoomed_loop_is_one_rollout(vlm, monkeypatch):
    """Rows with boxes, at the border and without one: cache and positions, and what SFT builds."""
    written = [[600, 100, 1000, 300], None, [0, 0, 90, 80]] * 2
    written += [[250, 0, 500, 900], [0, 500, 1000, 1000], None] * 2
    answers = iter(written + [[1, 2, 3, 4]] * 6)
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    images = [picture(96, 80), picture(48, 144, 1), picture(64, 64, 2)]
    options = dict(max_tokens=12, seeds=[3, 1, 2], loop=zoom(2.0))
    options |= dict(group_size=2, temperatures=(1.0, 0.7))
    rows = rollout(vlm, images, ["a", "a dog", "x"], 2, **options)
    assert sampler_gap(vlm, rows) < 1e-4
    assert rows[0].boxes[:2] == [[600, 100, 1000, 300], [400, 0, 600, 720]]
    assert rows[1].boxes[:2] == [None, [0, 500, 1000, 1000]]
    assert rows[2].boxes[:2] == [[0, 0, 90, 80], None]
    for n, row in enumerate(rows[:2]):
        shown = common.feedback_pictures(images[0], row.boxes, zoom(2.0))
        for a, b in zip(row.images, encode_images(vlm, shown)):
            assert torch.allclose(a.embeds, b.embeds, atol=1e-5)
        assert "enlarged. The red box is" in vlm.tokenizer.decode(row.ids)
    assert common.written_boxes(rows[0].boxes[:2], zoom(2.0)) == [written[0], [250, 0, 500, 900]]


# The guard ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "box, taken",
    [
        ([400, 400, 600, 500], True),
        ([430, 410, 630, 510], True),  # IoU 0.62
        ([440, 410, 640, 510], False),  # IoU 0.56
        ([400, 400, 600, 535], True),  # 35 percent higher
        ([400, 400, 600, 536], False),  # by more
        ([400, 400, 530, 500], True),  # 35 percent narrower, IoU 0.65
        ([400, 400, 529, 500], False),
    ],
)
def test_the_guard_refuses_what_differs_too_much(box, taken):
    assert implausible(box, BOX) != taken
    assert read_box(format_box(box), BOX, guarded(IVT)) == (box if taken else BOX)
    assert read_box(format_box(box), None, guarded(IVT)) == box  # nothing to differ from


def test_a_refused_box_leaves_the_last_one_in_the_trajectory(vlm, monkeypatch):
    answers = iter([BOX, [0, 0, 100, 100], None, [250, 375, 760, 625]])
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    loop = guarded(zoom(2.0))
    [row] = rollout(vlm, [picture(64, 64)], ["x"], 3, max_tokens=2, loop=loop)
    assert row.boxes == [BOX, BOX, None, [400, 400, 604, 500]]


# Without training ---------------------------------------------------------------------------------
def test_an_untrained_model_is_asked_again_by_its_user(vlm, monkeypatch):
    """In the form of a chat: the turn ends, the user shows the view and asks the same question."""
    monkeypatch.setattr(common, "parse_box", lambda text: BOX)
    images = [picture(64, 64), picture(96, 64, 1)]
    options = dict(seeds=[1, 2], group_size=2, temperatures=(1.0, 1.0))
    rows = rollout(vlm, images, ["a", "b"], 1, max_tokens=6, loop=asked_again(2.0), **options)
    assert sampler_gap(vlm, rows) < 1e-4
    [view] = encode_images(vlm, [asked_again(2.0).feedback(images[1], BOX)])
    assert torch.allclose(rows[2].images[1].embeds, view.embeds, atol=1e-5)
    text = vlm.tokenizer.decode(rows[2].ids).replace("<|image_pad|>", "")
    shown = "<|im_start|>user\n<|vision_start|><|vision_end|>"
    asked = shown + SINGLE_PROMPT.format(text="b") + "<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(asked) and text.count(asked) == 2
    assert text[: text.rindex(asked)].endswith("<|im_end|>\n")


# Phase 0 ------------------------------------------------------------------------------------------
def test_a_box_is_written_only_within_its_view():
    near = [[400, 400, 600, 500], [450, 400, 650, 500], [500, 400, 700, 500]]
    jump = [BOX, [550, 400, 750, 500], [700, 400, 900, 500]]  # the view ends at 700
    assert make_data.in_view(near, zoom(2.0)) and not make_data.in_view(jump, zoom(2.0))
    assert make_data.in_view(jump, zoom(4.0)) and make_data.in_view(jump, IVT)


def test_traces_are_of_the_view():
    """The target is at the right of the view, and in the middle of the image."""
    truth = [620, 420, 700, 500]
    row = {"boxes": [BOX, [510, 410, 650, 500], truth], "truth": truth}
    trace = teacher.geometric_trace(row, 1, zoom(2.0))
    wrong = "apart, left, high: the red box is on the wrong object. I see the target at the right."
    assert trace.startswith(wrong)
    assert "at the middle" in teacher.geometric_trace(row, 1, IVT)
    assert "at the middle" in teacher.geometric_trace(row, 0, zoom(2.0))


def test_the_vlm_teacher_is_shown_the_view_and_told_its_box():
    calls = []

    def answer(vlm, images, prompts, steps, **options):
        calls.append((images[0].tobytes(), prompts[0]))
        return [common.Trajectory(texts=["I see it at the left. It fits."])]

    row = {"id": "1", "expression": "the cat", "boxes": [BOX, [440, 410, 640, 510]]}
    image = picture(64, 48)
    make_data.vlm_traces(WORDS, [image], [row], [1], max_tokens=30, loop=zoom(2.0), roll=answer)
    [(_, first), (shown, second)] = calls
    assert format_box(BOX) in first and format_box([350, 400, 850, 650]) in second
    assert shown == zoom(2.0).feedback(image, BOX).tobytes()
