"""The loop of both papers, and everything that the phases share. Read this file first.

A vision-language model names a box; its own box comes back to it as a picture; it goes on writing.
Iterative Visual Thinking (IVT, arXiv:2606.13156) draws the box on the image and asks for a better
one. Boxes, pictures, sequences, the model, the rollout (Section 3.1), log-probabilities, reward and
loss (Sections 3.3 and 3.4) follow in this order.

A box is four integers [x1, y1, x2, y2] in 0..1000 relative to the image, except where a name says
`bbox`, which is the ground truth in float pixels; `normalize_box` is the one way from pixels. In
shapes, P is prompts, N trajectories of a prompt, B sequences of a batch, L tokens of a sequence, K
tokens appended to the cache, M generated tokens, D the width of the language model, V its
vocabulary, T the number of refinement steps after step 0.
"""

import functools
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Threads that wait soon sleep, beside other programs. OpenMP reads this when torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Ctrl-C while libraries load, some of which would swallow it; not for who imports this elsewhere,
# nor for programs of an environment (.venv) within this folder
if os.path.abspath(sys.argv[0]).removeprefix(sys.prefix).startswith(os.path.dirname(__file__)):
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import torch
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

# The paper prints no prompts. The single-shot one is what Qwen3-VL's authors use for this task; the
# others say what Section 3.1 says they do: think and answer; examine the red box and correct it.
# The description ends them in both presets, since the toy's small base answers what comes last.
SINGLE_PROMPT = (
    'Locate every object that matches the description "{text}" in the image. '
    "Report bbox coordinates in JSON format."
)
IVT_PROMPT = (
    'Locate the object that matches the description "{text}" in the image. First think inside '
    "<think> </think> about where it is, then report its bbox coordinates in JSON format."
)
CORRECTION = (
    "The red box is your last prediction. Examine it: think inside <think> </think>, then report "
    "the corrected bbox coordinates in JSON format. How well does the red box lie around {text}?"
)
NO_BOX = (  # as long as no step has given a valid box, and nothing is drawn
    "Your last prediction is no box, so the image shows none. Think inside <think> </think>, then "
    "report the bbox coordinates in JSON format. Where is {text}?"
)


# Boxes (Section 3.1, "Box representation") --------------------------------------------------------
def normalize_box(bbox, width, height):
    """Pixels -> integers in 0..1000: floor(x * 1000 / W), clamped to the image. The size is that of
    the original image, so that the resize inside the image processor never matters."""
    sizes = (width, height, width, height)
    return [min(1000, max(0, math.floor(v * 1000 / size))) for v, size in zip(bbox, sizes)]


def denormalize_box(box, width, height):
    """0..1000 -> float pixels of the original image; inverts `normalize_box` to within a unit."""
    return [v * size / 1000 for v, size in zip(box, (width, height, width, height))]


def iou(a, b):
    """Intersection over union of two boxes in the same unit, on continuous coordinates."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def box_iou(box, sample):
    """IoU in pixels of a box (0..1000) and a sample's truth; 0 without a valid box (None)."""
    if box is None:
        return 0.0
    return iou(denormalize_box(box, sample["width"], sample["height"]), sample["bbox"])


def format_box(box):
    """The text of a box: Qwen3-VL's native grounding format, without its label."""
    return '{"bbox_2d": [%d, %d, %d, %d]}' % tuple(box)


def step_text(trace, box):
    """What the model writes at one step: its reasoning, then its box (Section 3.1)."""
    return f"<think>{trace}</think>\n{format_box(box)}"


# Four numbers in one bracket, or two bracketed pairs, as models write them; the range of a number
# is checked later, so that an impossible box is refused and not cut into a possible one.
_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)\s*"
_PAIR = rf"(?:[\[(]\s*)?{_NUMBER},\s*{_NUMBER}"
_BOX = re.compile(rf"[\[(]\s*{_PAIR}(?:[\])]\s*)?,\s*{_PAIR}(?:,\s*)?[\])]")
_LABEL = re.compile(r'"label"\s*:\s*"(?:[^"\\]|\\.)*"?')


