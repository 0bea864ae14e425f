"""The toy's world: scenes of simple objects with small marks, and expressions that refer to them.

A scene is drawn at 320 x 320 pixels and the model sees it reduced to 96 x 96 (its image processor
brings every image to that area). So a view or a crop of the scene, enlarged to 320 x 320, shows
what the whole does not: the marks.

A picture is a dict {"image": PIL, "objects": list, "frames": list, "zoom": how much the scene is
enlarged}. An object is a dict with "kind", "color", "size", "mark" (words) and "box" (0..1000
relative to the picture, cut at its edges); "seen" is the share of it that lies within the
picture. A frame is (color word, box), a coloured rectangle that someone drew on the picture.
"""

import math
import random
from functools import partial
from pathlib import Path

from common import iou, normalize_box
from support.running.files import write_bytes

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE, SEEN = 320, 96  # pixels: of a scene's file, and of what the model sees of it
KINDS = ("circle", "square", "triangle", "star")
# Colors that stay apart under a translucent red, and frames that no object has the color of
COLORS = {
    "yellow": (245, 220, 60),
    "green": (40, 160, 60),
    "blue": (45, 80, 225),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
}
# Longer side in pixels; the gap keeps the words apart
SIZES = {"small": (58, 74), "large": (90, 116)}
MARKS = ("dot", "ring", "cross", "bar", "post")
MARK = 7  # pixels across: 2 of those that the model sees in a whole scene

# The three sources mirror the paper's: plain attributes (RefCOCOg), same-kind distractors that
# only a superlative tells apart (Ref-Adv), relations to another object (Ref-L4).
SOURCES = ("attributes", "distractors", "relations")
MARGIN = 45  # of 1000: by how much a place must differ, so that no expression hangs on one pixel
FINE = 12  # the same, in the samples: an expression that is hard to follow


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


SUPERLATIVES = {
    "leftmost": lambda box: -center(box)[0],
    "rightmost": lambda box: center(box)[0],
    "topmost": lambda box: -center(box)[1],
    "bottommost": lambda box: center(box)[1],
    "largest": area,
    "smallest": lambda box: -area(box),
}
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}


# Scenes -------------------------------------------------------------------------------------------
def make_object(rng, kind=None, color=None):
    """An object without a place; its "wh" is (width, height) in pixels."""
    size = rng.choice(list(SIZES))
    long = rng.uniform(*SIZES[size])
    short = long * rng.uniform(0.75, 1.0)
    return {
        "kind": kind or rng.choice(KINDS),
        "color": color or rng.choice(list(COLORS)),
        "size": size,
        "mark": rng.choice(MARKS),
        "wh": (long, short) if rng.random() < 0.5 else (short, long),
    }


def place_objects(rng, objects):
    """The objects with a bbox (pixels) each, 6 pixels apart; None where no room is left."""
    placed = []
    for o in sorted(objects, key=lambda o: -max(o["wh"])):
        w, h = o["wh"]
        for _ in range(40):
            x = rng.uniform(4, SIDE - 4 - w)
            y = rng.uniform(4, SIDE - 4 - h)
            grown = [x - 6, y - 6, x + w + 6, y + h + 6]
            if all(iou(grown, p["bbox"]) == 0 for p in placed):
                break
        else:
            return None
        bbox = [x, y, x + w, y + h]
        placed.append({**o, "bbox": bbox, "box": normalize_box(bbox, SIDE, SIDE), "seen": 1.0})
    return placed


def make_objects(rng, low=2, high=5, distractors=None, same=None):
    """low to high placed objects, of which `same` share kind and color (None: 2 or 3 with
    `distractors`, and of those None: one time in two)."""
    while True:
        objects = [make_object(rng) for _ in range(rng.randint(low, high))]
        alike = same or 1
        if not same and (distractors or distractors is None and rng.random() < 0.5):
            alike = min(len(objects), rng.choice((2, 3)))
        for i in range(1, alike):
            objects[i] = make_object(rng, objects[0]["kind"], objects[0]["color"])
        placed = place_objects(rng, objects)
        if placed:
            rng.shuffle(placed)
            return placed


