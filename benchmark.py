"""How fast, against what: each piece of work done the plainest correct way with the public API of transformers, and as this code does it.

    python benchmark.py                                 random weights, small, in the shapes of the real model; on two cores in half an hour
    python benchmark.py --config 4b --dtype bfloat16    the real model's dimensions, for a GPU; nothing is downloaded
    python benchmark.py --run runs/toy                  a trained run: its model, best adapter and test samples (the toy's preset trains
                                                        with --checkpointing off)

The plain way is `generate()` over the whole context, encoded anew at every step, and one forward pass per trajectory with all of
its logits; the update is also compared with the same pass when it is asked for the logits of the targets alone (`logits_to_keep`).
Before anything is timed, both ways have to agree: the same tokens under greedy decoding (in float32), the same log-probabilities,
losses and gradients within a tolerance. Then they take turns, and a row shows the medians. Memory is that of the tensors alive
above what was there before, at the highest, counted in a turn that is not timed. In training, both ways recompute activations in the
backward pass or neither does (`--checkpointing`; on, as in the paper preset).

`floor` is what the work cannot avoid when a token is decoded at a time, at this machine's own measured rates: the arithmetic of
every token that goes through a layer once, and in decoding, where a pass has few tokens, the bytes of the weights and of the
cache if reading them takes longer. LoRA, recomputation, elementwise work, memory traffic between layers and Python are above it.
"""

import argparse
import statistics
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import runtime
from common import (IVT_PROMPT, ImageTokens, VLM, box_complete, continuation_ids, draw_overlay, encode_images, grpo_loss, parse_box,
                    prompt_ids, recompute_activations, rollout, trajectory_logprobs, views, with_lora_merged)

# The layers of a Qwen3-VL; "4b" is Qwen3-VL-4B-Instruct's published config
CONFIGS = {
    "small": (dict(hidden_size=512, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=1536,
                   vocab_size=4096, rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[12, 10, 10], mrope_interleaved=True)),
              dict(depth=4, hidden_size=128, intermediate_size=512, num_heads=2, out_hidden_size=512, deepstack_visual_indexes=[0, 1, 2])),
    "4b": (dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=9728,
                vocab_size=151936, rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)),
           dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560, deepstack_visual_indexes=[5, 11, 17])),
}
VOCABULARY = 151_936  # of the training rows, in any configuration: its logits are most of an update's memory


# ------------------------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------------------------
def random_vlm(text, vision, vocabulary, dtype, device, rank, checkpointing=False):
    """A Qwen3-VL of these dimensions with random weights, the toy's tokenizer, and a LoRA as the phases train it."""
    import toy
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer, processor = toy.make_tokenizer(), toy.make_image_processor()
    processor.patch_size, processor.size = 16, {"shortest_edge": 32 * 32, "longest_edge": 2 ** 20}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    config = Qwen3VLConfig(text_config=dict(text, vocab_size=vocabulary, tie_word_embeddings=True, initializer_range=1.2 / text["hidden_size"] ** 0.5),
                           tie_word_embeddings=True, **ids,  # large enough that greedy words differ
                           vision_config=dict(vision, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304))
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration(config)
    torch.set_default_dtype(default)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm = VLM(model.requires_grad_(False).train(), tokenizer, processor, checkpointing)
    for adapter in ("reference", "policy"):
        runtime.new_adapter(vlm, rank, 2 * rank, adapter)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:  # begins at zero, where no adapter differs from another
            torch.nn.init.normal_(p, std=0.02)
    vlm.model.set_adapter("policy")
    return vlm


def plain_inputs(vlm, rows):
    """Rows of (ids, PIL images) -> the arguments of the model's own forward pass, padded on the left as generate() wants it."""
    longest, device = max(len(ids) for ids, _ in rows), vlm.base.device
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in rows], device=device)
    real = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device)
    images = vlm.image_processor(images=[image for _, images in rows for image in images], return_tensors="pt")
    return dict(input_ids=ids, attention_mask=real, mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(),
                pixel_values=images["pixel_values"].to(device, vlm.base.dtype), image_grid_thw=images["image_grid_thw"].to(device))


