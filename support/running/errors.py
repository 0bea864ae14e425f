"""How a program ends when it cannot go on."""

import functools
import sys
from contextlib import contextmanager

import torch

if hasattr(sys.stdout, "reconfigure"):  # a console may lack letters: printing never ends a run
    sys.stdout.reconfigure(errors="backslashreplace")
say_once = functools.cache(print)
at_work = []  # samples, which a message on memory names


def stop(message):
    """Ends the program with exit status 1 and one clear message instead of a traceback."""
    sys.exit(f"error: {message}")


@contextmanager
def explained(fault, remedy):
    """Around what others' code does: whatever it raises, of which no list is complete, ends with
    one line of fault, reason and remedy."""
    try:
        yield
    except Exception as e:
        if out_of_memory(e):
            raise
        # torch.save hides the system's own word
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        stop(f"{fault} ({reason}); {remedy}")


def verify(right, words):
    """A ValueError where it is not right; an assert would go with `python -O`."""
    if not right:
        raise ValueError(words)


def working_on(samples):
    """To be called before each piece of work, with the samples that it is about."""
    at_work[:] = samples


def explain_errors(advice, smaller):
    """From here on an OSError, and running out of memory, end the program with a message: the
    latter's names the samples of `working_on` and `advice`, the flags to lower; before there are
    any, the model alone is too large, and a `smaller` one is to be given."""
    otherwise = sys.excepthook

    def explain(kind, error, traceback):
        if isinstance(error, OSError):
            print(f"error: {error}. Mend that, and the same command goes on", file=sys.stderr)
            return
        if not out_of_memory(error):
            otherwise(kind, error, traceback)
            return
        where = f"before the first sample; give {smaller}"
        if at_work:
            names = [f"{s['id']} ({s['width']} x {s['height']})" for s in at_work[:4]]
            names += ["..."] * (len(at_work) > 4)
            where = f"with the samples {', '.join(names)}; lower {advice}"
        message = f"error: out of memory {where}. What was saved before is whole"
        print(message, file=sys.stderr, flush=True)

    sys.excepthook = explain


def out_of_memory(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # On a CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
