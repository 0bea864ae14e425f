"""Phase 2: GRPO on whole trajectories (Sections 3.3 and 3.4).

    python sft.py && python grpo.py     trains SFT + GRPO + IVT
    python grpo.py --steps 0            the single-step control of Table 1
    python grpo.py --init base          GRPO without SFT (Section 4.2, "SFT is the key enabler")

Each update: 8 prompts, N = 6 trajectories each, sampled at temperature 1.0 (step 0) and 0.7
(refinement); the reward is the final box's IoU + 0.1 * the share of valid steps; the advantage is
the reward against its group; one gradient step. The reference of the KL term is a second, frozen
copy of the adapter that training started from, never the bare base model.

Where the paper is silent: log-probabilities are taken at temperature 1; nothing cuts what is
sampled, as the checkpoint's own top_p and top_k would; AdamW at a constant rate, gradients clipped
to norm 1; the loss is a mean over all tokens of the update, so that a longer trajectory weighs
more; "gradient accumulation over 8 steps" is 8 prompts per update. The result is the adapter with
the best reward on the first --val-prompts validation samples, sampled like the rollouts, the one
that it started from included. The single-step control is a training of its own; the paper's figures
fit the loop's policy, stopped at step 0, as well. The toy has its own rate, prompts and weights.

Reads data/{train,val}.jsonl, sft/. Writes grpo/ (grpo_single/ for --steps 0, base_grpo/ for --init
base): a PEFT adapter, the best by validation reward; log/<name>.jsonl, <name>.checkpoint and, at
each validation, report.html (to look at while it trains) under --out.
"""

from common import advantages, grpo_loss, reward, trajectory_logprobs
from support.data.samples import read_side
from support.model import adapters, loading, memory
from support.model.decoding import roll_in_parts, rollouts
from support.model.views import loop_of
from support.report import health, page
from support.run import Run
from support.running.flags import Flag
from support.running.processes import RANK

import torch

init = Flag("start from the SFT adapter or from the base model", "sft", ("sft", "base"))
run = Run("grpo", __doc__, init=init)
args, data = run.args, run.data
loop = loop_of(args)
run.name = "grpo" if args.steps > 0 else "grpo_single"
if args.init == "base":
    run.name = f"base_{run.name}"

# Data ---------------------------------------------------------------------------------------------
train = read_side(args, "train")
val = read_side(args, "val")[: args.val_prompts]
origin = None
if args.init == "sft":
    origin = run.starts_from("sft", "python sft.py", "feedback", "surroundings")
run.reads(data / "train.jsonl", data / "val.jsonl", ignore=("batch_size", "prompts_at_once"))

# Model and optimizer ------------------------------------------------------------------------------
# Two adapters begin as the same one, the policy (trained) and the reference (frozen); without SFT
# they are new ones, which change nothing until they are trained.
vlm = loading.load_vlm(args)
adapters.policy_and_reference(vlm, origin, adapters.lora_size(args.preset))
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
roll = rollouts(args, vlm)


def sample_trajectories(prompts, first, group_size=1):
    """Trajectories of the current policy, `group_size` for each prompt. first: the number of the
    first prompt in the run, or of the validation, which seeds what is sampled."""
    temperatures = (args.temperature_first, args.temperature)
    options = dict(loop=loop, group_size=group_size, temperatures=temperatures)
    options |= dict(max_tokens=args.max_tokens)
    seeds = [args.seed * 1_000_003 + first + i for i in range(len(prompts))]
    at_once = args.prompts_at_once * args.group_size // group_size
    return roll_in_parts(roll, vlm, prompts, data, at_once, args.steps, seeds=seeds, **options)


