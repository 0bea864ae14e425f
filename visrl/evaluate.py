"""Phase 5: what each training phase is worth: answers and boxes on the test samples (Section 4.2).

    python -m visrl.evaluate      after any phases before; what is not trained yet is left out

All decoding is greedy. An answer is right when it is the true one up to case, articles and
punctuation (ours; the paper has a judge model), a box when its IoU with the true one is above 0.5
(Table 4). The controls give the last policy another box than its own: the true one, a random one of
the same size, or the whole image.

Reads data/test.jsonl, the adapters, and the pairs for Table 6. Writes results.md, results.json,
report.html, log/evaluate_*.jsonl under --out.
"""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common import box_iou, format_box, normalize_box
from support.data import samples
from support.model.decoding import rollouts
from support.report.rows import is_trained, model_of, play_row
from support.running import processes
from support.running.flags import flags
from visrl import report
from visrl.loop import ASK, LOOPS, is_right, named


@dataclass(frozen=True)
class Row:
    """A row of the table: one way to get answers to the test questions."""

    name: str
    log: str  # log/evaluate_<log>.jsonl has a line for each sample
    adapter: str | None = None  # folder under --out; None is the untrained base
    boxed: bool = True  # False: the bare question and the whole image, no box asked for
    box: str = "own"  # "true", "random", "whole": a control


FIRST = [
    Row(report.BASE, "base", boxed=False),
    Row(report.BASE_BOX, "base_box"),
    Row(report.SFT, "sft", "sft"),
    Row(report.RL1, "rl1", "rl1"),
    Row(report.RL2, "rl2", "rl2"),
]
OTHERS = [
    Row(report.ONLY, "rl2_only", "rl2_only"),
    Row(report.PLAIN, "plain_dpo", "plain_dpo", boxed=False),
]

args = flags("visrl.evaluate", __doc__)
start = time.time()
data = args.out / "data"
test = samples.read_side(args, "test", "python -m visrl.make_data", samples.VISRL_FIELDS)
loop = LOOPS[args.crop]
roll = rollouts(args)


# One row on all test samples ----------------------------------------------------------------------
def given_box(sample, kind):
    """The box (0..1000) that a control puts in the place of the policy's own."""
    if kind == "whole":
        return [0, 0, 1000, 1000]
    x1, y1, x2, y2 = normalize_box(sample["bbox"], sample["width"], sample["height"])
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)  # a tiny one may have lost its area
    if kind == "random":
        rng = random.Random(f"{args.seed} {sample['id']}")
        width, height = x2 - x1, y2 - y1
        x1, y1 = rng.randint(0, 1000 - width), rng.randint(0, 1000 - height)
        x2, y2 = x1 + width, y1 + height
    return [x1, y1, x2, y2]


def play(row):
    """The lines of log/evaluate_<row.log>.jsonl; those not yet there are made."""

    def work(batch):
        part = [sample for _, sample in batch]
        first_texts = None
        if row.box != "own":
            first_texts = [format_box(given_box(sample, row.box)) for sample in part]
        trajectories = roll(
            model_of(args, row, "crop"),
            [samples.load_image(sample, data) for sample in part],
            [sample["question"] for sample in part],
            1 if row.boxed else 0,
            max_tokens=args.max_tokens,
            loop=loop if row.boxed else ASK,
            first_texts=first_texts,
        )
        lines = []
        for sample, trajectory in zip(part, trajectories):
            answer = trajectory.texts[-1].strip()
            line = {"id": sample["id"], "answer": answer, "box": None}
            line["right"] = is_right(answer, sample["answer"])
            if row.boxed:
                line["box"] = trajectory.boxes[0]
                line["first_text"] = trajectory.texts[0]
            if row.boxed and "bbox" in sample:
                line["iou"] = round(box_iou(line["box"], sample), 6)
            lines.append(line)
        return lines

    depends_on = ["crop", "seed"] if row.box == "random" else ["crop"]
    return play_row(args, row, test, work, *depends_on)


# All rows, on the same samples --------------------------------------------------------------------
for row in FIRST + OTHERS:
    if not is_trained(args, row):
        print(f"{row.name}: left out, {args.out / row.adapter} is missing")
later = []  # the model after each later iteration (Figure 4)
for iteration in range(2, 100):
    for name, log in ((report.RL1, named("rl1", iteration)), (report.RL2, named("rl2", iteration))):
        later.append(Row(f"{name}, iteration {iteration}", log, log))
rows = [row for row in FIRST + later + OTHERS if is_trained(args, row)]
boxed = [row for row in rows if row.boxed and row.adapter]
if boxed and all("bbox" in sample for sample in test):
    last = next((row for row in boxed if row.name == report.RL2), boxed[-1])
    for kind in ("true", "random", "whole"):
        name = report.control_name(last.name, kind)
        rows.append(replace(last, name=name, log=f"{last.log}_{kind}", box=kind))
by_adapter = sorted(rows, key=lambda row: row.adapter or "")  # each model is loaded once
lines_of = {row.name: play(row) for row in by_adapter}
lines_of = {row.name: lines_of[row.name] for row in rows}

# Report -------------------------------------------------------------------------------------------
results = {"n": len(test), "seed": args.seed, "model": Path(args.model).name}
results |= report.analyse(test, lines_of, report.read_pairs(data))
report.write(results, args.out)
place = report.page(args, results, test, lines_of)
places = f"tables in {args.out / 'results.md'}, trajectories to look at in {place}"
print(f"{places}, {processes.minutes(start)}")