def size_in_tokens(vlm, image):
    """An ImageTokens without content, for the number of placeholders."""
    size = vlm.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0, 1:]
    return ImageTokens(None, [], *(int(v) // vlm.base.config.vision_config.spatial_merge_size for v in size))


def last_valid(boxes):
    return next((box for box in boxes[::-1] if box), None)


@torch.no_grad()
def plain_rollout(vlm, images, expressions, steps, max_tokens, prompt=IVT_PROMPT, group_size=1, temperatures=(0.0, 0.0)):
    """The loop of Section 3.1 with generate(): at each step all images and all tokens so far go through the model again.

    Returns (ids, images, targets, boxes) per trajectory. A step ends as in `rollout`.
    """
    eot, rows = vlm.token("<|im_end|>"), []
    recompute_activations(vlm)
    for image, expression in zip(images, expressions):
        ids = prompt_ids(vlm, size_in_tokens(vlm, image), prompt.format(expression=expression))
        rows += [(list(ids), [image], [], []) for _ in range(group_size)]
    for t in range(steps + 1):
        for ids, seen, _, boxes in rows if t else ():
            seen.append(draw_overlay(seen[0], last_valid(boxes)))
            ids += continuation_ids(vlm, size_in_tokens(vlm, seen[-1]))
        batch, temperature = plain_inputs(vlm, [row[:2] for row in rows]), temperatures[min(t, 1)]
        start = batch["input_ids"].shape[1]

        def done(ids, scores, **_):
            return torch.tensor([box_complete(vlm.tokenizer.decode(row[start:])) for row in ids], device=ids.device)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        out = vlm.base.generate(**batch, max_new_tokens=max_tokens, eos_token_id=eot, pad_token_id=eot, stopping_criteria=[done],
                                suppress_tokens=[vlm.base.config.image_token_id], **sampling)
        for (ids, _, targets, boxes), new in zip(rows, out[:, start:].tolist()):
            text = ""
            for token in new:
                targets.append(token)
                if token == eot:
                    break
                ids.append(token)
                text += vlm.tokenizer.decode([token])
                if box_complete(text):
                    break
            boxes.append(parse_box(text))
    return rows


def plain_logprobs(vlm, trajectory, images, keep=False):
    """[M] log-probabilities and entropies of one trajectory: the model's own forward pass over it. keep: logits at the targets alone."""
    at = torch.tensor(trajectory.predictor, device=vlm.base.device)                              # [M]
    recompute_activations(vlm)
    logits = vlm.base(**plain_inputs(vlm, [(trajectory.ids, images)]), use_cache=False, **({"logits_to_keep": at} if keep else {})).logits[0]
    logits = (logits if keep else logits[at]).float()                                            # [M, V]
    logprobs = logits.index_fill(-1, torch.tensor([vlm.base.config.image_token_id], device=at.device), -1e30).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(trajectory.target, device=at.device)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def plain_update(vlm, trajectories, images, advantage, keep=False):
    """GRPO's gradient, a trajectory at a time; returns the loss."""
    tokens, total = sum(len(t.target) for t in trajectories), 0.0
    vlm.model.zero_grad()
    for trajectory, seen, a in zip(trajectories, images, advantage):
        with torch.no_grad():
            vlm.model.set_adapter("reference")
            reference, _ = plain_logprobs(vlm, trajectory, seen, keep)
            vlm.model.set_adapter("policy")
        logprob, entropy = plain_logprobs(vlm, trajectory, seen, keep)
        loss = grpo_loss(logprob, reference, torch.full_like(logprob, a), entropy, 0.04, 0.01)[0] / tokens
        loss.backward()
        total += loss.item()
    return total


def our_update(vlm, trajectories, advantage, batch_size):
    """As grpo.py does it; the image tokens are those of the rollout."""
    tokens, total = sum(len(t.target) for t in trajectories), 0.0
    vlm.model.zero_grad()
    for i in range(0, len(trajectories), batch_size):
        batch = trajectories[i:i + batch_size]
        with torch.no_grad():
            vlm.model.set_adapter("reference")
            reference, _ = trajectory_logprobs(vlm, batch)
            vlm.model.set_adapter("policy")
        logprob, entropy = trajectory_logprobs(vlm, batch)
        of_token = torch.tensor([a for a, t in zip(advantage[i:], batch) for _ in t.target]).to(logprob)
        loss = grpo_loss(logprob, reference, of_token, entropy, 0.04, 0.01)[0] / tokens
        loss.backward()
        total += loss.item()
    return total


def plain_sft(vlm, trajectories, images):
    """The model's own loss on labels, over the batch. A last target that is no part of the sequence is put behind it."""
    rows = [(t.ids + t.target[-1:] * (t.predictor[-1] == len(t.ids) - 1), seen) for t, seen in zip(trajectories, images)]
    batch = plain_inputs(vlm, rows)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (ids, _), t in zip(labels, rows, trajectories):
        row[[len(row) - len(ids) + p + 1 for p in t.predictor]] = torch.tensor(t.target, device=row.device)
    vlm.model.zero_grad()
    recompute_activations(vlm)
    loss = vlm.base(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item()


def our_sft(vlm, trajectories, images):
    """As sft.py does it, vision tower included."""
    vlm.model.zero_grad()
    counts = [len(seen) for seen in images]
    shown = iter(encode_images(vlm, [image for seen in images for image in seen]))
    for trajectory, n in zip(trajectories, counts):
        trajectory.images = [next(shown) for _ in range(n)]
    loss = -trajectory_logprobs(vlm, trajectories)[0].mean()
    loss.backward()
    return loss.item()


# ------------------------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------------------------
class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that PyTorch's operations make while it is in force: those alive now, and the most there were.
    What an operation takes for itself while it runs is not in it."""
    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            place, size = storage.data_ptr(), storage.nbytes()
            if size and place not in old | self.alive:  # no view of something else
                self.alive.add(place)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, place, size)
        return out

    def gone(self, place, size):
        self.alive.discard(place)
        self.now -= size


def most_bytes(work):
    """Memory of one call above what was there before, at its highest."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Tally() as tally:
        work()
    return tally.most


def seconds(work):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(ways, repeats):
    """name -> function: in turn; name -> (median seconds, bytes). The first call of each, whose memory is counted, is not timed."""
    most = {name: most_bytes(work) for name, work in ways.items()}
    turns = [{name: seconds(work) for name, work in ways.items()} for _ in range(repeats)]
    return {name: (statistics.median(turn[name] for turn in turns), most[name]) for name in ways}


def machine_rates(device, dtype):
    """(arithmetic per second of a large matrix product, bytes per second of reading a large tensor once): the best of 20 each."""
    n, best = 1024 if device.type == "cpu" else 8192, [0.0, 0.0]
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    big = torch.ones(2 ** 26, device=device, dtype=dtype)
    for _ in range(20):
        best[0] = max(best[0], 2 * n ** 3 / seconds(lambda: torch.mm(a, b, out=c)))
        best[1] = max(best[1], big.nbytes / seconds(big.sum))
    return best


# ------------------------------------------------------------------------------------------------------------------
# The floor
# ------------------------------------------------------------------------------------------------------------------
def size_of(module):
    """(parameters, bytes) that a token meets in the module: no embeddings, and no LoRA, which can be merged. 4-bit weights come two to a byte."""
    used = [p for name, p in module.named_parameters() if not any(word in name for word in ("embed_tokens", "pos_embed", "lora_"))]
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in used), sum(p.nbytes for p in used)


def floor(vlm, rates, images=(), prefill=(), decode=(), logits=0):
    """Seconds that a piece of work takes at the machine's rates.

    images: numbers of patches. prefill: (rows, new tokens, tokens held in the cache, how often). decode: (rows, tokens, tokens
    held), a pass for each token of all rows. logits: how many rows of them.
    """
    text, vision, (weights, weight_bytes) = vlm.base.config.text_config, vlm.base.config.vision_config, size_of(vlm.base.model.language_model)
    tower, head = vlm.base.model.visual, vlm.base.lm_head.weight
    mergers = size_of(tower.merger)[0] + size_of(tower.deepstack_merger_list)[0]  # they see a token for every 2 x 2 patches
    patch = size_of(tower)[0] - mergers + mergers / vision.spatial_merge_size ** 2
    pair = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers  # a score and a sum, for a pair of tokens
    held_bytes = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * head.element_size()
    work = sum(2 * n * patch + 4 * n ** 2 * vision.hidden_size * vision.depth for n in images) + 2 * logits * head.numel()
    work += sum(times * rows * (2 * new * weights + pair * new * (held + new / 2)) for rows, new, held, times in prefill)
    seconds = work / rates[0]
    for rows, tokens, held in decode:
        for n in range(held, held + tokens):
            seconds += max(rows * (2 * (weights + head.numel()) + pair * n) / rates[0],
                           (weight_bytes + head.nbytes + rows * n * held_bytes) / rates[1])
    return seconds


def lengths(trajectory):
    """Of a rollout's trajectory: (tokens put in, tokens written) at each step."""
    written = [trajectory.step.count(t) for t in range(len(trajectory.boxes))]
    first = [trajectory.predictor[trajectory.step.index(t)] + 1 for t in range(len(written))]    # length of the sequence before step t
    return [(at - (first[t - 1] + written[t - 1] if t else 0), n) for t, (at, n) in enumerate(zip(first, written))]


def patches(vlm, image):
    return image.rows * image.columns * vlm.base.config.vision_config.spatial_merge_size ** 2


def rollout_floor(vlm, rates, rows, group_size=1):
    """Of these trajectories in one batch; the prompt and its image once for a group."""
    images, prefill, decode = [], [], []
    for i, row in enumerate(rows):
        held = 0
        for t, (new, written) in enumerate(lengths(row)):
            if t or i % group_size == 0:
                images.append(patches(vlm, row.images[t]))
                prefill.append((1, new + (t > 0), held - (t > 0), 1))  # with the last token of the step before
            held += new + written
    steps = [lengths(row) for row in rows]
    held = 0
    for t in range(len(steps[0])):
        held += sum(s[t][0] for s in steps) / len(steps)
        decode.append((len(rows), round(sum(s[t][1] for s in steps) / len(steps)) - 1, round(held)))  # the first comes from the prefill
        held += sum(s[t][1] for s in steps) / len(steps)
    return floor(vlm, rates, images, prefill, decode, logits=len(rows) * len(steps[0]))


def training_floor(vlm, rates, rows, images, passes):
    """Of trajectories that go through the model `passes` times; a backward pass through frozen weights is one more."""
    shown = [patches(vlm, image) for row in rows for image in row.images * images]
    return floor(vlm, rates, shown, [(1, len(row.ids), 0, passes) for row in rows], logits=passes * sum(len(row.target) for row in rows))


# ------------------------------------------------------------------------------------------------------------------
# The rows
# ------------------------------------------------------------------------------------------------------------------
def seen_by(trajectory, image):
    """The PIL image that each step of a rollout was shown."""
    return views(image, [last_valid(trajectory.boxes[:t + 1]) for t in range(len(trajectory.boxes))])


def gradient(vlm):
    return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])


