"""VisRL's critics: how good the box and the answer of a path are (Section 3.1, Appendix C).

The model before SFT is asked. It knows the question and the true answer, and sees the crop of a box
or, for an answer, the whole image; never a true box. The paper's prompts are in figures; the
wording here is ours.
"""

import json
import re

from common import encode_images, rollout, trajectory_logprobs
from visrl.loop import ASK, answer_trajectory, is_right, step_logprobs

import torch

BOX_CRITIC = (
    "This picture was cut out of a larger one to answer a question.\nQuestion: {question}\nCorrect "
    "answer: {answer}\nHow well does the picture show what is needed to give the correct answer? "
    'Reply with JSON alone, {{"score": s}}, where s goes from 0 (nothing of it is to be seen) to 1 '
    "(all of it is, and clearly)."
)
RESPONSE_CRITIC = (
    "Look at the picture and compare two answers to a question.\nQuestion: {question}\nCorrect "
    "answer: {answer}\nAnswer to judge: {response}\nHow close is the answer to judge to the "
    'correct one in its meaning? Reply with JSON alone, {{"score": s}}, where s goes from 0 '
    "(wrong) to 1 (the same)."
)


def parse_score(text):
    """A critic's reply -> its score in 0..1, or None. JSON, JSON in a fence, or a bare number."""
    fence = re.search(r"```(?:json)?\s*(.*?)```", text, re.S)
    for candidate in (text, fence and fence[1]):
        try:
            value = json.loads(candidate)
        except (TypeError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            value = value.get("score")
        if type(value) in (int, float) and 0 <= value <= 1:  # NaN is in no range
            return float(value)
    return None


def prompted_scores(vlm, pictures, prompts, max_tokens, roll):
    """The scores, or None, that a critic writes at temperature 0 for each picture and prompt."""
    replies = roll(vlm, pictures, prompts, 0, max_tokens=max_tokens, loop=ASK)
    return [parse_score(reply.texts[0]) for reply in replies]


def response_scores(vlm, images, samples, responses, max_tokens, roll):
    """As `prompted_scores`, of the response to each sample's question about its image."""
    rows = [{**sample, "response": response} for sample, response in zip(samples, responses)]
    prompts = [RESPONSE_CRITIC.format_map(row) for row in rows]
    return prompted_scores(vlm, images, prompts, max_tokens, roll)


@torch.no_grad()
def likelihood_scores(vlm, pictures, questions, answers):
    """The probability of each answer, as a whole turn, after a picture and the bare question."""
    rows = zip(questions, encode_images(vlm, pictures), answers)
    trajectories = [answer_trajectory(vlm, *row) for row in rows]
    scores = step_logprobs(trajectory_logprobs(vlm, trajectories), len(trajectories), 1)
    return [float(f"{p:.6g}") for p in scores[:, 0].exp().tolist()]


def score_paths(vlm, items, *, critic, crop, max_tokens, roll=rollout):
    """(image, sample, path) of each candidate -> the paths with "box_score" and "response_score",
    or None. crop: (image, box) -> picture. Of a sample, question and answer are read."""
    if not items:
        return []
    images, samples, paths = map(list, zip(*items))
    crops = [crop(image, path["box"]) for image, path in zip(images, paths)]
    questions, answers = zip(*((sample["question"], sample["answer"]) for sample in samples))
    responses = [path["answer"] for path in paths]
    if critic == "likelihood":
        of_box = likelihood_scores(vlm, crops, questions, answers)
        of_response = [float(is_right(*pair)) for pair in zip(responses, answers)]
    else:
        prompts = [BOX_CRITIC.format_map(sample) for sample in samples]
        of_box = prompted_scores(vlm, crops, prompts, max_tokens, roll)
        of_response = response_scores(vlm, images, samples, responses, max_tokens, roll)
    scores = zip(paths, of_box, of_response)
    return [{**path, "box_score": b, "response_score": r} for path, b, r in scores]
