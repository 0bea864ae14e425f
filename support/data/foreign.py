"""Files of your own (--data): our lines, and the forms that other trainers read.

A reader takes a row of a file and returns dicts of our fields, none where no expression of the row
names one box. What they lack is filled in; then they are checked as the files of a run are.
"""

import functools
import hashlib
import re
from collections import Counter
from pathlib import Path

from support.data.datasets import counted
from support.data.samples import IVT_FIELDS, header, read_samples
from support.running.errors import explained
from support.running.files import parse, read_lines
from support.running.flags import Flag

UNITS = {
    "pixels": "[x1, y1, x2, y2] in pixels",
    "sizes": "[x1, y1, width, height] in pixels",
    "0..1": "[x1, y1, x2, y2] as shares of width and height",
    "0..1000": "[x1, y1, x2, y2] in thousandths of width and height",
    "sizes-0..1": "[x1, y1, width, height] as shares of width and height",
}
OWN_FLAGS = {
    "data": Flag("your own samples: files to split, in a form of docs/your_gpu.md", kind="files"),
    "images": Flag("folder of the images of --data (default: that of each file)", kind="folder"),
    "boxes": Flag("; ".join(map(": ".join, UNITS.items())), choices=tuple(UNITS)),
    "skip_bad": Flag("leave out bad lines of --data, listed in FILE.skipped", kind="switch"),
}
MADE = "what writes it, in a form of docs/your_gpu.md"
KEPT = ("image", "width", "height", "expression", "bbox", "units")  # of a foreign row
BOX = re.compile(r"\[" + ",".join([r"\s*(-?\d+(?:\.\d+)?)\s*"] * 4) + r"\]")
ASKED = re.compile(r"(?:describes|description)\s*:\s*(.+)|(?:locate|find|detect)\s+(.+)", re.I)


def conversation(row):
    """LLaVA's and VLM-R1's rows: a sample for each request that is answered with one box."""
    images = row["image"] if isinstance(row.get("image"), list) else [row.get("image")]
    texts = [re.sub("</?(?:image|ref)>", "", turn["value"]) for turn in row["conversations"]]
    found = []
    for question, answer in zip(texts[::2], texts[1::2]):
        asked, boxes = ASKED.search(question), BOX.findall(answer)
        if asked and len(boxes) == len(images) == 1:
            words, box = (asked[1] or asked[2]).strip(" .?\"'"), [float(v) for v in boxes[0]]
            found.append({**row, "image": images[0], "expression": words, "bbox": box})
    return found


def swift(row):
    """ms-swift's grounding lines: their expressions and boxes are those of `objects`, whose
    image_id numbers the image that a box lies in, from 0; of several it has to."""
    objects, images = row.get("objects") or {}, row["images"]
    names, boxes = objects.get("ref", []), objects.get("bbox", [])
    places = objects.get("image_id") or [0] * len(boxes) * (len(images) == 1)
    units = {"real": {}, "norm1": {"units": "0..1"}}[objects.get("bbox_type", "real")]
    if not len(names) == len(boxes) == len(places):  # nothing else says which box is whose
        return []
    found, whose = [], list(zip(names, places))
    for (name, place), box in zip(whose, boxes):
        if whose.count((name, place)) == 1:
            words = {"image": images[place], "expression": name}
            found.append({**words, "bbox": box, **units})
    return found


def coco(whole):
    """Yields the annotations of COCO's instances.json, each with its image and category."""
    images = {image["id"]: {**image, "image": image["file_name"]} for image in whole["images"]}
    names = {category["id"]: category["name"] for category in whole["categories"]}
    counts = Counter((row["image_id"], row["category_id"]) for row in whole["annotations"])
    for row in whole["annotations"]:
        image, category = pair = row["image_id"], row["category_id"]
        alone = counts[pair] == 1 and not row.get("iscrowd")
        yield {**images[image], **row, "expression": names[category], "alone": alone}


OURS = ("our own lines", lambda row: [{key: row[key] for key in row if key != "units"}])
FORMS = {  # the field that tells a form -> its name, its reader
    "img_path": ("lines with img_path", lambda row: [{**row, "image": row["img_path"]}]),
    "messages": ("ms-swift", swift),
    "conversations": ("conversations (LLaVA, VLM-R1)", conversation),
    "alone": ("COCO's instances", lambda row: [{**row, "units": "sizes"}] * row["alone"]),
}


def own_samples(args, fields=IVT_FIELDS):
    """The samples of the files of --data, with absolute paths of their images. All samples of a
    picture, which is known by its bytes, get one key: they stay on one side of the split."""
    samples = []
    for number, path in enumerate(map(Path, args.data), 1):
        taken = {sample["id"] for sample in samples}
        found = read_samples(path, MADE, fields, args.skip_bad, rows=own_rows(path, args))
        for sample in found:
            sample["id"] += f" ({number})" * (sample["id"] in taken)
        samples += found
    digest = functools.cache(lambda path: hashlib.sha256(Path(path).read_bytes()).digest())
    same = {}  # a picture or a key -> the key that it is taken for

    def key_of(name):
        while name in same:
            name = same[name]
        return name

    for sample in samples:
        picture = key_of(digest(sample["image"]))
        key = key_of(sample.get("key", sample["image"]))
        if picture != key:
            same[picture] = key
    for sample in samples:
        sample["key"] = key_of(digest(sample["image"]))
    return samples


