"""What can be asked about a scene, about a view of it, and about frames that are drawn on it."""

from dataclasses import dataclass

from common import draw_overlay, format_box, iou, normalize_box
from support.data.teacher import place
from toy.world import MARKS, SIDE, area, center

from PIL import Image

# No object has one of these colors
FRAMES = {"red": (255, 0, 0), "pink": (255, 0, 220), "cyan": (0, 230, 255), "orange": (255, 140, 0)}


# Views: a part of a picture, which the image processor brings to the whole's size -----------------
def view(picture, bbox):
    """What lies within bbox (pixels, a square) of a picture, enlarged, without frames."""
    x1, y1, x2, y2 = bbox
    objects = []
    for o in picture["objects"]:
        seen = covered(o["bbox"], bbox)
        if seen > 0.15:
            part = [*map(max, o["bbox"][:2], bbox[:2]), *map(min, o["bbox"][2:], bbox[2:])]
            inner = [part[0] - x1, part[1] - y1, part[2] - x1, part[3] - y1]
            objects.append({**o, "box": normalize_box(inner, x2 - x1, y2 - y1), "seen": seen})
    image = picture["image"]
    image = image.resize(image.size, Image.BILINEAR, box=bbox)
    zoom = SIDE / (x2 - x1)
    return {"image": image, "objects": objects, "frames": [], "zoom": zoom, "corner": (x1, y1)}


def crop_square(bbox, margin=0.1):
    """The square that a crop of bbox shows, moved into the scene; pixels."""
    longer = max(bbox[2] - bbox[0], bbox[3] - bbox[1])
    side = min(SIDE, max(40.0, longer * (1 + 2 * margin)))
    corner = [min(SIDE - side, max(0.0, c - side / 2)) for c in center(bbox)]
    return [*corner, corner[0] + side, corner[1] + side]


def random_view(rng, bbox, zoom):
    """A square, `zoom` times enlarged or less, that holds all of bbox, at a place by chance."""
    side = max(SIDE / zoom, 1.15 * max(bbox[2] - bbox[0], bbox[3] - bbox[1]))
    corner = []
    for low, high in ((bbox[0], bbox[2]), (bbox[1], bbox[3])):
        corner.append(rng.uniform(max(0, high + 2 - side), min(SIDE - side, low - 2)))
    return [*corner, corner[0] + side, corner[1] + side]


def random_crop(rng, bbox):
    """The square that a good or a fair box of an object cuts out."""
    spread = rng.choice((0.03, 0.1, 0.2))
    w, h = bbox[2] - bbox[0], bbox[3] - bbox[1]
    sides = [v + rng.gauss(0, spread) * s for v, s in zip(bbox, (w, h, w, h))]
    return crop_square(sides, rng.choice((0, 0.1, 0.1, 0.3)))


# Frames: coloured rectangles drawn on a picture, and how they lie ---------------------------------
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
            w = w * rng.choice((0.6, 1, 1.5)) * rng.uniform(0.9, 1.1)
            h = h * rng.choice((0.6, 1, 1.5))
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


# Questions ----------------------------------------------------------------------------------------
@dataclass
class Question:
    """One turn of a conversation. Boxes in 0..1000."""

    kind: str
    text: str
    answer: str
    object: list = None  # the box of the one object that it is about
    frame: list = None  # the box of the frame that it is about
    expression: str = ""  # the part of `text` that names the object
    before: str = ""  # what stands around the text
    after: str = ""
    thought: str = ""  # what stands before the answer, and is not learnt


# refer_to(rng, picture) gives (expression, object) or None
def about_object(rng, kind, picture, refer_to):
    """A Question about an object or the marks of several, or None where chance found none."""
    if kind == "count":
        if any(0.3 < o["seen"] < 0.9 for o in picture["objects"]):
            return None
        marks = [o["mark"] for o in picture["objects"] if o["seen"] >= 0.9]
        mark = rng.choice(marks) if marks and rng.random() < 0.8 else rng.choice(MARKS)
        return Question(kind, f"How many {mark}s are there?", str(marks.count(mark)))
    found = refer_to(rng, picture)
    if not found or kind == "mark" and found[1]["seen"] < 0.9:
        return None
    name, o = found
    if kind == "mark":
        return Question(kind, f"What mark is on {name}?", f"a {o['mark']}", o["box"], None, name)
    if kind == "where":
        return Question(kind, f"Where is {name}?", place(o["box"]), o["box"], None, name)
    return Question("find", name, format_box(o["box"]), o["box"])


def about_frame(rng, kind, picture, refer_to):
    """A Question about a frame, or None where chance found none."""
    color, frame = rng.choice(picture["frames"])
    if kind == "frame":
        return Question(kind, f"the {color} frame", format_box(frame), None, frame)
    if kind == "what_inside":
        inside = [o for o in picture["objects"] if covered(o["box"], frame) > 0.2]
        if len(inside) != 1 or not is_inside(inside[0]["box"], frame):
            return None
        text = f"What is inside the {color} frame?"
        answer = f"the {inside[0]['color']} {inside[0]['kind']}"
        return Question(kind, text, answer, inside[0]["box"], frame)
    # As often yes as no, and two times in three touching, where the picture allows it
    wanted = rng.random() < (0.5 if kind == "is_inside" else 0.67)
    for _ in range(6):
        found = refer_to(rng, picture)
        if not found:
            continue
        name, box = found[0], found[1]["box"]
        if kind == "is_inside" and is_inside(box, frame) is wanted:
            text = f"Is {name} inside the {color} frame?"
            return Question(kind, text, "yes" if wanted else "no", box, frame, name)
        if kind == "compare" and (iou(frame, box) > 0) == wanted:
            text = f"How does the {color} frame lie around {name}?"
            return Question(kind, text, ", ".join(compare(frame, box)), box, frame, name)
    return None
