"""Files of your own (--data): our lines, and the forms that other trainers read.

A reader takes a row of a file, and returns dicts of our fields (image, expression, bbox; width and
height where the form has them; _units where it says what its boxes are), or in words why it has
none. What they lack is filled in, and all is checked as the files of a run are.
"""

import functools
import hashlib
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

from support.data.datasets import counted
from support.data.samples import IVT_FIELDS, check_sample, parse_row, read_samples
from support.running.errors import explained
from support.running.files import check_regular, parse
from support.running.flags import Flag

from PIL import Image

UNITS = {
    "pixels": "[x1, y1, x2, y2] in pixels",
    "sizes": "[x1, y1, width, height] in pixels",
    "0..1": "[x1, y1, x2, y2] as shares of width and height",
    "0..1000": "[x1, y1, x2, y2] in thousandths of width and height",
    "padded": "0..1 of a square with the image in its middle, as LLaVA pads it",
}
OWN_FLAGS = {
    "data": Flag("your own samples: files to split, in a form of docs/your_gpu.md", kind="files"),
    "images": Flag("folder of the images of --data (default: that of each file)", kind="folder"),
    "boxes": Flag("; ".join(map(": ".join, UNITS.items())), choices=tuple(UNITS)),
    "skip_bad": Flag("leave out bad lines of --data, listed in FILE.skipped", kind="switch"),
}
N = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"\[{N},{N},{N},{N}\]|\({N},{N}\),\({N},{N}\)")
ASKED = re.compile(  # how requests for a box name what they ask for
    r'descri(?:bes|ption)\W+"(.+?)" in |descri(?:bes|ption|bed as)\s*:(.+)|'
    r"^\s*(?:locate|find|detect|where is)\s(.+)",
    re.I | re.M,
)
KEPT = ("image", "width", "height", "expression", "bbox", "_units")  # of a foreign row
REPEATED = "of a category that its image shows more than once"


# The readers --------------------------------------------------------------------------------------
def expression_of(question, answer=""):
    """What a request asks for, or where it does not say it the label of the answer, or None."""
    question = re.sub("</?(?:image|ref)>", "", question)
    match = ASKED.search(question) or re.search(r'"label":\s*"(.+?)"', answer)
    return match and next(filter(None, match.groups())).strip(" .?\"'")


