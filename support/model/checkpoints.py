"""Checkpoints of a run, one file each."""

from pathlib import Path

from support.running.errors import say_once, stop
from support.running.files import write_bytes
from support.running.processes import RANK

import torch


def save_checkpoint(path, **state):
    write_bytes(path, lambda file: torch.save(state, file))


def load_checkpoint(path, restart=False):
    """The state, a dict, or None when there is none. With `restart` it is removed first."""
    path = Path(path)
    if restart and not RANK:
        path.unlink(missing_ok=True)
        # The adapter goes too: a later phase must not take the old one for the new.
        (path.with_suffix("") / "adapter_model.safetensors").unlink(missing_ok=True)
    if restart or not path.exists():
        return None
    try:
        # weights_only: a checkpoint is data, and loading it runs no code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        kind = type(e).__name__
        stop(f"{path} is no checkpoint of this code ({kind}); move it away, or --restart")


def say_if_unfinished(adapter):
    """Prints where the run that makes this adapter, a folder, stopped, if it is not finished."""
    state = load_checkpoint(adapter.with_name(adapter.name + ".checkpoint"))
    if not state:  # GRPO saves its first best, the adapter that it began with, before a checkpoint
        say_once(f"{adapter} has no checkpoint beside it: a copy, or a run that stopped at once")
    elif not state["finished"]:
        update = f"update {state['update']}, its best so far"
        say_once(f"{adapter}: the run stopped after {update}; once it is finished, --restart here")


def best_adapter(run):
    """The folder of the run's GRPO adapter, else of its SFT adapter, else of GRPO without SFT, else
    None."""
    for name in ("grpo", "sft", "base_grpo"):
        adapter = Path(run) / name
        if (adapter / "adapter_model.safetensors").exists():
            say_if_unfinished(adapter)
            return adapter
    return None
