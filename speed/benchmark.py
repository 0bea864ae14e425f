"""How fast, against what: a piece of work done the plainest correct way, and as this code does it.

    python -m speed.benchmark                                            the toy
    python -m speed.random_checkpoint --out runs/random_4b
    python -m speed.benchmark --preset paper --model runs/random_4b      for a GPU

The plain way (plain.py) is `generate()` over the whole context, encoded anew at every step, and one
forward pass per trajectory with all of its logits. Before anything is timed both ways have to
agree: in float32 the same tokens, and the same loss and gradient within a tolerance. Then they take
turns; a row has the medians. Decoding is greedy, so that both do the same work. The adapter is the
best one in --out; where there is none, a new one with random weights.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from common import feedback_pictures, grpo_loss, trajectory_logprobs
from speed.plain import plain_logprobs, plain_rollout
from support.data.samples import load_image
from support.model.adapters import lora_size, policy_and_reference, using
from support.model.checkpoints import best_adapter
from support.model.decoding import play
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.flags import flags
from toy.world import make_samples

import torch

PROMPTS = 2  # as --preset paper decodes them together
N = 6  # trajectories of a prompt
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 1.0, -0.5]  # of the trajectories of a group
TOKENS = 60  # of a step, at most
TURNS = 3  # timed calls of each way


def prepare(args):
    """(a model with policy and reference; PROMPTS images of the toy's world, and their texts)."""
    vlm = load_vlm(args)
    adapter = best_adapter(args.out)
    policy_and_reference(vlm, adapter, lora_size(args.preset))
    if adapter is None:
        for name, p in vlm.model.named_parameters():
            if "lora_B" in name:  # begins at zero, where no adapter differs from another
                torch.nn.init.normal_(p, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(folder, 1, args.seed)[:PROMPTS]
        images = [load_image(sample, Path(folder)) for sample in samples]
    if args.preset == "paper":
        images = [image.resize((640, 480)) for image in images]  # as photos are: 300 image tokens
    return vlm, images, [sample["expression"] for sample in samples]


# Ours, without flags, logs and files; the plain ways are in plain.py ------------------------------
def our_logprobs(vlm, trajectories, images):
    """Log-probabilities and entropies [M] of all targets; the rollout's image tokens serve."""
    scores = trajectory_logprobs(vlm, trajectories)
    return scores.logprob, scores.entropy


def grpo_gradient(vlm, trajectories, images, advantages, *, batch_size, logprobs=our_logprobs):
    """GRPO's gradient, `batch_size` trajectories at a time; returns the loss.

    images: PIL, those of each trajectory. logprobs: `our_logprobs`, or the plain way's.
    """
    tokens = sum(len(t.target) for t in trajectories)
    total = 0.0
    vlm.model.zero_grad()
    for i in range(0, len(trajectories), batch_size):
        part = slice(i, i + batch_size)
        batch = trajectories[part], images[part]
        with torch.no_grad(), using(vlm, "reference"):
            reference, _ = logprobs(vlm, *batch)  # [M], like the three others
        logprob, entropy = logprobs(vlm, *batch)
        pairs = zip(trajectories[part], advantages[part])
        advantage = torch.tensor([a for t, a in pairs for _ in t.target]).to(logprob)
        loss, *_ = grpo_loss(logprob, reference, advantage, entropy, beta=0.04, entropy_weight=0.01)
        (loss / tokens).backward()
        total += loss.item() / tokens
    return total


# Pairs of functions: the plain way and ours -------------------------------------------------------
def rollouts(vlm, images, texts, tokens):
    """Rollouts of these prompts, T = 2."""
    what = vlm, images, texts, 2
    options = dict(max_tokens=tokens, group_size=N)
    return partial(plain_rollout, *what, **options), partial(play, *what, **options)


def updates(vlm, image, trajectories):
    """Updates of GRPO on a group of trajectories of one image (PIL)."""
    pictures = [feedback_pictures(image, t.boxes) for t in trajectories]
    update = partial(grpo_gradient, vlm, trajectories, pictures, ADVANTAGES)
    return partial(update, batch_size=1, logprobs=plain_logprobs), partial(update, batch_size=N)


# Whether they agree, and how long they take -------------------------------------------------------
def check(vlm, images, texts, tokens=16):
    """Stops unless both ways agree, on steps of `tokens`.

    In bfloat16 near ties fall either way, so tokens may differ there.
    """
    is_exact = vlm.base.dtype == torch.float32
    plain, ours = (decode() for decode in rollouts(vlm, images, texts, tokens))
    same = sum(a.target == b.target and a.boxes == b.boxes for a, b in zip(plain, ours))
    losses, gradients = [], []
    for update in updates(vlm, images[0], ours[:N]):
        losses.append(update())
        grads = [p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    loss = abs(losses[0] - losses[1]) / abs(losses[0])
    gradient = (gradients[0] - gradients[1]).norm().item() / gradients[0].norm().item()
    print(f"the two ways: {same} of {len(ours)} trajectories have the same tokens;")
    print(f"  loss and gradient of GRPO differ by {loss:.0e} and {gradient:.0e}")
    if (is_exact and same < len(ours)) or max(loss, gradient) > (5e-3 if is_exact else 0.1):
        stop("the two ways do not agree; nothing is timed")


def now():
    """Seconds, once all work that was begun is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(work, ways):
    """Prints a row: the medians of both ways, in turn. The first call of each is not timed."""
    seconds = []
    for _ in range(TURNS + 1):
        for way in ways:
            start = now()
            way()
            seconds.append(now() - start)
    plain, ours = (statistics.median(seconds[2 + i :: 2]) for i in range(2))
    print(f"{work:38}{plain:10.2f}{ours:10.2f}{plain / ours:14.2f}", flush=True)


def main(args):
    vlm, images, texts = prepare(args)
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}; {TOKENS} tokens a step, medians of {TURNS}")
    check(vlm, images, texts)
    print(f"{'work':38}{'plain, s':>10}{'ours, s':>10}{'times faster':>14}")
    both = rollouts(vlm, images, texts, TOKENS)
    compare(f"rollout of {PROMPTS} prompts, N = {N}, T = 2", both)
    group = both[1]()[:N]
    compare(f"GRPO update, ours in a batch of {N}", updates(vlm, images[0], group))


if __name__ == "__main__":
    main(flags(None, __doc__))
