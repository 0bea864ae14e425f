"""Base models and LoRA adapters: loaded, checked, refused with one clear line."""

import gc
import hashlib
import json
import logging
import os
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common import VLM
from support.running.errors import out_of_memory, stop
from support.running.presets import PRESETS
from support.running.processes import device

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear

SPECIAL_TOKENS = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
AGAIN = "a download may have been cut short: get it again"
MERGED_BYTES = 2**30  # of the weights that are copied while LoRA is part of them


def quiet():
    """No library chatter in normal runs; our own messages are printed, not logged."""
    import transformers

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "peft", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# Base models --------------------------------------------------------------------------------------
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


def fingerprint(vlm):
    """What tells one base model from another: its shape and a hash of its norms.

    4-bit loading leaves the norms as they are. Computed once for each model.
    """
    base = vlm.base
    if not hasattr(base, "base_fingerprint"):
        digest = hashlib.sha256()
        for name, p in base.model.language_model.named_parameters():
            if name.endswith("norm.weight"):
                digest.update(p.detach().to("cpu", torch.bfloat16).float().numpy().tobytes())
        text = base.config.text_config
        base.base_fingerprint = {
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "norms": digest.hexdigest()[:12],
        }
    return base.base_fingerprint


# Adapters -----------------------------------------------------------------------------------------
def lora_config(rank, alpha):
    """LoRA on all attention and MLP projections of the language model (Section 4.1).

    The vision tower stays frozen.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=(
            r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
        ),
    )


def lora_size(preset, phase="sft"):
    """(rank, alpha) of the adapters that a paper's SFT makes in this preset."""
    settings = PRESETS[phase]
    return tuple(getattr(settings[name], preset) for name in ("lora_rank", "lora_alpha"))


def new_adapter(vlm, rank, alpha, name="default"):
    """Puts a LoRA on the model that changes nothing until it is trained.

    PEFT keeps its weights in float32, whatever the base is in.
    """
    from peft import PeftModel, get_peft_model

    quiet()
    if isinstance(vlm.model, PeftModel):
        vlm.model.add_adapter(name, lora_config(rank, alpha))
    else:
        vlm.model = get_peft_model(vlm.model, lora_config(rank, alpha), adapter_name=name)
    vlm.model.train()


def add_adapter(vlm, folder, name):
    """Loads a PEFT adapter folder as `name`, beside those already there, and makes it active.

    It is frozen. One of this name that is there already is not loaded again. Exits when `folder` is
    no adapter, is damaged, does not fit the model or was trained on another base (base.json; a
    folder without it is taken on trust).
    """
    from peft import PeftModel

    quiet()
    if not (isinstance(vlm.model, PeftModel) and name in vlm.model.peft_config):
        load_adapter(vlm, Path(folder), name)
    vlm.model.set_adapter(name)
    for p in vlm.model.parameters():
        p.requires_grad_(False)
    vlm.model.train()  # PEFT has just switched to eval mode; see load_vlm


def load_adapter(vlm, folder, name):
    from peft import PeftModel, get_peft_model_state_dict

    check_adapter(vlm, folder)
    try:
        if isinstance(vlm.model, PeftModel):
            vlm.model.load_adapter(str(folder), adapter_name=name)
        else:
            vlm.model = PeftModel.from_pretrained(vlm.model, str(folder), adapter_name=name)
    except Exception as e:
        if out_of_memory(e):
            raise
        reason = " ".join(str(e).split())[:200]
        stop(f"{folder} does not fit the model loaded ({reason}); give the adapter of this --model")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        there = {key for key in file.keys() if "lora_" in key}
    state = get_peft_model_state_dict(vlm.model, adapter_name=name, save_embedding_layers=False)
    if there != set(state):
        key = sorted(there ^ set(state))[0]
        one = "only one of adapter_config.json and adapter_model.safetensors"
        stop(f"{folder} does not fit the model loaded: {one} speaks of {key}")


