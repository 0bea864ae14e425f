"""The rows of an evaluation's tables: what each is made with, and its log of trajectories."""

from dataclasses import dataclass

from common import Loop, box_iou, token_text
from support.model.adapters import add_adapter, files_of
from support.model.checkpoints import say_if_unfinished
from support.model.loading import load_vlm
from support.model.views import implausible
from support.running.files import agrees, begin, resumable


@dataclass(frozen=True)
class Row:
    """One way to get boxes for the test samples."""

    name: str  # as in the paper's Table 1, where it has one
    log: str = ""  # log/evaluate_<log>.jsonl has a line for each sample
    loop: Loop | None = None  # None: another system's boxes, of which nothing else is known
    steps: int = 0  # refinement steps; 0: step 0 alone
    adapter: str | None = None  # folder under --out; None is the untrained base
    samples: int = 1  # more: so many answers of step 0 are sampled, and no step follows another
    drawn: bool = True  # whether the picture before a step has the last box drawn on it
    command: str = ""  # what makes the adapter of a row that belongs to the paper's tables

    @property
    def ordered(self):
        """Whether its boxes are steps, each after the one before."""
        return self.samples == 1

    @property
    def guarded(self):
        """Whether a guard may keep the last box: a text's confidence is then not the step's."""
        return self.loop.refuses is implausible


# What a row is played with ------------------------------------------------------------------------
# Of a row only its name, log and adapter are used here: visrl.evaluate has rows of its own.
def is_trained(args, row):
    """Whether there is what the row is played with."""
    weights = "adapter_model.safetensors"
    return row.adapter is None or (args.out / row.adapter / weights).exists()


loaded = {}  # the adapter of the model that is loaded -> the model


def model_of(args, row, flag):
    """The base model with the row's adapter; the last one is kept. Exits when the adapter was made
    with another value of `flag`."""
    if row.adapter not in loaded:
        loaded.clear()  # free one model before another is loaded
        if row.adapter:
            agrees(args, row.adapter, flag)
        vlm = loaded[row.adapter] = load_vlm(args)
        if row.adapter:
            add_adapter(vlm, args.out / row.adapter, "policy")
    return loaded[row.adapter]


def play_row(args, row, test, work, *flags, rows=(), **more):
    """The lines of log/evaluate_<row.log>.jsonl, one for each test sample; `work`, as of
    `resumable`, makes those that are missing. flags, more: as of `begin`, what this row depends on;
    others are not compared, so that `--restart` does not play all rows. rows: all that the
    evaluation plays, of which the first tells the time."""
    inputs = [args.out / "data/test.jsonl"]
    if row.adapter:
        say_if_unfinished(args.out / row.adapter)
        inputs += files_of(args.out / row.adapter)
    only = ["model", "quantize", "dtype", "engine", "max_pixels", "max_tokens", *flags]
    path = args.out / f"log/evaluate_{row.log}.jsonl"
    begin(args, path.stem, *inputs, only=only, log=path, **more)
    whole = 0
    if row in rows and not loaded:
        left = [other for other in rows[rows.index(row) :] if is_trained(args, other)]
        # A step with reasoning is nearly as long as it may be, a bare answer has some 40 tokens
        tokens = [args.max_tokens if "<think>" in other.loop.prompt else 40 for other in left]
        costs = [n * other.samples * (other.steps + 1) for n, other in zip(tokens, left)]
        whole = sum(costs) / costs[0]
    return resumable(path, test, args.batch_size, row.name, work, whole)


# The log ------------------------------------------------------------------------------------------
def log_line(sample, trajectories, tokenizer, guarded=False):
    """What a log keeps of a sample's trajectory, or of its T + 1 single-shot answers, as a dict.

    logprob: log pi of each step's text. confidence: the mean log pi of its box's tokens, None
    without a valid box; a guarded row has none, since the box of a step is not always that of its
    text. read: tokens in the context when the step ends, its cost.
    """
    lists = ("boxes", "iou", "texts", "logprob", "confidence", "read")
    line = {"id": sample["id"], **{name: [] for name in lists}}
    for t in trajectories:
        line["boxes"] += t.boxes
        line["iou"] += [round(box_iou(box, sample), 6) for box in t.boxes]
        line["texts"] += t.texts
        for step, box in enumerate(t.boxes):
            targets = [m for m in range(len(t.target)) if t.step[m] == step]
            line["logprob"].append(round(sum(t.logprob[m] for m in targets), 4))
            answer = [t.logprob[m] for m in answer_targets(t, targets, tokenizer)]
            line["confidence"].append(round(sum(answer) / len(answer), 4) if box else None)
            line["read"].append(t.predictor[targets[-1]] + 1)
    if guarded:
        del line["confidence"]
    return line


def answer_targets(trajectory, targets, tokenizer):
    """Those of a step's targets (places in the trajectory's lists) that lie after the end of its
    reasoning: all of them without one."""
    text = ""
    for count, m in enumerate(reversed(targets)):
        text = token_text(tokenizer, trajectory.target[m]) + text
        if "</think>" in text:
            return targets[len(targets) - count :]
    return targets
