"""The recipe of the toy's base: from random weights to toy/base/, on general skills.

    python -m toy.train

Two seeded stages, Muon on the matrices and AdamW on the rest:

1. 1,000 batches of 48 scenes: the vision tower alone. Each image token is taught the words of the
   object that it shows, against the words' own embeddings, and, by linear heads that are thrown
   away after, the object's box. Trained from the answers' text alone, the tower had not found the
   objects after 900 batches.
2. 2,300 batches of conversations: all weights, next-token loss on the answers. One to three images,
   up to three questions about each: a box for an expression or for a frame, where something is,
   what a frame holds, how it lies around an object. Beside it, the last word of an expression is
   taught its box, before the last layer, by one more throw-away head: without it, words of size and
   place are learnt and colors are not. Stage 1's loss goes on, or the tower forgets colors before
   they are used.

What this base has seen of the method that it is to learn: from 60 percent of stage 2 on, part of
the questions are the IVT prompt, answered with the very sentence that the template teacher writes
at step 0 ("I look for the object. I see it at the ...") before the box; and some frames are red and
translucent, as the overlay is. It has never seen its own prediction, the correction prompt, or a
sentence of a later step. So the `no training` rows of the toy are not quite untrained.

The repository holds the result in half precision: Acc@0.5 0.882 on the 2,400 training samples of
the toy preset, which it was not trained on. It took 42 minutes on two cores that were busy with
other work at times.
"""

import argparse
import random
import time
from pathlib import Path

from common import denormalize_box
from support.files import writing
from support.flags import check_path
from support.models import quiet
from toy.conversations import FRAMES, add_frames, box_of, conversation
from toy.model import PATCH, make_image_processor, make_model, make_tokenizer
from toy.world import COLORS, KINDS, SIDE, SIZES, SOURCES, make_scene, render

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

BASE = Path(__file__).resolve().parent / "base"
CELL = 2 * PATCH  # pixels: the side of the square that an image token stands for
CELLS = SIDE // CELL  # image tokens in a row, and in a column
WORDS = [*COLORS, *KINDS, *SIZES]
# What throw-away linear heads tell of each image token, as numbers of classes: the eight digits of
# its object's box, the color of its frame (or none), the eight digits of the frame's box
HEADS = [10] * 8 + [len(FRAMES) + 1] + [10] * 8


