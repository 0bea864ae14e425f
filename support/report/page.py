"""A page of trajectories, tables and curves: one file for a browser, without a server, a network or
a library.

Its script and style are page.js and page.css beside this file. What comes from data is JSON that
the script sets as text.

A line is one of a log (rows.log_line): "boxes" and "texts", one of each per step, a box in 0..1000
or None. It may have "name", what each step is called instead of "step t" (an "answer" has no box to
miss), "view", the part of the image that each step was shown, which else follows from the row's
loop, and "scores", a dict of names and numbers that belong to the whole line.
"""

import base64
import html
import io
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

from common import WHOLE, box_iou, last_valid
from support.data.samples import load_image
from support.model.views import loop_of
from support.report.health import HEALTHY, LAST_UPDATES
from support.report.pictures import write_strip
from support.report.rows import Row, log_line
from support.report.statistics import by_change, main_row
from support.report.tables import report, results_of_run, summary, write_results
from support.running.files import write_jsonl, write_text
from support.running.processes import RANK, gather, minutes

from PIL import Image

HERE = Path(__file__).parent
PICTURES = 20_000_000  # bytes of the pictures that are embedded: a mail takes such a page
SAMPLES = 1000  # of the test set, at most
LAST_VALIDATIONS = 11  # beside the first one

# What happened from step 0 to step T, as in Table 2, and whether it made a wrong box (IoU below
# 0.5) right or a right one wrong
OUTCOMES = ("improved", "stagnated", "degraded", "corrected", "broken")
SAME = 0.01
RIGHT = 0.5


# The pages of a run -------------------------------------------------------------------------------
def write_all(args, samples, lines_of, others, start):
    """All that an evaluation leaves: results.md, results.json, report.html, the largest gain as
    figures/lead.png, and --predictions.

    lines_of: Row -> its lines, in the order of the samples. others: as of `analysis.ablations_of`.
    start: a time.time().
    """
    results = results_of_run(args, samples, lines_of, others)
    write_results(results, args.out, summary(results), report(results))
    if args.predictions:
        lines = []
        for row, own in lines_of.items():
            lines += [{"method": row.name, "ordered": row.ordered, **line} for line in own]
        write_jsonl(args.predictions, lines)
    shown = main_row(lines_of)
    short = []  # what the tables are of
    for line in lines_of[shown]:
        short.append({key: line[key][: args.steps + 1] for key in ("boxes", "texts")})
    best = by_change(samples, short)[0]
    image = load_image(samples[best], args.out / "data")
    write_strip(args.out / "figures/lead.png", samples[best], image, short[best], shown.loop)
    place = write_evaluation(args, results, samples, lines_of)
    places = f"tables in {args.out / 'results.md'}, trajectories to look at in {place}"
    print(f"{places}, {minutes(start)}")


def write_evaluation(args, results, samples, lines_of):
    """report.html of an evaluation: tables, curves, trajectories; returns its path."""
    title = f"{args.out.name} · {results['model']} · {results['n']} test samples"
    test = group("test", samples, lines_of, args.steps, shown=results["shown"], limit=SAMPLES)
    return write_page(
        args.out / "report.html",
        title=title,
        tables=report(results),
        curves=[*result_curves(results), *log_curves(args.out / "log")],
        groups=[test, *validation_groups(args)],
        data=args.out / "data",
    )


def write_validation(args, name, update, samples, trajectories, tokenizer):
    """report.html of a training that runs: its curves so far, and its validation trajectories.

    samples, trajectories: this process's share. They are kept as log/validation/<name>_<update>
    .jsonl, so that one update can be laid beside another.
    """
    pairs = zip(samples, trajectories)
    guarded = args.guard == "on"
    lines = gather([log_line(sample, [t], tokenizer, guarded) for sample, t in pairs])
    write_jsonl(validation_file(args, name, update), lines)
    if RANK:
        return
    write_page(
        args.out / "report.html",
        title=f"{args.out.name} · {name}, update {update} of {args.updates}",
        curves=log_curves(args.out / "log"),
        groups=validation_groups(args),
        data=args.out / "data",
    )


def validation_file(args, name, update):
    return args.out / f"log/validation/{name}_{update}.jsonl"


def validation_groups(args):
    """A group for each log with validations; its methods are the updates that they came before."""
    path = args.out / "data/val.jsonl"
    if not path.is_file():
        return []
    sample_of = {sample["id"]: sample for sample in readable(path)}
    groups = []
    for name, rows in training_logs(args.out / "log"):
        lines_of = {}
        updates = [row["update"] for row in rows if "val_iou" in row]
        for update in updates[:1] + updates[1:][-LAST_VALIDATIONS:]:
            # A file that the log does not name is of an earlier run
            file = validation_file(args, name, update)
            if file.is_file():
                row = Row(f"update {update}", loop=loop_of(args), drawn=args.feedback != "again")
                lines_of[row] = readable(file)
        ids = [[line["id"] for line in lines] for lines in lines_of.values()]
        if ids and all(own == ids[0] for own in ids) and set(ids[0]) <= set(sample_of):
            samples = [sample_of[id_] for id_ in ids[0]]
            last = len(next(iter(lines_of.values()))[0]["boxes"]) - 1  # T of that training
            groups.append(group(f"validation of {name}", samples, lines_of, last))
    return groups


