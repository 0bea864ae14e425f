"""The numbers, tables and pictures of an evaluation, and the scores of other systems'
predictions."""

import json
from types import SimpleNamespace

from common import IVT, Trajectory
from support.model.views import asked_again, zoom
from support.report import health, pictures, statistics
from support.report.analysis import ablations_of, results_of
from support.report.overlays import ablation_rows
from support.report.own_picture import own_samples
from support.report.pictures import BOLD, drawing, font_for, write_strip
from support.report.rows import Row
from support.report.score_predictions import read_predictions
from support.report.statistics import GRPO, SAMPLED, SFT, UNTRAINED, WITHOUT_SFT, main_row
from support.report.tables import markdown, report, summary, write_results
from support.running.files import write_jsonl
from tests.small import GOOD, TEXTS, TURNED, picture

import numpy as np
import pytest
import torch
from PIL import Image

RIGHT = [0, 0, 250, 500]  # the truth of GOOD
HALF = [0, 0, 250, 250]
FAR = [600, 600, 900, 900]


def as_rows(lines_of):
    """name -> lines as the tables take them."""
    return {
        Row(name, samples=3 if name == SAMPLED else 1): lines for name, lines in lines_of.items()
    }


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
    assert statistics.metrics(ious[:, 0]).mean(0).tolist() == pytest.approx([0.5, 0.5, 0.25, 0.5])
    row = statistics.changes(ious)
    assert row["n"] == 4
    names = ("first", "last", "delta", "improved", "stagnated", "degraded")
    means = [row[name][0] for name in names]
    assert means == pytest.approx([0.5, 0.32625, -0.17375, 0.5, 0.25, 0.25])


def test_intervals_against_known_answers():
    hits = np.arange(500) < 400
    mean, low, high = statistics.estimate(hits)
    half = 1.96 * (0.8 * 0.2 / 500) ** 0.5  # the normal approximation of a share
    assert mean == pytest.approx(0.8)
    assert low == pytest.approx(0.8 - half, abs=0.004)
    assert high == pytest.approx(0.8 + half, abs=0.004)
    rng = np.random.default_rng(1)
    a, shift = rng.random(500), rng.normal(0.03, 0.05, 500)
    _, low, high = statistics.estimate((a + shift) - a)  # paired: what both share cancels
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 500**0.5, rel=0.1)
    assert statistics.estimate(hits) == statistics.estimate(hits.reshape(-1, 1))[0]  # seeded


def test_strata():
    samples = [{**GOOD, "source": "ab"[i % 2]} for i in range(6)]
    ious = np.array([[0.2, 0.49, 0.5, 0.74, 0.75, 1.0], [1.0] * 6]).T
    parts = statistics.strata(samples, ious)
    assert [row["n"] for row in parts.values()] == [2, 2, 2, 3, 3]
    assert parts["step-0 IoU: hard, below 0.5"]["first"][0] == pytest.approx(0.345)
    assert list(parts)[3:] == ["source: a", "source: b"]


def test_rows_of_an_ablation():
    row = Row(SFT, loop=IVT)
    own, other = trajectories([HALF, RIGHT], [RIGHT] * 2), trajectories([HALF] * 2, [RIGHT, FAR])
    [(name, found)] = ablations_of([GOOD, GOOD], 1, {row: own}, {(row, "no box"): other}).items()
    assert name == f"{SFT}, no box" and found["against"][0] == -0.75 and found["delta"][0] == -0.5


# Verdicts -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "estimates, side, words",
    [
        ([[0.2, 0.1, 0.3]], {"above": 0}, "holds"),
        ([[0.2, -0.1, 0.3]], {"above": 0}, "NOT SETTLED"),
        ([[-0.2, -0.3, -0.1]], {"above": 0}, "DOES NOT HOLD"),
        ([[0.2, 0.1, 0.3], [0.1, -0.1, 0.2]], {"above": 0}, "NOT SETTLED"),
        ([[0.2, 0.1, 0.3], [-0.2, -0.3, -0.1]], {"above": 0}, "DOES NOT HOLD"),
        ([[-0.2, -0.3, -0.15]], {"below": -0.1}, "holds"),
        ([[-0.2, -0.3, -0.05]], {"below": -0.1}, "NOT SETTLED"),
        ([[-0.05, -0.09, 0.0]], {"below": -0.1}, "DOES NOT HOLD"),
    ],
)
def test_an_interval_decides(estimates, side, words):
    assert statistics.verdict(estimates, **side) == words


