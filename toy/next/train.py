"""The recipe of the toy's base: from random weights to toy/next/base/, on general skills alone.

    python -m toy.next.train      all of it; killed, the same command goes on

Two stages, Muon on the matrices and AdamW on the rest, everything seeded by the number of the step:

1. The vision tower alone. Each image token is taught the words of the object that it shows,
   against the words' own embeddings, and by linear heads, thrown away after: the object's box,
   the frame that lies on it, and how each frame lies around its object.
2. Conversations: all weights, next-token loss on the answers. Pictures are whole scenes, enlarged
   views, crops, with and without frames; questions are those of world.py, and boxes to be
   repeated. Beside it, the last token of each question is taught what the question is about (the
   object's box, the frame's box, the answer's words) before the last two layers, by more throw-
   away heads: without it, words of size and place are learnt and colors are not. Stage 1's loss
   goes on.
"""

import argparse
import functools
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

from common import SINGLE_PROMPT, format_box, mrope_positions
from toy.next import world
from toy.next.model import PATCH, make_image_processor, make_model, make_tokenizer
from toy.next.world import COLORS, FRAMES, KINDS, MARKS, RELATED, SEEN, SIZES, SOURCES

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AttentionInterface

HERE = Path(__file__).resolve().parent
CELLS = SEEN // PATCH // 2  # image tokens along a side
LEGIBLE = 2.4  # enlarged so much, a view shows marks
WORDS = [*COLORS, *KINDS, *SIZES, *MARKS]