def readable(path):
    """The rows of a file that the phases check and mend themselves: what is no row is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # empty, or half of a line that a killed phase left
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def training_logs(folder):
    """The logs of the training phases in a folder: (name, rows) pairs, SFT's first."""
    paths = sorted(Path(folder).glob("*.jsonl"), key=lambda path: (path.stem != "sft", path))
    for path in paths:
        if not path.name.startswith("evaluate_") and path.stat().st_size:
            yield path.stem, readable(path)


# The file -----------------------------------------------------------------------------------------
def write_page(path, *, title, groups, data, tables=(), curves=(), load=load_image):
    """Writes a page whole, or not at all, and returns its path.

    tables: sections, as of tables.report. curves: (heading, charts) pairs. groups: of `group`.
    data: the folder that the images' paths start from; load: as load_image.
    """
    if RANK:
        return path
    numbers = {}  # an image's path -> its number
    samples = {}  # the same -> a sample that shows it
    for one in groups:
        for sample in one["samples"]:
            image = sample["image"]
            samples.setdefault(image, sample)
            sample["picture"] = numbers.setdefault(image, len(numbers))
    headings = [{"heading": heading, "charts": charts} for heading, charts in curves]
    content = {"outcomes": OUTCOMES, "tables": tables, "curves": headings, "groups": groups}
    parts = {
        "title": html.escape(title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "data": to_json(content),
        "pictures": to_json(addresses(samples, data, Path(path).parent, load)),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
    }
    skeleton = (HERE / "page.html").read_text(encoding="utf-8")
    # In one pass: what is put in is not searched for further places
    write_text(path, re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], skeleton))
    return path


