"""A page of charts, trajectories and tables: one file for a browser, without a server, a network or
a library.

Charts, verdicts and tables are drawn here, as HTML whose words are escaped. Trajectories are JSON,
which the script (page.js) sets as text.

A line is one of a log (rows.log_line): "boxes" and "texts", one of each per step, a box in 0..1000
or None. It may have "name", what each step is called instead of "step t" (an "answer" has no box to
miss), "view", the part of the image that each step was shown, which else follows from the row's
loop, "words", which stand beside it, and "ends", two numbers that make its gain, else the IoU of
the first and the last step.
"""

import base64
import io
import json
import math
import re
from html import escape
from pathlib import Path

from common import WHOLE, box_iou, last_valid, normalize_box
from support.data.samples import load_image
from support.model.views import loop_of
from support.report.claims import claim_of, geometry_of, trace_of
from support.report.health import HEALTHY
from support.report.pictures import drawing, write_strip
from support.report.rows import Row, log_line
from support.report.statistics import RIGHT, SAME, by_change, main_row, signed
from support.report.tables import FINDINGS, cell, report, results_of_run, summary, write_results
from support.running.files import parse, read_jsonl, write_jsonl, write_text
from support.running.processes import RANK, gather, minutes

from PIL import Image

HERE = Path(__file__).parent
SAMPLES = 1000  # of a group, at most
ABOUT = (
    "IoU: the area that two boxes share over the area that they cover; Acc@0.5: share of boxes "
    "with 0.5 or more, the right ones. Base: the model untrained; single-shot: one answer; IVT: it "
    "sees its box drawn, and names another; zoomed and guarded: it sees the surroundings of its "
    "box enlarged, and a far box is refused; SFT: trained on given texts; GRPO: then by reward. T: "
    "the last step; [low, high]: 95 percent interval."
)
SIGNS = {"holds": "✓", "DOES NOT HOLD": "✗", "NOT SETTLED": "?"}
OPEN = ("Table 1", "Table 2", "Answers and boxes")  # what the papers have too


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
    best = by_change(samples, lines_of[shown])[0]
    lead, page = args.out / "figures/lead.png", args.out / "report.html"
    with drawing(lead):
        image = load_image(samples[best], args.out / "data")
        write_strip(lead, samples[best], image, lines_of[shown][best], shown.loop)
    with drawing(page):
        write_evaluation(args.out, args, results, samples, lines_of)
    places = f"tables in {args.out / 'results.md'}, trajectories to look at in {page}"
    print(f"{places}, {minutes(start)}")


def write_evaluation(folder, args, results, samples, lines_of):
    """report.html of an evaluation."""
    write_page(
        folder,
        title=headline(folder.name, results),
        chart=result_chart(results),
        tables=report(results),
        groups=[group("test", samples, lines_of, args.steps, shown=results["shown"])],
        data=args.out / "data",
    )


def headline(name, results):
    """What came out of an evaluation: the best row, and what the loop does in the one shown."""
    words = f"{name}, {results['n']} test samples"
    for best, ious in [*ious_by_step(results).items()][:1]:
        words += f": best is “{best}”, mean IoU {ious[-1][1]:.3f}"
    if row := results["table2"].get(results["shown"]):
        words += f". {results['shown']} looks again {results['steps']} times: from "
        words += f"{row['first'][0]:.3f} to {row['last'][0]:.3f}, by {signed(row['delta'])}"
    return words


def write_validation(args, name, update, samples, trajectories, tokenizer):
    """report.html of a training that runs: its curves so far, and the trajectories of this
    validation. samples, trajectories: this process's share."""
    guarded = args.guard == "on"
    pairs = zip(samples, trajectories)
    lines = gather([log_line(sample, [t], tokenizer, guarded) for sample, t in pairs])
    samples = gather(samples)
    if RANK:
        return
    file = args.out / f"log/validation/{name}.jsonl"  # beside the last one, to see what changed
    if update == 0:
        write_jsonl(file, lines)
    lines_of = {}
    first = {0: read_jsonl(file, "python grpo.py")} if file.exists() else {}
    for number, own in {**first, update: lines}.items():
        loop, drawn = loop_of(args), args.feedback != "again"
        lines_of[Row(f"{name}, update {number}", loop=loop, drawn=drawn)] = own
    with drawing(args.out / "report.html"):
        write_page(
            args.out,
            title=f"{args.out.name}: {name} trains, after {update} of {args.updates} updates, on "
            f"{len(samples)} validation samples",
            chart=log_charts(args.out / f"log/{name}.jsonl")["val_iou"],
            groups=[group("validation", samples, lines_of, args.steps)],
            data=args.out / "data",
        )


