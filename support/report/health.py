"""The health of GRPO: what its log has of a batch of rollouts, and when to warn."""

from common import box_iou
from support.report.statistics import estimate, signed
from support.running.processes import gather

import torch

# Metrics that are watched, as means over the last updates: the healthy range (rules of thumb, ours)
# and what to try outside it
HEALTHY = {
    "kl": (0, 0.5, "the policy runs from its reference; lower --lr or raise --beta"),
    "entropy": (0.01, 3, "low: groups stop differing, raise --entropy; high: lower --lr"),
    "no_signal": (0, 0.7, "equal rewards teach nothing; raise --temperature or --group-size"),
    "sampler_gap": (0, 0.05, "what samples is not what is trained; try --engine plain, --dtype"),
    "valid": (0.9, 1, "boxes are lost; lower --lr, raise --max-tokens if steps end unfinished"),
}
LAST_UPDATES = 10
FEWEST_UPDATES = 5  # before these a mean says little


def warn(run):
    """Says which metrics' means over the last updates of a Run have left their range; each once."""
    recent = [row for row in run.rows if "kl" in row][-LAST_UPDATES:]
    if len(recent) < FEWEST_UPDATES:
        return
    for key, (low, high, advice) in HEALTHY.items():
        mean = sum(row[key] for row in recent) / len(recent)
        if key not in run.warned and not low <= mean <= high:
            run.warned.add(key)
            run.bar.write(f"warning: {key} is {mean:.3f} (healthy: {low} to {high}): {advice}")


def step_ious(trajectories, owners):
    """The mean IoU of each step, T + 1 floats, over the trajectories of all processes: whether
    refining helps, which the reward does not see (Section 3.4). owners: the sample of each one."""
    ious = [[box_iou(box, s) for box in t.boxes] for t, s in zip(trajectories, owners)]
    return [round(v, 4) for v in torch.tensor(gather(ious)).mean(0).tolist()]


def sampler_gaps(trajectories, logprob):
    """|log pi as it was sampled - log pi of the trainer (a tensor, [M])| -> M floats."""
    sampled = torch.tensor([value for t in trajectories for value in t.logprob])  # [M]
    return (sampled - logprob.detach().cpu()).abs().tolist()


def rollout_facts(rewards, trajectories, owners, gaps):
    """What GRPO's log has of a batch of rollouts, over all processes. rewards: [P, N]."""
    valid = gather([sum(box is not None for box in t.boxes) / len(t.boxes) for t in trajectories])
    lengths = gather([len(t.target) for t in trajectories])
    sums, largest = zip(*gather([(sum(gaps), max(gaps))]))
    rewards = torch.tensor(gather(rewards.tolist()))  # [P, N] of all processes
    deviation = rewards.std(1, unbiased=False)  # [P]
    return {
        "reward": rewards.mean().item(),
        "reward_std": deviation.mean().item(),
        "no_signal": (deviation < 1e-6).float().mean().item(),
        "iou": step_ious(trajectories, owners),
        "valid": sum(valid) / len(valid),
        "tokens": sum(lengths) / len(lengths),
        "sampler_gap": sum(sums) / sum(lengths),
        "sampler_gap_max": max(largest),
    }


def show_gain(run):
    """Says what a GRPO did: the reward of the same validation prompts, with the same seeds, before
    training and by its result, which is never below: it was chosen by these rewards."""
    rewards = {row["update"]: row["val_rewards"] for row in run.rows if "val_rewards" in row}
    before, after = (torch.tensor(rewards[update]) for update in (0, run.best[1]))  # [prompts] each
    change = estimate(after - before)
    said = f"{before.mean():.3f}, then {after.mean():.3f}: {signed(change)}"
    run.bar.write(f"sampled reward on {len(before)} validation prompts: {said}")
    run.log(update=run.count, change=change)
