"""What rollouts and training passes take, by arithmetic, and so how many trajectories at once."""

import math

from support.running.errors import say_once

import psutil
import torch

GIB = 2**30
WORDS = 200  # tokens of prompt or correction, about: an expression is short


def free_bytes():
    """What further tensors may take: on a CPU of the machine's memory, on a GPU of what no tensor
    has, and of the share that PyTorch was given."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    free, whole = torch.cuda.mem_get_info()
    used = torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction() * whole - used
    return min(free + torch.cuda.memory_reserved() - used, share)


def sizes(vlm):
    """Bytes of: a token in the cache; an image token; a token in a pass without gradients."""
    text, vision = vlm.base.config.text_config, vlm.base.config.vision_config
    number = vlm.base.lm_head.weight.element_size()
    keys = text.num_key_value_heads * text.head_dim
    levels = 1 + len(vision.deepstack_visual_indexes)
    heads = text.num_attention_heads * text.head_dim
    # The widest places of a layer: the MLP's three, or queries beside keys repeated for each head
    widest = max(3 * text.intermediate_size, 5 * heads) + 4 * text.hidden_size
    cache = 2 * text.num_hidden_layers * keys * number
    return cache, levels * text.hidden_size * number, widest * number


def image_token_count(vlm, width, height):
    """How many tokens an image of this size is to the language model, after --max-pixels."""
    processor = vlm.image_processor
    return processor.get_number_of_image_patches(height, width, {}) // processor.merge_size**2


def rollout_bytes(vlm, images, steps, max_tokens, group_size):
    """(tokens of the longest trajectory, bytes of its cache, bytes of a prompt's whole group) for
    these images (PIL), if every step is full."""
    size = {(image.width, image.height) for image in images}
    shown = max(image_token_count(vlm, *pair) for pair in size) + 2
    piece = shown + WORDS
    length = (steps + 1) * (piece + max_tokens)
    token, picture, act = sizes(vlm)
    # What a row adds: its cache, its pictures, and the pass that takes in a picture
    row = length * token + (steps + 1) * shown * picture + piece * act
    return length, length * token, row * group_size


# Bytes of a token in a training pass that recomputes its activations, with LoRA in float32: of each
# number of the width, the MLP, the queries and the keys of the layer at hand, as counted
LAYER = {2: (44, 18, 12, 10), 4: (23, 24, 12, 14)}  # bfloat16, float32


def training_bytes(vlm, tokens):
    """What a forward and backward pass over so many tokens takes beside weights and pictures."""
    text, number = vlm.base.config.text_config, vlm.base.lm_head.weight.element_size()
    heads, keys = text.num_attention_heads, text.num_key_value_heads
    widths = text.hidden_size, text.intermediate_size, heads * text.head_dim, keys * text.head_dim
    layer = sum(size * width for size, width in zip(LAYER[number], widths))
    kept = text.num_hidden_layers * (number * text.hidden_size if vlm.checkpointing else layer)
    return tokens * (kept + layer * vlm.checkpointing)


def training_rows(vlm, length, pictures, count):
    """How many trajectories of this length a training pass takes, at most `count`, beside
    gradients, optimizer's state and the bytes of pictures."""
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    free = free_bytes() * 0.9 - 3 * sum(p.nbytes for p in trained) - pictures
    return int(min(count, max(1, free // training_bytes(vlm, length))))


def copies_bytes(vlm):
    """Of the unpacked copies of all 4-bit projections; 0 where there are none."""
    if not getattr(vlm.model, "is_loaded_in_4bit", False):
        return 0
    weights = [p for p in vlm.model.parameters() if type(p).__name__ == "Params4bit"]
    return sum(2 * math.prod(p.quant_state.shape) for p in weights)


def choose(count, each, copies, free, planned=True):
    """(prompts at once, whether weights are unpacked) of `count` prompts that take `each` bytes.

    planned: or all at once. Unpacked weights are two to three times as fast (docs/tables/gpu.md),
    so they are worth up to twice as many parts. Parts are of equal size.
    """

    def parts(room):
        return math.ceil(count / max(1, min(count, room // each))) if planned else 1

    left = free - copies
    unpacks = copies > 0 and left >= each * (1 if planned else count)
    unpacks = unpacks and parts(left) <= 2 * parts(free)
    return math.ceil(count / parts(left if unpacks else free)), unpacks


def show(prompts, group_size, length, cache, free, copies, unpacks):
    """One line, once for each kind of rollout, where there is a GPU."""
    if torch.cuda.is_available():
        rows = prompts * group_size
        what = f"rollout: {rows} trajectories x {length:,} tokens at once, "
        what += f"{rows * cache / GIB:.1f} GiB of cache, {free / GIB:.1f} GiB free"
        say_once(what + f"; weights unpacked, {copies / GIB:.1f} GiB" * unpacks)