def answer_of(text):
    """What follows the last end of reasoning; empty while it is open. A label may name the tags."""
    tags = _LABEL.sub(lambda label: "-" * len(label[0]), text)
    reasoning, end, answer = tags.rpartition("</think>")
    return "" if "<think>" in answer else text[len(reasoning + end) :]


def parse_box(text):
    """The first box of the answer, not of reasoning or a label, or None; on any string. Reversed
    corners are sorted. Numbers beyond 0..1000 or with a fraction, or no area, make no valid box."""
    match = _BOX.search(_LABEL.sub("label", answer_of(text)))
    if not match:
        return None
    values = [float(v) for v in match.groups()]
    if not all(0 <= v <= 1000 and v == int(v) for v in values):
        return None
    x1, x2 = sorted((int(values[0]), int(values[2])))
    y1, y2 = sorted((int(values[1]), int(values[3])))
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def last_valid(boxes):
    """The latest box that is not None, or None."""
    return next((box for box in reversed(boxes) if box), None)


def box_complete(text):
    """Whether the answer holds a whole box, and the JSON object around it is closed too."""
    answer = _LABEL.sub("label", answer_of(text))
    match = _BOX.search(answer)
    return bool(match) and ("{" not in answer[: match.start()] or "}" in answer[match.end() :])


# The loop, and what varies in it ------------------------------------------------------------------
def draw_overlay(image, box, color=(255, 0, 0), alpha=0.25):
    """The image (PIL, RGB) with a translucent box (0..1000) and its outline; None gives a copy.
    Section 3.1, "Render". The paper names the colour alone; fill and width of the line are ours."""
    if box is None:
        return image.copy()
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    sides = zip(denormalize_box(box, *image.size), image.size * 2)
    corners = [min(v, size - 1) for v, size in sides]  # 1000 is beyond the last pixel
    width = max(1, round(min(image.size) / 100))
    ImageDraw.Draw(layer).rectangle(corners, (*color, round(255 * alpha)), (*color, 255), width)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


WHOLE = [0, 0, 1000, 1000]  # the view of the papers' loops


@dataclass(frozen=True)
class Loop:
    """What differs between the methods that look at their own boxes; the rest is one rollout."""

    prompt: str  # with {text}: an expression, or a question
    feedback: Callable  # (image, box or None) -> the picture that is shown before step t >= 1
    continuation: str  # the instruction that is injected after that picture, may hold {text} too
    ends: Callable  # (text so far, t) -> whether step t is complete
    without_box: str = ""  # the instruction while no box is valid, where it is another one
    turn: str = "\n{picture}\n{continuation}\n"  # how both are injected: the same turn goes on
    # (the last valid box, or None) -> the part of the image that is shown, and that boxes refer to
    view: Callable = lambda last_box: WHOLE
    # (box, the last valid box) -> whether the box is refused, so that the last one stays
    refuses: Callable = lambda box, last_box: False


# IVT (Section 3.1). Every overlay is drawn on the original image: a step shows one box, never two.
IVT = Loop(
    prompt=IVT_PROMPT,
    feedback=draw_overlay,
    continuation=CORRECTION,
    without_box=NO_BOX,
    ends=lambda text, t: box_complete(text),
)
SINGLE_SHOT = replace(IVT, prompt=SINGLE_PROMPT)  # with T = 0: no loop at all


def box_in_view(box, view):
    """The image's 0..1000 -> the view's; beyond 0..1000 where the box reaches out of the view."""
    x, y, right, bottom = view
    sides = zip(box, (x, y) * 2, (right - x, bottom - y) * 2)
    return [round((v - low) * 1000 / size) for v, low, size in sides]


def box_in_image(box, view):
    """The view's 0..1000 -> the image's; inverts `box_in_view`. None where no area is left."""
    x, y, right, bottom = view
    sides = zip(box, (x, y) * 2, (right - x, bottom - y) * 2)
    out = [round(low + v * size / 1000) for v, low, size in sides]
    return out if out[0] < out[2] and out[1] < out[3] else None


def written_boxes(boxes, loop):
    """The boxes of a trajectory as they are written: each relative to the picture of its step."""
    return [box_in_view(box, loop.view(last_valid(boxes[:t]))) for t, box in enumerate(boxes)]


