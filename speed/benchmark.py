"""How fast, against what: a piece of work done the plainest correct way, and as this code does it.

    python -m speed.benchmark                                random weights, half an hour
    python -m speed.benchmark --rows 1 2                     of these rows alone
    python -m speed.benchmark --config 4b --dtype bfloat16   the real model's dimensions, for a GPU
    python -m speed.benchmark --run runs/toy                 a trained run's model and test samples
    python -m speed.benchmark --rows 7                       one update of GRPO against TRL

The plain way (plain.py) is `generate()` over the whole context, encoded anew at every step, and one
forward pass per trajectory with all of its logits; the update is also compared with the same pass
when it is asked for the logits of the targets alone (`logits_to_keep`). Row 7 is one update of GRPO
against TRL's trainer (against_trl.py); row 8 says where the time of a decoding pass goes; row 9 is
the rollout with the weights as they are, and as `play` has them: with LoRA in them, or unpacked
from 4 bits (`merged` and `unpacked` in support/model/decoding.py).

Before anything is timed both ways have to agree: the same tokens under greedy decoding (in
float32), the same log-probabilities, losses and gradients within a tolerance. Then they take turns,
and a row shows the medians. Memory is that of the tensors alive above what was there before, at the
highest, counted in a turn that is not timed. In training both ways recompute activations, or
neither does (`--checkpointing`; on, as in the paper preset); ours recomputes the logits always. The
floor is explained in floor.py.
"""

import argparse
import functools
import os
import statistics
import tempfile
from collections import Counter
from dataclasses import replace

import common
from common import encode_images, feedback_pictures, grpo_loss, trajectory_logprobs
from speed.against_trl import PROMPTS, compare
from speed.floor import rollout_floor, size_of, training_floor
from speed.measure import machine_rates, seconds, take_turns
from speed.plain import plain_logprobs, plain_rollout, plain_sft, plain_update
from speed.work import CONFIGS, random_work, toy_samples, toy_vlm, work_of_run
from support.model import decoding
from support.model.decoding import merged, play
from support.model.loading import quiet
from support.running.errors import stop
from support.running.flags import EMBEDDED
from support.running.processes import device

import torch
from torch.profiler import ProfilerActivity, profile

GROUP = dict(group_size=6, temperatures=(1.0, 0.7))  # as the presets sample


# Training as the phases do it ---------------------------------------------------------------------
def our_update(vlm, trajectories, advantages, batch_size):
    """As grpo.py does it, on the image tokens of the rollout; returns the loss."""
    tokens = sum(len(t.target) for t in trajectories)
    total = 0.0
    vlm.model.zero_grad()
    for i in range(0, len(trajectories), batch_size):
        batch = trajectories[i : i + batch_size]
        with torch.no_grad():
            vlm.model.set_adapter("reference")
            reference = trajectory_logprobs(vlm, batch)
        vlm.model.set_adapter("policy")
        scores = trajectory_logprobs(vlm, batch)
        advantage = torch.tensor(advantages[i : i + batch_size]).to(scores.logprob)[scores.row]
        loss, *_ = grpo_loss(
            scores.logprob,  # [M], like the three others
            reference.logprob,
            advantage,
            scores.entropy,
            beta=0.04,
            entropy_weight=0.01,
        )
        (loss / tokens).backward()
        total += loss.item() / tokens
    return total


def our_sft(vlm, trajectories, images):
    """As sft.py does it, vision tower included; returns the loss."""
    vlm.model.zero_grad()
    encoded = iter(encode_images(vlm, [image for pictures in images for image in pictures]))
    for trajectory, pictures in zip(trajectories, images):
        trajectory.images = [next(encoded) for _ in pictures]
    loss = -trajectory_logprobs(vlm, trajectories).logprob.mean()
    loss.backward()
    return loss.item()


# Whether the ways agree ---------------------------------------------------------------------------
def gradient(vlm):
    return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])


def distances(vlm, way, other_way):
    """Of two functions that leave a gradient: how far loss and gradient are apart, relatively."""
    loss = way()
    grad = gradient(vlm)
    other_loss = other_way()
    other_grad = gradient(vlm)
    apart = (grad - other_grad).norm() / grad.norm()
    return abs(loss - other_loss) / abs(loss), apart.item()


