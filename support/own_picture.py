"""The trained model on a picture of your own: its boxes in pixels, its reasoning, and a
filmstrip.

    python -m support.own_picture --image photo.jpg --expression "the cat on the left"

Takes the GRPO adapter of the run, else its SFT adapter. Writes figures/<name of the image>.png
under --out.
"""

from pathlib import Path

from common import denormalize_box, rollout
from support.checkpoints import best_adapter
from support.errors import explain_out_of_memory, stop, working_on
from support.flags import Flag, flags
from support.models import add_adapter, load_vlm
from support.pictures import filmstrip, write_picture
from support.samples import load_image

from PIL import Image

ORIENTATION = 0x0112  # EXIF; from 5 on, width and height are exchanged


def look_at(args, image, expression):
    """Runs the loop on the image file for an expression; prints every step and writes the
    filmstrip.

    Exits when the run has no adapter or the file is no image that can be used.
    """
    adapter = best_adapter(args.out)
    if not adapter:
        stop(f"{args.out} has no adapter; first run: python sft.py --preset {args.preset}")
    sample, picture = own_sample(image)
    explain_out_of_memory("--max-pixels")
    working_on([sample])
    vlm = load_vlm(args)
    add_adapter(vlm, adapter, "policy")
    [trajectory] = rollout(vlm, [picture], [expression], args.steps, max_tokens=args.max_tokens)
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


if __name__ == "__main__":
    args = flags(
        "evaluate",
        __doc__,
        image=Flag("the picture", kind="file"),
        expression=Flag("what to find in it"),
    )
    if not args.image or not args.expression:
        stop('give both: --image photo.jpg --expression "the cat on the left"')
    look_at(args, args.image, args.expression)
