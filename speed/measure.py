"""A clock, and pieces of work that take turns on it."""

import statistics
import time

import torch


def now():
    """Seconds, once all work that was begun is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(ways, repeats):
    """ways: name -> function. They are called in turn; returns name -> median seconds.

    The first call of each is not timed.
    """
    times = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, work in ways.items():
            start = now()
            work()
            times[name].append(now() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
