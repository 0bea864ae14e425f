"""Phase 5: what each training phase is worth: answers and boxes on the test samples (Section 4.2).

    python -m visrl.evaluate      after any phases before; what is not trained yet is left out

All decoding is greedy. An answer is right when it is the true one up to case, articles and
punctuation (ours; the paper has a judge model), a box when its IoU with the true one is above 0.5
(Table 4). With `--judge base` the model before SFT scores each answer from 0 to 1 beside that, with
the critic's prompt. The controls give the last policy another box than its own: the true one, a
random one of the same size, or the whole image.

Reads data/test.jsonl, the adapters, and the pairs for Table 6. Writes results.md, results.json,
report.html, log/evaluate_*.jsonl under --out.
"""

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from common import WHOLE, box_iou, format_box, normalize_box
from support.data import samples
from support.model.decoding import rollouts
from support.report import rows, tables
from support.report.pictures import drawing
from support.running import processes
from support.running.flags import flags
from visrl import report
from visrl.critics import response_scores
from visrl.loop import ASK, LOOPS, is_right, named


@dataclass(frozen=True)
class Row(rows.Row):
    """One way to get answers to the test questions. With no steps no box is asked for."""

    box: str = "own"  # "true", "random", "whole": a control, which is given another box


args = flags("visrl.evaluate", __doc__)
start = time.time()
data = args.out / "data"
test = samples.read_side(args, "test", "python -m visrl.make_data", samples.VISRL_FIELDS)
roll = rollouts(args)
CONTROLS = {"whole": "the whole image", "random": "a random box", "true": "the true box"}
boxed = dict(loop=LOOPS[args.crop], steps=1, drawn=False)
ROWS = [
    Row(report.BASE, "base", ASK),
    Row(report.BASE_BOX, "base_box", **boxed),
    Row(report.SFT, "sft", **boxed, adapter="sft"),
    Row(report.RL1, "rl1", **boxed, adapter="rl1"),
    Row(report.RL2, "rl2", **boxed, adapter="rl2"),
    Row(report.ONLY, "rl2_only", **boxed, adapter="rl2_only"),
    Row(report.PLAIN, "plain_dpo", ASK, adapter="plain_dpo"),
    *(Row(name, log, ASK, adapter=log) for log, name in report.DIRECT.items()),
]


# One row on all test samples ----------------------------------------------------------------------
def given_box(sample, kind):
    """The box (0..1000) that a control puts in the place of the policy's own."""
    if kind == "whole":
        return WHOLE
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
        vlm = rows.model_of(args, row, "crop")
        images = [samples.load_image(sample, data) for sample in part]
        first_texts = None
        if row.box != "own":
            first_texts = [format_box(given_box(sample, row.box)) for sample in part]
        questions = [sample["question"] for sample in part]
        options = dict(max_tokens=args.max_tokens, loop=row.loop, first_texts=first_texts)
        trajectories = roll(vlm, images, questions, row.steps, **options)
        lines = []
        answers = [trajectory.texts[-1].strip() for trajectory in trajectories]
        scores = [None] * len(part)
        if args.judge == "base":
            with vlm.model.disable_adapter() if row.adapter else nullcontext():
                scores = response_scores(vlm, images, part, answers, args.max_tokens, roll)
        for sample, trajectory, answer, score in zip(part, trajectories, answers, scores):
            line = {"id": sample["id"], "answer": answer, "box": None}
            line["right"] = is_right(answer, sample["answer"])
            if args.judge == "base":
                line["score"] = score or 0.0  # a reply that is no score counts as 0
            if row.steps:
                line |= {"box": trajectory.boxes[0], "first_text": trajectory.texts[0]}
            if row.steps and "bbox" in sample:
                line["iou"] = round(box_iou(line["box"], sample), 6)
            lines.append(line)
        return lines

    depends_on = ["crop", "judge", *["seed"] * (row.box == "random")]
    return rows.play_row(args, row, test, work, *depends_on, rows=ROWS)


# All rows, on the same samples --------------------------------------------------------------------
for row in ROWS:
    if not rows.is_trained(args, row):
        print(f"{row.name}: left out, {args.out / row.adapter} is missing")
for log in sorted(path.name for path in args.out.glob("sft_*[0-9]")):  # Table 3
    ROWS.append(Row(f"SFT, {log[4:]} samples", log, **boxed, adapter=log))
for iteration in range(2, 100):  # the model after each later iteration (Figure 4)
    for name, adapter in ((report.RL1, "rl1"), (report.RL2, "rl2")):
        log = named(adapter, iteration)
        ROWS.append(Row(f"{name}, iteration {iteration}", log, **boxed, adapter=log))
ROWS = [row for row in ROWS if rows.is_trained(args, row)]
main = report.main_row(ROWS, report.MAIN)
if main.adapter and all("bbox" in sample for sample in test):
    after = ROWS.index(main) + 1  # beside it, so that its model is loaded once
    for kind, shown in CONTROLS.items():
        name = f"{main.name}, shown {shown}"
        ROWS.insert(after, replace(main, name=name, log=f"{main.log}_{kind}", box=kind))
lines_of = {row: play(row) for row in ROWS}

# Report -------------------------------------------------------------------------------------------
pairs = report.read_pairs(data)
results = {"n": len(test), "seed": args.seed, "model": Path(args.model).name}
results |= report.analyse(test, lines_of, pairs)
tables.write_results(results, args.out, report.summary(results), report.sections(results))
page = args.out / "report.html"
with drawing(page):
    report.page(args, results, test, lines_of, pairs)
places = f"tables in {args.out / 'results.md'}, trajectories to look at in {page}"
print(f"{places}, {processes.minutes(start)}")
