"""How fast, against what: a piece of work done the plainest correct way, and as this code does it.

    python -m speed.benchmark                                random weights
    python -m speed.benchmark --rows 1 2                     of these rows alone
    python -m speed.benchmark --config 4b --dtype bfloat16   the real model's dimensions, for a GPU
    python -m speed.benchmark --run runs/toy                 a trained run's model and test samples
    python -m speed.benchmark --rows 5                       one update of GRPO against TRL

The plain way (plain.py) is `generate()` over the whole context, encoded anew at every step, and one
forward pass per trajectory with all of its logits, or those of the targets (`logits_to_keep`).
Before anything is timed both ways have to agree: in float32 the same tokens under greedy decoding,
and the same losses and gradients within a tolerance. Then they take turns; a row has the medians.
"""

import argparse
from functools import partial

from common import feedback_pictures
from speed.against_trl import against_trl
from speed.measure import take_turns
from speed.ours import our_sft, update
from speed.plain import plain_logprobs, plain_rollout, plain_sft
from speed.random_checkpoint import CONFIGS
from speed.work import random_work, work_of_run
from support.model.decoding import play
from support.model.loading import quiet
from support.running.errors import stop
from support.running.flags import EMBEDDED

import torch

GROUP = dict(group_size=6, temperatures=(1.0, 0.7))  # as the presets sample
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]


# The two ways -------------------------------------------------------------------------------------
def decoding(work, count, tokens, **more):
    """way -> a function that decodes the first `count` prompts, T = 2.

    more: arguments of both rollouts.
    """
    what = work.vlm, work.images[:count], work.texts[:count], 2
    return {
        "plain": partial(plain_rollout, *what, max_tokens=tokens, **more),
        "ours": partial(play, *what, max_tokens=tokens, seeds=list(range(count)), **more),
    }


def training(work, count, tokens, **more):
    """(name -> a function that does one update of GRPO, the same for a pass of SFT), on what our
    way decodes; each leaves a gradient and returns the loss."""
    rows = decoding(work, count, tokens, **more)["ours"]()
    owners = [image for image in work.images[:count] for _ in range(len(rows) // count)]
    images = [feedback_pictures(image, row.boxes) for image, row in zip(owners, rows)]
    one = partial(update, work.vlm, rows, images, ADVANTAGES[: len(rows)])
    grpo = {
        "plain": partial(one, batch_size=1, logprobs=plain_logprobs),
        "logits_to_keep": partial(one, batch_size=1, logprobs=partial(plain_logprobs, keep=True)),
        "ours, one at a time": partial(one, batch_size=1),
        "ours": partial(one, batch_size=len(rows)),
    }
    batch = work.vlm, rows[:4], images[:4]
    return grpo, {"plain": partial(plain_sft, *batch), "ours": partial(our_sft, *batch)}


# Whether they agree -------------------------------------------------------------------------------
def distances(vlm, way, other_way):
    """How far the losses and the gradients of two ways are apart, relatively."""
    losses = []
    gradients = []
    for run in (way, other_way):
        losses.append(run())
        grads = [p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return abs(losses[0] - losses[1]) / abs(losses[0]), apart.item()


def check(work, tokens):
    """Stops with what differs unless both ways agree on two samples, of `tokens` a step.

    In bfloat16 near ties fall either way, so tokens may differ there.
    """
    is_exact = work.vlm.base.dtype == torch.float32
    plain, ours = (decode() for decode in decoding(work, 2, tokens).values())
    same = sum(a.target == b.target and a.boxes == b.boxes for a, b in zip(plain, ours))
    grpo, sft = training(work, 2, tokens)
    pairs = {
        "GRPO": (grpo["plain"], grpo["ours"]),
        "logits_to_keep": (grpo["logits_to_keep"], grpo["ours, one at a time"]),
        "SFT": (sft["plain"], sft["ours"]),
    }
    apart = {name: distances(work.vlm, *pair) for name, pair in pairs.items()}
    print(f"the two ways: {same} of 2 greedy trajectories have the same tokens;")
    said = [f"{name} {loss:.0e} and {gradient:.0e}" for name, (loss, gradient) in apart.items()]
    print(f"  loss and gradient differ by: {', '.join(said)}")
    worst = max(max(pair) for pair in apart.values())
    if (is_exact and same < 2) or worst > (5e-3 if is_exact else 0.1):
        stop("the two ways do not agree; nothing is timed")


# The rows -----------------------------------------------------------------------------------------
def show(name, plain, ours):
    print(f"{name:38}{plain:10.2f}{ours:10.2f}{plain / ours:14.2f}", flush=True)


def group_rollout(work, args):
    cost = take_turns(decoding(work, 1, args.tokens, **GROUP), args.repeats)
    show("1. rollout of a group, N = 6, T = 2", *cost.values())


def rollouts(work, args):
    for n in args.sizes:
        cost = take_turns(decoding(work, n, args.tokens), args.repeats)
        show(f"2. rollout of P = {n} prompts, T = 2", *cost.values())


def update_of_grpo(work, args):
    ways, _ = training(work, 1, args.tokens, **GROUP)
    cost = take_turns(ways, args.repeats)
    show("3. GRPO update, ours in a batch of 6", cost["plain"], cost["ours"])
    show("   ours one at a time, as plain", cost["plain"], cost["ours, one at a time"])
    show("   against logits_to_keep, likewise", cost["logits_to_keep"], cost["ours, one at a time"])


def pass_of_sft(work, args):
    _, ways = training(work, 1, args.tokens, **GROUP)
    show("4. SFT, batch of 4 trajectories", *take_turns(ways, args.repeats).values())


ROWS = {1: group_rollout, 2: rollouts, 3: update_of_grpo, 4: pass_of_sft, 5: against_trl}


# The command --------------------------------------------------------------------------------------
def parse():
    parser = argparse.ArgumentParser(
        prog="python -m speed.benchmark", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS), help="of the table")
    add("--config", choices=CONFIGS, default="small", help="of the random weights (small)")
    add("--run", help="a trained run instead: its best adapter and test samples")
    add("--model", default=EMBEDDED, help=f"with --run: the base model ({EMBEDDED})")
    add("--quantize", choices=("none", "nf4"), default="none", help="of the weights (none)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--checkpointing", choices=("on", "off"), default="on", help="in training passes (on)")
    add("--tokens", type=int, default=60, help="of a step; with --run at most (60)")
    add("--repeats", type=int, default=3, help="timed calls of each way (3)")
    add("--sizes", type=int, nargs="+", default=[1, 4, 8], help="prompts at once (1 4 8)")
    return parser.parse_args()


def main():
    args = parse()
    quiet()
    count = max(2, *args.sizes)
    work = work_of_run(args, count) if args.run else random_work(args, count)
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, {args.dtype}")
    print(f"{args.run or args.config}: {args.tokens} tokens a step, medians of {args.repeats}")
    check(work, min(args.tokens, 16))
    print(f"{'work':38}{'plain, s':>10}{'ours, s':>10}{'times faster':>14}")
    for number in sorted(set(args.rows)):
        ROWS[number](work, args)


if __name__ == "__main__":
    main()