def test_findings_of_a_clear_case():
    """Untrained, IVT loses every box; SFT declines; GRPO holds still."""
    samples = [{**GOOD, "id": str(i)} for i in range(20)]
    rows_of = {
        "base": trajectories(*[[HALF]] * 20),
        UNTRAINED: trajectories(*[[HALF, FAR]] * 20),
        SFT: trajectories(*[[RIGHT, HALF]] * 20),
        GRPO: trajectories(*[[RIGHT, RIGHT]] * 20),
    }
    results = results_of(samples, as_rows(rows_of), 1)
    verdicts = {sentence: word for sentence, _, word in results["findings"]}
    assert list(verdicts.values()) == [
        "DOES NOT HOLD",  # the best of steps is the first one
        "holds",
        "NOT SETTLED",  # equal in Acc@0.5: HALF has an IoU of 0.5
        "NOT SETTLED",
        "holds",
        "holds",
        "holds",
        "holds",
    ]
    text = markdown(report(results))
    assert all(sentence in text and sentence in summary(results) for sentence in verdicts)
    assert "10 points are our threshold" in text
    assert results["table2"][SFT]["cost"] == 2 and "1.000 / 1.000 | 2.00 |" in text


def test_samples_are_set_against_steps_and_have_no_order():
    samples = [{**GOOD, "id": str(i)} for i in range(8)]
    rows_of = {
        "base": trajectories(*[[HALF]] * 8),
        SAMPLED: trajectories(*[[FAR, RIGHT]] * 8),
        GRPO: trajectories(*[[HALF, HALF]] * 8),
    }
    results = results_of(samples, as_rows(rows_of), 1)
    [(_, words, found)] = results["findings"]
    assert words == "-0.500 [-0.500, -0.500]" and found == "DOES NOT HOLD"
    assert list(results["table1"][SAMPLED]) == ["best of steps", "medoid"]
    assert SAMPLED not in results["table2"]


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
    lines_of = read_predictions(path, SAMPLES)
    one, two = lines_of
    assert main_row(lines_of) == two and main_row([one, Row(GRPO), Row(SFT), two]).name == GRPO
    assert main_row([Row(UNTRAINED), Row(WITHOUT_SFT)]).name == WITHOUT_SFT
    results = results_of(SAMPLES, lines_of, 2)  # fewer boxes than T + 1
    assert results["table1"]["one"]["its only box"]["mean IoU"][0] == 0.75
    assert [value[0] for value in results["table2"]["two"]["iou"]] == [0.25, 1]
    assert results["differences"]["two"]["last step"]["mean IoU"][0] == 0.25
    assert "cost" not in results["table2"]["two"]  # nobody says how many tokens it took
    text = markdown(report(results))
    assert "| two | 0.250 [0.000, 0.500] | 1.000 [1.000, 1.000] |  | +0.750" in text
    write_jsonl(path, [{**line, "ordered": line["method"] == "one"} for line in PREDICTIONS])
    assert [row.ordered for row in read_predictions(path, SAMPLES)] == [True, False]


