"""What every script needs and no paper describes: flags, loading a checkpoint, reading samples, files written whole."""

import argparse
import atexit
import datetime
import gc
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

from common import PRESETS, VLM, trajectory_logprobs

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def stop(message):
    """Ends the program with one clear message instead of a traceback."""
    sys.exit(f"error: {message}")


@contextmanager
def writing(path):
    """Around every write: a full disk or a folder without permission ends with a message; the last whole file stays."""
    try:
        yield
    except Exception as e:
        cause = e
        while not isinstance(cause, OSError) and cause.__context__:  # torch.save wraps what the file system said
            cause = cause.__context__
        if not isinstance(cause, OSError) and "IoError" not in str(e):  # safetensors words it so
            raise
        stop(f"{path} cannot be written ({getattr(cause, 'strerror', None) or cause}). What was saved before is whole; make room, or "
             "allow writing there, and the same command goes on")


# ------------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------------
RANGES = {"lr": (1e-9, 1), "warmup": (0, 1), "iou_max": (0, 1), "temperature": (0, 10), "temperature_first": (0, 10), "control_temperature": (0.01, 10), "agree": (0, 1),
          "beta": (0, 100), "entropy": (0, 100), "seed": (0, 2 ** 31 - 1), "group_size": (2, 1000), "steps": (1, 20),
          "max_pixels": (1024, 10 ** 9)}


