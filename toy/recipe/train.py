"""The recipe of the toy's base: from random weights, on general skills alone.

    python -m toy.recipe.train      all of it; killed, the same command goes on
    torchrun --nproc-per-node 2 -m toy.recipe.train      in two processes: on two cores, quicker

Everything is seeded by the number of the step. Three stages:

1. The vision tower alone. Each image token is taught the words of the object that it shows,
   against the words' own embeddings, and by linear heads, thrown away after: the object's box,
   the frame that lies on it, and how each frame lies around its object.
2. Conversations (lessons.py): all weights, next-token loss on the answers. Beside it, the last
   token of each question is taught what the question is about (the object's box, the frame's box,
   the answer's words) before the last two layers, by more such heads: without it, words of size and
   place are learnt and colors are not. The first steps hold questions without answers, three times
   as many. Stage 1's loss goes on.
3. The language model alone, by its answers alone: single questions in many wordings beside half as
   many conversations, so that a request is followed whatever its wording.
"""

import argparse
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean

from support.model.checkpoints import load_checkpoint, save_checkpoint
from support.model.loading import quiet
from support.running import processes
from support.running.errors import stop
from support.running.files import writing
from support.running.flags import check_path
from toy.model import BASE, WIDTH, make_model
from toy.questions import FRAMES, RELATED
from toy.recipe.lessons import ANSWERS, CELLS, WORDS, Batches
from toy.world import MARKS

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoTokenizer
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

DECAY_STEPS = 2600  # the last ones of stage 2, with falling rates
SAVE_EVERY = 100  # steps; so often a line of the log and a checkpoint are written
# Throw-away heads, name -> width: on the image tokens
TOWER_HEADS = {"digits": 80, "box": 4, "frame": len(FRAMES) + 1, "frame_digits": 80, "frame_box": 4}
TOWER_HEADS |= {"related": len(FRAMES) * (len(RELATED) + 1), "lies": len(FRAMES) * 4}
# and on the last token of a question: what it is about, and the answer's words
LAST_HEADS = {"digits": 80, "box": 4, "frame_digits": 80, "frame_box": 4, "answer": len(ANSWERS)}


