"""Pictures of trajectories, for a README or a paper.

A strip is a line of words over panels side by side: (picture, caption, text) triples. Sizes are in
pixels.
"""

import textwrap

from common import WHOLE, box_in_view, box_iou, denormalize_box, last_valid
from support.data.samples import load_image
from support.report.claims import trace_of
from support.report.statistics import by_change
from support.running.files import write_bytes

from PIL import Image, ImageDraw, ImageFont

TRUTH = (0, 170, 0)
BOX = (255, 0, 0)
NEW_BOX = (0, 210, 230)  # beside the red box that is fed back
GREY = (70, 70, 70)
LINE = (210, 210, 210)
GAP = 14  # between panels, and at the edges
SMALL, NORMAL, BOLD = (ImageFont.load_default(size) for size in (12, 14, 16))
KEYS = {"truth": TRUTH, "prediction": BOX}
ROWS = 6  # of a filmstrip


def write_figures(row, samples, lines, steps, data, folder):
    """Writes the filmstrips of a row (rows.Row) of an evaluation, and of a loop of ours the lead
    picture, as figures/*.png.

    steps: T of what is drawn; data: the folder that the images' paths start from.
    """
    lines = [{key: line[key][: steps + 1] for key in ("boxes", "texts")} for line in lines]
    order = by_change(samples, lines)
    for name, rule, numbers in (
        ("corrections", "largest gain", order[:ROWS]),
        ("failures", "largest loss", order[: -ROWS - 1 : -1]),
        ("first", "first of the test set", range(len(samples))[:ROWS]),
    ):
        items = [(samples[i], load_image(samples[i], data), lines[i]) for i in numbers]
        write_picture(folder / f"figures/{name}.png", filmstrip(items, f"{row.name}: {rule}"))
    if row.loop:
        sample = samples[order[0]]
        lead = lead_picture(sample, load_image(sample, data), lines[order[0]], row.loop)
        write_picture(folder / "figures/lead.png", lead)


def write_picture(path, picture):
    write_bytes(path, lambda file: picture.save(file, format="PNG"))


# Strips -------------------------------------------------------------------------------------------
def filmstrip(items, title):
    """A strip per item, (sample, image, line of a log): a panel per step, with IoU and trace. A
    sample without "bbox" has no truth to show."""
    strips = []
    for sample, image, line in items:
        panels = []
        for t, (box, text) in enumerate(zip(line["boxes"], line["texts"])):
            picture = panel(image, [(TRUTH, truth_of(sample)), (BOX, box)])
            panels.append((picture, step_line(sample, box, t), trace_of(text)))
        strips.append(strip(sample["expression"], panels))
    return stack([header(title, KEYS, max(strip.width for strip in strips)), *strips])


def stack(pictures):
    """Pictures one below the other."""
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    sheet = Image.new("RGB", size, "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def header(title, keys, width):
    """The title, and which color is which: word -> color."""
    picture = Image.new("RGB", (width, 34), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 8), title, fill="black", font=BOLD)
    x = GAP + 30 + pen.textlength(title, font=BOLD)
    for word, color in keys.items():
        pen.rectangle((x, 12, x + 16, 24), outline=color, width=3)
        pen.text((x + 22, 9), word, fill="black", font=NORMAL)
        x += 52 + pen.textlength(word, font=NORMAL)
    return picture


def strip(words, panels, width=320, lines=8):
    """Panels side by side, `width` for each, under their words; of long words and texts the rest is
    cut off."""
    sheet_width = len(panels) * (width + GAP) + GAP
    words = textwrap.wrap(words, (sheet_width - 2 * GAP) // 9)[:4]
    texts = [textwrap.wrap(text, width // 7)[:lines] for _, _, text in panels]
    top = 16 + 20 * len(words)
    below = top + max(picture.height for picture, _, _ in panels)
    height = below + 38 + 15 * max(map(len, texts))
    sheet = Image.new("RGB", (sheet_width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.line((GAP, 2, sheet_width - GAP, 2), fill=LINE)
    pen.text((GAP, 10), "\n".join(words), fill="black", font=BOLD)
    for i, (picture, caption, _) in enumerate(panels):
        left = GAP + i * (width + GAP)
        sheet.paste(picture, (left, top))
        pen.text((left, below + 6), caption, fill="black", font=NORMAL)
        pen.text((left, below + 26), "\n".join(texts[i]), fill=GREY, font=SMALL)
    return sheet


def panel(image, boxes, width=320, height=10_000):
    """The image, as large as fits, with outlined boxes on it: (color, box in 0..1000 or None).

    A small one grows by a whole multiple, so that its pixels stay sharp, unless that leaves a third
    of the room empty.
    """
    scale = min(width / image.width, height / image.height)
    whole = int(scale)
    if whole and scale < 1.5 * whole:
        scale = whole
    size = [max(1, round(side * scale)) for side in image.size]
    picture = image.resize(size, Image.NEAREST if scale == whole else Image.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for color, box in boxes:
        if box:
            pen.rectangle(denormalize_box(box, *size), outline=color, width=3)
    return picture


def truth_of(sample):
    """The true box in 0..1000, not rounded; None without one."""
    if "bbox" not in sample:
        return None
    sizes = (sample["width"], sample["height"]) * 2
    return [1000 * v / size for v, size in zip(sample["bbox"], sizes)]


def step_line(sample, box, t):
    """What stands below a panel: the step, and how good its box is."""
    if not box:
        return f"step {t}: no valid box"
    if "bbox" not in sample:
        return f"step {t}"
    return f"step {t}: IoU {box_iou(box, sample):.2f}"


# The picture of the README ------------------------------------------------------------------------
def lead_picture(sample, image, line, loop):
    """One trajectory as the model sees it, 1000 x 560 pixels at most: before each step its own last
    box, drawn into the picture that it gets; outlined, the truth and the new box."""
    boxes = line["boxes"]
    width = min(320, (1000 - GAP) // len(boxes) - GAP)
    panels = []
    for t, (box, text) in enumerate(zip(boxes, line["texts"])):
        shown, view = image, WHOLE
        if t > 0:
            last_box = last_valid(boxes[:t])
            shown, view = loop.feedback(image, last_box), loop.view(last_box)
        boxes_shown = [(TRUTH, truth_of(sample)), (NEW_BOX, box)]
        boxes_shown = [(color, own and box_in_view(own, view)) for color, own in boxes_shown]
        picture = panel(shown, boxes_shown, width, 300)
        panels.append((picture, step_line(sample, box, t), trace_of(text)))
    keys = {"its last box, as it is fed back": BOX, "its new box": NEW_BOX, "truth": TRUTH}
    top = header("What the model sees.", keys, 700)
    return stack([top, strip(sample["expression"], panels, width, lines=5)])
