"""Phase 2: GRPO on whole trajectories (Sections 3.3 and 3.4).

    python sft.py && python grpo.py     trains SFT + GRPO + IVT
    python grpo.py --steps 0            the single-step control of Table 1
    python grpo.py --init base          GRPO without SFT (Section 4.2, "SFT is the key enabler")

Each update: 8 prompts, N = 6 trajectories each, sampled at temperature 1.0 (step 0) and 0.7
(refinement); the reward is the final box's IoU + 0.1 * the share of valid steps; the advantage is
the reward against its group; one gradient step. The reference of the KL term is a second, frozen
copy of the adapter that training started from, never the bare base model.

No departure from the paper's recipe. Where the paper is silent: log-probabilities are taken at
temperature 1; AdamW at a constant rate, gradients clipped to norm 1; validation is greedy; the
loss is a mean over all tokens of the update, so that a longer trajectory weighs more. "Gradient
accumulation over 8 steps" is read as 8 prompts per update; there are 300 updates, and the adapter
that does best on 64 of the validation samples is the result.

Reads data/{train,val}.jsonl, sft/. Writes grpo/ (grpo_single/ for --steps 0, base_grpo/ for --init
base): a PEFT adapter, the best by validation reward; log/<name>.jsonl, <name>.checkpoint and, at
each validation, log/validation/<name>_<update>.jsonl and report.html (to look at while it trains)
under --out.
"""

import time

from common import advantages, grpo_loss, reward, trajectory_logprobs
from support import run
from support.data import samples
from support.model import adapters, checkpoints, loading, memory
from support.model.decoding import rollouts
from support.model.views import loop_of
from support.report import health, page
from support.running import errors, files, processes
from support.running.flags import Flag, command, flags

import torch

args = flags(
    "grpo",
    __doc__,
    init=Flag("start from the SFT adapter or from the base model", "sft", ("sft", "base")),
)
loop = loop_of(args)
processes.divides(args.grad_accum, "--grad-accum")
processes.seed_all(args.seed)
start = time.time()
data = args.out / "data"
name = "grpo" if args.steps > 0 else "grpo_single"
if args.init == "base":
    name = f"base_{name}"

# Data ---------------------------------------------------------------------------------------------
make_data = command(args, "python make_data.py")
train = samples.read_samples(data / "train.jsonl", make_data, args.skip_bad)
val = samples.read_samples(data / "val.jsonl", make_data, args.skip_bad)[: args.val_prompts]
inputs = [data / "train.jsonl", data / "val.jsonl"]
if args.init == "sft":
    files.agrees(args, "sft", "feedback")
    inputs.append(adapters.adapter_file(args.out / "sft", command(args, "python sft.py")))
files.begin(args, name, *inputs, ignore=("batch_size", "prompts_at_once"))
checkpoints.leave_if_finished(args, name)

# Model and optimizer ------------------------------------------------------------------------------
# Two adapters begin as the same one, the policy (trained) and the reference (frozen); without SFT
# they are new ones, which change nothing until they are trained.
vlm = loading.load_vlm(args)
for adapter in ("policy", "reference"):
    if args.init == "sft":
        adapters.add_adapter(vlm, args.out / "sft", adapter)
    else:
        adapters.new_adapter(vlm, *adapters.lora_size(args.preset), adapter)
