"""The recipe of the toy's base: from random weights, on general skills alone.

    python -m toy.recipe.train      all of it; killed, the same command goes on
    torchrun --nproc-per-node 2 -m toy.recipe.train      in two processes: on two cores, quicker

Two stages, Muon on the matrices and AdamW on the rest, everything seeded by the number of the step:

1. The vision tower alone. Each image token is taught the words of the object that it shows,
   against the words' own embeddings, and by linear heads, thrown away after: the object's box,
   the frame that lies on it, and how each frame lies around its object.
2. Conversations: all weights, next-token loss on the answers. Pictures are whole scenes, enlarged
   views, crops, with and without frames; questions are those of lessons.py. Beside it, the last
   token of each question is taught what the question is about (the object's box, the frame's box,
   the answer's words) before the last two layers, by more throw-away heads: without it, words of
   size and place are learnt and colors are not. The first steps hold questions without answers,
   three times as many. Stage 1's loss goes on.

docs/toy_base.md says what was tried, and what came out.
"""

import argparse
import functools
import json
import os
import shutil
import time
from pathlib import Path

from support.model.loading import quiet
from support.running import processes
from support.running.errors import stop
from support.running.files import write_bytes, writing
from support.running.flags import check_path
from support.running.processes import RANK
from toy.model import make_image_processor, make_model, make_tokenizer
from toy.questions import FRAMES, RELATED
from toy.recipe.lessons import ANSWERS, CELLS, WORDS, Batches
from toy.world import MARKS

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AttentionInterface

BASE = Path(__file__).resolve().parents[1] / "base"
DECAY_STEPS = 2600  # the last ones, with falling rates
SAVE_EVERY = 100  # steps; so often a line of the log and a checkpoint are written


# Throw-away heads on the image tokens: name -> width
TOWER_HEADS = {
    "digits": 80,
    "box": 4,
    "frame": len(FRAMES) + 1,
    "frame_digits": 80,
    "frame_box": 4,
    "related": len(FRAMES) * (len(RELATED) + 1),
    "lies": len(FRAMES) * 4,
}
# and on the last token of a question: what it is about, and the answer's words
LAST_HEADS = {
    "digits": 80,
    "box": 4,
    "frame_digits": 80,
    "frame_box": 4,
    "answer": len(ANSWERS),
}


def heads_of(widths, width):
    """One linear layer for each head."""
    return torch.nn.ModuleDict({name: torch.nn.Linear(width, n) for name, n in widths.items()})


def digit_loss(said, digits):
    """said [n, 80], digits [n, 8] (-1: not taught) -> mean cross-entropy; the first digits weigh
    three times the second.
    """
    each = F.cross_entropy(
        said.float().view(-1, 10), digits.reshape(-1), ignore_index=-1, reduction="none"
    )
    each = each.view(-1, 2, 4).mean(2)
    taught = (digits[:, 0] >= 0).float().sum().clamp(min=1)
    return ((3 * each[:, 0] + each[:, 1]) / 4).sum() / taught


def box_loss(said, box, taught):
    """said, box [n, 4] in 0..1, taught [n] -> mean smooth L1 in units of a twentieth of the
    picture.
    """
    each = F.smooth_l1_loss(said.float() * 20, box * 20, reduction="none").mean(-1)
    return (each * taught).sum() / taught.sum().clamp(min=1)


def word_ids(tokenizer, words):
    """The token of each word with a space before it; each is one token."""
    ids = [tokenizer.encode(" " + word, add_special_tokens=False) for word in words]
    assert all(len(one) == 1 for one in ids), ids
    return [one[0] for one in ids]


def answer_ids(tokenizer):
    """[n]: the tokens of the words that answer, with a space before them and without."""
    ids = [
        tokenizer.encode(space + word, add_special_tokens=False)
        for word in ANSWERS
        for space in ("", " ")
    ]
    return torch.tensor([one[0] for one in ids if len(one) == 1])


