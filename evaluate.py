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
from dataclasses import dataclass, replace
from pathlib import Path

from common import IVT, SINGLE_SHOT, Loop
from support import (
    files,
    models,
    page,
    pictures,
    processes,
    samples,
    second_look,
    statistics,
    tables,
)
from support.flags import Flag, flags
from support.loops import asked_again, guarded, loop_of, rollouts
from support.overlays import OVERLAYS, elsewhere
from support.own_picture import look_at

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
if args.image or args.expression:  # no test samples, and no tables
    look_at(args, args.image, args.expression, loop_of(args))
    raise SystemExit
test = samples.read_samples(
    data / "test.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad
)
longest = max(args.steps, args.longest)
loop = loop_of(args)
roll = rollouts(args)

# The surroundings mean nothing to a row in which the box is drawn on the whole image
LOOP_FLAGS = ("feedback", "guard")
if args.feedback != "overlay":
    LOOP_FLAGS += ("surroundings",)


@dataclass(frozen=True)
class Row:
    """A row of the tables: one way to get boxes for the test samples."""

    name: str  # as in the paper's Table 1
    log: str  # log/evaluate_<log>.jsonl has a line for each sample
    loop: Loop = loop  # that of --feedback
    adapter: str | None = None  # folder under --out; None is the untrained base
    steps: int = longest  # refinement steps; 0: step 0 alone
    samples: int | None = 1  # None: T + 1 answers, sampled at --control-temperature
    depends_on: tuple = LOOP_FLAGS  # further flags, of a row that refines
    command: str = ""  # what makes the adapter of a row that belongs to the paper's tables


# Table 1, top to bottom, and the controls that the paper lacks. Rows of one adapter follow each
# other, so that each model is loaded once.
closer = asked_again(args.surroundings)
untrained = dict(steps=args.steps, depends_on=("surroundings",))
ROWS = [
    Row("Base (single-shot)", "base", loop=SINGLE_SHOT, steps=0),
    # A best-of column rewards having several boxes: what do as many samples without a loop reach?
    Row(statistics.CONTROL, "base_samples", loop=SINGLE_SHOT, steps=0, samples=None),
    # Do new pixels help without any training? The question again, on the enlarged surroundings
    Row(statistics.AGAIN, "base_closer", loop=closer, **untrained),
    Row(statistics.AGAIN_GUARDED, "base_closer_guarded", loop=guarded(closer), **untrained),
    Row(statistics.UNTRAINED, "base_ivt", steps=args.steps),
    Row("SFT + IVT", "sft", adapter="sft", command="python sft.py"),
    # It thinks, as the policy was taught to, and answers once: IVT's prompt, no refinement
    Row(
        "SFT + GRPO (single-step)",
        "grpo_single",
        adapter="grpo_single",
        steps=0,
        command="python grpo.py --steps 0",
    ),
    Row("SFT + GRPO + IVT", "grpo", adapter="grpo", command="python grpo.py"),
    Row(statistics.WITHOUT_SFT, "base_grpo", adapter="base_grpo"),
]
if args.feedback == "again":  # the untrained loop is the control itself
    ROWS = [row for row in ROWS if row.name != statistics.UNTRAINED]

# --------------------------------------------------------------------------------------------------
# One row on all test samples
# --------------------------------------------------------------------------------------------------
loaded = {}  # the adapter whose model is loaded -> the model


def model_with(adapter):
    """The base model with this adapter (None: as it is), loaded when a row needs it."""
    if adapter not in loaded:
        loaded.clear()  # free one model before another is loaded
        if adapter:
            files.agrees(args, adapter, "feedback")
        loaded[adapter] = models.load_with_adapter(args, adapter and args.out / adapter)
    return loaded[adapter]


