"""What every script needs and no paper describes: flags, loading a checkpoint, reading samples, files written whole."""

import argparse
import json
import logging
import math
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import PRESETS, VLM

HERE = Path(__file__).resolve().parent


def stop(message):
    """Ends the program with one clear message instead of a traceback."""
    sys.exit(f"error: {message}")


# ------------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------------
def flags(phase, doc, **extra):
    """Parses the flags of one phase: --preset, --out, --restart, each row of PRESETS["all"] and PRESETS[phase], `extra`.

    extra: name -> (default, help) or (default, help, choices). Prints the resolved configuration. Exits on an unknown
    flag or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=("toy", "paper"), default="toy", help="which column of PRESETS (default: toy)")
    parser.add_argument("--out", help="folder of the run (default: runs/<preset>)")
    parser.add_argument("--restart", action="store_true", help="begin this phase again, dropping its last checkpoint")
    table = {**PRESETS["all"], **PRESETS[phase]}
    choices = {"quantize": ("nf4", "none"), "dtype": ("bfloat16", "float32"), "teacher": ("vlm", "template"),
               "kl": ("paper", "k3")}
    for name, (paper, toy, text) in table.items():
        both = f"{paper}" if paper == toy else f"paper: {paper}, toy: {toy}"
        parser.add_argument("--" + name.replace("_", "-"), type=type(paper), choices=choices.get(name),
                            help=f"{text} ({both})".strip())
    for name, (default, text, *choice) in extra.items():
        kind = dict(type=type(default)) if default is not None else {}
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, choices=choice[0] if choice else None,
                            **kind)
    args = parser.parse_args()
    for name, (paper, toy, _) in table.items():
        if getattr(args, name) is None:
            setattr(args, name, paper if args.preset == "paper" else toy)
    if phase == "grpo" and not all(t.isdigit() for t in args.steps.split()):
        parser.error(f"--steps is {args.steps!r}; expected numbers such as 2, 0 or '2 0'")
    for name, (paper, *_) in table.items():
        low = 0 if name in ("seed", "beta", "entropy", "temperature", "temperature_first", "warmup", "iou_max") else \
            2 if name == "group_size" else 1
        if isinstance(paper, (int, float)) and not getattr(args, name) >= low * (name != "lr"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")
    args.out = Path(args.out or f"runs/{args.preset}")
    if args.model == "toy_base":  # the embedded default lies beside the code, wherever the script is started from
        args.model = str(HERE / "toy_base")
    shown = {k: v for k, v in vars(args).items() if k not in ("preset", "out", "restart")}
    shown["model"] = os.path.relpath(shown["model"]) if os.path.isdir(shown["model"]) else shown["model"]
    print(f"{Path(sys.argv[0]).name} --preset {args.preset} --out {args.out}")
    print("  " + "  ".join(f"{k}={v}" for k, v in shown.items() if v is not None), flush=True)
    return args


def quiet():
    """No library chatter in normal runs; our own messages are printed, not logged."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("transformers", "peft", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------
def load_vlm(args):
    """The base checkpoint as a VLM: any Qwen3-VL folder or hub id, in safetensors; no code of the checkpoint is run.

    Tokenizer and image processor are loaded apart: Qwen3-VL's processor class needs torchvision for videos, which have
    no place here. `size` of the image processor is a pair of pixel areas. Weights are frozen.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, Qwen3VLForConditionalGeneration
    quiet()
    if not os.path.isdir(args.model) and (args.model.startswith((".", "/")) or not args.model.count("/") == 1):
        stop(f"--model {args.model}: no such folder, and not a hub id such as Qwen/Qwen3-VL-4B-Instruct")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=getattr(torch, args.dtype), llm_int8_skip_modules=["lm_head", "model.visual"])
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), use_safetensors=True, attn_implementation="sdpa",
        device_map={"": device()}, **({"quantization_config": four_bit} if args.quantize == "nf4" else {}))
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    missing = [t for t in ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
               if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
    if missing:
        stop(f"{args.model}: its tokenizer has no {', '.join(missing)}; a Qwen3-VL checkpoint is expected")
    processor = AutoImageProcessor.from_pretrained(args.model, backend="pil")
    processor.size = {"shortest_edge": min(processor.size["shortest_edge"], args.max_pixels), "longest_edge": args.max_pixels}
    # Train mode throughout: there is no dropout to switch off, and on some CPUs bitsandbytes repacks a 4-bit layer that
    # runs in eval mode for inference alone, after which its gradients are wrong.
    return VLM(model.train(), tokenizer, processor)


def lora_config(rank, alpha):
    """LoRA on all attention and MLP projections of the language model (Section 4.1); the vision tower stays frozen."""
    from peft import LoraConfig
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
                      target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def add_adapter(vlm, folder, name):
    """Loads a PEFT adapter (safetensors) onto the model, beside those already there, and makes it the active one."""
    from peft import PeftModel
    if isinstance(vlm.model, PeftModel):
        vlm.model.load_adapter(str(folder), adapter_name=name)
    else:
        vlm.model = PeftModel.from_pretrained(vlm.model, str(folder), adapter_name=name)
    vlm.model.set_adapter(name)
    for p in vlm.model.parameters():
        p.requires_grad_(False)
    vlm.model.train()  # PEFT has just switched to eval mode; see load_vlm


# ------------------------------------------------------------------------------------------------------------------
# Files: each is written under a temporary name and moved into place, so that it is there whole or not at all
# ------------------------------------------------------------------------------------------------------------------
def write_text(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path, command):
    """The rows of a file that an earlier phase makes; stops with that phase's command when it is not there."""
    if not Path(path).exists():
        stop(f"{path} is missing; first run: {command}")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            stop(f"{path}, line {number}: not JSON ({e.msg}); repair or remove the line: {line[:80]!r}")
    return rows