# ----------------------------------------------------------------------------------------------
# What the tower sees, and what its tokens are taught
# ----------------------------------------------------------------------------------------------
def patches_of(image):
    """A square PIL image -> [patches, 3 * 2 * PATCH * PATCH] float32 as the image processor gives
    them, blocks of 2 x 2.
    """
    seen = np.asarray(image.resize((SEEN, SEEN), Image.BICUBIC), np.float32) / 127.5 - 1
    blocks = seen.reshape(CELLS, 2, PATCH, CELLS, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    flat = blocks.reshape(CELLS * CELLS * 4, 3, 1, PATCH * PATCH)  # [patches, colors, time, pixels]
    return np.repeat(flat, 2, 2).reshape(len(flat), -1)


def digits(box):
    """The first and the second digit of each coordinate (0..1000; 1000 counts as 990)."""
    return [min(9, v // 100) for v in box] + [v // 10 % 10 if v < 1000 else 9 for v in box]


def lies(frame, box):
    """How a frame lies around a box, in numbers: shift in sizes of the box, log of the ratio of
    sizes; cut at 1.5.
    """
    w, h = box[2] - box[0], box[3] - box[1]
    shift = [(a - b) / size for a, b, size in zip(world.center(frame), world.center(box), (w, h))]
    ratio = np.log([max(1, frame[2] - frame[0]) / w, max(1, frame[3] - frame[1]) / h])
    return np.clip([*shift, *ratio], -1.5, 1.5)


def overlap(box):
    """[tokens]: the area (0..1000 squared) of each image token's cell that a box covers."""
    edges = np.arange(CELLS + 1) * 1000 / CELLS
    across = np.clip(np.minimum(edges[1:], box[2]) - np.maximum(edges[:-1], box[0]), 0, None)
    down = np.clip(np.minimum(edges[1:], box[3]) - np.maximum(edges[:-1], box[1]), 0, None)
    return (down[:, None] * across[None]).reshape(-1)


def cells_at(spot):
    """The image tokens that show a mark at `spot` (pixels of a picture of world.SIDE)."""
    x, y = (v * CELLS / world.SIDE for v in spot)
    near = [abs(np.arange(CELLS) + 0.5 - v) < 0.75 for v in (y, x)]
    return (near[0][:, None] & near[1][None]).reshape(-1)


def token_labels(picture):
    """What each image token is taught of a picture: a dict of arrays [tokens, ...]; -1 in
    integers is "not taught".
    """
    n = CELLS * CELLS
    out = {
        "words": np.zeros((n, len(WORDS)), np.float32),
        "known": np.ones((n, len(WORDS)), np.float32),  # 0: the word is not taught here
        "digits": np.full((n, 8), -1),
        "box": np.zeros((n, 4), np.float32),
        "frame": np.full(n, len(FRAMES)),
        "frame_digits": np.full((n, 8), -1),
        "frame_box": np.zeros((n, 4), np.float32),
        "related": np.full((n, len(FRAMES), len(RELATED) + 1), -1.0, np.float32),
        "lies": np.zeros((n, len(FRAMES), 4), np.float32),
    }
    sizes = slice(len(COLORS) + len(KINDS), len(COLORS) + len(KINDS) + len(SIZES))
    marks = slice(sizes.stop, None)
    if picture["zoom"] > 1:
        out["known"][:, sizes] = 0
    if picture["zoom"] < LEGIBLE:
        out["known"][:, marks] = 0
    # An object is taught where it covers 2,000 of a token's 27,800 (0..1000 squared) or more
    most = np.full(n, 2000.0)
    for o in picture["objects"]:
        area = overlap(o["box"])
        here = area > most
        most = np.maximum(most, area)
        names = [o["color"], o["kind"], o["size"]]
        out["words"][here, : -len(MARKS)] = [float(word in names) for word in WORDS[: -len(MARKS)]]
        spot = [(v - c) * picture["zoom"] for v, c in zip(o["spot"], picture["corner"])]
        out["words"][cells_at(spot), sizes.stop + MARKS.index(o["mark"])] = 1
        out["digits"][here] = digits(o["box"])
        out["box"][here] = np.array(o["box"]) / 1000
        out["related"][here] = -1
        for color, frame in picture["frames"]:
            c = list(FRAMES).index(color)
            said, inside = world.compare(frame, o["box"]), world.is_inside(o["box"], frame)
            out["related"][here, c, :-1] = [float(word in said) for word in RELATED]
            out["related"][here, c, -1] = -1 if inside is None else float(inside)
            out["lies"][here, c] = lies(frame, o["box"])
    for color, frame in picture["frames"]:
        here = overlap(frame) > 600
        out["frame"][here] = list(FRAMES).index(color)
        out["frame_digits"][here] = digits(frame)
        out["frame_box"][here] = np.array(frame) / 1000
    return out


def pictures_batch(pictures):
    """Pictures -> a dict of tensors: patches [n, patches, ...] and labels [n, tokens, ...]."""
    labels = [token_labels(picture) for picture in pictures]
    out = {
        name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]
    }
    out["patches"] = torch.from_numpy(
        np.stack([patches_of(picture["image"]) for picture in pictures])
    )
    return out


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
LAST_HEADS = {"digits": 80, "box": 4, "frame_digits": 80, "frame_box": 4, "answer": 0}
ANSWERS = [*RELATED, "yes", "no", *COLORS, *KINDS, *MARKS]
LAST_HEADS["answer"] = len(ANSWERS)


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
    order = block_order()
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
    """Attention in bfloat16 as two plain products: on a CPU, short as these are, quicker than the
    fused kernel backward.

    query, key, value [n, heads, length, head dim]; mask [length, length] is added to the scores.
    """
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores + mask
        return scores.softmax(-1) @ value


@functools.lru_cache(8)
def causal(length):
    """[length, length]: minus infinity where a token would look ahead."""
    return torch.full((length, length), float("-inf"), dtype=torch.bfloat16).triu(1)


def attend_causal(module, query, key, value, attention_mask, **kwargs):
    """`attend` in the form that transformers calls; rows are padded at their end, so that
    causality hides the padding.
    """
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    return attend(query, key, value, causal(query.shape[2])).transpose(1, 2), None


# ----------------------------------------------------------------------------------------------
# Conversations
# ----------------------------------------------------------------------------------------------
def next_picture(rng, level, scene):
    """(picture, scene): something new to look at, often of the scene before."""
    if scene is None or rng.random() < 0.4:
        low, high, distractors = ((2, 3, False), (2, 4, None), (2, 5, None))[level]
        scene = world.make_scene(rng, low, high, distractors)
    picture = scene
    way = rng.random()
    target = rng.choice(scene["objects"])["bbox"]
    if way < 0.15:
        picture = world.view(scene, world.random_view(rng, target, rng.uniform(1.4, 3)))
    elif way < 0.32:
        picture = world.view(scene, world.random_crop(rng, target))
    if rng.random() < (0.65 if picture is scene else 0.35):
        picture = world.with_frames(rng, picture, rng.choice((1, 1, 1, 2)))
    return picture, scene


def random_box(rng):
    """Any box (0..1000)."""
    x1, x2 = sorted(rng.sample(range(1001), 2))
    y1, y2 = sorted(rng.sample(range(1001), 2))
    return [x1, y1, x2, y2]


def next_question(rng, picture, level, said, repeats=True):
    """A dict of "kind", "text", "answer", and "object", "frame" (boxes, or None), or None where
    chance found none.

    said: the (question, answer) pairs with a box so far, for questions that repeat.
    repeats: whether such questions may come.
    """
    sizes = picture["zoom"] == 1
    sources = (SOURCES[:1], SOURCES, SOURCES)[level]

    last_said = {}

    def refer_to(rng, objects):
        found = world.refer_somehow(rng, objects, sources, sizes, tries=4)
        if found:
            last_said["expression"] = found[0]
        return found

    way = rng.random() if repeats else 1.0
    if way < 0.03:
        box = format_box(random_box(rng))
        return {"kind": "repeat", "text": f"Here is a box: {box}. Repeat the box.", "answer": box}
    if way < 0.08 and said:
        question, answer = rng.choice(said)
        if rng.random() < 0.5:
            return {"kind": "repeat", "text": "Repeat the box.", "answer": said[-1][1]}
        return {"kind": "again", "text": question, "answer": answer}
    if picture["frames"] and rng.random() < 0.75:
        kinds = ("frame", "what_inside", "is_inside", "compare", "compare")
    elif picture["zoom"] >= LEGIBLE and rng.random() < 0.6:
        kinds = ("mark", "mark", "bearer", "count")
    else:
        kinds = ("find",) * 9 + ("where",)
    kind = rng.choice(kinds)
    if kind == "find":
        found = refer_to(rng, picture["objects"])
        if not found:
            return None
        box = found[1]["box"]
        return {"kind": "find", "text": found[0], "answer": format_box(box), "object": box}
    if kind == "frame":
        color, box = rng.choice(picture["frames"])
        return {
            "kind": "frame",
            "text": f"the {color} frame",
            "answer": format_box(box),
            "frame": box,
        }
    asked = getattr(world, f"ask_{kind}")(rng, picture, refer_to)
    if not asked:
        return None
    text, answer, o, frame = asked
    return {
        "kind": kind,
        "text": text,
        "answer": answer,
        "expression": last_said["expression"]
        if kind in ("where", "is_inside", "compare", "mark")
        else None,
        "object": o and o["box"],
        "frame": frame and frame[1],
    }


def conversation(rng, level, budget, encode, answered):
    """A chat of about `budget` tokens: a list of (picture or None, question dict), a picture
    where it is shown first.
    """
    turns, scene, length = [], None, 0
    while length < budget:
        picture, scene = next_picture(rng, level, scene)
        said, asked, first = [], set(), True
        for _ in range(3 * (rng.randint(2, 7) if answered else 10)):
            question = next_question(rng, picture, level, said, answered)
            if not question:
                continue
            key = repr([question.get(name) for name in ("kind", "object", "frame")])
            if question["kind"] not in ("repeat", "again"):
                if key in asked:  # in other words, it could be answered without looking
                    continue
                asked.add(key)
            if question["kind"] in ("find", "frame"):
                said.append((question["text"], question["answer"]))
                question["full"] = rng.random() < (0.7 if first else 0.15)
            turns.append((picture if first else None, question))
            length += 40 * first + 8 + len(encode(question["text"]))
            length += len(encode(question["answer"])) if answered else 0
            first = False
            if length >= budget or len(asked) >= 10:
                break
    return turns


def chat_batch(rng, level, rows, budget, tokenizer, answered):
    """A batch of conversations as tensors; see `chat_loss` for what is in it.

    answered: whether the questions are followed by their answers. Without them a conversation holds
    three times as many questions, whose last tokens are taught what they are about.
    """
    encode = functools.cache(lambda text: tokenizer.encode(text, add_special_tokens=False))
    shape = SimpleNamespace(rows=CELLS, columns=CELLS)
    special = tokenizer.convert_tokens_to_ids
    pad = special("<|image_pad|>")
    shown = [special("<|vision_start|>")] + [pad] * CELLS**2 + [special("<|vision_end|>")]
    before, after = SINGLE_PROMPT.split("{text}")
    ids, labels, positions, pictures, last, answers, kinds = [], [], [], [], [], [], []
    for row in range(rows):
        tokens, learnt, images = [], [], 0
        for picture, q in conversation(rng, level, budget, encode, answered):
            tokens += encode("<|im_start|>user\n")
            if picture:
                tokens += shown
                pictures.append(picture)
                images += 1
            tokens += encode(before) * q.get("full", False)
            # The last word of an expression is to know the object, whatever the question
            if q.get("expression"):
                head = q["text"][: q["text"].index(q["expression"]) + len(q["expression"])]
                named = {"kind": "named", "answer": "", "object": q["object"]}
                last.append((row, len(tokens) + len(encode(head)) - 1, named))
            tokens += encode(q["text"])
            last.append((row, len(tokens) - 1, q))
            tokens += encode(after) * q.get("full", False) + encode("<|im_end|>\n")
            if answered:
                tokens += encode("<|im_start|>assistant\n")
                answer = encode(q["answer"] + "<|im_end|>")
                learnt += [-100] * (len(tokens) - len(learnt)) + answer
                answers += [len(kinds)] * len(answer)
                kinds.append(q["kind"])
                tokens += answer + encode("\n")
        ids.append(tokens)
        labels.append(learnt + [-100] * (len(tokens) - len(learnt)))
        positions.append(torch.tensor(mrope_positions(tokens, [shape] * images, pad)[0]).T)
    longest = max(map(len, ids))
    out = pictures_batch(pictures)
    fill = tokenizer.pad_token_id
    out["ids"] = torch.tensor([row + [fill] * (longest - len(row)) for row in ids])
    out["labels"] = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    out["positions"] = torch.stack([F.pad(p, (0, longest - p.shape[1])) for p in positions], 1)
    out["answer_of"] = torch.tensor(answers)  # [learnt tokens]: which answer each belongs to
    out["kinds"] = kinds
    about = {"digits": [], "box": [], "frame_digits": [], "frame_box": [], "answer": []}
    for _, _, q in last:
        for name, box in (("", q.get("object")), ("frame_", q.get("frame"))):
            about[name + "digits"].append(digits(box) if box else [-1] * 8)
            about[name + "box"].append([v / 1000 for v in box] if box else [0.0] * 4)
        spoken = q["answer"].replace(",", "").split()
        taught = q["kind"] in ("what_inside", "is_inside", "compare", "mark", "bearer")
        about["answer"].append([float(word in spoken) if taught else -1.0 for word in ANSWERS])
    out["last"] = torch.tensor([[row, at] for row, at, _ in last])
    out["about"] = {name: torch.tensor(value) for name, value in about.items()}
    return out


def chat_loss(model, known, tower_heads, last_heads, batch, weights):
    """All losses of a batch of conversations -> (loss, log: {name: (sum, count)})."""
    language, visual = model.model.language_model, model.model.visual
    features, deepstack = see(visual, batch["patches"])
    embeddings = model.get_input_embeddings().weight
    pictures = {name: batch[name] for name in ("patches", *token_labels_names())}
    dense, parts = tower_loss(embeddings[known["words"]], tower_heads, features, pictures)
    ids = batch["ids"]
    shown = ids == model.config.image_token_id
    embeds = language.embed_tokens(ids)
    embeds = embeds.masked_scatter(shown[..., None], features.to(embeds.dtype))
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
        deepstack_visual_embeds=[level.to(embeds.dtype) for level in deepstack],
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
    # First digits weigh more: to know the object is to know them. So does the first token of an
    # answer in words.
    previous = ids[:, :-1][learnt]
    begins = F.pad(batch["answer_of"][1:] != batch["answer_of"][:-1], (1, 0), value=True)
    boxes = begins & (target == known["opening"])
    weight = torch.ones_like(each)
    weight[(previous == known["opening"]) | (previous == known["comma"])] = 3.0
    weight[begins & ~boxes] = 6.0
    weight[boxes] = 0.5
    text = (each * weight).sum() / weight.sum()
    log = {"text": (text.item(), 1)}
    right = (logits.argmax(-1) == target).float()
    first = torch.where(previous == known["opening"], right, 1.0)
    nothing = torch.ones(len(batch["kinds"]))
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


def token_labels_names():
    """The names of the labels of image tokens."""
    return (
        "words",
        "known",
        "digits",
        "box",
        "frame",
        "frame_digits",
        "frame_box",
        "related",
        "lies",
    )


# ----------------------------------------------------------------------------------------------
# Optimisation
# ----------------------------------------------------------------------------------------------
def optimizers(groups):
    """groups: (named parameters, Muon rate, AdamW rate). Muon for the matrices, AdamW for
    embeddings, norms, the rest.
    """
    out = []
    for named, muon_rate, adam_rate in groups:
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named if not (p.ndim == 2 and "embed" not in n)]
        if matrices:
            out.append(torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0, momentum=0.95))
        if rest:
            out.append(torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0))
    return out


