"""The page: what is in the file, and what a browser makes of it."""

import base64
import io
import json
import re
from types import SimpleNamespace

from common import SINGLE_SHOT
from support.model.views import asked_again, zoom
from support.report import page
from support.report.rows import Row
from support.report.statistics import changes
from support.report.tables import report, results_of
from support.running.files import write_jsonl
from tests.browser import CHROMIUM, look_at
from tests.small import GOOD, TEXTS, TURNED, picture
from tests.test_report import FAR, HALF, RIGHT

import numpy as np
import pytest
from PIL import Image

BASE = Row("base", loop=SINGLE_SHOT)
SAMPLED = Row("samples", loop=SINGLE_SHOT, samples=3)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"&\u2028"


def a_line(sample, boxes):
    texts = [TEXTS[min(t, 1)] for t in range(len(boxes))]
    return {"id": sample["id"], "boxes": boxes, "texts": texts}


def a_run(folder, count=6, words=""):
    """Samples with pictures under `folder`/data, and lines of three methods: (args, results,
    samples, lines_of). words: put into everything that comes from data."""
    (folder / "data").mkdir(parents=True)
    (folder / "log").mkdir()
    samples = []
    for i in range(count):
        name = f"{words.replace('/', '')}{i}.png"
        picture(20, 10, seed=i).save(folder / "data" / name)
        own = {"id": f"{i}{words}", "source": f"{'ab'[i % 2]}{words}", "image": name}
        samples.append({**GOOD, **own, "expression": f"thing {i} {words}"})
    ways = [[HALF, HALF, RIGHT], [RIGHT, FAR, FAR], [HALF, None, HALF], [FAR, FAR, RIGHT]]
    refined = Row(f"refined{words}", loop=SINGLE_SHOT)
    lines_of = {
        BASE: [a_line(sample, [HALF]) for sample in samples],
        SAMPLED: [a_line(sample, [HALF, FAR, RIGHT]) for sample in samples],
        refined: [a_line(s, [*ways[i % 4], FAR]) for i, s in enumerate(samples)],
    }
    for lines in lines_of.values():
        for line in lines:
            line["texts"] = [text + words for text in line["texts"]]
    results = results_of(samples, lines_of, 2)
    results |= {"seed": 0, "model": "m" + words, "feedback": "overlay", "guard": "off"}
    results["findings"] = [("SFT < GRPO" + words, "+0.1", "NOT SETTLED")]
    flags = dict(out=folder, steps=2, feedback="overlay", surroundings=2.0)
    return SimpleNamespace(**flags), results, samples, lines_of


def write(folder, **options):
    page.write_evaluation(folder, *a_run(folder, **options))
    return (folder / "report.html").read_text(encoding="utf-8")


def json_of(text):
    """The JSON in a page, as it stands there."""
    return re.search('<script type="application/json" id="data">(.*?)</script>', text)[1]


