"""The toy's model: a real Qwen3-VL, small, with random weights.

Its dimensions, its image processor, which brings every image to an area of SEEN x SEEN pixels, and
its tokenizer, a byte-level BPE with digits single and Qwen's chat layout, are files of toy/base.
"""

from pathlib import Path

from toy.world import SEEN

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

BASE = Path(__file__).parent / "base"
WIDTH = 128  # of both halves, in 4 heads of 32
PATCH = 8  # pixels; a picture of SEEN x SEEN is 12 x 12 patches, 6 x 6 image tokens
# Words of the world, and of the methods' prompts and traces; the latter the base has read in random
# order alone. In a text each is one token.
VOCABULARY = (
    "</think> <think> Answer Examine First Here How I Is It JSON Locate Now Repeat Report The Then "
    "Think This What Where Which a about and answer apart are around at bar bars bbox bears black "
    "blue bottommost box chose circle closer coordinates corrected crop cross crosses cyan "
    "description does dot dots down enlarge enlarged every far few first fits for format frame "
    "green high image in inside is it its keep large largest last left leftmost lie little look "
    "low lower make many mark matches matters middle move narrow narrower nearly need no object of "
    "on or orange pink post posts prediction question red region report right rightmost ring rings "
    "see shifted short shorter shows shrink slightly small smallest square star surroundings tall "
    "taller target text that the then there think this tighten to too topmost triangle up upper "
    "view well where which white wide wider words wrong yellow yes you your"
).split()


@torch.no_grad()
def make_model(layers=5, vision_layers=4):
    """A Qwen3-VL with random weights, of widths that bitsandbytes can quantise (multiples of 64).

    A net this narrow does not leave the plateau from the usual initialisation. Here the matrices
    begin at 0.08; the word embeddings at 1, so that a word is not drowned by the first layer's
    output (the last norm, at 0.1, keeps the tied logits small); every query head of a group equal
    to its key head, so that it begins by attending to what is alike; the gains of the query and
    key norms at 1.5; and the vision tower's position embeddings as sines and cosines of row and
    column, as strong as the content.
    """
    config = Qwen3VLConfig.from_pretrained(BASE, dtype=torch.float32)
    config.text_config.num_hidden_layers = layers
    config.vision_config.depth = vision_layers
    config.vision_config.deepstack_visual_indexes = list(range(1, vision_layers - 1))
    model = Qwen3VLForConditionalGeneration(config)
    visual, language = model.model.visual, model.model.language_model
    side = SEEN // PATCH
    angle = torch.arange(float(side))[:, None] / 20 ** (torch.arange(WIDTH // 4) / (WIDTH // 4))
    line = torch.cat([angle.sin(), angle.cos()], 1)  # [side, WIDTH / 2]
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    visual.pos_embed.weight.copy_(torch.cat([rows, columns], -1).flatten(0, 1))
    for merger in visual.deepstack_merger_list:
        merger.linear_fc2.weight.zero_()  # DeepStack adds nothing yet: untaught, it would be noise
    language.embed_tokens.weight.normal_(0, 1)
    language.norm.weight.fill_(0.1)
    for layer in language.layers:
        attention = layer.self_attn
        attention.q_norm.weight.fill_(1.5)
        attention.k_norm.weight.fill_(1.5)
        queries = attention.q_proj.weight.view(-1, 32, WIDTH)  # [heads, 32, WIDTH]
        attention.k_proj.weight.view(-1, 32, WIDTH).copy_(queries[::2])
    return model