# The file -----------------------------------------------------------------------------------------
def write_page(folder, *, title, groups, data, chart, about=ABOUT, tables=()):
    """Writes report.html to a folder, with the curves of its log/.

    title, about: a sentence, and what its words mean. groups: of `group`; the first one's gains
    and losses are shown first. chart: of `chart`. tables: sections, as of tables.report. data: the
    folder that the images' paths start from.
    """
    if RANK:
        return
    verdicts, folded = [], []
    for heading, charts in log_curves(folder / "log"):
        body = f'<div class="charts">{"".join(charts)}</div>'
        folded.append(fold(heading, body, is_open=not tables))
    for name, text, head, rows in tables:
        text = f"<p><small>{escape(text)}</small></p>"
        if name == FINDINGS:
            verdicts = [f"<h2>{name}</h2>", *(said(*row) for row in rows), text]
        else:
            folded.append(fold(name, text + table(head, rows), is_open=name in OPEN))
    samples = {sample["image"]: sample for one in groups for sample in one["samples"]}
    pictures = {image: embedded(sample, data) for image, sample in samples.items()}
    content = json.dumps({"groups": groups, "pictures": pictures}, allow_nan=False)
    parts = {
        "title": escape(title),
        "about": escape(about),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "chart": chart,
        "verdicts": "".join(verdicts),
        "folded": "".join(folded),
        "data": content.replace("<", "\\u003c"),  # nothing in it ends the script
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
    }
    skeleton = (HERE / "page.html").read_text(encoding="utf-8")
    # In one pass: what is put in is not searched for further places
    page = re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], skeleton)
    write_text(folder / "report.html", page)


def said(finding, words):
    verdict, sentence = finding.split(": ", 1)
    sign = f"<b>{SIGNS[verdict]} {verdict.lower()}:</b>"
    return f"<p>{sign} {escape(sentence)} <small>{escape(words)}</small></p>"


def fold(title, body, is_open):
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{body}</details>"


def table(head, rows):
    lines = ""
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        line = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
        lines += f"<tr>{line}</tr>"
    return f'<div class="wide" tabindex="0"><table>{lines}</table></div>'


# Pictures -----------------------------------------------------------------------------------------
def embedded(sample, data):
    """A sample's picture in an address, as the model saw it, of 512 pixels at most; a plain, small
    PNG file as it is, which is quicker; "" where it cannot be read."""
    file, kind = Path(data) / sample["image"], "png"
    try:
        with Image.open(file) as image:
            plain = (image.format, image.mode, image.info) == ("PNG", "RGB", {})
            small = max(image.size) <= 512
        if plain and small:
            content = file.read_bytes()
        else:
            image, buffer, kind = load_image(sample, data), io.BytesIO(), "webp"
            image.thumbnail((512, 512))
            image.save(buffer, kind)
            content = buffer.getvalue()
    except (OSError, ValueError):  # it was there when the samples were checked
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Trajectories -------------------------------------------------------------------------------------
def group(name, samples, lines_of, steps, *, shown=None):
    """A set of samples and what methods do with them, as the script takes it; at most SAMPLES, of
    those that the shown method changes most.

    lines_of: Row -> lines in the order of the samples. steps: T, the last step that is on the page.
    shown: the method that a reader sees first (default: the last one). A sample has an id of its
    own, image, width, height and an expression or a question; maybe source, bbox and answer.
    """
    records = {}
    for row, lines in lines_of.items():
        records[row.name] = [line_record(row, *pair, steps) for pair in zip(samples, lines)]
    shown = shown or list(records)[-1]
    change = [abs(record.get("gain", 0)) for record in records[shown]]
    kept = sorted(sorted(range(len(samples)), key=lambda i: -change[i])[:SAMPLES])
    if len(kept) < len(samples):
        name = f"{name}, the {SAMPLES} of {len(samples)} that change most"
    methods = [{"name": name, "lines": [own[i] for i in kept]} for name, own in records.items()]
    samples = [sample_record(samples[i]) for i in kept]
    return {"name": name, "samples": samples, "methods": methods, "shown": shown}


