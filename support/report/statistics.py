"""The numbers of the tables, each with its uncertainty, and what they say about the paper's
findings.

S samples; `ious` is [S, T + 1], the IoU of every box of a trajectory with the truth, 0 where a
box is not valid. A line is one of a log: a dict with boxes, texts and read, a value per step each.
An estimate is [mean, low, high], a mean over samples with its 95 percent bootstrap interval;
differences are paired.
"""

import functools

from common import box_iou, iou

import numpy as np

METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mean IoU")

# Rows of Table 1 that the paper has findings about
GUARDED = "Base, asked again, zoomed and guarded"
UNTRAINED = "Base + IVT (no training)"
SFT = "SFT + IVT"
SINGLE = "SFT + GRPO (single-step)"
GRPO = "SFT + GRPO + IVT"
WITHOUT_SFT = "GRPO without SFT + IVT"

# How far untrained IVT has to fall in Acc@0.5 to count as the paper's finding, in which it falls by
# 0.31. The paper names no threshold; this one is ours.
FALL = 0.1


# Estimates ----------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=8)  # the whole test set and its strata
def resamples(n, count=10_000):
    """The bootstrap (Efron, 1979): `count` draws of n samples with replacement, as weights
    [count, n] that sum to 1.

    They are seeded, so all rows get the same draws, and what is computed with them on two rows is
    paired.
    """
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), count).astype(np.float32)
    draws /= n  # in place: with a large test set this is gigabytes
    return draws


def estimate(values):
    """values [S] or [S, K] -> [3] or [K, 3]: the mean over the samples, and the 2.5th and 97.5th
    percentile of the resampled means."""
    values = np.asarray(values, np.float32)
    means = resamples(len(values)) @ values  # [count] or [count, K]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return np.stack([values.mean(0), low, high], -1).astype(float).round(6).tolist()


