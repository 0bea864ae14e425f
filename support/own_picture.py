"""The trained model on a picture of your own (`evaluate.py --image`)."""

from pathlib import Path

from common import denormalize_box, rollout
from support.checkpoints import best_adapter
from support.errors import explain_out_of_memory, stop, working_on
from support.files import agrees
from support.models import load_with_adapter
from support.pictures import filmstrip, write_picture
from support.samples import load_image

from PIL import Image

ORIENTATION = 0x0112  # EXIF; from 5 on, width and height are exchanged


def look_at(args, image, expression, loop):
    """Runs the loop on an image file for an expression; prints every step, with boxes in pixels,
    and writes the filmstrip figures/<name of the image>.png under --out.

    Takes the GRPO adapter of the run, else its SFT adapter. Exits when there is none, or when the
    file is no image or the expression no text that can be used.
    """
    if not image or not expression:
        stop('give both: --image photo.jpg --expression "the cat on the left"')
    if not expression.strip() or "<|" in expression:
        stop(f"--expression {expression!r}: say what to find, without special tokens (<|...|>)")
    adapter = best_adapter(args.out)
    if not adapter:
        stop(f"{args.out} has no adapter; first run: python sft.py --preset {args.preset}")
    agrees(args, adapter.name, "feedback")
    sample, picture = own_sample(image)
    explain_out_of_memory("--max-pixels")
    working_on([sample])
    vlm = load_with_adapter(args, adapter)
    options = dict(max_tokens=args.max_tokens, loop=loop)
    [trajectory] = rollout(vlm, [picture], [expression], args.steps, **options)
    for t, (box, text) in enumerate(zip(trajectory.boxes, trajectory.texts)):
        where = "no valid box"
        if box:
            where = [round(v, 1) for v in denormalize_box(box, *picture.size)]
        print(f"step {t}: {where}\n  {text.strip()}")
    row = {"boxes": trajectory.boxes, "texts": trajectory.texts}
    path = args.out / f"figures/{Path(image).stem}.png"
    item = ({"expression": expression}, picture, row)
    write_picture(path, filmstrip([item], adapter.name))
    print(f"{adapter} on {image}: {path}")


def own_sample(path):
    """An image file -> (sample without a truth, image as a person sees it). Exits when it cannot be
    read."""
    try:
        with Image.open(path) as file:
            width, height = file.size
            if file.getexif().get(ORIENTATION, 1) >= 5:  # load_image turns it upright
                width, height = height, width
        location = str(Path(path).resolve())
        sample = {"id": path, "image": location, "width": width, "height": height}
        return sample, load_image(sample, "/", upright=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        stop(f"--image {path}: {e}")