def outline(kind, x1, y1, x2, y2):
    """The corners of a shape that fills its box."""
    if kind == "square":
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind == "triangle":
        return [((x1 + x2) / 2, y1), (x2, y2), (x1, y2)]
    star = []
    for i in range(10):
        radius, angle = (1, 0.45)[i % 2], -math.pi / 2 + i * math.pi / 5
        star.append((radius * math.cos(angle), radius * math.sin(angle)))
    left, right = min(p[0] for p in star), max(p[0] for p in star)
    top, bottom = min(p[1] for p in star), max(p[1] for p in star)
    w, h = (x2 - x1) / (right - left), (y2 - y1) / (bottom - top)
    return [(x1 + (x - left) * w, y1 + (y - top) * h) for x, y in star]


def draw_mark(draw, mark, x, y, ink):
    """A mark of MARK pixels about (x, y); all of about one area: none is darker from afar."""
    r = MARK / 2
    if mark == "dot":
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=ink)
    elif mark == "ring":
        draw.ellipse([x - r, y - r, x + r, y + r], outline=ink, width=1)
    elif mark == "cross":
        draw.line([x - r, y - r, x + r, y + r], fill=ink, width=2)
        draw.line([x - r, y + r, x + r, y - r], fill=ink, width=2)
    elif mark == "bar":
        draw.rectangle([x - r, y - 0.7, x + r, y + 0.7], fill=ink)
    else:
        draw.rectangle([x - 0.7, y - r, x + 0.7, y + r], fill=ink)


def draw_scene(rng, objects):
    """A picture, without frames: the objects on a grey ground that is brighter on one side."""
    level = rng.randint(95, 150)
    tint = [rng.randint(-8, 8) for _ in range(3)]
    slope = rng.uniform(-20, 20)
    shade = np.linspace(-slope, slope, SIDE)[:, None]
    line = (level + shade + tint).astype(np.uint8)  # [SIDE, 3]: brighter from end to end
    line = line[:, None] if rng.random() < 0.5 else line[None]
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(line, (SIDE, SIDE, 3))))
    draw = ImageDraw.Draw(image)
    for o in objects:
        corners = o["bbox"]
        color = tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in COLORS[o["color"]])
        if o["kind"] == "circle":
            draw.ellipse(corners, fill=color)
        else:
            draw.polygon(outline(o["kind"], *corners), fill=color)
        x, y = center(corners)
        if o["kind"] == "triangle":  # its middle is lower than its box's
            y += 0.12 * (corners[3] - corners[1])
        light = sum(color) < 300
        ink = tuple(round(c * 0.4 + 140) if light else round(c * 0.4) for c in color)
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-2, 2)
        draw_mark(draw, o["mark"], x, y, ink)
        o["spot"] = x, y
    return {"image": image, "objects": objects, "frames": [], "zoom": 1.0, "corner": (0, 0)}


def make_scene(rng, low=2, high=5, distractors=None):
    """A picture of a new scene, like those that the base learnt on."""
    return draw_scene(rng, make_objects(rng, low, high, distractors))


# Expressions: each fits one object of the picture and no other ------------------------------------
def along(box, anchor, direction):
    """How far a box lies from an anchor along `direction`, and across it, between centres."""
    dx, dy = (a - b for a, b in zip(center(box), center(anchor)))
    return dx * direction[0] + dy * direction[1], abs(dx * direction[1]) + abs(dy * direction[0])


def alike(objects, o, keys):
    """The objects that have the same words as `o` under these keys, such as ("color", "kind")."""
    return [other for other in objects if all(other[key] == o[key] for key in keys)]


def unique(objects, o, options):
    """The options, tuples of keys, under which no other object has the words of `o`."""
    return [keys for keys in options if len(alike(objects, o, keys)) == 1]


def name_of(o, keys):
    return " ".join(o[key] for key in keys)


