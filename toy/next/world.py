"""The toy's world: scenes of simple objects with small marks, what can be said of them, views,
frames, questions.

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
from pathlib import Path

from common import draw_overlay, iou, normalize_box
from support.traces import place

import numpy as np
from PIL import Image, ImageDraw

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
FRAMES = {"red": (255, 0, 0), "pink": (255, 0, 220), "cyan": (0, 230, 255), "orange": (255, 140, 0)}
SIZES = {
    "small": (58, 74),
    "large": (90, 116),
}  # longer side in pixels; the gap keeps the words apart
MARKS = ("dot", "ring", "cross", "bar", "post")
MARK = 7  # pixels across: 2 of those that the model sees in a whole scene

# The three sources mirror the paper's: plain attributes (RefCOCOg), same-kind distractors that
# only a superlative tells apart (Ref-Adv), descriptions with a relation to another object
# (Ref-L4).
SOURCES = ("attributes", "distractors", "relations")
MARGIN = 45  # of 1000: by how much a place must differ, so that no expression hangs on one pixel


def center(box):
    """The centre (x, y) of a box, in its unit."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def area(box):
    """The area of a box, in its unit squared."""
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


# ----------------------------------------------------------------------------------------------
# Scenes
# ----------------------------------------------------------------------------------------------
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
    """The objects with a bbox (pixels) each, 6 pixels apart at least; None where 40 tries find no
    room for one.
    """
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


def make_objects(rng, low=2, high=5, distractors=None):
    """low to high placed objects; with `distractors` (None: one time in two) 2 or 3 share kind
    and color.
    """
    while True:
        n = rng.randint(low, high)
        objects = [make_object(rng) for _ in range(n)]
        if distractors or (distractors is None and n > 1 and rng.random() < 0.5):
            for i in range(1, min(n, rng.choice((2, 3)))):
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
    angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
    star = [
        ((1, 0.45)[i % 2] * math.cos(t), (1, 0.45)[i % 2] * math.sin(t))
        for i, t in enumerate(angles)
    ]
    left, right = min(p[0] for p in star), max(p[0] for p in star)
    top, bottom = min(p[1] for p in star), max(p[1] for p in star)
    w, h = (x2 - x1) / (right - left), (y2 - y1) / (bottom - top)
    return [(x1 + (x - left) * w, y1 + (y - top) * h) for x, y in star]


def draw_mark(draw, mark, x, y, ink):
    """A mark of MARK pixels about (x, y); all have about the same area, so that none is darker
    from afar.
    """
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
    """SIDE x SIDE RGB: the objects on a grey ground that is a little brighter on one side."""
    level = rng.randint(95, 150)
    tint = [rng.randint(-8, 8) for _ in range(3)]
    slope = rng.uniform(-20, 20)
    shade = np.linspace(-slope, slope, SIDE)[:, None]
    line = (level + shade + tint).astype(np.uint8)  # [SIDE, 3]: brighter from end to end
    line = line[:, None] if rng.random() < 0.5 else line[None]
    ground = np.ascontiguousarray(np.broadcast_to(line, (SIDE, SIDE, 3)))
    image = Image.fromarray(ground)
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
    return image


def make_scene(rng, low=2, high=5, distractors=None):
    """A picture of a new scene, without frames."""
    objects = make_objects(rng, low, high, distractors)
    image = draw_scene(rng, objects)
    return {"image": image, "objects": objects, "frames": [], "zoom": 1.0, "corner": (0, 0)}


# ----------------------------------------------------------------------------------------------
# Views: a part of a picture, which the image processor brings to the whole's size
# ----------------------------------------------------------------------------------------------
def enlarge(image, bbox):
    """What lies within bbox (pixels, a square) of an image, brought to the image's own size."""
    return image.resize(image.size, Image.BILINEAR, box=bbox)


def view(picture, bbox):
    """The picture of what lies within bbox (pixels, a square), enlarged, without frames.

    Objects of which less than 15 percent show are left out of the list.
    """
    x1, y1, x2, y2 = bbox
    objects = []
    for o in picture["objects"]:
        whole = o["bbox"]
        part = [max(whole[0], x1), max(whole[1], y1), min(whole[2], x2), min(whole[3], y2)]
        if part[0] < part[2] and part[1] < part[3] and area(part) > 0.15 * area(whole):
            inner = [part[0] - x1, part[1] - y1, part[2] - x1, part[3] - y1]
            box = normalize_box(inner, x2 - x1, y2 - y1)
            objects.append({**o, "box": box, "seen": area(part) / area(whole)})
    return {
        "image": enlarge(picture["image"], bbox),
        "objects": objects,
        "frames": [],
        "zoom": SIDE / (x2 - x1),
        "corner": (x1, y1),
    }


