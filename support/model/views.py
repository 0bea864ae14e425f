"""The Loop that `--feedback` names, and its variants in the tables of evaluate.py."""

from dataclasses import replace
from functools import partial

from common import (
    CORRECTION,
    IVT,
    SINGLE_PROMPT,
    WHOLE,
    box_in_view,
    denormalize_box,
    draw_overlay,
    iou,
)

from PIL import Image

CLOSER = "The view shows the surroundings of your last prediction, enlarged. "
CLOSER += CORRECTION.replace("coordinates", "coordinates in this view")

SMALLEST_VIEW = 100  # a tenth of the image: a box that is wrongly tiny would show nothing else

# The guard's g and s. A box that differs more from the last one is taken for a slip, not for a
# correction: refining a box that is roughly right does not need more.
GUARD_IOU = 0.6
GUARD_SIDES = 0.35

# A model that was never taught to go on in its own turn is asked again by its user
USER_TURN = (
    "<|im_end|>\n<|im_start|>user\n{picture}{continuation}<|im_end|>\n<|im_start|>assistant\n"
)


def loop_of(args):
    """The Loop of --feedback and --surroundings; guarded with --guard on, where there is one."""
    loop = IVT
    if args.feedback == "zoom":
        loop = zoom(args.surroundings)
    if args.feedback == "again":
        loop = asked_again(args.surroundings)
    if getattr(args, "guard", "off") == "on":
        loop = guarded(loop)
    return loop


def view_of(box, surroundings):
    """The part of the image around a box, of its proportions, moved into it; all in 0..1000. Its
    sides are `surroundings` times the longer side of `box`; without a box, the whole image."""
    if box is None:
        return WHOLE
    x1, y1, x2, y2 = box
    side = min(1000, max(SMALLEST_VIEW, round(surroundings * max(x2 - x1, y2 - y1))))
    x, y = (min(1000 - side, max(0, (a + b - side) // 2)) for a, b in ((x1, x2), (y1, y2)))
    return [x, y, x + side, y + side]


def enlarge(image, view):
    """What a view (0..1000) shows of an image, as large as the image; PIL."""
    bbox = denormalize_box(view, *image.size)
    return image.resize(image.size, Image.BICUBIC, box=bbox)


def zoom(surroundings):
    """The Loop that looks closer (ours): the surroundings of the last box, enlarged, in whose
    coordinates it answers. A large photo reaches the model reduced: this view holds pixels that it
    has not seen."""

    def feedback(image, box):
        view = view_of(box, surroundings)
        return draw_overlay(enlarge(image, view), box and box_in_view(box, view))

    view = partial(view_of, surroundings=surroundings)
    return replace(IVT, feedback=feedback, continuation=CLOSER, view=view)


def implausible(box, last_box):
    """Whether a box disagrees with the last one: IoU, width or height (GUARD_IOU, GUARD_SIDES)."""
    changes = []
    for low, high in ((0, 2), (1, 3)):
        before = last_box[high] - last_box[low]
        changes.append(abs(box[high] - box[low] - before) / before)
    return iou(box, last_box) < GUARD_IOU or max(changes) > GUARD_SIDES


def guarded(loop):
    """The loop, in which a box that is implausible is refused: the last one stays."""
    return replace(loop, refuses=implausible)


def asked_again(surroundings):
    """A loop that needs no training: the single-shot question, asked again on the enlarged
    surroundings of its box, which is not drawn: nobody has told the model whose it is."""
    loop = zoom(surroundings)
    words = dict(prompt=SINGLE_PROMPT, continuation=SINGLE_PROMPT, without_box="", turn=USER_TURN)
    return replace(loop, feedback=lambda image, box: enlarge(image, loop.view(box)), **words)