def conversation(row):
    """LLaVA's and VLM-R1's rows: a sample for each turn with an expression and one box. VLM-R1's
    evaluation files have problem and solution instead of turns."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    if len(images) != 1:
        return "with several images"
    turns = [turn.get("value", turn.get("content")) for turn in row.get("conversations", [])]
    turns = turns or [row["problem"], row["solution"]]
    found = []
    for question, answer in zip(turns[::2], map(str, turns[1::2])):
        boxes = [[float(v) for v in box if v] for box in BOX.findall(answer)]
        if len(boxes) == 1 and (words := expression_of(question, answer)):
            found.append({**row, "image": images[0], "expression": words, "bbox": boxes[0]})
    return found or "without an expression and one box"


def swift(row):
    """ms-swift's grounding lines: expressions and boxes are those of `objects`; without `objects`
    a conversation."""
    images = [row["images"]] if isinstance(row["images"], str) else row["images"]
    turns = [turn for turn in row["messages"] if turn["role"] != "system"]
    objects = row.get("objects")
    if not objects:
        return conversation({"image": images, "conversations": turns})
    boxes, names = objects["bbox"], objects.get("ref") or [expression_of(turns[0]["content"])]
    # Nothing says which box is whose: they fill the tags of the texts, each list for itself
    if len(names) != len(boxes):
        names = list(dict.fromkeys(names))  # named in the question and in the answer
    units = {"real": None, "norm1": "0..1"}[objects.get("bbox_type", "real")]
    found = []
    for name, box, i in zip(names, boxes, objects.get("image_id") or [0] * len(boxes)):
        if len(names) == len(boxes) and names.count(name) == 1 and name and len(box) == 4:
            found.append({"image": images[i], "expression": name, "bbox": box, "_units": units})
    return found or "without an expression and one box"


def coco(whole):
    """Yields place and row of each annotation of COCO's instances.json: its category is the
    expression, where the image shows no other."""
    images = {image["id"]: image for image in whole["images"]}
    names = {category["id"]: category["name"] for category in whole["categories"]}
    counts = Counter((row["image_id"], row["category_id"]) for row in whole["annotations"])
    for row in whole["annotations"]:
        image, name = images[row["image_id"]], names[row["category_id"]]
        alone = counts[row["image_id"], row["category_id"]] == 1 and not row.get("iscrowd")
        own = {"image": image["file_name"], "expression": name, "bbox": row["bbox"]}
        yield f"annotation {row['id']}", {**image, **own, "_units": "sizes", "_alone": alone}


FORMS = {  # the field that tells a form -> its name, its reader
    "img_path": ("lines with img_path", lambda row: [{**row, "image": row["img_path"]}]),
    "messages": ("ms-swift", swift),
    "conversations": ("conversations (LLaVA, VLM-R1)", conversation),
    "problem": ("problem and solution (VLM-R1)", conversation),
    "_alone": ("COCO's instances", lambda row: [row] if row["_alone"] else REPEATED),
}
OURS = ("our own lines", None)


# From rows to samples -----------------------------------------------------------------------------
def own_samples(args, fields=IVT_FIELDS):
    """The samples of the files of --data, with absolute paths of their images."""
    samples, unsettled = [], set()
    for number, path in enumerate(args.data, 1):
        reader = partial(read_rows, args=args, fields=fields, unsettled=unsettled)
        taken = {sample["id"] for sample in samples}
        writer = "what writes it, in a form of docs/your_gpu.md"
        for sample in read_samples(path, writer, fields, args.skip_bad, reader=reader):
            if sample["id"] in taken:
                sample["id"] += f" ({number})"
            samples.append(sample)
    if unsettled:
        what = (
            f"{len(unsettled)} photos, such as {min(unsettled)}, are marked as turned or mirrored"
        )
        print(
            f"warning: {what}, and no size says whether their boxes are; taken for those as stored"
        )
    share_keys(samples)
    return samples


def read_rows(path, lines, args, fields, unsettled):
    """The entries of a file, as of `parse_lines`. Prints the forms that it has, and what is
    dropped. unsettled: gets the photos that may have been turned."""
    entries, forms, dropped = [], Counter(), Counter()
    for place, row in places(path, lines):
        row, problems = parse_row(row)
        found, keys = [row], [key for key in FORMS if fields is IVT_FIELDS and key in (row or ())]
        name, reader = FORMS[keys[0]] if keys else OURS
        forms[name] += 1
        try:
            if reader:
                found = reader(row)
        except Exception as e:  # whatever a damaged row makes of a reader
            problems = [f"no row of {name} ({type(e).__name__}: {e}); repair it: {str(row)[:60]!r}"]
        if problems:
            entries.append((place, None, problems))
        elif isinstance(found, str):
            dropped[found] += 1
        else:
            for count, sample in enumerate(found, 1):
                if reader:
                    sample = {key: sample[key] for key in KEPT if key in sample}
                number = place.split()[1] + f".{count}" * (count > 1)
                sample = {"id": f"{path.stem}-{number}", "source": path.stem, **sample}
                with_size(sample, args.images or path.parent, unsettled)
                entries.append((place, sample, []))
    names = ", ".join(f"{count} of {name}" for name, count in forms.items())
    print(f"{path}: rows: {names}; dropped: {counted(dropped)}")
    if not args.boxes:
        warn_of_units(path, [sample for _, sample, _ in entries if sample])
    for i, (place, sample, problems) in enumerate(entries):
        if sample:
            entries[i] = (place, *in_pixels(sample, args.boxes, fields))
    return entries


def places(path, lines):
    """Place and row of all that a file holds: one array, COCO's instances.json, or JSON lines,
    which are bytes yet."""
    try:
        whole = parse(b"\n".join(lines))
    except ValueError:  # several lines
        whole = None
    if isinstance(whole, list):
        return [(f"row {number}", row) for number, row in enumerate(whole, 1)]
    if isinstance(whole, dict) and "annotations" in whole:
        with explained(f"{path} is not as COCO's instances.json", "repair it"):
            return list(coco(whole))
    return [(f"line {number}", line) for number, line in enumerate(lines, 1)]


def with_size(sample, folder, unsettled):
    """Fills in the path and, where it is lacking, the size of the image: 0 x 0 of one that cannot
    be read, of which `read_samples` tells."""
    if type(sample["id"]) is int:
        sample["id"] = str(sample["id"])
    if isinstance(sample.get("image"), str):
        sample["image"] = os.path.abspath(os.path.join(folder, sample["image"]))
        width, height, orientation = header(sample["image"])
        hidden = "width" not in sample or width == height
        if orientation in (2, 3, 4) or orientation in (5, 6, 7, 8) and hidden:
            unsettled.add(sample["image"])
        stored = {"width": width, "height": height}
        sample.update({**stored, **sample} if width else stored)


@functools.cache  # many samples may be about one image
def header(path):
    """Width and height as stored, and EXIF's orientation, of an image file."""
    try:
        check_regular(path)
        with Image.open(path) as image:
            return *image.size, image.getexif().get(0x0112)
    except Exception:  # Pillow's readers raise nearly anything at a damaged file
        return 0, 0, None