def check(vlm, trainee, images, expressions, tokens):
    """Both ways agree, or the program ends with what differs. In bfloat16 near ties fall either way, so tokens may differ there."""
    exact, apart = vlm.base.dtype == torch.float32, {}
    ours = rollout(vlm, images[:2], expressions[:2], 2, tokens)
    theirs = plain_rollout(vlm, images[:2], expressions[:2], 2, tokens)
    same = sum(a.target == b[2] and a.boxes == b[3] for a, b in zip(ours, theirs))
    ours = rollout(trainee, images[:2], expressions[:2], 2, tokens)
    seen, advantage = [seen_by(row, image) for row, image in zip(ours, images)], [1.0, -1.0]
    with torch.no_grad():
        off = torch.cat([(plain_logprobs(trainee, row, shown)[0].cpu() - torch.tensor(row.logprob)).abs() for row, shown in zip(ours, seen)])
    for name, ways in {"GRPO": (lambda: plain_update(trainee, ours, seen, advantage), lambda: our_update(trainee, ours, advantage, 2)),
                       "logits_to_keep": (lambda: plain_update(trainee, ours, seen, advantage, keep=True), lambda: our_update(trainee, ours, advantage, 1)),
                       "SFT": (lambda: plain_sft(trainee, ours, seen), lambda: our_sft(trainee, ours, seen))}.items():
        (loss, there), (our_loss, here) = [(way(), gradient(trainee)) for way in ways]
        apart[name] = abs(loss - our_loss) / abs(loss), ((here - there).norm() / there.norm()).item()
    print(f"the two ways: {same} of 2 greedy trajectories have the same tokens{'' if exact else ' (rounding decides ties)'}; log-probabilities "
          f"differ by {off.mean():.0e}; loss and gradient: " + ", ".join(f"{name} {a:.0e} and {b:.0e}" for name, (a, b) in apart.items()))
    if (exact and same < 2) or off.mean() > (1e-4 if exact else 0.1) or max(max(v) for v in apart.values()) > (5e-3 if exact else 0.1):
        sys.exit("error: the two ways do not agree; nothing is timed")