def tower_loss(embeddings, heads, features, batch):
    """features [tokens, width] of the pictures of a batch -> (loss, {name: its parts}).

    The words of the object that a token shows are read off it by their own embeddings, as in
    SigLIP (arXiv:2303.15343, Section 3.2): that puts a blue object near the word "blue", and
    attention can begin with what is alike.
    """
    label = {name: value.flatten(0, 1) for name, value in batch.items() if name != "patches"}
    features = features.float()
    logits = (
        features @ embeddings.T / 32 - 3.0
    )  # 32: so large a divisor that the words become most of the features
    each = F.binary_cross_entropy_with_logits(logits, label["words"], reduction="none")
    shown = (label["digits"][:, 0] >= 0).float()
    framed = (label["frame_digits"][:, 0] >= 0).float()
    each = (each * label["known"]).sum(0) / len(features)  # of each word
    parts = {"words": each[: -len(MARKS)].sum()}
    parts["marks"] = (
        each[-len(MARKS) :].sum() * len(features) / label["known"][:, -1].sum().clamp(min=1)
    )
    shows = label["words"][:, -len(MARKS) :].sum(1) == 1  # a mark, and where it is legible
    shows &= label["known"][:, -1] > 0
    kind = label["words"][shows, -len(MARKS) :].argmax(1)
    each = F.cross_entropy(logits[shows, -len(MARKS) :], kind, reduction="none")
    parts["mark"] = each.sum() / max(1, len(each))
    said = {name: head(features) for name, head in heads.items()}
    parts["digits"] = digit_loss(said["digits"], label["digits"])
    parts["box"] = box_loss(said["box"], label["box"], shown)
    parts["frame"] = F.cross_entropy(said["frame"], label["frame"])
    parts["frame_digits"] = digit_loss(said["frame_digits"], label["frame_digits"])
    parts["frame_box"] = box_loss(said["frame_box"], label["frame_box"], framed)
    taught = (label["related"] >= 0).float()
    each = F.binary_cross_entropy_with_logits(
        said["related"].view_as(taught), label["related"].clamp(min=0), reduction="none"
    )
    parts["related"] = (each * taught).sum() / taught.sum().clamp(min=1)
    here = taught[..., 0]
    each = F.smooth_l1_loss(
        said["lies"].view_as(label["lies"]), label["lies"], beta=0.2, reduction="none"
    )
    parts["lies"] = (each.mean(-1) * here).sum() / here.sum().clamp(min=1)
    weights = {
        "words": 1.0,
        "marks": 0.5,
        "mark": 4.0,
        "related": 2.0,
        "lies": 3.0,
        "frame": 0.5,
        "box": 0.5,
        "frame_box": 0.5,
    }
    return sum(part * weights.get(name, 0.4) for name, part in parts.items()), parts


@functools.cache
def block_order():
    """[2, patches]: row and column of each patch, in the tower's order of 2 x 2 blocks."""
    grid = np.stack(np.meshgrid(np.arange(2 * CELLS), np.arange(2 * CELLS), indexing="ij"))
    return torch.from_numpy(
        grid.reshape(2, CELLS, 2, CELLS, 2).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    )