def test_the_file_has_everything(tmp_path):
    text = write(tmp_path / "run")
    data = json.loads(json_of(text))
    [test] = data["groups"]
    assert [sample["id"] for sample in test["samples"]] == list("012345")
    assert [method["name"] for method in test["methods"]] == ["base", "samples", "refined"]
    for method, steps in zip(test["methods"], (1, 3, 3)):  # up to T
        assert [len(line["steps"]) for line in method["lines"]] == [steps] * 6
    single, samples, refined = test["methods"]
    assert [line["words"] for line in refined["lines"][:4]] == [
        "IoU 0.50 → 0.50 → 1.00, improved",  # HALF has an IoU of 0.5, which counts as right
        "IoU 1.00 → 0.00 → 0.00, degraded, spoilt",
        "IoU 0.50 → 0.00 → 0.50, stagnated",
        "IoU 0.00 → 0.00 → 1.00, improved, corrected",
    ]
    assert [line["gain"] for line in refined["lines"][:4]] == [0.5, -1.0, 0.0, 1.0]
    assert not any(line["outcome"] for line in single["lines"] + samples["lines"])
    # Step t was shown the last valid box; an answer of its own was shown none
    steps = refined["lines"][2]["steps"]
    assert [step.get("seen") for step in steps] == [None, HALF, HALF]
    said = 'box before: trace says "shift or resize", truth "shift or resize", IoU 0.50'
    assert [s["name"] for s in steps[:2]] == ["step 0: IoU 0.50", f"step 1: no valid box\n{said}"]
    assert "true box 0.0, 0.0, 250.0, 500.0 in 0..1000" in test["samples"][0]["facts"]
    assert not any("seen" in step for step in samples["lines"][0]["steps"])
    pictures = data["pictures"].values()
    assert len(pictures) == 6 and all(p.startswith("data:image/png;base64,") for p in pictures)
    assert re.findall("<details open><summary>(.*?)<", text) == ["Table 1", "Table 2"]
    assert "<details><summary>Table 1, differences" in text
    # What the run is, a line a method with its interval, and the verdicts
    assert "<h1>run, 6 test samples: best is “refined”, mean IoU 0.583. refined looks" in text
    assert re.findall(r"</svg> (\w+) <b>0\.\d{3} \[", text) == ["refined", "base"]
    assert text.count("<b>? not settled:</b> SFT &lt; GRPO <small>+") == text.count("SFT &lt; GRPO")
    assert re.search(r'"line s1" d="M[\d.]+ [\d.]+H', text)  # of a single box a level


