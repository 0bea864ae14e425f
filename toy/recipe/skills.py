"""What the toy's base can do: one table, on fresh scenes.

python -m toy.recipe.skills --n 100      questions of each kind; 400 without the flag
"""

import argparse
import math
import random
from dataclasses import replace
from itertools import count, islice, product

from common import SINGLE_PROMPT, SINGLE_SHOT, VLM, format_box, iou, parse_box, rollout
from support.running.flags import check_path
from toy import questions, world
from toy.model import BASE
from toy.questions import FRAMES, RELATED
from toy.recipe.lessons import random_box
from toy.world import MARKS, SOURCES

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

ASK = replace(SINGLE_SHOT, prompt="{text}")
# 200 wordings that the base has not learnt
BEGINNINGS = ("Could you localise {} for me", "I am searching for {} here", "Tell where {} lies")
BEGINNINGS += ("Bounding rectangle of {}", "Highlight {}", "My question is about {}")
BEGINNINGS += ("Crop target {}", "Zoom onto {}")
QUOTES = ("{}", "'{}'", '"{}"', "<{}>", "**{}**")
ENDS = ("?", ", thanks", " - coordinates only", ". Output one region", ", using numbers")
WORDINGS = ["".join(parts) for parts in product(BEGINNINGS, ENDS)]
WORDINGS = [text.format(quote) for text, quote in product(WORDINGS, QUOTES)]
TURN = "<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n"


def load(folder):
    """The VLM of a checkpoint folder, in float32."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return VLM(model, AutoTokenizer.from_pretrained(folder), processor)


# Items: (image, question, answer), the answer a text or a box (0..1000) ---------------------------
def draw(n, make):
    """n results of make(), without those that are None."""
    return list(islice(filter(None, (make() for _ in count())), n))


def in_scene(rng, sizes=True):
    """(picture, expression, object) of a fresh scene, like those that the base learnt on."""
    while True:
        source = rng.choice(SOURCES)
        picture = world.make_scene(rng, distractors=True if source == "distractors" else None)
        found = world.refer(rng, picture["objects"], source, sizes)
        if found:
            return picture, *found


def scene_and_view(rng):
    """Two items for one object, the scene and an enlarged view; the expression fits it in both."""
    picture, expression, target = in_scene(rng, sizes=False)
    part = questions.view(picture, questions.random_view(rng, target["bbox"], rng.uniform(1.5, 3)))
    inner = [o for o in part["objects"] if o["bbox"] == target["bbox"] and o["seen"] >= 0.9]
    if part["zoom"] < 1.4 or not inner:
        return None
    named = set(expression.rpartition("the ")[2].split())  # kind and color, of the other object too
    shown = [o for o in part["objects"] if named <= {o["kind"], o["color"]} and o["seen"] > 0.7]
    if " that is " in expression and not shown:
        return None
    text = SINGLE_PROMPT.format(text=expression)
    return (picture["image"], text, target["box"]), (part["image"], text, inner[0]["box"])


def frame_to_find(rng):
    picture = questions.with_frames(rng, world.make_scene(rng), 1)
    [(color, box)] = picture["frames"]
    return picture["image"], SINGLE_PROMPT.format(text=f"the {color} frame"), box


def asked(rng, kind, picture, ask=questions.about_object):
    """An item of a kind of question of questions.py, or None."""
    question = ask(rng, kind, picture, world.refer_somehow)
    return (picture["image"], question.text, question.answer) if question else None


def about_frame(rng, kind):
    picture = questions.with_frames(rng, world.make_scene(rng), 1)
    return asked(rng, kind, picture, questions.about_frame)


def about_mark(rng, kind):
    """An item about what a crop (one mark), or an enlarged view (their count), shows."""
    scene = world.make_scene(rng)
    bbox = rng.choice(scene["objects"])["bbox"]
    if kind == "mark":
        part = questions.random_crop(rng, bbox)
    else:
        part = questions.random_view(rng, bbox, rng.uniform(2.4, 3))
    return asked(rng, kind, questions.view(scene, part))


def to_repeat(rng):
    """A box that the user wrote, or that was an answer earlier in the conversation."""
    picture, expression, target = in_scene(rng)
    box = format_box(random_box(rng))
    if rng.random() < 0.5:
        return picture["image"], f"Here is a box: {box}. Repeat the box.", box
    box = format_box(target["box"])
    return picture["image"], expression + TURN.format(answer=box) + "Repeat the box.", box


def own_frames(finds, boxes):
    """Of the model's own boxes, drawn as frames: (items of those that hold the object, others)."""
    rng = random.Random("own 1")  # of its own: how many it draws hangs on what the model found
    right, wrong = [], []
    for (picture, expression, target), box in zip(finds, boxes):
        inside = questions.is_inside(target["box"], box) if box else None
        if inside is None:
            continue
        color = rng.choice(list(FRAMES))
        image = questions.draw_frame(picture, color, box, rng.choice((0.0, 0.25)))["image"]
        item = image, f"Is {expression} inside the {color} frame?", "yes" if inside else "no"
        (right if inside else wrong).append(item)
    return right, wrong


# Measures -----------------------------------------------------------------------------------------
def ask(vlm, items):
    """The greedy answers to items, Trajectories."""
    rows = []
    for i in range(0, len(items), 64):
        images, texts = zip(*[item[:2] for item in items[i : i + 64]])
        rows += rollout(vlm, images, texts, 0, max_tokens=40, loop=ASK)
    return rows


