"""Base models: loaded, checked, refused with one clear line."""

import gc
import logging
import os
import re
import warnings

from common import VLM, encode_images
from support.running.errors import explained, stop, verify
from support.running.processes import device

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
)

SPECIAL_TOKENS = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def quiet():
    """No library chatter in normal runs; our own messages are printed, not logged."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "peft", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


quiet()  # before peft is imported: bitsandbytes, which comes with it, chatters too


def load_vlm(args, name=None):
    """A base checkpoint as a VLM; no code of the checkpoint is run.

    name: a folder or hub id with safetensors (default: --model). All weights are frozen. Of what
    PEFT's `prepare_model_for_kbit_training` does beside that, norms stay in bf16, since Qwen3-VL's
    compute in float32 whatever they are stored in, and inputs need no gradient, since checkpointing
    is not reentrant. The vision tower and the output layer are not quantised. Attention is
    PyTorch's SDPA: the flash-attn package's kernel takes padding at the left alone, and a rollout
    pads inside the cache. Exits when the checkpoint is damaged or of another kind.
    """
    free_memory()
    name = name or args.model
    check_kind(name, args.quantize)
    with loading(f"--model {name}", "tokenizer.json, tokenizer_config.json, chat_template.jinja"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_tokenizer(tokenizer)
    dtype = getattr(torch, args.dtype)
    options = {}
    if args.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "model.visual"],
        )
    with loading(f"--model {name}", "config.json and *.safetensors"):
        model, report = Qwen3VLForConditionalGeneration.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            device_map={"": device()},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            **options,
        )
        # Without this, what the files lack would stay random, in silence
        for kind, fault in (("mismatched_keys", "another shape"), ("missing_keys", "no value")):
            keys = sorted(map(str, report[kind]))
            verify(not keys, f"{len(keys)} weights have {fault}: {keys[:1]}")
    model.requires_grad_(False)
    if args.checkpointing == "on":
        # The name in transformers 5.5, then the later one
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # Train mode throughout: there is no dropout to switch off, and on some CPUs bitsandbytes
    # repacks a 4-bit layer that runs in eval mode, after which its gradients are wrong.
    model.train()
    with loading(f"--model {name}", "(pre)processor_config.json and generation_config.json"):
        # By its class: Qwen3-VL's own processor, and early AutoImageProcessors, need torchvision.
        processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        smallest = min(processor.size["shortest_edge"], args.max_pixels)
        processor.size = {"shortest_edge": smallest, "longest_edge": args.max_pixels}  # areas
        check_processor(processor, model.config.vision_config)
        vlm = VLM(model, tokenizer, processor, args.checkpointing == "on")
        verify({*map(type, vlm.turn_ends)} == {int}, "eos_token_id is no token")
        encode_images(vlm, [Image.new("RGB", (64, 64))])  # odd settings raise here, not later
    return vlm


def free_memory():
    """What nobody holds any more goes back to the device now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def loading(what, files):
    """`explained` around the libraries' own loading, with the files to look at."""
    return explained(f"{what} cannot be loaded", f"look at its {files}, or get it again")


def check_kind(name, quantize, flag="--model"):
    """Stops unless a folder or hub id is a Qwen3-VL by its config.json, with weights that are not
    quantised otherwise than --quantize says, before its weights are read, or fetched."""
    if not os.path.isdir(name) and (name.startswith((".", "/")) or name.count("/") != 1):
        example = "Qwen/Qwen3-VL-4B-Instruct"
        stop(f"{flag} {name}: no such folder, and not a hub id such as {example}")
    with loading(f"{flag} {name}", "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        ready = dict(getattr(config, "quantization_config", None) or {})
    if config.model_type != "qwen3_vl":
        stop(f"{flag} {name}: its model_type is {config.model_type}; a qwen3_vl is expected")
    if ready and (quantize, ready.get("bnb_4bit_quant_type")) != ("nf4", "nf4"):
        stop(f"{flag} {name}: quantised already, not as --quantize {quantize}; give its original")


def check_tokenizer(tokenizer):
    """That it has the tokens of pictures; that its chat template gives a picture, then words, once
    each, and opens no reasoning, as a Thinking model's does: each step is to open its own."""
    for token in SPECIAL_TOKENS:
        known = tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)
        verify(known, f"no token {token}; a Qwen3-VL is expected")
    picture, words = "<|vision_start|><|image_pad|><|vision_end|>", "what to find"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    turn = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    found = re.findall(f"{re.escape(picture)}|{words}|</?think>", turn)
    expected = "expected a picture and words, once, and no <think> (an Instruct model)"
    verify(found == [picture, words], f"{expected}; the chat template makes {found[:4]}")


def check_processor(processor, vision):
    """That it makes patches of the size that the vision tower takes."""
    given = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    needed = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    verify(given == needed, f"patches, merges and frames {given}, in config.json {needed}")
