"""Samples of a .jsonl file and their images, all checked before any work starts."""

import json
import struct
import warnings
from collections import Counter
from pathlib import Path

from support.running.errors import stop
from support.running.files import read_jsonl, read_lines, write_text
from support.running.flags import command

import numpy as np
from PIL import Image, ImageOps

FIELDS = {"id": str, "source": str, "image": str, "width": int, "height": int}
OPTIONAL = {"key": str, "bbox": list}
IVT_FIELDS = {**FIELDS, "expression": str, "bbox": list}
VISRL_FIELDS = {**FIELDS, "question": str, "answer": str}
PROBLEMS_SHOWN = 20


def read_samples(path, command, fields=IVT_FIELDS, skip_bad=False):
    """The samples of a .jsonl file, every line and every image checked.

    Fields: id, source, image (path relative to the file), width, height, the texts of `fields`,
    bbox (float pixels x1 y1 x2 y2; VisRL's samples need none), and optionally key (samples of one
    key stay on one side of the split). fields: name -> type of those that have to be there.
    command: what makes the file, for the message when it is missing. All problems are reported
    together and end the program, each with line, field, value and remedy. With `skip_bad` the good
    samples are returned; the others are counted by field and listed in <file>.skipped.
    """
    from tqdm import tqdm

    path = Path(path)
    samples = []
    problems = []
    line_of_id = {}
    counts = Counter()
    lines = read_lines(path, command)
    bar = tqdm(lines, desc=f"checking {path.name}", unit="sample", leave=False, delay=2)
    for number, line in enumerate(bar, 1):
        sample, found = parse_sample(line, path.parent, fields)
        if not found:
            first = line_of_id.setdefault(sample["id"], number)
            if first != number:
                sentence = f"id {sample['id']!r} is on line {first} too; give each sample its own"
                found = [("id", sentence)]
        if found:
            counts.update({field for field, _ in found})
            problems += [f"{path}, line {number}: {sentence}" for _, sentence in found]
        else:
            samples.append(sample)
    if problems and not skip_bad:
        shown = problems[:PROBLEMS_SHOWN]
        if len(problems) > PROBLEMS_SHOWN:
            shown.append(f"... and {len(problems) - PROBLEMS_SHOWN} more")
        head = f"{len(problems)} problems in {path} (--skip-bad goes on without these lines):"
        stop("\n".join([head, *shown]))
    if problems:
        skipped = path.with_name(path.name + ".skipped")
        write_text(skipped, "\n".join(problems) + "\n")
        count = f"{len(lines) - len(samples)} of {len(lines)} samples skipped"
        print(f"{path}: {count}, by field: {dict(counts)}; listed in {skipped}")
    if not samples:
        stop(f"{path} holds no samples; make it again: {command}")
    return samples


def read_side(args, side, made_by="python make_data.py", fields=IVT_FIELDS):
    """The samples of one side of a run, such as "train" or "test". made_by: the script for a
    message."""
    return read_samples(args.out / f"data/{side}.jsonl", command(args, made_by), fields)


def read_trajectories(args, data):
    """What SFT learns from: the trajectories of data/sft.jsonl (T + 1 boxes and traces), each with
    all that its sample says. Exits when there are none, or not with --steps."""
    sample_of = {sample["id"]: sample for sample in read_side(args, "train")}
    path = data / "sft.jsonl"
    rows = read_jsonl(path, command(args, "python make_data.py"))
    rows = [{**sample_of[row["id"]], **row} for row in rows if row["id"] in sample_of]
    if not rows:
        stop(f"{path} has no trajectory of a sample in train.jsonl; make it again")
    count = len(rows[0]["boxes"])
    if count != args.steps + 1:
        stop(f"{path} holds {count} boxes a trajectory; run make_data.py with --steps {args.steps}")
    return rows


def parse_sample(line, folder, fields):
    """One line (bytes) -> (sample, problems as of `sample_problems`)."""
    try:
        sample = json.loads(line)  # UTF-8, as JSON is
    except (ValueError, RecursionError) as e:
        return None, [("JSON", f"not JSON ({e}); repair or remove the line: {line[:60]!r}")]
    return sample, sample_problems(sample, folder, fields)


