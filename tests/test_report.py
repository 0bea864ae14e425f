"""The numbers, tables and pictures of an evaluation, and the scores of other systems'
predictions."""

import json
import re

from support.report.overlays import OVERLAYS
from support.report.own_picture import own_sample
from support.report.pictures import LEAD_RULE, charts, filmstrip, lead_picture, write_figures
from support.report.score_predictions import read_predictions
from support.report.statistics import (
    CONTROL,
    GRPO,
    SFT,
    UNTRAINED,
    WITHOUT_SFT,
    ablation,
    adaptive,
    analyse,
    by_change,
    changes,
    choices,
    estimate,
    main_row,
    metrics,
    stop_step,
    strata,
    verdict,
)
from support.report.tables import refining_sentence, report, summary, write_results
from support.running.files import write_jsonl
from tests.small import GOOD, TEXTS, picture

import numpy as np
import pytest
from PIL import Image

RIGHT = [0, 0, 250, 500]  # the truth of GOOD
HALF = [0, 0, 250, 250]
FAR = [600, 600, 900, 900]


def put_together(samples, rows_of, steps, shown, control=None):
    """As an evaluation puts them together."""
    head = {"n": len(samples), "seed": 0, "steps": steps, "model": "m", "ablations": {}}
    head |= {"feedback": "overlay", "guard": "off"}
    head["second_look"] = {}
    return {**head, **analyse(samples, rows_of, steps, shown, control)}


def trajectories(*boxes_of):
    """Rows of a log, one per list of boxes."""
    rows = []
    for boxes in boxes_of:
        read = [100 * (t + 1) for t in range(len(boxes))]
        rows.append({"boxes": boxes, "texts": [TEXTS[0]] * len(boxes), "read": read})
    return rows


# Numbers ------------------------------------------------------------------------------------------
def test_tables_by_hand():
    ious = np.array([[0.4, 0.9, 0.5], [0.7, 0.7, 0.705], [0.9, 0.2, 0.0], [0.0, 0.0, 0.1]])
    a, b = [0, 0, 500, 500], [0, 0, 500, 450]
    boxes = [[FAR, a, b], [a, a, a], [a, b, None], [None, None, None]]
    chosen = {way: values.tolist() for way, values in choices(ious, boxes).items()}
    assert chosen["best of steps"] == [0.9, 0.705, 0.9, 0.1]
    assert chosen["first step"] == [0.4, 0.7, 0.9, 0.0]
    assert chosen["last step"] == [0.5, 0.705, 0.0, 0.1]
    assert chosen["last valid"] == [0.5, 0.705, 0.2, 0.0]
    assert chosen["medoid"] == [0.5, 0.705, 0.2, 0.0]  # a and b agree, the later one counts
    assert metrics(ious[:, 0]).mean(0).tolist() == pytest.approx([0.5, 0.5, 0.25, 0.5])
    row = changes(ious)
    assert row["n"] == 4
    means = {key: row[key][0] for key in row if key != "n"}
    assert means == pytest.approx(
        {
            "first": 0.5,
            "last": 0.32625,
            "delta": -0.17375,
            "improved": 0.5,
            "stagnated": 0.25,
            "degraded": 0.25,
        }
    )


def test_intervals_against_known_answers():
    hits = np.arange(500) < 400
    mean, low, high = estimate(hits)
    half = 1.96 * (0.8 * 0.2 / 500) ** 0.5  # the normal approximation of a share
    assert mean == pytest.approx(0.8)
    assert low == pytest.approx(0.8 - half, abs=0.004)
    assert high == pytest.approx(0.8 + half, abs=0.004)
    rng = np.random.default_rng(1)
    a, shift = rng.random(500), rng.normal(0.03, 0.05, 500)
    _, low, high = estimate((a + shift) - a)  # paired: what both share cancels
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 500**0.5, rel=0.1)
    assert estimate(hits) == estimate(hits.reshape(-1, 1))[0]  # seeded


def test_strata():
    samples = []
    for i in range(6):
        sizes = {"bbox": [0, 0, 2 + i, 4], "width": 20, "height": 10}
        samples.append({**GOOD, **sizes, "source": "ab"[i % 2]})
    parts = strata(samples, np.array([0.2, 0.49, 0.5, 0.74, 0.75, 1.0]))
    assert [mask.sum() for mask in parts["step-0 IoU"].values()] == [2, 2, 2]
    assert [mask.sum() for mask in parts["source"].values()] == [3, 3]
    assert parts["size"]["small third"].tolist() == [True] * 2 + [False] * 4


