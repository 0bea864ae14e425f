"""What plays the loops: `rollout` with the weights as decoding likes them, or vLLM."""

from contextlib import contextmanager
from functools import partial

from common import rollout
from support.data.samples import load_image
from support.model.loading import free_memory
from support.running.errors import out_of_memory, stop, working_on

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import DynamicLayer

MERGED_BYTES = 2**30  # of the weights that are copied while LoRA is part of them


@contextmanager
def merged(vlm):
    """Inside, the active LoRA is part of the weights: one product for each projection, not three.

    The same policy up to rounding. Of float32 weights up to MERGED_BYTES alone: bfloat16 would
    round much of LoRA away, and 4-bit weights cannot take it (see `unpacked`). Afterwards the
    weights are what they were to the bit, from a copy: PEFT takes LoRA off by subtraction, which
    drifts.
    """
    layers = [module for module in vlm.model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers if not layer.disable_adapters]
    is_float32 = all(weight.dtype == torch.float32 for weight in weights)
    if not weights or not is_float32 or sum(weight.nbytes for weight in weights) > MERGED_BYTES:
        yield
        return
    before = [weight.detach().clone() for weight in weights]
    vlm.model.merge_adapter()
    try:
        yield
    finally:
        vlm.model.unmerge_adapter()
        for weight, old in zip(weights, before):
            weight.data.copy_(old)


@contextmanager
def unpacked(vlm):
    """Inside, 4-bit projections that LoRA is active on decode from a copy of their weights in the
    computing type, and LoRA is its two products beside it.

    The same policy up to rounding, without PEFT's and bitsandbytes' work for every token
    (docs/log.md). The copies take 2 bytes a weight, 6.8 GiB of the real model. No gradient
    goes through them. An adapter that is more than A and B (DoRA, a bias, dropout) is left to PEFT.
    Yields whether there are any copies.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = []
    try:
        for layer in vlm.model.modules():
            if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
                continue
            base = layer.get_base_layer()
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if not isinstance(base, Linear4bit) or not all(is_plain(layer, n) for n in names):
                continue
            loras = [
                (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
                for name in names
            ]
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
            weight = weight.to(base.compute_dtype)
            layer.forward = partial(project, weight=weight, bias=base.bias, loras=loras)
            layers.append(layer)
        yield bool(layers)
    finally:
        for layer in layers:
            del layer.forward  # its class's is there again


def is_plain(layer, name):
    """Whether an adapter adds B(A(x)) times a number to this layer, and nothing else."""
    has_bias = layer.lora_B[name].bias is not None
    drops = not isinstance(layer.lora_dropout[name], torch.nn.Identity)
    return not (has_bias or drops or name in layer.lora_variant)


def project(x, weight, bias, loras):
    """x [..., in] -> [..., out]. loras: (A [rank, in], B [out, rank], alpha / rank) of each."""
    out = linear(x, weight, bias)
    for a, b, scale in loras:
        out = out + (linear(linear(x.to(a.dtype), a), b) * scale).to(out.dtype)
    return out


ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, kept where there is room for those of tokens to come."""

    def update(self, key_states, value_states, *args, **kwargs):
        """As of DynamicLayer, whose torch.cat copies the whole cache for every token."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys = appended(self.keys, key_states)
        self.values = appended(self.values, value_states)
        return self.keys, self.values


def appended(held, new):
    """held [B, heads, cached, width], new [B, heads, K, width] -> [B, heads, cached + K, width].

    The result is the beginning of a longer tensor, as `held` is from the second time on: behind it
    there is room for the next tokens."""
    count, total = held.shape[2], held.shape[2] + new.shape[2]
    if count == 0 or total * held.shape[3] > held.stride(1):  # numbers from one head to the next
        longer = held.new_empty(*held.shape[:2], total + ROOM, held.shape[3])
        longer[:, :, :count] = held
        held = longer
    held = held.as_strided((*held.shape[:2], total, held.shape[3]), held.stride())
    held[:, :, count:] = new
    return held


no_room = float("inf")  # trajectories x pictures x pixels that unpacked weights left no room for


def play(vlm, images, texts, steps, *, group_size=1, **options):
    """`rollout`, with the weights as decoding likes them: LoRA a part of them where they can take
    it, 4-bit ones unpacked where there is room.

    A rollout that has no room for them is played again from 4-bit weights, and larger ones are not
    tried.
    """
    global no_room
    options |= dict(group_size=group_size, new_cache=partial(Cache, None, RoomyLayer))
    roll = partial(rollout, vlm, images, texts, steps, **options)
    rows = len(images) * group_size
    size = rows * (steps + 1) * max(image.width * image.height for image in images)
    if getattr(vlm.model, "is_loaded_in_4bit", False) and size < no_room:
        has_copies = True  # or was about to, where there was no room for them alone
        try:
            with unpacked(vlm) as has_copies:
                return with_numbers(roll(), texts)
        except Exception as e:
            if not (has_copies and out_of_memory(e)):
                raise
        no_room = size
        free_memory()  # what the rollout held is free here, where the exception is no more
        tqdm.write(f"no room for unpacked weights with {rows} trajectories; going on in 4 bits")
    with merged(vlm):
        return with_numbers(roll(), texts)


def with_numbers(trajectories, texts):
    """The trajectories; stops where the model's logits were no numbers: all it said is token 0."""
    for i, trajectory in enumerate(trajectories):
        if not sum(trajectory.logprob) < float("inf"):  # NaN is less than nothing
            text = texts[i * len(texts) // len(trajectories)][:200]
            stop(f"logits are no numbers for {text!r}; look at its image, or give --dtype float32")
    return trajectories


def rollouts(args, trainee=None):
    """What plays the loops: `play`, or with --engine vllm a function that takes and returns the
    same.

    trainee: the model that is trained on what is played: its trajectories need their ImageTokens,
    and the engine starts at once, beside the largest batch. Exits when there is no vLLM.
    """
    if args.engine == "plain":
        return play
    from support.model.vllm_rollout import player

    return player(args, trainee)


def roll_in_parts(roll, vlm, samples, data, at_once, steps, *, seeds, load=load_image, **options):
    """What `roll`, of `rollouts`, plays for samples, a few of them at a time, in one list.

    data: the folder that their images' paths start from.
    """
    trajectories = []
    for i in range(0, len(samples), at_once):
        part = samples[i : i + at_once]
        working_on(part)
        images = [load(sample, data) for sample in part]
        texts = [sample["expression"] for sample in part]
        trajectories += roll(vlm, images, texts, steps, seeds=seeds[i : i + at_once], **options)
    return trajectories
