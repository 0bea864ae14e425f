"""Samples of a .jsonl file and their images, all checked before any work starts."""

import functools
import hashlib
import math
import os
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path

from support.running.errors import explained, out_of_memory, say_once, stop, verify
from support.running.files import check_regular, parse, read_jsonl, read_lines, write_text
from support.running.flags import command

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

FIELDS = {"id": str, "source": str, "image": str, "width": int, "height": int}
OPTIONAL = {"key": str, "bbox": list}
IVT_FIELDS = {**FIELDS, "expression": str, "bbox": list}
VISRL_FIELDS = {**FIELDS, "question": str, "answer": str}
SEEN = ("image", "width", "height")  # of a sample, when its image is opened
PROBLEMS_SHOWN = 20
THREADS = 8
WORDS = "1 to 2000 characters, without special tokens (<|...|>, <think>), surrogates and NUL"
# Half a surrogate pair is no character; the tags are tokens that control the real Qwen3-VL
NO_WORDS = re.compile(r"\A\s*\Z|<\||</?(?:think|tool_\w+)>|[\0\ud800-\udfff]")


def read_samples(path, command, fields=IVT_FIELDS, skip_bad=False, stamp=None, rows=None):
    """The samples of a .jsonl file that `command` makes, every line and every image checked; all
    problems end the program together, each with line, field, value and remedy.

    fields: name -> type of what has to be there. An image is a path relative to the file, a bbox is
    float pixels x1 y1 x2 y2, samples of one key stay on one side of the split. skip_bad: the good
    samples are returned, the others listed in <file>.skipped. stamp: a file that says what images
    were checked, by path, size and time. rows: (place, row) of all that a file of another form has.
    """
    path = Path(path)
    if rows is None:
        rows = [(f"line {i}", line) for i, line in enumerate(read_lines(path, command), 1)]
    samples = []
    problems = []
    place_of_id = {}
    parsed = [parse_sample(row, fields) for _, row in rows]
    seen = stamp and stamp_of(parsed, path.parent)
    known = seen and stamp.exists() and stamp.read_bytes() == seen.encode()
    if not known:
        parsed = in_threads(image_check(path.parent), parsed, path.name)
    for (place, _), (sample, found) in zip(rows, parsed):
        if not found:
            first = place_of_id.setdefault(sample["id"], place)
            if first != place:
                found = [f"id {sample['id']!r} is on {first} too; give each sample its own"]
        if not found:
            samples.append(sample)
        problems += [f"{path}, {place}: {sentence}" for sentence in found]
    if problems and not skip_bad:
        head = f"{len(problems)} problems in {path} (--skip-bad leaves such lines of --data out):"
        stop("\n".join([head, *problems[:PROBLEMS_SHOWN]]))
    if problems:
        skipped = path.with_name(path.name + ".skipped")
        write_text(skipped, "\n".join(problems) + "\n")
        count = f"{len(rows) - len(samples)} of {len(rows)} samples skipped"
        print(f"{path}: {count}; listed in {skipped}")
    if not samples:
        stop(f"{path} holds no samples; make it again: {command}")
    if seen and not known:
        write_text(stamp, seen)
    return samples


def in_threads(function, items, title):
    """Yields a function's results of each item, in their order; Pillow decodes beside threads."""
    bar = dict(total=len(items), desc=f"checking {title}", unit="sample", leave=False, delay=2)
    with ThreadPool(THREADS) as pool:
        yield from tqdm(pool.imap(function, items, chunksize=16), **bar)


def stamp_of(parsed, folder):
    """A hash of what the images of samples (as of `parse_sample`) were checked against, or None."""
    status = functools.cache(os.stat)  # many samples may be about one image
    digest = hashlib.sha256()
    try:
        for sample, _ in parsed:
            file = status(os.path.join(folder, sample["image"]))
            seen = *map(sample.get, SEEN), file.st_size, file.st_mtime_ns
            digest.update(str(seen).encode())
    except (OSError, ValueError, TypeError):  # not there, no path, no sample
        return None
    return digest.hexdigest()


def image_check(folder):
    """-> what `parse_sample` returns -> the same, with what is wrong with the image."""

    @functools.cache  # many samples may be about one image
    def fault_of(*seen):
        try:
            load_image(dict(zip(SEEN, seen)), folder)
        except ValueError as e:
            return [str(e)]
        return []

    return lambda row: (row[0], row[1] + (fault_of(*map(row[0].get, SEEN)) if row[0] else []))


def read_side(args, side, made_by="python make_data.py", fields=IVT_FIELDS):
    """The samples of one side of a run, such as "train". made_by: the script for a message."""
    path = args.out / f"data/{side}.jsonl"
    return read_samples(path, command(args, made_by), fields, stamp=path.with_suffix(".checked"))


def with_samples(path, samples, made_by, usable):
    """The rows of a .jsonl file that `made_by` makes, each with all that its sample says; those of
    other samples are of an earlier run, and left out. usable: row -> whether it can be used."""
    sample_of = {sample["id"]: sample for sample in samples}
    rows = []
    for number, row in enumerate(read_jsonl(path, made_by), 1):
        fault = f"{path}, line {number}: no row of such a file: {str(row)[:80]!r}"
        with explained(fault, f"move the file away, then run: {made_by}"):
            if row["id"] in sample_of:
                rows.append({**row, **sample_of[row["id"]]})
                verify(usable(row), "other values")
    return rows


