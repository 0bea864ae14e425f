"""Reasoning traces: what a VLM is asked for them (make_data.py, `vlm_traces`), what is wrong with
one, and for the toy's small model traces from geometry alone. How boxes lie, in words, and boxes
moved at random. All boxes are in 0..1000."""

import math
import re

from common import box_in_view, iou, step_text
from support.data.samples import is_words
from support.running.errors import stop

# The paper does not print the teacher's prompts either. At step 0 it reasons forward, whether the
# box is right or wrong: the student cannot know that when it writes its first box (Section 3.2).
ABOUT_FIRST = (
    'You located "{expression}" in this image and chose the region {box} (coordinates relative to '
    "1000). In two sentences, in the first person, reason forward from the description to this "
    "region: what you look for, where you see it and why it fits. Do not write any number or "
    "coordinate, and no box."
)
ABOUT_STEP = (
    'The red box in this image is your last prediction for "{expression}". A better region is '
    "{box} (coordinates relative to 1000); never mention that you were told. In two or three "
    "sentences, in the first person, examine the red box: say what is wrong with it (shifted, too "
    "large, too small, on the wrong object) and which spatial correction is needed. Do not write "
    "any number or coordinate, and no box."
)
ABOUT_HOLD = (  # where the next box is the same one: near the truth, with --iou-max 1
    'The red box in this image is your last prediction for "{expression}", and it is right. In two '
    "sentences, in the first person, examine the red box: say why it fits and that you keep it. Do "
    "not write any number or coordinate, and no box."
)


def trace_fault(vlm, trace, expression, max_tokens):
    """Why a teacher's trace cannot be used, in a word, or None: it must not hold what the student
    could not know (coordinates, that the truth was told), and has to fit into max_tokens with the
    tags and the longest box."""
    if not is_words(trace, math.inf):
        return "no words"
    if len(vlm.encode(step_text(trace, [1000] * 4))) > max_tokens:
        return "too long"
    if not trace.endswith((".", "!", "?")):
        return "unfinished"
    if set(re.findall(r"\d+", trace)) - set(re.findall(r"\d+", expression)) or "[" in trace:
        return "coordinates"
    if re.search(r"ground truth|was told|better region|bbox", trace, re.I):
        return "leak"
    if len(re.findall(r"[.!?](?:\s|$)", trace)) not in (1, 2, 3, 4):
        return "sentences"
    return None


def box_before(row, t):
    """The box that step t of a row will see: none at step 0."""
    return row["boxes"][t - 1] if t > 0 else None


def in_picture(box, row, t, loop):
    """A box as step t of a row has to write it: relative to the picture that the step sees."""
    return box_in_view(box, loop.view(box_before(row, t)))


def join(words):
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def template_trace(boxes, truth, t):
    """The trace of step t, from geometry alone: what is wrong with box t - 1, and what to do.

    It begins with the words by which the toy's base says how a frame lies, as an answer to the
    question that `CORRECTION` ends with: with a sentence first, as small a model says the same of
    every box. The description is not repeated: it copies it wrongly, and then finds what it wrote.
    """
    if t == 0:  # forward reasoning: why this region, right or wrong (Section 3.2)
        return f"I look for the object. I see it at the {place(boxes[0])}."
    before = boxes[t - 1]
    faults, moves, sizes = faults_of(before, truth)
    words = [fault.split()[-1] for fault in faults]
    if iou(before, truth) == 0:
        where = ", ".join(["apart", *words[: len(moves)]])
        return (
            f"{where}: the red box is on the wrong object. I see the target at the {place(truth)}. "
            f"I move the box {join(moves or ['there'])}."
        )
    if not faults and before == boxes[t]:
        return "well: the red box fits. I keep it."
    if not faults:
        return "well: the red box is nearly right. I tighten it slightly."
    cures = []
    if moves:
        cures.append(f"move it {join(moves)}")
    if sizes:
        cures.append(f"make it {join(sizes)}")
    return f"{', '.join(words)}: the red box is {join(faults)}. I {join(cures)}."


def geometric_trace(row, t, loop):
    """The trace of step t of a row, from where the boxes lie in its picture."""
    boxes = [in_picture(box, row, t, loop) for box in row["boxes"]]
    return template_trace(boxes, in_picture(row["truth"], row, t, loop), t)


# Geometry -----------------------------------------------------------------------------------------
def place(box):
    """Where on the image a box (0..1000) lies, in words."""
    x = (box[0] + box[2]) / 2
    y = (box[1] + box[3]) / 2
    row = "upper" if y < 333 else "lower" if y > 667 else ""
    column = "left" if x < 333 else "right" if x > 667 else ""
    return f"{row} {column}".strip() or "middle"


def faults_of(before, truth):
    """How a box lies to the true one, both in 0..1000, in words: its faults, moves and sizes."""
    width = max(truth[2] - truth[0], 1)
    height = max(truth[3] - truth[1], 1)
    # How far the truth's centre lies to the right and below, in sizes of the true box
    dx = (truth[0] + truth[2] - before[0] - before[2]) / 2 / width
    dy = (truth[1] + truth[3] - before[1] - before[3]) / 2 / height
    wider = width / max(before[2] - before[0], 1)
    taller = height / max(before[3] - before[1], 1)
    rules = [  # whether it is so, the fault, the cure
        (dx > 0.1, "too far left", "right"),
        (dx < -0.1, "too far right", "left"),
        (dy > 0.1, "too high", "down"),
        (dy < -0.1, "too low", "up"),
        (wider > 1.15, "too narrow", "wider"),
        (wider < 0.87, "too wide", "narrower"),
        (taller > 1.15, "too short", "taller"),
        (taller < 0.87, "too tall", "shorter"),
    ]
    faults = [fault for true, fault, _ in rules if true]
    moves = [cure for true, _, cure in rules[:4] if true]
    sizes = [cure for true, _, cure in rules[4:] if true]
    return faults, moves, sizes


def perturb(rng, box, iou_max):
    """The box (0..1000), its sides moved at random: an IoU of 0.1 to iou_max with the original.
    What the paper tried first, and found to teach poor first answers."""
    x1, y1, x2, y2 = box
    for _ in range(10_000):
        # Sides that cross leave a box with which nothing has an IoU
        moved = [v + rng.gauss(0, 0.3) * side for v, side in zip(box, (x2 - x1, y2 - y1) * 2)]
        out = [min(1000, max(0, round(v))) for v in moved]
        if 0.1 < iou(out, box) <= iou_max:
            return out
    stop(f"no box with an IoU of 0.1 to {iou_max} with {box}; raise --iou-max")
