"""The toy's world: seeded scenes of plain shapes, expressions that refer to one of them, samples.

An object is a dict: kind, color, size (words); wh (width and height), bbox, center, area (pixels).
All randomness comes from the `rng` (random.Random) that is passed in.
"""

import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE = 80  # pixels: width and height of a scene
KINDS = ("circle", "square", "triangle", "diamond", "cross", "star")
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 60),
    "green": (45, 160, 65),
    "cyan": (70, 200, 220),
    "blue": (45, 80, 210),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
SIZES = {"small": (8, 12), "large": (15, 22)}  # longer side in pixels; the gap keeps them apart

# The three sources mirror the paper's: plain attributes (RefCOCOg), objects of one kind that only a
# superlative tells apart (Ref-Adv), longer descriptions with a relation to another object (Ref-L4).
SOURCES = ("attributes", "distractors", "relations")
SUPERLATIVES = {  # word -> what is largest for the object that it means
    "leftmost": lambda o: -o["center"][0],
    "rightmost": lambda o: o["center"][0],
    "topmost": lambda o: -o["center"][1],
    "bottommost": lambda o: o["center"][1],
    "largest": lambda o: o["area"],
    "smallest": lambda o: -o["area"],
}
RELATIONS = {  # words -> the direction from the anchor to the object, in image coordinates
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
MARGIN = 5  # pixels by which positions must differ, so that no expression hangs on one pixel


# --------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------
def make_object(rng, kind=None, color=None):
    """An object without a place yet; kind and color are drawn where they are None."""
    kind = kind or rng.choice(KINDS)
    color = color or rng.choice(list(COLORS))
    size = rng.choice(list(SIZES))
    long = rng.uniform(*SIZES[size])
    short = long * rng.uniform(0.75, 1.0)
    wh = (long, short) if rng.random() < 0.5 else (short, long)
    return {"kind": kind, "color": color, "size": size, "wh": wh}


def find_room(rng, width, height, placed):
    """A bbox at least 2 pixels away from those placed; None when 60 tries find none."""
    for _ in range(60):
        x1 = rng.uniform(1, SIDE - 1 - width)
        y1 = rng.uniform(1, SIDE - 1 - height)
        x2 = x1 + width
        y2 = y1 + height
        bboxes = [other["bbox"] for other in placed]
        if all(x1 > b[2] + 2 or x2 < b[0] - 2 or y1 > b[3] + 2 or y2 < b[1] - 2 for b in bboxes):
            return [x1, y1, x2, y2]
    return None


def place_objects(rng, objects):
    """The objects with bbox, center and area, the largest first; None when there is no room."""
    placed = []
    for o in sorted(objects, key=lambda o: -max(o["wh"])):
        w, h = o["wh"]
        bbox = find_room(rng, w, h, placed)
        if bbox is None:
            return None
        center = (bbox[0] + w / 2, bbox[1] + h / 2)
        placed.append({**o, "bbox": bbox, "center": center, "area": w * h})
    return placed


def make_scene(rng, low=3, high=6, distractors=None):
    """A list of `low` to `high` objects.

    With `distractors`, 2 or 3 of them share kind and color; None: so one time in two.
    """
    while True:
        count = rng.randint(low, high)
        objects = [make_object(rng) for _ in range(count)]
        if distractors or (distractors is None and count > 1 and rng.random() < 0.5):
            for i in range(1, min(count, rng.choice((2, 3)))):
                objects[i] = make_object(rng, objects[0]["kind"], objects[0]["color"])
        placed = place_objects(rng, objects)
        if placed:
            rng.shuffle(placed)
            return placed


def outline(kind, x1, y1, x2, y2):
    """The corners of a shape (any but the circle) that fills its box."""
    w = x2 - x1
    h = y2 - y1
    cx = (x1 + x2) / 2
    cy = (y1 + y2) / 2
    if kind == "square":
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind == "triangle":
        return [(cx, y1), (x2, y2), (x1, y2)]
    if kind == "diamond":
        return [(cx, y1), (x2, cy), (cx, y2), (x1, cy)]
    if kind == "cross":  # its bars are a third of the box wide
        left, right = x1 + w / 3, x2 - w / 3
        top, bottom = y1 + h / 3, y2 - h / 3
        upper = [(left, y1), (right, y1), (right, top), (x2, top), (x2, bottom), (right, bottom)]
        lower = [(right, y2), (left, y2), (left, bottom), (x1, bottom), (x1, top), (left, top)]
        return upper + lower
    star = []
    for i in range(10):
        angle = -math.pi / 2 + i * math.pi / 5
        radius = (1.0, 0.42)[i % 2]
        star.append((radius * math.cos(angle), radius * math.sin(angle)))
    xs, ys = zip(*star)
    corners = []
    for x, y in star:  # stretched to the box
        across = (x - min(xs)) / (max(xs) - min(xs))
        down = (y - min(ys)) / (max(ys) - min(ys))
        corners.append((x1 + across * w, y1 + down * h))
    return corners


def make_ground(rng):
    """A plain, noisy, striped or graded ground: [SIDE, SIDE, 3] float32."""
    grey = np.array([rng.randint(60, 150)] * 3)
    tint = np.array([rng.randint(-25, 25) for _ in range(3)])
    ground = np.broadcast_to(grey + tint, (SIDE, SIDE, 3)).astype(np.float32).copy()
    texture = rng.choice(("plain", "noise", "stripes", "gradient"))
    if texture == "noise":
        ground += np.random.default_rng(rng.getrandbits(32)).normal(0, 10, (SIDE, SIDE, 1))
    elif texture == "stripes":
        period = rng.randint(6, 16)
        across = rng.randint(0, 1)
        wave = 12 * np.sign(np.sin(2 * np.pi * np.arange(SIDE) / period))
        ground += wave[:, None, None] if across else wave[None, :, None]
    elif texture == "gradient":
        ground += np.linspace(-30, 30, SIDE)[None, :, None]
    return ground


def render(rng, objects):
    """A SIDE x SIDE RGB image (PIL); drawn larger and reduced, for smooth edges."""
    k = 3
    ground = make_ground(rng).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(ground).resize((SIDE * k, SIDE * k), Image.NEAREST)
    draw = ImageDraw.Draw(image)
    for o in objects:
        corners = [v * k for v in o["bbox"]]
        fill = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[o["color"]])
        if o["kind"] == "circle":
            draw.ellipse(corners, fill=fill)
        else:
            draw.polygon(outline(o["kind"], *corners), fill=fill)
    return image.resize((SIDE, SIDE), Image.BOX)


