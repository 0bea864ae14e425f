"""Phase 4: step-level DPO on the pairs, in two stages (Section 3.2).

    python -m visrl.dpo --stage 1                 SFT + RL1: boxes alone (Eq. 5 and 6)
    python -m visrl.dpo --stage 2                 SFT + RL1 + RL2: boxes and answers (Eq. 7 to 10)
    python -m visrl.dpo --stage 2 --init sft      RL2 only, the paper's ablation
    python -m visrl.dpo --stage answers           plain DPO on answers without a box (Table 5)

The policy starts from the adapter of the stage before, and the reference is a frozen copy of it:
SFT for stage 1, stage 1 for stage 2. In stage 2 each answer is conditioned on its own crop, and the
two steps have a loss each (visrl/loop.py, `dpo_loss`). Plain DPO starts from the bare base, with
the bare question. In iteration 2 stage 1 starts from stage 2 of iteration 1, and so on.

One departure from the paper's text: `--nll` adds the chosen path's own loss (in the toy preset; the
paper's is 0), without which the toy unlearns to write boxes. Where the paper is silent: the
authors' rates, AdamW without weight decay, gradients clipped to norm 1. The toy preset has its own
rate, epochs and batch.

Reads data/train.jsonl, data/pairs.jsonl and an adapter. Writes rl1/, rl2/, rl2_only/ or plain_dpo/
(PEFT adapters; from iteration 2 on with its number), log/<name>.jsonl, <name>.checkpoint.
"""

import math
import time

from common import trajectory_logprobs
from support import run
from support.data import samples
from support.model import adapters, checkpoints, loading, memory
from support.running import errors, files, processes
from support.running.flags import Flag, command, flags
from visrl.loop import (
    LOOPS,
    answer_trajectory,
    chosen_nll,
    dpo_loss,
    named,
    pair_logprobs,
    path_trajectory,
)

import torch

args = flags(
    "visrl.dpo",
    __doc__,
    stage=Flag("1: boxes; 2: boxes and answers; answers: plain DPO", "1", ("1", "2", "answers")),
    init=Flag("where --stage 2 starts: stage 1, or SFT (RL2 only)", "rl1", ("rl1", "sft")),
)
processes.divides(args.grad_accum, "--grad-accum")
processes.seed_all(args.seed)
start = time.time()
data = args.out / "data"
loop = LOOPS[args.crop]
steps = 2 if args.stage == "2" else 1  # K
before = "sft" if args.iteration == 1 else named("rl2", args.iteration - 1)
name, origin = {
    ("1", "rl1"): ("rl1", before),
    ("2", "rl1"): ("rl2", named("rl1", args.iteration)),
    ("2", "sft"): ("rl2_only", before),
    ("answers", "rl1"): ("plain_dpo", None),
}.get((args.stage, args.init)) or errors.stop("--init sft is for --stage 2; leave it out")
name = named(name, args.iteration)

# Data ---------------------------------------------------------------------------------------------
make_data = command(args, "python -m visrl.make_data")
make_pairs = command(args, f"python -m visrl.make_pairs --iteration {args.iteration}")
train = samples.read_samples(data / "train.jsonl", make_data, args.skip_bad, samples.VISRL_FIELDS)
sample_of = {sample["id"]: sample for sample in train}
pairs_file = data / f"{named('pairs', args.iteration)}.jsonl"
pairs = [pair for pair in files.read_jsonl(pairs_file, make_pairs) if pair["id"] in sample_of]
if not pairs:
    errors.stop(f"{pairs_file} has no pair of a sample in train.jsonl; run {make_pairs}")
per_update = args.batch_size * args.grad_accum
updates_per_epoch = math.ceil(len(pairs) / per_update)
updates = updates_per_epoch * args.epochs
inputs = [pairs_file]
files.agrees(args, named("paths", args.iteration), "crop")
if origin:
    files.agrees(args, origin, "crop")
    stage, _, number = origin.removeprefix("rl").partition("_")
    made = f"python -m visrl.dpo --stage {stage} --iteration {number or 1}"
    made = command(args, "python -m visrl.sft" if origin == "sft" else made)
    inputs.append(adapters.adapter_file(args.out / origin, made))
files.begin(args, name, *inputs)
checkpoints.leave_if_finished(args, name)

# Model and optimizer ------------------------------------------------------------------------------
# Two adapters that begin as the same one, the policy (trained) and the reference (frozen)
vlm = loading.load_vlm(args)
for adapter in ("policy", "reference"):
    if origin:
        adapters.add_adapter(vlm, args.out / origin, adapter)
    else:
        adapters.new_adapter(vlm, *adapters.lora_size(args.preset, "visrl.sft"), adapter)
vlm.model.set_adapter("policy")  # in PEFT the active adapter is also the one that takes gradients
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
print(f"{len(pairs)} pairs, {updates} updates of {per_update}; from {origin or 'the base'}")