def is_measured(sample):
    """Whether a sample has four numbers as its box, and an image of some size."""
    box, size = sample.get("bbox"), [sample.get("width"), sample.get("height")]
    numbers = isinstance(box, list) and [type(v) in (int, float) for v in box] == [True] * 4
    return numbers and all(type(v) is int and v > 0 for v in size)


def in_pixels(sample, units, fields):
    """As of `check_sample`, with the box in pixels. units: where the sample does not say it. What
    rounding lays beyond the image, up to a hundredth of its side, is cut off."""
    units = sample.pop("_units", None) or units or "pixels"
    size = sample.get("width"), sample.get("height")
    if isinstance(sample.get("image"), str) and size == (0, 0):  # it cannot be read
        return sample, []
    if is_measured(sample):
        box, sides = sample["bbox"], size * 2
        if units == "sizes":
            box = [*box[:2], box[0] + box[2], box[1] + box[3]]
        elif units == "padded":
            square = max(sides)
            box = [v * square - (square - side) / 2 for v, side in zip(box, sides)]
        elif units != "pixels":
            box = [v * side / float(units[3:]) for v, side in zip(box, sides)]
        for i, (v, side) in enumerate(zip(box, sides)):
            if -side / 100 <= v <= side * 1.01:
                box[i] = min(max(v, 0), side)
        sample["bbox"] = box
    return check_sample(sample, fields)


def warn_of_units(path, samples):
    """One warning where boxes whose form leaves their units open do not look like pixels."""
    samples = [sample for sample in samples if is_measured(sample) and not sample.get("_units")]
    boxes, sides = [s["bbox"] for s in samples], [(s["width"], s["height"]) for s in samples]
    below = sum(x2 < x1 or y2 < y1 for x1, y1, x2, y2 in boxes)
    beyond = sum(box[2] > w * 1.01 or box[3] > h * 1.01 for box, (w, h) in zip(boxes, sides))
    likely = None
    if all(0 <= v <= 1 for box in boxes for v in box):
        likely = "0..1"
    elif below > len(boxes) / 2:
        likely = "sizes"
    elif max(map(max, boxes)) <= 1000 and (max(map(max, sides)) > 1000 or beyond > len(boxes) / 10):
        likely = "0..1000"
    if boxes and likely:
        example = "{} of {}, an image of {} x {}".format(boxes[0], samples[0]["id"], *sides[0])
        flag = likely + " (LLaVA's own: --boxes padded)" * (likely == "0..1")
        print(f"warning: {path}: boxes look like {UNITS[likely]}, such as {example}; they are")
        print(f"  taken for [x1, y1, x2, y2] in pixels. What settles it: --boxes {flag}, or pixels")


def share_keys(samples):
    """One key for all samples of a picture, which is known by its bytes, not by its names: they
    stay on one side of the split."""
    picture = functools.cache(lambda path: hashlib.sha256(Path(path).read_bytes()).digest())
    key_of = {}
    shared = set()
    for sample in sorted(samples, key=lambda sample: "key" not in sample):  # a given one wins
        own = sample.get("key", sample["image"])
        key = key_of.setdefault(picture(sample["image"]), own)
        if key != own:
            sample["key"] = key
            shared.add(key)
    if shared:
        print(f"pictures with several names: {len(shared)}, each kept on one side of the split")