def square_about(bbox, side):
    """The square of `side` about a bbox, moved into the scene; all in pixels."""
    side = min(side, SIDE)
    corner = [min(SIDE - side, max(0.0, c - side / 2)) for c in center(bbox)]
    return [*corner, corner[0] + side, corner[1] + side]


def crop_square(bbox, margin=0.1):
    """The square that a crop of bbox shows: its longer side and a margin, at least 40 pixels."""
    return square_about(
        bbox, max(40.0, max(bbox[2] - bbox[0], bbox[3] - bbox[1]) * (1 + 2 * margin))
    )


def random_view(rng, bbox, zoom):
    """A square view, `zoom` times enlarged or less, that holds all of bbox, at a place by chance;
    pixels.
    """
    side = max(SIDE / zoom, 1.15 * max(bbox[2] - bbox[0], bbox[3] - bbox[1]))
    corner = []
    for low, high in ((bbox[0], bbox[2]), (bbox[1], bbox[3])):
        corner.append(rng.uniform(max(0, high + 2 - side), min(SIDE - side, low - 2)))
    return [*corner, corner[0] + side, corner[1] + side]


def random_crop(rng, bbox):
    """The crop that a good or a fair box of an object cuts out; pixels."""
    spread = rng.choice((0.03, 0.1, 0.2))
    w, h = bbox[2] - bbox[0], bbox[3] - bbox[1]
    sides = [v + rng.gauss(0, spread) * s for v, s in zip(bbox, (w, h, w, h))]
    return crop_square(sides, rng.choice((0, 0.1, 0.1, 0.3)))


# ----------------------------------------------------------------------------------------------
# Frames: coloured rectangles drawn on a picture, and how they lie
# ----------------------------------------------------------------------------------------------
RELATED = ("apart", "left", "right", "high", "low", "narrow", "wide", "short", "tall", "well")


def random_frame(rng, objects):
    """A frame (0..1000): about an object, close or not, stretched or anywhere."""
    while True:
        way = rng.random()
        x1, y1, x2, y2 = rng.choice(objects)["box"] if objects else (300, 300, 600, 600)
        w, h = x2 - x1, y2 - y1
        if way < 0.6:
            spread = rng.choice((0.02, 0.06, 0.15, 0.3))
            frame = [v + rng.gauss(0, spread) * s for v, s in zip((x1, y1, x2, y2), (w, h, w, h))]
        elif way < 0.85:
            cx, cy = (x1 + x2) / 2 + rng.gauss(0, 0.12) * w, (y1 + y2) / 2 + rng.gauss(0, 0.12) * h
            w, h = (
                w * rng.choice((0.6, 1, 1.5)) * rng.uniform(0.9, 1.1),
                h * rng.choice((0.6, 1, 1.5)),
            )
            frame = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        else:
            w, h = rng.uniform(120, 450), rng.uniform(120, 450)
            x, y = rng.uniform(0, 1000 - w), rng.uniform(0, 1000 - h)
            frame = [x, y, x + w, y + h]
        frame = [min(1000, max(0, round(v))) for v in frame]
        if frame[2] - frame[0] >= 80 and frame[3] - frame[1] >= 80:
            return frame


def draw_frame(picture, color, box, alpha):
    """The picture with one more frame; alpha 0 is a plain line, more a translucent fill."""
    image = draw_overlay(picture["image"], box, FRAMES[color], alpha)
    return {**picture, "image": image, "frames": picture["frames"] + [(color, box)]}


def with_frames(rng, picture, count):
    """The picture with `count` random frames of different colors."""
    for color in rng.sample(list(FRAMES), count):
        box = random_frame(rng, picture["objects"])
        picture = draw_frame(picture, color, box, rng.choice((0.0, 0.15, 0.25, 0.25, 0.35)))
    return picture


def covered(box, frame):
    """The share of a box that lies inside a frame, both 0..1000."""
    w = min(box[2], frame[2]) - max(box[0], frame[0])
    h = min(box[3], frame[3]) - max(box[1], frame[1])
    return max(0, w) * max(0, h) / area(box)


