"""Checkpoints of a run, one file each."""

import zipfile
from pathlib import Path

from support.model.adapters import adapter_state
from support.running.errors import explained, say_once, verify
from support.running.files import write_bytes
from support.running.processes import RANK

import torch
from peft import set_peft_model_state_dict


def save_checkpoint(path, **state):
    write_bytes(path, lambda file: torch.save(state, file))


def load_checkpoint(path, restart=False, model=None, optimizer=None):
    """The state, or None; --restart removes it. model, optimizer: get what they were."""
    path = Path(path)
    if restart and not RANK:
        path.unlink(missing_ok=True)
        # The adapter goes too: a later phase must not take the old one for the new.
        (path.with_suffix("") / "adapter_model.safetensors").unlink(missing_ok=True)
    if restart or not path.exists():
        return None
    with explained(f"{path} is no checkpoint of this code", "move it away"):
        # A flipped byte, which torch.load passes over: its format is zip, with checksums
        verify(not zipfile.ZipFile(path).testzip(), "damaged")
        # weights_only: a checkpoint is data, and loading it runs no code.
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = type(state["update"]), type(state["finished"])
        verify(known == (int, bool), "other values")
        if optimizer:
            restore(state, model, optimizer)
        return state


def restore(state, model, optimizer):
    """Gives the active adapter and the optimizer what they were."""
    set_peft_model_state_dict(model, state["adapter"], model.active_adapter)
    optimizer.load_state_dict(state["optimizer"])
    # Both pass over what is missing, the optimizer over shapes too
    own = adapter_state(model, model.active_adapter)
    verify(own.keys() == state["adapter"].keys(), "keys")
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        verify(optimizer.state[p]["exp_avg"].shape == p.shape, "shapes of the optimizer")
    verify(isinstance(state["logged"], list), "no log")


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
