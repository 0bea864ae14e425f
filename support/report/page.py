"""A page of trajectories, tables and curves: one file for a browser, without a server, a network or
a library.

`write_page` writes any such page, and `write_evaluation` and `write_validation` the report.html of
a run. Its script and style are page.js and page.css beside this file. All that comes from data is
escaped: in the tables as HTML, elsewhere as JSON that the script sets as text.

A line is a row of a log (statistics.log_line): "boxes" and "texts", one of each per step, a box in
0..1000 or None. It may have more, a value per step each:

    logprob, read   log-probability of the text, tokens in the context when the step ends
    seen            the box that was drawn on the picture before this step (default: the last valid)
    view            the part of the image that was shown, a box; None is all of it
    name            what the step is called instead of "step t"; an "answer" has no box to miss

and "scores", a dict of names and numbers that belong to the whole line.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

from common import box_iou, last_valid, normalize_box
from support.data.samples import load_image
from support.model.views import view_of
from support.report.claims import claim_of, geometry_of, trace_of
from support.report.health import HEALTHY, LAST_UPDATES
from support.report.statistics import AGAIN, AGAIN_GUARDED, CONTROL, all_ious, log_line, strata
from support.report.tables import report
from support.running.files import write_jsonl, write_text
from support.running.processes import RANK, gather

from PIL import Image

HERE = Path(__file__).parent
LIMIT = 25_000_000  # bytes of a page: what a mail takes; pictures fill what the rest leaves

VALIDATIONS = 12, 200  # updates (the first and the last ones) and samples on a page, at most

# What happened from step 0 to step T, as in Table 2, and whether it made a wrong box (IoU below
# 0.5) right or a right one wrong
OUTCOMES = ("improved", "stagnated", "degraded", "corrected", "broken")
SAME = 0.01
RIGHT = 0.5


# The pages of a run -------------------------------------------------------------------------------
def write_evaluation(args, results, samples, lines_of):
    """report.html of an evaluation: tables, curves, all trajectories; returns its path.

    lines_of: method -> its lines, in the order of the samples; of them args.page_samples are shown.
    """
    model = results.get("model", "")
    title = " · ".join(filter(None, [args.out.name, model, f"{results['n']} test samples"]))
    shown = results["shown"]
    lines_of = {name: with_views(args, name, lines) for name, lines in lines_of.items()}
    test = group("test", samples, lines_of, args.steps, shown=shown, limit=args.page_samples)
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
    refuses = args.guard == "on"
    pairs = zip(samples, trajectories)
    lines = [log_line(sample, [t], tokenizer, refuses) for sample, t in pairs]
    lines = gather(lines)
    write_jsonl(validation_file(args, name, update), lines)
    if RANK:
        return
    write_page(
        args.out / "report.html",
        title=f"{args.out.name} · {name}, update {update} of {args.updates}",
        tables="",
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
        for row in rows:  # a file that the log does not name is of an earlier run
            file = validation_file(args, name, row.get("update"))
            if "val_iou" in row and file.is_file():
                lines_of[f"update {row['update']}"] = readable(file)
        ids = [[line["id"] for line in lines] for lines in lines_of.values()]
        if ids and all(own == ids[0] for own in ids) and set(ids[0]) <= set(sample_of):
            samples = [sample_of[id_] for id_ in ids[0]]
            updates = list(lines_of)
            if len(updates) > VALIDATIONS[0]:
                updates = updates[:1] + updates[1 - VALIDATIONS[0] :]
            lines_of = {update: lines_of[update] for update in updates}
            lines_of = {update: with_views(args, name, own) for update, own in lines_of.items()}
            last = len(next(iter(lines_of.values()))[0]["boxes"]) - 1  # T of that training
            limit = VALIDATIONS[1]
            groups.append(group(f"validation of {name}", samples, lines_of, last, limit=limit))
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


def with_views(args, name, lines):
    """The lines of a row that looks at the surroundings of its boxes, with these as "view"."""
    again = name in (AGAIN, AGAIN_GUARDED)
    if not again and (args.feedback == "overlay" or name == CONTROL):
        return lines
    out = []
    for line in lines:
        shown = [last_valid(line["boxes"][:t]) for t in range(1, len(line["boxes"]))]
        views = [None] + [view_of(box, args.surroundings) for box in shown]
        line = {**line, "view": views}
        if again or args.feedback == "again":  # nothing is drawn on its views
            line["seen"] = [None] * len(views)
        out.append(line)
    return out


def training_logs(folder):
    """The logs of the training phases in a folder: (name, rows) pairs, SFT's first."""
    paths = sorted(Path(folder).glob("*.jsonl"), key=lambda path: (path.stem != "sft", path))
    for path in paths:
        if not path.name.startswith("evaluate_") and path.stat().st_size:
            yield path.stem, readable(path)