def to_json(value):
    """JSON that no browser takes for markup: it holds neither <, > and & nor a character beyond
    ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


# Pictures -----------------------------------------------------------------------------------------
def addresses(samples, data, folder, load):
    """An address for each image of {path: a sample that shows it}: its content, up to PICTURES
    bytes of them all, then a path relative to `folder`; None where it cannot be read."""
    found = []
    room = PICTURES
    for image, sample in samples.items():
        file = Path(data) / image
        try:
            kind, content = picture_file(file, sample, data, load)
        except (OSError, ValueError):  # it was there when the samples were checked
            found.append(None)
            continue
        address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        if len(address) > room:
            address = quote(Path(os.path.relpath(file, folder)).as_posix())
        room -= len(address)
        found.append(address)
    return found


def picture_file(file, sample, data, load):
    """-> (kind, bytes) of an image: the file as it is, or a JPEG where a browser could show the
    file otherwise than the model saw it (turned, other colours, no known format)."""
    with Image.open(file) as image:
        turned = image.getexif().get(0x0112, 1) != 1  # EXIF's orientation
        plain = image.format in ("PNG", "JPEG") and image.mode in ("RGB", "L", "P") and not turned
        kind = str(image.format).lower()
    if plain:
        return kind, file.read_bytes()
    buffer = io.BytesIO()
    load(sample, data).save(buffer, format="JPEG", quality=90)
    return "jpeg", buffer.getvalue()


# Trajectories -------------------------------------------------------------------------------------
def group(name, samples, lines_of, steps, *, shown=None, limit=None):
    """A set of samples and what methods do with them, as the script takes it.

    lines_of: Row -> lines in the order of the samples. steps: T, the last step that is on the page.
    shown: the method that a reader sees first (default: the last one). limit: how many samples are
    on the page. A sample has an id of its own, image, width, height and an expression or a
    question; maybe source, bbox and answer.
    """
    if limit and limit < len(samples):
        name = f"{name}, {limit} of {len(samples)}"
        samples = samples[:limit]
    methods = []
    for row, lines in lines_of.items():
        records = [line_record(row, *pair, steps) for pair in zip(samples, lines)]
        methods.append({"name": row.name, "lines": records})
    records = [sample_record(sample) for sample in samples]
    return {
        "name": name,
        "samples": records,
        "methods": methods,
        "shown": shown or methods[-1]["name"],
    }


def sample_record(sample):
    record = {key: sample[key] for key in ("id", "image", "width", "height")}
    record["text"] = sample["expression"] if "expression" in sample else sample["question"]
    for key in ("source", "answer", "bbox"):
        if key in sample:
            record[key] = sample[key]
    return record


def line_record(row, sample, line, steps):
    """A line of a row as the script takes it. gain: the IoU at the last step minus that at the
    first, where both are steps of one trajectory."""
    count = min(steps + 1, len(line["boxes"]))
    records = [step_record(row, sample, line, t) for t in range(count)]
    record = {"steps": records, "outcome": []}
    if row.ordered and count > 1 and all("iou" in records[t] for t in (0, -1)):
        first, final = (box_iou(line["boxes"][t], sample) for t in (0, count - 1))
        record["gain"] = round(final - first, 4)
        record["outcome"] = outcome(first, final)
    if "scores" in line:
        record["scores"] = line["scores"]
    return record


def step_record(row, sample, line, t):
    """A step as the script takes it. seen: the box that was drawn on the picture before it; view:
    the part of the image that was shown, if it was not all of it."""
    box = line["boxes"][t]
    name = f"step {t}" if row.ordered else f"sample {t}"
    if "name" in line:
        name = line["name"][t]
    record = {"text": line["texts"][t], "name": name}
    if box or name != "answer":
        record["box"] = box
        if "bbox" in sample:
            record["iou"] = round(box_iou(box, sample), 4)
    last_box = last_valid(line["boxes"][:t]) if row.ordered else None
    view = row.loop.view(last_box) if row.loop else WHOLE
    if "view" in line:
        view = line["view"][t]
    if view != WHOLE:
        record["view"] = view
    if last_box and row.drawn:
        record["seen"] = last_box
    return record


def outcome(first, final):
    """From the first to the last IoU, of OUTCOMES."""
    change = final - first
    words = ["improved" if change > SAME else "degraded" if change < -SAME else "stagnated"]
    if first < RIGHT <= final:
        words.append("corrected")
    if final < RIGHT <= first:
        words.append("broken")
    return words


# Curves, as page.js draws them --------------------------------------------------------------------
TITLES = {  # a metric of the logs -> what stands over its chart
    "reward": "Mean reward, sampled, and greedy on the validation samples",
    "val_reward": "Mean reward of the validation samples",
    "iou": "Mean IoU of each step, sampled",
    "val_iou": "Mean IoU of each step, validation",
    "loss": "Loss",
    "kl": "KL term per token, nats",
    "entropy": "Entropy per token, nats",
    "tokens": "Generated tokens",
    "valid": "Share of steps with a valid box",
    "no_signal": "Share of groups whose rewards are all equal",
    "reward_std": "Deviation of the reward within a group",
    "policy": "Policy term of the loss",
    "sampler_gap": "Gap in log pi between what sampled and what is trained, nats",
    "grad_norm": "Norm of the gradient, before it is clipped",
    "lr": "Learning rate",
}


def chart(title, x, series, healthy=None):
    """series: of `curve`. healthy: (low, high), shaded."""
    return {"title": title, "x": x, "series": series, "healthy": healthy}


def curve(name, points, style, faint=False):
    """points: [x, y] or [x, y, low, high]. style: a number for colour and dashes."""
    return {"name": name, "points": points, "style": style % 7, "faint": faint}


def result_curves(results):
    """IoU per step, from the numbers of an evaluation: a list of one (heading, charts) or none."""
    series = []
    for i, (name, row) in enumerate(results["table2"].items()):
        series.append(curve(name, [[t, *value] for t, value in enumerate(row["iou"])], i))
    title = "Mean IoU of each step, with 95 percent intervals"
    return [("Test samples", [chart(title, "step", series)])] if series else []


def log_curves(folder):
    """The charts of every training log in a folder: (heading, charts) pairs."""
    curves = [(f"Training: {name}", log_charts(rows)) for name, rows in training_logs(folder)]
    return [(heading, charts) for heading, charts in curves if charts]


def log_charts(rows):
    """A chart for each metric of a log; a number and its value in validation share one."""
    metrics = {}  # name -> the points [update, value] of each step, or of the one number
    for row in rows:
        if "update" not in row:
            continue
        for key, value in row.items():
            values = value if isinstance(value, list) else [value]
            if key in ("update", "epoch") or not all(map(is_number, values)):
                continue
            by_step = metrics.setdefault(key, [[] for _ in values])
            for points, v in zip(by_step, values):
                points.append([row["update"], v])
    numbers = {key for key, by_step in metrics.items() if len(by_step) == 1}
    order = [*(key for key in TITLES if key in metrics), *sorted(metrics.keys() - TITLES.keys())]
    charts = []
    for key in order:
        if key.removeprefix("val_") != key and {key, key[4:]} <= numbers:
            continue  # it is in the chart of its metric
        series = metric_series(key, metrics[key])
        if {key, f"val_{key}"} <= numbers:
            series.append(curve(f"val_{key}", metrics[f"val_{key}"][0], 1))
        healthy = HEALTHY[key][:2] if key in HEALTHY else None
        charts.append(chart(TITLES.get(key, key), "update", series, healthy))
    return charts


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def metric_series(key, by_step):
    """The curves of a metric. Many updates are shown by their running mean too, over as many as the
    warnings look at."""
    series = []
    for step, points in enumerate(by_step):
        name = key if len(by_step) == 1 else f"step {step}"
        long = len(points) > 2 * LAST_UPDATES
        series.append(curve(name, points, step, faint=long))
        if long:
            name = f"{name}, mean of the last {LAST_UPDATES}"
            series.append(curve(name, running_mean(points), step))
    return series


def running_mean(points):
    means = []
    for i, (x, _) in enumerate(points):
        last = [y for _, y in points[max(0, i + 1 - LAST_UPDATES) : i + 1]]
        means.append([x, round(sum(last) / len(last), 6)])
    return means
