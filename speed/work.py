"""What the benchmark is measured on: a model with two adapters, images, and texts."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common import VLM
from speed.measure import Rates
from support.data.samples import load_image, read_samples
from support.model.adapters import add_adapter, lora_size, new_adapter
from support.model.checkpoints import best_adapter
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.flags import EMBEDDED, ROOT, check_path
from support.running.presets import PRESETS
from support.running.processes import device
from toy.model import make_image_processor, make_tokenizer
from toy.world import make_samples

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

# (language model, vision tower) of a Qwen3-VL; "4b" is Qwen3-VL-4B-Instruct's published config
CONFIGS = {
    "small": (
        dict(
            hidden_size=512,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=1536,
            vocab_size=4096,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[12, 10, 10],
                mrope_interleaved=True,
            ),
        ),
        dict(
            depth=4,
            hidden_size=128,
            intermediate_size=512,
            num_heads=2,
            out_hidden_size=512,
            deepstack_visual_indexes=[0, 1, 2],
        ),
    ),
    "4b": (
        dict(
            hidden_size=2560,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            vocab_size=151936,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[24, 20, 20],
                mrope_interleaved=True,
            ),
        ),
        dict(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=16,
            out_hidden_size=2560,
            deepstack_visual_indexes=[5, 11, 17],
        ),
    ),
}
# Of the training rows, in any configuration: its logits are most of an update's memory
VOCABULARY = 151_936


@dataclass
class Work:
    """What the rows are measured on."""

    vlm: VLM  # of the rows that decode
    trainee: VLM  # of those that train
    images: list  # PIL
    texts: list  # one for each image
    tokens: int  # the most that a step may have
    repeats: int
    sizes: list  # numbers of prompts that are decoded together
    alone: int  # how many samples row 3 decodes one after the other
    rates: Rates | None = None


def random_model(text, vision, vocabulary, dtype):
    """(a Qwen3-VL with random weights, the toy's tokenizer, an image processor as the real one's).

    text, vision: as in CONFIGS.
    """
    tokenizer = make_tokenizer()
    processor = make_image_processor()
    processor.patch_size = 16
    processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2**20}
    config = Qwen3VLConfig(
        text_config=dict(
            text,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            initializer_range=1.2 / text["hidden_size"] ** 0.5,  # large: greedy words differ
        ),
        vision_config=dict(
            vision,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=2304,
        ),
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device()):
        model = Qwen3VLForConditionalGeneration(config)
    torch.set_default_dtype(default)
    return model, tokenizer, processor


def random_vlm(text, vision, vocabulary, dtype, checkpointing=False):
    """`random_model` as a VLM, with two LoRAs as GRPO has them."""
    model, tokenizer, processor = random_model(text, vision, vocabulary, dtype)
    if checkpointing:  # in newer versions of transformers the name is the first one
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    vlm = VLM(model.requires_grad_(False).train(), tokenizer, processor, checkpointing)
    rank = text["hidden_size"] // 40  # 64 for the real model
    for adapter in ("reference", "policy"):
        new_adapter(vlm, rank, 2 * rank, adapter)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:  # begins at zero, where no adapter differs from another
            torch.nn.init.normal_(p, std=0.02)
    vlm.model.set_adapter("policy")
    return vlm


def random_work(args, count):
    """Random weights of --config, and images of 640 x 480 pixels, which are 300 image tokens."""
    dtype = getattr(torch, args.dtype)
    text, vision = CONFIGS[args.config]
    trainee = random_vlm(text, vision, VOCABULARY, dtype, args.checkpointing == "on")
    vlm = trainee
    if text["vocab_size"] != VOCABULARY:
        vlm = random_vlm(text, vision, text["vocab_size"], dtype)
    pixels = np.random.default_rng(0).integers(0, 255, (count, 30, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(p).resize((640, 480), Image.BICUBIC) for p in pixels]
    text = "the large red circle that is to the left of the small blue star"
    texts = [f"{text} {i}" for i in range(count)]
    return Work(vlm, trainee, images, texts, args.tokens, args.repeats, args.sizes, alone=1)


def work_of_run(args, count):
    """The model, the best adapter and the first test samples of a trained run."""
    check_path("--run", args.run, "folder")
    run = Path(args.run)
    adapter = best_adapter(run)
    if adapter is None:
        stop(f"--run {run}: no adapter in it; first run: python sft.py --out {run}")
    data = run / "data"
    samples = read_samples(data / "test.jsonl", f"python make_data.py --out {run}")[:count]
    preset = "paper"
    if args.model == EMBEDDED:
        args.model = str(ROOT / EMBEDDED)
        preset = "toy"
    args.max_pixels = getattr(PRESETS["all"]["max_pixels"], preset)
    vlm = load_vlm(args)
    for name in ("reference", "policy"):
        add_adapter(vlm, adapter, name)
    images = [load_image(sample, data) for sample in samples]
    texts = [sample["expression"] for sample in samples]
    return Work(vlm, vlm, images, texts, args.tokens, args.repeats, args.sizes, alone=count)


def toy_vlm(adapters=()):
    """The toy's base as its preset loads it, with new adapters of the preset's size."""
    names = ("quantize", "dtype", "checkpointing", "max_pixels")
    args = SimpleNamespace(model=str(ROOT / EMBEDDED))
    for name in names:
        setattr(args, name, PRESETS["all"][name].toy)
    vlm = load_vlm(args)
    for name in adapters:
        new_adapter(vlm, *lora_size("toy"), name)
    if adapters:
        vlm.model.set_adapter(adapters[-1])
    return vlm


def toy_samples(folder, count):
    """(images, samples) of new scenes of the toy's world; its files are left in a folder."""
    samples = make_samples(Path(folder), -(-count // 3), 0)[:count]
    return [load_image(sample, Path(folder)) for sample in samples], samples