def flags(phase, doc, **extra):
    """Parses the flags of one phase: --preset, --out, --restart, each row of PRESETS["all"] and PRESETS[phase], `extra`.

    extra: name -> (default, help) or (default, help, choices); False makes a switch, () a list of values. Prints the resolved configuration. Exits on an unknown
    flag or a value of the wrong type or out of range.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=("toy", "paper"), default="toy", help="which column of PRESETS (default: toy)")
    parser.add_argument("--out", help="folder of the run (default: runs/<preset>)")
    parser.add_argument("--restart", action="store_true", help="begin this phase again, dropping its last checkpoint")
    parser.add_argument("--skip-bad", action="store_true", help="go on without the samples that do not pass the checks")
    table = {**PRESETS["all"], **PRESETS[phase]}
    for name, (paper, toy, text, *choices) in table.items():
        both = f"{paper}" if paper == toy else f"paper: {paper}, toy: {toy}"
        parser.add_argument("--" + name.replace("_", "-"), type=type(paper), choices=choices[0] if choices else None,
                            help=f"{text} ({both})".strip())
    for name, (default, text, *choice) in extra.items():
        kind = {"action": "store_true"} if default is False else {"nargs": "+"} if default == () else \
            {"choices": choice[0] if choice else None}
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)
    args = parser.parse_args()
    for name, (paper, toy, *_) in table.items():
        if getattr(args, name) is None:
            setattr(args, name, paper if args.preset == "paper" else toy)
    if phase == "grpo" and not all(t.isdigit() for t in args.steps.split()):
        parser.error(f"--steps is {args.steps!r}; expected numbers such as 2, 0 or '2 0'")
    for name, (paper, *_) in table.items():
        low, high = RANGES.get(name, (1, 1_000_000_000))
        if isinstance(paper, (int, float)) and not low <= getattr(args, name) <= high:  # NaN is in no range
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {low} to {high}")
    start_processes()
    args.out = Path(args.out or f"runs/{args.preset}")
    if args.model == "toy_base":  # the embedded default lies beside the code, wherever the script is started from
        args.model = str(HERE / "toy_base")
    shown = {k: v for k, v in vars(args).items() if k not in ("preset", "out", "restart", "skip_bad")}
    shown["model"] = os.path.relpath(shown["model"]) if os.path.isdir(shown["model"]) else shown["model"]
    print(f"{Path(sys.argv[0]).name} --preset {args.preset} --out {args.out}")
    print("  " + "  ".join(f"{k}={v}" for k, v in shown.items() if v not in (None, False, ())), flush=True)
    lock(args.out)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # nothing has begun that could be lost
    return args


def lock(folder):
    """Refuses a second run on one folder. The system drops the lock with the process, however that ends."""
    if RANK:
        return
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop(f"another run works in {folder}; wait for it to end, or choose another --out")
    lock.file = file  # open until the process ends


def catch_interrupts():
    """From here on Ctrl-C ends the loop of a phase after the update at hand, with a checkpoint."""
    signal.signal(signal.SIGINT, interrupt)


def interrupt(number, frame):
    """A second Ctrl-C ends at once."""
    if interrupt.asked:
        sys.exit(130)
    interrupt.asked = True
    print("\nstopping after this update; Ctrl-C again ends at once", file=sys.stderr, flush=True)


interrupt.asked = False


def interrupted():
    """Whether any process was asked to stop: all of them have to leave at the same update."""
    return any(gather([interrupt.asked]))


def leave_if_interrupted():
    """To be called when everything is saved."""
    if interrupted():
        print(f"stopped; to go on: python {' '.join(a for a in sys.argv if a != '--restart')}")
        sys.exit(130)


def begin(args, name, *inputs, ignore=(), only=None, **more):
    """Writes down what `name` is made with, or, when it has begun before, checks that it is made with the same.

    inputs: files it reads, compared by their hash; ignore: flags that do not change it; only: the flags that do (default: all);
    more: values that are no flags. Exits with the differing values: a run is never continued under another configuration.
    Returns whether it was begun before, with the same.
    """
    path = args.out / f"log/{name}.config.json"
    config = {k: v for k, v in vars(args).items() if k not in ("out", "restart", "save_every", "skip_bad", *ignore) and (not only or k in only)}
    config.update(more)
    if os.path.isdir(args.model):
        config["model"] = f"{os.path.basename(args.model)} {folder_hash(args.model)}"
    for file in map(Path, inputs):
        config[f"{file.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    config = json.loads(json.dumps(config))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    barrier()  # every process has read it; the first one refuses or writes, and when it refuses, torchrun ends the others
    if before and not args.restart:
        differ = [f"  {k}: {before.get(k)} then, {config.get(k)} now" for k in sorted({*before, *config}) if before.get(k) != config.get(k)]
        if differ:
            stop(f"{name} in {args.out} was made otherwise:\n" + "\n".join(differ)
                 + "\ngive the same values, another --out, or --restart to make it anew")
    write_text(path, json.dumps(config, indent=1) + "\n")
    return before == config


def folder_hash(folder):
    """Of a checkpoint folder: its config and its weights, of which those above 64 MB count by name and size alone."""
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("config.json")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode() + (file.read_bytes() if file.stat().st_size < 2 ** 26 else b""))
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------------
# Several processes (`torchrun --nproc-per-node 8 sft.py`): each does its share of every batch; the first one writes
# ------------------------------------------------------------------------------------------------------------------
def start_processes():
    """Joins the processes that torchrun started; alone, does nothing."""
    if WORLD == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")


def device():
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def barrier():
    """Waits until all processes are here: what the first one wrote can be read."""
    if WORLD > 1:
        dist.barrier()


def share(items):
    """This process's part of a list: the parts in the order of the processes are the list."""
    size = -(-len(items) // WORLD)
    return items[RANK * size:(RANK + 1) * size]


def gather(items):
    """The lists of all processes, one after the other, in every process: what they made of their shares, in order."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(parameters):
    """Adds up the gradients of all processes. Each has divided its loss by the tokens of the whole update, so the sum is the
    gradient of the whole update, as one process would have computed it."""
    if WORLD > 1:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def divides(count, flag):
    """Stops unless each process gets the same number: with the same global batch, N processes train as one does."""
    if count % WORLD:
        stop(f"{flag} is {count}, not a multiple of the {WORLD} processes; give a multiple, or start fewer")


# ------------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------------
@contextmanager
def memory_for(samples, advice):
    """Around what may run out of memory: ends with the ids of the samples, their image sizes, and the flags to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        seen = ", ".join(f"{s['id']} ({s['width']} x {s['height']})" for s in samples[:4]) + (", ..." if len(samples) > 4 else "")
        stop(f"out of memory with the samples {seen}; lower {advice}. What was saved before is whole")


def probe(vlm, batch, samples, advice):
    """One forward and backward pass over the largest batch of the run, before any work; prints what it takes and leaves on a GPU."""
    with memory_for(samples, advice):
        (-trajectory_logprobs(vlm, batch)[0].mean()).backward()
        vlm.model.zero_grad()
    memory = ""
    if torch.cuda.is_available():
        peak, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device()).total_memory
        memory = f": peak {peak / 2 ** 30:.1f} of {whole / 2 ** 30:.1f} GiB, before the optimizer's state"
    print(f"largest batch, forward and backward, {len(batch)} x {max(len(t.ids) for t in batch)} tokens{memory}")


