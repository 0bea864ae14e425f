"""The trained model on pictures of your own (`evaluate.py --image`)."""

import json
from functools import partial
from pathlib import Path

from common import denormalize_box
from support.data.samples import load_image
from support.model.adapters import add_adapter
from support.model.checkpoints import best_adapter
from support.model.decoding import roll_in_parts, rollouts
from support.model.loading import load_vlm
from support.report.page import group, write_page
from support.report.pictures import write_strip
from support.report.rows import Row
from support.running.errors import stop
from support.running.files import agrees, read_lines
from support.running.flags import Flag, command

from PIL import Image, ImageOps

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LINE = '{"image": "photo.jpg", "expression": "the cat on the left"}'


IMAGE = (
    "a picture of yours instead of the test samples, a folder of pictures, or a .jsonl with an "
    "image and an expression a line"
)
FLAGS = {
    "image": Flag(IMAGE, kind="file or folder"),
    "expression": Flag("what to find in it"),
}


def look_at(args, image, expression, loop):
    """Runs the loop on image files, each with an expression; prints every step, with boxes in
    pixels, and writes a page of them, figures/<name of `image`>.html under --out, and the first
    one as a picture beside it.

    image, expression: as of `pairs`. Takes the GRPO adapter of the run, else its SFT adapter. Exits
    when there is none, or when a file is no image or an expression no text that can be used.
    """
    wanted = pairs(image, expression)
    adapter = best_adapter(args.out)
    if not adapter:
        stop(f"{args.out} has no adapter; first run: {command(args, 'python sft.py')}")
    agrees(args, adapter.name, "feedback")
    samples = [own_sample(path, words)[0] for path, words in wanted]
    if not samples:
        stop(f"--image {image}: no picture in this folder ({', '.join(KINDS)})")
    if len(samples) > 1:
        for number, sample in enumerate(samples, 1):  # a list may name a picture twice
            sample["id"] = f"{number} {sample['id']}"
    vlm = load_vlm(args)
    add_adapter(vlm, adapter, "policy")
    roll = rollouts(args)
    load = partial(load_image, upright=True)
    options = dict(max_tokens=args.max_tokens, loop=loop, load=load, seeds=[0] * len(samples))
    made = roll_in_parts(roll, vlm, samples, "/", args.batch_size, args.steps, **options)
    lines = [{"boxes": t.boxes, "texts": t.texts} for t in made]
    for pair in zip(samples, made):
        show(*pair)
    place = args.out / f"figures/{Path(image).stem}"
    first = samples[0], load(samples[0], "/"), lines[0]
    write_strip(place.with_name(f"{place.name}.png"), *first, loop)
    row = Row(adapter.name, loop=loop, drawn=args.feedback != "again")
    page = write_page(
        place.with_name(f"{place.name}.html"),
        title=f"{Path(image).name} · {args.out.name}, {adapter.name}",
        groups=[group("your own", samples, {row: lines}, args.steps)],
        data=Path("/"),
        load=load,
    )
    print(f"{adapter} on {image}: {page}, and the first one as a picture beside it")


def show(sample, trajectory):
    print(f"{sample['id']}: {sample['expression']}")
    for t, (box, text) in enumerate(zip(trajectory.boxes, trajectory.texts)):
        where = "no valid box"
        if box:
            pixels = denormalize_box(box, sample["width"], sample["height"])
            where = [round(v, 1) for v in pixels]
        print(f"step {t}: {where}\n  {text.strip()}")


def pairs(image, expression):
    """-> (path of an image, expression) pairs of: an image file and an expression; a folder of
    images and one expression for all; a .jsonl whose lines name both, images relative to the
    file. Exits with what is wrong, and where."""
    path = Path(image or "")
    if bool(expression) == (path.suffix == ".jsonl") or not image:
        stop(
            'give both: --image photo.jpg --expression "the cat on the left"; or a list alone: '
            f"--image my.jsonl, with lines as {LINE}"
        )
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
        return [(str(file), expression) for file in files]
    if expression:
        return [(image, expression)]
    found = []
    for number, line in enumerate(read_lines(path, "what makes it"), 1):
        try:
            row = json.loads(line)
            found.append((str(path.parent / row["image"]), row["expression"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            line = line[:80].decode("utf-8", "backslashreplace")
            stop(f"--image {path}, line {number}: expected {LINE}; found {line!r}")
    return found


def own_sample(path, expression):
    """An image file -> (sample without a truth, image as a person sees it). Exits when it cannot be
    read, or the expression is no text that can be used."""
    if not isinstance(expression, str) or not expression.strip() or "<|" in expression:
        stop(f"{path}: expression {expression!r}; say what to find, without <|...|>")
    try:
        with Image.open(path) as file:
            width, height = ImageOps.exif_transpose(file).size
        sample = {
            "id": Path(path).name,
            "image": str(Path(path).resolve()),
            "width": width,
            "height": height,
            "expression": expression,
        }
        return sample, load_image(sample, "/", upright=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        stop(f"--image {path}: {e}")
