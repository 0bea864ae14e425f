"""Phase 1: SFT warm-up on the correction trajectories of phase 0 (Section 3.2).

    python make_data.py && python sft.py

Each example is one token sequence: prompt, step 0, overlay + corrective instruction, step 1, overlay + corrective
instruction, step 2. Cross-entropy on the reasoning and the boxes alone; the prompt, the image tokens and the injected
instructions are context. LoRA on the attention and MLP projections of the language model; everything else is frozen, so
the image tokens are constants.

No departure from the paper's recipe by default; `--first-step right` is one. The toy preset has its own learning rate, epochs and batch (common.py, PRESETS).

Reads data/train.jsonl, data/sft.jsonl. Writes sft/ (a PEFT adapter), log/sft.jsonl, sft.checkpoint under --out.
"""

import math
import random
import time

import torch
from tqdm import tqdm

from common import IVT_PROMPT, build_trajectory, encode_images, step_text, trajectory_logprobs, views
from runtime import (RANK, Log, adapter_state, begin, catch_interrupts, divides, flags, gather, interrupted, leave_if_interrupted,
                     load_checkpoint, load_image, load_vlm, memory_for, minutes, new_adapter, probe, read_jsonl, read_samples,
                     restore_adapter, save_adapter, save_checkpoint, seed_all, share, stop, sum_gradients)

args = flags("sft", __doc__)
divides(args.grad_accum, "--grad-accum")
start, data = time.time(), args.out / "data"
seed_all(args.seed)

# ------------------------------------------------------------------------------------------------------------------
# Data: the sample and the trajectory of each id
# ------------------------------------------------------------------------------------------------------------------
samples = {s["id"]: s for s in read_samples(data / "train.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad)}
rows = read_jsonl(data / "sft.jsonl", f"python make_data.py --preset {args.preset}")
rows = [row for row in rows if row["id"] in samples]
begin(args, "sft", data / "train.jsonl", data / "sft.jsonl")
if len(rows[0]["boxes"]) != args.steps + 1:
    stop(f"{data / 'sft.jsonl'} holds {len(rows[0]['boxes'])} boxes a trajectory; run make_data.py with --steps {args.steps}")
per_update = args.batch_size * args.grad_accum
updates_per_epoch = math.ceil(len(rows) / per_update)
updates = updates_per_epoch * args.epochs
checkpoint, first_update, logged = args.out / "sft.checkpoint", 0, 0
state = load_checkpoint(checkpoint, args.restart)
if state and state["update"] >= updates:
    print(f"{args.out / 'sft'} is finished; --restart begins again")
    raise SystemExit

# ------------------------------------------------------------------------------------------------------------------
# Model and optimizer
# ------------------------------------------------------------------------------------------------------------------
vlm = load_vlm(args)
new_adapter(vlm, args.lora_rank, args.lora_alpha)
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
print(f"{len(rows)} trajectories, {updates} updates of {per_update}, "
      f"{sum(p.numel() for p in parameters):,} LoRA parameters")


def learning_rate(update):
    """Linear warm-up over the first share of the updates, then a cosine to zero."""
    warm = max(1, round(args.warmup * updates))
    if update < warm:
        return args.lr * (update + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


built = {}  # trajectories with their image tokens, which are constants of the run


def example(row):
    """The training sequence of one trajectory: step t sees the overlay of box t - 1, as at inference."""
    if row["id"] in built:
        return built[row["id"]]
    image = load_image(samples[row["id"]], data)
    seen = encode_images(vlm, views(image, row["boxes"]))
    texts = [step_text(trace, box) for trace, box in zip(row["traces"], row["boxes"])]
    out = build_trajectory(vlm, IVT_PROMPT.format(expression=row["expression"]), seen, texts)
    if args.first_step == "right" and row["iou"] < 0.5:  # the mistake stays in the context, to be corrected, and is not learnt
        learnt = out.step.index(1)
        out.predictor, out.target, out.step = out.predictor[learnt:], out.target[learnt:], out.step[learnt:]
    size = sum(part.nbytes for view in seen for part in (view.embeds, *view.deepstack))
    if vlm.base.device.type == "cpu" and (len(built) + 1) * size <= 2 ** 30:  # a gigabyte is kept; a GPU's memory is dearer than its time
        built[row["id"]] = out
    return out


# ------------------------------------------------------------------------------------------------------------------
# Resume
# ------------------------------------------------------------------------------------------------------------------
if state:
    restore_adapter(vlm.model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    first_update, logged = state["update"], state["logged"]
    print(f"going on after update {first_update}")
log = Log(args.out / "log/sft.jsonl", keep=logged)

# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------
advice = "--max-pixels or --batch-size (and raise --grad-accum as much)"
largest = max(rows, key=lambda row: (samples[row["id"]]["width"] * samples[row["id"]]["height"], len(str(row))))
probe(vlm, [example(largest)] * args.batch_size, [samples[largest["id"]]], advice)
catch_interrupts()
bar = tqdm(total=updates, initial=first_update, desc="sft", unit="update", disable=RANK > 0)
for update in range(first_update, updates):
    epoch, number = divmod(update, updates_per_epoch)
    order = random.Random(f"{args.seed} {epoch}").sample(range(len(rows)), len(rows))
    chosen = [rows[i] for i in order[number * per_update:(number + 1) * per_update]]
    mine = share(chosen)
    batch = [example(row) for row in mine]

    # Every generated token of the update weighs the same, whichever micro-batch or process it is in: divided by the
    # tokens of the whole update, accumulation equals one large batch.
    tokens, loss = sum(gather([sum(len(t.target) for t in batch)])), 0.0
    for i in range(0, len(batch), args.batch_size):
        with memory_for([samples[row["id"]] for row in mine[i:i + args.batch_size]], advice):
            micro = -trajectory_logprobs(vlm, batch[i:i + args.batch_size])[0].sum() / tokens  # of [M] log-probabilities
            micro.backward()
        loss += micro.item()
    sum_gradients(parameters)
    loss = sum(gather([loss]))
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(loss + norm):
        stop(f"update {update}: loss {loss}, gradient norm {norm}; samples {[row['id'] for row in chosen]}; "
             "lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(update)
    optimizer.step()
    optimizer.zero_grad()

    log.write(update=update + 1, epoch=epoch + 1, loss=loss, grad_norm=norm, lr=learning_rate(update), tokens=tokens)
    bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", refresh=False)
    bar.update()
    if update + 1 == updates:
        save_adapter(vlm, args.out / "sft")  # before the checkpoint that says all is done
    if (update + 1) % args.save_every == 0 or update + 1 == updates or interrupted():
        save_checkpoint(checkpoint, adapter=adapter_state(vlm.model), optimizer=optimizer.state_dict(), update=update + 1,
                        logged=log.rows)
        leave_if_interrupted()
bar.close()

print(f"loss {loss:.3f}; adapter in {args.out / 'sft'}, {minutes(start)}; next: python grpo.py")