def say(name, plain, ours, least, note=""):
    """A row: seconds, how many times faster, how far above the floor, memory."""
    return (name, f"{plain[0]:.2f}", f"{ours[0]:.2f}", f"{plain[0] / ours[0]:.2f}", f"{least:.2f}", f"{ours[0] / least:.2f}",
            f"{plain[1] / 2 ** 20:,.0f}", f"{ours[1] / 2 ** 20:,.0f}", note)


HEAD = ("work", "plain, s", "ours, s", "times faster", "floor, s", "ours / floor", "plain, MiB", "ours, MiB", "")


def show(row):
    print("  ".join(f"{value:{width}}" for value, width in zip(row, (36, ">9", ">9", ">12", ">9", ">12", ">11", ">11", ""))).rstrip(), flush=True)


def decoding_rows(vlm, images, expressions, tokens, repeats, rates, sizes, **guesses):
    """Rows 1, 2 and 6. What random weights repeat is chance: there, `guesses` says at_once=1, a token at a time."""
    group = dict(group_size=6, temperatures=(1.0, 0.7))
    ours = lambda: rollout(vlm, images[:1], expressions[:1], 2, tokens, seeds=[0], **group, **guesses)
    measured = take_turns({"plain": lambda: plain_rollout(vlm, images[:1], expressions[:1], 2, tokens, **group), "ours": ours,
                           "merged": lambda: with_lora_merged(plain_rollout)(vlm, images[:1], expressions[:1], 2, tokens, **group)}, repeats)
    least = rollout_floor(vlm, rates, ours(), 6)
    yield say("1. rollout of a group, N = 6, T = 2", measured["plain"], measured["ours"], least)
    yield say("   against generate(), LoRA merged", measured["merged"], measured["ours"], least)
    for n in sizes:
        ours = lambda: rollout(vlm, images[:n], expressions[:n], 2, tokens, **guesses)
        measured = take_turns({"plain": lambda: plain_rollout(vlm, images[:n], expressions[:n], 2, tokens), "ours": ours}, repeats)
        yield say(f"2. rollout of {n} prompts, T = 2", measured["plain"], measured["ours"], rollout_floor(vlm, rates, ours()),
                  f"{n / measured['ours'][0]:.2f} samples/s")
    n = min(4, len(images))
    both = lambda play, **more: [play(vlm, images[:n], expressions[:n], steps, tokens, **more) for steps in (0, 2)]
    ours = lambda: both(rollout, **guesses)
    measured = take_turns({"plain": lambda: both(plain_rollout), "ours": ours}, repeats)
    yield say(f"6. {n} samples single-shot and T = 2", measured["plain"], measured["ours"], sum(rollout_floor(vlm, rates, rows) for rows in ours()),
              f"{n / measured['ours'][0]:.2f} samples/s")