@pytest.mark.parametrize(
    "line, words",
    [
        ({**PREDICTIONS[0], "id": 1}, "line 5: expected"),
        (PREDICTIONS[0], "line 5: expected(.*)once for each id"),
        ({**PREDICTIONS[0], "method": "x"}, "each of the 2"),
        ({**PREDICTIONS[0], "method": "x", "boxes": [[5, 0, 0, 5]]}, "line 5: expected"),
        ({**PREDICTIONS[0], "method": "x", "boxes": [[0, 0, float("nan"), 5]]}, "expected"),
        ({**PREDICTIONS[0], "method": "x", "boxes": []}, "expected"),
        ({**PREDICTIONS[0], "method": "x", "texts": ["a", "b"]}, "expected"),
        ({**PREDICTIONS[0], "method": 3}, "expected"),
        ({**PREDICTIONS[0], "method": "x", "confidence": [None]}, "expected"),
        ({**PREDICTIONS[0], "method": "x", "read": 0.9}, "expected"),
        (3, "expected"),
    ],
)
def test_a_file_of_predictions_is_refused(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [*PREDICTIONS, line])
    with pytest.raises(SystemExit, match=words):
        read_predictions(path, SAMPLES)


# Files and pictures -------------------------------------------------------------------------------
def test_results_are_written(tmp_path, capsys):
    boxes = [[HALF, RIGHT], [RIGHT, None], [HALF, HALF], [None, None]]
    rows_of = {"base": trajectories(*[[RIGHT]] * 4), SFT: trajectories(*boxes)}
    results = results_of([GOOD] * 4, as_rows(rows_of), 1)
    write_results(results, tmp_path, summary(results), report(results))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "Table 2" in (tmp_path / "results.md").read_text()
    assert summary(results) in capsys.readouterr().out
    assert statistics.by_change([GOOD] * 4, rows_of[SFT]) == [0, 2, 3, 1]


@pytest.mark.parametrize("size", [(80, 80), (2000, 300), (8, 900)])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_lead_picture_fits_the_page(tmp_path, size, count):
    """Whatever is long: the expression, its one word, the trace."""
    sample = {**GOOD, "width": size[0], "height": size[1], "bbox": [0, 0, size[0] / 4, size[1] / 2]}
    texts = ["<think>" + "many words of a trace " * 20 + "</think>[0, 0, 250, 500]"] * count
    line = {"boxes": [RIGHT, None, *[HALF] * count][:count], "texts": texts}
    for words in ("a word " * 200, "x" * 2000, "x"):
        for loop in (IVT, zoom(2.0), asked_again(2.0)):
            own = {**sample, "expression": words}
            write_strip(tmp_path / "lead.png", own, picture(*size), line, loop)
            with Image.open(tmp_path / "lead.png") as lead:
                assert lead.width <= 1000 and lead.height <= 560


def test_the_lead_picture_shows_the_box_that_is_fed_back(tmp_path):
    image = Image.new("RGB", (300, 300), "white")
    sample = {**GOOD, "width": 300, "height": 300, "bbox": [0, 0, 75, 150]}
    line = {"boxes": [[500, 500, 900, 900], RIGHT], "texts": TEXTS}
    write_strip(tmp_path / "lead.png", sample, image, line, IVT)
    lead = Image.open(tmp_path / "lead.png")
    left, top = 14 + 320 + 14, 50 + 20  # of the panel of step 1
    red, green, blue = lead.getpixel((left + 200, top + 200))
    assert red == 255 and 0 < green == blue < 255
    assert lead.getpixel((14 + 200, top + 200)) == (255, 255, 255)  # step 0 was shown no box
    assert lead.getpixel((left, top)) == (0, 210, 230)  # the new box, which is the truth


def test_what_cannot_be_drawn_costs_nothing_else(tmp_path, capsys):
    with drawing(tmp_path / "lead.png"):
        write_strip(tmp_path / "lead.png", GOOD, None, {"boxes": [RIGHT], "texts": TEXTS}, IVT)
    assert "lead.png cannot be drawn (AttributeError" in capsys.readouterr().out


def test_a_label_is_drawn_in_a_font_that_has_its_letters(monkeypatch, tmp_path, capsys):
    """Pillow's own lacks even an accent; a font of one sign stands for the machine's."""
    assert font_for("a box", BOLD) is BOLD
    monkeypatch.setattr(pictures, "FONTS", [tmp_path])
    (tmp_path / "a.ttf").write_bytes(b"no font")
    (tmp_path / "b.ttf").write_bytes(BOLD.font_bytes)
    for words in ("\u4e2d", "\u05e9"):
        assert font_for(words, BOLD) is BOLD
    assert capsys.readouterr().out.count("no font of this machine") == 1
    has_all = SimpleNamespace(getmask=lambda letter: letter.encode())
    monkeypatch.setattr(pictures.ImageFont, "truetype", lambda file, size: has_all)
    assert font_for("\u4e2d\u6587", BOLD) is has_all


