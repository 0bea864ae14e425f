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


ROOM = 64  # tokens: how much longer a cache is made than it has to be, whenever it is too short
# A patch's bytes in the vision tower for each number of its state, as counted
PATCH = {2: 38, 4: 44}  # bfloat16, float32


def tower_bytes(vlm, count):
    """What the vision tower takes for an image of so many tokens, whose result is not counted."""
    vision = vlm.base.config.vision_config
    number = vlm.base.lm_head.weight.element_size()
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rotary = 8 * vision.hidden_size // vision.num_heads
    patch = PATCH[number] * vision.hidden_size + number * pixels + rotary
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
    """(tokens of a trajectory, bytes of its cache, bytes of a prompt's whole group), at most, for
    these images (PIL) and texts."""
    number, layers, width, *_, keys = widths(vlm)
    sizes = [dict(width=image.width, height=image.height) for image in images]
    count = max(image_token_count(vlm, size) for size in sizes)
    picture, text = ImageTokens(None, [], 1, count), max(texts, key=len)
    first = len(prompt_ids(vlm, picture, text, loop))
    piece = len(continuation_ids(vlm, picture, text, loop, WHOLE)) if steps else 0
    length = first + steps * piece + (steps + 1) * max_tokens
    cache = 2 * layers * keys * number  # of a token
    levels = 1 + len(vlm.base.config.vision_config.deepstack_visual_indexes)
    shown = count * levels * width * number  # the tokens of an image; a pass holds them twice
    tower = tower_bytes(vlm, count)
    written = math.ceil(max_tokens / (ROOM + 1)) * (ROOM + 1) - 1  # what a step adds to a cache
    last = length - max_tokens  # tokens before the last step
    prompt = max(tower + shown, (first + ROOM) * cache + 2 * shown + pass_bytes(vlm, first, first))
    # Of each trajectory, while a step is written: half a layer is there twice when it grows
    moments = [(last + written) * cache * (1 + 0.5 / layers) + steps * shown]
    if steps:
        moments.append((last - piece - max_tokens + written) * cache + tower + steps * shown)
        passing = pass_bytes(vlm, piece, last)
        moments.append((last + ROOM) * cache + (steps + 1) * shown + passing)
    return length, length * cache, math.ceil(max(prompt, shown + group_size * max(moments)))


# A token's bytes in one layer of a training pass with LoRA in float32, forward and backward, and
# what the forward pass alone leaves there without checkpointing: for each number of the states, the
# MLP, the queries and the keys, as counted
LAYER = {2: (43, 14, 13, 9), 4: (21, 24, 13, 13)}  # bfloat16, float32
KEPT = {2: (28, 10, 13, 9), 4: (16, 16, 13, 13)}


def training_bytes(vlm, tokens):
    """What a forward and backward pass over so many tokens takes beside weights and pictures."""
    number, layers, *wide = widths(vlm)
    layer = sum(size * width for size, width in zip(LAYER[number], wide))
    kept = sum(size * width for size, width in zip(KEPT[number], wide))
    states = number * wide[0]  # between two layers
    if vlm.checkpointing:
        return tokens * (layers * states + layer)
    return tokens * ((layers - 1) * kept + layer + 4 * states)