def latency_row(vlm, images, expressions, tokens, repeats, guesses):
    """The samples one after the other: T = 2 against a single-shot answer, which the paper puts at 3x. guesses: whether to measure
    what depends on the text, which takes trained weights."""
    def each(play, steps, **more):
        return lambda: [play(vlm, [image], [expression], steps, tokens, **more) for image, expression in zip(images, expressions)]
    ways = {"plain": each(plain_rollout, 2), "every token": each(rollout, 2, at_once=1), "guesses": each(rollout, 2),
            "guesses, and an end when boxes agree (IoU above 0.8)": each(rollout, 2, agree=0.8)}
    ways = ways if guesses else dict(list(ways.items())[:2])
    measured = take_turns({"plain single": each(plain_rollout, 0), "single": each(rollout, 0, at_once=1), **ways}, repeats)
    base = {name: measured["plain single" if name == "plain" else "single"][0] for name in ways}
    print("3. one sample at a time, T = 2 against its single-shot answer: "
          + "; ".join(f"{name} {measured[name][0] / base[name]:.2f}x" for name in ways), flush=True)


def training_rows(vlm, images, expressions, tokens, repeats, rates):
    """Six sampled trajectories of one prompt in GRPO's update; four of them in SFT's."""
    played = rollout(vlm, images[:1], expressions[:1], 2, tokens, group_size=6, temperatures=(1.0, 0.7), seeds=[0])
    seen, advantage = [seen_by(row, images[0]) for row in played], [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]
    update = {"plain": lambda: plain_update(vlm, played, seen, advantage), "kept": lambda: plain_update(vlm, played, seen, advantage, keep=True),
              "ours": lambda: our_update(vlm, played, advantage, 6), "single": lambda: our_update(vlm, played, advantage, 1)}
    sft = {"plain": lambda: plain_sft(vlm, played[:4], seen[:4]), "ours": lambda: our_sft(vlm, played[:4], seen[:4])}
    update, sft = take_turns(update, repeats), take_turns(sft, repeats)
    least = training_floor(vlm, rates, played, images=False, passes=3)  # reference, forward, backward to the activations
    yield say("4. GRPO update, 6 trajectories", update["plain"], update["ours"], least, "plain: one at a time, ours: in a batch")
    yield say("   likewise", update["plain"], update["single"], least, "one at a time, both")
    yield say("   against logits_to_keep", update["kept"], update["single"], least, "one at a time, both")
    yield say("5. SFT, batch of 4 trajectories", sft["plain"], sft["ours"], training_floor(vlm, rates, played[:4], images=True, passes=2),
              f"{sum(len(row.ids) for row in played[:4]) / sft['ours'][0]:.0f} tokens/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", choices=CONFIGS, default="small", help="dimensions of the random weights (default: small)")
    parser.add_argument("--run", help="a trained run instead: its best adapter and test samples")
    parser.add_argument("--model", default="toy_base", help="with --run: the base model (default: toy_base)")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none", help="with --run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on", help="in training passes (default: on)")
    parser.add_argument("--tokens", type=int, default=60, help="written at each step; with --run at most (default: 60)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8], help="prompts decoded together (default: 1 4 8)")
    args = parser.parse_args()
    runtime.quiet()
    device, dtype = runtime.device(), getattr(torch, args.dtype)
    rates = machine_rates(device, dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, {args.dtype}: {rates[0] / 1e9:,.0f} GFLOP/s, {rates[1] / 1e9:,.1f} GB/s")
    count = max(2, *args.sizes)
    if args.run:
        args.model, args.max_pixels = str(runtime.HERE / "toy_base") if args.model == "toy_base" else args.model, 2 ** 20
        vlm = trainee = runtime.load_vlm(args)
        run = Path(args.run)
        adapter = runtime.best_adapter(run)
        if not adapter:
            runtime.stop(f"{run} has no adapter; first run sft.py")
        for name in ("reference", "policy"):
            runtime.add_adapter(vlm, adapter, name)
        samples = runtime.read_samples(run / "data/test.jsonl", "python make_data.py")[:count]
        images, expressions = [runtime.load_image(s, run / "data") for s in samples], [s["expression"] for s in samples]
    else:
        text, vision = CONFIGS[args.config]
        trainee = random_vlm(text, vision, VOCABULARY, dtype, device, text["hidden_size"] // 40, args.checkpointing == "on")
        vlm = trainee if text["vocab_size"] == VOCABULARY else random_vlm(text, vision, text["vocab_size"], dtype, device, text["hidden_size"] // 40)
        pixels = np.random.default_rng(0).integers(0, 255, (count, 30, 40, 3), dtype=np.uint8)
        images = [Image.fromarray(p).resize((640, 480), Image.BICUBIC) for p in pixels]  # 300 image tokens
        expressions = [f"the large red circle that is to the left of the small blue star {i}" for i in range(count)]
    print(f"{args.run or args.config}: {size_of(vlm.base)[0] / 1e6:,.0f} million parameters without embeddings, {args.tokens} tokens a step, "
          f"medians of {args.repeats}")
    check(vlm, trainee, images, expressions, min(args.tokens, 16))
    show(HEAD)
    guesses = {} if args.run else {"at_once": 1}
    for row in decoding_rows(vlm, images, expressions, args.tokens, args.repeats, rates, args.sizes, **guesses):
        show(row)
    alone = count if args.run else 1
    latency_row(vlm, images[:alone], expressions[:alone], args.tokens, args.repeats, bool(args.run))
    for row in training_rows(trainee, images, expressions, args.tokens, args.repeats, rates):
        show(row)