def see(visual, patches):
    """The vision tower on n pictures of one size at once: patches [n, P, ...] -> (features [n *
    tokens, D], deepstack).

    transformers runs the attention picture by picture, which on a CPU takes most of the time; a
    test holds the two equal.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    n, count, _ = patches.shape
    order = block_order().to(patches.device)
    width = visual.config.hidden_size
    hidden = F.linear(
        patches, visual.patch_embed.proj.weight.view(width, -1), visual.patch_embed.proj.bias
    )
    hidden = hidden + visual.pos_embed.weight[order[0] * 2 * CELLS + order[1]]
    cos, sin = visual.rotary_pos_emb(hidden, order.T)  # [P, head dim]
    deepstack = []
    for i, block in enumerate(visual.blocks):
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(n, count, 3, attention.num_heads, -1)
        query, key = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
        query, key, value = (
            x.transpose(1, 2) for x in (query, key, qkv[:, :, 2])
        )  # [n, heads, P, head dim]
        mixed = attend(query, key, value)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(n, count, width))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            deepstack.append(merger(hidden.reshape(n * count, width)))
    return visual.merger(hidden.reshape(n * count, width)), deepstack


def attend(query, key, value, mask=None):
    """Attention as two plain products: on a CPU, short as these are, quicker than the fused kernel
    backward. Under autocast all of it, the softmax too, is in its lower precision.

    query, key, value [n, heads, length, head dim]; mask [length, length] is added to the scores.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    with torch.autocast(kind, enabled=False):
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores + mask.to(scores)
        return scores.softmax(-1) @ value


@functools.lru_cache(8)
def causal(length):
    """[length, length]: minus infinity where a token would look ahead."""
    return torch.full((length, length), float("-inf")).triu(1)


def attend_causal(module, query, key, value, attention_mask, **kwargs):
    """`attend` in the form that transformers calls; rows are padded at their end, so that
    causality hides the padding.
    """
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    return attend(query, key, value, causal(query.shape[2])).transpose(1, 2), None


def chat_loss(model, known, tower_heads, last_heads, batch, weights):
    """All losses of a batch of conversations -> (loss, log: {name: (sum, count)})."""
    language, visual = model.model.language_model, model.model.visual
    features, deepstack = see(visual, batch["patches"])
    embeddings = model.get_input_embeddings().weight
    pictures = {name: batch[name] for name in ("patches", *LABELS)}
    dense, parts = tower_loss(embeddings[known["words"]], tower_heads, features, pictures)
    ids = batch["ids"]
    shown = ids == model.config.image_token_id
    embeds = language.embed_tokens(ids)
    asked = int(shown.sum())  # the crops for the tower alone come last
    embeds = embeds.masked_scatter(shown[..., None], features[:asked].to(embeds.dtype))
    kept = {}
    hooks = [
        language.layers[i].register_forward_hook(
            lambda module, inputs, out, i=i: kept.update({i: out})
        )
        for i in (-3, -2)
    ]
    hidden = language(
        inputs_embeds=embeds,
        position_ids=batch["positions"],
        attention_mask=None,
        visual_pos_masks=shown,
        deepstack_visual_embeds=[level[:asked].to(embeds.dtype) for level in deepstack],
        use_cache=False,
    ).last_hidden_state
    for hook in hooks:
        hook.remove()
    row, at = batch["last"].T
    early, late = (F.rms_norm(kept[i][row, at].float(), (hidden.shape[-1],)) for i in (-3, -2))
    told, log = last_loss(last_heads, late, batch["about"])
    told_early, _ = last_loss(last_heads, early, batch["about"])
    scale = {"digits": 2.0, "frame_digits": 1.0, "box": 1.0, "frame_box": 0.5, "answer": 5.0}
    hints = sum(scale[name] * (told[name] + 0.5 * told_early[name]) for name in scale)
    loss = weights["hints"] * hints + weights["dense"] * dense
    log |= {f"tower {name}": (value.item(), 1) for name, value in parts.items()}
    log |= {f"last {name}": (value.item(), 1) for name, value in told.items()}
    if batch["kinds"]:
        text, answers_log = text_loss(model, known, hidden, batch)
        loss = loss + 2 * text
        log |= answers_log
    return loss, log