def read_box(text, last_box, loop):
    """The box (0..1000 of the image) that a step leaves behind its text, or None."""
    box = parse_box(text)
    if box:
        box = box_in_image(box, loop.view(last_box))
    if box and last_box and loop.refuses(box, last_box):
        return last_box
    return box


def feedback_pictures(image, boxes, loop=IVT):
    """What the model sees at each step of a trajectory with these boxes, T + 1 PIL images."""
    return [image, *(loop.feedback(image, last_valid(boxes[:t])) for t in range(1, len(boxes)))]


# Sequences ----------------------------------------------------------------------------------------
# A trajectory is one token sequence in one assistant turn (Section 3.1, "prefix-continuation"):
# [user: image, prompt] [assistant: step 0, picture + instruction, step 1, ...]
@dataclass
class VLM:
    """A Qwen3-VL checkpoint in its three parts. `model` may be wrapped by PEFT."""

    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    checkpointing: bool = False  # a training pass recomputes activations instead of keeping them

    @property
    def base(self):  # LoRA lives inside the layers, so calling this runs the active adapter
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def turn_ends(self):  # <|im_end|>, and what else the checkpoint lists: Qwen3-VL's has two
        listed = self.base.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return {self.token("<|im_end|>"), *listed} - {None}

    def token(self, name):
        return self.tokenizer.convert_tokens_to_ids(name)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass
class ImageTokens:
    """What the language model receives of one image: rows * columns tokens."""

    embeds: torch.Tensor  # [tokens, D]
    deepstack: list  # of [tokens, D], one for each of the first layers of the language model
    rows: int
    columns: int


@dataclass
class Trajectory:
    """One token sequence. A target is a token that was (rollout) or will be (SFT) generated.

    Rollout, SFT and the losses share this record, so the loss mask is bookkeeping, not a search.
    """

    ids: list = field(default_factory=list)  # L tokens
    images: list = field(default_factory=list)  # ImageTokens, in the order of their place in `ids`
    predictor: list = field(default_factory=list)  # M places in `ids` whose logits give a target
    target: list = field(default_factory=list)  # M token ids
    step: list = field(default_factory=list)  # M numbers 0..T: the step that a target belongs to
    logprob: list = field(default_factory=list)  # M floats: log pi, at temperature 1 and uncut
    texts: list = field(default_factory=list)  # T + 1 strings
    boxes: list = field(default_factory=list)  # T + 1 boxes; None where a step gave no valid one