def test_adaptive_stopping():
    a, near = [0, 0, 100, 100], [0, 0, 100, 90]
    assert stop_step([a, FAR, near, near, near], 0.8, 4) == 3
    assert stop_step([a, near, FAR], 0.8, 2) == 1
    assert stop_step([a, None, a, a], 0.8, 2) == 2
    assert stop_step([a, a, a], 1.0, 2) == 2
    rows = [
        {"boxes": [FAR, a, a], "read": [100, 150, 200]},
        {"boxes": [a, a, FAR], "read": [100, 150, 200]},
    ]
    settings = adaptive(np.array([[0, 0.6, 0.6], [0.8, 0.8, 0]]), rows)
    at = {(row["threshold"], row["T"]): row for row in settings}
    early = at[0.9, 2]
    assert (early["steps"], early["cost"]) == pytest.approx((1.5, 1.75))
    assert early["mean IoU"][0] == pytest.approx(0.7)
    assert early["gain"]["mean IoU"][0] == pytest.approx(0.3)
    assert at[1.0, 2]["steps"] == 2
    assert at[1.0, 2]["mean IoU"][0] == pytest.approx(0.3)
    assert at[0.5, 0]["cost"] == 1 and at[0.5, 0]["gain"]["Acc@0.5"] == [0, 0, 0]


def test_rows_of_an_ablation(tmp_path):
    rows = trajectories([HALF, RIGHT], [RIGHT, RIGHT])
    log = tmp_path / "grpo.jsonl"
    row = ablation([GOOD, GOOD], rows, 1, log)
    assert row["delta"][0] == 0.25 and row["repeats"][0] == 0.5 and row["validation"] == []
    write_jsonl(log, [{"val_iou": [0.5, 0.4]}, {"loss": 1}, {"val_iou": [0.6, 0.7]}])
    assert ablation([GOOD, GOOD], rows, 1, log)["validation"] == [0.5, 0.6]


# Verdicts -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "estimates, side, words",
    [
        ([[0.2, 0.1, 0.3]], {"above": 0}, "holds"),
        ([[0.2, -0.1, 0.3]], {"above": 0}, "NOT SETTLED"),
        ([[-0.1, -0.2, 0.1]], {"above": 0}, "NOT SETTLED"),
        ([[-0.2, -0.3, -0.1]], {"above": 0}, "DOES NOT HOLD"),
        ([[0.2, 0.1, 0.3], [0.1, -0.1, 0.2]], {"above": 0}, "NOT SETTLED"),
        ([[0.2, 0.1, 0.3], [-0.2, -0.3, -0.1]], {"above": 0}, "DOES NOT HOLD"),
        ([[-0.2, -0.3, -0.15]], {"below": -0.1}, "holds"),
        ([[-0.2, -0.3, -0.05]], {"below": -0.1}, "NOT SETTLED"),
        ([[-0.05, -0.09, 0.0]], {"below": -0.1}, "DOES NOT HOLD"),
    ],
)
def test_an_interval_decides(estimates, side, words):
    assert verdict(estimates, **side) == words


def test_findings_of_a_clear_case():
    """Untrained, IVT loses every box; SFT declines; GRPO holds still."""
    samples = [{**GOOD, "id": str(i)} for i in range(20)]
    rows_of = {
        "base": trajectories(*[[HALF]] * 20),
        UNTRAINED: trajectories(*[[HALF, FAR]] * 20),
        SFT: trajectories(*[[RIGHT, HALF]] * 20),
        GRPO: trajectories(*[[RIGHT, RIGHT]] * 20),
    }
    results = put_together(samples, rows_of, 1, GRPO)
    verdicts = {sentence: verdict for sentence, _, verdict in results["findings"]}
    assert list(verdicts.values()) == [
        "DOES NOT HOLD",  # the best of steps is the first one
        "holds",
        "NOT SETTLED",  # equal in Acc@0.5: HALF has an IoU of 0.5
        "NOT SETTLED",
        "holds",
        "holds",
    ]
    for text in (report(results), summary(results)):
        assert all(sentence in text for sentence in verdicts)
        assert "10 points are our threshold" in text
    assert results["table2"][SFT]["cost"] == 2 and "1.000 / 1.000 | 2.00 |" in report(results)