# The file -----------------------------------------------------------------------------------------
def write_page(path, *, title, groups, data, tables="", curves=(), load=load_image):
    """Writes a page whole, or not at all, and returns its path.

    tables: Markdown. curves: (heading, charts) pairs. groups: of `group`. data: the folder that the
    images' paths start from; load: as load_image. Pictures are embedded, each once, as long as the
    page stays below LIMIT; to the others it refers by a path relative to its own.
    """
    if RANK:
        return path
    path = Path(path)
    numbers = {}  # an image's path -> its number
    samples = {}  # the same -> a sample that shows it
    for one in groups:
        for sample in one["samples"]:
            image = sample.pop("image")
            sample["picture"] = numbers.setdefault(image, len(numbers))
            samples.setdefault(image, {**sample, "image": image})
    headings = [{"heading": heading, "charts": charts} for heading, charts in curves]
    content = {"outcomes": OUTCOMES, "curves": headings, "groups": groups}
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    # The browser itself refuses any other script, and every address outside this folder
    policy = (
        f"default-src 'none'; img-src data: file: 'self'; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "tables": to_html(tables),
        "data": to_json(content),
        "script": script,
    }
    room = LIMIT - sum(len(part.encode("utf-8", "replace")) for part in parts.values()) - 4000
    parts["pictures"] = to_json(addresses(samples, data, path.parent, room, load))
    skeleton = (HERE / "page.html").read_text(encoding="utf-8")
    # In one pass: what is put in is not searched for further places
    text = re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], skeleton)
    write_text(path, text)
    return path


