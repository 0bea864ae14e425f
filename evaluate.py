"""Phase 3: what the trained models do on the test samples: the paper's tables (Section 4).

    python evaluate.py                  after the phases before; a missing policy's row is left out
    python evaluate.py --ablations      adds rows: other pictures than the box, no guard
    python evaluate.py --image photo.jpg --expression "the cat on the left"     your own picture
    python evaluate.py --image my.jsonl                                         or many of them

Decoding is greedy, but for one control: T + 1 sampled answers of the base. Another control is the
base asked again on the enlarged surroundings of its box, without any training.

Table 1 of the paper scores "the best predicted box" of a trajectory, which takes the ground truth
to choose: `best of steps` here. A user can choose the first step, the last, or by a rule that does
without the truth. Accuracies and IoUs have 95 percent bootstrap intervals; differences are paired.

Writes results.md, results.json, report.html, figures/lead.png, log/evaluate_*.jsonl under --out.
"""

import time

from common import SINGLE_SHOT
from support.data.samples import load_image, read_side
from support.model.decoding import rollouts
from support.model.views import asked_again, guarded, loop_of
from support.report import own_picture, statistics
from support.report.overlays import ablation_rows
from support.report.page import write_all
from support.report.rows import Row, is_trained, log_line, model_of, play_row
from support.running.flags import Flag, command, flags

args = flags(
    "evaluate",
    __doc__,
    ablations=Flag("add rows: other pictures than the predicted box, no guard", kind="switch"),
    predictions=Flag("write every trajectory of every row to this .jsonl", kind="new file"),
    image=Flag("your own picture, not the test samples; or a .jsonl of many", kind="file"),
    expression=Flag("what to find in it"),
)
start = time.time()
loop = loop_of(args)
if args.image or args.expression:  # no test samples, and no tables
    own_picture.look_at(args, args.image, args.expression, loop)
    raise SystemExit
test = read_side(args, "test")
roll = rollouts(args)

# Table 1, top to bottom, and the controls that the paper lacks ------------------------------------
# Rows of one adapter follow each other, so that each model is loaded once.
T = args.steps
closer = asked_again(args.surroundings)
zoomed = dict(steps=T, drawn=False)
refined = dict(loop=loop, steps=T, drawn=args.feedback != "again")
GUARDED = Row(statistics.GUARDED, "base_closer_guarded", guarded(closer), **zoomed)
ROWS = [
    Row(statistics.BASE, "base", SINGLE_SHOT),
    # A best-of column rewards having several boxes: what do as many samples without a loop reach?
    Row(statistics.SAMPLED, "base_samples", SINGLE_SHOT, samples=T + 1),
    GUARDED,
    Row(statistics.UNTRAINED, "base_ivt", **refined),
    Row(statistics.SFT, "sft", **refined, adapter="sft", command="sft.py"),
    # Trained to think and answer once. Or the paper means the next row's policy, at its first step
    Row(statistics.SINGLE, "grpo_single", loop, adapter="grpo_single", command="grpo.py --steps 0"),
    Row(statistics.GRPO, "grpo", **refined, adapter="grpo", command="grpo.py"),
    Row(statistics.WITHOUT_SFT, "base_grpo", **refined, adapter="base_grpo"),
]
if args.ablations:  # without the guard it takes other objects that the view shows
    ROWS.insert(3, Row("Base, asked again on the zoomed view", "base_closer", closer, **zoomed))
if args.feedback == "again":  # the untrained loop is the control itself
    ROWS = [row for row in ROWS if row.name != statistics.UNTRAINED]


def play(row):
    """The lines of log/evaluate_<row.log>.jsonl; those not yet there are made."""

    def work(batch):
        numbers, part = zip(*batch)
        vlm = model_of(args, row, "feedback")
        trajectories = roll(
            vlm,
            [load_image(sample, args.out / "data") for sample in part],
            [sample["expression"] for sample in part],
            row.steps,
            max_tokens=args.max_tokens,
            loop=row.loop,
            group_size=row.samples,
            temperatures=(0.0, 0.0) if row.ordered else (1.0, 1.0),
            seeds=[args.seed * 1_000_003 + number for number in numbers],  # of the control alone
        )
        lines = []
        for i, sample in enumerate(part):
            group = trajectories[i * row.samples : (i + 1) * row.samples]
            lines.append(log_line(sample, group, vlm.tokenizer, row.guarded))
        return lines

    depends_on = [] if row.ordered else ["seed"]
    if row.steps:
        depends_on += ["feedback", "surroundings", "guard"]
    more = dict(rows=ROWS, samples=row.samples, steps=row.steps)
    return play_row(args, row, test, work, *depends_on, **more)


# All rows, on the same samples --------------------------------------------------------------------
# A policy that is not trained yet is left out, so that a run can be looked at after any phase.
lines_of = {}
for row in ROWS:
    if is_trained(args, row):
        lines_of[row] = play(row)
    elif row.command:
        print(f"{row.name}: left out; to add it: {command(args, f'python {row.command}')}")

# Does the box in the picture matter? The same model, shown something else -------------------------
others = {}
if args.ablations:
    for row in (statistics.main_row(lines_of), GUARDED):
        for word, other in ablation_rows(args, row).items():
            others[row, word] = play(other)

write_all(args, test, lines_of, others, start)