# --------------------------------------------------------------------------------------------------
# Referring expressions: each fits one object of the scene and no other
# --------------------------------------------------------------------------------------------------
def alike(objects, words, target):
    """Those objects that agree with the target in these words (of kind, color, size)."""
    return [o for o in objects if all(o[word] == target[word] for word in words)]


def describe(o, words):
    return " ".join(o[word] for word in words)


def offset(o, anchor, direction):
    """How far `o` lies from `anchor` along `direction`, and across it, in pixels."""
    dx = o["center"][0] - anchor["center"][0]
    dy = o["center"][1] - anchor["center"][1]
    along = dx * direction[0] + dy * direction[1]
    across = abs(dx * direction[1]) + abs(dy * direction[0])
    return along, across


def refer_by_attributes(rng, objects, target):
    """As in "the red circle"; None when no attributes tell the target apart."""
    options = []
    for words in (("color", "kind"), ("size", "color", "kind")):
        if len(alike(objects, words, target)) == 1:
            options.append(words)
    if not options:
        return None
    words = options[0] if rng.random() < 0.75 else options[-1]
    return f"the {describe(target, words)}"


def refer_by_superlative(rng, objects, target):
    """As in "the leftmost red circle"; None when the target is not the first by a clear margin."""
    words = rng.choice((("kind",), ("color", "kind"), ("color", "kind")))
    same = alike(objects, words, target)
    if len(same) < 2:
        return None
    options = []
    for word, key in SUPERLATIVES.items():
        first, second = sorted(same, key=key, reverse=True)[:2]
        if word.endswith("most"):
            margin = MARGIN
        else:
            margin = 0.4 * min(first["area"], second["area"])
        if first is target and key(first) - key(second) >= margin:
            options.append(word)
    if not options:
        return None
    return f"the {rng.choice(options)} {describe(target, words)}"


def refer_by_relation(rng, objects, target):
    """As in "the circle that is above the blue star"; None when none fits the target alone."""
    if len(objects) < 2:
        return None
    anchor = rng.choice([o for o in objects if o is not target])
    names = []
    for words in (("kind",), ("color", "kind"), ("size", "color", "kind")):
        if len(alike(objects, words, anchor)) == 1:
            names.append(words)
    words = rng.choice((("kind",), ("color", "kind"), ("size", "kind")))
    same = alike(objects, words, target)
    others = [o for o in same if o is not target and o is not anchor]
    options = []
    for phrase, direction in RELATIONS.items():
        along, across = offset(target, anchor, direction)
        clear = along >= max(MARGIN, 1.2 * across)
        if clear and all(offset(o, anchor, direction)[0] <= -MARGIN for o in others):
            options.append(phrase)
    if not names or not options:
        return None
    phrase = rng.choice(options)
    return (
        f"the {describe(target, words)} that is {phrase} the {describe(anchor, rng.choice(names))}"
    )


REFER = dict(zip(SOURCES, (refer_by_attributes, refer_by_superlative, refer_by_relation)))


def refer(rng, objects, source):
    """(expression, object) in the style of `source`, one of SOURCES.

    None when the object that was drawn cannot be told apart in this way.
    """
    target = rng.choice(objects)
    expression = REFER[source](rng, objects, target)
    return (expression, target) if expression else None


def make_samples(folder, per_source, seed):
    """Renders 3 * per_source scenes into folder/images; returns their samples.

    A sample is a dict, a line of a .jsonl file: id, source, image (path relative to the folder),
    width and height (pixels), expression, bbox (float pixels). Each has a random state of its own,
    so that a sample does not depend on how many there are.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i in tqdm(range(3 * per_source), desc="scenes", unit="scene"):
        source = SOURCES[i % 3]
        rng = random.Random(f"{seed} {i}")
        distractors = True if source == "distractors" else None
        found = None
        while not found:
            objects = make_scene(rng, 2, 5, distractors)
            found = refer(rng, objects, source)
        expression, target = found
        image = f"images/scene_{i:05d}.png"
        render(rng, objects).save(folder / image)
        samples.append(
            {
                "id": f"{source}_{i:05d}",
                "source": source,
                "image": image,
                "width": SIDE,
                "height": SIDE,
                "expression": expression,
                "bbox": [round(v, 2) for v in target["bbox"]],
            }
        )
    return samples
