"""What plays the loops: `rollout` with the weights as decoding likes them, or vLLM."""

from contextlib import contextmanager
from functools import partial

from common import rollout
from support.data.samples import load_image
from support.model import plan
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
    """
    from bitsandbytes.functional import dequantize_4bit

    layers = []
    try:
        for layer, base, names in unpackable(vlm):
            loras = [
                (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
                for name in names
            ]
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
            weight = weight.to(base.compute_dtype)
            layer.forward = partial(project, weight=weight, bias=base.bias, loras=loras)
            layers.append(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward  # its class's is there again


def unpackable(vlm):
    """Yields all that can be unpacked: LoRA's layer, its 4-bit projection, its adapters' names."""
    if not getattr(vlm.model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for layer in vlm.model.modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
            continue
        base = layer.get_base_layer()
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if isinstance(base, Linear4bit) and all(is_plain(layer, name) for name in names):
            yield layer, base, names


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
        longer = held.new_empty(*held.shape[:2], total + plan.SPARE, held.shape[3])
        longer[:, :, :count] = held
        held = longer
    held = held.as_strided((*held.shape[:2], total, held.shape[3]), held.stride())
    held[:, :, count:] = new
    return held


limit = float("inf")  # bytes: half of what has run out of memory
told = set()  # (T, N) of rollouts whose plan was printed


def play(vlm, images, texts, steps, *, group_size=1, planned=False, dry=False, **options):
    """`rollout` in parts that fit, with the weights as decoding likes them: LoRA a part of them
    where they can take it, 4-bit ones unpacked where they fit too.

    planned: a part is what fits, by `plan`; otherwise it is all. What runs out of memory is played
    again in half of the memory, at last from 4-bit weights. Parts change rounding alone. dry: the
    plan is printed, which it is once for each (T, N), and nothing is played.
    """
    global limit
    options |= dict(group_size=group_size, new_cache=partial(Cache, None, RoomyLayer))
    length, cache, shown, each = plan.rollout_bytes(vlm, images, texts, steps, **options)
    copies = sum(2 * base.weight.quant_state.shape.numel() for _, base, _ in unpackable(vlm))
    lists = {key: options.pop(key) for key in ("seeds", "first_texts") if options.get(key)}
    made, done = [], 0
    while done < len(images):
        left = len(images) - done
        free = min(plan.free_bytes() - left * shown, limit)
        size, unpacks = left, 0 < copies <= free - left * each
        if planned or limit < float("inf"):
            size, unpacks = plan.groups_at_once(left, each, free, copies)
        rows = size * group_size
        if planned and (steps, group_size) not in told:
            told.add((steps, group_size))
            what = f"{rows * cache / 2**30:.1f} GiB of cache, {free / 2**30:.1f} to use"
            what += "; weights unpacked" * unpacks
            tqdm.write(f"rollout: {rows} trajectories x {length:,} tokens, {what}")
        if dry:
            return []
        part = slice(done, done + size)
        own = {key: values[part] for key, values in lists.items()}
        try:
            with unpacked(vlm) if unpacks else merged(vlm):
                rolled = rollout(vlm, images[part], texts[part], steps, **own, **options)
            made += with_numbers(rolled, texts[part])
            done += size
            continue
        except Exception as e:
            if not out_of_memory(e) or (size == 1 and not unpacks):
                raise
        limit = min(free, size * each + copies * unpacks) / 2
        free_memory()  # what the rollout held is free here, where the exception is no more
        tqdm.write(f"out of memory with {rows} trajectories at once; going on with fewer")
    return made


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
        return partial(play, planned=not getattr(args, "prompts_at_once", args.batch_size))
    from support.model.vllm_rollout import player

    return player(args, trainee)


def roll_in_parts(roll, vlm, samples, data, at_once, steps, *, seeds, load=load_image, **options):
    """What `roll`, of `rollouts`, plays for samples, a few of them at a time, in one list.

    data: the folder that their images' paths start from.
    """
    trajectories = []
    at_once = at_once or 64  # `play` parts what does not fit
    for i in range(0, len(samples), at_once):
        part = samples[i : i + at_once]
        working_on(part)
        images = [load(sample, data) for sample in part]
        texts = [sample["expression"] for sample in part]
        trajectories += roll(vlm, images, texts, steps, seeds=seeds[i : i + at_once], **options)
    return trajectories