def text_loss(model, known, hidden, batch):
    """hidden [rows, length, D] -> (next-token loss on the answers, log: how many are exact)."""
    ids, labels = batch["ids"], batch["labels"]
    learnt = labels[:, 1:] != -100
    target = labels[:, 1:][learnt]
    logits = model.lm_head(hidden[:, :-1][learnt]).float()
    each = F.cross_entropy(logits, target, reduction="none")
    # First digits weigh more: to know the object is to know them. So do the words that answer;
    # with the weight on an answer's first token, "the" or "a", they were not learnt.
    previous = ids[:, :-1][learnt]
    begins = F.pad(batch["answer_of"][1:] != batch["answer_of"][:-1], (1, 0), value=True)
    weight = torch.ones_like(each)
    weight[(previous == known["opening"]) | (previous == known["comma"])] = 3.0
    weight[torch.isin(target, known["answers"])] = 6.0
    weight[begins & torch.isin(target, known["counts"])] = 6.0
    weight[begins & (target == known["opening"])] = 0.5
    text = (each * weight).sum() / weight.sum()
    log = {"text": (text.item(), 1)}
    right = (logits.argmax(-1) == target).float()
    first = torch.where(previous == known["opening"], right, 1.0)
    nothing = right.new_ones(len(batch["kinds"]))
    exact = nothing.scatter_reduce(0, batch["answer_of"], right, "amin")
    lead = nothing.scatter_reduce(0, batch["answer_of"], first, "amin")
    for kind, e, d in zip(batch["kinds"], exact.tolist(), lead.tolist()):
        add(log, kind, e)
        if kind in ("find", "frame", "repeat", "again"):
            add(log, kind + " digit", d)
    return text, log


def add(log, name, value):
    """One more value for the mean that the log will show under this name."""
    total, n = log.get(name, (0, 0))
    log[name] = (total + value, n + 1)


def last_loss(heads, final, about):
    """final [questions, D]: the last token of each question in some layer -> ({name: loss} of what
    it is about, log).
    """
    told, log = {}, {}
    for name in ("", "frame_"):
        label = about[name + "digits"]
        taught = label[:, 0] >= 0
        said = heads[name + "digits"](final)
        told[name + "digits"] = digit_loss(said, label)
        told[name + "box"] = box_loss(
            heads[name + "box"](final), about[name + "box"], taught.float()
        )
        near = (said.view(-1, 8, 10).argmax(-1) - label)[taught, :4].abs().amax(1) <= 1
        log[f"seen {name}box"] = (near.float().sum().item(), max(1, len(near)))
    label = about["answer"]
    taught = (label >= 0).float()
    said = heads["answer"](final)
    each = F.binary_cross_entropy_with_logits(said, label.clamp(min=0), reduction="none")
    told["answer"] = (each * taught).sum() / taught.sum().clamp(min=1)
    exact = ((said > 0) == (label > 0))[label[:, 0] >= 0].all(1)
    log["seen answer"] = (exact.float().sum().item(), max(1, len(exact)))
    return told, log


# Optimisation -------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon, whose products are in bfloat16 on every machine; here in float32, since
    a CPU without units for bfloat16 spent most of a step on them.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # those of one shape together: a GPU would wait for its many small products
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 0.05)
                alike.setdefault(weight.shape, []).append(
                    (weight, weight.grad.lerp(momentum, 0.95))
                )
            for (rows, columns), found in alike.items():
                changes = orthogonal(torch.stack([gradient for _, gradient in found]))
                for (weight, _), change in zip(found, changes):
                    weight.sub_(change, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrices):
    """[n, rows, columns] -> as many with singular values near 1: five steps of Newton-Schulz, with
    the numbers of Muon (https://kellerjordan.github.io/posts/muon).
    """
    rows, columns = matrices.shape[1:]
    wide = matrices if rows <= columns else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
    return wide if rows <= columns else wide.mT


def optimizers(groups):
    """groups: (named parameters, Muon rate, AdamW rate). Muon for the matrices, AdamW for
    embeddings, norms, the rest.
    """
    out = []
    for named, muon_rate, adam_rate in groups:
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named if not (p.ndim == 2 and "embed" not in n)]
        if matrices:
            out.append(Muon(matrices, lr=muon_rate))
        if rest:
            out.append(torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0))
    return out


