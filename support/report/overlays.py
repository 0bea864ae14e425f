"""Does the picture matter? What an ablation shows at step t instead of box t - 1 on the image, or
instead of the view of it.

A picture takes (image, box or None) and is of the same size, as the feedback of a loop is; what is
random in it depends on the box alone, so that a run can be repeated.
"""

from dataclasses import replace

from common import draw_overlay
from support.model.views import asked_again
from support.report.statistics import AGAIN_GUARDED

import numpy as np
from PIL import ImageDraw, ImageFont

RED = (255, 0, 0)


def no_overlay(image, box):
    """The image itself."""
    return image


def random_text(image, box):
    """A copy with red letters all over it, and no box: red to look at, which says nothing."""
    rng = np.random.default_rng([2, *(box or [])])
    image = image.copy()
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(8, image.height // 8))
    letters = list("abcdefghijklmnopqrstuvwxyz")
    for _ in range(12):
        at = rng.integers(0, [image.width, image.height]).tolist()
        word = "".join(rng.choice(letters, 5))
        pen.text(at, word, fill=RED, font=font, anchor="mm")
    return image


def random_box(box):
    """A box (0..1000) that has nothing to do with this one."""
    rng = np.random.default_rng([1, *(box or [])])
    x, y = rng.integers(0, 700, 2).tolist()
    width, height = rng.integers(100, 300, 2).tolist()
    return [x, y, x + width, y + height]


def elsewhere(feedback):
    """The same feedback for a random box: what changes is whether the box is the model's own."""
    return lambda image, box: feedback(image, random_box(box))


OVERLAYS = {
    "no overlay": no_overlay,
    "random text": random_text,
    "a box elsewhere": elsewhere(draw_overlay),
}


def ablation_rows(args, rows, shown):
    """The row named `shown` and the guarded control of `rows` (rows.Row), each with the same model
    shown something else: a list of (row, that row)."""
    named = {row.name: row for row in rows}
    main, again = named[shown], named[AGAIN_GUARDED]
    instead = OVERLAYS
    if args.feedback != "overlay":
        instead = {"a view elsewhere": elsewhere(main.loop.feedback)}
    if args.feedback == "zoom":
        instead["no box drawn"] = asked_again(args.surroundings).feedback
    shown_instead = [(main, word, feedback) for word, feedback in instead.items()]
    shown_instead.append((again, "a view elsewhere", elsewhere(again.loop.feedback)))
    pairs = []
    for row, word, feedback in shown_instead:
        log = f"{row.log}_{word.replace(' ', '_')}"
        other = replace(row, name=word, log=log, loop=replace(row.loop, feedback=feedback))
        pairs.append((row, other))
    return pairs
