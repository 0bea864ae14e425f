"""Does the picture matter? What an ablation shows at step t instead of box t - 1 on the image, or
instead of the view of it."""

from dataclasses import replace

from support.model.views import asked_again

import numpy as np


def random_box(box):
    """A box (0..1000) that has nothing to do with this one, and is the same for it every time."""
    rng = np.random.default_rng([1, *(box or [])])
    x, y = rng.integers(0, 700, 2).tolist()
    width, height = rng.integers(100, 300, 2).tolist()
    return [x, y, x + width, y + height]


def elsewhere(feedback):
    """The same feedback for a random box: what changes is whether the box is the model's own."""
    return lambda image, box: feedback(image, random_box(box))


def ablation_rows(args, row):
    """The same row with the same model, shown something else: what is shown -> Row."""
    instead = {"a view elsewhere": elsewhere(row.loop.feedback)}
    if row.drawn and args.feedback == "overlay":
        instead = {
            "no overlay": lambda image, box: image,
            "a box elsewhere": elsewhere(row.loop.feedback),
        }
    elif row.drawn:
        instead["no box drawn"] = asked_again(args.surroundings).feedback
    rows = {}
    for word, feedback in instead.items():
        log = f"{row.log}_{word.replace(' ', '_')}"
        rows[word] = replace(row, name=word, log=log, loop=replace(row.loop, feedback=feedback))
    return rows
