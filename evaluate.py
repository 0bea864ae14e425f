"""Phase 3: what the trained models do on the test samples: the paper's tables (Section 4).

    python evaluate.py                  after the phases before; a missing policy's row is left out
    python evaluate.py --ablations      adds rows in which another picture than the box is shown
    python evaluate.py --compare DIR    adds the rows of other runs on the same test samples
    python evaluate.py --image photo.jpg --expression "the cat on the left"     your own picture
    python evaluate.py --image my.jsonl                                         or many of them

All decoding is greedy, except in the control row that samples T + 1 single-shot answers. IVT rows
are played to `--longest` steps: a greedy trajectory of T steps is the beginning of a longer one, so
every smaller T is read off it.

Besides the paper's rows there are controls: T + 1 sampled answers of the base, and the base asked
again on the enlarged surroundings of its box (`--surroundings`), without any training.

Table 1 of the paper scores "the best predicted box" of a trajectory, which takes the ground truth
to choose: `best of steps` here. The other choices are a user's: first step, last step, last valid
box, and the medoid, the box with the highest mean IoU to the others. Accuracies and IoUs have 95
percent bootstrap intervals over the samples; differences are paired.

Reads data/test.jsonl and the adapters. Writes results.md, results.json (every number), report.html
(tables, curves and every trajectory, for a browser), figures/*.png, log/evaluate_*.jsonl under
--out.
"""

import time

from common import SINGLE_SHOT
from support.data import samples
from support.model.decoding import rollouts
from support.model.views import asked_again, guarded, loop_of
from support.report import page, pictures, statistics, tables
from support.report.overlays import ablation_rows
from support.report.own_picture import look_at
from support.report.rows import Row, is_trained, log_line, model_of, play_row
from support.running import files, processes
from support.running.flags import Flag, command, flags

args = flags(
    "evaluate",
    __doc__,
    ablations=Flag("add rows with other pictures than the predicted box", kind="switch"),
    compare=Flag("folders of other runs, for their rows", kind="folders"),
    predictions=Flag("write every trajectory of every row to this .jsonl", kind="new file"),
    image=Flag(
        "a picture of yours instead of the test samples, a folder of pictures, or a .jsonl with an "
        "image and an expression a line",
        kind="file or folder",
    ),
    expression=Flag("what to find in it"),
)
processes.seed_all(args.seed)
start = time.time()
data = args.out / "data"
loop = loop_of(args)
if args.image or args.expression:  # no test samples, and no tables
    look_at(args, args.image, args.expression, loop)
    raise SystemExit
test = samples.read_side(args, "test")
roll = rollouts(args)

# Table 1, top to bottom, and the controls that the paper lacks ------------------------------------
# Rows of one adapter follow each other, so that each model is loaded once.
T = args.steps
closer = asked_again(args.surroundings)
grpo, single_step = "python grpo.py", "python grpo.py --steps 0"
refined = dict(loop=loop, drawn=args.feedback != "again")
longest = max(T, args.longest)
AGAIN = Row(
    "Base, asked again, zoomed and guarded", "base_closer_guarded", guarded(closer), T, drawn=False
)
ROWS = [
    Row("Base (single-shot)", "base", SINGLE_SHOT),
    # A best-of column rewards having several boxes: what do as many samples without a loop reach?
    Row(
        "Base (single-shot), T + 1 samples",
        "base_samples",
        SINGLE_SHOT,
        samples=T + 1,
        ordered=False,
    ),
    # Do new pixels help without any training? The question again, on the enlarged surroundings
    Row("Base, asked again on the zoomed view", "base_closer", closer, T, drawn=False),
    AGAIN,
    Row(statistics.UNTRAINED, "base_ivt", steps=T, **refined),
    Row(statistics.SFT, "sft", steps=longest, **refined, adapter="sft", command="python sft.py"),
    # It thinks, as the policy was taught to, and answers once: IVT's prompt, no refinement
    Row("SFT + GRPO (single-step)", "grpo_single", loop, 0, "grpo_single", command=single_step),
    Row(statistics.GRPO, "grpo", steps=longest, **refined, adapter="grpo", command=grpo),
    Row(statistics.WITHOUT_SFT, "base_grpo", steps=longest, **refined, adapter="base_grpo"),
]
if args.feedback == "again":  # the untrained loop is the control itself
    ROWS = [row for row in ROWS if row.name != statistics.UNTRAINED]
CONTROL_TEMPERATURE = 1.0  # of the sampled answers

# One row on all test samples ----------------------------------------------------------------------
loaded = {}


def play(row):
    """The lines of log/evaluate_<row.log>.jsonl; those not yet there are made."""

    def work(batch):
        numbers, part = zip(*batch)
        vlm = model_of(args, row, loaded, "feedback")
        trajectories = roll(
            vlm,
            [samples.load_image(sample, data) for sample in part],
            [sample["expression"] for sample in part],
            row.steps,
            max_tokens=args.max_tokens,
            loop=row.loop,
            group_size=row.samples,
            temperatures=(CONTROL_TEMPERATURE if row.samples > 1 else 0.0,) * 2,
            seeds=[args.seed * 1_000_003 + number for number in numbers],  # of the control alone
        )
        lines = []
        for i, sample in enumerate(part):
            group = trajectories[i * row.samples : (i + 1) * row.samples]
            lines.append(log_line(sample, group, vlm.tokenizer, row.guarded))
        return lines

    depends_on = ["seed"] if row.samples > 1 else []
    if row.steps:
        depends_on += ["feedback", "surroundings", "guard"]
    size = {"samples": row.samples, "longest": row.steps}
    return play_row(args, row, test, work, *depends_on, **size)


# All rows, on the same samples --------------------------------------------------------------------
# A policy that is not trained yet is left out, so that a run can be looked at after any phase.
lines_of = {}
for row in ROWS:
    if is_trained(args, row):
        lines_of[row] = play(row)
    elif row.command:
        to_add = command(args, row.command)
        print(f"{row.name}: left out, {args.out / row.adapter} is missing; to add it: {to_add}")
shown = statistics.main_row(lines_of)

# Does the box in the picture matter? The same model, shown something else -------------------------
others = {}
if args.ablations:
    for row in (shown, AGAIN):
        for word, other in ablation_rows(args, row).items():
            others[row, word] = play(other)

# Report -------------------------------------------------------------------------------------------
results = tables.results_of_run(args, test, ROWS, lines_of, others)
tables.write_results(results, args.out, tables.summary(results), tables.report(results))
report = page.write_evaluation(args, results, test, lines_of)
if args.predictions:
    rows = []
    for row, lines in lines_of.items():
        rows += [{"method": row.name, "ordered": row.ordered, **line} for line in lines]
    files.write_jsonl(args.predictions, rows)
pictures.write_figures(shown, test, lines_of[shown], T, data, args.out)
places = f"tables in {args.out / 'results.md'}, trajectories to look at in {report}"
print(f"{places}, {processes.minutes(start)}")
