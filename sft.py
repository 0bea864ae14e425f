"""Phase 1: SFT warm-up on the correction trajectories of phase 0 (Section 3.2).

    python make_data.py && python sft.py

Each example is one token sequence: prompt, step 0, overlay + instruction, step 1, overlay +
instruction, step 2. Cross-entropy on the reasoning and the boxes alone; the prompt, the image
tokens and the injected instructions are context. LoRA on the attention and MLP projections of the
language model; everything else is frozen.

Where the paper is silent: "all attention and MLP projection layers" (Section 4.1), and what 4 bits
hold, are read as the language model's, not the vision tower's; AdamW without weight decay,
gradients clipped to norm 1. The toy has its own rate, epochs and batch.

Reads data/train.jsonl, data/sft.jsonl. Writes sft/ (a PEFT adapter), log/sft.jsonl, sft.checkpoint
under --out.
"""

from common import (
    build_trajectory,
    feedback_pictures,
    step_text,
    trajectory_logprobs,
    written_boxes,
)
from support.data import samples
from support.model import adapters, loading, memory
from support.model.views import loop_of
from support.run import Run

import torch

run = Run("sft", __doc__)
args, data = run.args, run.data
loop = loop_of(args)

# Data: the trajectories of phase 0, each with its sample ------------------------------------------
rows = samples.read_trajectories(args, data)
run.agrees("make_data", "model", "feedback", "surroundings")
run.reads(data / "train.jsonl", data / "sft.jsonl")

# Model and optimizer ------------------------------------------------------------------------------
vlm = loading.load_vlm(args)
adapters.new_adapter(vlm, args.lora_rank, args.lora_alpha)
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)


def pictures(row):
    """What the model sees at each step: at step t the picture of box t - 1, as at inference."""
    return feedback_pictures(samples.load_image(row, data), row["boxes"], loop)


image_tokens = memory.image_token_source(vlm, pictures)


def examples(rows):
    """The training sequences of these rows."""
    trajectories = []
    for row, images in zip(rows, image_tokens(rows)):
        boxes = written_boxes(row["boxes"], loop)
        written = [step_text(trace, box) for trace, box in zip(row["traces"], boxes)]
        trajectories.append(build_trajectory(vlm, images, row["expression"], written, loop))
    return trajectories


def accumulate(size, batch, tokens):
    """Adds up the gradients of an update, of `size` trajectories at a time; returns its loss."""
    loss = 0.0
    for i in range(0, len(batch), size):
        scores = trajectory_logprobs(vlm, batch[i : i + size])
        micro_loss = -scores.logprob.sum() / tokens  # [M] -> []
        micro_loss.backward()
        loss += micro_loss.item()
    return loss


# Training -----------------------------------------------------------------------------------------
memory.try_largest(vlm, rows, examples, args)
for chosen in run.epochs(rows, vlm, optimizer):
    batch = sorted(examples(run.share(chosen)), key=lambda t: len(t.ids))  # passes pad less
    # Every generated token weighs the same, whichever micro-batch or process it is in: divided by
    # the tokens of the whole update, accumulation equals one large batch.
    tokens = run.total(sum(len(t.target) for t in batch))
    loss = run.total(memory.fitting(vlm, args, accumulate, batch, tokens))
    run.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.check(loss, norm, chosen)
    rate = run.set_rate(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    run.log(epoch=run.epoch, loss=loss, grad_norm=norm, lr=rate, tokens=tokens)

adapters.save_adapter(vlm, run.adapter)
run.finish(then="python grpo.py")
