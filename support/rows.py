"""The rows of evaluate.py's tables, and what each is made with."""

from dataclasses import dataclass

from common import Loop
from support.files import begin


@dataclass(frozen=True)
class Row:
    """One way to get boxes for the test samples."""

    name: str  # as in the paper's Table 1
    log: str  # log/evaluate_<log>.jsonl has a line for each sample
    loop: Loop
    steps: int  # refinement steps; 0: step 0 alone
    adapter: str | None = None  # folder under --out; None is the untrained base
    samples: int = 1  # more: so many answers of step 0 are sampled, at --control-temperature
    refuses: bool = False  # a guard may keep the last box: confidences are not of the box that is
    command: str = ""  # what makes the adapter of a row that belongs to the paper's tables


def began(args, row, data):
    """Whether the log of a row was begun with the same flags and files; writes them down.

    Only what a row depends on is compared, so that `--restart` plays again those rows alone that
    would come out otherwise. Without it, exits when something differs.
    """
    inputs = [data / "test.jsonl"]
    if row.adapter:
        inputs.append(args.out / row.adapter / "adapter_model.safetensors")
    flags = ["model", "quantize", "dtype", "engine", "max_pixels", "max_tokens"]
    if row.samples > 1:
        flags += ["seed", "control_temperature"]
    if row.steps:
        flags += ["feedback", "surroundings", "guard"]
    size = {"samples": row.samples, "longest": row.steps}
    return begin(args, f"evaluate_{row.log}", *inputs, only=flags, **size)