def test_no_address_leads_outside(tmp_path):
    text = write(tmp_path)
    assert set(re.findall(r"\w+://[\w./]*", text)) == {"http://www.w3.org/2000/svg"}  # a name
    assert not re.search(r"<[^>]* (src|href|action|data|srcset|style)=", text)
    for word in ("url(", "@import", "innerHTML", "outerHTML", "insertAdjacent", "document.write"):
        assert word not in text
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import(", "eval("):
        assert word not in text


def test_what_comes_from_data_is_inert(tmp_path):
    """The same tags as with harmless words, and the words themselves in the data."""
    plain, hostile = write(tmp_path / "0"), write(tmp_path / "1", words=HOSTILE)
    tags = [re.findall("<[a-z/!][^>]*>", text) for text in (plain, hostile)]
    assert tags[0] == tags[1]
    [test] = json.loads(json_of(hostile))["groups"]
    assert all(sample["text"].endswith(HOSTILE) for sample in test["samples"])
    assert test["methods"][2]["lines"][0]["steps"][0]["text"].endswith(HOSTILE)
    assert not set("<\u2028") & set(json_of(hostile))


def test_pictures_are_embedded_once(tmp_path):
    args, results, samples, lines_of = a_run(tmp_path, words="ä %'\"#?")
    samples[1]["image"] = samples[0]["image"]  # two expressions on one picture
    page.write_evaluation(tmp_path, args, results, samples, lines_of)
    assert len(json.loads(json_of((tmp_path / "report.html").read_text()))["pictures"]) == 5


def test_a_picture_is_shown_as_the_model_saw_it(tmp_path):
    """A browser would turn a photo that its camera marked as rotated, whatever its annotation."""
    picture(20, 10).save(tmp_path / "turned.jpg", exif=TURNED)
    picture(20, 10).save(tmp_path / "turned.png", exif=TURNED)
    picture(20, 10).convert("RGBA").save(tmp_path / "clear.png")
    picture(2000, 1000).save(tmp_path / "large.png")
    for name, width, shown in (
        ("turned.jpg", 20, (20, 10)),
        ("turned.png", 20, (20, 10)),
        ("clear.png", 20, (20, 10)),
        ("large.png", 2000, (512, 256)),
    ):
        sample = {**GOOD, "image": name, "width": width, "height": width // 2}
        kind, content = page.embedded(sample, tmp_path).split(",")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/webp;base64" and image.size == shown and not image.getexif()
    assert page.embedded({**GOOD, "image": "none.png"}, tmp_path) == ""


def test_outcomes_are_those_of_table_2():
    rng = np.random.default_rng(0)
    ious = rng.random((50, 2)).round(2)
    table = changes(ious)
    words = [page.outcome(*row) for row in ious]
    for name in ("improved", "stagnated", "degraded"):
        assert sum(name in own for own in words) == pytest.approx(50 * table[name][0], abs=0.01)


def test_questions_with_crops_and_critics():
    """A VisRL line: a box, then an answer that was given on the crop of it."""
    sample = {key: GOOD[key] for key in ("id", "source", "image", "width", "height")}
    sample |= {"question": "What colour?", "answer": "red"}
    line = {"boxes": [RIGHT, None], "texts": ["[0, 0, 250, 500]", "blue"], "ends": (0, 1)}
    line |= {"name": ["box", "answer"], "view": [page.WHOLE, RIGHT], "words": "box critic 0.9"}
    group = page.group("pairs", [sample], {Row("rejected", drawn=False): [line]}, 1)
    [record] = group["methods"][0]["lines"]
    assert record["words"] == "box critic 0.9, improved, corrected" and record["gain"] == 1
    box, answer = record["steps"]
    assert box["box"] == RIGHT and "view" not in box
    assert answer["view"] == RIGHT and answer["name"] == "answer" and "seen" not in answer
    assert "true answer: red" in group["samples"][0]["facts"]
    del line["ends"]  # the answer has no box to be wrong
    assert page.line_record(BASE, GOOD, line, 1)["outcome"] == []


def test_of_many_samples_those_are_shown_that_change_most(monkeypatch):
    monkeypatch.setattr(page, "SAMPLES", 2)
    samples = [{**GOOD, "id": name} for name in "abc"]
    lines = [{"boxes": [a, b], "texts": ["", ""]} for a, b in ((RIGHT, None), (RIGHT, RIGHT))]
    group = page.group("test", samples, {BASE: [*lines, lines[0]]}, 1)
    assert [sample["id"] for sample in group["samples"]] == ["a", "c"]
    assert "2 of 3" in group["name"] and len(group["methods"][0]["lines"]) == 2


def test_curves_of_a_log(tmp_path):
    rows = [{"update": 0, "val_reward": 0.5, "val_iou": [0.4, 0.5], "val_rewards": [0.5] * 9}]
    for i in range(1, 31):
        rows.append({"update": i, "reward": float(i), "kl": 0.1, "name": "x"})
    write_jsonl(tmp_path / "grpo.jsonl", rows)
    with open(tmp_path / "grpo.jsonl", "a") as file:  # a phase that was killed
        file.write('{"update": 30, "change": [1, 0, 2]}\n[1]\n{"upd')
    write_jsonl(tmp_path / "sft.jsonl", [{"update": 1, "epoch": 1, "loss": float("nan")}])
    write_jsonl(tmp_path / "evaluate_base.jsonl", [{"id": "1"}])
    (tmp_path / "empty.jsonl").touch()
    [(heading, _)] = page.log_curves(tmp_path)
    assert heading == "Training: grpo"
    charts = page.log_charts(tmp_path / "grpo.jsonl")
    assert list(charts) == ["val_reward", "val_iou", "reward", "kl"]
    assert re.findall("step . <b>.*?<", charts["val_iou"]) == ["step 0 <b>0.4<", "step 1 <b>0.5<"]
    places = re.search('class="line s0" d="M(.*?)"', charts["reward"])[1].split("L")
    xs, ys = zip(*(map(float, place.split()) for place in places))
    assert len(xs) == 30 and list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert "healthy, 0 to 0.5" in charts["kl"] and "healthy" not in charts["reward"]
    assert page.ticks(0.13, 0.88) == pytest.approx([0.2, 0.4, 0.6, 0.8])


# In a browser -------------------------------------------------------------------------------------
SHOWN = "document.querySelector('#detail h3').textContent.slice(0, 7)"
LISTED = "document.querySelectorAll('#list button').length"
PANELS = "document.querySelectorAll('.panel').length"
COLOR = "getComputedStyle(document.body).backgroundColor"


def key(name):
    event = f"new KeyboardEvent('keydown', {{key: '{name}', bubbles: true}})"
    return f"document.body.dispatchEvent({event})"


def choose(name, value):
    """As a hand would: the value, and the event of it."""
    field = f"document.querySelector('[name={name}]')"
    event = f"{field}.dispatchEvent(new Event('input', {{bubbles: true}}))"
    return f"{field}.value = {json.dumps(value)}, {event}"


def place(element, side):
    return f"document.querySelector('{element}').getBoundingClientRect().{side}"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tmp_path):
    args, results, samples, lines_of = a_run(tmp_path, words=HOSTILE)
    write_jsonl(tmp_path / "log/grpo.jsonl", [{"update": 1, "kl": 0.1}])
    page.write_evaluation(tmp_path, args, results, samples, lines_of)
    address = (tmp_path / "report.html").as_uri()
    whole = {  # scripts, run in this order -> what they give
        # Sentence, chart and verdicts are on the first screen
        f"{place('#changes', 'top')} < 800": True,
        "document.querySelector('#changes .strip').textContent.match(/thing \\d/g)": [
            "thing 3",
            "thing 0",
            "thing 4",
            "thing 5",
            "thing 1",
        ],
        f"[{LISTED}, {SHOWN}]": [6, "thing 0"],
        f"document.querySelectorAll('#changes button')[3].click(), {SHOWN}": "thing 5",
        f"scrollY > 0 && {place('.panel p', 'bottom')} <= 800": True,
        f"{choose('method', 'base')}, [{PANELS}, {SHOWN}]": [1, "thing 5"],
        f"{choose('method', f'refined{HOSTILE}')}, {choose('beside', 'samples')}, {PANELS}": 6,
        f"{choose('order', 'loss')}, {key('ArrowLeft')}, {SHOWN}": "thing 1",  # from 1 to 0
        f"{key('ArrowRight')}, {SHOWN}": "thing 5",  # the other one
        f"{choose('outcome', 'corrected')}, [{LISTED}, {SHOWN}]": [1, "thing 3"],
        f"{choose('search', 'nothing')}, [{LISTED}, {PANELS}]": [0, 0],
        f"{choose('outcome', '')}, {choose('search', 'THING 5')}, {SHOWN}": "thing 5",
        "window.hacked === undefined": True,
        "performance.getEntriesByType('resource').length": 0,
    }
    phone = {  # a dark one
        "document.documentElement.scrollWidth <= 390": True,
        f"dark = {COLOR}, document.body.style.colorScheme = 'light', dark != {COLOR}": True,
        # The methods stay where they are while a table scrolls
        f"document.querySelector('[open] .wide').scrollLeft = 200, {place('[open] td', 'x')}": 16,
        f"{place('[open] td + td', 'x')} < {place('[open] td', 'right')}": True,
    }
    views = (1280, 800, whole), (390, 844, phone)
    assert look_at(tmp_path / "frames.html", address, *views) == [whole, phone]


def test_a_row_that_looks_closer_is_shown_as_the_model_saw_it():
    box, part = [400, 400, 500, 500], [350, 350, 550, 550]
    line = {"boxes": [box, None, box], "texts": [""] * 3}
    for loop, drawn in ((asked_again(2.0), False), (zoom(2.0), True)):
        steps = page.line_record(Row("x", loop=loop, drawn=drawn), GOOD, line, 2)["steps"]
        assert [step.get("view") for step in steps] == [None, part, part]
        assert [step.get("seen") for step in steps] == [None, *[box if drawn else None] * 2]