vlm.model.set_adapter("policy")  # in PEFT the active adapter is also the one that takes gradients
parameters = [p for p in vlm.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
roll = rollouts(args, vlm)


def sample_trajectories(prompts, group_size=1, temperatures=(0.0, 0.0), first=0):
    """Trajectories of the current policy, `group_size` for each prompt, a few prompts at a time.

    first: the number of the first prompt in the run, which seeds what is sampled (not greedy).
    """
    trajectories = []
    # Validation decodes as many trajectories together as a rollout does
    at_once = args.prompts_at_once * args.group_size // group_size
    for i in range(0, len(prompts), at_once):
        part = prompts[i : i + at_once]
        errors.working_on(part)
        trajectories += roll(
            vlm,
            [samples.load_image(sample, data) for sample in part],
            [sample["expression"] for sample in part],
            args.steps,
            max_tokens=args.max_tokens,
            loop=loop,
            group_size=group_size,
            temperatures=temperatures,
            seeds=[args.seed * 1_000_003 + first + i + j for j in range(len(part))],
        )
    return trajectories


# Resume, and the largest batch of the run before any work -----------------------------------------
log, first_update, best = checkpoints.resume(args, name, vlm, optimizer)
errors.explain_out_of_memory("--max-pixels, --batch-size, --prompts-at-once or --max-tokens")
memory.probe_grpo(vlm, train, args, data, loop)
processes.catch_interrupts()

# Training -----------------------------------------------------------------------------------------
# Validation comes before updates 0, val_every, ... and after the last one.
val_reward = best[0]
recent = []
warned = set()
bar = run.progress(name, args.updates, first_update)
for update in range(first_update, args.updates + 1):
    # Validation -----------------------------------------------------------------------------------
    # The mean greedy reward; the best adapter so far is the result of the run.
    if update % args.val_every == 0 or update == args.updates:
        mine = processes.share(val)
        trajectories = sample_trajectories(mine)
        rewards = processes.gather([reward(t.boxes, s) for t, s in zip(trajectories, mine)])
        val_reward = sum(rewards) / len(rewards)
        val_iou = health.step_ious(trajectories, mine)
        log.write(update=update, val_reward=val_reward, val_iou=val_iou)
        page.write_validation(args, name, update, mine, trajectories, vlm.tokenizer)
        if val_reward > best[0]:
            best = val_reward, update
            adapters.save_adapter(vlm, args.out / name, "policy")
        del trajectories  # a rollout needs the room of their image tokens
    if update == args.updates:
        break

    # Rollout --------------------------------------------------------------------------------------
    # N trajectories for each of this process's prompts. A group stays on one process, so that its
    # advantages need nothing from the others.
    prompts = []
    for i in range(update * args.grad_accum, (update + 1) * args.grad_accum):
        epoch, number = divmod(i, len(train))
        prompts.append(run.shuffled(train, args.seed, epoch)[number])
    mine = processes.share(prompts)
    first = update * args.grad_accum + processes.RANK * len(mine)
    temperatures = (args.temperature_first, args.temperature)
    trajectories = sample_trajectories(mine, args.group_size, temperatures, first)
    owners = [sample for sample in mine for _ in range(args.group_size)]

    # Reward ---------------------------------------------------------------------------------------
    # Of the final box, so that what the steps before it are worth is for the policy to find out.
    rewards = torch.tensor([reward(t.boxes, s) for t, s in zip(trajectories, owners)])  # [P * N]
    rewards = rewards.view(-1, args.group_size)  # [P, N]

    # Advantage ------------------------------------------------------------------------------------
    # Against the trajectory's own group: the other answers to a prompt are its baseline (Eq. 1).
    advantage = advantages(rewards).flatten()  # [P * N]

    # Update ---------------------------------------------------------------------------------------
    # One gradient step. Each term is divided by the tokens of the whole update, whichever
    # micro-batch or process they are in, so that accumulation equals one large batch.
    tokens = sum(processes.gather([sum(len(t.target) for t in trajectories)]))
    gaps = []  # |log pi as sampled - log pi here| of each token: rounding, or something is wrong
    terms = torch.zeros(4)  # loss, policy, KL, entropy: means over the tokens of the update
    for i in range(0, len(trajectories), args.batch_size):
        batch = trajectories[i : i + args.batch_size]
        errors.working_on(owners[i : i + args.batch_size])
        with torch.no_grad(), adapters.using(vlm, "reference"):
            reference = trajectory_logprobs(vlm, batch)
        policy = trajectory_logprobs(vlm, batch)
        token_advantage = advantage[i : i + args.batch_size].to(policy.row.device)[policy.row]
        loss, *parts = grpo_loss(  # Eq. 2, sums over the tokens of the micro-batch
            policy.logprob,  # [M]
            reference.logprob,  # [M]
            token_advantage,  # [M], that of the token's trajectory
            policy.entropy,  # [M]
            beta=args.beta,
            entropy_weight=args.entropy,
            kl=args.kl,
        )
        (loss / tokens).backward()
        gaps += health.sampler_gaps(batch, policy.logprob)
        terms += torch.stack([loss, *parts]).detach().cpu() / tokens  # [4]
    processes.sum_gradients(parameters)
    terms = torch.tensor(processes.gather([terms.tolist()])).sum(0)  # [processes, 4] -> [4]
    loss, policy_term, kl, entropy = terms.tolist()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    run.stop_unless_finite(update + 1, loss, norm, prompts)
    optimizer.step()
    optimizer.zero_grad()

    # Log ------------------------------------------------------------------------------------------
    row = health.rollout_facts(rewards, trajectories, owners, gaps)
    row |= dict(loss=loss, policy=policy_term, kl=kl, entropy=entropy, grad_norm=norm)
    log.write(update=update + 1, **row)
    recent.append(row)
    for sentence in health.unhealthy(recent, warned):
        bar.write(sentence)
    numbers = dict(reward=f"{row['reward']:.3f}", val=f"{val_reward:.3f}", kl=f"{kl:.3f}")
    bar.set_postfix(numbers, refresh=False)
    bar.update()
    checkpoints.save_if_due(args, name, vlm, optimizer, log, update=update + 1, best=best)
bar.close()
done = dict(update=args.updates, finished=True, best=best)
checkpoints.save_progress(args, name, vlm, optimizer, log, **done)
result = "best validation reward {:.3f}, of update {}; adapter in {}".format(*best, args.out / name)
print(f"{result}, {processes.minutes(start)}; next: {command(args, 'python evaluate.py')}")