def is_inside(box, frame):
    """True, False, or None where it is neither the one nor the other."""
    share = covered(box, frame)
    return True if share >= 0.6 else False if share <= 0.3 else None


def compare(frame, box):
    """Words for how a frame lies around an object, both 0..1000."""
    w, h = box[2] - box[0], box[3] - box[1]
    dx = center(frame)[0] - center(box)[0]
    dy = center(frame)[1] - center(box)[1]
    wider, taller = (frame[2] - frame[0]) / w, (frame[3] - frame[1]) / h
    apart = iou(frame, box) == 0
    words = ["apart"] * apart
    words += ["left"] if dx < -0.1 * w else ["right"] if dx > 0.1 * w else []
    words += ["high"] if dy < -0.1 * h else ["low"] if dy > 0.1 * h else []
    if not apart:
        words += ["narrow"] if wider < 0.85 else ["wide"] if wider > 1.18 else []
        words += ["short"] if taller < 0.85 else ["tall"] if taller > 1.18 else []
    return words or ["well"]


# ----------------------------------------------------------------------------------------------
# Expressions: each fits one object of the picture and no other
# ----------------------------------------------------------------------------------------------
def along(box, anchor, direction):
    """How far a box lies from an anchor along `direction`, and across it, between centres."""
    dx, dy = (a - b for a, b in zip(center(box), center(anchor)))
    return dx * direction[0] + dy * direction[1], abs(dx * direction[1]) + abs(dy * direction[0])


def fitting(objects, words):
    """The objects that have all of `words`, a dict such as {"color": "blue", "kind": "star"}."""
    return [o for o in objects if all(o[key] == word for key, word in words.items())]


def words_of(o, keys):
    """The words of an object under these keys, in order."""
    return {key: o[key] for key in keys}


def best(objects, superlative):
    """The object that a superlative names among several; None where two are too close to call."""
    key = SUPERLATIVES[superlative]
    first, second = sorted(objects, key=lambda o: key(o["box"]), reverse=True)[:2]
    lead = key(first["box"]) - key(second["box"])
    margin = (
        MARGIN
        if superlative.endswith("most")
        else 0.4 * min(area(first["box"]), area(second["box"]))
    )
    return first if lead >= margin else None


def refer(rng, objects, source, sizes=True):
    """(expression, object) in the style of `source`, or None where the object that was drawn
    cannot be told apart so.

    sizes: whether "small" and "large" may be said; in an enlarged view they would mislead.
    """
    if not objects:
        return None
    target = rng.choice(objects)
    if target["seen"] < 0.7:
        return None
    if source == "attributes":
        options = [("color", "kind")] + [("size", "color", "kind")] * sizes
        options = [keys for keys in options if len(fitting(objects, words_of(target, keys))) == 1]
        if not options:
            return None
        keys = options[0] if rng.random() < 0.75 else options[-1]
        return "the " + " ".join(words_of(target, keys).values()), target
    if source == "distractors":
        words = words_of(target, rng.choice((("kind",), ("color", "kind"), ("color", "kind"))))
        same = fitting(objects, words)
        options = [s for s in SUPERLATIVES if best(same, s) is target] if len(same) > 1 else []
        if not options:
            return None
        return f"the {rng.choice(options)} {' '.join(words.values())}", target
    if len(objects) < 2:
        return None
    anchor = rng.choice([o for o in objects if o is not target])
    names = [("kind",), ("color", "kind")] + [("size", "color", "kind")] * sizes
    names = [keys for keys in names if len(fitting(objects, words_of(anchor, keys))) == 1]
    words = words_of(
        target, rng.choice([("kind",), ("color", "kind")] + [("size", "kind")] * sizes)
    )
    others = [o for o in fitting(objects, words) if o is not target and o is not anchor]
    options = []
    for phrase, direction in RELATIONS.items():
        far, across = along(target["box"], anchor["box"], direction)
        alone = all(along(o["box"], anchor["box"], direction)[0] <= -MARGIN for o in others)
        if far >= max(MARGIN, 1.2 * across) and alone:
            options.append(phrase)
    if not (names and options):
        return None
    name = " ".join(words_of(anchor, rng.choice(names)).values())
    return f"the {' '.join(words.values())} that is {rng.choice(options)} the {name}", target