@torch.no_grad()
def encode_images(vlm, images):
    """A list of PIL images -> a list of ImageTokens, in one pass of the vision tower. LoRA does not
    touch it, so these are constants: no gradient, and one encoding serves rollout and losses."""
    batch = vlm.image_processor(images=images, return_tensors="pt")
    tower = vlm.base.model.visual
    pixels = batch["pixel_values"].to(tower.device, tower.dtype)
    out = tower(pixels, grid_thw=batch["image_grid_thw"].to(tower.device), return_dict=True)
    merge = tower.spatial_merge_size
    sizes = [(int(h) // merge, int(w) // merge) for _, h, w in batch["image_grid_thw"]]
    counts = [rows * columns for rows, columns in sizes]
    embeds = out.pooler_output.split(counts)
    deepstack = zip(*(level.split(counts) for level in out.deepstack_features))
    return [ImageTokens(e, list(d), *size) for e, d, size in zip(embeds, deepstack, sizes)]


def image_ids(vlm, image):
    """The tokens that stand for one image: start, a placeholder for each image token, end."""
    placeholders = [vlm.base.config.image_token_id] * (image.rows * image.columns)
    return [vlm.token("<|vision_start|>"), *placeholders, vlm.token("<|vision_end|>")]


def prompt_ids(vlm, image, text, loop):
    """The user turn with one image and the prompt, up to where the assistant begins to write."""
    content = [{"type": "image"}, {"type": "text", "text": loop.prompt.format(text=text)}]
    turn = vlm.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = turn.split("<|vision_start|><|image_pad|><|vision_end|>")
    return vlm.encode(before) + image_ids(vlm, image) + vlm.encode(after)


def continuation_ids(vlm, image, text, loop, last_box):
    """What is injected before step t >= 1: the feedback picture and the instruction."""
    before, after = loop.turn.split("{picture}")
    words = loop.continuation if last_box else loop.without_box or loop.continuation
    after = after.format(continuation=words.format(text=text))
    return vlm.encode(before) + image_ids(vlm, image) + vlm.encode(after)


def mrope_positions(ids, images, image_token_id, start=0):
    """M-RoPE positions of a piece of sequence that begins at offset `start`, and the next offset.

    The positions are L triples (time, row, column). Text counts 1 per token on all three. An image
    holds time still, spans its rows and columns, and moves the offset on by the larger of the two
    (arXiv:2409.12191, Section 2.1). So a continuation needs nothing but its own tokens: the model's
    own `rope_deltas`, which go stale between calls, are never used.
    """
    positions = []
    images = iter(images)
    i = 0
    while i < len(ids):
        if ids[i] == image_token_id:
            image = next(images)
            for r in range(image.rows):
                positions += [(start, start + r, start + c) for c in range(image.columns)]
            i += image.rows * image.columns
            start += max(image.rows, image.columns)
        else:
            positions.append((start, start, start))
            i += 1
            start += 1
    return positions, start


def build_trajectory(vlm, images, text, written, loop):
    """The training sequence of Section 3.2.

    images: T + 1 ImageTokens, the picture of each step. text: what fills the loop's prompt.
    written: T + 1 texts, whose tokens are the targets; all else is context (the paper's -100).
    """
    out = Trajectory(ids=prompt_ids(vlm, images[0], text, loop), images=list(images))
    for t, words in enumerate(written):
        if t > 0:
            out.ids += continuation_ids(vlm, images[t], text, loop, last_valid(out.boxes))
        tokens = vlm.encode(words)
        first = len(out.ids) - 1  # a token is predicted at the position before its own
        out.predictor += range(first, first + len(tokens))
        out.target += tokens
        out.step += [t] * len(tokens)
        out.ids += tokens
        out.texts.append(words)
        out.boxes.append(parse_box(words))
    return out


# The model: embeddings, image tokens put in their places, language model --------------------------
def hidden_states(vlm, ids, positions, mask, images, cache=None):
    """ids [B, K], positions [3, B, K], mask [B, cached + K] (0: padding) -> [B, K, D].

    images: the ImageTokens of all rows, row after row. A cache receives the K new tokens. Without a
    mask each token sees all before it: enough where rows are padded at their end.
    """
    language = vlm.base.model.language_model
    for layer in language.layers:  # a layer that recomputes its activations writes no cache
        layer.gradient_checkpointing = vlm.checkpointing and torch.is_grad_enabled()
    embeds = language.embed_tokens(ids)  # [B, K, D]
    visual = {}
    if images:
        is_image = ids == vlm.base.config.image_token_id  # [B, K]
        features = torch.cat([image.embeds for image in images])  # [image tokens, D]
        embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
        levels = zip(*(image.deepstack for image in images))
        deepstack = [torch.cat(level) for level in levels]
        visual = dict(visual_pos_masks=is_image, deepstack_visual_embeds=deepstack)
    # The cache goes by its place: transformers 5.5 names it past_key_values, later ones cache
    out = language(None, mask, positions, cache, embeds, use_cache=cache is not None, **visual)
    return out.last_hidden_state


def text_logits(vlm, hidden):
    """Hidden states [..., D] -> float32 logits [..., V]. The image placeholder is never sampled: it
    would later be taken for an image. (-inf would make the entropy NaN.)"""
    logits = vlm.base.lm_head(hidden).float()
    placeholder = torch.tensor([vlm.base.config.image_token_id], device=logits.device)
    return logits.index_fill(-1, placeholder, -1e30)


def pad_rows(rows, value, device):
    """A list of B lists -> a tensor [B, longest], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)


def pad_pieces(vlm, pieces, images, offsets):
    """Pieces of sequence, one per row, that begin at these M-RoPE offsets -> ids [B, K], positions
    [3, B, K], mask [B, K] (0: padding), the B next offsets."""
    base = vlm.base
    ids = pad_rows(pieces, 0, base.device)
    mask = pad_rows([[1] * len(piece) for piece in pieces], 0, base.device)
    image_token = base.config.image_token_id
    rows = zip(pieces, images, offsets)
    positions, ends = zip(*(mrope_positions(p, shown, image_token, at) for p, shown, at in rows))
    positions = pad_rows(positions, (0, 0, 0), base.device).permute(2, 0, 1)
    return ids, positions, mask, ends


# The rollout: Section 3.1 over a key-value cache, for a batch at once -----------------------------
class Context:
    """B growing sequences over one cache: what it holds of each, and where each of them stands."""

    def __init__(self, vlm, count, new_cache=DynamicCache):
        self.vlm = vlm
        self.cache = new_cache()
        self.mask = torch.zeros(count, 0, dtype=torch.long, device=vlm.base.device)  # [B, cached]
        self.offsets = [0] * count  # the next M-RoPE position of each row; padding does not move it
        self.cached = [0] * count  # how many tokens of each row are in the cache

    def catch_up(self, rows, images=None):
        """Feeds what the cache has not seen of each row; returns its last hidden states [B, D].

        A prompt, a continuation and a freshly sampled token are the same act. Where a row has
        nothing new its result has no meaning. images: for each row, those among its new tokens.
        """
        pieces = [row.ids[n:] for row, n in zip(rows, self.cached)]
        images = images or [[]] * len(rows)
        ids, positions, mask, self.offsets = pad_pieces(self.vlm, pieces, images, self.offsets)
        # Rows that end a step early are padded inside the cache; the mask hides the padding
        self.mask = torch.cat([self.mask, mask], 1)
        self.cached = [len(row.ids) for row in rows]
        shown = sum(images, [])
        hidden = hidden_states(self.vlm, ids, positions, self.mask, shown, self.cache)  # [B, K, D]
        return hidden[torch.arange(len(rows)), mask.sum(1) - 1]  # [B, D]

    def repeat(self, n):
        """Each row n times, side by side: the trajectories of a group share their prompt."""
        self.cache.batch_repeat_interleave(n)
        self.mask = self.mask.repeat_interleave(n, 0)
        self.offsets = [offset for offset in self.offsets for _ in range(n)]
        self.cached = [count for count in self.cached for _ in range(n)]


def choose(logits, temperature, noise, top_p=1.0, top_k=0):
    """logits [B, V], uniform noise [B] in 0..1 -> tokens [B]; temperature 0 takes the likeliest.

    The first token whose cumulative probability exceeds the row's noise (inverse CDF), so that what
    a row samples does not depend on its batch. top_k (0: all), then top_p, leave the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)  # [B, V]
    if top_k or top_p < 1:
        ranked, order = p.topk(min(top_k or p.shape[-1], p.shape[-1]))  # [B, top_k]
        before = ranked.cumsum(-1) - ranked
        ranked *= before < top_p * ranked.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cumulative = p.cumsum(-1)
    index = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1)
    return index.clamp(max=logits.shape[-1] - 1)