def check(work, tokens):
    """Stops with what differs unless both ways agree on two samples, of `tokens` a step.

    In bfloat16 near ties fall either way, so tokens may differ there.
    """
    is_exact = work.vlm.base.dtype == torch.float32
    samples = work.images[:2], work.texts[:2]
    greedy = play(work.vlm, *samples, 2, max_tokens=tokens)
    plain = plain_rollout(work.vlm, *samples, 2, max_tokens=tokens)
    same = sum(a.target == b.target and a.boxes == b.boxes for a, b in zip(greedy, plain))

    vlm = work.trainee
    rows = play(vlm, *samples, 2, max_tokens=tokens)
    images = [feedback_pictures(image, row.boxes) for image, row in zip(work.images, rows)]
    errors = []
    with torch.no_grad():
        for row, pictures in zip(rows, images):
            logprob, _ = plain_logprobs(vlm, row, pictures)  # [M]
            errors.append((logprob.cpu() - torch.tensor(row.logprob)).abs())
    error = torch.cat(errors).mean().item()
    plain = functools.partial(plain_update, vlm, rows, images, [1.0, -1.0])
    ours = functools.partial(our_update, vlm, rows, [1.0, -1.0])
    kept = functools.partial(plain, keep=True)
    apart = {
        "GRPO": distances(vlm, plain, functools.partial(ours, batch_size=2)),
        "logits_to_keep": distances(vlm, kept, functools.partial(ours, batch_size=1)),
        "SFT": distances(
            vlm,
            functools.partial(plain_sft, vlm, rows, images),
            functools.partial(our_sft, vlm, rows, images),
        ),
    }
    ties = "" if is_exact else " (rounding decides ties)"
    print(f"the two ways: {same} of 2 greedy trajectories have the same tokens{ties};")
    print(f"  log-probabilities differ by {error:.0e}; loss and gradient:", end=" ")
    print(", ".join(f"{name} {a:.0e} and {b:.0e}" for name, (a, b) in apart.items()))
    worst = max(max(pair) for pair in apart.values())
    tokens_differ = is_exact and same < 2
    if tokens_differ or error > (1e-4 if is_exact else 0.1) or worst > (5e-3 if is_exact else 0.1):
        stop("the two ways do not agree; nothing is timed")


# The rows -----------------------------------------------------------------------------------------
HEAD = (
    "work",
    "plain, s",
    "ours, s",
    "times faster",
    "floor, s",
    "ours / floor",
    "plain, MiB",
    "ours, MiB",
    "",
)
WIDTHS = (36, ">9", ">9", ">12", ">9", ">12", ">11", ">11", "")


def line(cells):
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS)).rstrip()


def table_row(name, plain, ours, least, note=""):
    """plain, ours: (seconds, bytes); least: seconds of the floor."""
    cells = (
        name,
        f"{plain[0]:.2f}",
        f"{ours[0]:.2f}",
        f"{plain[0] / ours[0]:.2f}",
        f"{least:.2f}",
        f"{ours[0] / least:.2f}",
        f"{plain[1] / 2**20:,.0f}",
        f"{ours[1] / 2**20:,.0f}",
        note,
    )
    return line(cells)


def decoders(work, count, *, first=0, steps=2, **more):
    """(plain, ours): functions that decode `count` prompts from number `first` on.

    more: arguments of both rollouts.
    """
    images = work.images[first : first + count]
    texts = work.texts[first : first + count]
    more["max_tokens"] = work.tokens
    plain = functools.partial(plain_rollout, work.vlm, images, texts, steps, **more)
    seeds = list(range(count))
    return plain, functools.partial(play, work.vlm, images, texts, steps, seeds=seeds, **more)


def group_rollout(work):
    plain, ours = decoders(work, 1, **GROUP)
    measured = take_turns({"plain": plain, "ours": ours}, work.repeats)
    least = rollout_floor(work.vlm, work.rates, ours(), GROUP["group_size"])
    yield table_row("1. rollout of a group, N = 6, T = 2", *measured.values(), least)


def batch_rollouts(work):
    for n in work.sizes:
        plain, ours = decoders(work, n)
        measured = take_turns({"plain": plain, "ours": ours}, work.repeats)
        least = rollout_floor(work.vlm, work.rates, ours())
        note = f"{n / measured['ours'][0]:.2f} samples/s"
        prompts = "prompt" if n == 1 else "prompts"
        yield table_row(f"2. rollout of {n} {prompts}, T = 2", *measured.values(), least, note)


def latency(work):
    """The samples one after the other: T = 2 against single-shot; the paper says 3 times."""
    single = [decoders(work, 1, first=i, steps=0) for i in range(work.alone)]
    refined = [decoders(work, 1, first=i, steps=2) for i in range(work.alone)]

    def run_all(samples, way):
        for sample in samples:
            sample[way]()

    ways = {}
    for way, name in enumerate(("plain", "ours")):
        ways[f"{name}, single-shot"] = functools.partial(run_all, single, way)
        ways[name] = functools.partial(run_all, refined, way)
    measured = take_turns(ways, work.repeats)
    ratios = []
    for name in ("plain", "ours"):
        ratios.append(f"{name} {measured[name][0] / measured[f'{name}, single-shot'][0]:.2f}x")
    yield f"3. one sample at a time, T = 2 against its single-shot answer: {'; '.join(ratios)}"