def quiet():
    """No library chatter in normal runs; our own messages are printed, not logged."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "peft", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------
def load_vlm(args, name=None, quantize=None):
    """A base checkpoint (name: a folder or hub id, --model if None) as a VLM, in safetensors; no code of the checkpoint is run.

    Tokenizer and image processor are loaded apart: Qwen3-VL's processor class needs torchvision for videos, which have
    no place here. `size` of the image processor is a pair of pixel areas.

    All weights are frozen. Of what PEFT's `prepare_model_for_kbit_training` does beside that, norms stay in bf16, since
    Qwen3-VL's compute in float32 whatever they are stored in, and inputs need no gradient, since checkpointing is not
    reentrant. PEFT keeps the LoRA weights in float32. The vision tower and the output layer are not quantised. Attention is
    PyTorch's SDPA: the flash-attn package's kernel takes padding at the left alone, and a rollout pads inside the cache.
    """
    name = name or args.model
    gc.collect()  # a model that went before goes now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    from transformers import AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, Qwen3VLForConditionalGeneration
    quiet()
    if not os.path.isdir(name) and (name.startswith((".", "/")) or not name.count("/") == 1):
        stop(f"--model {name}: no such folder, and not a hub id such as Qwen/Qwen3-VL-4B-Instruct")
    if os.path.isdir(name):
        config = Path(name) / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.exists() else None
        if kind != "qwen3_vl" or not list(Path(name).glob("*.safetensors")):
            stop(f"--model {name}: expected a folder with a config.json of model_type qwen3_vl and *.safetensors; "
                 + (f"found model_type {kind}" if kind != "qwen3_vl" else "found no *.safetensors"))
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=getattr(torch, args.dtype), llm_int8_skip_modules=["lm_head", "model.visual"])
    try:
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            name, dtype=getattr(torch, args.dtype), use_safetensors=True, attn_implementation="sdpa",
            device_map={"": device()}, **({"quantization_config": four_bit} if (quantize or args.quantize) == "nf4" else {}))
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except OSError as e:  # no network, no such repository, a file that is not there
        stop(f"--model {name} cannot be loaded: {str(e).splitlines()[0]}")
    model.requires_grad_(False)
    missing = [t for t in ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
               if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
    if missing:
        stop(f"{name}: its tokenizer has no {', '.join(missing)}; a Qwen3-VL checkpoint is expected")
    processor.size = {"shortest_edge": min(processor.size["shortest_edge"], args.max_pixels), "longest_edge": args.max_pixels}
    # Train mode throughout: there is no dropout to switch off, and on some CPUs bitsandbytes repacks a 4-bit layer that
    # runs in eval mode for inference alone, after which its gradients are wrong.
    if args.checkpointing == "on":  # each layer's activations are computed again in the backward pass instead of being kept
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return VLM(model.train(), tokenizer, processor, args.checkpointing == "on")


def lora_config(rank, alpha):
    """LoRA on all attention and MLP projections of the language model (Section 4.1); the vision tower stays frozen."""
    from peft import LoraConfig
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
                      target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def new_adapter(vlm, rank, alpha, name="default"):
    """Puts a LoRA on the model that changes nothing until it is trained."""
    from peft import PeftModel, get_peft_model
    if isinstance(vlm.model, PeftModel):
        vlm.model.add_adapter(name, lora_config(rank, alpha))
    else:
        vlm.model = get_peft_model(vlm.model, lora_config(rank, alpha), adapter_name=name)
    vlm.model.train()


def add_adapter(vlm, folder, name):
    """Loads a PEFT adapter (safetensors) onto the model, beside those already there, and makes it the active one.

    Exits when `folder` is no adapter, or one of another base model (base.json; a folder without it is taken on trust).
    """
    from peft import PeftModel
    folder = Path(folder)
    missing = [f for f in ("adapter_config.json", "adapter_model.safetensors") if not (folder / f).exists()]
    if missing:
        stop(f"{folder} is no adapter folder: {' and '.join(missing)} not there")
    if (folder / "base.json").exists():
        made, here = json.loads((folder / "base.json").read_text()), fingerprint(vlm)
        if made != here:
            stop(f"{folder} was trained on another base model: {made}; the one loaded (--model) is {here}")
    if isinstance(vlm.model, PeftModel) and name in vlm.model.peft_config:
        pass  # it is there
    elif isinstance(vlm.model, PeftModel):
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
def write_bytes(path, save):
    """save(file) writes the content of `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if RANK:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_text(path, text):
    write_bytes(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


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


def read_samples(path, command, skip_bad=False):
    """The samples of a .jsonl file, every line and every image checked before any work starts.

    Fields: id, source, image (path relative to the file), width, height, expression, bbox (float pixels x1 y1 x2 y2), and
    optionally key (samples of one key stay on one side of the split). All problems are reported together and end the
    program, each with line, field, value and remedy. With `skip_bad` the good samples are returned, the others counted by
    reason and listed in <file>.skipped.
    """
    from tqdm import tqdm
    path, samples, problems, seen, counts = Path(path), [], [], {}, Counter()
    if not path.exists():
        stop(f"{path} is missing; first run: {command}")
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(tqdm(lines, desc=f"checking {path.name}", unit="sample", leave=False, delay=2), 1):
        sample, found = None, []
        try:
            sample = json.loads(line)  # UTF-8, as JSON is
        except (ValueError, RecursionError) as e:
            found = [("JSON", f"not JSON ({e}); repair or remove the line: {line[:60]!r}")]
        found = found or sample_problems(sample, path.parent)
        if not found and seen.setdefault(sample["id"], number) != number:
            found = [("id", f"id {sample['id']!r} is on line {seen[sample['id']]} too; give each sample its own")]
        if found:
            counts.update({field for field, _ in found})
            problems += [f"{path}, line {number}: {text}" for _, text in found]
        else:
            samples.append(sample)
    if problems and not skip_bad:
        more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        stop(f"{len(problems)} problems in {path} (--skip-bad goes on without these lines):\n" + "\n".join(problems[:20]) + more)
    if problems:
        write_text(path.with_name(path.name + ".skipped"), "\n".join(problems) + "\n")
        print(f"{path}: {len(lines) - len(samples)} of {len(lines)} samples skipped, by field: {dict(counts)}; listed in {path}.skipped")
    if not samples:
        stop(f"{path} holds no samples; make it again: {command}")
    return samples


def sample_problems(sample, folder):
    """What is wrong with one sample: (field, sentence with value and remedy), one per problem; empty when it is good."""
    if not isinstance(sample, dict):
        return [("JSON", f"{str(sample)[:60]!r} is not a JSON object; see README, \"Your own data\"")]
    kinds = {"id": str, "source": str, "image": str, "width": int, "height": int, "expression": str, "bbox": list,
             **({"key": str} if "key" in sample else {})}
    problems = [(name, f"{name} is {str(sample.get(name))[:60]!r}; expected {kind.__name__}") for name, kind in kinds.items()
                if not isinstance(sample.get(name), kind) or isinstance(sample[name], bool)]
    if problems:
        return problems
    width, height, bbox = sample["width"], sample["height"], sample["bbox"]
    if len(bbox) != 4 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in bbox):  # NaN is not below anything
        problems.append(("bbox", f"bbox is {str(bbox)[:80]}; expected four finite numbers [x1, y1, x2, y2] in pixels"))
    elif not (0 <= bbox[0] < bbox[2] <= width and 0 <= bbox[1] < bbox[3] <= height):
        problems.append(("bbox", f"bbox {bbox} is empty, inverted or outside the {width} x {height} image; expected "
                         "[x1, y1, x2, y2] with x1 < x2, y1 < y2"))
    if not sample["expression"].strip() or "<|" in sample["expression"]:
        problems.append(("expression", f"expression is {sample['expression'][:60]!r}; say what the box shows, without special tokens (<|...|>)"))
    if max(width, height) > 150 * min(width, height):
        problems.append(("width", f"image is {width} x {height}; Qwen3-VL's image processor takes sides of 200 to 1 at most; crop it"))
    if any("\ud800" <= c <= "\udfff" for name in ("id", "source", "image", "expression") for c in sample[name]):
        problems.append(("JSON", "a text holds half a surrogate pair, which is no character; repair it"))
    try:
        load_image(sample, folder)
    except ValueError as e:
        problems.append(("image", str(e)))
    return problems


def load_image(sample, folder, upright=False):
    """The sample's image as 8-bit RGB, of the size that the sample says. Raises ValueError that names file and remedy.

    Grey, palette and CMYK images are converted, 16-bit ones scaled down, transparency is laid on white. A photo that a
    camera marked as rotated is turned only if the annotated size says so, or `upright` does. Animations, floating-point images, files
    larger than Pillow's limit against decompression bombs, truncated or foreign ones are refused.
    """
    path, size = Path(folder) / sample["image"], (sample["width"], sample["height"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a second, small picture in it
                    raise ValueError(f"image {path} is an animation; save the frame that the box was drawn on")
                if image.mode == "F":
                    raise ValueError(f"image {path} has floating-point pixels; save it with 8 bits a channel")
                if upright or image.size != size and image.size == size[::-1] and image.getexif().get(0x0112, 1) >= 5:
                    image = ImageOps.exif_transpose(image)
                if image.size != size:
                    raise ValueError(f"image {path} is {image.width} x {image.height}; the sample says {size[0]} x {size[1]}; "
                                     "correct width and height, or the path")
                image.load()  # decodes: a truncated file shows here
                if image.mode.startswith("I"):
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
                if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"image {path} has more pixels than {Image.MAX_IMAGE_PIXELS:,}, Pillow's limit against decompression "
                         "bombs; reduce the image, its size and its box") from None
    except (OSError, SyntaxError, ArithmeticError, EOFError, IndexError, struct.error) as e:  # what Pillow's readers raise
        raise ValueError(f"image {path} cannot be read ({e}); repair the path or the file") from None


class Log:
    """A .jsonl log, a line per event, on the disk at once. `keep` rows stay of an earlier run that is resumed."""

    def __init__(self, path, keep=0):
        self.path = Path(path)
        rows = self.path.read_bytes().split(b"\n")[:keep] if keep else []  # a text may hold other line ends
        write_bytes(self.path, lambda file: file.write(b"".join(row + b"\n" for row in rows)))
        self.rows = len(rows)

    def write(self, **row):
        self.rows += 1
        if not RANK:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}, ensure_ascii=False) + "\n")


def resumable(path, samples, batch_size, name, work, restart=False):
    """The rows of the log `path`, one for each sample in order: those that are there, and those still to be made.

    work: takes a list of (number, sample), this process's share of a batch, and returns their rows, each with the "id" of
    its sample. Of a run that was killed, the whole batches stay whose ids are these samples', so that the others are made
    in the same batches as in a run that never stopped.
    """
    from tqdm import tqdm
    done = 0
    for sample, line in zip(samples, Path(path).read_bytes().split(b"\n") if Path(path).exists() and not restart else ()):
        try:
            if json.loads(line)["id"] != sample["id"]:
                break
        except ValueError:  # cut short
            break
        done += 1
    done = done if done == len(samples) else done // batch_size * batch_size
    log = Log(path, keep=done)
    with tqdm(total=len(samples), initial=done, desc=name, unit="sample", disable=RANK > 0 or done == len(samples)) as bar:
        for i in range(done, len(samples), batch_size):
            catch_interrupts()
            batch = list(enumerate(samples[i:i + batch_size], i))
            with memory_for([sample for _, sample in batch], "--max-pixels or --batch-size"):
                rows = work(share(batch)) if share(batch) else []
            for row in gather(rows):
                log.write(**row)
            bar.update(len(batch))
            leave_if_interrupted()
    barrier()
    return read_jsonl(path, "")


def save_checkpoint(path, **state):
    """All state of a run in one file: adapter, optimizer, place in the data, best so far. What is drawn at random depends on the
    seed and the number of the update or prompt alone, so there is no random state to keep."""
    write_bytes(path, lambda file: torch.save(state, file))


def load_checkpoint(path, restart=False):
    """The state, or None when there is none. weights_only: a checkpoint is data, and loading it runs no code."""
    path = Path(path)
    if restart and not RANK:  # the adapter goes too: a later phase must not take the old one for the new
        path.unlink(missing_ok=True)
        (path.with_suffix("") / "adapter_model.safetensors").unlink(missing_ok=True)
    if restart or not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        stop(f"{path} is no checkpoint of this code ({type(e).__name__}); move it away, or --restart")


def save_adapter(vlm, folder, name="default"):
    """A PEFT adapter folder: adapter_config.json and adapter_model.safetensors, each moved into place whole.

    The fingerprint of the base model goes with it, so that the adapter is never put on another one.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    if RANK:
        return
    with writing(folder):
        vlm.model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
        made = temporary / name if name != "default" else temporary  # PEFT puts any other adapter into a subfolder
        (made / "base.json").write_text(json.dumps(fingerprint(vlm)) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("base.json", "adapter_config.json", "adapter_model.safetensors"):
            os.replace(made / file, folder / file)
        shutil.rmtree(temporary)


def best_adapter(run):
    """The folder of the run's GRPO adapter, else of its SFT adapter, else None."""
    return next((run / name for name in ("grpo", "sft") if (run / name / "adapter_model.safetensors").exists()), None)


def save_merged(args, adapter, folder):
    """Base and adapter as one plain checkpoint folder, in --dtype and never in 4 bits: merging is an addition to the weights."""
    vlm = load_vlm(args, quantize="none")
    add_adapter(vlm, adapter, "policy")
    with writing(folder):
        vlm.model.merge_and_unload().save_pretrained(folder)
        vlm.tokenizer.save_pretrained(folder)
        vlm.image_processor.save_pretrained(folder)


def fingerprint(vlm):
    """What tells one base model from another: its shape, and a hash of its norms, which 4-bit loading leaves as they are."""
    text, digest = vlm.base.config.text_config, hashlib.sha256()
    for name, p in vlm.base.model.language_model.named_parameters():
        if name.endswith("norm.weight"):
            digest.update(p.detach().to("cpu", torch.bfloat16).float().numpy().tobytes())
    return {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "vocab_size": text.vocab_size,
            "norms": digest.hexdigest()[:12]}


def restore_adapter(model, state, name="default"):
    """Gives an adapter the weights that `adapter_state` has taken of it."""
    from peft import set_peft_model_state_dict
    set_peft_model_state_dict(model, state, adapter_name=name)


def adapter_state(model, name="default"):
    from peft import get_peft_model_state_dict
    return {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()}


def unhealthy(recent, healthy, warned):
    """Sentences on the metrics whose mean over `recent` (a list of log rows, 5 at least) has left its range; each once.

    healthy: metric -> (low, high, what to try). warned: the set of metrics already spoken of, which grows.
    """
    out = []
    for key in healthy.keys() - warned if len(recent) >= 5 else ():
        (low, high, advice), mean = healthy[key], sum(row[key] for row in recent) / len(recent)
        if not low <= mean <= high:
            warned.add(key)
            out.append(f"warning: {key} is {mean:.3f} (healthy: {low} to {high}): {advice}")
    return out


def minutes(start):
    return f"{(time.time() - start) / 60:.1f} min"
