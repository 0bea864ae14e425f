"""Phase 4: step-level DPO on the pairs, in two stages (Section 3.2).

    python -m visrl.dpo --stage 1                 SFT + RL1: boxes alone (Eq. 5 and 6)
    python -m visrl.dpo --stage 2                 SFT + RL1 + RL2: boxes and answers (Eq. 7 to 10)
    python -m visrl.dpo --stage 2 --init sft      RL2 only, the paper's ablation
    python -m visrl.dpo --stage answers           plain DPO on answers without a box (Table 5)
    python -m visrl.dpo --stage answers --loss sft    the same on chosen answers alone; or kto

The policy starts from the adapter of the stage before, and the reference is a frozen copy of it:
SFT for stage 1, stage 1 for stage 2. In stage 2 each answer is conditioned on its own crop, and the
two steps have a loss each (visrl/loop.py, `dpo_loss`). Plain DPO starts from the bare base, with
the bare question. In iteration 2 stage 1 starts from stage 2 of iteration 1, and so on. A stage
trains the adapter of the stage before on, where the authors merge it and begin a new one.

The contexts of the two answers of a pair differ by their crops, so that the partition functions of
DPO's derivation do not cancel in stage 2: its answer loss (Eq. 7) is an analogy to it.

One departure from the paper's text: `--nll` adds the chosen path's own loss (in the toy preset; the
paper's is 0), without which the toy unlearns to write boxes. Where the paper is silent: the
authors' rates, AdamW without weight decay, gradients clipped to norm 1. The toy preset has its own
rate, epochs and batch.

Reads data/train.jsonl, data/pairs.jsonl and an adapter. Writes rl1/, rl2/, rl2_only/ or plain_dpo/,
plain_sft/, plain_kto/ (PEFT adapters; from iteration 2 on with its number), log/<name>.jsonl,
<name>.checkpoint.
"""

from common import trajectory_logprobs
from support.data.samples import VISRL_FIELDS, load_image, read_side, with_samples
from support.model import adapters, loading, memory
from support.run import Run
from support.running.errors import stop
from support.running.flags import Flag, command
from visrl import loop

import torch

run = Run(
    "visrl.dpo",
    __doc__,
    stage=Flag("1: boxes; 2: boxes and answers; answers: plain DPO", "1", ("1", "2", "answers")),
    init=Flag("where --stage 2 starts: stage 1, or SFT (RL2 only)", "rl1", ("rl1", "sft")),
    loss=Flag("of --stage answers (Table 5)", "dpo", ("dpo", "sft", "kto")),
)
args, data = run.args, run.data
crop = loop.LOOPS[args.crop].feedback
steps = 2 if args.stage == "2" else 1  # K
before = loop.actor(args.iteration)
name, origin = {
    ("1", "rl1"): ("rl1", before),
    ("2", "rl1"): ("rl2", loop.named("rl1", args.iteration)),
    ("2", "sft"): ("rl2_only", before),
    ("answers", "rl1"): (f"plain_{args.loss}", None),
}.get((args.stage, args.init)) or stop("--init sft is for --stage 2; leave it out")
if args.loss != "dpo" and args.stage != "answers":
    stop(f"--loss {args.loss} is for --stage answers; leave it out")
run.name = loop.named(name, args.iteration)

# Data: the pairs of phase 3, each with its sample -------------------------------------------------
train = read_side(args, "train", "python -m visrl.make_data", VISRL_FIELDS)
file = data / f"{loop.named('pairs', args.iteration)}.jsonl"
make_pairs = command(args, f"python -m visrl.make_pairs --iteration {args.iteration}")
pairs = with_samples(file, train, make_pairs, loop.is_pair)
if not pairs:
    stop(f"{file} has no pair of a sample in train.jsonl; run {make_pairs}")
run.agrees(loop.named("paths", args.iteration), "crop")
folder = origin and run.starts_from(origin, loop.made_by(origin), "crop")
run.reads(file)

# Model and optimizer ------------------------------------------------------------------------------
vlm = loading.load_vlm(args)
adapters.policy_and_reference(vlm, folder, adapters.lora_size(args.preset, "visrl.sft"))
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)