def play(row):
    """The lines of log/evaluate_<row.log>.jsonl; those not yet there are made.

    Only what a row depends on is compared with an earlier run, so that `--restart` plays again
    those rows alone that would come out otherwise.
    """
    inputs = [data / "test.jsonl"]
    if row.adapter:
        inputs.append(args.out / row.adapter / "adapter_model.safetensors")
    depends_on = ["model", "quantize", "dtype", "engine", "max_pixels", "max_tokens"]
    count = row.samples or args.steps + 1
    if count > 1:
        depends_on += ["seed", "control_temperature"]
    length = {"samples": count}
    if row.steps:
        depends_on += row.depends_on
        length = {"longest": row.steps}
    same = files.begin(args, f"evaluate_{row.log}", *inputs, only=depends_on, **length)

    def work(batch):
        numbers, part = zip(*batch)
        trajectories = roll(
            model_with(row.adapter),
            [samples.load_image(sample, data) for sample in part],
            [sample["expression"] for sample in part],
            row.steps,
            max_tokens=args.max_tokens,
            loop=row.loop,
            group_size=count,
            temperatures=(args.control_temperature if count > 1 else 0.0,) * 2,
            seeds=[args.seed * 1_000_003 + number for number in numbers],  # of the control alone
        )
        groups = [trajectories[j : j + count] for j in range(0, len(trajectories), count)]
        tokenizer = model_with(row.adapter).tokenizer
        return [statistics.log_line(*pair, tokenizer) for pair in zip(part, groups)]

    path = args.out / f"log/evaluate_{row.log}.jsonl"
    restart = args.restart and not same
    return files.resumable(path, test, args.batch_size, row.name, work, restart=restart)


# --------------------------------------------------------------------------------------------------
# All rows, on the same samples
# --------------------------------------------------------------------------------------------------
# A policy that is not trained yet is left out, so that a run can be looked at after any phase.
lines_of = {}
for row in ROWS:
    adapter = row.adapter and args.out / row.adapter
    if adapter is None or (adapter / "adapter_model.safetensors").exists():
        lines_of[row.name] = play(row)
        # Where a box was refused the one before it stands, and the confidence is not its own
        if row.name == statistics.AGAIN_GUARDED or (args.guard == "on" and row.loop is loop):
            for line in lines_of[row.name]:
                del line["confidence"]
    elif row.command:
        command = f"{row.command} --preset {args.preset}"
        print(f"{row.name}: left out, {adapter} is missing; to add it: {command}")
shown = statistics.main_row(lines_of)  # the row that pictures and further tables are of

# Does the box in the picture matter? The same model, shown something else.
others = {}
if args.ablations:
    main = next(row for row in ROWS if row.name == shown)
    shown_instead = OVERLAYS
    if args.feedback != "overlay":
        shown_instead = {"a view elsewhere": elsewhere(loop.feedback)}
    if args.feedback == "zoom":
        shown_instead["no box drawn"] = closer.feedback
    instead = [(main, word, feedback) for word, feedback in shown_instead.items()]
    again = next(row for row in ROWS if row.name == statistics.AGAIN_GUARDED)
    instead.append((again, "a view elsewhere", elsewhere(again.loop.feedback)))
    for row, word, feedback in instead:
        log = f"{row.log}_{word.replace(' ', '_')}"
        other = replace(row.loop, feedback=feedback)
        others[f"{row.name}, {word}"] = play(replace(row, name=word, log=log, loop=other))

# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
results = {"n": len(test), "seed": args.seed, "steps": args.steps, "model": Path(args.model).name}
results |= {"feedback": args.feedback, "guard": args.guard}
results |= statistics.analyse(test, lines_of, args.steps, shown, statistics.CONTROL)
if loop is not IVT:  # what the paper found is about its own loop
    results["findings"] = []
results["second_look"] = second_look.analyse(test, lines_of, args.steps)
logs = {row.name: row.log for row in ROWS}
results["ablations"] = statistics.ablations(test, args, lines_of, others, logs)
tables.write_results(results, args.out)
report = page.write_evaluation(args, results, test, lines_of)
if args.predictions:
    rows = [{"method": name, **line} for name, lines in lines_of.items() for line in lines]
    files.write_jsonl(args.predictions, rows)
charts = pictures.write_figures(results, test, lines_of[shown], data, args.out, args.pictures)
places = f"tables in {args.out / 'results.md'}, trajectories to look at in {report}"
more = "" if charts else "; with matplotlib installed, charts too"
print(f"{places}, {processes.minutes(start)}{more}")
