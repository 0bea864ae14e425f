"""Memory: the largest batch before any work, and image tokens that are kept."""

from dataclasses import replace

from common import build_trajectory, encode_images, trajectory_logprobs
from support.data.samples import load_image
from support.model import plan
from support.model.decoding import play
from support.model.loading import free_memory
from support.running.errors import out_of_memory, working_on
from support.running.processes import WORLD, device

import torch
from tqdm import tqdm


def probe(vlm, trajectories, sample, kept):
    """One forward and backward pass over the largest batch of the run, before any work.

    kept: bytes of the image tokens that a whole update keeps. They and the optimizer's two moments
    are held meanwhile. Prints how many tokens the batch has and, on a GPU, what it takes and what
    the GPU has.
    """
    working_on([sample])
    held = kept + 2 * trained_bytes(vlm)
    held = torch.empty(held, dtype=torch.uint8, device=vlm.base.device)
    (-trajectory_logprobs(vlm, trajectories)[0].mean()).backward()
    del held
    vlm.model.zero_grad()
    memory = ""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        whole = torch.cuda.get_device_properties(device()).total_memory / 2**30
        memory = f": peak {peak:.1f} of {whole:.1f} GiB"
    longest = max(len(t.ids) for t in trajectories)
    size = f"{len(trajectories)} x {longest} tokens"
    print(f"largest batch fits: forward and backward, {size}{memory}")


def trained_bytes(vlm):
    return sum(p.nbytes for p in vlm.model.parameters() if p.requires_grad)


def fitting(vlm, args, attempt, *more):
    """attempt(rows, *more), where rows is --batch-size, halved until there is the memory. It begins
    without gradients, since those of an attempt that failed are dropped."""
    while True:
        try:
            return attempt(args.batch_size, *more)
        except Exception as e:
            if args.batch_size == 1 or not out_of_memory(e):
                raise
        args.batch_size //= 2
        vlm.model.zero_grad()
        free_memory()  # what the attempt held is free here, where the exception is no more
        tqdm.write(f"out of memory: --batch-size {args.batch_size} instead")


def try_largest(vlm, rows, examples, args, kept=None):
    """`probe` of the row whose sequences are longest. examples: makes the trajectories of rows.
    kept: batches whose image tokens are held together (default: those of an update)."""

    def size(row):
        return plan.image_token_count(vlm, row) * len(row.get("boxes", "1")), len(str(row))

    def attempt(count):
        batch = examples([largest] * count)
        images = size_of(batch[0].images) * len(batch) // count
        probe(vlm, batch, largest, together * images)

    largest = max(rows, key=size)
    together = args.batch_size * (kept or args.grad_accum // WORLD)
    fitting(vlm, args, attempt)


def try_largest_rollout(vlm, samples, args, data, loop):
    """`probe` of what the rollout may sample at most: the largest image, all steps full. Without a
    --batch-size it is what fits, by `plan`. Without --prompts-at-once the plans of the validations'
    rollouts and of an update's are printed too.

    data: the folder that the samples' images are relative to.
    """

    def size(sample):
        return plan.image_token_count(vlm, sample), len(sample["expression"])

    largest = max(samples, key=size)
    working_on([largest])
    count = args.steps + 1
    images = encode_images(vlm, [load_image(largest, data)]) * count
    longest = vlm.tokenizer.decode(vlm.encode(" the")[:1] * args.max_tokens)
    longer = replace(loop, without_box="")  # the instruction as after a box
    trajectory = build_trajectory(vlm, images, largest["expression"], [longest] * count, longer)
    prompts = args.grad_accum // WORLD
    pictures = prompts + prompts * args.group_size * args.steps
    pictures = max(pictures, args.val_prompts // WORLD * count)  # those of a validation
    kept = pictures * size_of(images[:1])
    each = plan.training_bytes(vlm, len(trajectory.ids))
    free = plan.free_bytes() - kept - 3 * trained_bytes(vlm)  # and gradients
    args.batch_size = args.batch_size or plan.at_once(prompts * args.group_size, each, free)
    fitting(vlm, args, lambda rows: probe(vlm, [trajectory] * rows, largest, kept))
    if args.engine == "plain" and not args.prompts_at_once:
        image, options = load_image(largest, data), dict(max_tokens=args.max_tokens, loop=loop)
        validated = max(1, min(64, args.val_prompts // WORLD))
        for count, group in ((validated, 1), (prompts, args.group_size)):
            asked = [image] * count, [largest["expression"]] * count, args.steps
            play(vlm, *asked, group_size=group, planned=True, dry=True, **options)


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
