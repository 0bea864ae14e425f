"""How fast the loop is played: the plainest correct way, and as this code does it.

    python -m speed.benchmark                                            the toy
    python -m speed.random_checkpoint --out runs/random_4b
    python -m speed.benchmark --preset paper --model runs/random_4b      for a GPU

The plain way (plain.py) is `generate()` over the whole context, encoded anew at every step. Before
anything is timed both ways have to agree in all tokens (in float32). Then they take turns, and the
row has the medians. Decoding is greedy, so that both do the same work. The adapter is the best one
in --out; where there is none, a new one with random weights.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from speed.plain import plain_rollout
from support.data.samples import load_image
from support.model.adapters import lora_size, policy_and_reference
from support.model.checkpoints import best_adapter
from support.model.decoding import play
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.flags import flags
from toy.world import make_samples

import torch

PROMPTS = 2  # as --preset paper decodes them together
N = 6  # trajectories of a prompt
TOKENS = 60  # of a step, at most
TURNS = 3  # timed calls of each way


def now():
    """Seconds, once all work that was begun is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def scenes(count):
    """`count` samples of the toy's world, and their images (PIL)."""
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(folder, -(-count // 3), 0)[:count]
        return samples, [load_image(sample, Path(folder)) for sample in samples]


def model_of(args):
    """The model with policy and reference."""
    vlm = load_vlm(args)
    adapter = best_adapter(args.out)
    policy_and_reference(vlm, adapter, lora_size(args.preset))
    if adapter is None:
        for name, p in vlm.model.named_parameters():
            if "lora_B" in name:  # begins at zero, where no adapter differs from another
                torch.nn.init.normal_(p, std=0.02)
    return vlm


def main(args):
    vlm = model_of(args)
    samples, images = scenes(PROMPTS)
    if args.preset == "paper":
        images = [image.resize((640, 480)) for image in images]  # as photos are: 300 image tokens
    what = vlm, images, [sample["expression"] for sample in samples], args.steps
    ways = [partial(way, *what, max_tokens=TOKENS, group_size=N) for way in (plain_rollout, play)]
    pairs = list(zip(*(way() for way in ways)))
    same = sum(a.target == b.target and a.boxes == b.boxes for a, b in pairs)
    print(f"the two ways: {same} of {len(pairs)} trajectories are the same")
    if same < len(pairs) and args.dtype == "float32":  # in bfloat16 near ties fall either way
        stop("the two ways do not agree; nothing is timed")
    seconds = []
    for _ in range(TURNS):
        for way in ways:
            start = now()
            way()
            seconds.append(now() - start)
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    plain, ours = statistics.median(seconds[::2]), statistics.median(seconds[1::2])
    print(f"{machine}, torch {torch.__version__}; {TOKENS} tokens a step, medians of {TURNS}")
    print(
        f"rollout of {PROMPTS} prompts, N = {N}, T = {args.steps}: {plain:.2f} s, ours {ours:.2f} "
        f"s, {plain / ours:.2f} times faster"
    )


if __name__ == "__main__":
    main(flags(None, __doc__))
