"""Phase 2: the supervised start, so that boxes are well-formed (Section 3.1, first paragraph).

    python -m visrl.make_data && python -m visrl.sft

Each example is one token sequence: question, true box, its crop, true answer. Cross-entropy on the
box and the answer alone; the question, the image tokens and what is injected are context. LoRA on
the language model; everything else is frozen. This is the only phase that learns from boxes: few
samples (30k of Visual CoT's 438k), since only the form of the answer is to be learnt. `--samples N`
learns from N of them (Table 3: the share of well-formed boxes grows with N).

No departure from the authors' recipe but the loop's own (visrl/loop.py); the toy preset has its own
rate, rank and batch (support/running/presets.py).

Reads data/sft.jsonl. Writes sft/ (a PEFT adapter), log/sft.jsonl, sft.checkpoint under --out, with
N in their names.
"""

from common import feedback_pictures, normalize_box, trajectory_logprobs
from support.data.samples import load_image, read_side
from support.model import adapters, loading, memory
from support.run import Run
from support.running.errors import stop
from visrl.loop import LOOPS, path_trajectory
from visrl.sources import BOXED

import torch

run = Run("visrl.sft", __doc__)
args, data = run.args, run.data
loop = LOOPS[args.crop]

# Data ---------------------------------------------------------------------------------------------
rows = read_side(args, "sft", "python -m visrl.make_data", BOXED)[: args.samples or None]
if args.samples:
    run.name = f"sft_{args.samples}"
for row in rows:
    row["box"] = normalize_box(row["bbox"], row["width"], row["height"])
# Rounding down to thousandths may leave a tiny true box without an area
rows = [row for row in rows if row["box"][0] < row["box"][2] and row["box"][1] < row["box"][3]]
if not rows:
    stop(f"{data / 'sft.jsonl'} has no box of a thousandth of its image; make it again")
run.reads(data / "sft.jsonl")

# Model and optimizer ------------------------------------------------------------------------------
vlm = loading.load_vlm(args)
adapters.new_adapter(vlm, args.lora_rank, args.lora_alpha)
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)


def pictures(row):
    """What the model sees: the whole image, and the crop of the true box."""
    return feedback_pictures(load_image(row, data), [row["box"], None], loop)


image_tokens = memory.image_token_source(vlm, pictures)


def examples(rows):
    """The training sequences of these rows."""
    trajectories = []
    for row, images in zip(rows, image_tokens(rows)):
        path = path_trajectory(vlm, row["question"], images, row["box"], row["answer"])
        trajectories.append(path)
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
    batch = examples(run.share(chosen))
    # Divided by the tokens of the whole update, accumulation equals one large batch.
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
run.finish(then="python -m visrl.make_pairs")
