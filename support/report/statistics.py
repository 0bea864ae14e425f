"""Estimates with their uncertainty, what is estimated of a row's boxes, and verdicts on claims.

S samples; `ious` is [S, T + 1], the IoU of every box of a trajectory with the truth, 0 where a
box is not valid. An estimate is [mean, low, high], a mean over samples with its 95 percent
bootstrap interval; differences are paired.
"""

import functools

from common import box_iou

import numpy as np

METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mean IoU")
RIGHT = 0.5  # a box with this IoU or more
SAME = 0.01  # a smaller change of the IoU is none

# Rows of Table 1 that the paper has findings about, and controls that it lacks
BASE = "Base (single-shot)"
SAMPLED = "Base (single-shot), T + 1 samples"
GUARDED = "Base, asked again, zoomed and guarded"
UNTRAINED = "Base + IVT (no training)"
SFT = "SFT + IVT"
SINGLE = "SFT + GRPO (single-step)"
GRPO = "SFT + GRPO + IVT"
WITHOUT_SFT = "GRPO without SFT + IVT"


def main_row(rows, wanted=(GRPO, SFT, WITHOUT_SFT, UNTRAINED)):
    """The row that strata and pictures are of: the paper's last that is there, else the last."""
    named = {row.name: row for row in rows}
    return next(named[name] for name in (*wanted, *reversed(named)) if name in named)


# Estimates ----------------------------------------------------------------------------------------
AT_ONCE = 2 * 10**7  # weights that are held in memory, of 2,000 samples


def resampled(values):
    """values [S] or [S, K] -> their means over each resample, [10000] or [10000, K]."""
    n, count = len(values), 10_000
    if n * count <= AT_ONCE:
        return resamples(n, count) @ values
    rng = np.random.default_rng(0)  # as for `resamples`: paired over the rows
    return np.stack([values[rng.integers(n, size=n)].mean(0) for _ in range(count)])


@functools.lru_cache(maxsize=32)  # the whole test set, its strata and sources
def resamples(n, count):
    """The bootstrap (Efron, 1979): `count` draws of n samples with replacement, as weights [count,
    n] that sum to 1. Seeded, so that what is computed with them on two rows is paired."""
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), count).astype(np.float32)
    return draws / n


def estimate(values):
    """values [S] or [S, K] -> [3] or [K, 3]: the mean over the samples, and the 2.5th and 97.5th
    percentile of the resampled means."""
    values = np.asarray(values, np.float32)
    means = resampled(values)  # [count] or [count, K]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return np.stack([values.mean(0), low, high], -1).astype(float).round(6).tolist()


def estimate_of(columns, formula):
    """As `estimate`, of a number that is no mean: columns [S, K]; formula: the K means over the
    samples, [..., K] -> [...]. None where it cannot be computed; such resamples are left out."""
    columns = np.asarray(columns, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = formula(columns.mean(0, dtype=np.float64))
        values = formula(resampled(columns).astype(np.float64))
    if not np.isfinite(value):
        return None
    low, high = np.percentile(values[np.isfinite(values)], (2.5, 97.5))
    return np.array([value, low, high]).round(6).tolist()


def ratio(part, whole):
    """An estimate of how often `part` is so among the samples where `whole` is, both [S] bool."""
    return estimate_of(np.stack([part & whole, whole], 1), lambda m: m[..., 0] / m[..., 1])


# What is estimated --------------------------------------------------------------------------------
def all_ious(samples, lines):
    """[S, T + 1]: the IoU of every box of every line with the truth."""
    pairs = zip(samples, lines)
    return np.array([[box_iou(box, sample) for box in line["boxes"]] for sample, line in pairs])


def by_change(samples, lines):
    """The numbers of the samples, by the IoU's change over the steps, the largest gain first."""
    ious = all_ious(samples, lines)
    return np.argsort(ious[:, 0] - ious[:, -1], kind="stable").tolist()


def metrics(ious):
    """[S] IoU of one box per sample -> [S, 4], whose means are METRICS."""
    return np.stack([ious >= 0.5, ious >= 0.7, ious >= 0.9, ious], 1)


def metric_estimates(ious, compared=0):
    """[S] as of `metrics` -> {metric: estimate}. compared: other boxes' `metrics`, taken away."""
    return dict(zip(METRICS, estimate(metrics(ious) - compared)))


def changes(ious):
    """From the first to the last step: n, and estimates of both IoUs, their difference, and the
    shares of samples that improve, stagnate and degrade (by more than SAME)."""
    first = ious[:, 0]
    last = ious[:, -1]
    change = last - first
    columns = {
        "first": first,
        "last": last,
        "delta": change,
        "improved": change > SAME,
        "stagnated": abs(change) <= SAME,
        "degraded": change < -SAME,
    }
    estimates = estimate(np.stack(list(columns.values()), 1))
    return {"n": len(ious), **dict(zip(columns, estimates))}


def strata(samples, ious):
    """`changes` of groups of the samples, by IoU at step 0 (Section 4.3) and by source."""
    first = ious[:, 0]
    groups = {
        "step-0 IoU: hard, below 0.5": first < 0.5,
        "step-0 IoU: medium": (first >= 0.5) & (first < 0.75),
        "step-0 IoU: easy, from 0.75": first >= 0.75,
    }
    sources = np.array([sample["source"] for sample in samples])
    for source in sorted(set(sources.tolist())):
        groups[f"source: {source}"] = sources == source
    return {name: changes(ious[mask]) for name, mask in groups.items() if mask.any()}


def turns(ious):
    """What the steps correct and spoil: how many are wrong and right at first; the error-correction
    rate ECR = P(last right | first wrong) and the error-introduction rate EIR = P(last wrong |
    first right); the change of Acc@0.5, which is (1 - Acc) ECR - Acc EIR."""
    first = ious[:, 0] >= RIGHT
    last = ious[:, -1] >= RIGHT
    return {
        "wrong": int((~first).sum()),
        "ECR": ratio(last, ~first),
        "right": int(first.sum()),
        "EIR": ratio(~last, first),
        "change": estimate(last.astype(float) - first),
    }


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


def judged(sentence, estimates, names=("",), **side):
    """A finding: (sentence, numbers, verdict). names: of the estimates, where there are several;
    side: above or below, as of `verdict`."""
    words = [f"{name} {signed(value)}".strip() for name, value in zip(names, estimates)]
    return sentence, ", ".join(words), verdict(estimates, **side)
