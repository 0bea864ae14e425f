"""The trajectories of a run as lines of ms-swift, to go on with in another trainer.

    python -m support.report.export --out runs/mine

Writes to swift/ under --out: train.jsonl, the trajectories that SFT learns from; test_<row>.jsonl,
what each policy wrote on the test samples; images/, the pictures that it was shown. A line has
`messages`, as many `images` as steps, and beside these `id`, `expression` and `solution`, the true
box in 0..1000, for a reward there. Here a trajectory is one turn of the assistant; there a turn has
a loss on all that stands in it, so that picture and instruction come in the user's turns.
"""

from pathlib import Path

from common import (
    SINGLE_SHOT,
    feedback_pictures,
    last_valid,
    normalize_box,
    step_text,
    written_boxes,
)
from support.data.samples import load_image, read_side, read_trajectories, with_samples
from support.model.views import loop_of
from support.running.files import agrees, write_bytes, write_jsonl
from support.running.flags import command, flags

POLICIES = ("base", "base_ivt", "sft", "grpo_single", "grpo", "base_grpo")


def line_of(row, loop, data, stem):
    """A trajectory as a line. row: its sample, boxes, and texts, a step each; stem: path of its
    pictures, without step and ending."""
    messages, images = [], []
    pictures = feedback_pictures(load_image(row, data), row["boxes"], loop)
    for t, (picture, text) in enumerate(zip(pictures, row["texts"])):
        words = loop.prompt
        if t > 0:
            is_shown = last_valid(row["boxes"][:t])
            words = loop.continuation if is_shown else loop.without_box or loop.continuation
        path = Path(f"{stem}_{t}.jpg").resolve()
        write_bytes(path, lambda file: picture.save(file, "jpeg", quality=95))
        words = words.format(text=row["expression"])
        messages.append({"role": "user", "content": f"<image>{words}"})
        messages.append({"role": "assistant", "content": text})
        images.append(str(path))
    truth = normalize_box(row["bbox"], row["width"], row["height"])
    named = {"id": row["id"], "expression": row["expression"], "solution": truth}
    return {"messages": messages, "images": images, **named}


if __name__ == "__main__":
    args = flags("evaluate", __doc__)
    agrees(args, "make_data", "feedback")
    data, loop = args.out / "data", loop_of(args)
    sets = {"train": read_trajectories(args, data)}
    for row in sets["train"]:
        boxes = written_boxes(row["boxes"], loop)
        row["texts"] = [step_text(*step) for step in zip(row["traces"], boxes)]
    test, made_by = read_side(args, "test"), command(args, "python evaluate.py")
    for name in POLICIES:
        path = args.out / f"log/evaluate_{name}.jsonl"
        if path.exists():
            sets[f"test_{name}"] = with_samples(path, test, made_by, lambda row: row["texts"])
    for name, rows in sets.items():
        path = args.out / f"swift/{name}.jsonl"
        way = SINGLE_SHOT if name == "test_base" else loop
        stem = path.parent / "images" / name
        lines = [line_of(row, way, data, f"{stem}_{i}") for i, row in enumerate(rows, 1)]
        write_jsonl(path, lines)
        print(f"{len(lines)} lines in {path}")