def pictures(pair):
    """The whole image, the crop of the chosen box, and that of the rejected one."""
    image = load_image(pair, data)
    return [image, *(crop(image, pair[side]["box"]) for side in ("chosen", "rejected"))]


image_tokens = memory.image_token_source(vlm, pictures)


def examples(pairs):
    """The training sequences of these pairs: chosen and rejected, pair after pair."""
    trajectories = []
    for pair, (image, *crops) in zip(pairs, image_tokens(pairs)):
        question = pair["question"]
        for part, path in zip(crops, (pair["chosen"], pair["rejected"])):
            if args.stage == "answers":
                trajectory = loop.answer_trajectory(vlm, question, image, path["answer"])
            else:
                answer = path["answer"] if steps == 2 else None
                trajectory = loop.path_trajectory(vlm, question, [image, part], path["box"], answer)
            trajectories.append(trajectory)
    return trajectories


@torch.no_grad()
def drift(pairs):
    """KTO's z_0, []: the KL of policy and reference, estimated at answers to other questions of the
    batch (of a single pair: at its own)."""
    others = pairs[1:] + pairs[:1]
    batch = examples(
        [{**a, "chosen": b["chosen"], "rejected": b["rejected"]} for a, b in zip(pairs, others)]
    )
    with adapters.using(vlm, "reference"):
        reference = loop.step_logprobs(trajectory_logprobs(vlm, batch), len(batch), 1)
    policy = loop.step_logprobs(trajectory_logprobs(vlm, batch), len(batch), 1)
    return (policy - reference).mean().clamp(min=0)


def accumulate(size, pairs, count):
    """Adds up the gradients of an update, of `size` pairs at a time. Each pair weighs the same:
    divided by `count`, those of the whole update, accumulation equals one large batch, but for
    KTO's `drift`, which is estimated from each part.

    Returns of each pair: loss, right, a margin for each step, KL, loss of the chosen path.
    """
    facts = []
    for i in range(0, len(pairs), size):
        part = pairs[i : i + size]
        run.at_work(part)
        batch = examples(part)
        # The reference's log-probabilities need no gradient
        with torch.no_grad(), adapters.using(vlm, "reference"):
            reference = trajectory_logprobs(vlm, batch)
        policy = trajectory_logprobs(vlm, batch)
        sums = [loop.step_logprobs(scores, len(batch), steps) for scores in (policy, reference)]
        losses, margins = loop.dpo_loss(*sums, args.beta)  # [N, K], [N, K], of [2N, K] twice
        if args.loss == "kto":
            losses = loop.kto_loss(*sums, drift(part), args.beta)  # [N, 1]
        losses = losses.mean(1)  # [N]: Eq. 8, both steps weigh one half
        # Both log pi may fall, the rejected one's faster, until no box is written at all; this term
        # holds the chosen one's up (as in arXiv:2404.19733, Section 2.2)
        nll = loop.chosen_nll(policy, len(part))  # [N]
        losses, weight = (nll, 0.0) if args.loss == "sft" else (losses, args.nll)
        ((losses + weight * nll).sum() / count).backward()
        # As GRPO's: mean |log pi - log ref| over the tokens of the pairs
        kl = (policy.logprob - reference.logprob).abs().mean()
        for loss, margin, own in zip(losses.tolist(), margins.tolist(), nll.tolist()):
            facts.append([loss, float(sum(margin) > 0), *margin, kl.item(), own])
    return facts


# Training -----------------------------------------------------------------------------------------
memory.try_largest(vlm, pairs, examples, args, kept=1)
for chosen in run.epochs(pairs, vlm, optimizer):
    facts = memory.fitting(vlm, args, accumulate, run.share(chosen), len(chosen))
    run.sum_gradients(parameters)
    facts = torch.tensor(run.gather(facts))  # [pairs of the update, 4 + K]
    loss, accuracy, *margin, kl, nll = facts.mean(0).tolist()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.check(loss, norm, chosen)
    rate = run.set_rate(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    margin = [round(m, 6) for m in margin]
    row = dict(loss=loss, accuracy=accuracy, margin=margin, kl=kl, nll=nll, grad_norm=norm, lr=rate)
    run.log(epoch=run.epoch, **row)

adapters.save_adapter(vlm, run.adapter)
run.finish(then="python -m visrl.evaluate")
