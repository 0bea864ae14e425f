"""What the toy's base learns from: chats about scenes, and about coloured frames drawn on them."""

from common import (
    IVT_PROMPT,
    SINGLE_PROMPT,
    draw_overlay,
    format_box,
    iou,
    normalize_box,
    parse_box,
    step_text,
)
from support.traces import place
from toy.world import SIDE, SOURCES, describe, make_scene, refer, render

FRAMES = {"red": (255, 0, 0), "green": (0, 220, 0), "blue": (0, 60, 255), "yellow": (255, 230, 0)}


def box_of(o):
    """An object's box in 0..1000."""
    return normalize_box(o["bbox"], SIDE, SIDE)


# --------------------------------------------------------------------------------------------------
# Frames: a box that someone has drawn on the picture, with or without a translucent filling
# --------------------------------------------------------------------------------------------------
def random_frame(rng, objects):
    """A frame (0..1000) around an object, jittered, or anywhere; at least 4 pixels a side."""
    while True:
        if rng.random() < 0.6:
            x1, y1, x2, y2 = rng.choice(objects)["bbox"]
            spread = rng.choice((0.03, 0.15, 0.4))
            sizes = (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
            frame = [v + rng.gauss(0, spread) * size for v, size in zip((x1, y1, x2, y2), sizes)]
        else:
            w = rng.uniform(7, 34)
            h = rng.uniform(7, 34)
            x = rng.uniform(0, SIDE - w)
            y = rng.uniform(0, SIDE - h)
            frame = [x, y, x + w, y + h]
        frame = [min(SIDE, max(0, v)) for v in frame]
        if frame[2] - frame[0] >= 4 and frame[3] - frame[1] >= 4:
            return normalize_box(frame, SIDE, SIDE)


def add_frames(rng, image, objects):
    """The image with one or two frames drawn on it, and the list of their (color, box)."""
    count = rng.choice((1, 1, 2))
    colors = rng.sample(list(FRAMES), count)
    frames = [(color, random_frame(rng, objects)) for color in colors]
    for color, box in frames:
        image = draw_overlay(image, box, FRAMES[color], alpha=rng.choice((0.0, 0.15, 0.25, 0.35)))
    return image, frames


def compare(frame, box):
    """Words for how a frame lies around an object's box, both 0..1000; "well" if nothing is off."""
    w = box[2] - box[0]
    h = box[3] - box[1]
    dx = (frame[0] + frame[2] - box[0] - box[2]) / 2
    dy = (frame[1] + frame[3] - box[1] - box[3]) / 2
    apart = iou(frame, box) == 0
    words = []
    if apart:
        words.append("apart")
    if dx < -0.1 * w:
        words.append("left")
    elif dx > 0.1 * w:
        words.append("right")
    if dy < -0.1 * h:
        words.append("high")
    elif dy > 0.1 * h:
        words.append("low")
    if not apart:
        words += compare_sizes((frame[2] - frame[0]) / w, (frame[3] - frame[1]) / h)
    return ", ".join(words) or "well"


def compare_sizes(width, height):
    """Words for the width and the height of a frame, given as multiples of the object's."""
    words = []
    if width < 0.85:
        words.append("narrow")
    elif width > 1.18:
        words.append("wide")
    if height < 0.85:
        words.append("short")
    elif height > 1.18:
        words.append("tall")
    return words


def objects_inside(objects, frame):
    """Those that reach out of the frame (0..1000) by no more than 10 on any side."""
    inside = []
    for o in objects:
        x1, y1, x2, y2 = box_of(o)
        starts_inside = x1 >= frame[0] - 10 and y1 >= frame[1] - 10
        if starts_inside and x2 <= frame[2] + 10 and y2 <= frame[3] + 10:
            inside.append(o)
    return inside


def frame_question(rng, objects, frames):
    """(question or expression, answer) about one of the frames."""
    color, box = rng.choice(frames)
    kind = rng.choice(("locate", "locate", "inside", "compare", "where"))
    inside = objects_inside(objects, box)
    if kind == "inside" and len(inside) == 1:
        if rng.random() < 0.5:
            answer = "the " + describe(inside[0], ("size", "color", "kind"))
            return f"What is inside the {color} frame?", answer
        return f"the {inside[0]['kind']} inside the {color} frame", format_box(box_of(inside[0]))
    if kind == "where":
        return f"Where is the {color} frame?", place(box)
    if kind == "compare":
        for _ in range(8):
            found = refer(rng, objects, rng.choice(SOURCES))
            if found:
                question = f"How does the {color} frame lie around {found[0]}?"
                return question, compare(box, box_of(found[1]))
    return f"the {color} frame", format_box(box)


# --------------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------------
def ask(rng, objects, frames, count, where, sources):
    """Up to `count` different questions about one picture: a dict of their answers.

    A question is a sentence or an expression; of the expressions, a share `where` become sentences
    that ask for words instead of a box.
    """
    answers = {}
    for _ in range(40):  # not every draw gives a question, and a small scene has few
        if len(answers) == count:
            break
        if frames and rng.random() < 0.35:
            question, answer = frame_question(rng, objects, frames)
        else:
            # An object that is alone has attributes only
            source = rng.choice(sources) if len(objects) > 1 else "attributes"
            found = refer(rng, objects, source)
            if not found:
                continue
            question, target = found
            answer = format_box(box_of(target))
            if rng.random() < where:
                question = f"Where is {question}?"
                answer = place(box_of(target))
        answers.setdefault(question, answer)
    return answers


def conversation(
    rng,
    low,
    high,
    *,
    images=1,
    questions=4,
    where=0.07,
    frames=True,
    sources=SOURCES,
    distractors=None,
    think=False,
):
    """A chat about `images` scenes of `low` to `high` objects, up to `questions` about each.

    Returns segments: ("text", str), ("image", (PIL, objects, frames)), ("expression", (str, box or
    None)) and ("answer", str), which alone is learnt. frames: whether pictures may have some.

    With `think`, the first question about a picture may be the IVT prompt, and its answer the
    sentence that the template teacher writes at step 0, then the box. A later image is, one time
    in two, the scene before it once more: like a video, or a picture that someone has drawn on.
    """
    segments = []
    objects = None
    for i in range(images):
        if objects is None or rng.random() < 0.5:
            objects = make_scene(rng, low, high, distractors)
            clean = render(rng, objects)
        picture = clean
        drawn = []
        if frames and rng.random() < (0.7 if i else 0.3):
            picture, drawn = add_frames(rng, clean, objects)
        answers = ask(rng, objects, drawn, questions, where, sources)
        for j, (question, answer) in enumerate(answers.items()):
            before = after = ""  # the first expression stands in a prompt, later ones alone
            box = parse_box(answer)
            if j == 0 and not question.endswith("?"):
                prompt = SINGLE_PROMPT
                if think and box and rng.random() < 0.6:
                    prompt = IVT_PROMPT
                    answer = step_text(f"I look for the object. I see it at the {place(box)}.", box)
                before, after = prompt.split("{text}")
            segments.append(("text", "<|im_start|>user\n"))
            if j == 0:
                segments.append(("image", (picture, objects, drawn)))
            segments += [
                ("text", before),
                ("expression", (question, box)),
                ("text", after + "<|im_end|>\n<|im_start|>assistant\n"),
                ("answer", answer + "<|im_end|>"),
                ("text", "\n"),
            ]
    return segments
