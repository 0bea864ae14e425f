"""The toy's tokenizer, image processor and model: a real Qwen3-VL, small, with random weights."""

import functools
import random
import re

from common import IVT_PROMPT, SINGLE_PROMPT, format_box
from toy.questions import FRAMES, RELATED
from toy.world import COLORS, KINDS, MARKS, RELATIONS, SEEN, SIZES, SUPERLATIVES

import torch

WIDTH = 128  # of both halves, in 4 heads of 32
PATCH = 8  # pixels; a picture of SEEN x SEEN is 12 x 12 patches, 6 x 6 image tokens
SPECIALS = (  # Qwen's, each between <| and |>
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end "
    "vision_start vision_end vision_pad image_pad video_pad"
).split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words of the methods' prompts and traces. The tokenizer learns to spell them; the base never
# reads them in training.
INSTRUCTION_WORDS = (
    "The red box is your last prediction. Examine it: is it on the wrong object, shifted, too "
    "large or too small? Think inside <think> </think>, then report the corrected bbox "
    "coordinates in JSON format."
)
TRACE_WORDS = (
    "<think>I look for the object. I see it in the middle, at the upper left. Here is the red "
    "box: it fits well and I keep it. The red box is on the wrong object, too far left, too far"
    " right, too high, too low, too wide, too narrow, too tall and too short, too large or too "
    "small. I move it up and down, to the left and to the right, and make it wider, narrower, "
    "taller and shorter. Then I move the box there, to the target. It is shifted a little, "
    "nearly right; tighten slightly, enlarge it, shrink it. I need a closer look at this region"
    " to answer the question. It shows the crop, the mark on it, and I answer: a dot, a ring, a"
    " cross, a bar, a post.</think>"
)
QUESTION_WORDS = (
    "Answer the question about the image. First think about which region matters, then report "
    "its bbox coordinates in JSON format. This is the region that you chose, enlarged. Now "
    "answer the question in a few words. Report the coordinates in this view. The view shows "
    "the surroundings of your last prediction. Where is the box? Repeat the box. Repeat the "
    "first box. Here is a box. What is inside the frame? Is it inside the frame? How does the "
    "frame lie around it? What mark is on it? Which bears a dot: this or that? How many dots "
    "are there? How many rings, bars, crosses, posts? upper left, upper right, lower left, "
    "lower right, middle, upper, lower, yes, no"
)
TEXTS = [INSTRUCTION_WORDS, IVT_PROMPT, SINGLE_PROMPT, TRACE_WORDS, QUESTION_WORDS]
WORLD_WORDS = [*COLORS, *KINDS, *SIZES, *FRAMES, *MARKS, *RELATED, *SUPERLATIVES]


@functools.cache
def vocabulary_words():
    """All words of the texts above and of the world, each once."""
    return sorted({*re.findall(r"</?think>|[A-Za-z]+", " ".join(TEXTS)), *WORLD_WORDS})


def make_tokenizer():
    """A byte-level BPE: digits single, words whole, Qwen's special tokens and chat layout."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = [*WORLD_WORDS, *RELATIONS]
    corpus = []
    for _ in range(300):
        corpus += [*TEXTS, TRACE_WORDS.lower()]
        corpus += [format_box([rng.randint(0, 1000) for _ in range(4)])]
        corpus += [f"the {a} {b}" for a, b in zip(words, rng.sample(words, len(words)))]
        corpus += [f"{word}, {word}s" for word in words]
        corpus += ["user\n", "assistant\n", "system\n"]
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r'\{"bbox_2d": \[|\d| ?\p{L}+|[^\p{L}\d\s]+ ?|\s+')
    split = pre_tokenizers.Split(pieces, "isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def make_model(tokenizer, layers=5, vision_layers=4):
    """A Qwen3-VL with random weights, of widths that bitsandbytes can quantise (multiples of 64).

    A net this narrow does not leave the plateau from the usual initialisation. Here the matrices
    begin at 0.08; the word embeddings at 1, so that a word is not drowned by the first layer's
    output (the last norm, at 0.1, keeps the tied logits small); every query head of a group equal
    to its key head, so that it begins by attending to what is alike; the gains of the query and
    key norms at 1.5; and the vision tower's position embeddings as sines and cosines of row and
    column, as strong as the content.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    text = dict(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=True,
        rope_parameters={**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    )
    vision = dict(
        depth=vision_layers,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_heads=4,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=WIDTH,
        num_position_embeddings=(SEEN // PATCH) ** 2,
        deepstack_visual_indexes=list(range(1, vision_layers - 1)),
        initializer_range=0.08,
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
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


def make_image_processor():
    """Brings every image to an area of SEEN x SEEN pixels, keeping its shape."""
    from transformers import Qwen2VLImageProcessorPil

    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": SEEN**2, "longest_edge": SEEN**2}
    return Qwen2VLImageProcessorPil(**patches, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