@functools.cache
def token_text(tokenizer, token):
    """The text of one token, remembered: decoding takes longer than the rest of the bookkeeping."""
    return tokenizer.decode([token])


def write_step(vlm, context, rows, hidden, t, *, temperature, noise, ends, **cut):
    """Samples step t of every row, a token a pass. hidden [B, D]: the state at each row's end.

    noise [B, max_tokens]. A step ends where `ends` says so, at an end of the turn, or after
    max_tokens. cut: as of `choose`. Appends to each row's ids, targets and texts.
    """
    max_tokens = noise.shape[1]
    turn_ends = vlm.turn_ends
    text = [""] * len(rows)
    live = list(range(len(rows)))
    for n in range(max_tokens):
        logits = text_logits(vlm, hidden[live])  # [live, V]
        tokens = choose(logits, temperature, noise[live, n], **cut)  # [live]
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # [live]
        going = []
        for i, token, logprob in zip(live, tokens.tolist(), logprobs.tolist()):
            row = rows[i]
            row.predictor.append(len(row.ids) - 1)
            row.target.append(token)
            row.logprob.append(logprob)
            row.step.append(t)
            # An end of the turn is a target, so that GRPO can punish ending early, and never
            # context: the turn goes on with the next picture.
            if token in turn_ends:
                continue
            row.ids.append(token)
            text[i] += token_text(vlm.tokenizer, token)
            if not ends(text[i], t):
                going.append(i)
        live = going
        if not live or n + 1 == max_tokens:
            break  # the last token of a step goes through the model with what is injected after it
        hidden = context.catch_up(rows)  # [B, D]
    for row in rows:
        # Decoded as a whole: `text` shows a character that is split over two tokens as two halves
        tokens = [n for n, step in zip(row.target, row.step) if step == t and n not in turn_ends]
        row.texts.append(vlm.tokenizer.decode(tokens))


