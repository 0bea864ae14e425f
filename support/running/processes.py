"""Several processes, Ctrl-C and the clock.

`torchrun --nproc-per-node 8 sft.py` starts eight processes: each does its share of every batch, and
the first one writes. Started with plain python there is one, and nothing here waits for another.
"""

import atexit
import datetime
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from support.running.errors import explained

import torch
import torch.distributed as dist

with explained("RANK or WORLD_SIZE is no number", "unset both; torchrun sets them"):
    RANK = int(os.environ.get("RANK", 0))
    WORLD = int(os.environ.get("WORLD_SIZE", 1))

stop_asked = []  # the signals of Ctrl-C so far


def start_processes():
    """Joins the processes that torchrun started; alone, does nothing."""
    if WORLD == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(device())
    with explained("the processes cannot meet", "start them with torchrun, or unset WORLD_SIZE"):
        # One process may write or evaluate for long while the others wait for it.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="replace")


def device():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def barrier():
    """Waits until all processes are here: what the first one wrote can then be read."""
    if WORLD > 1:
        dist.barrier()


def share(items):
    """This process's part of a list. The parts, in the order of the processes, are the list."""
    size = -(-len(items) // WORLD)
    return items[RANK * size : (RANK + 1) * size]


def gather(items):
    """The lists of all processes, one after the other, in every process: `share` undone."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(parameters):
    """Adds up the gradients of all processes, each of which has divided its loss by the tokens of
    the whole update: the sum is what one process would have computed."""
    if WORLD == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def program():
    """What was started, without its flags: "python sft.py", "python -m support.model.merge"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # there is one with -m alone
    if spec is None:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def catch_interrupts():
    """From here on Ctrl-C ends a loop after the update or batch at hand, with all saved, and a
    second one at once. So does SIGTERM, a cluster's last word before it kills; of several processes
    it ends each at once, since torchrun sends it when one of them has failed."""
    signal.signal(signal.SIGINT, ask_to_stop)
    if WORLD == 1:
        signal.signal(signal.SIGTERM, ask_to_stop)


def ask_to_stop(number, frame):
    if stop_asked and number == signal.SIGINT:
        sys.exit(130)
    stop_asked.append(number)
    words = "stopping after the update or batch at hand; Ctrl-C again ends at once"
    print(f"\n{words}", file=sys.stderr, flush=True)


def interrupted():
    """Whether any process was asked to stop: all of them have to leave at the same update."""
    return any(gather([bool(stop_asked)]))


def leave_if_interrupted():
    """To be called when everything is saved. Ends the program with exit status 130."""
    if interrupted():
        given = [word for word in sys.argv[1:] if word != "--restart"]
        print(f"stopped; to go on: {program()} {shlex.join(given)}".rstrip())
        sys.exit(130)


def minutes(start):
    """Since `start`, a time.time(): "1.5 min"."""
    return f"{(time.time() - start) / 60:.1f} min"


def say_hours(name, seconds):
    """One line, after the first update or batch: what the whole phase will take."""
    from tqdm import tqdm

    text = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} min"
    tqdm.write(f"{name}: about {text} in all")
