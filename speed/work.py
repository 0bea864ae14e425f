"""What the benchmark is measured on: a model with two adapters, images, and texts."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import VLM
from speed.random_checkpoint import save_random
from support.data.samples import load_image, read_samples
from support.model.adapters import policy_and_reference
from support.model.checkpoints import best_adapter
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.flags import EMBEDDED, check_path, model_path
from support.running.presets import PRESETS

import numpy as np
import torch
from PIL import Image


@dataclass
class Work:
    vlm: VLM
    images: list  # PIL
    texts: list  # one for each image


def random_work(args, count):
    """Random weights of --config, and images of 640 x 480 pixels, which are 300 image tokens."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        save_random(args.config, getattr(torch, args.dtype), folder)
        args.max_pixels = 2**20
        vlm = load_vlm(args, folder)
    rank = vlm.base.config.text_config.hidden_size // 40  # 64 for the real model
    policy_and_reference(vlm, None, (rank, 2 * rank))
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:  # begins at zero, where no adapter differs from another
            torch.nn.init.normal_(p, std=0.02)
    pixels = np.random.default_rng(0).integers(0, 255, (count, 30, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(p).resize((640, 480), Image.BICUBIC) for p in pixels]
    text = "the large red circle that is to the left of the small blue star"
    return Work(vlm, images, [f"{text} {i}" for i in range(count)])


def work_of_run(args, count):
    """The model, the best adapter and the first test samples of a trained run."""
    check_path("--run", args.run, "folder")
    run = Path(args.run)
    adapter = best_adapter(run)
    if adapter is None:
        stop(f"--run {run}: no adapter in it; first run: python sft.py --out {run}")
    data = run / "data"
    samples = read_samples(data / "test.jsonl", f"python make_data.py --out {run}")[:count]
    preset = "toy" if args.model == EMBEDDED else "paper"
    args.max_pixels = getattr(PRESETS["all"]["max_pixels"], preset)
    vlm = load_vlm(args, model_path(args.model))
    policy_and_reference(vlm, adapter, None)
    images = [load_image(sample, data) for sample in samples]
    return Work(vlm, images, [sample["expression"] for sample in samples])
