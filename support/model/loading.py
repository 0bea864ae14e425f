"""Base models: loaded, checked, refused with one clear line."""

import gc
import json
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

from common import VLM
from support.running.errors import out_of_memory, stop
from support.running.processes import device

import torch
from safetensors import SafetensorError, safe_open

SPECIAL_TOKENS = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


AGAIN = "a download may have been cut short: get it again"


def quiet():
    """No library chatter in normal runs; our own messages are printed, not logged."""
    import transformers

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "peft", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_vlm(args, name=None, quantize=None):
    """A base checkpoint as a VLM; no code of the checkpoint is run.

    name: a folder or hub id with safetensors (default: --model); quantize: "nf4" or "none"
    (default: --quantize). All weights are frozen. Of what PEFT's `prepare_model_for_kbit_training`
    does beside that, norms stay in bf16, since Qwen3-VL's compute in float32 whatever they are
    stored in, and inputs need no gradient, since checkpointing is not reentrant. The vision tower
    and the output layer are not quantised. Attention is PyTorch's SDPA: the flash-attn package's
    kernel takes padding at the left alone, and a rollout pads inside the cache. Exits when the
    checkpoint is damaged or of another kind.
    """
    from transformers import (
        AutoTokenizer,
        BitsAndBytesConfig,
        Qwen2VLImageProcessorPil,
        Qwen3VLForConditionalGeneration,
    )

    quiet()
    free_memory()
    name = name or args.model
    check_checkpoint(name)
    dtype = getattr(torch, args.dtype)
    options = {}
    if (quantize or args.quantize) == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "model.visual"],
        )
    with loading(name, "config.json and *.safetensors"):
        model, report = Qwen3VLForConditionalGeneration.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            device_map={"": device()},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused in our own words
            **options,
        )
    check_report(name, report)
    with loading(name, "tokenizer.json and tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    # By its class: Qwen3-VL's own processor, and early AutoImageProcessors, need torchvision.
    with loading(name, "preprocessor_config.json"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    check_tokenizer(name, tokenizer)
    check_image_processor(name, image_processor, model.config.vision_config)
    model.requires_grad_(False)
    smallest = min(image_processor.size["shortest_edge"], args.max_pixels)
    image_processor.size = {"shortest_edge": smallest, "longest_edge": args.max_pixels}  # areas
    if args.checkpointing == "on":
        # The name in transformers 5.5, then the later one
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # Train mode throughout: there is no dropout to switch off, and on some CPUs bitsandbytes
    # repacks a 4-bit layer that runs in eval mode, after which its gradients are wrong.
    return VLM(model.train(), tokenizer, image_processor, args.checkpointing == "on")


def free_memory():
    """What a model before this one held goes now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def loading(name, files):
    """Around the loading of a part of a checkpoint: whatever fails ends with a message."""
    try:
        yield
    except Exception as e:  # no network, no such repository; damage that no check foresaw
        if out_of_memory(e):
            raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        remedy = ""
        if os.path.isdir(name):
            remedy = f"; look at its {files}, or get them again"
        stop(f"--model {name} cannot be loaded: {reason}{remedy}")


def read_json(path, remedy):
    """The JSON object in a file, a dict; anything else ends the program."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        stop(f"{path} cannot be read as JSON ({e}); {remedy}")
    if not isinstance(content, dict):
        stop(f"{path} holds no JSON object; {remedy}")
    return content


def check_checkpoint(name):
    """Of a folder, its config.json, weights and preprocessor_config.json; of a hub id, its form."""
    folder = Path(name)
    if not os.path.isdir(name):
        if os.path.lexists(name):
            stop(f"--model {name}: is no folder that can be read; give a folder or a hub id")
        if name.startswith((".", "/")) or name.count("/") != 1:
            example = "Qwen/Qwen3-VL-4B-Instruct"
            stop(f"--model {name}: no such folder, and not a hub id such as {example}")
        return
    kind = None
    if (folder / "config.json").exists():
        kind = read_json(folder / "config.json", AGAIN).get("model_type")
    expected = "expected a folder with a config.json of model_type qwen3_vl and *.safetensors"
    if kind != "qwen3_vl":
        stop(f"--model {name}: {expected}; found model_type {kind}")
    weights = weight_files(folder)
    if not weights:
        stop(f"--model {name}: {expected}; found no *.safetensors")
    for file in weights:
        check_weights(file)
    sizes = folder / "preprocessor_config.json"
    if not sizes.exists():
        stop(f"{sizes} is missing; {AGAIN}")
    size = read_json(sizes, AGAIN).get("size")
    if not isinstance(size, dict):
        size = {}
    areas = [size.get("shortest_edge"), size.get("longest_edge")]
    if not all(type(area) is int and area > 0 for area in areas):
        expected = "expected shortest_edge and longest_edge, two areas in pixels"
        stop(f"{sizes}: its size has {areas}; {expected}; {AGAIN}")


def weight_files(folder):
    """The files that hold a folder's weights; one that the index names may be missing."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = read_json(index, AGAIN).get("weight_map")
    if not isinstance(shards, dict):
        stop(f"{index} has no weight_map; {AGAIN}")
    return [folder / str(shard) for shard in sorted(set(map(str, shards.values())))]


def check_weights(file, remedy=AGAIN):
    """Stops unless the header of a safetensors file fits its length."""
    try:
        with safe_open(file, "pt"):
            pass
    except FileNotFoundError:
        stop(f"{file} is missing; {remedy}")
    except (OSError, SafetensorError) as e:
        stop(f"{file} is damaged ({e}); {remedy}")


def check_report(name, report):
    """Of from_pretrained: without this, what the files lack would stay random, in silence."""
    if report["mismatched_keys"]:
        key = sorted(report["mismatched_keys"])[0][0]
        stop(f"--model {name}: {key} in its *.safetensors has another shape than config.json says")
    if report["missing_keys"]:
        keys = sorted(report["missing_keys"])
        lack = f"its *.safetensors lack {len(keys)} weights that config.json speaks of ({keys[0]})"
        stop(f"--model {name}: {lack}; {AGAIN}")


def check_tokenizer(name, tokenizer):
    missing = []
    for token in SPECIAL_TOKENS:
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            missing.append(token)
    if missing:
        lack = f"tokenizer has no {', '.join(missing)}"
        stop(f"{name}: its {lack} (tokenizer.json); a Qwen3-VL checkpoint is expected")
    if not tokenizer.chat_template:
        stop(f"{name}: its tokenizer has no chat template (chat_template.jinja); {AGAIN}")


def check_image_processor(name, processor, vision):
    """Patches of another size would be cut from the image than the vision tower takes."""
    pairs = {
        "patch_size": (processor.patch_size, vision.patch_size),
        "merge_size": (processor.merge_size, vision.spatial_merge_size),
        "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
    }
    for key, (given, needed) in pairs.items():
        if given != needed:
            here = f"preprocessor_config.json says {key} {given}, config.json {needed}"
            stop(f"--model {name}: its {here}; the files are of two models")