def estimate_of(columns, formula):
    """As `estimate`, of a number that is no mean: columns [S, K]; formula: the K means over the
    samples, [..., K] -> [...].

    None where it cannot be computed. Resamples in which it cannot be are left out.
    """
    columns = np.asarray(columns, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = formula(columns.mean(0, dtype=np.float64))
        resampled = formula((resamples(len(columns)) @ columns).astype(np.float64))
    if not np.isfinite(value):
        return None
    low, high = np.percentile(resampled[np.isfinite(resampled)], (2.5, 97.5))
    return np.array([value, low, high]).round(6).tolist()


def ratio(part, whole):
    """An estimate of how often `part` is so among the samples where `whole` is, both [S] bool;
    None where it never is."""
    return estimate_of(np.stack([part & whole, whole], 1), lambda m: m[..., 0] / m[..., 1])


def metrics(ious):
    """[S] IoU of one box per sample -> [S, 4], whose means are Acc@0.5, Acc@0.7, Acc@0.9 (the share
    with at least this IoU) and the mean IoU."""
    return np.stack([ious >= 0.5, ious >= 0.7, ious >= 0.9, ious], 1)


def metric_estimates(values):
    """[S, 4] of `metrics`, or the difference of two -> {metric: estimate}."""
    return dict(zip(METRICS, estimate(values)))


def all_ious(samples, lines):
    """[S, T + 1]: the IoU of every box of every line with the truth."""
    pairs = zip(samples, lines)
    return np.array([[box_iou(box, sample) for box in line["boxes"]] for sample, line in pairs])


# What is estimated --------------------------------------------------------------------------------
def changes(ious, threshold=0.01):
    """From the first to the last step: n, and estimates of both IoUs, their difference, and the
    shares of samples that improve, stagnate and degrade (by more than the threshold)."""
    first = ious[:, 0]
    last = ious[:, -1]
    change = last - first
    columns = {
        "first": first,
        "last": last,
        "delta": change,
        "improved": change > threshold,
        "stagnated": abs(change) <= threshold,
        "degraded": change < -threshold,
    }
    estimates = estimate(np.stack(list(columns.values()), 1))
    return {"n": len(ious), **dict(zip(columns, estimates))}


def choices(ious, boxes, ordered=True):
    """Ways to choose one box of each trajectory: name -> [S], the IoU of the chosen one.

    The paper's Table 1 scores the best of steps, which takes the ground truth to choose. The other
    ways are open to a user: first step, last step, last valid box, and the medoid, the valid box
    whose mean IoU to the other valid ones is highest (the latest of equals). Boxes without an order
    have neither first nor last.
    """
    if ious.shape[1] == 1:
        return {"its only box": ious[:, 0]}
    medoid = at_steps(ious, map(medoid_step, boxes))
    if not ordered:
        return {"best of steps": ious.max(1), "medoid": medoid}
    return {
        "best of steps": ious.max(1),
        "last step": ious[:, -1],
        "first step": ious[:, 0],
        "last valid": at_steps(ious, map(last_valid_step, boxes)),
        "medoid": medoid,
    }


def at_steps(ious, steps):
    """[S]: the IoU of a step of each trajectory, 0 where it is None."""
    return np.array([0.0 if step is None else row[step] for row, step in zip(ious, steps)])


def valid_steps(boxes):
    """The steps of a trajectory that have a valid box."""
    return [t for t, box in enumerate(boxes) if box]


def last_valid_step(boxes):
    """The last step with a valid box, or None."""
    return max(valid_steps(boxes), default=None)


def medoid_step(boxes):
    """The step whose box agrees best with the others, or None without a valid box."""
    valid = valid_steps(boxes)

    def agreement(t):
        return sum(iou(boxes[t], boxes[k]) for k in valid), t

    return max(valid, key=agreement, default=None)


def strata(samples, ious):
    """`changes` of groups of the samples: group -> {stratum: dict}, of strata that have any. By IoU
    at step 0 (Section 4.3), and by source."""
    first = ious[:, 0]
    sources = np.array([sample["source"] for sample in samples])
    groups = {
        "step-0 IoU": {
            "hard, below 0.5": first < 0.5,
            "medium": (first >= 0.5) & (first < 0.75),
            "easy, from 0.75": first >= 0.75,
        },
        "source": {source: sources == source for source in sorted(set(sources.tolist()))},
    }
    table = {}
    for group, parts in groups.items():
        table[group] = {name: changes(ious[mask]) for name, mask in parts.items() if mask.any()}
    return table


def repeats(boxes):
    """An estimate of the share of trajectories whose boxes are all that of step 0 (the stagnation
    of Section 4.2)."""
    return estimate([all(box == row[0] for box in row) for row in boxes])


def stop_step(boxes, threshold, longest):
    """The first step t >= 1 whose box agrees with that of step t - 1 (IoU above the threshold),
    else `longest`."""
    for t in range(1, longest + 1):
        if boxes[t] and boxes[t - 1] and iou(boxes[t], boxes[t - 1]) > threshold:
            return t
    return longest


# All tables ---------------------------------------------------------------------------------------
def analyse(samples, lines_of, steps):
    """All tables: the lines of each row (rows.Row) become estimates, as results.json holds them.

    The first row is what the others are compared against. steps: T of the tables; what lies beyond
    it in a line is left out.
    """
    shown = main_row(lines_of).name
    ious_of = {}  # a name -> the IoUs of the first T + 1 steps
    control = None
    results = {"shown": shown, "table1": {}, "differences": {}}
    results |= {"table2": {}, "strata": {}}
    for row, lines in lines_of.items():
        name = row.name
        ious = ious_of[name] = all_ious(samples, lines)[:, : steps + 1]
        boxes = [line["boxes"][: steps + 1] for line in lines]
        scores = {way: metrics(chosen) for way, chosen in choices(ious, boxes, row.ordered).items()}
        first = metrics(next(iter(ious_of.values()))[:, 0])
        results["table1"][name] = {way: metric_estimates(v) for way, v in scores.items()}
        results["differences"][name] = {
            way: metric_estimates(v - first) for way, v in scores.items()
        }
        if ious.shape[1] == 1:
            continue  # there is no refinement to look at
        if not row.ordered:
            control = row
            continue
        results["table2"][name] = {
            "iou": estimate(ious),
            **changes(ious),
            "repeats": repeats(boxes),
            "valid": estimate([[box is not None for box in own] for own in boxes]),
        }
        results["strata"][name] = strata(samples, ious)
        if all("read" in line for line in lines):  # other systems do not say
            read = np.array([line["read"][: steps + 1] for line in lines], float)  # tokens
            results["table2"][name]["cost"] = (read[:, -1].sum() / read[:, 0].sum()).item()
    if control and shown in results["table2"]:
        # The best of T + 1 samples against the best of T + 1 steps
        difference = estimate(ious_of[control.name].max(1) - ious_of[shown].max(1))
        results["sampling"] = {"row": shown, "control": control.name, "difference": difference}
    results["findings"] = findings(results, ious_of)
    return results


def main_row(rows):
    """The row that strata and pictures are of: the paper's last that is there,
    or, of other systems, the last."""
    named = {row.name: row for row in rows}
    for name in (GRPO, SFT, WITHOUT_SFT, UNTRAINED):
        if name in named:
            return named[name]
    return list(rows)[-1]


def by_change(samples, lines):
    """The numbers of the samples, ordered by IoU at the last step minus IoU at the first: the
    largest gain first, the largest loss last."""
    ious = all_ious(samples, lines)
    return np.argsort(ious[:, 0] - ious[:, -1], kind="stable").tolist()


# Verdicts -----------------------------------------------------------------------------------------
# They are of intervals: a mean alone decides nothing.
def verdict(estimates, *, above=None, below=None):
    """Whether all values lie above (or below) a limit: "holds" when every interval does,
    "DOES NOT HOLD" when one lies wholly on the other side, else "NOT SETTLED"."""
    if below is not None:  # mirrored
        estimates = [(-mean, -high, -low) for mean, low, high in estimates]
        above = -below
    if all(low > above for _, low, _ in estimates):
        return "holds"
    if any(high < above for _, _, high in estimates):
        return "DOES NOT HOLD"
    return "NOT SETTLED"


def signed(value):
    """An estimate of a difference as text: +0.012 [-0.003, +0.027]."""
    mean, low, high = value
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def judged(sentence, estimates, **side):
    """A finding: (sentence, numbers, verdict). side: above or below, as of `verdict`."""
    return sentence, ", ".join(map(signed, estimates)), verdict(estimates, **side)


def findings(results, ious_of):
    """The paper's findings as hypotheses on these rows: a list of `judged`."""
    differences = results["differences"]
    rows = results["table2"]  # of other systems, a row may have one box only
    found = []
    ways = ("best of steps", "last step")
    if UNTRAINED in rows:
        for way in ways:
            fall = [differences[UNTRAINED][way]["Acc@0.5"]]
            words = "Untrained, IVT falls 10 points or more below single-shot in Acc@0.5"
            found.append(judged(f"{words} ({way})", fall, below=-FALL))
    if SFT in rows:
        for way in ways:
            gains = list(differences[SFT][way].values())
            words = f"SFT + IVT passes single-shot on every metric ({way})"
            found.append(judged(words, gains, above=0))
        found.append(judged("SFT declines from step 0 to step T", [rows[SFT]["delta"]], below=0))
    if SFT in rows and GRPO in rows:
        sft, grpo = (ious_of[name][:, -1] - ious_of[name][:, 0] for name in (SFT, GRPO))
        words = "GRPO's change from step 0 to step T is better than SFT's"
        found.append(judged(words, [estimate(grpo - sft)], above=0))
    return found


# The table of ablations ---------------------------------------------------------------------------
def ablations(samples, steps, lines_of, others):
    """What a row does when it is shown other pictures than its own: name -> estimates.

    others: (row, what is shown) -> lines. "against": the last step's IoU minus that of the row
    itself, paired.
    """
    table = {}
    for (row, word), lines in others.items():
        ious, own = (all_ious(samples, of)[:, : steps + 1] for of in (lines, lines_of[row]))
        table[f"{row.name}, {word}"] = {
            **changes(ious),
            "Acc@0.5": estimate(ious[:, -1] >= 0.5),
            "against": estimate(ious[:, -1] - own[:, -1]),
        }
    return table