def group_for_training(work):
    """Six sampled trajectories of one prompt, their pictures, and some advantages."""
    vlm = work.trainee
    more = dict(GROUP, max_tokens=work.tokens, seeds=[0])
    rows = play(vlm, work.images[:1], work.texts[:1], 2, **more)
    images = [feedback_pictures(work.images[0], row.boxes) for row in rows]
    return rows, images, [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]


def update_of_grpo(work):
    vlm = work.trainee
    rows, images, advantages = group_for_training(work)
    plain = functools.partial(plain_update, vlm, rows, images, advantages)
    ours = functools.partial(our_update, vlm, rows, advantages)
    ways = {
        "plain": plain,
        "logits_to_keep": functools.partial(plain, keep=True),
        "batch": functools.partial(ours, batch_size=6),
        "single": functools.partial(ours, batch_size=1),
    }
    measured = take_turns(ways, work.repeats)
    # Reference, forward, backward to the activations
    least = training_floor(vlm, work.rates, rows, passes=3, with_images=False)
    single = measured["single"]
    yield table_row(
        "4. GRPO update, 6 trajectories",
        measured["plain"],
        measured["batch"],
        least,
        "plain: one at a time, ours: in a batch",
    )
    note = "one at a time, both"
    yield table_row("   likewise", measured["plain"], single, least, note)
    yield table_row("   against logits_to_keep", measured["logits_to_keep"], single, least, note)


def pass_of_sft(work):
    vlm = work.trainee
    rows, images, _ = group_for_training(work)
    rows = rows[:4]
    images = images[:4]
    ways = {
        "plain": functools.partial(plain_sft, vlm, rows, images),
        "ours": functools.partial(our_sft, vlm, rows, images),
    }
    measured = take_turns(ways, work.repeats)
    least = training_floor(vlm, work.rates, rows, passes=2, with_images=True)
    tokens = sum(len(row.ids) for row in rows)
    note = f"{tokens / measured['ours'][0]:.0f} tokens/s"
    yield table_row("5. SFT, batch of 4 trajectories", *measured.values(), least, note)


def both_depths(work):
    n = min(4, len(work.images))
    single = decoders(work, n, steps=0)
    refined = decoders(work, n, steps=2)

    def both(way):
        return single[way](), refined[way]()

    ways = {"plain": functools.partial(both, 0), "ours": functools.partial(both, 1)}
    measured = take_turns(ways, work.repeats)
    least = sum(rollout_floor(work.vlm, work.rates, rows) for rows in both(1))
    note = f"{n / measured['ours'][0]:.2f} samples/s"
    yield table_row(f"6. {n} samples single-shot and T = 2", *measured.values(), least, note)


def against_trl(work):
    """On the toy's base, whatever the other rows are measured on."""
    try:
        import trl
    except ImportError:
        yield "7. GRPO step against TRL: left out, it is not installed (pip install trl)"
        return
    with tempfile.TemporaryDirectory() as folder:
        images, samples = toy_samples(folder, PROMPTS)
    vlm = toy_vlm(adapters=("reference", "policy"))
    theirs, ours, tokens = compare(vlm, toy_vlm(), images, samples, work.repeats, our_update)
    ratios = sorted(a / b for a, b in zip(theirs, ours))
    yield (
        f"7. GRPO step on the toy, TRL {trl.__version__}: {statistics.median(theirs):.2f} s, ours "
        f"{statistics.median(ours):.2f} s, {statistics.median(ratios):.2f} times faster "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}); tokens a completion {tokens[0]:.1f}, "
        f"{tokens[1]:.1f}"
    )


def kind_of(operation):
    """What an operation of PyTorch is in row 8."""
    if "scaled_dot_product" in operation:
        return "attention"
    if operation in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "projections"
    return "other operations"