def rate_of(step, total):
    """The learning rate as a share of its peak: rises over 50 steps, falls to 2 percent over the
    last DECAY_STEPS of `total`.

    Until it falls, `total` has no influence: a run may be made longer or shorter while it is
    under way.
    """
    return min(1.0, (step + 1) / 50, max(0.02, (total - step) / DECAY_STEPS))


def quick_dtype():
    """bfloat16 where the CPU has units for its products, else float32: without them a step of the
    tower took 17 s in bfloat16. A PyTorch that cannot tell gets float32, and so does a GPU: its
    time goes into starting many small operations, and autocast adds some.
    """
    if torch.cuda.is_available():
        return "float32"
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if can.get("amx_bf16") or can.get("avx512_bf16") else "float32"


def parts_of(args, tokenizer):
    """{"model", "tower_heads", "last_heads"}: all that is trained, with random weights."""
    torch.manual_seed(args.seed)
    device = processes.device()
    model = make_model(tokenizer).train().to(device)
    AttentionInterface.register("attend_causal", attend_causal)
    model.model.language_model.config._attn_implementation = "attend_causal"
    width = model.config.text_config.hidden_size
    tower_heads = heads_of(TOWER_HEADS, width).to(device)
    last_heads = heads_of(LAST_HEADS, width).to(device)
    return {"model": model, "tower_heads": tower_heads, "last_heads": last_heads}


def all_optimizers(parts):
    """[(optimizer, peak rates of its groups)]."""
    named = list(parts["model"].named_parameters())
    tower = [x for x in named if "visual" in x[0]]
    fast = [x for x in named if "embed_tokens" in x[0] or "q_norm" in x[0] or "k_norm" in x[0]]
    taken = {name for name, _ in tower + fast}
    rest = [x for x in named if x[0] not in taken]
    heads = [*parts["tower_heads"].named_parameters(), *parts["last_heads"].named_parameters()]
    heads = [("embed " + name, p) for name, p in heads]  # so named, they are AdamW's
    made = optimizers(
        [(tower, 0.02, 2e-3), (rest, 0.02, 1.5e-3), (fast, 0, 5e-3), (heads, 0, 2e-3)]
    )
    return [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in made]


def made_with(args):
    """What a run cannot change on its way. --answer-steps it can: see `rate_of`."""
    return {
        name: getattr(args, name) for name in ("seed", "dtype", "tower_steps", "question_steps")
    }


def save(path, step, parts, steppers, args):
    """All that it takes to go on, written whole."""
    states = {name: module.state_dict() for name, module in parts.items()}
    states |= {"step": step, "made": made_with(args)}
    states["optimizers"] = [optimizer.state_dict() for optimizer, _ in steppers]
    write_bytes(path, lambda file: torch.save(states, file))