def check_adapter(vlm, folder):
    """Stops unless `folder` holds a whole LoRA of this base model."""
    missing = []
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).exists():
            missing.append(file)
    if missing:
        stop(f"{folder} is no adapter folder: {' and '.join(missing)} not there")
    remedy = "train it again, or copy the whole folder again"
    config = read_json(folder / "adapter_config.json", remedy)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        stop(f"{folder / 'adapter_config.json'}: peft_type is {kind}, expected LORA; {remedy}")
    check_weights(folder / "adapter_model.safetensors", remedy)
    if (folder / "base.json").exists():
        then, now = read_json(folder / "base.json", remedy), fingerprint(vlm)
        if then != now:
            stop(
                f"{folder} was trained on another base model: {then}; the one loaded (--model) is "
                f"{now}"
            )


@contextmanager
def using(vlm, adapter):
    """Inside, another adapter is the active one; afterwards the one before it."""
    before = vlm.model.active_adapter
    vlm.model.set_adapter(adapter)
    try:
        yield
    finally:
        vlm.model.set_adapter(before)


@contextmanager
def merged(vlm):
    """Inside, the active LoRA is part of the weights: one product for each projection, not three.

    The same policy up to rounding. Of float32 weights up to MERGED_BYTES alone: bfloat16 would
    round much of LoRA away, and 4-bit weights cannot take it (see `unpacked`). Afterwards the
    weights are what they were to the bit, from a copy: PEFT takes LoRA off by subtraction, which
    drifts.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in vlm.model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers if not layer.disable_adapters]
    is_float32 = all(weight.dtype == torch.float32 for weight in weights)
    if not weights or not is_float32 or sum(weight.nbytes for weight in weights) > MERGED_BYTES:
        yield
        return
    before = [weight.detach().clone() for weight in weights]
    vlm.model.merge_adapter()
    try:
        yield
    finally:
        vlm.model.unmerge_adapter()
        for weight, old in zip(weights, before):
            weight.data.copy_(old)


@contextmanager
def unpacked(vlm):
    """Inside, 4-bit projections that LoRA is active on decode from a copy of their weights in the
    computing type, and LoRA is its two products beside it.

    The same policy up to rounding, without PEFT's and bitsandbytes' work for every token
    (speed/README.md). The copies take 2 bytes a weight, 6.8 GiB of the real model. No gradient
    goes through them. An adapter that is more than A and B (DoRA, a bias, dropout) is left to PEFT.
    Yields whether there are any copies.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    before = {}  # layer -> its own `forward`, if it has one beside its class's
    try:
        for layer in vlm.model.modules():
            if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
                continue
            base = layer.get_base_layer()
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if not isinstance(base, Linear4bit) or not all(is_plain(layer, n) for n in names):
                continue
            loras = [
                (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
                for name in names
            ]
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
            weight = weight.to(base.compute_dtype)
            before[layer] = vars(layer).get("forward")
            layer.forward = partial(project, weight=weight, bias=base.bias, loras=loras)
        yield bool(before)
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward:
                layer.forward = forward


def is_plain(layer, name):
    """Whether an adapter adds B(A(x)) times a number to this layer, and nothing else."""
    has_bias = layer.lora_B[name].bias is not None
    drops = not isinstance(layer.lora_dropout[name], torch.nn.Identity)
    return not (has_bias or drops or name in layer.lora_variant)


def project(x, weight, bias, loras):
    """x [..., in] -> [..., out]. loras: (A [rank, in], B [out, rank], alpha / rank) of each."""
    out = linear(x, weight, bias)
    for a, b, scale in loras:
        out = out + (linear(linear(x.to(a.dtype), a), b) * scale).to(out.dtype)
    return out


def load_with_adapter(args, folder=None):
    """The base model with the adapter in `folder`, or as it is (None), for evaluation."""
    vlm = load_vlm(args)
    if folder:
        add_adapter(vlm, folder, "policy")
    return vlm
