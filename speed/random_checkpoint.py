"""A checkpoint with the dimensions of Qwen3-VL-4B-Instruct and random weights.

    python -m speed.random_checkpoint --out runs/random_4b

The time of a pass and its memory do not depend on what the weights are; --model takes them
(docs/your_gpu.md). They write nonsense: each step is as long as --max-tokens, without a box.
"""

import argparse

from support.model.loading import quiet
from support.running.processes import device
from toy.model import make_image_processor, make_tokenizer

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

# (language model, vision tower) of a Qwen3-VL; "4b" is Qwen3-VL-4B-Instruct's published config
CONFIGS = {
    "small": (
        dict(
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=768,
            vocab_size=8192,
        ),
        dict(depth=4, hidden_size=128, intermediate_size=512, num_heads=2),
    ),
    "4b": (
        dict(
            hidden_size=2560,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            vocab_size=151_936,
        ),
        dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16),
    ),
}


def save_random(config, dtype, folder):
    """Writes a checkpoint with random weights, and returns their number. config: a key of CONFIGS.

    Its tokenizer is the toy's, and its image processor as the real one.
    """
    text, vision = CONFIGS[config]
    tokenizer = make_tokenizer()
    processor = make_image_processor()
    processor.patch_size = 16
    processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2**20}
    width = text["hidden_size"]
    unit = text["head_dim"] // 32  # of the rotations of a head 6 are time's, 5 a side's
    whole = Qwen3VLConfig(
        text_config=dict(
            text,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[6 * unit, 5 * unit, 5 * unit],
                mrope_interleaved=True,
            ),
            tie_word_embeddings=True,
            initializer_range=1.2 / width**0.5,  # large: greedy words differ
        ),
        vision_config=dict(
            vision,
            out_hidden_size=width,
            deepstack_visual_indexes=[vision["depth"] * i // 4 - 1 for i in (1, 2, 3)],
        ),
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForImageTextToText.from_config(whole, dtype=dtype)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model.num_parameters()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    out = parser.parse_args().out
    quiet()
    count = save_random("4b", torch.bfloat16, out)
    print(f"{out}: {count / 1e9:.2f} billion parameters in bfloat16")


if __name__ == "__main__":
    main()