@pytest.mark.parametrize(
    "samples_of, refined, words",
    [
        ([FAR, RIGHT], [HALF, HALF], "+0.500 .* rewards having several boxes, not refining one"),
        ([FAR, HALF], [HALF, RIGHT], "-0.500 .* refining one box gives more than sampling several"),
        ([FAR, RIGHT], [HALF, RIGHT], "+0.000 .* which of the two is better is not settled"),
    ],
)
def test_refining_against_sampling_is_decided_on_the_difference(samples_of, refined, words):
    samples = [{**GOOD, "id": str(i)} for i in range(8)]
    rows_of = {
        "base": trajectories(*[[HALF]] * 8),
        CONTROL: trajectories(*[samples_of] * 8),
        GRPO: trajectories(*[refined] * 8),
    }
    results = put_together(samples, rows_of, 1, GRPO, CONTROL)
    assert re.search(words.replace("+", "[+]"), report(results))
    assert list(results["table1"][CONTROL]) == ["best of steps", "medoid"]  # it has no order
    assert CONTROL not in results["table2"]
    assert "sampling" not in put_together(samples, rows_of, 1, GRPO)


def test_whether_any_setting_beats_not_refining():
    """Every kind of trajectory, whatever the boxes after step 0 are worth."""
    ious = np.tile([0.6, 0.6, 0.4], (30, 1))
    ious[0, 1] = 0.9  # by one sample of 30: not settled
    rows = trajectories(*[[RIGHT, HALF, FAR]] * 30)
    sentence = refining_sentence(adaptive(ious, rows))
    assert sentence.startswith("Nothing here beats not refining (T = 0)")
    assert "+0.000 [+0.000, +0.000] in Acc@0.5" in sentence
    assert "+0.010 [+0.000, +0.030] in mean IoU (stop above 0.5, T = 1)" in sentence
    ious[:, 1] = 0.9
    sentence = refining_sentence(adaptive(ious, rows))
    assert re.match(r"\d+ of 12 settings with T >= 1 beat not refining", sentence)


# Predictions of other systems ---------------------------------------------------------------------
SAMPLES = [{**GOOD, "id": str(i)} for i in range(2)]
PREDICTIONS = [
    {"method": "one", "id": "1", "boxes": [RIGHT]},
    {"method": "one", "id": "0", "boxes": [HALF]},
    {"method": "two", "id": "0", "boxes": [HALF, RIGHT]},
    {"method": "two", "id": "1", "boxes": [None, RIGHT]},
]


def test_a_file_of_predictions_is_scored(tmp_path):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, PREDICTIONS)
    rows_of = read_predictions(path, SAMPLES)
    assert main_row(rows_of) == "two" and main_row([GRPO, SFT, "two"]) == GRPO
    assert main_row(["Base + IVT (no training)", WITHOUT_SFT]) == WITHOUT_SFT
    results = analyse(SAMPLES, rows_of, 1, "two")
    assert results["table1"]["one"]["its only box"]["mean IoU"][0] == 0.75
    assert [value[0] for value in results["table2"]["two"]["iou"]] == [0.25, 1]
    assert results["differences"]["two"]["last step"]["mean IoU"][0] == 0.25
    assert results["adaptive"] == {}  # nobody says how many tokens it took
    longer = put_together(SAMPLES, rows_of, 2, "two")  # fewer boxes than T + 1
    assert "| two | 0.250 [0.000, 0.500] | 1.000 [1.000, 1.000] |  | +0.750" in report(longer)


@pytest.mark.parametrize(
    "line, words",
    [
        ({**PREDICTIONS[0], "id": "7"}, "line 5: id '7'"),
        ({**PREDICTIONS[0], "id": 1}, "line 5: id 1 is not in"),
        (PREDICTIONS[0], "second line for 'one'"),
        ({**PREDICTIONS[0], "method": "x"}, "1 of the 2"),
        ({**PREDICTIONS[0], "boxes": [[5, 0, 0, 5]]}, "line 5: box"),
        ({**PREDICTIONS[0], "boxes": ["abcd"]}, "line 5: box"),
        ({**PREDICTIONS[0], "boxes": [[0, 0, float("nan"), 5]]}, "line 5: box"),
        ({"id": "1"}, "line 5: expected"),
        ({**PREDICTIONS[0], "boxes": []}, "expected"),
        ({**PREDICTIONS[0], "boxes": "abcd"}, "expected"),
        ({**PREDICTIONS[0], "texts": None}, "expected"),
        ({**PREDICTIONS[0], "texts": ["a", "b"]}, "expected"),
        ({**PREDICTIONS[0], "method": 3}, "expected"),
        (3, "expected"),
    ],
)
def test_a_file_of_predictions_is_refused(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [*PREDICTIONS, line])
    with pytest.raises(ValueError, match=words):
        read_predictions(path, SAMPLES)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"id": 1'])