def validate(update):
    """The mean reward, before this update; the best adapter so far is the run's result."""
    mine = run.share(val)
    trajectories = sample_trajectories(mine, first=val.index(mine[0]) if mine else 0)
    rewards = run.gather([reward(t.boxes, sample) for t, sample in zip(trajectories, mine)])
    mean = sum(rewards) / len(rewards)
    ious = health.step_ious(trajectories, mine)
    run.log(update=update, val_reward=mean, val_iou=ious, val_rewards=rewards)
    page.write_validation(args, run.name, update, mine, trajectories, vlm.tokenizer)
    if mean > run.best[0]:
        run.best = mean, update
        adapters.save_adapter(vlm, run.adapter)


def accumulate(size, trajectories, owners, advantage, tokens):
    """Adds up the gradients of an update, of `size` trajectories at a time.

    advantage [P * N]. tokens: of the whole update, by which each term is divided, whichever
    micro-batch or process it is in, so that accumulation equals one large batch. Returns loss,
    policy, KL and entropy [4], means over these tokens, and each token's |log pi as sampled - log
    pi here|: rounding, or something is wrong.
    """
    gaps = []
    terms = torch.zeros(4)
    for i in range(0, len(trajectories), size):
        batch = trajectories[i : i + size]
        run.at_work(owners[i : i + size])
        with torch.no_grad(), adapters.using(vlm, "reference"):
            reference = trajectory_logprobs(vlm, batch)
        policy = trajectory_logprobs(vlm, batch)
        loss, *parts = grpo_loss(  # Eq. 2, sums over the tokens of the micro-batch
            policy.logprob,  # [M]
            reference.logprob,  # [M]
            advantage[i : i + size].to(policy.row.device)[policy.row],  # [M], its trajectory's
            policy.entropy,  # [M]
            beta=args.beta,
            entropy_weight=args.entropy,
            kl=args.kl,
        )
        (loss / tokens).backward()
        gaps += health.sampler_gaps(batch, policy.logprob)
        terms += torch.stack([loss, *parts]).detach().cpu() / tokens  # [4]
    return terms, gaps


# Training -----------------------------------------------------------------------------------------
memory.try_largest_rollout(vlm, train, args, data, loop)
for update in run.updates(args.updates, vlm, optimizer):
    if update % args.val_every == 0:
        validate(update)

    # Rollout --------------------------------------------------------------------------------------
    # N trajectories for each of this process's prompts. A group stays on one process, so that its
    # advantages need nothing from the others.
    prompts = run.stream(train, args.grad_accum)
    mine = run.share(prompts)
    first = update * args.grad_accum + RANK * len(mine)
    trajectories = sample_trajectories(mine, first, args.group_size)
    owners = [sample for sample in mine for _ in range(args.group_size)]

    # Reward ---------------------------------------------------------------------------------------
    # Of the final box, so that what the steps before it are worth is for the policy to find out.
    rewards = torch.tensor([reward(t.boxes, s) for t, s in zip(trajectories, owners)])  # [P * N]
    rewards = rewards.view(-1, args.group_size)  # [P, N]

    # Advantage ------------------------------------------------------------------------------------
    # Against the trajectory's own group: the other answers to a prompt are its baseline (Eq. 1).
    advantage = advantages(rewards).flatten()  # [P * N]

    # Update ---------------------------------------------------------------------------------------
    # One gradient step, over all tokens that the policy wrote.
    tokens = run.total(sum(len(t.target) for t in trajectories))
    terms, gaps = memory.fitting(vlm, args, accumulate, trajectories, owners, advantage, tokens)
    run.sum_gradients(parameters)
    loss, policy_term, kl, entropy = run.total(terms).tolist()  # [4], of all processes
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.check(loss, norm, prompts)
    optimizer.step()
    optimizer.zero_grad()
    row = health.rollout_facts(rewards, trajectories, owners, gaps)
    row |= dict(loss=loss, policy=policy_term, kl=kl, entropy=entropy, grad_norm=norm)
    run.log(**row)
    health.warn(run)

validate(args.updates)
health.show_gain(run)
run.finish(then="python grpo.py --steps 0" if run.name == "grpo" else "python evaluate.py")
