"""The numbers of an evaluation, as results.json holds them: what each row's boxes are worth, what
its steps change, what its traces know, and the paper's findings.

Shapes and words as in statistics.py. A line is one of a log (rows.log_line).
"""

from common import box_iou, iou, last_valid, normalize_box
from support.report.claims import CLAIMS, KEEP, claim_of, geometry_of, trace_of
from support.report.statistics import (
    GRPO,
    RIGHT,
    SAME,
    SAMPLED,
    SFT,
    UNTRAINED,
    WITHOUT_SFT,
    all_ious,
    changes,
    estimate,
    estimate_of,
    judged,
    main_row,
    metric_estimates,
    metrics,
    ratio,
    strata,
    turns,
)

import numpy as np

LISTS = ("boxes", "texts", "read", "confidence")  # of a line, with an entry for each step
AGREEMENT = 0.9  # the IoU above which two boxes agree
FALL = 0.1  # of Acc@0.5, for an untrained loop to collapse; ours, the paper names no threshold


# All numbers --------------------------------------------------------------------------------------
def results_of(samples, lines_of, steps):
    """The numbers of any rows (rows.Row) on their lines, compared against the first row. steps: T
    of the tables; what lies beyond it in a line is left out."""
    results = {"n": len(samples), "steps": steps, "shown": main_row(lines_of).name}
    results |= {"table1": {}, "differences": {}, "table2": {}, "ablations": {}}
    ious_of = {}  # a name -> the IoUs of the first T + 1 steps
    for row, lines in lines_of.items():
        name = row.name
        lines = [{key: line[key][: steps + 1] for key in LISTS if key in line} for line in lines]
        ious = ious_of[name] = all_ious(samples, lines)
        base = metrics(next(iter(ious_of.values()))[:, 0])  # of the first row
        chosen = choices(ious, lines, row.ordered)
        results["table1"][name] = {way: metric_estimates(v) for way, v in chosen.items()}
        results["differences"][name] = {way: metric_estimates(v, base) for way, v in chosen.items()}
        if row.ordered and ious.shape[1] > 1:
            gains = {way: estimate(values - ious[:, 0]) for way, values in chosen.items()}
            results["table2"][name] = {**refinement(samples, lines, ious), "gains": gains}
    results["findings"] = findings(results, ious_of)
    return results


def refinement(samples, lines, ious):
    """What the steps of a row change: Table 2, and what goes beyond it."""
    boxes = [line["boxes"] for line in lines]
    row = {
        "iou": estimate(ious),
        **changes(ious),
        "repeats": estimate([all(box == own[0] for box in own) for own in boxes]),
        "valid": estimate([[box is not None for box in own] for own in boxes]),
        "turns": turns(ious),
        "strata": strata(samples, ious),
    }
    if all("read" in line for line in lines):  # other systems do not say
        read = np.array([line["read"] for line in lines], float)  # tokens
        row["cost"] = (read[:, -1].sum() / read[:, 0].sum()).item()
    if has_traces(lines):
        later = range(1, ious.shape[1])
        row["traces"] = [truth_of_traces(samples, lines, t) for t in later]
    return row


def ablations_of(samples, steps, lines_of, others):
    """What a row does when it is shown other pictures than its own: name -> estimates; "against":
    the last step's IoU minus the row's own, paired. others: (row, what is shown) -> lines."""
    table = {}
    for (row, word), lines in others.items():
        ious, own = (all_ious(samples, of)[:, : steps + 1] for of in (lines, lines_of[row]))
        against = estimate(ious[:, -1] - own[:, -1])
        table[f"{row.name}, {word}"] = {**changes(ious), "against": against}
    return table


def findings(results, ious_of):
    """The paper's findings as a list of `judged`. ious_of: a row's name -> [S, T + 1]."""
    differences = results["differences"]
    rows = results["table2"]  # of other systems, a row may have one box only
    shown = results["shown"]
    found = []
    ways = ("best of steps", "last step")
    if UNTRAINED in rows:
        for way in ways:
            fall = [differences[UNTRAINED][way]["Acc@0.5"]]
            words = "Untrained, IVT falls 10 points or more below single-shot in Acc@0.5"
            found.append(judged(f"{words} ({way})", fall, below=-FALL))
    if SFT in rows:
        for way in ways:
            gains = differences[SFT][way]
            words = f"SFT + IVT passes single-shot on every metric ({way})"
            found.append(judged(words, gains.values(), gains, above=0))
        found.append(judged("SFT declines from step 0 to step T", [rows[SFT]["delta"]], below=0))
    if SFT in rows and GRPO in rows:
        sft, grpo = (ious_of[name] - ious_of[name][:, :1] for name in (SFT, GRPO))  # [S, T + 1]
        for t, words in ((1, "at step 1"), (-1, "from step 0 to step T")):
            words = f"GRPO's change {words} is better than SFT's"
            found.append(judged(words, [estimate(grpo[:, t] - sft[:, t])], above=0))
        fewer = estimate((sft[:, -1] < -SAME) * 1.0 - (grpo[:, -1] < -SAME))
        found.append(judged("Fewer samples degrade after GRPO than after SFT", [fewer], above=0))
    if WITHOUT_SFT in rows:
        words = "GRPO without SFT repeats its first box at every step in most samples"
        most = [value - 0.5 for value in rows[WITHOUT_SFT]["repeats"]]
        found.append(judged(words, [most], above=0))
    if SAMPLED in ious_of and shown in rows:
        # Else a best-of column rewards having several boxes, not refining one
        words = f"The best of steps of {shown} beats the best of T + 1 samples of the base"
        beyond = estimate(ious_of[shown].max(1) - ious_of[SAMPLED].max(1))
        found.append(judged(words, [beyond], above=0))
    return found


