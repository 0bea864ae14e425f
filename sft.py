"""Phase 1: SFT warm-up on the correction trajectories of phase 0 (Section 3.2).

    python make_data.py && python sft.py

Each example is one token sequence: prompt, step 0, overlay + instruction, step 1, overlay +
instruction, step 2. Cross-entropy on the reasoning and the boxes alone; the prompt, the image
tokens and the injected instructions are context. LoRA on the attention and MLP projections of the
language model; everything else is frozen.

No departure from the paper's recipe. Where the paper is silent: "all attention and MLP projection
layers" (Section 4.1) are read as those of the language model; AdamW without weight decay, gradients
clipped to norm 1. The toy preset has its own rate, epochs and batch (support/running/presets.py).

Reads data/train.jsonl, data/sft.jsonl. Writes sft/ (a PEFT adapter), log/sft.jsonl, sft.checkpoint
under --out.
"""

import math
import time

from common import (
    build_trajectory,
    feedback_pictures,
    step_text,
    trajectory_logprobs,
    written_boxes,
)
from support import run
from support.data import samples
from support.model import adapters, checkpoints, loading, memory
from support.model.views import loop_of
from support.running import errors, files, processes
from support.running.flags import command, flags

import torch

args = flags("sft", __doc__)
loop = loop_of(args)
processes.divides(args.grad_accum, "--grad-accum")
processes.seed_all(args.seed)
start = time.time()
data = args.out / "data"

# Data: the trajectories of phase 0, and the sample of each ----------------------------------------
rows, sample_of = samples.read_trajectories(args, data)
per_update = args.batch_size * args.grad_accum
updates_per_epoch = math.ceil(len(rows) / per_update)
updates = updates_per_epoch * args.epochs
files.agrees(args, "make_data", "model", "feedback", "surroundings")
files.begin(args, "sft", data / "train.jsonl", data / "sft.jsonl")
checkpoints.leave_if_finished(args, "sft")

# Model and optimizer ------------------------------------------------------------------------------
vlm = loading.load_vlm(args)
adapters.new_adapter(vlm, args.lora_rank, args.lora_alpha)
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
count = sum(p.numel() for p in parameters)
print(f"{len(rows)} trajectories, {updates} updates of {per_update}, {count:,} LoRA parameters")


def pictures(row):
    """What the model sees at each step: at step t the picture of box t - 1, as at inference."""
    image = samples.load_image(sample_of[row["id"]], data)
    return feedback_pictures(image, row["boxes"], loop)


image_tokens = memory.image_token_source(vlm, pictures)


def examples(rows):
    """The training sequences of these rows."""
    trajectories = []
    for row, images in zip(rows, image_tokens(rows)):
        boxes = written_boxes(row["boxes"], loop)
        written = [step_text(trace, box) for trace, box in zip(row["traces"], boxes)]
        trajectories.append(build_trajectory(vlm, images, row["expression"], written, loop))
    return trajectories


# Resume, and the largest batch of the run before any work -----------------------------------------
log, first_update, _ = checkpoints.resume(args, "sft", vlm, optimizer)
errors.explain_out_of_memory("--max-pixels or --batch-size (and raise --grad-accum as much)")
memory.probe_sft(vlm, rows, sample_of, examples, args)
processes.catch_interrupts()

# Training -----------------------------------------------------------------------------------------
bar = run.progress("sft", updates, first_update)
for update in range(first_update, updates):
    # Batch ----------------------------------------------------------------------------------------
    # Each epoch goes through all trajectories in an order of its own.
    epoch, number = divmod(update, updates_per_epoch)
    shuffled = run.shuffled(rows, args.seed, epoch)
    chosen = shuffled[number * per_update : (number + 1) * per_update]
    mine = processes.share(chosen)
    errors.working_on([sample_of[row["id"]] for row in mine])
    batch = examples(mine)

    # Update ---------------------------------------------------------------------------------------
    # Every generated token weighs the same, whichever micro-batch or process it is in: divided by
    # the tokens of the whole update, accumulation equals one large batch.
    tokens = sum(processes.gather([sum(len(t.target) for t in batch)]))
    loss = 0.0
    for i in range(0, len(batch), args.batch_size):
        scores = trajectory_logprobs(vlm, batch[i : i + args.batch_size])
        micro_loss = -scores.logprob.sum() / tokens  # [M] -> []
        micro_loss.backward()
        loss += micro_loss.item()
    processes.sum_gradients(parameters)
    loss = sum(processes.gather([loss]))
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.stop_unless_finite(update + 1, loss, norm, chosen)
    rate = run.learning_rate(args, update, updates)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()

    # Log ------------------------------------------------------------------------------------------
    row = dict(loss=loss, grad_norm=norm, lr=rate, tokens=tokens)
    log.write(update=update + 1, epoch=epoch + 1, **row)
    bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", refresh=False)
    bar.update()
    checkpoints.save_if_due(args, "sft", vlm, optimizer, log, update=update + 1, last=updates)
bar.close()
result = f"loss {loss:.3f}; adapter in {args.out / 'sft'}"
print(f"{result}, {processes.minutes(start)}; next: {command(args, 'python grpo.py')}")
