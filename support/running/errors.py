"""How a program ends when it cannot go on."""

import sys

import torch

_at_work = {"samples": [], "advice": ""}


def stop(message):
    """Ends the program with exit status 1 and one clear message instead of a traceback."""
    sys.exit(f"error: {message}")


def explain_out_of_memory(advice):
    """From here on running out of memory ends the program with a message and exit status 1.

    The message names the samples of `working_on` and `advice`, the flags to lower. Any other
    exception ends the program as before.
    """
    _at_work["advice"] = advice
    if sys.excepthook is not _explain:
        _at_work["otherwise"] = sys.excepthook
        sys.excepthook = _explain


def working_on(samples):
    """To be called before each piece of work, with the samples that it is about."""
    _at_work["samples"] = samples


def _explain(kind, error, traceback):
    if not out_of_memory(error):
        _at_work["otherwise"](kind, error, traceback)
        return
    samples = _at_work["samples"]
    names = [f"{s['id']} ({s['width']} x {s['height']})" for s in samples[:4]]
    if len(samples) > 4:
        names.append("...")
    message = f"out of memory with the samples {', '.join(names)}; lower {_at_work['advice']}"
    print(f"error: {message}. What was saved before is whole", file=sys.stderr, flush=True)


def out_of_memory(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # On a CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
