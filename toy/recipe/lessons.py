"""What the toy's base learns from: pictures with labels for each image token, conversations.

The conversations hold general skills alone: boxes for expressions and frames, what lies where, what
a frame holds and how it lies, marks, boxes and words to be repeated. They hold no prompt of the
methods but SINGLE_PROMPT, no sentence of a trace, and no box of the model's own.
"""

import functools
import random
from string import ascii_lowercase
from types import SimpleNamespace

from common import SINGLE_PROMPT, format_box, mrope_positions
from toy import questions, world
from toy.model import PATCH, VOCABULARY
from toy.questions import FRAMES, RELATED, Question
from toy.world import COLORS, KINDS, MARKS, SEEN, SIZES, SOURCES, SUPERLATIVES

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

CELLS = SEEN // PATCH // 2  # image tokens along a side
LEGIBLE = 2.4  # enlarged so much, a view shows marks
# A step's batch has two halves, so that two processes can have one each
PICTURES = 32  # in half a batch of stage 1
ROWS, BUDGET = 17, 170  # conversations in half a batch, and about how many tokens each has
WORDED = 32  # single questions in many wordings, in half a batch of the last stage
CROPS = 20  # for the tower alone, beside those of the conversations
LEVELS = 200, 400  # steps of stage 2 at which conversations become harder
WORDS = [*COLORS, *KINDS, *SIZES, *MARKS]
NAMES = {*WORDS, *FRAMES, *SUPERLATIVES}  # what most wordings have in the description alone
# Requests of the last stage; "{}" is what to find
OPENINGS = ("", "Please ", "Now ", "Hi! ", "Look at the picture. ", "Task: ", "One more: ")
REQUESTS = ("find {}", "show me {}", "mark {}", "detect {}", "draw a box on {}", "select {}")
REQUESTS += ("give the box of {}", "a box for {}", "which part is {}", "I look for {}")
REQUESTS += ("can you see {}", "do you know {}", "would you get me {}", "{} is what I need")
ENDINGS = ("", ".", "?", "?", " in this picture.")
ENDINGS += (" and write its box.", ", as JSON", ". Box only.")
BOXES = ("find", "frame")  # the kinds of questions that are answered by a box
ANSWERS = [*RELATED, "yes", "no", *COLORS, *KINDS, *MARKS]


