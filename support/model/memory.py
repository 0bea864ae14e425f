"""Memory: the largest batch before any work, and image tokens that are kept."""

from dataclasses import replace

from common import build_trajectory, encode_images, trajectory_logprobs
from support.data.samples import load_image
from support.model import plan
from support.model.loading import free_memory
from support.running.errors import out_of_memory, working_on
from support.running.processes import WORLD, device

import torch


def image_token_count(vlm, sample):
    """How many tokens the sample's image is to the language model, after --max-pixels."""
    return plan.image_token_count(vlm, sample["width"], sample["height"])


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


def try_largest(vlm, rows, examples, args, kept=None):
    """`probe` of the row whose sequences are longest. examples: makes the trajectories of rows.
    kept: batches whose image tokens are held together (default: those of an update)."""

    def size(row):
        return image_token_count(vlm, row) * len(row.get("boxes", "1")), len(str(row))

    largest = max(rows, key=size)
    batch = examples([largest] * args.batch_size)
    pictures = len(batch) * (kept or args.grad_accum // WORLD) * len(batch[0].images)
    each = len(batch) // args.batch_size  # a pair has two sequences
    rows = fitting(vlm, batch, largest, pictures, each) // each
    args.batch_size, args.grad_accum = rows, args.grad_accum * args.batch_size // rows


def try_largest_rollout(vlm, samples, args, data, loop):
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
    told = replace(loop, without_box="")  # as after a box: the longer instruction
    trajectory = build_trajectory(vlm, images, largest["expression"], [longest] * count, told)
    prompts = args.grad_accum // WORLD
    pictures = prompts + prompts * args.group_size * args.steps
    pictures = max(pictures, args.val_prompts // WORLD * count)  # those of a validation
    length, all_rows = len(trajectory.ids), prompts * args.group_size
    kept = pictures * size_of(images[:1])
    rows = args.batch_size or plan.training_rows(vlm, length, kept, all_rows)
    args.batch_size = fitting(vlm, [trajectory] * rows, largest, pictures)


def fitting(vlm, trajectories, sample, pictures, each=1):
    """`probe`, in parts where memory runs out; how many of them a training pass then has: a share
    of all that leaves no rest. each: so many stay together."""
    count = len(trajectories)
    while True:
        try:
            probe(vlm, trajectories[:count], sample, pictures)
            return count
        except Exception as e:
            if not out_of_memory(e) or count <= each:
                raise
        vlm.model.zero_grad()
        less = range(each, count // 2 + 1, each)
        count = max((n for n in less if len(trajectories) % n == 0), default=each)
        free_memory()
        print(f"out of memory; a training pass takes {count} trajectories instead")


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