def best(objects, superlative, fine=False):
    """The object that a superlative names among several; None where two are too close to call.
    fine: the lead may be a quarter as large, one pixel of those that the model sees."""
    key = SUPERLATIVES[superlative]
    first, second = sorted(objects, key=lambda o: key(o["box"]), reverse=True)[:2]
    lead = key(first["box"]) - key(second["box"])
    margin = FINE if fine else MARGIN
    if not superlative.endswith("most"):
        margin = (0.1 if fine else 0.4) * min(area(first["box"]), area(second["box"]))
    return first if lead >= margin else None


def refer(rng, objects, source, sizes=True, fine=False):
    """(expression, object) in the style of `source`, or None where the object that was drawn cannot
    be told apart so. sizes: whether "small" and "large" may be said: not of an enlarged view. fine:
    as in `best`."""
    if not objects:
        return None
    target = rng.choice(objects)
    if target["seen"] < 0.7:
        return None
    sized = [("size", "color", "kind")] * sizes
    if source == "attributes":
        options = unique(objects, target, [("color", "kind"), *sized])
        if not options:
            return None
        keys = options[0] if rng.random() < 0.75 else options[-1]
        return f"the {name_of(target, keys)}", target
    if source == "distractors":
        keys = rng.choice((("kind",), ("color", "kind"), ("color", "kind")))
        same = alike(objects, target, keys)
        options = [s for s in SUPERLATIVES if len(same) > 1 and best(same, s, fine) is target]
        if not options:
            return None
        return f"the {rng.choice(options)} {name_of(target, keys)}", target
    if len(objects) < 2:
        return None
    anchor = rng.choice([o for o in objects if o is not target])
    names = unique(objects, anchor, [("kind",), ("color", "kind"), *sized])
    keys = rng.choice([("kind",), ("color", "kind")] + [("size", "kind")] * sizes)
    others = [o for o in alike(objects, target, keys) if o is not target and o is not anchor]
    options = []
    for phrase, direction in RELATIONS.items():
        far, across = along(target["box"], anchor["box"], direction)
        alone = all(along(o["box"], anchor["box"], direction)[0] <= -MARGIN for o in others)
        if far >= max(MARGIN, 1.2 * across) and alone:
            options.append(phrase)
    if not (names and options):
        return None
    name = name_of(anchor, rng.choice(names))
    return f"the {name_of(target, keys)} that is {rng.choice(options)} the {name}", target


def refer_somehow(rng, picture, sources=SOURCES, tries=12):
    """Like `refer`, of a picture, with a source by chance, tried several times."""
    for _ in range(tries):
        found = refer(rng, picture["objects"], rng.choice(sources), picture["zoom"] == 1)
        if found:
            return found
    return None


# Samples ------------------------------------------------------------------------------------------
def crowded(rng, source):
    """(picture, expression, object) as the samples have them: 6 to 8 objects, mostly 3 to 5 of one
    kind and color. The base learnt on 2 to 5: what is hard is to follow the expression."""
    while True:
        same = rng.randint(3, 5) if rng.random() < 0.8 else rng.randint(1, 3)
        objects = make_objects(rng, 6, 8, same=same)
        found = refer(rng, objects, source, fine=True)
        if found:
            return draw_scene(rng, objects), *found


def make_samples(folder, per_source, seed, styles=None, words=None):
    """Draws a scene for each of `per_source` samples of each source into folder/images -> the
    samples. styles: source -> how its expressions describe the object (default: each its own).
    words: (expression, object) -> what a sample says and asks (default: the expression)."""
    styles = styles or dict(zip(SOURCES, SOURCES))
    samples = []
    for i in tqdm(range(len(styles) * per_source), desc="scenes", unit="scene"):
        source = list(styles)[i % len(styles)]
        rng = random.Random(f"{seed} {i}")
        picture, expression, target = crowded(rng, styles[source])
        name = f"images/scene_{i:05d}.png"
        write_bytes(Path(folder, name), partial(picture["image"].save, format="PNG"))
        sample = {"id": f"{source}_{i:05d}", "source": source, "image": name}
        sample |= {"width": SIDE, "height": SIDE}
        sample |= words(expression, target) if words else {"expression": expression}
        samples.append({**sample, "bbox": [round(v, 2) for v in target["bbox"]]})
    return samples
