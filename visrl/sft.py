"""Phase 2: the supervised start, so that boxes are well-formed (Section 3.1, first paragraph).

    python -m visrl.make_data && python -m visrl.sft

Each example is one token sequence: question, true box, its crop, true answer. Cross-entropy on the
box and the answer alone; the question, the image tokens and what is injected are context. LoRA on
the language model; everything else is frozen. This is the only phase that learns from boxes: few
samples (30k of Visual CoT's 438k), since only the form of the answer is to be learnt.

No departure from the authors' recipe but the loop's own (visrl/loop.py); the toy preset has its own
rate, rank and batch (support/running/presets.py).

Reads data/sft.jsonl. Writes sft/ (a PEFT adapter), log/sft.jsonl, sft.checkpoint under --out.
"""

import math
import time

from common import feedback_pictures, normalize_box, trajectory_logprobs
from support import run
from support.data import samples
from support.model import adapters, checkpoints, loading, memory
from support.running import errors, files, processes
from support.running.flags import command, flags
from visrl.loop import LOOPS, path_trajectory
from visrl.sources import BOXED

import torch

args = flags("visrl.sft", __doc__)
processes.divides(args.grad_accum, "--grad-accum")
processes.seed_all(args.seed)
start = time.time()
data = args.out / "data"
loop = LOOPS[args.crop]

# Data ---------------------------------------------------------------------------------------------
make_data = command(args, "python -m visrl.make_data")
rows = samples.read_samples(data / "sft.jsonl", make_data, args.skip_bad, BOXED)
for row in rows:
    row["box"] = normalize_box(row["bbox"], row["width"], row["height"])
# Rounding down to thousandths may leave a tiny true box without an area
rows = [row for row in rows if row["box"][0] < row["box"][2] and row["box"][1] < row["box"][3]]
if not rows:
    errors.stop(f"{data / 'sft.jsonl'} has no box of a thousandth of its image; {make_data}")
per_update = args.batch_size * args.grad_accum
updates_per_epoch = math.ceil(len(rows) / per_update)
updates = updates_per_epoch * args.epochs
files.begin(args, "sft", data / "sft.jsonl")
checkpoints.leave_if_finished(args, "sft")

# Model and optimizer ------------------------------------------------------------------------------
vlm = loading.load_vlm(args)
adapters.new_adapter(vlm, args.lora_rank, args.lora_alpha)
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
count = sum(p.numel() for p in parameters)
print(f"{len(rows)} samples, {updates} updates of {per_update}, {count:,} LoRA parameters")


def pictures(row):
    """What the model sees: the whole image, and the crop of the true box."""
    return feedback_pictures(samples.load_image(row, data), [row["box"], None], loop)


image_tokens = memory.image_token_source(vlm, pictures)


def examples(rows):
    """The training sequences of these rows."""
    trajectories = []
    for row, images in zip(rows, image_tokens(rows)):
        path = path_trajectory(vlm, row["question"], images, row["box"], row["answer"])
        trajectories.append(path)
    return trajectories


# Resume, and the largest batch of the run before any work -----------------------------------------
log, first_update, _ = checkpoints.resume(args, "sft", vlm, optimizer)
errors.explain_out_of_memory("--max-pixels or --batch-size (and raise --grad-accum as much)")
memory.probe_sft(vlm, rows, {row["id"]: row for row in rows}, examples, args)
processes.catch_interrupts()

# Training -----------------------------------------------------------------------------------------
bar = run.progress("sft", updates, first_update)
for update in range(first_update, updates):
    # Batch ----------------------------------------------------------------------------------------
    epoch, number = divmod(update, updates_per_epoch)
    shuffled = run.shuffled(rows, args.seed, epoch)
    chosen = shuffled[number * per_update : (number + 1) * per_update]
    mine = processes.share(chosen)
    errors.working_on(mine)
    batch = examples(mine)

    # Update ---------------------------------------------------------------------------------------
    # Divided by the tokens of the whole update, accumulation equals one large batch.
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
make_pairs = command(args, "python -m visrl.make_pairs")
print(f"{result}, {processes.minutes(start)}; next: {make_pairs}")