def own_rows(path, args):
    """Place and row of all that a file holds, for `read_samples`: complete, boxes in pixels."""
    rows, counts, turned = [], Counter(), set()
    for number, row in enumerate(content(path), 1):
        place = f"{'line' if isinstance(row, bytes) else 'row'} {number}"
        form, reader = OURS
        try:
            row = parse(row) if isinstance(row, bytes) else row
        except ValueError:
            rows.append((place, row))  # told with the other problems
            continue
        try:
            form, reader = next((FORMS[key] for key in FORMS if key in row), OURS)
            found = reader(row)
            for i, sample in enumerate(found):
                if form != OURS[0]:
                    sample = {key: sample[key] for key in KEPT if key in sample}
                sample = {"id": f"{path.stem}-{number}.{i + 1}", "source": path.stem, **sample}
                found[i] = complete(sample, args.images or path.parent, turned)
        except Exception as e:  # whatever a damaged row makes of a reader
            fault = f"cannot be used as one of {form} ({type(e).__name__}: {e}); repair it"
            remedy = ", or give --images DIR" * isinstance(e, OSError)
            found = [f"{fault}{remedy}: {str(row)[:60]!r}"]
        counts[form if found else "dropped, whose words name no box or several"] += 1
        rows += [(place, sample) for sample in found]
    print(f"{path}: rows: {counted(counts)}")
    if turned:
        photos = f"{len(turned)} photos, such as {min(turned)}, are marked as turned or mirrored"
        print(f"warning: {photos}; boxes are taken for those of the pixels as stored")
    measured = [row for _, row in rows if is_measured(row)]
    unsaid = [sample for sample in measured if sample.get("units") != "0..1"]
    if unsaid and not args.boxes:
        warn_of_units(path, unsaid)
    for sample in unsaid:
        sample["units"] = args.boxes or sample.get("units", "pixels")
    for sample in measured:
        in_pixels(sample, sample.pop("units"))
    return rows


def content(path):
    """The rows of a file: of an array, of COCO's instances.json, or lines, which are bytes yet."""
    lines = read_lines(path, MADE)
    try:
        whole = parse(b"\n".join(lines))
    except ValueError:  # several lines
        return lines
    if isinstance(whole, dict) and "annotations" in whole:
        with explained(f"{path} is not as COCO's instances.json", "repair it"):
            return list(coco(whole))
    return whole if isinstance(whole, list) else [whole]


def complete(sample, folder, turned):
    """A sample with its image's path and size. turned: gets photos that no size settles."""
    sample["id"] = str(sample["id"])  # theirs are whole numbers
    path = sample["image"] = str(Path(folder, sample["image"]).resolve())
    width, height, orientation = header(path)
    hidden = "width" not in sample or width == height
    if orientation in (2, 3, 4) or orientation in (5, 6, 7, 8) and hidden:
        turned.add(path)
    return {"width": width, "height": height, **sample}


def is_measured(sample):
    """Whether a sample has four numbers as its box, and an image of some size; none huge."""
    box = isinstance(sample, dict) and sample.get("bbox")
    numbers = [*box, sample["width"], sample["height"]] if isinstance(box, list) else []
    if [type(v) in (int, float) for v in numbers] != [True] * 6:
        return False
    return max(map(abs, numbers)) < 1e9 and min(numbers[4:]) > 0


def in_pixels(sample, units):
    """Turns a box into corners in pixels. What rounding lays beyond the image is cut off."""
    box, sides = sample["bbox"], (sample["width"], sample["height"]) * 2
    if ".." in units:
        box = [v * side / float(units.rpartition("..")[2]) for v, side in zip(box, sides)]
    if "sizes" in units:
        box = [*box[:2], box[0] + box[2], box[1] + box[3]]
    for i, (v, side) in enumerate(zip(box, sides)):
        if -side / 100 <= v <= side * 1.01:
            box[i] = min(max(v, 0), side)
    sample["bbox"] = box


def warn_of_units(path, samples):
    """One warning where boxes do not look like pixels or, in COCO's form, like sizes in pixels.
    samples: those whose row does not say what its box is in."""
    boxes, sides = [s["bbox"] for s in samples], [(s["width"], s["height"]) for s in samples]
    taken = samples[0].get("units", "pixels")
    below = sum(x2 < x1 or y2 < y1 for x1, y1, x2, y2 in boxes)
    ends = [(x1 + x2, y1 + y2) if taken == "sizes" else (x2, y2) for x1, y1, x2, y2 in boxes]
    beyond = sum(x > w * 1.01 or y > h * 1.01 for (x, y), (w, h) in zip(ends, sides))
    most, leave = max(map(max, boxes)), beyond > len(boxes) / 10
    likely = None
    if all(0 <= v <= 1 for box in boxes for v in box):
        likely = "sizes-0..1" if taken == "sizes" or below > len(boxes) / 2 else "0..1"
    elif taken == "sizes":
        likely = "pixels" if leave and not below else None
    elif below > len(boxes) / 2:
        likely = "sizes"
    elif most <= 1000 and (max(map(max, sides)) > 1000 or leave):
        likely = "0..1000"
    if likely:
        example = "{} of {}, an image of {} x {}".format(boxes[0], samples[0]["id"], *sides[0])
        print(f"warning: {path}: boxes look like {UNITS[likely]}, such as {example}")
        print(f"  What settles it: --boxes {likely}, or --boxes {taken}, as which they are taken")
