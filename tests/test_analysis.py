"""What is corrected and spoilt, ways to choose a step, what traces know: on trajectories made by
hand."""

import random

from common import Trajectory, step_text
from support.data.teacher import template_trace
from support.report import statistics
from support.report.analysis import AGREEMENT, results_of, steps_of
from support.report.claims import CLAIMS, KEEP, SHIFT, WRONG, claim_of, geometry_of
from support.report.rows import Row, log_line
from support.report.statistics import estimate_of, ratio, turns
from support.report.tables import markdown, report
from tests.small import GOOD, vlm
from tests.test_report import FAR, HALF, RIGHT, as_rows

import numpy as np
import pytest

TALL = [0, 0, 250, 400]  # IoU 0.8 with RIGHT, the truth of GOOD
TOLD = {  # what a trace says of the box before it
    WRONG: "The red box is on the wrong object. I see the target at the upper left.",
    SHIFT: "The red box is too short. I make it taller.",
    KEEP: "The red box fits well. I keep it.",
}


def test_many_samples_are_resampled_without_all_weights_at_once(monkeypatch):
    values = np.arange(400) % 4 == 0
    at_once = statistics.estimate(values)
    monkeypatch.setattr(statistics, "resamples", None)
    monkeypatch.setattr(statistics, "AT_ONCE", 0)
    assert statistics.estimate(values) == pytest.approx(at_once, abs=0.004)


def row_of(boxes, told=(), confidence=None):
    """A row of a log: boxes, what the traces from step 1 on claim (none: there are no traces), and
    the confidence of each step, if it is given."""
    traces = ["I look for the object.", *(TOLD[claim] for claim in told)]
    texts = [step_text(trace, box or FAR) for trace, box in zip(traces, boxes)]
    if not told:
        texts = [""] * len(boxes)
    return {"boxes": boxes, "texts": texts, **({"confidence": confidence} if confidence else {})}


def look_at(rows, steps=2):
    """-> the ways to choose a box of Table 1, and the record of Table 2."""
    samples = [{**GOOD, "source": "x"}] * len(rows)
    results = results_of(samples, {Row("x"): rows}, steps)
    return results["table1"]["x"], results["table2"]["x"]


# Estimates ----------------------------------------------------------------------------------------
def test_a_ratio_has_the_interval_of_a_share():
    whole = np.arange(600) < 400
    part = np.arange(600) % 4 == 0
    mean, low, high = ratio(part, whole)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert mean == pytest.approx(0.25, abs=1e-5)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert ratio(part, whole & False) is None
    # One sample of the kind: resamples without it do not count
    assert ratio(part, np.arange(600) == 0) == [1, 1, 1]
    assert estimate_of(np.ones((3, 1)), lambda m: m[..., 0] / 0) is None


# First and last step ------------------------------------------------------------------------------
def test_what_is_corrected_and_what_is_spoilt():
    """76 wrong, of which 10 end right; 429 right, of which 13 end wrong."""
    pairs = [(0.4, 0.5)] * 10 + [(0.0, 0.49)] * 66 + [(0.5, 0.1)] * 13 + [(0.9, 0.6)] * 416
    row = turns(np.array(pairs))
    assert row["wrong"] == 76 and row["right"] == 429
    assert row["ECR"][0] == pytest.approx(10 / 76, abs=1e-4)
    assert row["EIR"][0] == pytest.approx(13 / 429, abs=1e-4)
    assert row["EIR"][1] < 13 / 429 < row["EIR"][2]
    assert row["change"][0] == pytest.approx(-3 / 505, abs=1e-4)


# Rules --------------------------------------------------------------------------------------------
def test_each_rule_chooses_its_step():
    """IoUs of the boxes: FAR 0, HALF 0.5, TALL 0.8, RIGHT 1."""
    rows = [
        row_of([HALF, RIGHT, FAR], (SHIFT, KEEP), [-0.5, -0.9, -0.1]),
        row_of([TALL, None, HALF], (KEEP, KEEP), [-0.1, None, -0.3]),
    ]
    ways, row = look_at(rows)
    found = {way: values["mean IoU"][0] for way, values in ways.items()}
    assert found == pytest.approx(
        {
            "first step": (0.5 + 0.8) / 2,
            "last step": (0 + 0.5) / 2,
            "last valid": (0 + 0.5) / 2,
            "medoid": (1 + 0.5) / 2,  # of the second the two boxes agree alike, the later counts
            "agreement": (0 + 0.5) / 2,  # no two boxes do
            "confidence": (0 + 0.8) / 2,
            "own trace": (1 + 0.8) / 2,
            "best of steps": (1 + 0.8) / 2,
        }
    )
    assert row["gains"]["own trace"][0] == pytest.approx(0.25)
    assert row["gains"]["first step"] == [0, 0, 0]
    found = steps_of(row_of([TALL, RIGHT, None]), traced=False)
    assert found["last step"] == 2 and found["last valid"] == found["medoid"] == 1


def test_agreement_stops_at_the_second_of_two_like_boxes():
    a, near = [0, 0, 100, 100], [0, 0, 100, 98]
    assert AGREEMENT < 0.98
    for step, boxes in ((3, [a, FAR, near, near, near]), (1, [a, near, FAR]), (2, [a, None, a])):
        assert steps_of(row_of(boxes), traced=False)["agreement"] == step
    ways, _ = look_at([row_of([a, near, FAR])])
    assert "own trace" not in ways and "confidence" not in ways  # neither is there


