"""Checkpoints of a run, one file each."""

import functools
from pathlib import Path

from support.model.adapters import adapter_state, restore_adapter, save_adapter
from support.running.errors import stop
from support.running.files import Log, write_bytes
from support.running.processes import RANK, barrier, interrupted, leave_if_interrupted

import torch

NO_BEST = (-1.0, 0)  # reward and update of a validation that is yet to come


def save_checkpoint(path, **state):
    """All state of a run in one file: adapter, optimizer, place in the data, best so far.

    What is drawn at random depends on the seed and the number of the update or prompt alone, so
    there is no random state to keep.
    """
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


def leave_if_finished(args, name):
    """Ends the program, successfully, when the checkpoint of `name` says that it is finished."""
    state = load_checkpoint(args.out / f"{name}.checkpoint", args.restart)
    barrier()  # with --restart the first process has removed it
    if state and state["finished"]:
        print(f"{args.out / name} is finished; --restart begins again")
        raise SystemExit


def resume(args, name, vlm, optimizer):
    """Goes on where the last checkpoint of `name` was -> (log, update, the best validation so far:
    its reward and its update).

    The active adapter and the optimizer get their state of then, the log its rows of then. Without
    a checkpoint: an empty log, update 0, best (-1, 0).
    """
    state = load_checkpoint(args.out / f"{name}.checkpoint")
    log_path = args.out / f"log/{name}.jsonl"
    if not state:
        return Log(log_path), 0, NO_BEST
    restore_adapter(vlm.model, state["adapter"], vlm.model.active_adapter)
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on after update {state['update']}")
    return Log(log_path, keep=state["logged"]), state["update"], state["best"]


def save_progress(args, name, vlm, optimizer, log, *, update, finished, best=NO_BEST):
    """What `resume` goes on from. finished: nothing is left to do, validation included."""
    save_checkpoint(
        args.out / f"{name}.checkpoint",
        adapter=adapter_state(vlm.model, vlm.model.active_adapter),
        optimizer=optimizer.state_dict(),
        update=update,
        best=best,
        logged=log.rows,
        finished=finished,
    )


def save_if_due(args, name, vlm, optimizer, log, *, update, last=None, best=NO_BEST):
    """Saves progress after every --save-every updates, at the last one, and on Ctrl-C, which then
    ends the program.

    update: how many are done. last: the update at which the run is finished and its adapter saved;
    None for a run that saves its result itself.
    """
    finished = update == last
    if finished:
        # Before the checkpoint that says that all is done
        save_adapter(vlm, args.out / name, vlm.model.active_adapter)
    if finished or update % args.save_every == 0 or interrupted():
        save_progress(args, name, vlm, optimizer, log, update=update, finished=finished, best=best)
        leave_if_interrupted()


say_once = functools.cache(print)


def say_if_unfinished(adapter):
    """Prints where the run that makes this adapter, a folder, stopped, if it is not finished."""
    state = load_checkpoint(adapter.with_name(adapter.name + ".checkpoint"))
    if state and not state["finished"]:
        say_once(f"{adapter}: the run stopped after update {state['update']}; its best so far")


def best_adapter(run):
    """The folder of the run's GRPO adapter, else of its SFT adapter, else of GRPO without SFT, else
    None."""
    for name in ("grpo", "sft", "base_grpo"):
        adapter = Path(run) / name
        if (adapter / "adapter_model.safetensors").exists():
            say_if_unfinished(adapter)
            return adapter
    return None