# The model, run quickly ---------------------------------------------------------------------------
def see(visual, patches):
    """The vision tower: patches [n, P, ...] -> (features [n * tokens, D], deepstack). transformers
    runs the attention picture by picture, which on a CPU takes most of the time."""
    n, count, _ = patches.shape
    side = 2 * CELLS
    # Where each patch lies, row by row, in the tower's order of 2 x 2 blocks
    places = torch.arange(count, device=patches.device)
    places = places.view(CELLS, 2, CELLS, 2).transpose(1, 2).flatten()
    projection = visual.patch_embed.proj
    hidden = F.linear(patches, projection.weight.view(WIDTH, -1), projection.bias)
    hidden = hidden + visual.pos_embed.weight[places]
    rows_columns = torch.stack([places // side, places % side], 1)
    cos, sin = visual.rotary_pos_emb(hidden, rows_columns)  # [P, head dim]
    deepstack = []
    for i, block in enumerate(visual.blocks):
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(n, count, 3, attention.num_heads, -1)
        query, key = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
        mixed = attend(*(x.transpose(1, 2) for x in (query, key, qkv[:, :, 2])))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(n, count, WIDTH))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            deepstack.append(merger(hidden.reshape(n * count, WIDTH)))
    return visual.merger(hidden.reshape(n * count, WIDTH)), deepstack


def attend(query, key, value, mask=None):
    """Attention as two plain products of [n, heads, length, head dim]: on a CPU, short as these
    are, quicker backward than the fused kernel. Under autocast the softmax too is in bfloat16."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    with torch.autocast(kind, enabled=False):
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores + mask.to(scores)
        return scores.softmax(-1) @ value


def attend_causal(module, query, key, value, attention_mask, **kwargs):
    """`attend` for transformers; rows are padded at their end, where causality hides it."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    length = query.shape[2]
    ahead = torch.full((length, length), float("-inf"), device=query.device).triu(1)
    return attend(query, key, value, ahead).transpose(1, 2), None


def make_parts():
    """All that is trained, with random weights: the model, and the heads."""
    torch.manual_seed(0)
    model = make_model().train()
    AttentionInterface.register("attend_causal", attend_causal)
    model.model.language_model.config._attn_implementation = "attend_causal"
    parts = torch.nn.ModuleDict({"model": model})
    for name, widths in (("tower_heads", TOWER_HEADS), ("last_heads", LAST_HEADS)):
        heads = {head: torch.nn.Linear(WIDTH, n) for head, n in widths.items()}
        parts[name] = torch.nn.ModuleDict(heads)
    return parts.to(processes.device())


# Losses -------------------------------------------------------------------------------------------
def mean_of(each, taught):
    """The mean of each [n, ...] where taught, of the same shape, is 1; 0 where it is so nowhere."""
    return (each * taught).sum() / taught.sum().clamp(min=1)


def box_losses(said, label, name):
    """{name: loss} of the boxes of objects (name "") or frames ("frame_"): of their digits, the
    first of which weigh thrice the second, and of their sides in twentieths of the picture."""
    digits = label[name + "digits"]  # [n, 8]; -1: not taught
    taught = (digits[:, 0] >= 0).float()
    ten = said[name + "digits"].float().view(-1, 10)
    wrong = F.cross_entropy(ten, digits.reshape(-1), ignore_index=-1, reduction="none")
    first, second = wrong.view(-1, 2, 4).mean(2).T
    box, true = said[name + "box"].float() * 20, label[name + "box"] * 20
    off = F.smooth_l1_loss(box, true, reduction="none").mean(-1)
    digit_loss = mean_of((3 * first + second) / 4, taught)
    return {name + "digits": digit_loss, name + "box": mean_of(off, taught)}


def words_loss(said, label):
    """Mean binary cross-entropy of words, label 1, 0, or -1 (not taught)."""
    each = F.binary_cross_entropy_with_logits(said, label.clamp(min=0), reduction="none")
    return mean_of(each, (label >= 0).float())


def tower_loss(embeddings, heads, features, pictures):
    """features [tokens, D] of pictures -> (loss, {name: its parts}). A token's words are read off
    it by their own embeddings, as in SigLIP (arXiv:2303.15343, Section 3.2): that puts a blue
    object near the word "blue", and attention can begin with what is alike."""
    label = {name: value.flatten(0, 1) for name, value in pictures.items() if name != "patches"}
    features = features.float()
    # So large a divisor that the words become most of the features
    logits = features @ embeddings.T / 32 - 3.0
    each = F.binary_cross_entropy_with_logits(logits, label["words"], reduction="none")
    each = (each * label["known"]).sum(0) / len(features)  # of each word
    marks = slice(-len(MARKS), None)
    legible = label["known"][:, -1]
    shows = (label["words"][:, marks].sum(1) == 1) & (legible > 0)
    kind = label["words"][shows, marks].argmax(1)
    kinds = F.cross_entropy(logits[shows, marks], kind, reduction="none").sum()
    said = {name: head(features) for name, head in heads.items()}
    related, lies = said["related"].view_as(label["related"]), said["lies"].view_as(label["lies"])
    off = F.smooth_l1_loss(lies, label["lies"], beta=0.2, reduction="none").mean(-1)
    parts = {
        "words": each[: -len(MARKS)].sum(),
        "marks": each[marks].sum() * len(features) / legible.sum().clamp(min=1),
        "mark": kinds / max(1, len(kind)),
        **box_losses(said, label, ""),
        "frame": F.cross_entropy(said["frame"], label["frame"]),
        **box_losses(said, label, "frame_"),
        "related": words_loss(related, label["related"]),
        "lies": mean_of(off, (label["related"][..., 0] >= 0).float()),
    }
    weights = {"words": 1, "mark": 4, "related": 2, "lies": 3, "digits": 0.4, "frame_digits": 0.4}
    return sum(part * weights.get(name, 0.5) for name, part in parts.items()), parts


def last_loss(heads, final, about):
    """final [questions, D], of each question's last token -> {name: loss} of what it is about."""
    said = {name: head(final) for name, head in heads.items()}
    told = box_losses(said, about, "") | box_losses(said, about, "frame_")
    return told | {"answer": words_loss(said["answer"], about["answer"])}


def text_loss(model, known, hidden, batch):
    """hidden [rows, length, D] -> (next-token loss on the answers, [answers]: 1 where exact)."""
    ids, labels = batch["ids"], batch["labels"]
    learnt = labels[:, 1:] != -100
    target, previous = labels[:, 1:][learnt], ids[:, :-1][learnt]
    begins = (labels[:, :-1] == -100)[learnt]  # an answer
    logits = model.lm_head(hidden[:, :-1][learnt]).float()
    each = F.cross_entropy(logits, target, reduction="none")
    # First digits weigh more: to know the object is to know them. So do the words that answer;
    # with the weight on an answer's first token, "the" or "a", they were not learnt.
    weight = torch.ones_like(each)
    weight[(previous == known["opening"]) | (previous == known["comma"])] = 3.0
    weight[torch.isin(target, known["answers"])] = 6.0
    weight[begins & torch.isin(target, known["counts"])] = 6.0
    weight[begins & (target == known["opening"])] = 0.5
    right = (logits.argmax(-1) == target).float()
    answer_of = begins.cumsum(0) - 1
    exact = right.new_ones(len(batch["kinds"])).scatter_reduce(0, answer_of, right, "amin")
    return (each * weight).sum() / weight.sum(), exact


def known_ids(tokenizer):
    """The tokens that the losses speak of."""
    answers = [space + word for word in ANSWERS for space in ("", " ")]
    ids = [tokenizer.encode(answer) for answer in answers]
    tokens = {
        "words": tokenizer.encode(" ".join(["", *WORDS])),
        "answers": [one[0] for one in ids if len(one) == 1],
        "counts": tokenizer.convert_tokens_to_ids(list("0123")),
        "opening": tokenizer.convert_tokens_to_ids('{"bbox_2d":Ġ['),
        "comma": tokenizer.convert_tokens_to_ids(",Ġ"),
    }
    return {name: torch.tensor(value) for name, value in tokens.items()}


def chat_loss(parts, known, batch, features, deepstack):
    """(loss of what the questions are about, loss of the answers, log) of conversations."""
    model, ids = parts["model"], batch["ids"]
    language = model.model.language_model
    shown = ids == model.config.image_token_id
    embeds = language.embed_tokens(ids)
    asked = int(shown.sum())  # the crops for the tower alone come last
    out = language(
        inputs_embeds=embeds.masked_scatter(shown[..., None], features[:asked].to(embeds.dtype)),
        position_ids=batch["positions"],
        attention_mask=None,
        visual_pos_masks=shown,
        deepstack_visual_embeds=[level[:asked].to(embeds.dtype) for level in deepstack],
        use_cache=False,
        output_hidden_states=True,
    )
    if "about" not in batch:  # stage 3
        text, exact = text_loss(model, known, out.last_hidden_state, batch)
        return 0.0, text, [("text", text.item()), *zip(batch["kinds"], exact.tolist())]
    row, at = batch["last"].T
    layers = [F.rms_norm(x[row, at].float(), x.shape[-1:]) for x in out.hidden_states[-3:-1]]
    early, late = (last_loss(parts["last_heads"], final, batch["about"]) for final in layers)
    scale = {"digits": 2.0, "frame_digits": 1.0, "box": 1.0, "frame_box": 0.5, "answer": 5.0}
    told = sum(scale[name] * (late[name] + 0.5 * early[name]) for name in scale)
    log = [(f"last {name}", value.item()) for name, value in late.items()]
    if not batch["kinds"]:  # questions without answers
        return 1.5 * told, 0.0, log
    text, exact = text_loss(model, known, out.last_hidden_state, batch)
    log += [("text", text.item()), *zip(batch["kinds"], exact.tolist())]
    return 0.6 * told, 2 * text, log


def loss_of(batch, parts, known, dtype):
    """The loss of half a step, and its log: [(name, value)]."""
    device, model = processes.device(), parts["model"]
    batch, known = moved(batch, device), moved(known, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        is_last = "ids" in batch and "about" not in batch  # stage 3: the tower stays as it is
        with torch.set_grad_enabled(not is_last):
            features, deepstack = see(model.model.visual, batch["pictures"]["patches"])
        if is_last:
            _, text, log = chat_loss(parts, known, batch, features, deepstack)
            return text, log
        words = model.get_input_embeddings().weight[known["words"]]
        dense, seen = tower_loss(words, parts["tower_heads"], features, batch["pictures"])
        log = [(f"tower {name}", value.item()) for name, value in seen.items()]
        if "ids" not in batch:  # of the tower alone
            return dense, log
        told, text, chat_log = chat_loss(parts, known, batch, features, deepstack)
        return told + 0.4 * dense + text, log + chat_log


def moved(batch, device):
    """The tensors of a batch, and of the dicts in it, on the device."""
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


# Optimisation -------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon, whose bfloat16 products take most of a step on a CPU without units for
    them; here they are in float32."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)  # of one shape: a GPU would wait for many small products
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 0.05)
                alike[weight.shape].append((weight, weight.grad.lerp(momentum, 0.95)))
            for (rows, columns), found in alike.items():
                changes = orthogonal(torch.stack([gradient for _, gradient in found]))
                for (weight, _), change in zip(found, changes):
                    weight.sub_(change, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrices):
    """[n, rows, columns] with singular values near 1: https://kellerjordan.github.io/posts/muon"""
    rows, columns = matrices.shape[1:]
    wide = matrices if rows <= columns else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
    return wide if rows <= columns else wide.mT


def make_optimizers(parts):
    """Muon for the matrices; AdamW for embeddings, norms, biases and heads, by their peak rate. A
    third for stage 3: AdamW for the language model, whose matrices Muon would turn too far."""
    matrices, rest = [], {2e-3: [], 1.5e-3: [], 5e-3: []}
    for name, p in parts.named_parameters():
        if p.ndim == 2 and "embed" not in name and "heads" not in name:
            matrices.append(p)
        elif any(word in name for word in ("embed_tokens", "q_norm", "k_norm")):
            rest[5e-3].append(p)
        else:
            rest[1.5e-3 if "language_model" in name else 2e-3].append(p)
    muon = Muon([{"params": matrices, "peak": 0.02}], lr=0.02)
    groups = [{"params": weights, "peak": rate} for rate, weights in rest.items()]
    language = {"params": list(parts["model"].model.language_model.parameters()), "peak": 1e-3}
    options = dict(betas=(0.9, 0.98), weight_decay=0.0)
    return muon, torch.optim.AdamW(groups, **options), torch.optim.AdamW([language], **options)


def rate_of(step, steps):
    """The learning rate as a share of its peak: rises over 50 steps of each stage, and falls over
    the last DECAY_STEPS of stage 2, and over stage 3."""
    last = sum(steps[:3])
    if step >= last:
        return min(1, (step - last + 1) / 50, max(0.02, (sum(steps) - step) / steps[3]))
    since = step if step < steps[0] else step - steps[0]
    return min(1, (since + 1) / 50, max(0.02, (last - step) / DECAY_STEPS))


def update(parts, optimizers, rate):
    """A step on the gradients of both halves; rate: the share of the peak rates."""
    parameters = list(parts.parameters())
    processes.sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad()


# A run --------------------------------------------------------------------------------------------
def restore(path, steps, parts, optimizers):
    """The step to go on from: 0 where nothing was saved."""
    saved = load_checkpoint(path)
    if not saved:
        return 0
    if saved["steps"][:3] != steps[:3]:
        stop(f"--steps {steps}: {path} has {saved['steps']}; give the same, or another --out")
    parts.load_state_dict(saved["parts"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    print(f"going on from step {saved['update']}")
    return saved["update"]


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    out = "of the log, of what a killed run goes on from, and of base/, the result (runs/toy_base)"
    steps = "of stage 1, of stage 2 without answers and with them, of stage 3 (800 400 4800 1600)"
    dtype = "of the products: bfloat16 is quicker on a CPU that has units for it (float32)"
    parser.add_argument("--out", type=Path, default="runs/toy_base", help=out)
    parser.add_argument("--steps", type=int, nargs=4, default=[800, 400, 4800, 1600], help=steps)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype)
    args = parser.parse_args()
    check_path("--out", args.out, "new folder")
    return args


def draw_batches(steps, first, halves, tokenizer):
    """The batches of this process, in order, drawn by others while it learns: half a second of a
    core for each. A step takes two cores two seconds, and an H100 a sixth of one."""
    on_gpu = processes.device().type == "cuda"
    loader = torch.utils.data.DataLoader(
        Batches(steps, tokenizer),
        batch_size=None,
        sampler=[(step, half) for step in range(first, sum(steps)) for half in halves],
        num_workers=min(8, os.cpu_count()) if on_gpu else 1,
        prefetch_factor=4,
        pin_memory=on_gpu,
    )
    return iter(loader)


def write_base(folder, model):
    """The checkpoint folder, in half precision, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        shutil.copytree(BASE, temporary, dirs_exist_ok=True)
        model.half().save_pretrained(temporary)  # over BASE's weights
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    print(folder)


def main():
    quiet()
    processes.start_processes()
    args = read_flags()
    if processes.device().type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    known = known_ids(tokenizer)
    parts = make_parts()
    model = parts["model"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.dtype}")
    optimizers = make_optimizers(parts)
    checkpoint = args.out / "checkpoint.pt"
    first, total = restore(checkpoint, args.steps, parts, optimizers), sum(args.steps)
    halves = processes.share([0, 1])
    batches = draw_batches(args.steps, first, halves, tokenizer)
    history = defaultdict(list)
    bar = tqdm(
        range(first, total), "base", total, unit="step", initial=first, disable=processes.RANK > 0
    )
    for step in bar:
        model.get_input_embeddings().requires_grad_(step >= args.steps[0])
        for _ in halves:
            loss, log = loss_of(next(batches), parts, known, args.dtype)
            (loss / 2).backward()
            for name, value in log:
                history[name].append(value)
        is_last = step >= sum(args.steps[:3])
        update(parts, optimizers[2:] if is_last else optimizers[:2], rate_of(step, args.steps))
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if (step + 1) % SAVE_EVERY and step + 1 < total:
            continue
        line = {name: round(mean(values), 3) for name, values in sorted(history.items())}
        history.clear()
        states = dict(steps=args.steps, parts=parts.state_dict())
        states["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(checkpoint, update=step + 1, finished=False, **states)
        if not processes.RANK:
            with writing(args.out), open(args.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step + 1, **line}) + "\n")
    if not processes.RANK:
        write_base(args.out / "base", model)


if __name__ == "__main__":
    main()