def refer_somehow(rng, objects, sources=SOURCES, sizes=True, tries=12):
    """Like `refer`, with a source by chance, tried several times."""
    for _ in range(tries):
        found = refer(rng, objects, rng.choice(sources), sizes)
        if found:
            return found
    return None


# ----------------------------------------------------------------------------------------------
# Questions that are answered by words. Each returns (question, answer, object, frame) or None;
# object and frame are what the question is about, None where it is about no one thing.
# ----------------------------------------------------------------------------------------------
def ask_where(rng, picture, refer_to):
    """Where an object is, in words."""
    found = refer_to(rng, picture["objects"])
    if not found:
        return None
    return f"Where is {found[0]}?", place(found[1]["box"]), found[1], None


def ask_what_inside(rng, picture, refer_to):
    """What a frame holds: color and kind of the one object inside it."""
    color, frame = rng.choice(picture["frames"])
    inside = [o for o in picture["objects"] if covered(o["box"], frame) > 0.2]
    if len(inside) != 1 or not is_inside(inside[0]["box"], frame):
        return None
    answer = f"the {inside[0]['color']} {inside[0]['kind']}"
    return f"What is inside the {color} frame?", answer, inside[0], (color, frame)


def ask_is_inside(rng, picture, refer_to):
    """Whether an object is inside a frame; as often yes as no, where the picture allows it."""
    color, frame = rng.choice(picture["frames"])
    wanted = rng.random() < 0.5
    for _ in range(6):
        found = refer_to(rng, picture["objects"])
        if found and is_inside(found[1]["box"], frame) is wanted:
            answer = "yes" if wanted else "no"
            return f"Is {found[0]} inside the {color} frame?", answer, found[1], (color, frame)
    return None


def ask_compare(rng, picture, refer_to):
    """How a frame lies around an object; two times in three one that it touches."""
    color, frame = rng.choice(picture["frames"])
    touching = rng.random() < 0.67
    for _ in range(6):
        found = refer_to(rng, picture["objects"])
        if found and (iou(frame, found[1]["box"]) > 0) == touching:
            answer = ", ".join(compare(frame, found[1]["box"]))
            return (
                f"How does the {color} frame lie around {found[0]}?",
                answer,
                found[1],
                (color, frame),
            )
    return None


def ask_mark(rng, picture, refer_to):
    """Which mark an object bears."""
    found = refer_to(rng, picture["objects"])
    if not found or found[1]["seen"] < 0.9:
        return None
    return f"What mark is on {found[0]}?", f"a {found[1]['mark']}", found[1], None


def ask_bearer(rng, picture, refer_to):
    """Which of two objects bears a mark."""
    names = {}
    for _ in range(8):
        found = refer_to(rng, picture["objects"])
        if (
            found
            and found[1]["seen"] > 0.9
            and all(found[1]["mark"] != o["mark"] for o in names.values())
        ):
            names[found[0]] = found[1]
    if len(names) < 2:
        return None
    (first, a), (second, b) = rng.sample(list(names.items()), 2)
    name, target = rng.choice(((first, a), (second, b)))
    return f"Which bears a {target['mark']}: {first} or {second}?", name, target, None


def ask_count(rng, picture, refer_to):
    """How many marks of a kind a view shows."""
    if any(0.3 < o["seen"] < 0.9 for o in picture["objects"]):
        return None
    marks = [o["mark"] for o in picture["objects"] if o["seen"] >= 0.9]
    mark = rng.choice(marks) if marks and rng.random() < 0.8 else rng.choice(MARKS)
    return f"How many {mark}s are there?", str(marks.count(mark)), None, None


def make_samples(folder, per_source, seed):
    """Draws one scene for each of 3 * per_source samples into folder/images; returns the samples
    (DESIGN: one line each).
    """
    from tqdm import tqdm

    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i in tqdm(range(3 * per_source), desc="scenes", unit="scene"):
        source = SOURCES[i % 3]
        rng = random.Random(f"{seed} {i}")
        found = None
        while not found:
            objects = make_objects(rng, distractors=True if source == "distractors" else None)
            found = refer(rng, objects, source)
        name = f"images/scene_{i:05d}.png"
        draw_scene(rng, objects).save(folder / name)
        samples.append(
            {
                "id": f"{source}_{i:05d}",
                "source": source,
                "image": name,
                "width": SIDE,
                "height": SIDE,
                "expression": found[0],
                "bbox": [round(v, 2) for v in found[1]["bbox"]],
            }
        )
    return samples
