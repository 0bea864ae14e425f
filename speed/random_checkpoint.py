"""A checkpoint with the dimensions of Qwen3-VL-4B-Instruct and random weights.

    python -m speed.random_checkpoint --out runs/random_4b

The time of a pass and its memory do not depend on what the weights are; --model takes them
(docs/your_gpu.md). They write nonsense: each step is as long as --max-tokens, without a box.
"""

import argparse

from support.running.flags import check_path
from support.running.processes import device
from toy.model import BASE

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

TEXT = dict(  # Qwen3-VL-4B-Instruct's published config
    hidden_size=2560,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9728,
    vocab_size=151_936,
    rope_parameters=dict(
        rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True
    ),
    tie_word_embeddings=True,
)
VISION = dict(
    depth=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    out_hidden_size=2560,
    deepstack_visual_indexes=[5, 11, 17],
)


def save_random(folder):
    """Writes the checkpoint in bfloat16 -> how many weights it has. Its tokenizer is the toy's."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    processor = Qwen2VLImageProcessorPil.from_pretrained(BASE)
    processor.patch_size = 16
    processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2**20}
    large = 1.2 / TEXT["hidden_size"] ** 0.5  # so that greedy words differ
    config = Qwen3VLConfig(
        text_config=dict(TEXT, initializer_range=large),
        vision_config=VISION,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    out = parser.parse_args().out
    check_path("--out", out, "new folder")
    print(f"{out}: {save_random(out) / 1e9:.2f} billion parameters in bfloat16")
