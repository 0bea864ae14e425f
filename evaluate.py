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
from support.model import adapters
from support.model.decoding import rollouts
from support.model.views import asked_again, guarded, loop_of
from support.report import overlays, page, pictures, statistics, tables
from support.report.own_picture import look_at
from support.report.rows import Row, begin_row
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
refined = dict(loop=loop, refuses=args.guard == "on")
longest = max(T, args.longest)
ROWS = [
    Row("Base (single-shot)", "base", SINGLE_SHOT, 0),
    # A best-of column rewards having several boxes: what do as many samples without a loop reach?
    Row(statistics.CONTROL, "base_samples", SINGLE_SHOT, 0, samples=T + 1),
    # Do new pixels help without any training? The question again, on the enlarged surroundings
    Row(statistics.AGAIN, "base_closer", closer, T),
    Row(statistics.AGAIN_GUARDED, "base_closer_guarded", guarded(closer), T, refuses=True),
    Row(statistics.UNTRAINED, "base_ivt", steps=T, **refined),
    Row("SFT + IVT", "sft", steps=longest, **refined, adapter="sft", command="python sft.py"),
    # It thinks, as the policy was taught to, and answers once: IVT's prompt, no refinement
    Row("SFT + GRPO (single-step)", "grpo_single", loop, 0, "grpo_single", command=single_step),
    Row("SFT + GRPO + IVT", "grpo", steps=longest, **refined, adapter="grpo", command=grpo),
    Row(statistics.WITHOUT_SFT, "base_grpo", steps=longest, **refined, adapter="base_grpo"),
]
if args.feedback == "again":  # the untrained loop is the control itself
    ROWS = [row for row in ROWS if row.name != statistics.UNTRAINED]

# One row on all test samples ----------------------------------------------------------------------
loaded = {}  # the adapter whose model is loaded -> the model


def model_with(adapter):
    """The base model with this adapter (None: as it is), loaded when a row needs it."""
    if adapter not in loaded:
        loaded.clear()  # free one model before another is loaded
        if adapter:
            files.agrees(args, adapter, "feedback")
        loaded[adapter] = adapters.load_with_adapter(args, adapter and args.out / adapter)
    return loaded[adapter]


def play(row):
    """The lines of log/evaluate_<row.log>.jsonl; those not yet there are made."""

    def work(batch):
        numbers, part = zip(*batch)
        vlm = model_with(row.adapter)
        trajectories = roll(
            vlm,
            [samples.load_image(sample, data) for sample in part],
            [sample["expression"] for sample in part],
            row.steps,
            max_tokens=args.max_tokens,
            loop=row.loop,
            group_size=row.samples,
            temperatures=(args.control_temperature if row.samples > 1 else 0.0,) * 2,
            seeds=[args.seed * 1_000_003 + number for number in numbers],  # of the control alone
        )
        lines = []
        for i, sample in enumerate(part):
            group = trajectories[i * row.samples : (i + 1) * row.samples]
            lines.append(statistics.log_line(sample, group, vlm.tokenizer, row.refuses))
        return lines

    same = begin_row(args, row, data)
    path = args.out / f"log/evaluate_{row.log}.jsonl"
    restart = args.restart and not same
    return files.resumable(path, test, args.batch_size, row.name, work, restart=restart)


# All rows, on the same samples --------------------------------------------------------------------
# A policy that is not trained yet is left out, so that a run can be looked at after any phase.
lines_of = {}
for row in ROWS:
    adapter = row.adapter and args.out / row.adapter
    if adapter is None or (adapter / "adapter_model.safetensors").exists():
        lines_of[row.name] = play(row)
    elif row.command:
        to_add = command(args, row.command)
        print(f"{row.name}: left out, {adapter} is missing; to add it: {to_add}")

# Does the box in the picture matter? The same model, shown something else -------------------------
others = {}
if args.ablations:
    shown = statistics.main_row(lines_of)
    for row, other in overlays.ablation_rows(args, ROWS, shown):
        others[f"{row.name}, {other.name}"] = play(other)

# Report -------------------------------------------------------------------------------------------
results = tables.results_of(args, test, lines_of, others, {row.name: row.log for row in ROWS})
tables.write_results(results, args.out)
report = page.write_evaluation(args, results, test, lines_of)
if args.predictions:
    rows = [{"method": name, **line} for name, lines in lines_of.items() for line in lines]
    files.write_jsonl(args.predictions, rows)
drawn = lines_of[results["shown"]]
charts = pictures.write_figures(results, test, drawn, data, args.out, args.pictures)
places = f"tables in {args.out / 'results.md'}, trajectories to look at in {report}"
more = "" if charts else "; with matplotlib installed, charts too"
print(f"{places}, {processes.minutes(start)}{more}")
