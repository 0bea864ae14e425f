"""The Loop that `--feedback` names, its variants in the tables of evaluate.py, and who plays
them."""

from dataclasses import replace

from common import IVT, SINGLE_PROMPT, enlarge, iou, rollout, view_of, zoom
from support.models import merged

# The guard's g and s. A box that differs more from the last one is taken for a slip, not for a
# correction: refining a box that is roughly right does not need more.
GUARD_IOU = 0.6
GUARD_SIDES = 0.35

# A model that was never taught to go on in its own turn is asked again by its user
USER_TURN = (
    "<|im_end|>\n<|im_start|>user\n{picture}{continuation}<|im_end|>\n<|im_start|>assistant\n"
)


def loop_of(args):
    """The Loop of --feedback and --surroundings, with --guard on guarded (not every phase has
    it)."""
    loop = IVT
    if args.feedback == "zoom":
        loop = zoom(args.surroundings)
    if args.feedback == "again":
        loop = asked_again(args.surroundings)
    if getattr(args, "guard", "off") == "on":
        loop = guarded(loop)
    return loop


def plausible(box, last_box):
    """Whether a box agrees with the last one: an IoU of GUARD_IOU or more, width and height changed
    by a share GUARD_SIDES at most."""
    changes = []
    for low, high in ((0, 2), (1, 3)):
        before = last_box[high] - last_box[low]
        changes.append(abs(box[high] - box[low] - before) / before)
    return iou(box, last_box) >= GUARD_IOU and max(changes) <= GUARD_SIDES


def guarded(loop):
    """The loop, in which a box that is not plausible is refused: the last one stays."""

    def to_image(box, last_box):
        found = loop.to_image(box, last_box)
        if found and last_box and not plausible(found, last_box):
            return last_box
        return found

    return replace(loop, to_image=to_image)


def asked_again(surroundings):
    """A loop that needs no training: the single-shot question, asked again on the enlarged
    surroundings of its box.

    The box is not drawn: nobody has told the model whose it is.
    """

    def feedback(image, box):
        return enlarge(image, view_of(box, surroundings))

    words = dict(prompt=SINGLE_PROMPT, continuation=SINGLE_PROMPT, turn=USER_TURN)
    return replace(zoom(surroundings), feedback=feedback, **words)


def play(vlm, *args, **options):
    """`rollout`, with LoRA as a part of the weights where they can take it."""
    with merged(vlm):
        return rollout(vlm, *args, **options)


def rollouts(args, trainee=None):
    """What plays the loops: `play`, or with --engine vllm a function that takes and returns the
    same.

    trainee: the model that is trained on what is played: its trajectories need their ImageTokens,
    and the engine starts at once, beside the largest batch. Exits when there is no vLLM.
    """
    if args.engine == "plain":
        return play
    from speed.vllm_rollout import player

    return player(args, trainee)
