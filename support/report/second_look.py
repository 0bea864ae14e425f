"""What a sceptic asks of a second look: what it corrects and what it spoils; whether a step can be
chosen without the truth; whether traces know how good a box is.

Shapes and words as in statistics.py: S samples, `ious` [S, T + 1], an estimate is [value, low,
high]. Right is an IoU of 0.5 or more.
"""

from common import box_iou, last_valid, normalize_box
from support.report.claims import CLAIMS, KEEP, claim_of, geometry_of, trace_of
from support.report.statistics import (
    all_ious,
    at_steps,
    choices,
    estimate,
    estimate_of,
    last_valid_step,
    metric_estimates,
    metrics,
    ratio,
    stop_step,
    valid_steps,
)

import numpy as np

RIGHT = 0.5
AGREEMENT = 0.9  # of the rule that stops when two boxes agree
GAINS = ("mean IoU", "Acc@0.5", "Acc@0.9")  # in which the rules are compared
LISTS = ("boxes", "texts", "confidence")  # of a trajectory, with an entry for each step


def analyse(samples, lines_of, steps):
    """name -> what this file has to say, for each row (rows.Row) that refines. steps: T; what lies
    beyond it in a line is left out."""
    looks = {}
    for row, lines in lines_of.items():
        lines = [{key: line[key][: steps + 1] for key in LISTS if key in line} for line in lines]
        if not row.ordered or len(lines[0]["boxes"]) == 1:
            continue
        ious = all_ious(samples, lines)
        look = {"turns": turns(ious), "rules": rules(ious, lines)}
        if has_traces(lines):
            later = range(1, len(lines[0]["boxes"]))
            look["traces"] = [truth_of_traces(samples, lines, t) for t in later]
        looks[row.name] = look
    return looks


def has_confidence(rows):
    """Guarded rows have none, and other systems do not say."""
    return all("confidence" in row for row in rows)


def has_traces(rows):
    """Whether anything is reasoned at a refinement step."""
    return any(trace_of(text) for row in rows for text in row["texts"][1:])


# What is corrected, and what is spoilt ------------------------------------------------------------
def turns(ious):
    """First and last step, right and wrong: the four counts, and the error-correction rate
    ECR = P(last right | first wrong) and the error-introduction rate EIR = P(last wrong | first
    right).

    Acc@0.5 changes by (1 - Acc) ECR - Acc EIR, so a loop gains only if ECR / EIR > Acc / (1 - Acc),
    with Acc that of step 0. "ratio" and "needed" are these two, None where one divides by zero.
    """
    first = ious[:, 0] >= RIGHT
    last = ious[:, -1] >= RIGHT
    counts = {
        "right, right": first & last,
        "right, wrong": first & ~last,
        "wrong, right": ~first & last,
        "wrong, wrong": ~first & ~last,
    }
    corrected = ratio(last, ~first)
    introduced = ratio(~last, first)
    possible = corrected and introduced and introduced[0] > 0
    return {
        **{turn: mask.sum().item() for turn, mask in counts.items()},
        "ECR": corrected,
        "EIR": introduced,
        "ratio": corrected[0] / introduced[0] if possible else None,
        "needed": first.sum().item() / (~first).sum().item() if not first.all() else None,
        "change": estimate(last.astype(float) - first),
    }


# Rules that choose a step -------------------------------------------------------------------------
def rules(ious, rows):
    """Rules that choose a step without the truth, and the best of steps, which needs it: rule ->
    {"mean IoU", "gain": the differences from stopping at step 0, paired}."""
    boxes = [row["boxes"] for row in rows]
    longest = ious.shape[1] - 1
    ways = choices(ious, boxes)
    chosen = {way: ways[way] for way in ("first step", "last step", "last valid", "medoid")}
    chosen["agreement"] = at_steps(ious, [stop_step(row, AGREEMENT, longest) for row in boxes])
    if has_confidence(rows):
        chosen["confidence"] = at_steps(ious, map(most_confident_step, rows))
    if has_traces(rows):
        chosen["own trace"] = at_steps(ious, map(kept_step, rows))
    chosen["best of steps"] = ways["best of steps"]
    stopped = metrics(chosen["first step"])
    table = {}
    for rule, values in chosen.items():
        gain = metric_estimates(metrics(values) - stopped)
        table[rule] = {
            "mean IoU": estimate(values),
            "gain": {metric: gain[metric] for metric in GAINS},
        }
    return table


def most_confident_step(row):
    """The step whose valid box has the highest confidence, the first of equals; None without a
    valid box."""
    return max(valid_steps(row["boxes"]), key=lambda t: row["confidence"][t], default=None)


def kept_step(row):
    """The step whose box the model itself keeps: the one before the first trace that says so, else
    the last valid one."""
    for t, text in enumerate(row["texts"]):
        shown = last_valid_step(row["boxes"][:t])
        if shown is not None and claim_of(trace_of(text)) == KEEP:
            return shown
    return last_valid_step(row["boxes"])


# Do the traces tell the truth? --------------------------------------------------------------------
def truth_of_traces(samples, rows, t):
    """What the traces of step t say of the box that was shown there, against where it lies.

    {"step", "different": how many different traces there are, "boxes": for boxes on a wrong object
    (IoU 0), right (0.5 and more) and in between, how many were shown and the share of each claim,
    "balanced": with what balanced accuracy a trace says what the geometry says (`geometry_of`),
    "chance": that of any answer that does not look}.
    """
    shown = [last_valid(row["boxes"][:t]) for row in rows]
    there = np.array([box is not None for box in shown])
    ious = np.array([box_iou(box, sample) for box, sample in zip(shown, samples)])
    traces = [trace_of(row["texts"][t]) for row in rows]
    said = np.array([claim_of(trace) or "" for trace in traces])
    true = []
    for box, sample in zip(shown, samples):
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        true.append(geometry_of(box, truth) if box else "")
    true = np.array(true)
    groups = {
        "wrong object": there & (ious == 0),
        "in between": there & (ious > 0) & (ious < RIGHT),
        "right": there & (ious >= RIGHT),
    }
    boxes = {}
    for name, group in groups.items():
        shares = {claim: ratio(said == claim, group) for claim in CLAIMS}
        boxes[name] = {"n": int(group.sum()), **shares}
    return {
        "step": t,
        "different": len(set(traces)),
        "boxes": boxes,
        "balanced": balanced_accuracy(said, true),
        "chance": 1 / max(1, len(set(true[there]))),
    }


def balanced_accuracy(said, true):
    """An estimate of the mean, over the claims that are ever true, of the share of its samples in
    which it is said. said, true: [S] words."""
    columns = []
    for claim in CLAIMS:
        columns += [true == claim, (true == claim) & (said == claim)]

    def accuracy(means):
        whole, part = means[..., 0::2], means[..., 1::2]  # [..., claims]
        shares = np.where(whole > 0, part / whole, 0)
        return shares.sum(-1) / (whole > 0).sum(-1)

    return estimate_of(np.stack(columns, 1), accuracy)
