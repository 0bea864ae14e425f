"""Samples of a .jsonl file and their images, all checked before any work starts."""

import json
import re
import warnings
from pathlib import Path

from support.running.errors import out_of_memory, stop
from support.running.files import read_jsonl, read_lines, write_text
from support.running.flags import command

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

FIELDS = {"id": str, "source": str, "image": str, "width": int, "height": int}
OPTIONAL = {"key": str, "bbox": list}
IVT_FIELDS = {**FIELDS, "expression": str, "bbox": list}
VISRL_FIELDS = {**FIELDS, "question": str, "answer": str}
PROBLEMS_SHOWN = 20
NO_WORDS = re.compile("<\\||[\ud800-\udfff]")  # half a surrogate pair is no character


def read_samples(path, command, fields=IVT_FIELDS, skip_bad=False):
    """The samples of a .jsonl file that `command` makes, every line and every image checked.

    fields: name -> type of what has to be there. An image is a path relative to the file, a bbox is
    float pixels x1 y1 x2 y2, samples of one key stay on one side of the split. All problems end the
    program together, each with line, field, value and remedy. With `skip_bad` the good samples are
    returned, and the others listed in <file>.skipped.
    """
    path = Path(path)
    lines = read_lines(path, command)
    samples = []
    problems = []
    line_of_id = {}
    bar = tqdm(lines, desc=f"checking {path.name}", unit="sample", leave=False, delay=2)
    for number, line in enumerate(bar, 1):
        sample, found = parse_sample(line, path.parent, fields)
        if not found:
            name = sample["id"]
            first = line_of_id.setdefault(name, number)
            if first != number:
                found = [f"id {name!r} is on line {first} too; give each sample its own"]
        if not found:
            samples.append(sample)
        problems += [f"{path}, line {number}: {sentence}" for sentence in found]
    if problems and not skip_bad:
        head = f"{len(problems)} problems in {path} (--skip-bad leaves such lines of --data out):"
        stop("\n".join([head, *problems[:PROBLEMS_SHOWN]]))
    if problems:
        skipped = path.with_name(path.name + ".skipped")
        write_text(skipped, "\n".join(problems) + "\n")
        count = f"{len(lines) - len(samples)} of {len(lines)} samples skipped"
        print(f"{path}: {count}; listed in {skipped}")
    if not samples:
        stop(f"{path} holds no samples; make it again: {command}")
    return samples


def own_samples(args, fields=IVT_FIELDS):
    """The samples of --data, a file of your own, with absolute paths of their images."""
    samples = read_samples(args.data, "what writes it", fields, args.skip_bad)
    for sample in samples:
        sample["image"] = str((Path(args.data).parent / sample["image"]).resolve())
    return samples


def read_side(args, side, made_by="python make_data.py", fields=IVT_FIELDS):
    """The samples of one side of a run, such as "train" or "test". made_by: the script for a
    message."""
    return read_samples(args.out / f"data/{side}.jsonl", command(args, made_by), fields)


def with_samples(path, samples, made_by=""):
    """The rows of a .jsonl file that `made_by` makes, each with all that its sample says. Rows of
    other samples are of an earlier run, and left out."""
    sample_of = {sample["id"]: sample for sample in samples}
    rows = read_jsonl(path, made_by)
    return [{**sample_of[row["id"]], **row} for row in rows if row["id"] in sample_of]


def read_trajectories(args, data):
    """What SFT learns from: the trajectories of data/sft.jsonl (T + 1 boxes and traces; one of each
    where a right box was kept). Exits when there are none, or not with --steps."""
    path = data / "sft.jsonl"
    rows = with_samples(path, read_side(args, "train"), command(args, "python make_data.py"))
    if not rows:
        stop(f"{path} has no trajectory of a sample in train.jsonl; make it again")
    count = max(len(row["boxes"]) for row in rows)
    if count != args.steps + 1:
        stop(f"{path} holds {count} boxes a trajectory; run make_data.py with --steps {args.steps}")
    return rows


def parse_sample(line, folder, fields):
    """One line (bytes) -> (sample, what is wrong with it: sentences with value and remedy)."""
    try:
        sample = json.loads(line)  # UTF-8, as JSON is
    except (ValueError, RecursionError) as e:
        return None, [f"not JSON ({e}); repair or remove the line: {line[:60]!r}"]
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

    for name in [name for name, kind in fields.items() if kind is str]:
        if not sample[name].strip() or NO_WORDS.search(sample[name]):
            remedy = "write it in words, without special tokens (<|...|>) and surrogates"
            problems.append(f"{name} is {sample[name][:60]!r}; {remedy}")
    width, height = sample["width"], sample["height"]
    if "bbox" in sample and not is_inside(sample["bbox"], width, height):
        problems.append(
            f"bbox is {str(sample['bbox'])[:80]}; expected four finite numbers [x1, y1, x2, y2] in "
            f"pixels of the {width} x {height} image, with x1 < x2, y1 < y2"
        )
    if max(width, height) > 150 * min(width, height):
        problems.append(f"image is {width} x {height}; Qwen3-VL takes 200 to 1 at most; crop it")
    try:
        load_image(sample, folder)
    except ValueError as e:
        problems.append(str(e))
    return sample, problems


def is_inside(bbox, width, height):
    """Whether this is a box with an area inside an image of this size."""
    if len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
        return False
    x1, y1, x2, y2 = bbox
    return 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height  # NaN is in no range


def load_image(sample, folder, upright=False):
    """The sample's image as 8-bit RGB (PIL), of the size that the sample says.

    Grey, palette and CMYK images are converted, 16-bit ones scaled down, transparency is laid on
    white. A photo that a camera marked as rotated is turned only if the annotated size says so;
    with `upright` always, and its size need not be known. Raises ValueError that names file and
    reason: animations, floating-point images, files larger than Pillow's limit against
    decompression bombs, truncated or foreign ones.
    """
    path = Path(folder) / sample["image"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
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
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    turned = image.size == size[::-1] and image.size != size
    if upright or (turned and image.getexif().get(0x0112, 1) >= 5):  # EXIF's orientation
        image = ImageOps.exif_transpose(image)
    if image.size != size and not upright:
        own, said = ("{} x {}".format(*pair) for pair in (image.size, size))
        raise ValueError(f"it is {own}, the sample says {said}")
    image.load()  # decodes: a truncated file shows here
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
