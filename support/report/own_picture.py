"""The trained model on pictures of your own (`evaluate.py --image`)."""

from functools import partial
from pathlib import Path

from common import denormalize_box
from support.data.samples import WORDS, is_words, load_image
from support.model.adapters import add_adapter
from support.model.checkpoints import best_adapter
from support.model.decoding import roll_in_parts, rollouts
from support.model.loading import load_vlm
from support.report.pictures import drawing, write_strip
from support.running.errors import stop
from support.running.files import agrees, read_jsonl
from support.running.flags import command

UPRIGHT = partial(load_image, upright=True)  # as a person sees it, whatever its size
LINE = '{"image": "photo.jpg", "expression": "the cat on the left"}'


def look_at(args, image, expression, loop):
    """Runs the loop on image files, each with an expression, by the run's best adapter; prints
    every step, with boxes in pixels, and draws it, figures/<number>_<name>.png under --out."""
    samples = own_samples(image, expression)
    adapter = best_adapter(args.out)
    if not adapter:
        stop(f"{args.out} has no adapter; first run: {command(args, 'python sft.py')}")
    agrees(args, adapter.name, "feedback")
    vlm = load_vlm(args)
    add_adapter(vlm, adapter, "policy")
    options = dict(max_tokens=args.max_tokens, loop=loop, load=UPRIGHT, seeds=[0] * len(samples))
    made = roll_in_parts(rollouts(args), vlm, samples, "/", args.batch_size, args.steps, **options)
    for number, (sample, trajectory) in enumerate(zip(samples, made), 1):
        print(f"{sample['id']}: {sample['expression']}")
        for t, (box, text) in enumerate(zip(trajectory.boxes, trajectory.texts)):
            where = "no valid box"
            if box:
                pixels = denormalize_box(box, sample["width"], sample["height"])
                where = f"{[round(v, 1) for v in pixels]} pixels"
            print(f"step {t}: {where}\n  {text.strip()}")
        line = {"boxes": trajectory.boxes, "texts": trajectory.texts}
        path = args.out / f"figures/{number}_{Path(sample['image']).stem[:50]}.png"
        with drawing(path):
            write_strip(path, sample, UPRIGHT(sample, "/"), line, loop)
            print(f"drawn by {adapter}: {path}")


def own_samples(image, expression):
    """The samples, without a truth, of an image file and an expression, or of a .jsonl whose lines
    name both, images relative to the file. Exits with what cannot be read or used."""
    is_list = str(image).endswith(".jsonl")
    if not image or is_list == bool(expression):
        stop(
            'give both: --image photo.jpg --expression "the cat on the left"; or a list alone: '
            f"--image my.jsonl, with lines as {LINE}"
        )
    lines, folder = [{"image": image, "expression": expression}], Path()
    if is_list:
        lines, folder = read_jsonl(image, "what makes it"), Path(image).parent
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            path, words = (folder / line["image"]).absolute(), line["expression"]
        except (KeyError, TypeError):
            stop(f"{image}, line {number}: expected {LINE}; found {str(line)[:80]}")
        where = f"{image}, line {number}" if is_list else f"--image {image}"
        if not is_words(words):
            stop(f"{where}: expression {repr(words)[:80]}; say what to find in {WORDS}")
        sample = {"id": path.name, "image": str(path), "expression": words}
        try:
            width, height = UPRIGHT({**sample, "width": 0, "height": 0}, "/").size
        except ValueError as e:
            stop(f"{where}: {e}")
        samples.append({**sample, "width": width, "height": height})
    return samples
