"""What the toy's base can do: one table, on fresh scenes.

python -m toy.recipe.skills --n 100      questions of each kind; 400 without the flag
"""

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

from common import SINGLE_PROMPT, SINGLE_SHOT, VLM, format_box, iou, parse_box, rollout
from toy import questions, world
from toy.model import make_image_processor
from toy.questions import FRAMES, RELATED
from toy.world import MARKS, SOURCES

import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

TURN = "<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n"


def load(folder):
    """The VLM of a checkpoint folder, in float32."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return VLM(model.eval().requires_grad_(False), tokenizer, make_image_processor())


ASK = replace(SINGLE_SHOT, prompt="{text}")


def ask(vlm, images, questions, batch=64):
    """The greedy answers to one question about each image (PIL), as text. A question may hold
    earlier turns (`TURN`).
    """
    return [row.texts[0] for row in replies(vlm, images, questions, batch)]


def replies(vlm, images, questions, batch=64):
    """As `ask`: Trajectories, with the answers' log-probabilities."""
    rows = []
    for i in range(0, len(images), batch):
        part = slice(i, i + batch)
        rows += rollout(vlm, images[part], questions[part], 0, max_tokens=40, loop=ASK)
    return rows


def locate(vlm, pictures, expressions, batch=64):
    """The boxes (0..1000, or None) of expressions, asked for with SINGLE_PROMPT."""
    questions = [SINGLE_PROMPT.format(text=e) for e in expressions]
    images = [picture["image"] for picture in pictures]
    return [parse_box(text) for text in ask(vlm, images, questions, batch)]


def overlap(boxes, truths):
    """The IoU of each box (None: 0) and its truth, both 0..1000."""
    return [iou(box, truth) if box else 0.0 for box, truth in zip(boxes, truths)]


def mean(values):
    """The mean; NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def refer_anyhow(rng, objects):
    """An expression of any source that may be said of a view too."""
    return world.refer_somehow(rng, objects, sizes=True)


def draw(rng, make, n):
    """n results of make(rng), without those that are None."""
    out = []
    while len(out) < n:
        made = make(rng)
        if made:
            out.append(made)
    return out


def found_in_scene(rng, source, sizes=True):
    """(picture, expression, object) of a fresh scene, like those that the base learnt on."""
    distractors = True if source == "distractors" else None
    picture = world.make_scene(rng, distractors=distractors)
    found = world.refer(rng, picture["objects"], source, sizes)
    return (picture, *found) if found else None


def found_in_sample(rng, source):
    """(picture, expression, object) as the methods' samples have them."""
    objects, expression, target = world.crowded(rng, source)
    picture = {"image": world.draw_scene(rng, objects), "objects": objects, "frames": []}
    return picture, expression, target


def scene_and_view(rng):
    """(picture, view, expression, object in the scene, object in the view): the expression fits
    it in both.
    """
    made = found_in_scene(rng, rng.choice(SOURCES), sizes=False)
    if not made:
        return None
    picture, expression, target = made
    part = questions.view(picture, questions.random_view(rng, target["bbox"], rng.uniform(1.5, 3)))
    inner = [o for o in part["objects"] if o["bbox"] == target["bbox"]]
    named = expression.rpartition("the ")[2].split()
    anchors = [o for o in part["objects"] if set(named) <= {o["kind"], o["color"], *named[:-2]}]
    if part["zoom"] < 1.4 or not inner or inner[0]["seen"] < 0.9:
        return None
    if " that is " in expression and not any(o["seen"] > 0.7 for o in anchors):
        return None
    return picture, part, expression, target, inner[0]


def framed(rng, name):
    """(picture with one frame, question, answer) for a question of world.py about a frame."""
    picture = questions.with_frames(rng, world.make_scene(rng), 1)
    asked = getattr(questions, f"ask_{name}")(rng, picture, refer_anyhow)
    return (picture, *asked[:2]) if asked else None


def in_crop(rng, name):
    """(crop, question, answer) for a question of world.py about marks, and the whole scene."""
    scene = world.make_scene(rng)
    target = rng.choice(scene["objects"])
    if name == "mark":
        crop = questions.view(scene, questions.random_crop(rng, target["bbox"]))
    else:
        crop = questions.view(
            scene, questions.random_view(rng, target["bbox"], rng.uniform(2.4, 3))
        )
    asked = getattr(questions, f"ask_{name}")(
        rng, crop, lambda rng, o: world.refer_somehow(rng, o, sizes=False)
    )
    return (crop, *asked[:2], scene) if asked else None


