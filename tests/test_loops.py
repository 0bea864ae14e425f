"""The loop that looks closer: its guard, its training-free form, what an ablation shows instead of
the view, and how phase 0 writes for it."""

import argparse
import json

import common
import make_data
from common import IVT, SINGLE_PROMPT, encode_images, format_box, rollout, trajectory_logprobs, zoom
from support import files
from support.loops import asked_again, guarded, loop_of, plausible
from support.overlays import elsewhere
from tests.small import picture, vlm

import pytest
import torch

BOX = [400, 400, 600, 500]  # its view, twice the longer side, is [300, 250, 700, 650]


def test_the_flags_name_the_loop():
    args = argparse.Namespace(feedback="overlay", surroundings=2.0)  # phases 0 and 1 have no guard
    assert loop_of(args) is IVT
    args.guard = "off"
    assert loop_of(args) is IVT
    args.feedback = "zoom"
    assert loop_of(args).to_image([0, 0, 500, 500], BOX) == [300, 250, 500, 450]
    args.surroundings = 1.0
    assert loop_of(args).to_image([0, 0, 500, 500], BOX) == [400, 350, 500, 450]
    args.guard = "on"
    assert loop_of(args).to_image([0, 0, 500, 500], BOX) == BOX


# --------------------------------------------------------------------------------------------------
# The guard
# --------------------------------------------------------------------------------------------------
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
    assert plausible(box, BOX) == taken
    assert guarded(IVT).to_image(box, BOX) == (box if taken else BOX)


def test_the_guard_needs_a_box_before():
    far = [0, 0, 10, 10]
    assert guarded(IVT).to_image(far, None) == far
    assert guarded(zoom(2.0)).to_image([0, 0, 1, 1], [0, 0, 90, 90]) is None  # no area: no box


def test_a_refused_box_leaves_the_last_one_in_the_trajectory(vlm, monkeypatch):
    answers = iter([BOX, [0, 0, 100, 100], None, [250, 375, 760, 625]])
    monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
    loop = guarded(zoom(2.0))
    [row] = rollout(vlm, [picture(64, 64)], ["x"], 3, max_tokens=2, loop=loop)
    assert row.boxes == [BOX, BOX, None, [400, 400, 604, 500]]


# --------------------------------------------------------------------------------------------------
# Without training
# --------------------------------------------------------------------------------------------------
def test_an_untrained_model_is_asked_again_by_its_user(vlm, monkeypatch):
    """In the form of a chat: the turn ends, the user shows the view and asks the same question."""
    monkeypatch.setattr(common, "parse_box", lambda text: BOX)
    images = [picture(64, 64), picture(96, 64, 1)]
    options = dict(seeds=[1, 2], group_size=2, temperatures=(1.0, 1.0))
    rows = rollout(vlm, images, ["a", "b"], 1, max_tokens=6, loop=asked_again(2.0), **options)
    sampled = torch.tensor([logprob for row in rows for logprob in row.logprob])
    assert (trajectory_logprobs(vlm, rows).logprob - sampled).abs().max() < 1e-4
    [view] = encode_images(vlm, [asked_again(2.0).feedback(images[1], BOX)])
    assert torch.allclose(rows[2].images[1].embeds, view.embeds, atol=1e-5)
    text = vlm.tokenizer.decode(rows[2].ids).replace("<|image_pad|>", "")
    shown = "<|im_start|>user\n<|vision_start|><|vision_end|>"
    asked = shown + SINGLE_PROMPT.format(text="b") + "<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(asked) and text.count(asked) == 2
    assert text[: text.rindex(asked)].endswith("<|im_end|>\n")


def test_what_is_shown_instead_of_the_view():
    image = picture(90, 70)
    own = zoom(2.0).feedback(image, BOX).tobytes()
    for feedback in (elsewhere(zoom(2.0).feedback), asked_again(2.0).feedback):
        shown = feedback(image, BOX)
        assert shown.size == image.size and shown.tobytes() != own
        assert shown.tobytes() == feedback(image, BOX).tobytes()
        assert feedback(image, None).size == image.size


# --------------------------------------------------------------------------------------------------
# Phase 0
# --------------------------------------------------------------------------------------------------
def test_a_box_is_written_only_within_its_view():
    near = [[400, 400, 600, 500], [450, 400, 650, 500], [500, 400, 700, 500]]
    jump = [BOX, [550, 400, 750, 500], [700, 400, 900, 500]]  # the view ends at 700
    assert make_data.in_view(near, zoom(2.0)) and not make_data.in_view(jump, zoom(2.0))
    assert make_data.in_view(jump, zoom(4.0)) and make_data.in_view(jump, IVT)


def test_traces_are_of_the_view():
    """The target is at the right of the view, and in the middle of the image."""
    truth = [620, 420, 700, 500]
    row = {"boxes": [BOX, [510, 410, 650, 500], truth], "truth": truth}
    trace = make_data.geometric_trace(row, 1, zoom(2.0))
    wrong = "apart, left, high: the red box is on the wrong object. I see the target at the right."
    assert trace.startswith(wrong)
    assert "at the middle" in make_data.geometric_trace(row, 1, IVT)
    assert "at the middle" in make_data.geometric_trace(row, 0, zoom(2.0))


def test_the_vlm_teacher_is_told_the_box_of_the_view():
    calls = []

    def answer(vlm, images, prompts, steps, **options):
        calls.append((images, prompts))
        return [common.Trajectory(texts=["I see it at the left. It fits."]) for _ in prompts]

    rows = [{"id": "1", "expression": "the cat", "boxes": [BOX, [440, 410, 640, 510]]}]
    image = picture(64, 48)
    make_data.vlm_traces(None, [image], rows, [1], max_tokens=4, loop=zoom(2.0), roll=answer)
    [(_, first), ([shown], second)] = calls
    assert format_box(BOX) in first[0]
    assert format_box([350, 400, 850, 650]) in second[0]
    assert shown.tobytes() == zoom(2.0).feedback(image, BOX).tobytes()


# --------------------------------------------------------------------------------------------------
# Phases fit together
# --------------------------------------------------------------------------------------------------
def test_phases_of_another_feedback_are_refused(tmp_path):
    args = argparse.Namespace(out=tmp_path, feedback="zoom", surroundings=2.0)
    files.agrees(args, "make_data", "feedback", "surroundings")  # nothing was written down
    path = tmp_path / "log/make_data.config.json"
    path.parent.mkdir()
    for before, words in (
        ({"steps": 2}, "make_data in .* was made with --feedback overlay, and now it is zoom"),
        ({"feedback": "zoom", "surroundings": 3.0}, "--surroundings 3.0, and now it is 2.0"),
        ({"feedback": "zoom", "surroundings": 2.0}, None),
    ):
        path.write_text(json.dumps(before))
        if words is None:
            files.agrees(args, "make_data", "feedback", "surroundings")
            continue
        with pytest.raises(SystemExit, match=words):
            files.agrees(args, "make_data", "feedback", "surroundings")


def test_a_run_from_before_these_flags_goes_on(tmp_path):
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", lr=0.1)
    files.begin(args, "grpo")
    later = {**vars(args), "feedback": "overlay", "surroundings": 2.0, "guard": "off"}
    later |= {"engine": "plain", "vllm": ""}
    assert files.begin(argparse.Namespace(**later), "grpo")
    with pytest.raises(SystemExit, match="feedback: overlay then, zoom now"):
        files.begin(argparse.Namespace(**{**later, "feedback": "zoom"}), "grpo")
