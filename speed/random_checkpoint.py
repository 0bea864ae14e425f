"""A checkpoint with the dimensions of Qwen3-VL-4B-Instruct and random weights.

    python -m speed.random_checkpoint --out runs/random_4b

The time of a pass and its memory do not depend on what the weights are; --model takes them
(docs/paper_preset.md). They write nonsense: each step is as long as --max-tokens, without a box.
"""

import argparse
from pathlib import Path

from speed.work import CONFIGS, VOCABULARY, random_model
from support.model.loading import quiet

import torch

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
parser.add_argument("--config", choices=CONFIGS, default="4b", help="of the random weights (4b)")
args = parser.parse_args()
quiet()
text, vision = CONFIGS[args.config]
model, *others = random_model(text, vision, VOCABULARY, torch.bfloat16)
for part in (model, *others):  # tokenizer and image processor
    part.save_pretrained(args.out)
count = sum(p.numel() for p in model.parameters()) / 1e9
print(f"{args.out}: {count:.2f} billion parameters in bfloat16")