def in_scene(rng):
    """(picture, question, answer): the mark of an object, asked of the whole scene."""
    scene = world.make_scene(rng)
    asked = questions.ask_mark(rng, scene, refer_anyhow)
    return (scene, *asked[:2]) if asked else None


def exact(vlm, made):
    """The share of (picture, question, answer, ...) that are answered to the letter."""
    answers = ask(vlm, [m[0]["image"] for m in made], [m[1] for m in made])
    return mean(a.strip() == m[2] for a, m in zip(answers, made))


def yes(vlm, made):
    """The probability of "yes" for each (picture, question that is answered by yes or no, ...)."""
    rows = replies(vlm, [m[0]["image"] for m in made], [m[1] for m in made])
    sure = [math.exp(row.logprob[0]) for row in rows]
    return [p if row.texts[0] == "yes" else 1 - p for p, row in zip(sure, rows)]


def area_under_curve(low, high):
    """The share of pairs of a value of `low` and one of `high` in which the latter is larger."""
    return mean((a < b) + (a == b) / 2 for a in low for b in high)


def own_frames(rng, finds, boxes):
    """From the model's own boxes: {"right" or "wrong": [(image, question, answer)]}, each drawn
    as a frame of some color.
    """
    out = {"right": [], "wrong": []}
    for (picture, expression, target), box in zip(finds, boxes):
        inside = questions.is_inside(target["box"], box) if box else None
        if inside is None:
            continue
        color = rng.choice(list(FRAMES))
        shown = questions.draw_frame(picture, color, box, rng.choice((0.0, 0.25)))
        question = f"Is {expression} inside the {color} frame?"
        out["right" if inside else "wrong"].append((shown, question, "yes" if inside else "no"))
    return out


def f1_of_words(answers, truths):
    """Mean over the words of RELATED of F1, and {word: F1}; words that are neither said nor true
    are left out.
    """
    each = {}
    for word in RELATED:
        said = [word in a.replace(",", " ").split() for a in answers]
        true = [word in t.replace(",", " ").split() for t in truths]
        both = sum(s and t for s, t in zip(said, true))
        if sum(said) + sum(true):
            each[word] = 2 * both / (sum(said) + sum(true))
    return mean(each.values()), each


def repeats(rng):
    """(picture, question, answer): a box that the user wrote, or that was an answer earlier in
    the conversation.
    """
    made = found_in_scene(rng, rng.choice(SOURCES))
    if not made:
        return None
    picture, expression, target = made
    x1, x2 = sorted(rng.sample(range(1001), 2))
    y1, y2 = sorted(rng.sample(range(1001), 2))
    box = format_box([x1, y1, x2, y2])
    if rng.random() < 0.5:
        return picture, f"Here is a box: {box}. Repeat the box.", box
    box = format_box(target["box"])
    return picture, expression + TURN.format(answer=box) + "Repeat the box.", box


