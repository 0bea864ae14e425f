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


def rollout_bytes(vlm, images, texts, steps, *, max_tokens, group_size, loop=IVT, **sampling):
    """(tokens of a trajectory, bytes of its cache, bytes of a prompt's whole group), at most, for
    these images (PIL) and texts."""
    number, layers, width, mlp, queries, keys = widths(vlm)
    sizes = [dict(width=image.width, height=image.height) for image in images]
    count = max(image_token_count(vlm, size) for size in sizes)
    picture, text = ImageTokens(None, [], 1, count), max(texts, key=len)
    first = len(prompt_ids(vlm, picture, text, loop))
    piece = len(continuation_ids(vlm, picture, text, loop, WHOLE)) if steps else 0
    length = first + steps * piece + (steps + 1) * max_tokens
    cache = 2 * layers * keys * number  # of a token
    levels = 1 + len(vlm.base.config.vision_config.deepstack_visual_indexes)
    shown = count * levels * width * number
    # The pass over a piece with a picture: the MLP at its widest, beside LoRA's float32
    passing = number * 5 * width + (2 * number + 8) * mlp  # of a token
    first_pass = shown + first * (cache + passing)
    last_pass = (shown + piece * passing) * (steps > 0) + (length - max_tokens) * cache
    pictures = (1 + group_size * steps) * shown
    peak = max(first_pass, group_size * max(last_pass, length * cache))
    return length, length * cache, pictures + peak


# A token's bytes in one layer of a training pass, forward and backward, with LoRA in float32: for
# each number of the states, the MLP, the queries and the keys, as counted
LAYER = {2: (44, 18, 12, 10), 4: (23, 24, 12, 14)}  # bfloat16, float32


def training_bytes(vlm, tokens):
    """What a forward and backward pass over so many tokens takes beside weights and pictures."""
    number, layers, width, *others = widths(vlm)
    layer = sum(size * wide for size, wide in zip(LAYER[number], (width, *others)))
    return tokens * (layers * width * number + layer if vlm.checkpointing else layers * layer)
