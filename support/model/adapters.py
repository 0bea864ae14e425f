"""LoRA adapters (PEFT folders): made, loaded, saved, and told what base they belong to."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from support.model.loading import loading
from support.running.errors import stop
from support.running.files import agrees, writing
from support.running.flags import command
from support.running.presets import PRESETS
from support.running.processes import RANK

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers.utils.hub import cached_file

ADAPTER_FILES = ("base.json", "adapter_config.json", "adapter_model.safetensors")


def fingerprint(vlm):
    """What tells one base model from another: its shape and hashes of its norms, which 4-bit
    loading leaves as they are, and of a projection, which is another one with LoRA merged."""
    named = vlm.base.model.language_model.named_parameters()
    text = vlm.base.config.text_config
    return {
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "norms": hash_of(p for name, p in named if name.endswith("norm.weight")),
        "projection": hash_of([projection(vlm)]),
    }


def hash_of(tensors):
    """Twelve digits, the same for bfloat16 and float32 of one checkpoint."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:12]


def projection(vlm):
    """A projection that LoRA is trained on, without LoRA: of 4-bit weights from the checkpoint."""
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = vlm.base.get_submodule(name)
    weight = getattr(layer, "base_layer", layer).weight
    if weight.is_floating_point():
        return weight
    find = partial(cached_file, vlm.base.name_or_path, _raise_exceptions_for_missing_entries=False)
    file = find("model.safetensors")
    if not file:  # in several parts
        index = json.loads(Path(find("model.safetensors.index.json")).read_text())
        file = find(index["weight_map"][f"{name}.weight"])
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(f"{name}.weight")


def lora_config(rank, alpha):
    """LoRA on all attention and MLP projections of the language model (Section 4.1)."""
    projections = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=projections)


def lora_size(preset, phase="sft"):
    """(rank, alpha) of the adapters that a paper's SFT makes in this preset."""
    settings = PRESETS[phase]
    return tuple(getattr(settings[name], preset) for name in ("lora_rank", "lora_alpha"))


def new_adapter(vlm, rank, alpha, name="default"):
    """Puts a LoRA on the model, in float32, that changes nothing until it is trained."""
    if isinstance(vlm.model, PeftModel):
        vlm.model.add_adapter(name, lora_config(rank, alpha))
    else:
        vlm.model = get_peft_model(vlm.model, lora_config(rank, alpha), adapter_name=name)
    vlm.model.train()


def policy_and_reference(vlm, folder, size):
    """Two adapters that begin as the same one: the policy, which is active and takes gradients, and
    the frozen reference. folder: of that adapter; None: both are new, of `size` (rank, alpha)."""
    for name in ("policy", "reference"):
        if folder:
            add_adapter(vlm, folder, name)
        else:
            new_adapter(vlm, *size, name)
    vlm.model.set_adapter("policy")  # in PEFT the active adapter is also the one that is trained


def add_adapter(vlm, folder, name):
    """Loads a PEFT adapter folder as `name`, beside those already there, and makes it active.

    It is frozen. One of this name that is there already is not loaded again. Exits when `folder` is
    no adapter, is damaged, does not fit the model or was trained on another base (base.json; a
    folder without it is taken on trust). PEFT itself passes over another base in silence, and over
    keys that only one of the adapter's two files speaks of.
    """
    folder = Path(folder)
    if not (isinstance(vlm.model, PeftModel) and name in vlm.model.peft_config):
        with loading(f"adapter {folder}", "*.json and *.safetensors"):
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                there = {key for key in file.keys() if "lora_" in key}
            then = now = fingerprint(vlm)
            if (folder / "base.json").exists():  # an older one has no projection
                then = {**now, **json.loads((folder / "base.json").read_text())}
            if then != now:
                stop(f"{folder} was trained on another base model: {then}; --model is {now}")
            place = folder.resolve()  # which is never taken for a hub id
            if isinstance(vlm.model, PeftModel):
                vlm.model.load_adapter(place, adapter_name=name)
            else:
                vlm.model = PeftModel.from_pretrained(vlm.model, place, adapter_name=name)
        for key in sorted(there ^ set(adapter_state(vlm.model, name)))[:1]:
            stop(f"adapter {folder}: only one of {' and '.join(ADAPTER_FILES[1:])} speaks of {key}")
    vlm.model.set_adapter(name)
    vlm.model.requires_grad_(False)
    vlm.model.train()  # PEFT has just switched to eval mode; see load_vlm


@contextmanager
def using(vlm, adapter):
    """Inside, another adapter is the active one; afterwards the one before it."""
    before = vlm.model.active_adapter
    vlm.model.set_adapter(adapter)
    try:
        yield
    finally:
        vlm.model.set_adapter(before)


# Files of an adapter ------------------------------------------------------------------------------
def save_adapter(vlm, folder, name=None):
    """The adapter of this name (default: the active one) as a PEFT folder, each file moved into
    place whole, with the fingerprint of its base model, so that it is never put on another one."""
    if RANK:
        return
    folder = Path(folder)
    name = name or vlm.model.active_adapter
    temporary = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        vlm.model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
        # PEFT puts any other adapter than the default into a subfolder
        made = temporary if name == "default" else temporary / name
        (made / "base.json").write_text(json.dumps(fingerprint(vlm)) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for file in ADAPTER_FILES:
            os.replace(made / file, folder / file)
        shutil.rmtree(temporary)


def files_of(folder):
    """Those files of an adapter that are there."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).exists()]


def weights_of(args, before, script, *names):
    """The files of the adapter that a phase before has made in --out. Ends the program where it was
    made with other values of these flags, or is missing: script makes it."""
    agrees(args, before, *names)
    folder = args.out / before
    if not (folder / "adapter_model.safetensors").exists():
        stop(f"{folder} is missing; first run: {command(args, script)}")
    return files_of(folder)


def adapter_state(model, name="default"):
    """name -> tensor, copies on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().clone() for key, value in state.items()}