def begin(vlm, image, text, loop, first_text=None):
    """A trajectory before its first token: the prompt (image: ImageTokens), and the text of step 0
    where that is given. What is given is context, no target: it was not sampled."""
    row = Trajectory(ids=prompt_ids(vlm, image, text, loop), images=[image])
    if first_text is not None:
        row.ids += vlm.encode(first_text)
        row.texts.append(first_text)
        row.boxes.append(read_box(first_text, None, loop))
    return row


@torch.no_grad()
def rollout(
    vlm,
    images,
    texts,
    steps,
    *,
    max_tokens,
    loop=IVT,
    group_size=1,
    temperatures=(0.0, 0.0),
    top_p=1.0,
    top_k=0,
    seeds=None,
    first_texts=None,
    new_cache=DynamicCache,
):
    """Runs N = group_size trajectories for each of P (image, text) pairs; returns P * N of them.

    images: PIL, RGB. texts: what fills the loop's prompt. steps: T; 0 is single-shot. max_tokens:
    per step. temperatures: at step 0 and after; 0 is greedy. top_p, top_k: of `choose`; log pi is
    that of the whole distribution. seeds: P integers, needed to sample (else ValueError); what a
    prompt samples depends on its seed, T, N and max_tokens, not on its batch. first_texts: P texts
    of step 0 to go on from.

    Each image is encoded once, each token and each group's prompt is fed once.
    """
    if max(temperatures) > 0 and not seeds:
        raise ValueError("sampling takes a seed for each prompt")
    noise = []
    for seed in seeds or [0] * len(images):
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.rand(steps + 1, group_size, max_tokens, generator=generator))
    noise = torch.cat(noise, 1).to(vlm.base.device)  # [T + 1, P * N, max_tokens]
    rows = []
    prompts = zip(encode_images(vlm, images), texts, first_texts or [None] * len(images))
    for image, text, first_text in prompts:
        rows += [begin(vlm, image, text, loop, first_text) for _ in range(group_size)]
    context = Context(vlm, len(images), new_cache)
    first = rows[::group_size]  # of each group: its prompt is fed once
    hidden = context.catch_up(first, [row.images for row in first])  # [P, D]
    context.repeat(group_size)
    hidden = hidden.repeat_interleave(group_size, 0)  # [P * N, D]
    originals = [image for image in images for _ in range(group_size)]
    texts = [text for text in texts for _ in range(group_size)]

    for t in range(len(rows[0].boxes), steps + 1):
        last_boxes = [last_valid(row.boxes) for row in rows]
        if t > 0:
            # Render the last valid box, and inject: picture and instruction join the same turn
            pictures = [loop.feedback(image, box) for image, box in zip(originals, last_boxes)]
            shown = encode_images(vlm, pictures)
            for row, image, text, last_box in zip(rows, shown, texts, last_boxes):
                row.ids += continuation_ids(vlm, image, text, loop, last_box)
                row.images.append(image)
            hidden = context.catch_up(rows, [[image] for image in shown])  # [P * N, D]
        options = dict(temperature=temperatures[min(t, 1)], noise=noise[t], ends=loop.ends)
        write_step(vlm, context, rows, hidden, t, top_p=top_p, top_k=top_k, **options)
        for row, last_box in zip(rows, last_boxes):
            row.boxes.append(read_box(row.texts[-1], last_box, loop))
    return rows


# Log-probabilities of whole trajectories ----------------------------------------------------------
LOGITS_AT_ONCE = 2**23  # numbers: 55 targets of a vocabulary of 152k, 34 MB for each copy


class TokenScores(NamedTuple):
    """Of all targets of a batch, trajectory after trajectory. Sums per step: by (row, step)."""

    logprob: torch.Tensor  # [M]
    entropy: torch.Tensor  # [M]
    row: torch.Tensor  # [M] the trajectory in the batch
    step: torch.Tensor  # [M] the step in the trajectory


