"""The rows of evaluate.py's tables, and what each is made with."""

from dataclasses import dataclass

from common import Loop
from support.model.checkpoints import say_if_unfinished
from support.running.files import begin


@dataclass(frozen=True)
class Row:
    """One way to get boxes for the test samples."""

    name: str  # as in the paper's Table 1, where it has one
    log: str  # log/evaluate_<log>.jsonl has a line for each sample
    loop: Loop
    steps: int  # refinement steps; 0: step 0 alone
    adapter: str | None = None  # folder under --out; None is the untrained base
    samples: int = 1  # more: so many answers of step 0 are sampled, at --control-temperature
    refuses: bool = False  # a guard may keep the last box: a text's confidence is not the step's
    command: str = ""  # what makes the adapter of a row that belongs to the paper's tables


def begin_row(args, row, data):
    """Writes down what the log of a row is made with; returns whether it was begun before, with the
    same. Exits when something differs, unless `--restart` is given.

    Only what rows of its kind depend on is compared, so that `--restart` does not play them all.
    """
    inputs = [data / "test.jsonl"]
    if row.adapter:
        say_if_unfinished(args.out / row.adapter)
        inputs.append(args.out / row.adapter / "adapter_model.safetensors")
    flags = ["model", "quantize", "dtype", "engine", "max_pixels", "max_tokens"]
    if row.samples > 1:
        flags += ["seed", "control_temperature"]
    if row.steps:
        flags += ["feedback", "surroundings", "guard"]
    size = {"samples": row.samples, "longest": row.steps}
    return begin(args, f"evaluate_{row.log}", *inputs, only=flags, **size)