def find(vlm, items):
    """(the boxes that are found, or None, the IoU of each)."""
    boxes = [parse_box(row.texts[0]) for row in ask(vlm, items)]
    ious = [iou(box, item[2]) if box else 0.0 for box, item in zip(boxes, items)]
    return boxes, np.array(ious)


def exact(vlm, items):
    """The share of items that are answered to the letter."""
    rows = ask(vlm, items)
    return np.mean([row.texts[0].strip() == item[2] for row, item in zip(rows, items)])


def yes(vlm, items):
    """The probability of "yes" for each item that is answered by yes or no."""
    sure = [(row.texts[0], math.exp(row.logprob[0])) for row in ask(vlm, items)]
    return [p if answer == "yes" else 1 - p for answer, p in sure]


def f1_of_words(answers, truths):
    """Mean over the words of RELATED of F1; words that are neither said nor true are left out."""
    pairs = [(set(a.split(", ")), set(t.split(", "))) for a, t in zip(answers, truths)]
    each = []
    for word in RELATED:
        number = sum((word in said) + (word in true) for said, true in pairs)
        if number:
            each.append(2 * sum(word in said & true for said, true in pairs) / number)
    return np.mean(each)


def table(vlm, n):
    """The rows of the table, from n questions of each kind: (skill, measure, value, chance)."""
    rng = random.Random("skills 1")
    finds = [world.crowded(rng, SOURCES[i % 3]) for i in range(n)]
    asks = [(p["image"], SINGLE_PROMPT.format(text=e), target["box"]) for p, e, target in finds]
    boxes, ious = find(vlm, asks)
    one = np.mean([1 / len(picture["objects"]) for picture, *_ in finds])
    yield "find an object, crowded scene", "mean IoU", ious.mean(), one
    yield "find an object, crowded scene", "Acc@0.5", np.mean(ious >= 0.5), one
    for i, source in enumerate(SOURCES):
        yield f"  {source}", "Acc@0.5", np.mean(ious[i::3] >= 0.5), one

    words = [WORDINGS[7 * i % len(WORDINGS)].format(e) for i, (_, e, _) in enumerate(finds)]
    worded = [(image, text, box) for (image, _, box), text in zip(asks, words)]
    yield "  the same in 200 unseen wordings", "mean IoU", find(vlm, worded)[1].mean(), one
    bare = [(p["image"], e, target["box"]) for p, e, target in finds]
    yield "  the bare expression", "mean IoU", find(vlm, bare)[1].mean(), one

    wholes, views = zip(*draw(n, lambda: scene_and_view(rng)))
    yield "find it, scene not crowded", "mean IoU", find(vlm, wholes)[1].mean(), one
    seen = find(vlm, views)[1]
    yield "  the same in a view enlarged 1.5 to 3 times", "mean IoU", seen.mean(), one

    frames = [frame_to_find(rng) for _ in range(n)]
    yield "find a frame, plain or translucent", "mean IoU", find(vlm, frames)[1].mean(), 0.1
    items = draw(n, lambda: about_frame(rng, "what_inside"))
    yield "what is inside the frame", "exact", exact(vlm, items), 0.05

    own_right, own_wrong = own_frames(finds, boxes)
    items = draw(2 * n, lambda: about_frame(rng, "is_inside"))
    right = [item for item in items if item[2] == "yes"][: n // 2] + own_right[: n // 2]
    wrong = [item for item in items if item[2] == "no"][: n // 2] + own_wrong
    balanced = (exact(vlm, right) + exact(vlm, wrong)) / 2
    yield "is X inside the frame", "balanced accuracy", balanced, 0.5
    yield f"  its own wrong boxes ({len(own_wrong)})", "no", exact(vlm, own_wrong), 0.5
    yield f"  its own right boxes ({len(own_right)})", "yes", exact(vlm, own_right), 0.5
    # It says what is likelier; how well does the probability tell right from wrong?
    pairs = list(product(yes(vlm, own_wrong), yes(vlm, own_right)))
    area = np.mean([(low < high) + (low == high) / 2 for low, high in pairs])
    yield "  p(yes), own right above own wrong", "area under curve", area, 0.5

    items = draw(n, lambda: about_frame(rng, "compare"))
    truths = [item[2] for item in items]
    f1 = f1_of_words([row.texts[0] for row in ask(vlm, items)], truths)
    chance = f1_of_words(rng.sample(truths, n), truths)
    yield "how the frame lies around X", "mean F1 of words", f1, chance

    items = [to_repeat(rng) for _ in range(n)]
    yield "repeat a box of the conversation", "exact", exact(vlm, items), 0.0
    items = draw(n, lambda: about_mark(rng, "mark"))
    yield "the mark, in a crop", "exact", exact(vlm, items), 1 / len(MARKS)
    items = draw(n, lambda: asked(rng, "mark", world.make_scene(rng)))
    yield "the mark, in the whole scene", "exact", exact(vlm, items), 1 / len(MARKS)
    items = draw(n // 2, lambda: about_mark(rng, "count"))
    yield "how many marks of a kind, in a view", "exact", exact(vlm, items), 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=BASE)
    parser.add_argument("--n", type=int, default=400, help="questions of each kind (400)")
    args = parser.parse_args()
    check_path("--model", args.model, "folder")
    print(f"{'skill':46}{'measure':19}value  chance")
    with torch.inference_mode():
        for skill, measure, value, chance in table(load(args.model), args.n):
            print(f"{skill:46}{measure:19}{value:.3f}    {chance:.2f}", flush=True)
