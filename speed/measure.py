"""Clocks: seconds, bytes of tensors, and the machine's own rates."""

import statistics
import time
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that PyTorch's operations make while it is in force.

    now: of those alive; most: the highest that was. What an operation takes for itself while it
    runs is not in it. (PyTorch has no such count for a CPU.)
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.alive = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        inputs = set()
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                inputs.add(x.untyped_storage().data_ptr())
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage(), inputs)
        return out

    def add(self, storage, inputs):
        address = storage.data_ptr()
        size = storage.nbytes()
        if size == 0 or address in inputs or address in self.alive:  # a view of something else
            return
        self.alive.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, address, size)

    def remove(self, address, size):
        self.alive.discard(address)
        self.now -= size


def most_bytes(work):
    """Memory of one call of `work` above what was there before, at its highest."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Tally() as tally:
        work()
    return tally.most


def now():
    """The clock in seconds, once all work that was begun is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    start = now()
    work()
    return now() - start


def take_turns(ways, repeats):
    """ways: name -> function. They are called in turn; returns name -> (median seconds, bytes).

    The first call of each, in which its memory is counted, is not timed.
    """
    most = {name: most_bytes(work) for name, work in ways.items()}
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(seconds(work))
    return {name: (statistics.median(times[name]), most[name]) for name in ways}


class Rates(NamedTuple):
    arithmetic: float  # operations a second, of a large matrix product
    reading: float  # bytes a second, of reading a large tensor once


def machine_rates(device, dtype):
    """The best of 20 measurements of each."""
    n = 1024 if device.type == "cpu" else 8192
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    large = torch.ones(2**26, device=device, dtype=dtype)
    product = min(seconds(lambda: torch.mm(a, b, out=c)) for _ in range(20))
    reading = min(seconds(large.sum) for _ in range(20))
    return Rates(2 * n**3 / product, large.nbytes / reading)