def rate_of(step, total, decay):
    """The learning rate as a share of its peak: rises over 50 steps, falls to 2 percent over the
    last `decay` of `total`.

    Until it falls, `total` has no influence: a run may be made longer or shorter while it is
    under way.
    """
    return min(1.0, (step + 1) / 50, max(0.02, (total - step) / decay))


class Batches(torch.utils.data.Dataset):
    """The batch of each step, by its number: what makes the recipe go on where it was killed."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer

    def __getitem__(self, step):
        torch.set_num_threads(1)
        args = self.args
        rng = random.Random(f"{args.seed} {step}")
        if step < args.tower_steps:
            level = 1 + (step > args.tower_steps // 2)
            pictures = [next_picture(rng, level, None)[0] for _ in range(args.pictures)]
            return pictures_batch(pictures)
        chats = step - args.tower_steps
        level = sum(chats >= begins for begins in args.levels)
        answered = chats >= args.question_steps
        return chat_batch(rng, level, args.rows, args.budget, self.tokenizer, answered)


def parts_of(args, tokenizer):
    """{"model", "tower_heads", "last_heads"}: all that is trained, with random weights."""
    torch.manual_seed(args.seed)
    sizes = (args.width, args.layers, args.vision_width, args.vision_layers)
    model = make_model(tokenizer, *sizes).train()
    AttentionInterface.register("attend_causal", attend_causal)
    model.model.language_model.config._attn_implementation = "attend_causal"
    tower_heads = heads_of(TOWER_HEADS, args.width)
    last_heads = heads_of(LAST_HEADS, args.width)
    return {"model": model, "tower_heads": tower_heads, "last_heads": last_heads}


def all_optimizers(parts):
    """[(optimizer, "tower" or "rest", peak rates of its groups)]."""
    named = list(parts["model"].named_parameters())
    tower = [x for x in named if "visual" in x[0]]
    fast = [x for x in named if "embed_tokens" in x[0] or "q_norm" in x[0] or "k_norm" in x[0]]
    taken = {name for name, _ in tower + fast}
    rest = [x for x in named if x[0] not in taken]
    heads = [*parts["tower_heads"].named_parameters(), *parts["last_heads"].named_parameters()]
    heads = [("embed " + name, p) for name, p in heads]  # so named, they are AdamW's
    groups = {
        "tower": optimizers([(tower, 0.02, 2e-3)]),
        "rest": optimizers([(rest, 0.02, 1.5e-3), (fast, 0, 5e-3), (heads, 0, 2e-3)]),
    }
    return [
        (optimizer, name, [group["lr"] for group in optimizer.param_groups])
        for name, group in groups.items()
        for optimizer in group
    ]


def save(path, step, parts, steppers, args):
    """All that it takes to go on, written whole."""
    states = {name: module.state_dict() for name, module in parts.items()}
    states |= {"step": step, "args": vars(args)}
    states["optimizers"] = [optimizer.state_dict() for optimizer, _, _ in steppers]
    torch.save(states, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def restore(path, parts, steppers):
    """The step to go on from: 0 where nothing was saved."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=False)
    for name, module in parts.items():
        module.load_state_dict(saved[name])
    for (optimizer, _, _), state in zip(steppers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    print(f"going on from step {saved['step']}", flush=True)
    return saved["step"]


def loss_of(step, batch, parts, known, args):
    """The loss of a step and its log, {name: (sum, count)}."""
    model, chats = parts["model"], step - args.tower_steps
    with torch.autocast("cpu", torch.bfloat16):
        if chats < 0:
            features, _ = see(model.model.visual, batch["patches"])
            embeddings = model.get_input_embeddings().weight[known["words"]]
            loss, told = tower_loss(embeddings, parts["tower_heads"], features, batch)
            return loss, {f"tower {name}": (value.item(), 1) for name, value in told.items()}
        weights = {"hints": 1.5 if chats < args.question_steps else 0.6, "dense": 0.4}
        return chat_loss(model, known, parts["tower_heads"], parts["last_heads"], batch, weights)


def update(step, loss, parameters, steppers, args):
    """One step of all optimizers; beside the language model the tower learns at half its rate."""
    chats = step - args.tower_steps
    for optimizer, _, _ in steppers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    if chats < 0:
        rate = min(1, (step + 1) / 50)
    else:
        rate = rate_of(chats, args.chat_steps, args.decay_steps)
    for optimizer, name, peaks in steppers:
        share = 0.5 if name == "tower" and chats >= 0 else 1.0
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * rate * share * args.rate
        optimizer.step()


def main(args):
    folder = Path(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    parts = parts_of(args, tokenizer)
    model = parts["model"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens", flush=True)
    known = {
        "words": word_ids(tokenizer, WORDS),
        "opening": tokenizer.encode('{"bbox_2d": [', add_special_tokens=False)[0],
        "comma": tokenizer.encode(", ", add_special_tokens=False)[0],
    }
    steppers = all_optimizers(parts)
    parameters = [p for module in parts.values() for p in module.parameters()]
    checkpoint = folder / "checkpoint.pt"
    first = restore(checkpoint, parts, steppers)
    total = args.tower_steps + args.chat_steps
    batches = torch.utils.data.DataLoader(
        Batches(args, tokenizer),
        batch_size=None,
        sampler=range(first, total),
        num_workers=1,  # a process beside this one, that draws while this one learns
        prefetch_factor=4,
    )
    start = saved_at = time.time()
    sums = {}
    log_file = open(folder / "log.jsonl", "a")
    for step, batch in zip(range(first, total), batches):
        model.get_input_embeddings().requires_grad_(step >= args.tower_steps)
        loss, log = loss_of(step, batch, parts, known, args)
        update(step, loss, parameters, steppers, args)
        for name, (value, n) in log.items():
            a, b = sums.get(name, (0, 0))
            sums[name] = (a + value, b + n)
        if (step + 1) % args.log_every == 0 or step + 1 == total:
            line = {"step": step + 1, "minutes": round((time.time() - start) / 60, 2)}
            line |= {name: round(a / max(1, b), 3) for name, (a, b) in sorted(sums.items())}
            log_file.write(json.dumps(line) + "\n")
            log_file.flush()
            print(line, flush=True)
            sums = {}
        if time.time() - saved_at > args.save_minutes * 60 or step + 1 == total:
            save(checkpoint, step + 1, parts, steppers, args)
            saved_at = time.time()
    model.half().save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    make_image_processor().save_pretrained(args.folder)
    print(f"{args.folder}, {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--folder", default=str(HERE / "base"), help="where the finished checkpoint goes"
    )
    parser.add_argument(
        "--work", default="runs/toy_base", help="folder of the log and the checkpoint to go on from"
    )
    parser.add_argument("--tower-steps", type=int, default=800)
    parser.add_argument("--chat-steps", type=int, default=3500)
    parser.add_argument(
        "--question-steps", type=int, default=400, help="the first chats, without answers"
    )
    parser.add_argument(
        "--decay-steps", type=int, default=1500, help="the last steps, with falling rates"
    )
    parser.add_argument(
        "--levels", type=int, nargs=2, default=(200, 400), help="steps at which chats become harder"
    )
    parser.add_argument("--pictures", type=int, default=64, help="in a batch of stage 1")
    parser.add_argument("--rows", type=int, default=34, help="conversations in a batch of stage 2")
    parser.add_argument("--budget", type=int, default=170, help="tokens of a conversation, about")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vision-width", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