def sample_problems(sample, folder, fields):
    """What is wrong with one sample: (field, sentence with value and remedy) for each problem."""
    if not isinstance(sample, dict):
        kind = f"{str(sample)[:60]!r} is not a JSON object"
        return [("JSON", f'{kind}; see README, "Your own data"')]
    problems = []
    given = {name: kind for name, kind in OPTIONAL.items() if name in sample}
    for name, kind in {**fields, **given}.items():
        value = sample.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):  # True is an int in Python
            problems.append((name, f"{name} is {str(value)[:60]!r}; expected {kind.__name__}"))
    if problems:
        return problems

    width, height = sample["width"], sample["height"]
    if "bbox" in sample:
        problems += bbox_problems(sample["bbox"], width, height)
    words = {name: sample[name] for name in fields if name in ("expression", "question", "answer")}
    for name, text in words.items():
        if not text.strip() or "<|" in text:
            remedy = "write it in words, without special tokens (<|...|>)"
            problems.append((name, f"{name} is {text[:60]!r}; {remedy}"))
    if max(width, height) > 150 * min(width, height):
        sentence = (
            f"image is {width} x {height}; Qwen3-VL's image processor takes sides of 200 to 1 at "
            "most; crop it"
        )
        problems.append(("width", sentence))
    texts = "".join([sample["id"], sample["source"], sample["image"], *words.values()])
    if any("\ud800" <= c <= "\udfff" for c in texts):
        sentence = "a text holds half a surrogate pair, which is no character; repair it"
        problems.append(("JSON", sentence))
    try:
        load_image(sample, folder)
    except ValueError as e:
        problems.append(("image", str(e)))
    return problems


def bbox_problems(bbox, width, height):
    """As `sample_problems`, of a bbox in the pixels of a width x height image."""
    numbers = [v for v in bbox if type(v) in (int, float) and abs(v) < 1e9]  # NaN is below nothing
    if len(bbox) != 4 or len(numbers) != 4:
        sentence = "expected four finite numbers [x1, y1, x2, y2] in pixels"
        return [("bbox", f"bbox is {str(bbox)[:80]}; {sentence}")]
    x1, y1, x2, y2 = bbox
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        sentence = (
            f"bbox {bbox} is empty, inverted or outside the {width} x {height} image; expected "
            "[x1, y1, x2, y2] with x1 < x2, y1 < y2"
        )
        return [("bbox", sentence)]
    return []


def load_image(sample, folder, upright=False):
    """The sample's image as 8-bit RGB (PIL), of the size that the sample says.

    Grey, palette and CMYK images are converted, 16-bit ones scaled down, transparency is laid on
    white. A photo that a camera marked as rotated is turned only if the annotated size says so, or
    `upright` does. Raises ValueError that names file and remedy: animations, floating-point images,
    files larger than Pillow's limit against decompression bombs, truncated or foreign ones.
    """
    path = Path(folder) / sample["image"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return decode(image, path, (sample["width"], sample["height"]), upright)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"image {path} has more pixels than {Image.MAX_IMAGE_PIXELS:,}, Pillow's limit against "
            "decompression bombs; reduce the image, its size and its box"
        ) from None
    # What Pillow's readers raise at a damaged file
    except (OSError, SyntaxError, ArithmeticError, EOFError, IndexError, struct.error) as e:
        message = f"image {path} cannot be read ({e}); repair the path or the file"
        raise ValueError(message) from None


def decode(image, path, size, upright):
    """An open image file -> 8-bit RGB. See `load_image`; size: (width, height) in pixels."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a preview
        message = f"image {path} is an animation; save the frame that the box was drawn on"
        raise ValueError(message)
    if image.mode == "F":
        raise ValueError(f"image {path} has floating-point pixels; save it with 8 bits a channel")
    turned = image.size == size[::-1] and image.size != size
    if upright or (turned and image.getexif().get(0x0112, 1) >= 5):  # EXIF's orientation
        image = ImageOps.exif_transpose(image)
    if image.size != size:
        raise ValueError(
            f"image {path} is {image.width} x {image.height}; the sample says {size[0]} x "
            f"{size[1]}; correct width and height, or the path"
        )
    image.load()  # decodes: a truncated file shows here
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
