"""The training passes as grpo.py and sft.py do them, without their flags, logs and files."""

from common import encode_images, grpo_loss, trajectory_logprobs
from support.model.adapters import using

import torch


def our_logprobs(vlm, trajectories, images):
    """Log-probabilities and entropies [M] of all targets; the rollout's image tokens serve."""
    scores = trajectory_logprobs(vlm, trajectories)
    return scores.logprob, scores.entropy


def update(vlm, trajectories, images, advantages, *, batch_size, logprobs=our_logprobs):
    """GRPO's gradient, `batch_size` trajectories at a time; returns the loss.

    images: PIL, those of each trajectory. logprobs: `our_logprobs`, or the plain way's.
    """
    tokens = sum(len(t.target) for t in trajectories)
    total = 0.0
    vlm.model.zero_grad()
    for i in range(0, len(trajectories), batch_size):
        part = slice(i, i + batch_size)
        batch = trajectories[part], images[part]
        with torch.no_grad(), using(vlm, "reference"):
            reference, _ = logprobs(vlm, *batch)  # [M], like the three others
        logprob, entropy = logprobs(vlm, *batch)
        pairs = zip(trajectories[part], advantages[part])
        advantage = torch.tensor([a for t, a in pairs for _ in t.target]).to(logprob)
        loss, *_ = grpo_loss(logprob, reference, advantage, entropy, beta=0.04, entropy_weight=0.01)
        (loss / tokens).backward()
        total += loss.item() / tokens
    return total


def our_sft(vlm, trajectories, images):
    """SFT's gradient, vision tower included; returns the loss."""
    vlm.model.zero_grad()
    encoded = iter(encode_images(vlm, [image for pictures in images for image in pictures]))
    for trajectory, pictures in zip(trajectories, images):
        trajectory.images = [next(encoded) for _ in pictures]
    loss = -trajectory_logprobs(vlm, trajectories).logprob.mean()
    loss.backward()
    return loss.item()
