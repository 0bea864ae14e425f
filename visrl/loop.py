"""VisRL's loop, its crop and its loss: what the phases share. Read this file after common.py.

One trajectory, all in one assistant turn:

    user       [image] question, and the request for a box
    assistant  {"bbox_2d": [x1, y1, x2, y2]}        step 0, ends at the box
               [crop] the request for an answer     injected
               answer <end of turn>                 step 1

The paper (Section 3, "Method overview") shows the crop in a second user turn; here the assistant
turn goes on, as in IVT, so that both papers are one rollout. In shapes: N pairs of a batch, K steps
of a trajectory (1: the box or the answer alone, 2: both), M targets.
"""

import functools
import math
import re
from dataclasses import replace

from common import Loop, box_complete, build_trajectory, denormalize_box, format_box
from support.data.samples import is_box

import torch
from torch.nn import functional as F

# Section 4.2 asks for "the bounding box coordinate of the region" and then for an answer by "the
# corresponding sub-image". The same two steps, in words that the toy's tokenizer knows: one wording
# for both presets.
PROMPT = (
    "{text}\nAnswer the question about the image. First think about which region matters, then "
    "report its bbox coordinates in JSON format."
)
CONTINUATION = (
    "This is the region that you chose, enlarged. Now answer the question in a few words."
)
END = "<|im_end|>"  # a target of step 1, so that ending is learnt


# The crop, and the loop ---------------------------------------------------------------------------
LEAST = 28  # pixels: a narrower crop shows nothing that could be read
LONGEST = 100  # the longer side in shorter ones; Qwen3-VL's image processor refuses 200
MARGIN = 0.1  # of the longer side, on each side of a square crop


def crop(image, box, square=False):
    """What lies in a box (0..1000; None: all) of an image (PIL), cut out of it at its full size."""
    return image.crop(crop_bbox(box, *image.size, square))


def crop_bbox(box, width, height, square=False):
    """The part that a crop shows of an image of this size, in whole pixels, rounded outwards. A box
    that is too small or too narrow grows about its centre, and then moves into the image. square:
    the square about the box with a margin, as far as the image has room."""
    if box is None:
        return 0, 0, width, height
    x1, y1, x2, y2 = denormalize_box(box, width, height)
    across, down = x2 - x1, y2 - y1
    if square:
        across = down = max(across, down) * (1 + 2 * MARGIN)
    least = max(LEAST, max(across, down) / LONGEST)
    spans = []
    for side, middle, limit in ((across, (x1 + x2) / 2, width), (down, (y1 + y2) / 2, height)):
        side = min(max(side, least), limit)
        low = min(max(middle - side / 2, 0), limit - side)
        # Rounded first: 160 + 1e-14 is no reason for one more pixel
        spans.append((math.floor(round(low, 6)), min(limit, math.ceil(round(low + side, 6)))))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


VISRL = Loop(
    prompt=PROMPT,
    feedback=crop,
    continuation=CONTINUATION,
    ends=lambda text, t: t == 0 and box_complete(text),  # step 1: at the end of the turn
)
LOOPS = {  # --crop
    "box": VISRL,
    "square": replace(VISRL, feedback=functools.partial(crop, square=True)),
}
# With T = 0, the question alone and its answer: no loop at all
ASK = replace(VISRL, prompt="{text}", ends=lambda text, t: False)


def path_trajectory(vlm, question, images, box, answer):
    """The sequence of a path: images (ImageTokens) are the whole image and the crop. With `answer`
    None it ends behind the box."""
    written = [format_box(box)]
    if answer is not None:
        written.append(answer + END)
    return build_trajectory(vlm, images[: len(written)], question, written, VISRL)


def answer_trajectory(vlm, question, image, answer):
    """The sequence of a bare question about one picture (ImageTokens) and its answer."""
    return build_trajectory(vlm, [image], question, [answer + END], ASK)


# Answers ------------------------------------------------------------------------------------------
def normalized(text):
    """Lower case, without articles, punctuation and spaces to spare."""
    words = re.findall(r"[^\W_]+", text.lower())
    content = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(content or words)  # "A" may be the answer


def is_right(response, answer):
    """Whether a response is the true answer, up to case, articles and punctuation. Ours: the paper
    has a judge model score each response from 0 to 1."""
    return normalized(response) == normalized(answer)


# Step-level DPO (Section 3.2) ---------------------------------------------------------------------
def is_pair(row):
    """Whether both sides of a row of data/pairs.jsonl have a box and an answer."""
    sides = row["chosen"], row["rejected"]
    return all(is_box(side["box"]) and isinstance(side["answer"], str) for side in sides)


def step_logprobs(scores, count, steps):
    """TokenScores of `count` trajectories -> [count, K]: log pi of each step's text (Eq. 2)."""
    place = scores.row * steps + scores.step  # [M]
    sums = torch.zeros(count * steps, device=scores.logprob.device)
    return sums.index_add(0, place, scores.logprob).view(count, steps)


def dpo_loss(policy, reference, beta):
    """Eq. 5 to 10: log pi of each step of chosen, rejected, chosen, ..., [2N, K] twice -> two of
    [N, K]: the loss of each pair and step, and its margin: beta ((log pi_w - log ref_w) - (log pi_l
    - log ref_l)), loss = -log sigmoid(margin). With K = 1 this is stage 1 (or plain DPO); stage 2
    is the mean of its two steps' losses (Eq. 8; that both weigh one half is the authors' code)."""
    ratio = (policy - reference).view(-1, 2, policy.shape[-1])  # [N, 2, K]
    margin = beta * (ratio[:, 0] - ratio[:, 1])  # [N, K]
    return -F.logsigmoid(margin), margin


def kto_loss(policy, reference, drift, beta):
    """KTO (arXiv:2402.01306, Eq. 8) with equal weights, [2N, 1] twice as of `dpo_loss` -> [N, 1]:
    each chosen answer is to be likelier, each rejected one less likely, than `drift` []."""
    ratio = (policy - reference).view(-1, 2, 1) - drift
    sign = torch.tensor([[1.0], [-1.0]], device=ratio.device)  # chosen, rejected
    return (1 - torch.sigmoid(beta * sign * ratio)).mean(1)


def chosen_nll(scores, count):
    """TokenScores of N = `count` pairs -> [N]: mean -log pi of the tokens of the chosen path."""
    means = [-scores.logprob[scores.row == 2 * pair].mean() for pair in range(count)]
    return torch.stack(means)


# Names --------------------------------------------------------------------------------------------
def named(name, iteration):
    """The name of a file or an adapter in an iteration; the first one's has no number."""
    return name if iteration == 1 else f"{name}_{iteration}"


def actor(iteration):
    """The adapter that an iteration begins with."""
    return "sft" if iteration == 1 else named("rl2", iteration - 1)


def made_by(adapter):
    """The script that makes sft, rl1 or rl2 of some iteration."""
    if adapter == "sft":
        return "python -m visrl.sft"
    stage, _, iteration = adapter.removeprefix("rl").partition("_")
    return f"python -m visrl.dpo --stage {stage} --iteration {iteration or 1}"
