"""The door."""

import math
import random

from support.running.errors import stop
from support.running.processes import RANK

from tqdm import tqdm


def progress(name, updates, first_update):
    """The bar of a run: updates done, an ETA, and what `set_postfix` adds."""
    return tqdm(total=updates, initial=first_update, desc=name, unit="update", disable=RANK > 0)


def learning_rate(args, update, updates):
    """Linear warm-up over the first share --warmup of the updates, then a cosine to zero, as both
    papers have it (IVT, Section 4.1)."""
    warm = max(1, round(args.warmup * updates))
    if update < warm:
        return args.lr * (update + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def shuffled(rows, seed, epoch):
    """The rows in the order of an epoch.

    It depends on the seed and the epoch alone: a run that was resumed sees what an unbroken one
    would have seen.
    """
    return random.Random(f"{seed} {epoch}").sample(rows, len(rows))


def stop_unless_finite(update, loss, norm, rows):
    """Stops before a step that would spoil the weights. rows: the dicts of the update's batch."""
    if not math.isfinite(loss + norm):
        ids = [row["id"] for row in rows]
        stop(f"update {update}: loss {loss}, gradient norm {norm}; samples {ids}; lower --lr")