# Ways to choose one box ---------------------------------------------------------------------------
def choices(ious, lines, ordered=True):
    """Ways to choose one box of each trajectory: name -> [S], the IoU of the chosen one. The
    paper's Table 1 scores the best of steps, which takes the ground truth to choose; the others are
    open to a user. Boxes without an order have neither first nor last."""
    if ious.shape[1] == 1:
        return {"its only box": ious[:, 0]}
    traced = has_traces(lines)
    steps = [steps_of(line, traced) for line in lines]
    ways = ["medoid"]
    if ordered:
        ways = [way for way in steps[0] if all(way in own for own in steps)]
    chosen = {"best of steps": ious.max(1)}
    for way in ways:
        pairs = zip(ious, (own[way] for own in steps))
        chosen[way] = np.array([0.0 if step is None else own[step] for own, step in pairs])
    return chosen


def steps_of(line, traced):
    """The ways to choose a step of a trajectory without the truth: name -> the step, or None where
    no box is valid. traced: whether its row has traces."""
    boxes = line["boxes"]
    later = range(1, len(boxes))
    valid = [t for t, box in enumerate(boxes) if box]
    ways = {"last step": later[-1], "first step": 0, "last valid": max(valid, default=None)}

    def likeness(t):  # to the other valid boxes; the latest of equals counts
        return sum(iou(boxes[t], boxes[k]) for k in valid), t

    ways["medoid"] = max(valid, key=likeness, default=None)
    ways["agreement"] = later[-1]
    for t in reversed(later):  # the first that agrees counts
        if boxes[t - 1] and boxes[t] and iou(boxes[t - 1], boxes[t]) > AGREEMENT:
            ways["agreement"] = t
    if "confidence" in line:  # of a guarded row nobody knows
        ways["confidence"] = max(valid, key=lambda t: line["confidence"][t], default=None)
    if traced:
        ways["own trace"] = ways["last valid"]
    for t in reversed(later):  # the box before the first trace that keeps it
        before = [k for k in valid if k < t]
        if before and claim_of(trace_of(line["texts"][t])) == KEEP:
            ways["own trace"] = before[-1]
    return ways


# Do the traces tell the truth? --------------------------------------------------------------------
def has_traces(lines):
    """Whether anything is reasoned at a refinement step."""
    return any(trace_of(text) for line in lines for text in line["texts"][1:])


def truth_of_traces(samples, lines, t):
    """What the traces of step t say of the box that was shown there, against where it lies: of all
    boxes, those on a wrong object (IoU 0), right, and in between, how many were shown and the share
    of each claim; with what balanced accuracy a trace says what `geometry_of` says."""
    shown = [last_valid(line["boxes"][:t]) for line in lines]
    there = np.array([box is not None for box in shown])
    ious = np.array([box_iou(box, sample) for box, sample in zip(shown, samples)])
    said = np.array([claim_of(trace_of(line["texts"][t])) or "" for line in lines])
    true = []
    for box, sample in zip(shown, samples):
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        true.append(geometry_of(box, truth) if box else "")
    groups = {
        "wrong object": there & (ious == 0),
        "in between": there & (ious > 0) & (ious < RIGHT),
        "right": there & (ious >= RIGHT),
        "any": there,
    }
    boxes = {}
    for name, group in groups.items():
        shares = {claim: ratio(said == claim, group) for claim in CLAIMS}
        boxes[name] = {"n": int(group.sum()), **shares}
    return {"boxes": boxes, "balanced": balanced_accuracy(said, np.array(true))}


def balanced_accuracy(said, true):
    """An estimate of the mean, over the claims that are ever true, of the share of its samples in
    which it is said. said, true: [S] words."""
    is_true = np.stack([true == claim for claim in CLAIMS], 1)  # [S, claims]
    is_said = is_true & (said == true)[:, None]

    def accuracy(means):
        whole, part = np.split(means, 2, -1)  # [..., claims]
        shares = np.where(whole > 0, part / whole, 0)
        return shares.sum(-1) / (whole > 0).sum(-1)

    return estimate_of(np.hstack([is_true, is_said]), accuracy)