def read_samples(path, command):
    """The samples of a .jsonl file, every line checked before any work starts; problems are reported together.

    Fields: id, source, image (path relative to the file), width, height, expression, bbox (float pixels x1 y1 x2 y2).
    """
    samples, problems, seen = read_jsonl(path, command), [], {}
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, dict) and seen.setdefault(str(sample.get("id")), number) != number:
            problems.append(f"{path}, line {number}: id {sample.get('id')!r} is on line {seen[str(sample.get('id'))]} too")
        for problem in sample_problems(sample, Path(path).parent):
            problems.append(f"{path}, line {number}: {problem}")
    if problems:
        more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        stop(f"{len(problems)} problems in {path}:\n" + "\n".join(problems[:20]) + more)
    if not samples:
        stop(f"{path} holds no samples; make it again: {command}")
    return samples


def sample_problems(sample, folder):
    """What is wrong with one sample, a line per problem with field, value and remedy; empty when it is good."""
    if not isinstance(sample, dict):
        return [f"{str(sample)[:60]!r} is not a JSON object; see README, \"Your own data\""]
    kinds = {"id": str, "source": str, "image": str, "width": int, "height": int, "expression": str, "bbox": list}
    problems = [f"{name} is {sample.get(name)!r}; expected {kind.__name__}" for name, kind in kinds.items()
                if not isinstance(sample.get(name), kind)]
    if problems:
        return problems
    width, height, bbox = sample["width"], sample["height"], sample["bbox"]
    if len(bbox) != 4 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in bbox):
        problems.append(f"bbox is {bbox}; expected four finite numbers [x1, y1, x2, y2] in pixels")
    elif not (0 <= bbox[0] < bbox[2] <= width and 0 <= bbox[1] < bbox[3] <= height):
        problems.append(f"bbox {bbox} is empty, inverted or outside the {width} x {height} image; expected [x1, y1, x2, y2]")
    if not sample["expression"].strip():
        problems.append("expression is empty; say what the box shows")
    path = folder / sample["image"]
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                problems.append(f"image {path} is {image.size[0]} x {image.size[1]}; the sample says {width} x {height}")
    except (OSError, Image.DecompressionBombError) as e:
        problems.append(f"image {path} cannot be opened ({e}); repair the path or the file")
    return problems


def load_image(sample, folder):
    with Image.open(Path(folder) / sample["image"]) as image:
        return image.convert("RGB")


class Log:
    """A .jsonl log, a line per event, on the disk at once. `keep` rows stay of an earlier run that is resumed."""

    def __init__(self, path, keep=0):
        self.path, path = Path(path), Path(path)
        rows = path.read_text().splitlines(True)[:keep] if path.exists() else []
        write_text(path, "".join(rows))
        self.rows = len(rows)

    def write(self, **row):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        self.rows += 1


def save_checkpoint(path, **state):
    """All state of a run in one file: adapter, optimizer, random states, place in the data, best so far."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_name(path.name + ".tmp"))
    os.replace(path.with_name(path.name + ".tmp"), path)


def load_checkpoint(path, restart=False):
    """The state, or None when there is none. weights_only: a checkpoint is data, and loading it runs no code."""
    if restart and Path(path).exists():
        Path(path).unlink()
    return torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else None


def save_adapter(model, folder, name="default"):
    """A PEFT adapter folder: adapter_config.json and adapter_model.safetensors, each moved into place whole."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(temporary, selected_adapters=[name])
    if name != "default":  # PEFT puts any other adapter into a subfolder
        temporary = temporary / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        os.replace(temporary / file, folder / file)
    shutil.rmtree(folder.with_name(folder.name + ".tmp"))


def adapter_state(model, name="default"):
    from peft import get_peft_model_state_dict
    return {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}


def minutes(start):
    return f"{(time.time() - start) / 60:.1f} min"