@pytest.mark.parametrize("flag, loop", [("overlay", IVT), ("zoom", zoom(2.0))])
def test_what_is_shown_instead_of_the_box(flag, loop):
    image = picture(90, 70)
    before = image.tobytes()
    rows = ablation_rows(SimpleNamespace(feedback=flag, surroundings=2.0), Row(GRPO, loop=loop))
    for name, row in rows.items():
        feedback = row.loop.feedback
        shown = feedback(image, HALF)
        assert shown.size == image.size and image.tobytes() == before
        assert shown.tobytes() != loop.feedback(image, HALF).tobytes()
        assert shown.tobytes() == feedback(image, HALF).tobytes()
        assert feedback(image, None).size == image.size
        assert (shown.tobytes() == before) == (name == "no overlay")


def test_a_picture_of_your_own_is_turned_upright_or_refused(tmp_path):
    file = tmp_path / "photo.jpg"
    picture(90, 70).save(file, exif=TURNED)
    own = tmp_path / "own.jsonl"
    write_jsonl(own, [{"image": "photo.jpg", "expression": "x"}])
    [sample] = own_samples(str(file), "x")
    assert own_samples(str(own), None) == [sample]
    assert (sample["width"], sample["height"]) == (70, 90)
    write_jsonl(own, [{"image": "photo.jpg"}])
    file.write_bytes(file.read_bytes()[:500])
    null, empty = tmp_path / "n.jsonl", tmp_path / "e.jsonl"
    write_jsonl(null, [{"image": "a\0.png", "expression": "x"}])
    empty.touch()
    for image, words, message in (
        (own, None, "line 1: expected"),
        (file, None, "give both"),
        (None, "x", "give both"),
        (file, "<|im_end|>", "say what to find"),
        (null, None, "line 1: image .*null"),
        (empty, None, "is empty"),
        (file, "x", f"error: --image {file}: "),
    ):
        with pytest.raises(SystemExit, match=message):
            own_samples(image and str(image), words)


def test_leaving_the_healthy_range_warns_once():
    row = {"kl": 0.9, "entropy": 1.0, "no_signal": 0.0, "sampler_gap": 0.0, "valid": 1.0}
    said = []
    bar = SimpleNamespace(write=said.append)
    run = SimpleNamespace(rows=[row] * 4, warned=set(), bar=bar)
    health.warn(run)  # too few
    run.rows = [row] * 5
    health.warn(run)
    health.warn(run)
    assert len(said) == 1 and said[0].startswith("warning: kl is 0.900 (healthy: 0 to 0.5)")
    run.warned, run.rows = set(), [row] * 5 + [{**row, "kl": 0.1}] * 10  # long ago does not count
    health.warn(run)
    assert len(said) == 1


def test_what_the_log_says_of_a_batch_of_rollouts():
    truth = dict(GOOD, width=100, height=100, bbox=[0, 0, 50, 100])
    right, half = [0, 0, 500, 1000], [0, 0, 1000, 1000]
    boxes = [[half, right], [None, right], [half, half], [half, None]]
    trajectories = [Trajectory(target=[1] * n, boxes=pair) for n, pair in enumerate(boxes, 1)]
    rewards = torch.tensor([[1.0, 0.5], [0.3, 0.3]])
    facts = health.rollout_facts(rewards, trajectories, [truth] * 4, [0.1] * 9 + [0.6])
    assert facts == {
        "reward": pytest.approx(0.525),
        "reward_std": 0.125,  # of 0.25 and 0
        "no_signal": 0.5,
        "iou": [0.375, 0.625],
        "valid": 0.75,
        "tokens": 2.5,
        "sampler_gap": pytest.approx(0.15),
        "sampler_gap_max": 0.6,
    }