def is_words(text, most=2000):
    """Whether this is a text of no more characters that is read as words alone."""
    return isinstance(text, str) and len(text) <= most and not NO_WORDS.search(text)


def is_box(box):
    """Whether this is a valid box, four integers in 0..1000."""
    return is_inside(box, 1000, 1000) and {*map(type, box)} == {int}


def read_trajectories(args, data):
    """What SFT learns from: the trajectories of data/sft.jsonl (T + 1 boxes and traces; one of each
    where a right box was kept). Exits when there are none, or not with --steps."""
    path = data / "sft.jsonl"
    train, made_by = read_side(args, "train"), command(args, "python make_data.py")
    rows = with_samples(path, train, made_by, is_trajectory)
    if not rows:
        stop(f"{path} has no trajectory of a sample in train.jsonl; make it again")
    for count in {len(row["boxes"]) for row in rows} - {1, args.steps + 1}:
        stop(f"{path} holds {count} boxes a trajectory; run make_data.py with --steps {args.steps}")
    return rows


def is_trajectory(row):
    """Whether a row has boxes, and a trace for each, in words; how long is for the teacher."""
    boxes, traces = row["boxes"], row["traces"]
    whole = isinstance(traces, list) and 0 < len(boxes) == len(traces)
    return whole and all(map(is_box, boxes)) and all(is_words(text, math.inf) for text in traces)


def parse_sample(row, fields):
    """One line (bytes), what it holds, or (a text) why it holds nothing -> (sample or None, what is
    wrong with it: sentences with value and remedy; of its image nothing)."""
    if isinstance(row, str):
        return None, [row]
    try:
        sample = parse(row) if isinstance(row, bytes) else row  # UTF-8, as JSON is
    except ValueError as e:
        return None, [f"not JSON ({e}); repair or remove the line: {row[:60]!r}"]
    if not isinstance(sample, dict):
        return None, [f'{str(sample)[:60]!r} is not a JSON object; see README, "Your own data"']
    problems = []
    given = {name: kind for name, kind in OPTIONAL.items() if name in sample}
    for name, kind in {**fields, **given}.items():
        value = sample.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):  # True is an int in Python
            problems.append(f"{name} is {str(value)[:60]!r}; expected {kind.__name__}")
    if problems:
        return None, problems

    for name, kind in fields.items():
        if kind is str and not is_words(sample[name]):
            problems.append(f"{name} is {sample[name][:60]!r}; write it in words, {WORDS}")
    width, height = sample["width"], sample["height"]
    if "bbox" in sample and not is_inside(sample["bbox"], width, height):
        problems.append(
            f"bbox is {str(sample['bbox'])[:80]}; expected four finite numbers [x1, y1, x2, y2] in "
            f"pixels of the {width} x {height} image, with x1 < x2, y1 < y2"
        )
    return sample, problems


def is_inside(bbox, width, height):
    """Whether this is a box with an area inside an image of this size."""
    if len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
        return False
    x1, y1, x2, y2 = bbox
    return 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height  # NaN is in no range


@functools.cache  # many samples may be about one image
def header(path):
    """Width and height as stored, and EXIF's orientation, of an image file."""
    check_regular(path)
    with Image.open(path) as image:
        return *image.size, image.getexif().get(0x0112)


def load_image(sample, folder, upright=False):
    """The sample's image as 8-bit RGB (PIL), of the size that the sample says.

    Grey, palette and CMYK images are converted, 16-bit ones scaled, transparency is laid on white.
    A photo that a camera marked as rotated is turned only if the annotated size says so; with
    `upright` always, and its size need not be known. Raises ValueError that names file and reason.
    """
    path = Path(folder) / sample["image"]
    try:
        check_regular(path)
        with Image.open(path) as image:
            return decode(image, (sample["width"], sample["height"]), upright)
    except Exception as e:  # Pillow's readers raise nearly anything at a damaged file
        if out_of_memory(e):
            raise
        raise ValueError(f"image {path} cannot be used ({e}); repair it or its path") from None


def decode(image, size, upright):
    """An open image file -> 8-bit RGB. See `load_image`; size: (width, height) in pixels."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a preview
        raise ValueError("an animation; save the frame that the box was drawn on")
    pixels = image.width * image.height
    if pixels > Image.MAX_IMAGE_PIXELS:  # of which Pillow warns; twice as many it refuses
        raise ValueError(f"it has {pixels} pixels, which exceeds limit of {Image.MAX_IMAGE_PIXELS}")
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if upright or image.size != size and image.getexif().get(0x0112) in (5, 6, 7, 8):  # turned
        image = ImageOps.exif_transpose(image)
    if image.size != size and not upright:
        own, said = ("{} x {}".format(*pair) for pair in (image.size, size))
        raise ValueError(f"it is {own}, the sample says {said}")
    if max(image.size) > 150 * min(image.size):
        raise ValueError("{} x {}; Qwen3-VL takes 200 to 1 at most; crop it".format(*image.size))
    image.load()  # decodes: a truncated file shows here
    if image.mode.startswith("I"):  # up to 16 or 32 bits
        say_once("warning: grey images of more than 8 bits are stretched to the range they use")
        pixels = np.asarray(image, float)
        low, high = pixels.min(), pixels.max()
        image = Image.fromarray(((pixels - low) * (255 / max(1, high - low))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