def sample_record(sample):
    """A sample as the script takes it. truth: its bbox in 0..1000."""
    record = {key: sample[key] for key in ("id", "image", "width", "height")}
    record["text"] = sample["expression"] if "expression" in sample else sample["question"]
    sizes = (sample["width"], sample["height"])
    facts = [f"id {sample['id']}", sample.get("source"), "{} x {} pixels".format(*sizes)]
    if "answer" in sample:
        facts.append(f"true answer: {sample['answer']}")
    record["facts"] = " · ".join(filter(None, facts))
    if "bbox" in sample:
        record["truth"] = [round(1000 * v / size, 1) for v, size in zip(sample["bbox"], sizes * 2)]
        record["facts"] += " · true box {}, {}, {}, {} in 0..1000".format(*record["truth"])
    return record


def line_record(row, sample, line, steps):
    """A line of a row as the script takes it. first: the IoU at the first step. gain: that at the
    last step minus it, where both are steps of one trajectory, or of the line's own "ends"."""
    count = min(steps + 1, len(line["boxes"]))
    records = [step_record(row, sample, line, t) for t in range(count)]
    ious = []
    if "bbox" in sample and "name" not in line:
        ious = [box_iou(box, sample) for box in line["boxes"][:count]]
    joined = (" → " if row.ordered else ", ").join(f"{value:.2f}" for value in ious)
    words = [line.get("words") or joined and f"IoU {joined}"]
    record = {"steps": records, "outcome": [], "first": ious[0] if ious else 0}
    ends = (ious[0], ious[-1]) if row.ordered and len(ious) > 1 else line.get("ends")
    if ends:
        record["gain"] = ends[1] - ends[0]
        record["outcome"] = outcome(*ends)
    record["words"] = ", ".join([*words, *record["outcome"]])
    return record


def step_record(row, sample, line, t):
    """A step as the script takes it. seen: the box that was drawn on the picture before it; view:
    the part of the image that was shown, if it was not all of it."""
    box = line["boxes"][t]
    name = f"step {t}" if row.ordered else f"sample {t}"
    if "name" in line:
        name = line["name"][t]
    if box is None and name != "answer":
        name += ": no valid box"
    elif box and "bbox" in sample:
        name += f": IoU {box_iou(box, sample):.2f}"
    last_box = last_valid(line["boxes"][:t]) if row.ordered else None
    if last_box and row.drawn and "bbox" in sample and (trace := trace_of(line["texts"][t])):
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        name += f'\nbox before: trace says "{claim_of(trace) or "nothing"}", '
        name += f'truth "{geometry_of(last_box, truth)}", IoU {box_iou(last_box, sample):.2f}'
    record = {"text": line["texts"][t], "name": name, "box": box}
    view = row.loop.view(last_box) if row.loop else WHOLE
    if "view" in line:
        view = line["view"][t]
    if view != WHOLE:
        record["view"] = view
    if last_box and row.drawn:
        record["seen"] = last_box
    return record


def outcome(first, final):
    """What happened from the first to the last IoU, as in Table 2, and whether it made a wrong box
    (below RIGHT) right or a right one wrong."""
    change = final - first
    words = ["improved" if change > SAME else "degraded" if change < -SAME else "stagnated"]
    if first < RIGHT <= final:
        words.append("corrected")
    if final < RIGHT <= first:
        words.append("spoilt")
    return words


# Charts -------------------------------------------------------------------------------------------
STYLES = 8  # of lines, in page.css
LEFT, END, TOP, BOTTOM = 40, 350, 8, 170  # of the plot, in a picture of 360 x 200
UNDRAWN = ("epoch", "val_rewards", "change")  # of a log: no curves over the updates
TITLES = {  # a metric of the logs -> what stands over its chart, where its name does not say it
    "iou": "Mean IoU of each step, sampled",
    "val_iou": "Mean IoU of each step, sampled, on the validation samples",
    "val_reward": "Mean reward, sampled, on the validation samples",
    "reward_std": "Deviation of the reward within a group",
    "no_signal": "Share of groups whose rewards are all equal",
    "valid": "Share of steps with a valid box",
    "sampler_gap": "Gap in log pi between what sampled and what is trained",
}


def ious_by_step(results):
    """Each row's name -> its points [step, mean IoU, low, high], the best at its last one first."""
    series = {}
    for name, ways in results["table1"].items():
        if name in results["table2"]:
            ious = results["table2"][name]["iou"]
            series[name] = [[t, *value] for t, value in enumerate(ious)]
        elif "its only box" in ways:
            series[name] = [[0, *ways["its only box"]["mean IoU"]]]
    return dict(sorted(series.items(), key=lambda row: -row[1][-1][1]))


def result_chart(results):
    title = "Mean IoU by step, with 95 percent intervals; the best at the last step first"
    series = ious_by_step(results)
    return chart(title, "step", series) if series else ""


