"""The trajectories of a run as lines of ms-swift, to go on with in another trainer.

    python -m support.report.export --out runs/mine

Writes to swift/ under --out: train.jsonl, the trajectories that SFT learns from; test_<row>.jsonl,
what each policy wrote in the loop on the test samples; images/. `solution` is the true box in
0..1000, for a reward. Pictures and instructions are turns of the user, without a loss there.
"""

from pathlib import Path

from common import feedback_pictures, normalize_box, step_text, written_boxes
from support.data.samples import load_image, read_side, read_trajectories, with_samples
from support.model.views import loop_of
from support.running.files import agrees, write_bytes, write_jsonl
from support.running.flags import command, flags


def line_of(row, loop, data, stem):
    """A trajectory as a line. row: sample, boxes, texts; stem: of the paths of its pictures."""
    messages, images = [], []
    for t, picture in enumerate(feedback_pictures(load_image(row, data), row["boxes"], loop)):
        is_shown = any(row["boxes"][:t])
        words = loop.continuation if is_shown else loop.without_box or loop.continuation
        words = (words if t else loop.prompt).format(text=row["expression"])
        images.append(f"{stem}_{t}.jpg")
        write_bytes(Path(images[t]), lambda file: picture.save(file, "jpeg", quality=95))
        messages.append({"role": "user", "content": f"<image>{words}"})
        messages.append({"role": "assistant", "content": row["texts"][t]})
    truth = normalize_box(row["bbox"], row["width"], row["height"])
    return {"id": row["id"], "messages": messages, "images": images, "solution": truth}


if __name__ == "__main__":
    args = flags("evaluate", __doc__)
    agrees(args, "make_data", "feedback", "surroundings")
    data, folder, loop = args.out / "data", (args.out / "swift").resolve(), loop_of(args)
    sets = {"train": read_trajectories(args, data)}
    for row in sets["train"]:
        row["texts"] = list(map(step_text, row["traces"], written_boxes(row["boxes"], loop)))
    test, made_by = read_side(args, "test"), command(args, "python evaluate.py")
    for name in ("base_ivt", "sft", "grpo_single", "grpo", "base_grpo"):
        path = args.out / f"log/evaluate_{name}.jsonl"
        if path.exists():
            sets[f"test_{name}"] = with_samples(path, test, made_by, lambda row: row["texts"])
    for name, rows in sets.items():
        stem = f"{folder}/images/{name}"
        lines = [line_of(row, loop, data, f"{stem}_{i}") for i, row in enumerate(rows, 1)]
        write_jsonl(folder / f"{name}.jsonl", lines)
        print(f"{len(lines)} lines in {args.out}/swift/{name}.jsonl")
