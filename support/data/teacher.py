"""Reasoning traces: what is wrong with one that a VLM wrote, and traces from geometry alone.

The paper's teacher is a VLM (make_data.py, `vlm_traces`). For the toy preset, whose model is too
small to write them, `template_trace` computes them from the boxes.
"""

import re

from common import iou
from support.data.geometry import faults_of, place


def trace_fault(trace, expression):
    """Why a teacher's trace cannot be used, in a word, or None.

    It must not hold what the student could not know: coordinates, or that the truth was told.
    """
    if not trace:
        return "empty"
    if not trace.endswith((".", "!", "?")):
        return "unfinished"
    if set(re.findall(r"\d+", trace)) - set(re.findall(r"\d+", expression)) or "[" in trace:
        return "coordinates"
    if re.search(r"ground truth|was told|better region|bbox", trace, re.I):
        return "leak"
    if len(re.findall(r"[.!?](?:\s|$)", trace)) not in (1, 2, 3, 4):
        return "sentences"
    return None


def join(words):
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def template_trace(boxes, truth, t):
    """The trace of step t, from geometry alone: what is wrong with box t - 1, and what to do.

    Shifts and sizes count from about a tenth of the true box on. It begins with the words by which
    the toy's base says how a frame lies, as an answer to the question that `CORRECTION` ends with:
    with a sentence first, as small a model says the same of every box. The description is not
    repeated: it copies it wrongly, and then finds what it wrote.
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