def log_curves(folder):
    """The charts of every training log in a folder, SFT's first: (heading, charts) pairs."""
    paths = sorted(Path(folder).glob("*.jsonl"), key=lambda path: (path.stem != "sft", path))
    charts = {path.stem: log_charts(path) for path in paths if "evaluate_" not in path.name}
    return [(f"Training: {name}", own.values()) for name, own in charts.items() if own]


def log_charts(path):
    """A chart for each metric of a log: metric -> HTML. A list has a line for each step."""
    metrics = {}  # name -> the name of a line -> its points [update, value]
    for line in path.read_bytes().split(b"\n"):
        try:
            row = parse(line)  # a killed phase may leave half of one
            update = row.pop("update")
        except (ValueError, LookupError, AttributeError, TypeError):
            continue
        for key, value in row.items():
            lines = {key: value}
            if isinstance(value, list):
                lines = {f"step {t}": v for t, v in enumerate(value)}
            for name, v in lines.items():
                if type(v) in (int, float) and math.isfinite(v) and key not in UNDRAWN:
                    metrics.setdefault(key, {}).setdefault(name, []).append([update, v])
    charts = {}
    for key, series in metrics.items():
        charts[key] = chart(TITLES.get(key, key), "update", series, HEALTHY.get(key, ())[:2])
    return charts


def chart(title, x, series, healthy=()):
    """A figure, as HTML. x: the name of the axis. series: the name of a line -> its points [x, y]
    or [x, y, low, high]; its last value stands in the key. healthy: (low, high), shaded."""
    points = sum(series.values(), [])
    first, last = span([point[0] for point in points])
    low, high = span([value for point in points for value in point[1:]])

    def to_x(value):
        return round(LEFT + (value - first) / (last - first) * (END - LEFT), 1)

    def to_y(value):
        return round(BOTTOM - (min(high, max(low, value)) - low) / (high - low) * (BOTTOM - TOP), 1)

    marks = [f'<text class="end" x="{END}" y="{BOTTOM + 27}">{escape(x)}</text>']
    keys = []
    if healthy:
        bottom, top = map(to_y, healthy)
        marks.append(f'<path class="healthy" d="M{LEFT} {top}H{END}V{bottom}H{LEFT}Z"/>')
        keys.append("<li>shaded: healthy, {} to {}</li>".format(*healthy))
    for value in ticks(low, high):
        marks.append(f'<path class="grid" d="M{LEFT} {to_y(value)}H{END}"/>')
        marks.append(f'<text class="end" x="{LEFT - 5}" y="{to_y(value) + 3}">{value:.4g}</text>')
    for value in ticks(first, last, least=1):
        marks.append(f'<text class="middle" x="{to_x(value)}" y="{BOTTOM + 14}">{value:.4g}</text>')
    end = to_x(max(point[0] for point in points))
    for i, (name, own) in enumerate(series.items()):
        aside = 2 * i if len(own[0]) > 2 else 0  # intervals would hide each other
        places = [(to_x(point[0]) + aside, *map(to_y, point[1:])) for point in own]
        marks += [f'<path class="{kind} s{i % STYLES}" d="{d}"/>' for kind, d in paths(places, end)]
        sign = f'<svg viewBox="0 0 30 10"><path class="line s{i % STYLES}" d="M0 5H30"/></svg>'
        value = cell(own[-1][1:]) if len(own[0]) > 2 else f"{own[-1][1]:.4g}"
        keys.append(f"<li>{sign} {escape(name)} <b>{value}</b></li>")
    plot = f'<svg viewBox="0 0 360 200" aria-hidden="true">{"".join(marks)}</svg>'
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure class="chart">{caption}{plot}<ul>{"".join(keys)}</ul></figure>'


def paths(places, end):
    """The line, the dots and the intervals through places (x, y) or (x, y, low, high) of a plot, or
    at the height of a single place, to compare with, as far as `end`: (kind, path) pairs."""
    line = "M" + "L".join(f"{x} {y}" for x, y, *_ in places)
    yield "line", line + f"H{end}" * (len(places) == 1)
    if len(places) < 20:
        yield "dot", "".join(f"M{x} {y}h0" for x, y, *_ in places)
    yield "bar", "".join(f"M{x} {ends[0]}V{ends[1]}" for x, _, *ends in places if ends)


def span(values):
    """From the lowest to the highest number, and some room."""
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 0.1
    return low - room, high + room


def ticks(low, high, least=0):
    """About five round numbers between two, `least` apart."""
    rough = max((high - low) / 6, least)
    power = 10 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