def table(vlm, n, seed):
    """The rows of the table: (skill, measure, value, chance, target)."""
    rng = random.Random(f"skills {seed}")
    rows = []

    def add(skill, measure, value, chance, target=""):
        rows.append((skill, measure, value, chance, target))
        print(f"{skill:44}{measure:19}{value:6.3f}  {chance:>6}  {target}".rstrip(), flush=True)

    print(f"{'skill':44}{'measure':19}{'value':>6}  {'chance':>6}  target")
    sources = iter(range(10**9))
    finds = draw(rng, lambda rng: found_in_sample(rng, SOURCES[next(sources) % 3]), n)
    boxes = locate(vlm, [m[0] for m in finds], [m[1] for m in finds])
    ious = overlap(boxes, [m[2]["box"] for m in finds])
    chance = f"{mean(1 / len(m[0]['objects']) for m in finds):.2f}"
    add("find an object, crowded scene", "mean IoU", mean(ious), chance, "0.75 to 0.85")
    add(
        "find an object, crowded scene",
        "Acc@0.5",
        mean(v >= 0.5 for v in ious),
        chance,
        "0.80 to 0.92",
    )
    for source in SOURCES:
        some = [v for v, m in zip(ious, finds) if found_by(m, source)]
        add(f"  {source}", "Acc@0.5", mean(v >= 0.5 for v in some), chance, "")

    views = draw(rng, scene_and_view, n)
    whole = overlap(
        locate(vlm, [m[0] for m in views], [m[2] for m in views]), [m[3]["box"] for m in views]
    )
    inner = overlap(
        locate(vlm, [m[1] for m in views], [m[2] for m in views]), [m[4]["box"] for m in views]
    )
    add(
        "find it in a view enlarged 1.5 to 3 times",
        "mean IoU",
        mean(inner),
        chance,
        f"{mean(whole) + 0.05:.3f}",
    )
    add("  the same in the whole scene, not crowded", "mean IoU", mean(whole), chance, "")

    frames = [questions.with_frames(rng, world.make_scene(rng), 1) for _ in range(n)]
    names = [f"the {picture['frames'][0][0]} frame" for picture in frames]
    ious = overlap(locate(vlm, frames, names), [picture["frames"][0][1] for picture in frames])
    add("find a frame, plain or translucent", "mean IoU", mean(ious), "0.1", "0.85")

    made = draw(rng, lambda rng: framed(rng, "what_inside"), n)
    add("what is inside the frame", "exact", exact(vlm, made), "0.05", "0.85")

    # Of their own dice: how many they throw hangs on what the model found
    own = own_frames(random.Random(f"own {seed}"), finds, boxes)
    made = draw(rng, lambda rng: framed(rng, "is_inside"), 2 * n)
    right = [m for m in made if m[2] == "yes"][: n // 2] + own["right"][: n // 2]
    wrong = [m for m in made if m[2] == "no"][: n // 2] + own["wrong"]
    balanced = (exact(vlm, right) + exact(vlm, wrong)) / 2
    add("is X inside the frame", "balanced accuracy", balanced, "0.5", "0.85")
    add(f"  its own wrong boxes ({len(own['wrong'])})", "no", exact(vlm, own["wrong"]), "0.5", "")
    add(f"  its own right boxes ({len(own['right'])})", "yes", exact(vlm, own["right"]), "0.5", "")
    # Its answer takes a yes for the likelier one; how well does its probability tell them apart?
    area = area_under_curve(yes(vlm, own["wrong"]), yes(vlm, own["right"]))
    number = min(len(own["wrong"]), len(own["right"]))
    add(f"  p(yes), own right above own wrong ({number})", "area under curve", area, "0.5", "")

    made = draw(rng, lambda rng: framed(rng, "compare"), n)
    answers = ask(vlm, [m[0]["image"] for m in made], [m[1] for m in made])
    f1, each = f1_of_words(answers, [m[2] for m in made])
    shuffled = rng.sample([m[2] for m in made], n)
    chance = f"{f1_of_words(shuffled, [m[2] for m in made])[0]:.2f}"
    add("how the frame lies around X", "mean F1 of words", f1, chance, "0.80")
    print("  " + "  ".join(f"{word} {value:.2f}" for word, value in each.items()))

    add("repeat a box of the conversation", "exact", exact(vlm, draw(rng, repeats, n)), "0", "0.99")

    one = f"{1 / len(MARKS):.2f}"
    add(
        "the mark, in a crop",
        "exact",
        exact(vlm, draw(rng, lambda rng: in_crop(rng, "mark"), n)),
        one,
        "0.95",
    )
    add(
        "the mark, in the whole scene",
        "exact",
        exact(vlm, draw(rng, in_scene, n)),
        one,
        "near chance",
    )
    made = draw(rng, lambda rng: in_crop(rng, "count"), n // 2)
    add("how many marks of a kind, in a view", "exact", exact(vlm, made), "0.5", "")
    return rows


def found_by(made, source):
    """Whether the expression of (picture, expression, object) is of this source."""
    relation = " that is " in made[1]
    superlative = any(word in made[1] for word in world.SUPERLATIVES)
    return source == ("relations" if relation else "distractors" if superlative else "attributes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1] / "base"))
    parser.add_argument("--n", type=int, default=400, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with torch.inference_mode():
        table(load(args.model), args.n, args.seed)
