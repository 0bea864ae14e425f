"""Pictures of trajectories, and charts of the tables.

An item is (sample, image, trajectory): the trajectory is a dict with boxes and texts, one of each
per step. A sample without "bbox" has no truth to show. Sizes are in pixels.
"""

import textwrap

from common import box_iou, denormalize_box
from support.data.samples import load_image
from support.report.claims import trace_of
from support.report.statistics import METRICS, by_change
from support.running.files import write_bytes

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUTH = (0, 170, 0)
PREDICTION = (255, 0, 0)
GREY = (70, 70, 70)
LINE = (210, 210, 210)
GAP = 14  # between panels, and at the edges
SMALL, NORMAL, BOLD = (ImageFont.load_default(size) for size in (12, 14, 16))
LEAD_RULE = "Largest gain and largest loss of the test set, in IoU from the first to the last step"


def write_figures(results, samples, trajectories, data, folder, count):
    """Writes the filmstrips, the lead picture and the charts of an evaluation as figures/*.png.

    trajectories: those of the row results["shown"], of which the first T + 1 steps are drawn;
    data: the folder that the images' paths start from; count: rows of a filmstrip. Returns
    whether there are charts, which need matplotlib.
    """
    shown = results["shown"]
    steps = results["steps"] + 1
    rows = [{key: row[key][:steps] for key in ("boxes", "texts")} for row in trajectories]
    order = by_change(samples, rows)

    def items_of(numbers):
        return [(samples[i], load_image(samples[i], data), rows[i]) for i in numbers]

    gains = items_of(order[:count])
    losses = items_of(order[: -count - 1 : -1])
    first = items_of(range(min(count, len(samples))))
    for name, rule, items in (
        ("corrections", "largest gain", gains),
        ("failures", "largest loss", losses),
        ("first", "first of the test set", first),
    ):
        write_picture(folder / f"figures/{name}.png", filmstrip(items, f"{shown}: {rule}"))
    write_picture(folder / "figures/lead.png", lead_picture(gains[0], losses[0]))
    drawn = charts(results)
    for name, figure in drawn.items():
        write_chart(folder / f"figures/{name}.png", figure)
    return bool(drawn)


def write_picture(path, picture):
    write_bytes(path, lambda file: picture.save(file, format="PNG"))


def write_chart(path, figure):
    write_bytes(path, lambda file: figure.savefig(file, format="png", dpi=150))


# Filmstrips ---------------------------------------------------------------------------------------
def filmstrip(items, title, width=320):
    """One picture: a row per item, under its expression; in it a panel per step, `width` wide, with
    IoU and trace below."""
    columns = max(len(trajectory["boxes"]) for _, _, trajectory in items)
    sheet_width = columns * (width + GAP) + GAP
    return stack([header(title, sheet_width), *(strip(item, sheet_width, width) for item in items)])


def stack(pictures):
    """Pictures of the same width, one below the other."""
    height = sum(picture.height for picture in pictures)
    sheet = Image.new("RGB", (pictures[0].width, height), "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def header(title, width):
    """The title, and which color is which."""
    picture = Image.new("RGB", (width, 34), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 8), title, fill="black", font=BOLD)
    x = GAP + 30 + pen.textlength(title, font=BOLD)
    for color, word in ((TRUTH, "ground truth"), (PREDICTION, "prediction")):
        pen.rectangle((x, 12, x + 16, 24), outline=color, width=3)
        pen.text((x + 22, 9), word, fill="black", font=NORMAL)
        x += 130
    return picture


