"""The toy's tokenizer, its image processor, and its Qwen3-VL before it has learnt anything."""

import math
import random

from common import CORRECTION, IVT_PROMPT
from toy.conversations import conversation
from toy.world import SIDE

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

PATCH = 8  # pixels: a scene is 10 x 10 patches, 5 x 5 image tokens
HEAD_DIM = 32
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The words of the template teacher, so that the tokenizer can spell them. The base itself reads of
# these sentences only the one of step 0 (conversations.py).
TRACE_WORDS = (
    "<think>I look for the object. I see it in the middle, at the upper left. Here is the red box: "
    "it fits well and I keep it. The red box is on the wrong object, too far left, too far right, "
    "too high, too low, too wide, too narrow, too tall and too short, too large or too small. I "
    "move it up and down, to the left and to the right, and make it wider, narrower, taller and "
    "shorter. Then I move the box there, to the target. It is shifted a little, nearly right; "
    "tighten slightly, enlarge it, shrink it.</think>"
)


def tokenizer_corpus(seed):
    """The texts that the tokenizer learns its words from: chats of the toy's world, and prompts."""
    rng = random.Random(seed)
    # toy/base/ was made when the prompt's placeholder had this name; another name would make
    # another vocabulary, and the weights would not fit it.
    prompt = IVT_PROMPT.replace("{text}", "{expression}")
    corpus = []
    for _ in range(2000):
        for kind, value in conversation(rng, 3, 6):
            if kind == "expression":
                corpus.append(value[0])
            elif kind != "image":
                corpus.append(value)
        corpus += [prompt, CORRECTION, TRACE_WORDS, TRACE_WORDS.lower()]
    return corpus


def make_tokenizer(seed=0):
    """A byte-level BPE: digits single, words whole, Qwen's special tokens and chat layout."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r'\{"bbox_2d": \[|\d| ?\p{L}+|[^\p{L}\d\s]+ ?|\s+')
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(tokenizer_corpus(seed), trainer)
    tokenizer.add_special_tokens(SPECIALS)
    thinking = [AddedToken(token, special=False) for token in ("<think>", "</think>")]
    tokenizer.add_tokens(thinking)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_image_processor():
    """Qwen3-VL's image processor with the toy's patches."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 1024**2},
    )


def make_config(tokenizer, width, layers, vision_width, vision_layers):
    """A Qwen3-VL of these dimensions; multiples of 64, so that bitsandbytes can quantise it."""
    text = dict(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=100000.0,
            mrope_section=[6, 5, 5],
            mrope_interleaved=True,
        ),
    )
    vision = dict(
        depth=vision_layers,
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_heads=vision_width // HEAD_DIM,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=width,
        num_position_embeddings=(SIDE // PATCH) ** 2,
        deepstack_visual_indexes=list(range(vision_layers - 1)),
        initializer_range=0.08,
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


@torch.no_grad()
def make_model(tokenizer, width=128, layers=4, vision_width=128, vision_layers=3):
    """A Qwen3-VL with random weights, begun so that a net this narrow leaves the plateau.

    It does not with the usual initialisation. Here

    - the matrices begin at a deviation of 0.08, the word embeddings at 1, so that a word is not
      drowned by the first layer's output; the last norm, at 0.1, keeps the tied logits small;
    - every other query head equals its key head, so that it begins by attending to what is alike;
    - the gains of the query and key norms, which bound how sharply 32 dimensions can attend, begin
      at 1.5;
    - the vision tower's position embeddings are sines and cosines of row and column, as strong as
      the content.
    """
    model = Qwen3VLForConditionalGeneration(
        make_config(tokenizer, width, layers, vision_width, vision_layers)
    )
    side = SIDE // PATCH
    half = vision_width // 2
    frequency = 20 ** (torch.arange(half // 2) / (half // 2))  # [half / 2]
    angle = torch.arange(float(side))[:, None] / frequency  # [side, half / 2]
    line = torch.cat([angle.sin(), angle.cos()], 1)  # [side, half]
    rows = line[:, None].expand(side, side, half)
    columns = line[None].expand(side, side, half)
    grid = torch.cat([rows, columns], -1)  # [side, side, vision_width]
    model.model.visual.pos_embed.weight.copy_(grid.reshape(side * side, vision_width))
    language = model.model.language_model
    language.embed_tokens.weight.normal_(0, 1)
    language.norm.weight.fill_(0.1)
    for layer in language.layers:
        attention = layer.self_attn
        attention.q_norm.weight.fill_(1.5)
        attention.k_norm.weight.fill_(1.5)
        queries = attention.q_proj.weight.view(-1, HEAD_DIM, width)  # [heads, HEAD_DIM, width]
        keys = attention.k_proj.weight.view(-1, HEAD_DIM, width)  # [heads / 2, HEAD_DIM, width]
        keys.copy_(queries[::2])
    return model