def seconds_by_kind(piece):
    """{kind of operation: its seconds} in one call of `piece`, by PyTorch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print when it starts and stops
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        piece()
    spent = Counter()
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return spent


def cost_of_a_pass(work):
    """The largest batch of row 2 single-shot, against the same with a step of one token.

    What is left is passes of one token for each prompt. Operations are the profiler's; Python is
    what remains of the time without it: calls of modules and operations, masks, bookkeeping.
    """
    if torch.cuda.is_available():
        yield "8. a decoding pass: left out, its parts are a CPU's"
        return
    count = max(work.sizes)
    wall = []
    spent = []
    for tokens in (1, work.tokens):
        work_of_row = replace(work, tokens=tokens)
        _, ours = decoders(work_of_row, count, steps=0)
        rows = ours()
        wall.append(statistics.median(seconds(ours) for _ in range(work.repeats)))
        runs = [seconds_by_kind(ours) for _ in range(work.repeats)]
        spent.append({kind: min(run[kind] for run in runs) for kind in runs[0]})
    passes = max(len(row.target) for row in rows) - 1
    whole = wall[1] - wall[0]
    shares = {kind: (spent[1][kind] - spent[0][kind]) / whole for kind in sorted(spent[1])}
    shares["Python"] = 1 - sum(shares.values())
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    yield f"8. a decoding pass of {count} prompts: {whole / passes * 1000:.1f} ms; {parts}"


def weights_for_decoding(work):
    """The largest batch of row 2 with `rollout` as it is, and as `play` calls it."""
    kind = "4-bit weights unpacked"
    if not getattr(work.vlm.model, "is_loaded_in_4bit", False):
        kind = "LoRA in the weights"
        with merged(work.vlm):
            is_merged = any(getattr(module, "merged", False) for module in work.vlm.model.modules())
        if not is_merged:
            yield "9. weights for decoding: left out, for 4-bit or small float32 ones alone"
            return
    count = max(work.sizes)
    _, ours = decoders(work, count)
    plain = functools.partial(common.rollout, *ours.args, **ours.keywords)
    measured = take_turns({"plain": plain, "ours": ours}, work.repeats)
    least = rollout_floor(work.vlm, work.rates, ours())
    if decoding.no_room < float("inf"):
        yield "9. weights for decoding: unpacked ones had no room; give smaller --sizes"
        return
    yield table_row(
        f"9. {kind}, {count} prompts",
        *measured.values(),
        least,
        "plain: as they are",
    )


ROWS = {
    1: group_rollout,
    2: batch_rollouts,
    3: latency,
    4: update_of_grpo,
    5: pass_of_sft,
    6: both_depths,
    7: against_trl,
    8: cost_of_a_pass,
    9: weights_for_decoding,
}


# The command --------------------------------------------------------------------------------------
def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected 1 or more")
    return value


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m speed.benchmark", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS), help="of the table")
    add("--config", choices=CONFIGS, default="small", help="of the random weights (small)")
    add("--run", help="a trained run instead: its best adapter and test samples")
    add("--model", default=EMBEDDED, help=f"with --run: the base model ({EMBEDDED})")
    add("--quantize", choices=("none", "nf4"), default="none", help="with --run (none)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--checkpointing", choices=("on", "off"), default="on", help="in training passes (on)")
    add("--tokens", type=positive, default=60, help="of a step; with --run at most (60)")
    add("--repeats", type=positive, default=3, help="timed calls of each way (3)")
    add("--sizes", type=positive, nargs="+", default=[1, 4, 8], help="prompts at once (1 4 8)")
    return parser.parse_args()


def main():
    args = parse()
    quiet()
    count = max(2, *args.sizes)
    work = work_of_run(args, count) if args.run else random_work(args, count)
    work.rates = machine_rates(device(), getattr(torch, args.dtype))
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    rates = f"{work.rates.arithmetic / 1e9:,.0f} GFLOP/s, {work.rates.reading / 1e9:,.1f} GB/s"
    print(f"{machine}, torch {torch.__version__}, {args.dtype}: {rates}")
    million = size_of(work.vlm.base)[0] / 1e6
    print(
        f"{args.run or args.config}: {million:,.0f} million parameters without embeddings,", end=" "
    )
    print(f"{args.tokens} tokens a step, medians of {args.repeats}")
    check(work, min(args.tokens, 16))
    print(line(HEAD))
    for number in sorted(set(args.rows)):
        for text in ROWS[number](work):
            print(text, flush=True)
    after = machine_rates(device(), getattr(torch, args.dtype)).arithmetic
    print(doubt(work.rates.arithmetic, after), end="")


def doubt(before, after):
    """A sentence where the machine's rate has changed so much that the floors are wrong, or ""."""
    if max(before / after, after / before) < 1.3:
        return ""
    rates = f"{before / 1e9:,.0f} GFLOP/s before, {after / 1e9:,.0f} after"
    return f"other work ran beside this: {rates}; do not trust the floors\n"


if __name__ == "__main__":
    main()