# What the tower sees, and what its tokens are taught ----------------------------------------------
def patches_of(image):
    """A square PIL image -> [patches, 3 * 2 * PATCH * PATCH] as the image processor gives them."""
    seen = np.asarray(image.resize((SEEN, SEEN), Image.BICUBIC), np.float32) / 127.5 - 1
    blocks = seen.reshape(CELLS, 2, PATCH, CELLS, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    flat = blocks.reshape(CELLS * CELLS * 4, 3, 1, PATCH * PATCH)  # [patches, colors, time, pixels]
    return np.repeat(flat, 2, 2).reshape(len(flat), -1)


def digits(box):
    """The first and the second digit of each coordinate (0..1000; 1000 counts as 990)."""
    return [min(9, v // 100) for v in box] + [v // 10 % 10 if v < 1000 else 9 for v in box]


def lies(frame, box):
    """How a frame lies around a box: shift in sizes of the box, log of the ratio of sizes."""
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
    """What each image token is taught: a dict of arrays [tokens, ...]; -1: it is not taught."""
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
    if picture["zoom"] > 1:
        out["known"][:, [WORDS.index(size) for size in SIZES]] = 0
    if picture["zoom"] < LEGIBLE:
        out["known"][:, -len(MARKS) :] = 0
    # An object is taught where it covers 2,000 of a token's 27,800 (0..1000 squared) or more
    most = np.full(n, 2000.0)
    for o in picture["objects"]:
        area = overlap(o["box"])
        here = area > most
        most = np.maximum(most, area)
        names = [o["color"], o["kind"], o["size"]]
        out["words"][here, : -len(MARKS)] = [float(word in names) for word in WORDS[: -len(MARKS)]]
        spot = [(v - c) * picture["zoom"] for v, c in zip(o["spot"], picture["corner"])]
        out["words"][cells_at(spot), WORDS.index(o["mark"])] = 1
        out["digits"][here] = digits(o["box"])
        out["box"][here] = np.array(o["box"]) / 1000
        out["related"][here] = -1
        for color, frame in picture["frames"]:
            c = list(FRAMES).index(color)
            said, inside = questions.compare(frame, o["box"]), questions.is_inside(o["box"], frame)
            out["related"][here, c, :-1] = [float(word in said) for word in RELATED]
            out["related"][here, c, -1] = -1 if inside is None else float(inside)
            out["lies"][here, c] = lies(frame, o["box"])
    for color, frame in picture["frames"]:
        here = overlap(frame) > 600
        out["frame"][here] = list(FRAMES).index(color)
        out["frame_digits"][here] = digits(frame)
        out["frame_box"][here] = np.array(frame) / 1000
    return out


def pictures_batch(pictures, labels=token_labels):
    """Pictures -> a dict of tensors: patches [n, patches, ...] and labels [n, tokens, ...]."""
    rows = [{"patches": patches_of(p["image"]), **labels(p)} for p in pictures]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


# Conversations ------------------------------------------------------------------------------------
def next_picture(rng, level, scene):
    """(picture, scene): something new to look at, often of the scene before."""
    if scene is None or rng.random() < 0.4:
        low, high, distractors = ((2, 3, False), (2, 4, None), (2, 5, None))[level]
        scene = world.make_scene(rng, low, high, distractors)
    picture = scene
    way = rng.random()
    target = rng.choice(scene["objects"])["bbox"]
    if way < 0.15:
        picture = questions.view(scene, questions.random_view(rng, target, rng.uniform(1.4, 3)))
    elif way < 0.4:
        picture = questions.view(scene, questions.random_crop(rng, target))
    if rng.random() < (0.65 if picture is scene else 0.35):
        picture = questions.with_frames(rng, picture, rng.choice((1, 1, 1, 2)))
    return picture, scene


def random_box(rng):
    """Any box (0..1000)."""
    x1, x2 = sorted(rng.sample(range(1001), 2))
    y1, y2 = sorted(rng.sample(range(1001), 2))
    return [x1, y1, x2, y2]


def random_words(rng):
    """A few words in no order: to repeat them teaches every word, and no sentence."""
    text = rng.choice(VOCABULARY)
    for _ in range(rng.randint(2, 8)):
        text += rng.choice((" ", " ", " ", ", ", ". ", "\n")) + rng.choice(VOCABULARY)
    return text + rng.choice((".", ""))


def filler(rng, mean, words):
    """About `mean` words in no order, maybe none; three in ten are made up."""
    found = []
    for _ in range(min(50, int(rng.expovariate(1 / mean)))):
        word = rng.choice(words)
        if rng.random() < 0.3:
            word = "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 8)))
        found.append(word + rng.choice((*[""] * 6, ",", ".", ":", "?")))
    return " ".join(found)


def reword(rng, question):
    """Puts a question in other words: what is asked is the one thing in them to be answered."""
    is_box = question.kind in BOXES
    plain = [word for word in VOCABULARY if word.lower().rstrip("s") not in NAMES]
    way = rng.random()
    if way < 0.1 or question.kind in ("words", "repeat", "again"):
        before, after = "", ""
    elif is_box and way < 0.25:
        before, after = SINGLE_PROMPT.split("{text}")
    elif is_box and way < 0.5:
        request = rng.choice(OPENINGS) + rng.choice(REQUESTS) + rng.choice(ENDINGS)
        before, after = request.split("{}")
    else:
        quote = rng.choice(("", "", '"', "'", "*"))
        length = rng.choice((2, 12)) if is_box else 5
        words = plain if rng.random() < 0.7 else VOCABULARY
        before = filler(rng, length, words) + rng.choice((": ", ". ", "\n", " ", " "))
        after = rng.choice(("", ". ", " - ", "\n", "?", ", ", " "))
        after += filler(rng, length, words) + rng.choice(("", "", ".", "?"))
        if rng.random() < 0.25:
            after += f"\n{quote}{question.text}{quote}"
        before, after = before + quote, quote + after
    question.before, question.after = before, after
    if rng.random() < (0.5 if is_box else 0.2):
        thought = filler(rng, 10, [word for word in plain if "think" not in word])
        question.thought = f"<think>{thought}</think>" + rng.choice(("\n", "\n", ""))


def next_question(rng, picture, level, said, repeats):
    """A Question about a picture, or None. said: those with a box so far; repeats: whether one may
    ask to repeat something."""
    way = rng.random() if repeats else 1.0
    if way < 0.03:
        words = random_words(rng)
        return Question("words", f"Repeat: {words}", words)
    if way < 0.06:
        box = format_box(random_box(rng))
        return Question("repeat", f"Here is a box: {box}. Repeat the box.", box)
    if way < 0.12 and said:
        earlier = rng.choice(said)
        if rng.random() < 0.5:
            return Question("repeat", "Repeat the box.", said[-1].answer)
        return Question("again", earlier.text, earlier.answer)
    sources = SOURCES if level else SOURCES[:1]
    refer_to = functools.partial(world.refer_somehow, sources=sources, tries=4)
    if picture["frames"] and rng.random() < 0.75:
        kind = rng.choice(("frame", "what_inside", "is_inside", "compare", "compare"))
        return questions.about_frame(rng, kind, picture, refer_to)
    kinds = ("find",) * 9 + ("where",)
    if picture["zoom"] >= LEGIBLE and rng.random() < 0.6:
        kinds = ("mark", "mark", "mark", "count")
    return questions.about_object(rng, rng.choice(kinds), picture, refer_to)


def conversation(rng, level, encode, answered, worded=False):
    """A chat of about BUDGET tokens: [(picture where it is shown first, else None, Question)];
    worded: a single question in one of many wordings."""
    turns, scene, length = [], None, 0
    while length < BUDGET:
        picture, scene = next_picture(rng, level, scene)
        said, asked, first = [], set(), True
        for _ in range(3 * (rng.randint(2, 7) if answered else 10)):
            question = next_question(rng, picture, level, said, answered)
            # The last stage is about what to find: half of the other questions are left out
            if not question or worded and question.kind not in BOXES and rng.random() < 0.5:
                continue
            key = repr([question.kind, question.object, question.frame])
            if question.kind not in ("words", "repeat", "again"):
                if key in asked:  # in other words, it could be answered without looking
                    continue
                asked.add(key)
            if question.kind in BOXES:
                said.append(question)
                if rng.random() < (0.7 if first else 0.15):  # in which words it is asked
                    question.before, question.after = SINGLE_PROMPT.split("{text}")
            turns.append((picture if first else None, question))
            length += 40 * first + 8 + len(encode(question.text))
            if worded:
                reword(rng, question)
                return turns
            length += len(encode(question.answer)) * answered
            first = False
            if length >= BUDGET or len(asked) >= 10:
                break
    return turns


def write(turns, encode, answered):
    """A conversation -> ids, labels, [(place where something is to be known, Question)]."""
    shown = "<|vision_start|>" + "<|image_pad|>" * CELLS**2 + "<|vision_end|>"
    ids, labels, places = [], [], []
    for picture, q in turns:
        ids += encode("<|im_start|>user\n" + shown * bool(picture))
        # The last word of an expression is to know the object, whatever the question
        if q.expression:
            head = q.text[: q.text.index(q.expression) + len(q.expression)]
            place = len(ids) + len(encode(q.before + head)) - 1
            places.append((place, Question("named", "", "", q.object)))
        places.append((len(ids) + len(encode(q.before + q.text)) - 1, q))
        ids += encode(q.before + q.text + q.after) + encode("<|im_end|>\n")
        if answered:
            ids += encode("<|im_start|>assistant\n" + q.thought)
            answer = encode(q.answer + "<|im_end|>")
            labels += [-100] * (len(ids) - len(labels)) + answer
            ids += answer + encode("\n")
    return ids, labels + [-100] * (len(ids) - len(labels)), places


def hints(asked):
    """What the last token of each Question is taught: a dict of tensors [questions, ...]."""
    out = {"digits": [], "box": [], "frame_digits": [], "frame_box": [], "answer": []}
    for q in asked:
        for name, box in (("", q.object), ("frame_", q.frame)):
            out[name + "digits"].append(digits(box) if box else [-1] * 8)
            out[name + "box"].append([v / 1000 for v in box] if box else [0.0] * 4)
        spoken = q.answer.replace(",", "").split()
        taught = q.kind in ("what_inside", "is_inside", "compare", "mark")
        out["answer"].append([float(word in spoken) if taught else -1.0 for word in ANSWERS])
    return {name: torch.tensor(value) for name, value in out.items()}


def chat_batch(rng, level, tokenizer, answered, worded=False):
    """Conversations as a batch of tensors. answered: whether answers follow the questions; without
    them a conversation holds three times as many. worded: beside half as many, single questions as
    of `conversation`; then the answers are all that is taught."""
    encode = functools.cache(lambda text: tokenizer.encode(text, add_special_tokens=False))
    shape = SimpleNamespace(rows=CELLS, columns=CELLS)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids, labels, positions, pictures, last, asked, kinds = [], [], [], [], [], [], []
    for row in range(ROWS // 2 + WORDED if worded else ROWS):
        turns = conversation(rng, level, encode, answered, worded and row >= ROWS // 2)
        tokens, learnt, places = write(turns, encode, answered)
        images = [picture for picture, _ in turns if picture]
        pictures += images
        ids.append(torch.tensor(tokens))
        labels.append(torch.tensor(learnt))
        at = mrope_positions(tokens, [shape] * len(images), pad)[0]
        positions.append(torch.tensor(at))  # [length, 3]
        last += [[row, place] for place, _ in places]
        asked += [q for _, q in places]
        kinds += [q.kind for _, q in turns if answered]
    batch = {
        "ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "positions": pad_sequence(positions, batch_first=True).permute(2, 0, 1),
        "kinds": kinds,
    }
    if worded:
        return {**batch, "pictures": pictures_batch(pictures, lambda picture: {})}
    # Crops that nobody asks about: marks are small, and the tower needs many to tell them apart
    for i in range(CROPS):
        if i % 3 == 0:
            scene = world.make_scene(rng)
        target = rng.choice(scene["objects"])
        pictures.append(questions.view(scene, questions.random_crop(rng, target["bbox"])))
    return {
        **batch,
        "pictures": pictures_batch(pictures),
        "last": torch.tensor(last),  # [questions, 2]: row and place of its last token
        "about": hints(asked),  # what that token is taught
    }


class Batches(torch.utils.data.Dataset):
    """The batches by (step, half): a run can go on where it was killed, in one process or two."""

    def __init__(self, steps, tokenizer):
        self.steps = steps
        self.tokenizer = tokenizer

    def __getitem__(self, number):
        torch.set_num_threads(1)
        step, half = number
        rng = random.Random(f"0 {step} {half}")
        tower_steps, question_steps, answer_steps, _ = self.steps
        if step < tower_steps:
            level = 1 + (step > tower_steps // 2)
            pictures = [next_picture(rng, level, None)[0] for _ in range(PICTURES)]
            return {"pictures": pictures_batch(pictures)}
        step -= tower_steps
        level = sum(step >= begins for begins in LEVELS)
        worded = step >= question_steps + answer_steps
        return chat_batch(rng, level, self.tokenizer, step >= question_steps, worded)