def test_the_box_that_a_trace_keeps():
    for step, boxes, told in (
        (2, [HALF, RIGHT, FAR], (SHIFT, SHIFT)),
        (1, [HALF, RIGHT, None], (SHIFT, WRONG)),
        (2, [None, RIGHT, FAR], (KEEP, SHIFT)),  # nothing to keep at step 1
        (None, [None, None], (KEEP,)),
    ):
        assert steps_of(row_of(boxes, told), traced=True)["own trace"] == step


def test_the_confidence_of_a_box_is_the_mean_over_its_tokens(vlm):
    """After the reasoning, if there is any; the token that ends the turn counts too."""
    trace = "<think>I look [1, 2].</think>"
    answer = "\n[0, 0, 250, 500]"
    cut = len(vlm.encode(trace))
    for text, box in ((trace + answer, RIGHT), (answer, RIGHT), ("<think>I look", None)):
        tokens = vlm.encode(text) + [vlm.token("<|im_end|>")]
        trajectory = Trajectory(target=tokens, texts=[text], boxes=[box], step=[0] * len(tokens))
        trajectory.predictor = list(range(len(tokens)))
        trajectory.logprob = [-float(m) for m in range(len(tokens))]
        counted = trajectory.logprob[cut if text.startswith(trace) else 0 :]
        [found] = log_line(GOOD, [trajectory], vlm.tokenizer)["confidence"]
        assert found == (pytest.approx(sum(counted) / len(counted)) if box else None)
    assert "confidence" not in log_line(GOOD, [trajectory], vlm.tokenizer, guarded=True)


# Traces -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "trace, claim",
    [
        ("The box surrounds a different person than the one described.", WRONG),
        ("It misses the described object entirely, so I move it right.", WRONG),
        ("The box is accurate and covers the whole dog.", KEEP),
        ("The red box is not on the wrong object and not too large, so I keep it.", KEEP),
        ("No correction is needed.", KEEP),
        ("The box covers the dog correctly, but cuts off its tail; it should be extended.", SHIFT),
        ("It is not on the wrong object, but shifted to the left.", SHIFT),
        ("The box should be slightly wider.", SHIFT),
        ("I look for the object. I see it at the lower left, the larger one.", None),
    ],
)
def test_what_a_trace_claims(trace, claim):
    assert claim_of(trace) == claim


def test_a_true_template_trace_claims_what_the_geometry_is():
    """For any box: so the balanced accuracy of a perfect writer is 1."""
    rng = random.Random(0)
    truth = [300, 300, 400, 420]
    claims = set()
    for _ in range(500):
        spread = rng.choice((5, 40, 200))
        box = [min(1000, max(0, v + rng.randint(-spread, spread))) for v in truth]
        if box[0] < box[2] and box[1] < box[3]:
            after = rng.choice((box, truth))
            claim = claim_of(template_trace([box, after], truth, 1))
            assert claim == geometry_of(box, truth), (box, after)
            claims.add(claim)
    assert claims == set(CLAIMS)


def test_traces_that_tell_the_truth_and_traces_that_do_not():
    """Boxes that step 1 is shown: FAR, LEFT (IoU 0.2), HALF, RIGHT."""
    left = [0, 0, 50, 500]
    shown = [FAR, left, HALF, RIGHT]
    honest = [row_of([box, RIGHT], (c,)) for box, c in zip(shown, (WRONG, SHIFT, SHIFT, KEEP))]
    [truth] = look_at(honest, steps=1)[1]["traces"]
    assert truth["balanced"] == [1, 1, 1]
    assert [row["n"] for row in truth["boxes"].values()] == [1, 1, 2, 4]
    assert truth["boxes"]["right"][KEEP][0] == 0.5
    blind = [row_of([box, RIGHT], (KEEP,)) for box in shown]
    [truth] = look_at(blind, steps=1)[1]["traces"]
    assert truth["balanced"][0] == pytest.approx(1 / 3, abs=1e-5)
    assert truth["boxes"]["wrong object"][KEEP][0] == 1
    assert truth["boxes"]["wrong object"][WRONG][0] == 0


def test_a_trace_is_of_the_last_valid_box():
    rows = [row_of([RIGHT, None, RIGHT], (KEEP, KEEP)), row_of([None, None, RIGHT], (KEEP, KEEP))]
    first, second = look_at(rows)[1]["traces"]
    for truth in (first, second):
        assert [row["n"] for row in truth["boxes"].values()] == [0, 0, 1, 1]
        assert truth["boxes"]["wrong object"][KEEP] is None
    rows = [row_of([None, None], (KEEP,))]
    [truth] = look_at(rows, steps=1)[1]["traces"]
    assert truth["balanced"] is None


# The report ---------------------------------------------------------------------------------------
def test_the_report_has_it_all():
    confidence = [-0.5, -0.9]
    rows = [row_of([box, RIGHT], (SHIFT,), confidence) for box in (FAR, HALF, RIGHT)]
    old = [row_of([box, HALF]) for box in (FAR, HALF, RIGHT)]
    rows_of = {"base": [row_of([RIGHT])] * 3, "old": old, "new": rows}
    samples = [{**GOOD, "id": str(i)} for i in range(3)]
    results = results_of(samples, as_rows(rows_of), 1)
    assert list(results["table2"]) == ["old", "new"]
    text = markdown(report(results))
    assert "| new | 1 | 1.000 [1.000, 1.000] | 2 | 0.000 [0.000, 0.000] |" in text  # corrected: 1
    assert "| new | 1 | right | 2 |" in text and "| old | 1 | right |" not in text
    assert "| new | confidence |" in text and "| old | confidence |" not in text
    assert "| new | 1 | any | 3 |" in text
