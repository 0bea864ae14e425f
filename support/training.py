"""What surrounds a training loop: the largest batch first, and the health of a run."""

import math
import random

from common import box_iou, build_trajectory, encode_images, trajectory_logprobs
from support.data.samples import load_image
from support.running.errors import stop, working_on
from support.running.processes import RANK, WORLD, device, gather

import torch
from tqdm import tqdm

# Metrics that are watched, as means over the last updates: the healthy range (rules of thumb, ours)
# and what to try outside it
HEALTHY = {
    "kl": (0, 0.5, "the policy runs from its reference; lower --lr or raise --beta"),
    "entropy": (
        0.01,
        3,
        "low: groups stop differing, raise --entropy; high: a collapse on the way, lower --lr",
    ),
    "no_signal": (
        0,
        0.7,
        "most groups have equal rewards and teach nothing; raise --temperature or --group-size",
    ),
    "sampler_gap": (
        0,
        0.05,
        "what samples is not the policy that is trained; look at --dtype, or --engine plain",
    ),
    "valid": (
        0.9,
        1,
        "boxes are lost; lower --lr, raise --max-tokens if steps end unfinished",
    ),
}
LAST_UPDATES = 10
FEWEST_UPDATES = 5  # before these a mean says little


def unhealthy(rows, warned, healthy=HEALTHY):
    """Sentences on the metrics whose mean over the last updates has left its range; each once.

    rows: the log's rows of the updates so far, a dict each. warned: the metrics already spoken of,
    a set, which grows. healthy: metric -> (low, high, what to try).
    """
    recent = rows[-LAST_UPDATES:]
    if len(recent) < FEWEST_UPDATES:
        return []
    sentences = []
    for key, (low, high, advice) in healthy.items():
        mean = sum(row[key] for row in recent) / len(recent)
        if key not in warned and not low <= mean <= high:
            warned.add(key)
            sentences.append(f"warning: {key} is {mean:.3f} (healthy: {low} to {high}): {advice}")
    return sentences


def image_token_count(vlm, sample):
    """How many tokens the sample's image is to the language model, after --max-pixels."""
    processor = vlm.image_processor
    patches = processor.get_number_of_image_patches(sample["height"], sample["width"], {})
    return patches // processor.merge_size**2


def probe(vlm, trajectories, sample, pictures=0):
    """One forward and backward pass over the largest batch of the run, before any work.

    pictures: how many a whole update keeps the image tokens of. Prints how many tokens the batch
    has and, on a GPU, what it takes, with those image tokens, and what the GPU has.
    """
    working_on([sample])
    (-trajectory_logprobs(vlm, trajectories)[0].mean()).backward()
    vlm.model.zero_grad()
    memory = ""
    if torch.cuda.is_available():
        kept = pictures * size_of(trajectories[0].images[:1])
        peak = (torch.cuda.max_memory_allocated() + kept) / 2**30
        whole = torch.cuda.get_device_properties(device()).total_memory / 2**30
        memory = f": peak {peak:.1f} of {whole:.1f} GiB, before the optimizer's state"
    longest = max(len(t.ids) for t in trajectories)
    size = f"{len(trajectories)} x {longest} tokens"
    print(f"largest batch, forward and backward, {size}{memory}")


def probe_sft(vlm, rows, samples, examples, args):
    """`probe` of the row whose sequence is longest.

    rows: of data/sft.jsonl. samples: id -> sample. examples: makes the trajectories of rows.
    """

    def size(row):
        return image_token_count(vlm, samples[row["id"]]), len(str(row))

    largest = max(rows, key=size)
    batch = examples([largest]) * args.batch_size
    pictures = len(batch) * args.grad_accum // WORLD * len(batch[0].images)
    probe(vlm, batch, samples[largest["id"]], pictures)


def probe_grpo(vlm, samples, args, data, loop):
    """`probe` of what the rollout may sample at most: the largest image, all steps full.

    data: the folder that the samples' images are relative to.
    """

    def size(sample):
        return image_token_count(vlm, sample), len(sample["expression"])

    largest = max(samples, key=size)
    working_on([largest])
    count = args.steps + 1
    images = encode_images(vlm, [load_image(largest, data)]) * count
    longest = vlm.tokenizer.decode(vlm.encode(" the")[:1] * args.max_tokens)
    trajectory = build_trajectory(vlm, images, largest["expression"], [longest] * count, loop)
    prompts = args.grad_accum // WORLD
    pictures = prompts + prompts * args.group_size * args.steps
    pictures = max(pictures, args.val_prompts // WORLD * count)  # those of a validation
    probe(vlm, [trajectory] * args.batch_size, largest, pictures)


# Image tokens, which are constants of a run -------------------------------------------------------
KEPT_BYTES = 2**30


def size_of(images):
    """How many bytes these ImageTokens take."""
    return sum(part.nbytes for image in images for part in (image.embeds, *image.deepstack))


def image_token_source(vlm, pictures):
    """-> a function from rows (dicts with an id) to the ImageTokens of each row's pictures.

    pictures: row -> PIL images. Image tokens are constants, so on a CPU they are kept for the next
    epoch, up to KEPT_BYTES; a GPU, whose memory is scarcer than its time, encodes them again.
    """
    kept = {}
    room = KEPT_BYTES if vlm.base.device.type == "cpu" else 0

    def tokens_of(rows):
        nonlocal room
        found = []
        for row in rows:
            images = kept.get(row["id"])
            if images is None:
                # One row at a time: all pictures of an update together take more than its step
                images = encode_images(vlm, pictures(row))
                if size_of(images) <= room:
                    kept[row["id"]] = images
                    room -= size_of(images)
            found.append(images)
        return found

    return tokens_of


# The loop's bar, its log, and the end of a run that has gone astray -------------------------------
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


def step_ious(trajectories, owners):
    """The mean IoU of each step, T + 1 floats, over the trajectories of all processes.

    owners: the sample of each trajectory. The reward does not see these (Section 3.4, "Advantage
    scoring"); they show whether refining helps.
    """
    ious = [[box_iou(box, s) for box in t.boxes] for t, s in zip(trajectories, owners)]
    return [round(v, 4) for v in torch.tensor(gather(ious)).mean(0).tolist()]


def sampler_gaps(trajectories, logprob):
    """|log pi as it was sampled - log pi of the trainer (a tensor, [M])| -> M floats."""
    sampled = torch.tensor([value for t in trajectories for value in t.logprob])  # [M]
    return (sampled - logprob.detach().cpu()).abs().tolist()


def rollout_facts(rewards, trajectories, owners, gaps):
    """What the log of GRPO has of a batch of rollouts, over all processes. rewards: [P, N].

    gaps: of `sampler_gaps`. no_signal: the share of groups whose rewards are all equal, which teach
    nothing.
    """
    valid = [sum(box is not None for box in t.boxes) / len(t.boxes) for t in trajectories]
    valid = gather(valid)
    lengths = gather([len(t.target) for t in trajectories])
    sums, largest = zip(*gather([(sum(gaps), max(gaps))]))
    rewards = torch.tensor(gather(rewards.tolist()))  # [P, N] of all processes
    deviation = rewards.std(1, unbiased=False)  # [P]
    return {
        "reward": rewards.mean().item(),
        "reward_std": deviation.mean().item(),
        "no_signal": (deviation < 1e-6).float().mean().item(),
        "iou": step_ious(trajectories, owners),
        "valid": sum(valid) / len(valid),
        "tokens": sum(lengths) / len(lengths),
        "sampler_gap": sum(sums) / sum(lengths),
        "sampler_gap_max": max(largest),
    }
