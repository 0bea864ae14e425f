"""A trajectory as one picture, for a README or a paper: what the model sees, and what it says.

Sizes are in pixels.
"""

import functools
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

from common import WHOLE, box_in_view, box_iou, denormalize_box, last_valid
from support.report.claims import trace_of
from support.running.errors import say_once
from support.running.files import write_bytes

from PIL import Image, ImageDraw, ImageFont

TRUTH = (0, 170, 0)
NEW_BOX = (0, 210, 230)
KEYS = {"its last box, as it is fed back": "red", "its new box": NEW_BOX, "truth": TRUTH}
GAP = 14  # between panels, and at the edges
SMALL, NORMAL, BOLD = (ImageFont.load_default(size) for size in (12, 14, 16))
FONTS = ("/usr/share/fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")


@contextmanager
def drawing(path):
    """Around what draws a picture or page: one that cannot be drawn costs a run nothing else."""
    try:
        yield
    except Exception as e:
        print(f"warning: {path} cannot be drawn ({type(e).__name__}: {e}); all else is written")


@functools.cache
def font_for(text, font):
    """The font, or the machine's first of its size, that has a sign for each letter of a text."""
    files = [file for folder in FONTS for file in sorted(Path(folder).rglob("*.[ot]t[fc]"))]
    for file in (None, *files):
        with suppress(OSError):  # a font of pictures, such as emoji, may have one size
            own = ImageFont.truetype(file, font.size) if file else font
            square = bytes(own.getmask("\U0010ffff"))  # what stands for any letter that it lacks
            if all(bytes(own.getmask(letter)) != square for letter in text if letter.isprintable()):
                return own
    say_once("warning: no font of this machine has all letters of a text; a picture has squares")
    return font


def write_strip(path, sample, image, line, loop):
    """Writes a trajectory as a PNG: a panel per step, 1000 pixels wide in all; long words are cut.
    A panel is the picture that the model gets before the step, its own last box drawn into it;
    outlined on it are the truth, where the sample has one, and the new box."""
    boxes = line["boxes"]
    width = min(320, (1000 - GAP) // len(boxes) - GAP)
    truth = None
    if "bbox" in sample:
        sizes = (sample["width"], sample["height"]) * 2
        truth = [1000 * v / size for v, size in zip(sample["bbox"], sizes)]
    panels = []
    for t, (box, text) in enumerate(zip(boxes, line["texts"])):
        shown, view = image, WHOLE
        if t > 0:
            last_box = last_valid(boxes[:t])
            shown, view = loop.feedback(image, last_box), loop.view(last_box)
        outlined = [(TRUTH, truth), (NEW_BOX, box)]
        outlined = [(color, box_in_view(own, view)) for color, own in outlined if own]
        caption = f"step {t}" if box else f"step {t}: no valid box"
        if box and truth:
            caption += f": IoU {box_iou(box, sample):.2f}"
        trace = textwrap.wrap(trace_of(text), width // 7)[:5]
        panels.append((panel(shown, outlined, width, 300), caption, "\n".join(trace)))
    keys = {word: color for word, color in KEYS.items() if truth or color != TRUTH}
    sheet = together(sample["expression"], panels, width, keys)
    write_bytes(path, lambda file: sheet.save(file, format="PNG"))


def together(words, panels, width, keys):
    """(picture, caption, text) triples side by side, under the words and what each color means."""
    sheet_width = max(700, len(panels) * (width + GAP) + GAP)
    words = textwrap.wrap(words, sheet_width // 9)[:4]
    top = 50 + 20 * len(words)
    below = top + max(picture.height for picture, _, _ in panels)
    sheet = Image.new("RGB", (sheet_width, below + 120), "white")
    pen = ImageDraw.Draw(sheet)
    x = GAP
    for word, color in keys.items():
        pen.rectangle((x, 12, x + 16, 24), outline=color, width=3)
        pen.text((x + 22, 9), word, fill="black", font=NORMAL)
        x += 52 + pen.textlength(word, font=NORMAL)
    words = "\n".join(words)
    pen.text((GAP, 40), words, fill="black", font=font_for(words, BOLD))
    for i, (picture, caption, text) in enumerate(panels):
        left = GAP + i * (width + GAP)
        sheet.paste(picture, (left, top))
        pen.text((left, below + 6), caption, fill="black", font=NORMAL)
        pen.text((left, below + 26), text, fill=(70, 70, 70), font=font_for(text, SMALL))
    return sheet


def panel(image, boxes, width, height):
    """The image, as large as fits, with outlined boxes on it: (color, box in 0..1000)."""
    scale = min(width / image.width, height / image.height)
    size = [max(1, round(side * scale)) for side in image.size]
    picture = image.resize(size, Image.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for color, box in boxes:
        pen.rectangle(denormalize_box(box, *size), outline=color, width=3)
    return picture