# --------------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------------
def make_optimizers(groups):
    """groups: (named parameters, Muon's rate, AdamW's rate) -> a list of optimizers.

    Muon takes the matrices; AdamW the embeddings, the norms and what has "embed" in its name.
    """
    optimizers = []
    for named, muon_rate, adam_rate in groups:
        matrices = []
        rest = []
        for name, p in named:
            is_matrix = p.ndim == 2 and "embed" not in name
            (matrices if is_matrix else rest).append(p)
        if matrices:
            optimizers.append(
                torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0, momentum=0.95)
            )
        if rest:
            optimizers.append(
                torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
            )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def update(optimizers, parameters, loss, number, batches):
    """Update `number` of 0..batches - 1.

    The rate rises over the first 50 and falls over the last 60 percent, to 2 percent of its peak.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    left = 1 - number / batches
    factor = min(1, (number + 1) / 50, max(0.02, left / 0.6))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()


# --------------------------------------------------------------------------------------------------
# What each image token is taught
# --------------------------------------------------------------------------------------------------
def digits(box):
    """The first and the second digit of the four coordinates (0..1000): 8 numbers of 0..9."""
    return [min(9, v // 100) for v in box] + [v // 10 % 10 for v in box]


def label_object(objects, x, y):
    """Of the object that fills most of the cell at (x, y) pixels: color, kind, size, the 8 digits.

    None where no object reaches into the cell by more than a pixel.
    """
    label = None
    most = 0
    for o in objects:
        x1, y1, x2, y2 = o["bbox"]
        w = min(x2, x + CELL) - max(x1, x)
        h = min(y2, y + CELL) - max(y1, y)
        if w > 1 and h > 1 and w * h > most:
            most = w * h
            color = list(COLORS).index(o["color"])
            kind = KINDS.index(o["kind"])
            size = list(SIZES).index(o["size"])
            label = [color, kind, size, *digits(box_of(o))]
    return label


def label_frame(frames, x, y):
    """Of the last frame whose line crosses the cell: color, 0, 0, the 8 digits; or None."""
    label = None
    for color, box in frames:
        x1, y1, x2, y2 = denormalize_box(box, SIDE, SIDE)
        touches = x1 < x + CELL and y1 < y + CELL and x2 > x and y2 > y
        surrounds = x1 < x and y1 < y and x2 > x + CELL and y2 > y + CELL
        if touches and not surrounds:
            label = [list(FRAMES).index(color), 0, 0, *digits(box)]
    return label


def token_labels(objects, frames):
    """What each image token shows of the objects and of the frames: [2, tokens, 11] integers.

    color, kind, size, and the 8 digits of the box; -1 where there is none.
    """
    labels = np.full((2, CELLS * CELLS, 11), -1)
    for token in range(CELLS * CELLS):
        x = token % CELLS * CELL
        y = token // CELLS * CELL
        of_object = label_object(objects, x, y)
        if of_object:
            labels[0, token] = of_object
        of_frame = label_frame(frames, x, y)
        if of_frame:
            labels[1, token] = of_frame
    return labels


def head_loss(logits, target):
    """Mean cross-entropy where the target is not -1; zero when it is -1 everywhere."""
    if (target < 0).all():
        return logits.sum() * 0
    return F.cross_entropy(logits, target, ignore_index=-1)


def tower_loss(model, tokenizer, heads, features, scenes):
    """features [images * tokens, width], scenes: (objects, frames) of each image.

    Returns (loss, its part for the words, its parts for the 17 heads). The words of the object that
    a token shows are read off it by their own embeddings, as in SigLIP (arXiv:2303.15343, Section
    3.2): that puts a red object near the word "red", and attention can begin with what is alike.
    """
    labels = np.stack([token_labels(*scene) for scene in scenes])
    of_object, of_frame = (
        torch.from_numpy(labels).transpose(0, 1).flatten(1, 2)
    )  # [tokens, 11] each
    word_target = torch.zeros(len(of_object), len(WORDS))
    first = 0
    for column, words in enumerate((COLORS, KINDS, SIZES)):
        is_shown = of_object[:, column] >= 0
        word_target[is_shown, first + of_object[is_shown, column]] = 1.0
        first += len(words)
    # In byte-level BPE a word begins with its space, which is spelt \u0120
    ids = tokenizer.convert_tokens_to_ids(["\u0120" + word for word in WORDS])
    embeddings = model.get_input_embeddings().weight[ids]  # [words, width]
    logits = features.float() @ embeddings.T / embeddings.shape[1] ** 0.5 - 3.0  # [tokens, words]
    word_loss = F.binary_cross_entropy_with_logits(logits, word_target) * len(WORDS)

    frame_color = torch.where(of_frame[:, 0] < 0, len(FRAMES), of_frame[:, 0])
    targets = [*of_object[:, 3:].T, frame_color, *of_frame[:, 3:].T]  # 17 of [tokens]
    logits = heads(features).float().split(HEADS, -1)
    head_losses = torch.stack([head_loss(*pair) for pair in zip(logits, targets)])  # [17]
    weights = torch.tensor([1.0] * 8 + [2.0] + [0.5] * 8) / 10
    return 0.5 * word_loss + (head_losses * weights).sum(), word_loss, head_losses


# --------------------------------------------------------------------------------------------------
# Stage 1
# --------------------------------------------------------------------------------------------------
def scene_with_frames(rng):
    """(image, objects, frames): a scene of up to six objects, 40 percent of them with frames."""
    objects = make_scene(rng, 1, 6)
    framed = rng.random() < 0.4
    image = render(rng, objects)
    if not framed:
        return image, objects, []
    image, frames = add_frames(rng, image, objects)
    return image, objects, frames


def train_vision(model, tokenizer, processor, batches, seed):
    """Stage 1: the vision tower and the heads."""
    rng = random.Random(seed)
    tower = model.model.visual
    heads = torch.nn.Linear(model.config.text_config.hidden_size, sum(HEADS))
    model.get_input_embeddings().requires_grad_(False)
    optimizers = make_optimizers(
        [
            (list(tower.named_parameters()), 0.02, 2e-3),
            ([("heads.embed", p) for p in heads.parameters()], 0, 2e-3),
        ]
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    bar = tqdm(range(batches), desc="vision", unit="batch")
    for i in bar:
        drawn = [scene_with_frames(rng) for _ in range(48)]
        scenes = [(objects, frames) for _, objects, frames in drawn]
        batch = processor(images=[image for image, _, _ in drawn], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            out = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
            loss, words, parts = tower_loss(model, tokenizer, heads, out.pooler_output, scenes)
        update(optimizers, parameters, loss, i, batches)
        bar.set_postfix(
            words=f"{words:.2f}",
            digit1=f"{parts[:4].mean():.2f}",
            digit2=f"{parts[4:8].mean():.2f}",
            refresh=False,
        )


# --------------------------------------------------------------------------------------------------
# Stage 2
# --------------------------------------------------------------------------------------------------
def curriculum(rng, done):
    """The arguments of `conversation` when a part `done` (0..1) of stage 2 is over.

    At first objects that color and kind tell apart, since words of size and place are easier, and
    would hide these; then all expressions, more objects, frames; at last several images, and some
    questions that want a thought before the box.
    """
    if done < 0.2:
        return dict(
            low=2,
            high=3,
            questions=2,
            where=0.0,
            frames=False,
            sources=SOURCES[:1],
            distractors=False,
        )
    if done < 0.35:
        return dict(low=2, high=4, questions=2, where=0.0)
    if done < 0.6:
        return dict(low=2, high=5, questions=3)
    return dict(low=2, high=5, questions=2, think=True, images=rng.choice((1, 1, 2, 3)))


def conversation_batch(rng, tokenizer, arguments):
    """A batch of conversations that fills about the same memory for any number of images.

    Returns ids and labels [B, L] (-100: not learnt), the pictures (PIL, objects, frames), and the
    expressions: (row, place of its last token, digits of its box).
    """
    special = tokenizer.convert_tokens_to_ids
    image_pads = ["<|image_pad|>"] * CELLS**2
    image_ids = special(["<|vision_start|>", *image_pads, "<|vision_end|>"])
    rows = []
    labels = []
    pictures = []
    expressions = []
    for i in range({1: 40, 2: 20, 3: 14}[arguments.get("images", 1)]):
        row = []
        label = []
        for kind, value in conversation(rng, **arguments):
            if kind == "image":
                pictures.append(value)
                ids = image_ids
            else:
                text = value[0] if kind == "expression" else value
                ids = tokenizer.encode(text, add_special_tokens=False)
            row += ids
            label += ids if kind == "answer" else [-100] * len(ids)
            if kind == "expression" and value[1]:
                expressions.append((i, len(row) - 1, digits(value[1])))
        rows.append(torch.tensor(row))
        labels.append(torch.tensor(label))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad(labels, batch_first=True, padding_value=-100), pictures, expressions


def train_language(model, tokenizer, processor, batches, seed):
    """Stage 2: all weights, on conversations.

    First digits weigh more in the loss: to know the object is to know them; of the other digits the
    image token tells most.
    """
    width = model.config.text_config.hidden_size
    rng = random.Random(seed)
    heads = torch.nn.Linear(width, sum(HEADS))
    finder = torch.nn.Linear(width, 80)
    outputs = {}  # what the hooks take out of the last forward pass

    def keep_features(module, inputs, out):
        outputs["features"] = out.pooler_output

    def keep_hidden(module, inputs, out):
        outputs["hidden"] = out

    hooks = [
        model.model.visual.register_forward_hook(keep_features),
        model.model.language_model.layers[-2].register_forward_hook(keep_hidden),
    ]
    model.requires_grad_(True)
    tower = []
    fast = []
    rest = []
    for name, p in model.named_parameters():
        if "visual" in name:
            tower.append((name, p))
        elif "embed_tokens" in name or "q_norm" in name or "k_norm" in name:
            fast.append((name, p))
        else:
            rest.append((name, p))
    thrown_away = [*heads.parameters(), *finder.parameters()]
    optimizers = make_optimizers(
        [
            (tower, 0.01, 1e-3),
            (rest, 0.02, 1.5e-3),
            (fast, 0, 5e-3),
            ([("heads.embed", p) for p in thrown_away], 0, 2e-3),
        ]
    )
    parameters = [*model.parameters(), *thrown_away]
    opening = tokenizer.encode('{"bbox_2d": [', add_special_tokens=False)[0]
    comma = tokenizer.encode(", ", add_special_tokens=False)[0]
    recent = []
    bar = tqdm(range(batches), desc="language", unit="batch")
    for i in bar:
        arguments = curriculum(rng, i / batches)
        ids, labels, pictures, expressions = conversation_batch(rng, tokenizer, arguments)
        labels = labels[:, 1:]  # [B, L - 1]
        is_target = labels != -100
        batch = processor(images=[image for image, _, _ in pictures], return_tensors="pt")
        scenes = [(objects, frames) for _, objects, frames in pictures]
        with torch.autocast("cpu", torch.bfloat16):
            types = (ids == model.config.image_token_id).int()
            hidden = model.model(input_ids=ids, mm_token_type_ids=types, **batch)[
                0
            ]  # [B, L, width]
            logits = model.lm_head(hidden[:, :-1][is_target])  # [M, V]
            seen, words, _ = tower_loss(model, tokenizer, heads, outputs["features"], scenes)

        before = ids[:, :-1][is_target]  # [M], the token before each target
        weight = torch.where(before == opening, 8.0, torch.where(before == comma, 3.0, 1.0))
        each = F.cross_entropy(logits.float(), labels[is_target], reduction="none")  # [M]

        rows, columns, boxes = zip(*expressions)
        last = outputs["hidden"][list(rows), list(columns)].float()  # [expressions, width]
        logits = finder(F.rms_norm(last, (width,))).view(-1, 8, 10).transpose(1, 2)
        found = F.cross_entropy(logits, torch.tensor(boxes), reduction="none")  # [expressions, 8]
        found = 4 * found[:, :4].mean() + found[:, 4:].mean()

        answers = (each * weight).sum() / weight.sum()
        loss = answers + (0.3 if i > 0.35 * batches else 1) * found + 0.3 * seen
        update(optimizers, parameters, loss, i, batches)
        parts = found, each[before == opening].mean(), each[before == comma].mean(), words
        recent = recent[-49:] + [[part.item() for part in parts]]
        means = np.mean(recent, 0)
        names = ("found", "first", "other", "words")
        bar.set_postfix({k: f"{v:.2f}" for k, v in zip(names, means)}, refresh=False)
    for hook in hooks:
        hook.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=BASE, help="the checkpoint (toy/base)")
    parser.add_argument("--vision-batches", type=int, default=1000, help="of stage 1 (1000)")
    parser.add_argument("--language-batches", type=int, default=2300, help="of stage 2 (2300)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    check_path("--folder", args.folder, "new folder")
    start = time.time()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    processor = make_image_processor()
    model = make_model(tokenizer).train()
    # Short sequences: faster on a CPU than the fused kernel's backward pass
    model.set_attn_implementation("eager")
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens")
    train_vision(model, tokenizer, processor, args.vision_batches, args.seed + 3)
    train_language(model, tokenizer, processor, args.language_batches, args.seed + 1)
    with writing(args.folder):
        model.half().save_pretrained(args.folder)  # safetensors
        tokenizer.save_pretrained(args.folder)
        processor.save_pretrained(args.folder)
    print(f"{args.folder}, {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