def restore(path, parts, steppers, args):
    """The step to go on from: 0 where nothing was saved. Exits when it was made otherwise."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    if saved.get("made") != made_with(args):
        stop(
            f"{path} was made with {saved.get('made')}, and now it is {made_with(args)}; give the "
            "same, or another --work"
        )
    for name, module in parts.items():
        module.load_state_dict(saved[name])
    for (optimizer, _), state in zip(steppers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    print(f"going on from step {saved['step']}")
    return saved["step"]


def loss_of(step, batch, parts, known, args):
    """The loss of a step and its log, {name: (sum, count)}."""
    model, chats = parts["model"], step - args.tower_steps
    batch = moved(batch, processes.device())
    with torch.autocast(processes.device().type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        if chats < 0:
            features, _ = see(model.model.visual, batch["patches"])
            embeddings = model.get_input_embeddings().weight[known["words"]]
            loss, told = tower_loss(embeddings, parts["tower_heads"], features, batch)
            return loss, {f"tower {name}": (value.item(), 1) for name, value in told.items()}
        weights = {"hints": 1.5 if chats < args.question_steps else 0.6, "dense": 0.4}
        return chat_loss(model, known, parts["tower_heads"], parts["last_heads"], batch, weights)


def moved(batch, device):
    """The tensors of a batch, and of the dicts in it, on the device."""
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def update(step, parameters, steppers, args):
    """One step of all optimizers, on the gradients of both halves."""
    processes.sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    chats = step - args.tower_steps
    rate = min(1, (step + 1) / 50)
    if chats >= 0:
        rate = rate_of(chats, args.question_steps + args.answer_steps)
    for optimizer, peaks in steppers:
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--folder",
        type=Path,
        default="runs/toy_base/base",
        help="the result (runs/toy_base/base), for --model",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default="runs/toy_base",
        help="log, and where a killed run goes on from (runs/toy_base)",
    )
    parser.add_argument("--tower-steps", type=int, default=800, help="of stage 1 (800)")
    parser.add_argument(
        "--question-steps", type=int, default=400, help="of stage 2, without answers (400)"
    )
    parser.add_argument("--answer-steps", type=int, default=4800, help="and with answers (4800)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=quick_dtype(),
        help="of the products (bfloat16 where it is the CPU and has units for it, else float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    args = parser.parse_args()
    quiet()
    processes.start_processes()
    check_path("--folder", args.folder, "new folder")
    check_path("--work", args.work, "new folder")
    start = time.time()
    tokenizer = make_tokenizer()
    parts = parts_of(args, tokenizer)
    model = parts["model"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens, {args.dtype}")
    on_gpu = processes.device().type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32
    known = {
        "words": word_ids(tokenizer, WORDS),
        "answers": answer_ids(tokenizer),
        "counts": torch.tensor(tokenizer.convert_tokens_to_ids(list("0123"))),
        "opening": tokenizer.encode('{"bbox_2d": [', add_special_tokens=False)[0],
        "comma": tokenizer.encode(", ", add_special_tokens=False)[0],
    }
    known = moved(known, processes.device())
    steppers = all_optimizers(parts)
    parameters = [p for module in parts.values() for p in module.parameters()]
    checkpoint = args.work / "checkpoint.pt"
    first = restore(checkpoint, parts, steppers, args)
    total = args.tower_steps + args.question_steps + args.answer_steps
    halves = processes.share([0, 1])
    batches = torch.utils.data.DataLoader(
        Batches(args, tokenizer),
        batch_size=None,
        sampler=[(step, half) for step in range(first, total) for half in halves],
        # Processes beside this one, that draw while it learns: half a second of a core for a batch.
        # A step takes two cores two seconds, and an H100 a sixth of one.
        num_workers=min(8, os.cpu_count()) if on_gpu else 1,
        prefetch_factor=4,
        pin_memory=on_gpu,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    batches = iter(batches)
    sums = {}
    bar = tqdm(range(first, total), "base", total, unit="step", initial=first, disable=RANK > 0)
    for step in bar:
        model.get_input_embeddings().requires_grad_(step >= args.tower_steps)
        for _ in halves:
            loss, log = loss_of(step, next(batches), parts, known, args)
            (loss / 2).backward()
            for name, (value, n) in log.items():
                a, b = sums.get(name, (0, 0))
                sums[name] = (a + value, b + n)
        update(step, parameters, steppers, args)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            if RANK == 0:
                line = {"step": step + 1}
                line |= {name: round(a / max(1, b), 3) for name, (a, b) in sorted(sums.items())}
                with open(args.work / "log.jsonl", "a") as log_file:
                    log_file.write(json.dumps(line) + "\n")
            sums = {}
            save(checkpoint, step + 1, parts, steppers, args)
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    if RANK:
        return
    temporary = args.folder.with_name(args.folder.name + ".tmp")
    with writing(args.folder):
        model.half().save_pretrained(temporary)  # safetensors
        tokenizer.save_pretrained(temporary)
        make_image_processor().save_pretrained(temporary)
        shutil.rmtree(args.folder, ignore_errors=True)
        temporary.rename(args.folder)
    print(f"{args.folder}, {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