def pictures(pair):
    """The whole image, the crop of the chosen box, and that of the rejected one."""
    image = samples.load_image(sample_of[pair["id"]], data)
    return [image, *(loop.feedback(image, pair[side]["box"]) for side in ("chosen", "rejected"))]


image_tokens = memory.image_token_source(vlm, pictures)


def examples(pairs):
    """The training sequences of these pairs: chosen and rejected, pair after pair."""
    trajectories = []
    for pair, (image, *crops) in zip(pairs, image_tokens(pairs)):
        question = sample_of[pair["id"]]["question"]
        chosen, rejected = pair["chosen"], pair["rejected"]
        if args.stage == "answers":
            for path in (chosen, rejected):
                trajectories.append(answer_trajectory(vlm, question, image, path["answer"]))
            continue
        rows = [(crops[0], chosen["box"], chosen["answer"])]
        rows.append((crops[1], rejected["box"], rejected["answer"]))
        if args.stage == "2" and args.condition == "chosen":
            rows[1] = (crops[1], rejected["box"], None)
            rows.append((crops[0], chosen["box"], rejected["answer"]))
        for picture, box, answer in rows:
            answer = answer if args.stage == "2" else None
            trajectories.append(path_trajectory(vlm, question, [image, picture], box, answer))
    return trajectories


def largest(pair):
    """By size of the image, then by length of the texts."""
    return memory.image_token_count(vlm, sample_of[pair["id"]]), len(str(pair))


# Resume, and the largest batch of the run before any work -----------------------------------------
log, first_update, _ = checkpoints.resume(args, name, vlm, optimizer)
errors.explain_out_of_memory("--max-pixels or --batch-size (and raise --grad-accum as much)")
pair = max(pairs, key=largest)
memory.probe(vlm, examples([pair] * args.batch_size), sample_of[pair["id"]])
processes.catch_interrupts()

# Training -----------------------------------------------------------------------------------------
bar = run.progress(name, updates, first_update)
for update in range(first_update, updates):
    # Batch ----------------------------------------------------------------------------------------
    epoch, number = divmod(update, updates_per_epoch)
    shuffled = run.shuffled(pairs, args.seed, epoch)
    whole = shuffled[number * per_update : (number + 1) * per_update]
    mine = processes.share(whole)

    # Update ---------------------------------------------------------------------------------------
    # Each pair weighs the same: divided by those of the whole update, accumulation equals one large
    # batch. The reference's log-probabilities need no gradient.
    facts = []  # of each pair: loss, right, a margin for each step, KL, loss of the chosen path
    for i in range(0, len(mine), args.batch_size):
        part = mine[i : i + args.batch_size]
        errors.working_on([sample_of[pair["id"]] for pair in part])
        batch = examples(part)
        with torch.no_grad(), adapters.using(vlm, "reference"):
            reference = trajectory_logprobs(vlm, batch)
        policy = trajectory_logprobs(vlm, batch)
        losses, margins = dpo_loss(  # [N, K], [N, K]
            pair_logprobs(policy, len(part), steps),  # [N, 2, K]
            pair_logprobs(reference, len(part), steps),  # [N, 2, K]
            args.beta,
        )
        losses = losses.mean(1)  # [N]: Eq. 8, both steps weigh one half
        # Both log pi may fall, the rejected one's faster, until no box is written at all; this term
        # holds the chosen one's up (as in arXiv:2404.19733, Section 2.2)
        nll = chosen_nll(policy, len(part))  # [N]
        ((losses + args.nll * nll).sum() / len(whole)).backward()
        # As GRPO's: mean |log pi - log ref| over the tokens of the pairs
        kl = (policy.logprob - reference.logprob).abs().mean()
        for loss, margin, own in zip(losses.tolist(), margins.tolist(), nll.tolist()):
            facts.append([loss, float(sum(margin) > 0), *margin, kl.item(), own])
    processes.sum_gradients(parameters)
    facts = torch.tensor(processes.gather(facts))  # [pairs of the update, 4 + K]
    loss, accuracy, *margin, kl, nll = facts.mean(0).tolist()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.stop_unless_finite(update + 1, loss, norm, whole)
    rate = run.learning_rate(args, update, updates)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()

    # Log ------------------------------------------------------------------------------------------
    margin = [round(m, 6) for m in margin]
    row = dict(loss=loss, accuracy=accuracy, margin=margin, kl=kl, nll=nll, grad_norm=norm, lr=rate)
    log.write(update=update + 1, epoch=epoch + 1, **row)
    numbers = dict(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", kl=f"{kl:.3f}")
    bar.set_postfix(numbers, refresh=False)
    bar.update()
    checkpoints.save_if_due(args, name, vlm, optimizer, log, update=update + 1, last=updates)
bar.close()
result = f"loss {loss:.3f}, accuracy {accuracy:.2f}; adapter in {args.out / name}"
evaluate = command(args, "python -m visrl.evaluate")
print(f"{result}, {processes.minutes(start)}; next: stage 2, or {evaluate}")
