"""What rollouts and training passes hold, by arithmetic, and so how many of them fit at once."""

import math

from common import IVT, WHOLE, ImageTokens, continuation_ids, prompt_ids

import torch


def free_bytes():
    """What tensors may still take: of a GPU 0.8 of what it, and PyTorch's share of it, has left;
    the rest is gaps between them (docs/log.md). A CPU is not asked: no way is portable."""
    if not torch.cuda.is_available():
        return 2**32
    free, whole = torch.cuda.mem_get_info()
    held, cached = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    share = torch.cuda.get_per_process_memory_fraction() * whole
    return 0.8 * (min(free + cached, share) - held)


def at_once(count, each, free):
    """How many of `count` things of `each` bytes go together, one at least, in equal parts."""
    return math.ceil(count / math.ceil(count / max(1, min(count, free // each))))


def groups_at_once(count, each, free, copies):
    """How many of `count` groups of `each` bytes play together, and whether from unpacked weights
    (`copies` bytes), which decode two to three times as fast (docs/tables/gpu.md)."""
    packed, unpacked = (at_once(count, each, free - taken) for taken in (0, copies))
    more_passes = math.ceil(count / unpacked) / math.ceil(count / packed)
    unpacks = 0 < copies <= free - each and more_passes <= 2
    return (unpacked if unpacks else packed), unpacks


def image_token_count(vlm, sample):
    """How many tokens the sample's image is to the language model, after --max-pixels."""
    processor = vlm.image_processor
    patches = processor.get_number_of_image_patches(sample["height"], sample["width"], {})
    return patches // processor.merge_size**2


def widths(vlm):
    """Bytes of a number; the language model's layers; the widths of its states, MLP, queries and
    keys."""
    text = vlm.base.config.text_config
    heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    number = vlm.base.lm_head.weight.element_size()
    return number, text.num_hidden_layers, text.hidden_size, text.intermediate_size, *heads


SPARE = 64  # tokens: a cache that is too short is made so much longer than it has to be
# A patch's bytes in the vision tower for each number of its state. This, LAYER and ACTIVATIONS are
# fitted to the tensors of random models of many widths, counted as by tests/test_model.py
PATCH_BYTES = {2: 38, 4: 44}  # bfloat16, float32


def tower_bytes(vlm, count):
    """What the vision tower takes for an image of so many tokens, whose result is not counted."""
    vision = vlm.base.config.vision_config
    number = vlm.base.lm_head.weight.element_size()
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rotary = 8 * vision.hidden_size // vision.num_heads
    patch = PATCH_BYTES[number] * vision.hidden_size + number * pixels + rotary
    return count * vision.spatial_merge_size**2 * patch


def pass_bytes(vlm, new, total):
    """What a pass without a gradient over a row's `new` tokens takes, beside a cache that holds
    `total` then. A layer's attention repeats keys and values for each of its query heads, and has a
    mask twice; its MLP is at its widest when LoRA, in float32, adds to one product of three."""
    number, _, width, mlp, queries, _ = widths(vlm)
    attention = 2 * number * queries * (total + new) + (number + 1) * new * total
    lora = 4 * width if number < 4 else 0  # its input, in float32
    return 5 * number * width * new + max(attention, (12 * mlp + lora) * new)


def rollout_bytes(vlm, images, texts, steps, *, max_tokens, group_size=1, loop=IVT, **sampling):
    """For these images (PIL) and texts at most: tokens of a trajectory, bytes of its cache, of the
    image tokens that a prompt's group has in the end, and of all else that the group takes."""
    number, layers, width, *_, keys = widths(vlm)
    sizes = [dict(width=image.width, height=image.height) for image in images]
    count = max(image_token_count(vlm, size) for size in sizes)
    picture, text = ImageTokens(None, [], 1, count), max(texts, key=len)
    first = len(prompt_ids(vlm, picture, text, loop))
    piece = len(continuation_ids(vlm, picture, text, loop, WHOLE)) if steps else 0
    length = first + steps * piece + (steps + 1) * max_tokens
    cache = 2 * layers * keys * number  # of a token
    levels = 1 + len(vlm.base.config.vision_config.deepstack_visual_indexes)
    shown = count * levels * width * number  # of an image; a pass over it has them once more
    tower = tower_bytes(vlm, count)
    written = math.ceil(max_tokens / (SPARE + 1)) * (SPARE + 1) - 1  # what a step adds to a cache
    last = length - max_tokens  # tokens before the last step
    prompt_peak = max(tower, (first + SPARE) * cache + shown + pass_bytes(vlm, first, first))
    # Of each trajectory. While a step is written half a layer is there twice when it grows, and
    # logits, and what a token is drawn by, in float32
    logits = 16 * vlm.base.lm_head.out_features
    peaks = [(last + written) * cache * (1 + 0.5 / layers) + logits]
    if steps:
        peaks.append((last - piece - max_tokens + written) * cache + tower)
        peaks.append((last + SPARE) * cache + shown + pass_bytes(vlm, piece, last))
    group = math.ceil(max(prompt_peak, group_size * max(peaks)))
    return length, length * cache, (1 + group_size * steps) * shown, group


# A token's bytes in one layer of a training pass with LoRA in float32, forward and backward, and
# what the forward pass alone leaves there without checkpointing: for each number of the states, the
# MLP, the queries and the keys. Logits, in parts, are not counted: 0.1 GiB
LAYER = {2: (43, 14, 13, 9), 4: (21, 24, 13, 13)}  # bfloat16, float32
ACTIVATIONS = {2: (28, 10, 13, 9), 4: (16, 16, 13, 13)}


def training_bytes(vlm, tokens):
    """What a forward and backward pass over so many tokens takes beside weights and pictures."""
    number, layers, *wide = widths(vlm)
    layer = sum(size * width for size, width in zip(LAYER[number], wide))
    kept = sum(size * width for size, width in zip(ACTIVATIONS[number], wide))
    states = number * wide[0]  # between two layers
    if vlm.checkpointing:
        return tokens * (layers * states + layer)
    return tokens * ((layers - 1) * kept + layer + 4 * states)