def logprob_and_entropy(vlm, hidden, target):
    """hidden [M, D], target [M] -> log pi(target) [M], entropy of pi [M]; at temperature 1."""
    logprobs = text_logits(vlm, hidden).log_softmax(-1)  # [M, V]
    entropy = -(logprobs.exp() * logprobs).sum(-1)  # [M]
    return logprobs.gather(1, target[:, None])[:, 0], entropy


def trajectory_logprobs(vlm, trajectories):
    """TokenScores of a batch, in one pass over its sequences.

    Logits exist at the targets alone, and a part at a time: a vocabulary of 152k times every image
    token would be most of the memory. Rows are padded at their end, where no token of theirs looks,
    so there is no mask, and PyTorch may choose its fastest attention.
    """
    sequences = [t.ids for t in trajectories]
    images = [t.images for t in trajectories]
    ids, positions, _, _ = pad_pieces(vlm, sequences, images, [0] * len(trajectories))
    hidden = hidden_states(vlm, ids, positions, None, sum(images, []))  # [B, L, D]

    def flat(lists):  # B lists of integers -> [M]
        return torch.tensor(sum(lists, []), dtype=torch.long, device=ids.device)

    row = flat([[i] * len(t.target) for i, t in enumerate(trajectories)])  # [M]
    at_targets = hidden[row, flat([t.predictor for t in trajectories])]  # [M, D]
    target = flat([t.target for t in trajectories])  # [M]
    # Computed again in the backward pass: logits of six of the paper's trajectories are 1.75 GB
    part = LOGITS_AT_ONCE // vlm.base.lm_head.out_features
    parts = []
    for h, y in zip(at_targets.split(part), target.split(part)):
        parts.append(checkpoint(logprob_and_entropy, vlm, h, y, use_reentrant=False))
    logprob, entropy = (torch.cat(values) for values in zip(*parts))  # [M], [M]
    return TokenScores(logprob, entropy, row, flat([t.step for t in trajectories]))


# Reward, advantage and loss of GRPO (Sections 3.3 and 3.4) ----------------------------------------
def reward(boxes, sample):
    """Eq. 3: IoU of the final box and the truth + 0.1 * the share of steps with a valid box."""
    valid = sum(box is not None for box in boxes) / len(boxes)
    return box_iou(boxes[-1], sample) + 0.1 * valid


def advantages(rewards, eps=1e-4):
    """Eq. 1, rewards [P, N] -> [P, N]: each against the mean and deviation of its group of N. Equal
    rewards teach nothing; eps (ours) keeps those that differ by rounding alone from counting."""
    deviation = rewards.std(1, keepdim=True, unbiased=False)  # [P, 1]
    return (rewards - rewards.mean(1, keepdim=True)) / (deviation + eps)


def grpo_loss(logprob, ref_logprob, advantage, entropy, *, beta, entropy_weight, kl="paper"):
    """Eq. 2 over the M generated tokens of a batch; all four tensors are [M].

    Returns (loss, policy term, KL term, entropy) as sums: the caller divides by the tokens of the
    whole update, so that micro-batches add up to one large batch.

    Each batch of rollouts is used for one update, so the policy that is updated is the one that
    sampled: the importance ratio is 1 and there is nothing to clip. (Steps >= 1 are sampled at
    temperature 0.7 and log pi is taken at 1; like the paper's Eq. 2, this leaves that aside.) The
    paper's KL term is mean |log pi - log ref|; `k3` is the unbiased, never negative estimator of
    Schulman, "Approximating KL divergence", 2020. In bfloat16 log pi and log ref differ by rounding
    as soon as the adapters do: the paper's term has a gradient of full size for that, of either
    sign, and k3 one in proportion.
    """
    policy = -(logprob * advantage).sum()
    difference = ref_logprob - logprob  # [M]
    distance = difference.abs() if kl == "paper" else difference.exp() - difference - 1  # [M]
    distance, entropy = distance.sum(), entropy.sum()
    loss = policy + beta * distance - entropy_weight * entropy
    return loss, policy, distance, entropy
