"""The time that a piece of work cannot avoid on this machine, when a token is decoded at a time.

That is the arithmetic of every token that goes through a layer once, and in decoding, where a pass
has few tokens, the bytes of the weights and of the cache if reading them takes longer. LoRA,
recomputed activations, elementwise work, memory traffic between layers and Python come on top.
"""

from typing import NamedTuple

import torch

NOT_COUNTED = ("embed_tokens", "pos_embed", "lora_")  # looked up, or small beside the weights


class Prefill(NamedTuple):
    """New tokens of one sequence that go through the model together."""

    tokens: int
    cached: int  # tokens before them
    passes: int = 1


class Decoding(NamedTuple):
    """One pass after the other, each with a token of every sequence."""

    rows: int
    tokens: int  # of a sequence
    cached: int  # before the first of them


def size_of(module):
    """(parameters, bytes) of the weights that a token is multiplied with."""
    count = 0
    size = 0
    for name, p in module.named_parameters():
        if any(word in name for word in NOT_COUNTED):
            continue
        count += p.numel() * (2 if p.dtype == torch.uint8 else 1)  # 4-bit: two in a byte
        size += p.nbytes
    return count, size


def floor(vlm, rates, *, images=(), prefills=(), decodings=(), logits=0):
    """Seconds at the machine's rates. images: their numbers of patches; logits: their rows."""
    text = vlm.base.config.text_config
    vision = vlm.base.config.vision_config
    tower = vlm.base.model.visual
    head = vlm.base.lm_head.weight
    weights, weight_bytes = size_of(vlm.base.model.language_model)
    mergers = size_of(tower.merger)[0] + size_of(tower.deepstack_merger_list)[0]
    # The mergers see one token for every 2 x 2 patches
    patch_weights = size_of(tower)[0] - mergers + mergers / vision.spatial_merge_size**2
    # Attention: a product for the score and one for the sum, for every pair of tokens
    pair = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    key_values = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    token_bytes = key_values * head.element_size()

    work = 2 * logits * head.numel()
    for n in images:
        work += 2 * n * patch_weights + 4 * n**2 * vision.hidden_size * vision.depth
    for new, cached, passes in prefills:
        work += passes * (2 * new * weights + pair * new * (cached + new / 2))
    total = work / rates.arithmetic
    for rows, tokens, cached in decodings:
        for n in range(cached, cached + tokens):
            work = rows * (2 * (weights + head.numel()) + pair * n)
            size = weight_bytes + head.nbytes + rows * n * token_bytes
            total += max(work / rates.arithmetic, size / rates.reading)
    return total


def lengths(trajectory):
    """Of a rollout's trajectory: (tokens put in, tokens written) at each step."""
    out = []
    before = 0
    for t in range(len(trajectory.boxes)):
        written = trajectory.step.count(t)
        start = trajectory.predictor[trajectory.step.index(t)] + 1
        out.append((start - before, written))
        before = start + written
    return out


def patches(vlm, image):
    return image.rows * image.columns * vlm.base.config.vision_config.spatial_merge_size**2


def rollout_floor(vlm, rates, trajectories, group_size=1):
    """Of these trajectories, decoded in one batch; a group's prompt and its image count once."""
    images = []
    prefills = []
    for i, trajectory in enumerate(trajectories):
        cached = 0
        for t, (new, written) in enumerate(lengths(trajectory)):
            if t > 0:  # the last token of the step before goes in with what is injected
                prefills.append(Prefill(new + 1, cached - 1))
                images.append(patches(vlm, trajectory.images[t]))
            elif i % group_size == 0:
                prefills.append(Prefill(new, cached))
                images.append(patches(vlm, trajectory.images[0]))
            cached += new + written
    rows = len(trajectories)
    decodings = []
    cached = 0
    for step in zip(*(lengths(trajectory) for trajectory in trajectories)):
        new = sum(new for new, _ in step) / rows
        written = sum(written for _, written in step) / rows
        # The first token of a step comes out of its prefill
        decodings.append(Decoding(rows, round(written) - 1, round(cached + new)))
        cached += new + written
    return floor(
        vlm,
        rates,
        images=images,
        prefills=prefills,
        decodings=decodings,
        logits=rows * len(decodings),
    )


def training_floor(vlm, rates, trajectories, *, passes, with_images):
    """Of trajectories that go through the language model `passes` times.

    A backward pass through frozen weights is one more. with_images: the vision tower runs too.
    """
    images = []
    if with_images:
        for trajectory in trajectories:
            images += [patches(vlm, image) for image in trajectory.images]
    prefills = [Prefill(len(t.ids), 0, passes) for t in trajectories]
    logits = passes * sum(len(t.target) for t in trajectories)
    return floor(vlm, rates, images=images, prefills=prefills, logits=logits)