def test_what_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 1: expected"):
        read_predictions(path, SAMPLES)


# Files and pictures -------------------------------------------------------------------------------
def test_results_and_figures_are_written(tmp_path, capsys):
    """Of trajectories longer than the T of the tables, without a valid box, of 4 samples for 6
    rows."""
    samples = []
    for i, size in enumerate(((20, 10), (400, 200), (90, 200), (700, 700))):
        picture(*size, seed=i).save(tmp_path / f"{i}.png")
        width, height = size
        bbox = [0, 0, width / 4, height / 2]
        own = {"id": str(i), "image": f"{i}.png", "width": width, "height": height, "bbox": bbox}
        samples.append({**GOOD, **own, "expression": "a word " * (1 + 20 * i)})
    boxes = [[HALF, RIGHT, FAR], [RIGHT, None, HALF], [HALF, HALF, HALF], [None, None, None]]
    rows_of = {"base": trajectories(*[[RIGHT]] * 4), SFT: trajectories(*boxes)}
    results = put_together(samples, rows_of, 1, SFT)
    write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "Table 2" in (tmp_path / "results.md").read_text()
    assert summary(results) in capsys.readouterr().out
    drawn = write_figures(results, samples, rows_of[SFT], tmp_path, tmp_path, 6)
    assert drawn == bool(charts(results))
    for name in ("corrections", "failures", "first", "lead"):
        with Image.open(tmp_path / f"figures/{name}.png") as file:
            assert file.width >= 2 * 320 or name == "lead"
    cut = [{**row, "boxes": row["boxes"][:2]} for row in rows_of[SFT]]
    assert by_change(samples, cut) == [0, 2, 3, 1]


@pytest.mark.parametrize("size", [(80, 80), (640, 480), (480, 640), (2000, 300), (8, 900)])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_lead_picture_fits_the_page(size, count):
    sample = {**GOOD, "width": size[0], "height": size[1], "bbox": [0, 0, size[0] / 4, size[1] / 2]}
    texts = ["<think>" + "many words of a trace " * 20 + "</think>[0, 0, 250, 500]"] * count
    item = ({**sample, "expression": "a word " * 30}, picture(*size), {"boxes": [RIGHT] * count})
    item[2]["texts"] = texts
    lead = lead_picture(item, item)
    assert lead.width <= 1000 and lead.height <= 560
    assert "largest gain and largest loss" in LEAD_RULE.lower()


def test_truth_and_prediction_are_drawn_where_they_are():
    image = Image.new("RGB", (320, 160), "white")
    sample = {**GOOD, "width": 320, "height": 160, "bbox": [0, 0, 160, 160]}
    row = {"boxes": [[500, 0, 1000, 1000], None], "texts": TEXTS}
    for truth, corner in ((sample, (0, 170, 0)), ({"expression": "x"}, (255, 255, 255))):
        strip = filmstrip([(truth, image, row)], "title")
        left, top = 14, 34 + 36  # below the title and one line of words
        assert strip.getpixel((left, top)) == corner
        assert strip.getpixel((left + 200, top)) == (255, 0, 0)
        assert strip.getpixel((left + 334 + 200, top)) == (255, 255, 255)  # no valid box


def test_what_is_shown_instead_of_the_box():
    image = picture(90, 70)
    before = image.tobytes()
    for name, overlay in OVERLAYS.items():
        shown = overlay(image, RIGHT)
        assert shown.size == image.size and image.tobytes() == before
        assert shown.tobytes() == overlay(image, RIGHT).tobytes()
        assert overlay(image, None).size == image.size
        assert (shown.tobytes() == before) == (name == "no overlay")


def test_a_picture_of_your_own_is_turned_upright(tmp_path):
    file = tmp_path / "photo.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(90, 70).save(file, exif=turned)
    sample, image = own_sample(str(file), "x")
    assert (sample["width"], sample["height"]) == image.size == (70, 90)
    file.write_bytes(file.read_bytes()[:500])
    for path in (file, tmp_path / "none.png"):
        with pytest.raises(SystemExit, match=f"error: --image {path}: "):
            own_sample(str(path), "x")