def digest(text):
    """As a content security policy names a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def to_json(value):
    """JSON that no browser takes for markup: it holds neither <, > and & nor a character beyond
    ASCII."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def finite(value):
    """The same value with None for each number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# Pictures -----------------------------------------------------------------------------------------
def addresses(samples, data, folder, room, load):
    """An address for each image of {path: a sample that shows it}: its own content while there is
    room (bytes), then a path relative to `folder`."""
    found = []
    paths = {image: relative_address(Path(data) / image, folder) for image in samples}
    room -= sum(len(path) + 4 for path in paths.values())  # an embedded one gives its own back
    for image, sample in samples.items():
        file = Path(data) / image
        try:
            kind, content = picture_file(file, sample, data, load)
        except (OSError, ValueError):  # it was there when the samples were checked
            found.append(None)
            continue
        size = len(content) * 4 // 3 + 40
        if size <= room + len(paths[image]):
            room -= size - len(paths[image])
            encoded = base64.b64encode(content).decode()
            found.append(f"data:image/{kind};base64,{encoded}")
        else:
            found.append(paths[image])
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


def relative_address(file, folder):
    try:
        path = os.path.relpath(file, folder)
    except ValueError:  # another drive of Windows
        return file.resolve().as_uri()
    return quote(Path(path).as_posix())


# Trajectories -------------------------------------------------------------------------------------
def group(name, samples, lines_of, steps, *, shown=None, limit=None):
    """A set of samples and what methods do with them, as the script takes it.

    lines_of: method -> lines in the order of the samples. steps: T of the tables. shown: the method
    that a reader sees first (default: the last one). limit: how many samples are on the page;
    strata are those of all. A sample has an id of its own, image, width, height and an expression
    or a question; maybe source, bbox and answer.
    """
    if limit and limit < len(samples):
        name = f"{name}, {limit} of {len(samples)}"
    methods = []
    for method, lines in lines_of.items():
        methods.append(method_record(method, samples, lines, steps, limit))
    records = [sample_record(sample) for sample in samples[:limit]]
    return {
        "name": name,
        "samples": records,
        "methods": methods,
        "shown": shown or list(lines_of)[-1],
        "sources": sorted({record["source"] for record in records} - {""}),
    }


def sample_record(sample):
    record = {key: sample[key] for key in ("id", "image", "width", "height")}
    record["source"] = sample.get("source", "")
    record["text"] = sample["expression"] if "expression" in sample else sample["question"]
    if "bbox" in sample:
        record["truth"] = sample["bbox"]
    if "answer" in sample:
        record["answer"] = sample["answer"]
    return record


def method_record(name, samples, lines, steps, limit):
    ordered = name != CONTROL  # the boxes of the control are samples, and no step follows another
    names, of_sample = strata_of(samples, lines)
    records = []
    for sample, line, own in zip(samples[:limit], lines, of_sample):
        records.append({"strata": own, **line_record(sample, line, steps, ordered)})
    refines = ordered and any(record["last"] > 0 for record in records)
    word = "step" if ordered else "sample"
    return {"name": name, "word": word, "refines": refines, "strata": names, "lines": records}


def strata_of(samples, lines):
    """The names of the strata, and those of each sample; none without a truth."""
    if not all("bbox" in sample for sample in samples):
        return [], [[] for _ in samples]
    first = all_ious(samples, [{"boxes": line["boxes"][:1]} for line in lines])[:, 0]
    names = []
    of_sample = [[] for _ in samples]
    for kind, parts in strata(samples, first).items():
        if kind == "source":  # has a filter of its own
            continue
        for part, mask in parts.items():
            names.append(f"{kind}: {part}")
            for own, inside in zip(of_sample, mask):
                if inside:
                    own.append(names[-1])
    return names, of_sample


def line_record(sample, line, steps, ordered):
    """A line as the script takes it. last: its step T, or its last one."""
    count = len(line["boxes"])
    last = min(steps, count - 1)
    records = [step_record(sample, line, t, ordered) for t in range(count)]
    record = {"steps": records, "last": last, "outcome": []}
    if ordered and last > 0 and all("iou" in records[t] for t in (0, last)):
        first, final = (box_iou(line["boxes"][t], sample) for t in (0, last))
        record["outcome"] = outcome(first, final)
    if "scores" in line:
        record["scores"] = line["scores"]
    return record


def step_record(sample, line, t, ordered):
    box = line["boxes"][t]
    seen = last_valid(line["boxes"][:t]) if ordered else None
    if "seen" in line:
        seen = line["seen"][t]
    name = value_of(line, "name", t)
    record = {"text": line["texts"][t]}
    if box or name != "answer":
        record["box"] = box
        if "bbox" in sample:
            record["iou"] = round(box_iou(box, sample), 4)
    for key, value in (
        ("name", name),
        ("seen", seen),
        ("view", value_of(line, "view", t)),
        ("honest", honest(sample, seen, line["texts"][t])),
        ("logprob", value_of(line, "logprob", t)),
        ("read", value_of(line, "read", t)),
    ):
        if value is not None:
            record[key] = value
    return record


def honest(sample, seen, text):
    """Whether the trace of a step says of the box that it was shown what the geometry says; None
    without either."""
    trace = trace_of(text)
    if not (seen and trace and "bbox" in sample):
        return None
    truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
    return claim_of(trace) == geometry_of(seen, truth)


def value_of(line, key, t):
    return line[key][t] if key in line else None


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


def chart(title, x, series, healthy=None, mark=None):
    """series: of `curve`. healthy: (low, high), shaded. mark: an x with a line of its own."""
    return {"title": title, "x": x, "series": series, "healthy": healthy, "mark": mark}


def curve(name, points, style, faint=False):
    """points: [x, y] or [x, y, low, high]. style: a number for colour and dashes."""
    return {"name": name, "points": points, "style": style % 7, "faint": faint}


def result_curves(results):
    """IoU per step and IoU against cost, from the numbers of an evaluation: a list of one
    (heading, charts) or none."""
    charts = []
    series = []
    for i, (name, row) in enumerate(results["table2"].items()):
        series.append(curve(name, [[t, *value] for t, value in enumerate(row["iou"])], i))
    if series:
        title = f"Mean IoU of each step, with 95 percent intervals; T = {results['steps']}"
        charts.append(chart(title, "step", series, mark=results["steps"]))
    settings = results["adaptive"].get(results["shown"], [])
    series = []
    for i, threshold in enumerate(sorted({row["threshold"] for row in settings})):
        rows = [row for row in settings if row["threshold"] == threshold]
        name = "never stop early" if threshold == 1 else f"stop above IoU {threshold}"
        series.append(curve(name, [[row["cost"], *row["mean IoU"]] for row in rows], i))
    if series:
        title = f"Mean IoU against cost, {results['shown']}"
        charts.append(chart(title, "tokens through the model, step 0 alone = 1", series))
    return [("Test samples", charts)] if charts else []


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
            if key in ("update", "epoch") or not all(type(v) in (int, float) for v in values):
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


# Markdown, as far as tables.py writes it: headings, paragraphs, lists, tables, ** and ` -----------
def to_html(markdown):
    blocks = [block.split("\n") for block in re.split(r"\n\s*\n", markdown.strip()) if block]
    return "\n".join(block_html(lines) for lines in blocks)


def block_html(lines):
    if lines[0].startswith("#"):
        return f"<h2>{inline(lines[0].lstrip('# '))}</h2>"
    if lines[0].startswith("|"):
        return table_html(lines)
    if lines[0].startswith("- "):
        items = "\n".join(lines).removeprefix("- ").split("\n- ")
        return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"
    return f"<p>{inline(' '.join(lines))}</p>"


def table_html(lines):
    head, _, *rows = [line[2:-2].split(" | ") for line in lines]
    parts = ["".join(f'<th scope="col">{inline(cell)}</th>' for cell in head)]
    parts += ["".join(f"<td>{inline(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{part}</tr>" for part in parts)
    return f'<div class="wide" tabindex="0"><table>\n{body}\n</table></div>'


def inline(text):
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