def strip(item, sheet_width, width, *, height=None, lines=8):
    """One item as a picture as wide as the sheet, and at most `height` high: its panels, `width`
    wide, with the traces below, cut off after some lines."""
    sample, image, trajectory = item
    traces = [short_trace(text, width, lines) for text in trajectory["texts"]]
    words = textwrap.wrap(sample["expression"], (sheet_width - 2 * GAP) // 9)
    top = 16 + 20 * len(words)
    below = 52 + 15 * max(trace.count("\n") for trace in traces)
    scale = scale_to_fit(image, width, height and height - top - below)
    size = round(image.width * scale), round(image.height * scale)
    picture = Image.new("RGB", (sheet_width, top + size[1] + below), "white")
    pen = ImageDraw.Draw(picture)
    pen.line((GAP, 2, sheet_width - GAP, 2), fill=LINE)
    pen.text((GAP, 10), "\n".join(words), fill="black", font=BOLD)
    for t, (box, trace) in enumerate(zip(trajectory["boxes"], traces)):
        left = GAP + t * (width + GAP)
        picture.paste(panel(sample, image, box, size), (left, top))
        pen.text((left, top + size[1] + 6), step_line(sample, box, t), fill="black", font=NORMAL)
        pen.text((left, top + size[1] + 26), trace, fill=GREY, font=SMALL)
    return picture


def scale_to_fit(image, width, height=None):
    """The factor with which the image fits. A small one grows by a whole multiple, so that its
    pixels stay sharp, unless that leaves a third of the room empty."""
    scale = width / image.width
    if height:
        scale = min(scale, height / image.height)
    whole = int(scale)
    return whole if scale < 1.5 * whole else scale


def panel(sample, image, box, size):
    """The image at this size with the truth and the box (0..1000, or None) of a step on it."""
    whole = size[0] % image.width == 0
    picture = image.resize(size, Image.NEAREST if whole else Image.LANCZOS)
    pen = ImageDraw.Draw(picture)
    if "bbox" in sample:
        scale = size[0] / image.width
        pen.rectangle([v * scale for v in sample["bbox"]], outline=TRUTH, width=3)
    if box:
        pen.rectangle(denormalize_box(box, *size), outline=PREDICTION, width=3)
    return picture


def step_line(sample, box, t):
    """What stands below a panel: the step, and how good its box is."""
    if not box:
        return f"step {t}: no valid box"
    if "bbox" not in sample:
        return f"step {t}"
    return f"step {t}: IoU {box_iou(box, sample):.2f}"


def short_trace(text, width, lines):
    """The reasoning of a step without its tags and its box, wrapped to a width in pixels; the rest
    after some lines is cut off."""
    return "\n".join(textwrap.wrap(trace_of(text), width // 7)[:lines])


# The picture of the README ------------------------------------------------------------------------
def lead_picture(gain, loss):
    """The item with the largest gain over the one with the largest loss, 1000 x 560 pixels at most,
    under the rule by which they were chosen."""
    columns = max(len(trajectory["boxes"]) for _, _, trajectory in (gain, loss))
    width = min(270, (1000 - GAP) // columns - GAP)
    sheet_width = max(870, columns * (width + GAP) + GAP)  # the rule needs so much
    top = header(LEAD_RULE, sheet_width)
    height = (560 - top.height) // 2
    strips = [strip(item, sheet_width, width, height=height, lines=3) for item in (gain, loss)]
    return stack([top, *strips])


# Charts -------------------------------------------------------------------------------------------
def charts(results):
    """The paper's Figure 1 (bars), IoU per step, and IoU against cost, as {name: matplotlib
    figure}; {} without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    figures = {}
    for name, draw in (("bars", draw_bars), ("steps", draw_steps), ("adaptive", draw_adaptive)):
        figures[name] = Figure(figsize=(7, 4), layout="constrained")
        draw(figures[name].subplots(), results)
    return figures


def draw_bars(axes, results):
    """Table 1, best of steps, a group of bars per metric."""
    count = len(results["table1"])
    width = 0.8 / count
    for i, (name, ways) in enumerate(results["table1"].items()):
        row = next(iter(ways.values()))  # best of steps, as in the paper
        mean, low, high = np.array([row[metric] for metric in METRICS]).T
        at = np.arange(len(METRICS)) + (i - count / 2 + 0.5) * width
        error = (mean - low, high - mean)
        style = {"capsize": 2, "error_kw": {"linewidth": 0.8}}
        axes.bar(at, mean, width, yerr=error, label=name, **style)
    axes.set_xticks(range(len(METRICS)), METRICS)
    axes.set_title("Best of steps, 95 percent intervals", fontsize=10)
    axes.legend(fontsize=7, ncols=2, loc="upper right", framealpha=0.9)
    axes.set_ylim(0, 1.25)  # room for the legend


def draw_steps(axes, results):
    """Mean IoU of each step of the longest run, a line per row of Table 2."""
    for name, row in results["table2"].items():
        mean, low, high = np.array(row["iou"]).T
        axes.plot(mean, marker="o", label=name)
        axes.fill_between(range(len(mean)), low, high, alpha=0.15)
    axes.set(xlabel="step", ylabel="mean IoU")
    axes.legend(fontsize=7)


def draw_adaptive(axes, results):
    """IoU against cost of the row that is shown, a line per threshold."""
    settings = results["adaptive"].get(results["shown"], [])
    for threshold in sorted({row["threshold"] for row in settings}):
        rows = [row for row in settings if row["threshold"] == threshold]
        cost = [row["cost"] for row in rows]
        mean = [row["mean IoU"][0] for row in rows]
        label = "never stop early" if threshold == 1 else f"stop above IoU {threshold}"
        axes.plot(cost, mean, marker=".", label=label)
    axes.set(xlabel="cost (tokens through the model, step 0 alone = 1)", ylabel="mean IoU")
    axes.legend(fontsize=7)
