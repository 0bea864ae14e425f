"""Iterative Visual Thinking (arXiv:2606.13156): everything the four phases share.

Read this file first, top to bottom: the hyperparameters, boxes, the overlay, how a sequence is built, the rollout (the
loop of Section 3.1), the log-probabilities of a whole trajectory, the reward and the GRPO loss. Two conventions hold
throughout:

- a box is four integers [x1, y1, x2, y2] in 0..1000 relative to the image, except where a name says `bbox`, which is
  the ground truth in float pixels; `normalize_box` is the one place where pixels become 0..1000;
- B is a batch of trajectories, L a length in tokens, K the length of a chunk appended to the cache, M a number of
  generated tokens, D the width of the language model, V its vocabulary.
"""

import functools
import math
import re
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# ------------------------------------------------------------------------------------------------------------------
# Hyperparameters. The `paper` column is the paper's Section 4.1 and 3.3; where the paper is silent the help says
# "not in the paper". Every row is a flag of its phase: `python sft.py --lr 1e-4`.
# ------------------------------------------------------------------------------------------------------------------
PRESETS = {  # phase -> name -> (paper, toy, help[, choices])
    "all": {
        "model": ("Qwen/Qwen3-VL-4B-Instruct", "toy_base", "checkpoint folder or hub id of the base model"),
        "quantize": ("nf4", "none", "4-bit with double quantisation, or none", ("nf4", "none")),
        "dtype": ("bfloat16", "float32", "of weights and activations; not in the paper", ("bfloat16", "float32")),
        "checkpointing": ("on", "off", "gradient checkpointing in training passes; not in the paper", ("on", "off")),
        "max_pixels": (1024 * 1024, 1024 * 1024, "larger images are reduced to this area; the paper says native resolution"),
        "steps": (2, 2, "T, refinement steps after step 0"),
        "seed": (0, 0, "of everything random; not in the paper"),
    },
    "make_data": {
        "train_samples": (2400, 2400, "a third of them from each source"),
        "val_samples": (510, 510, "likewise"),
        "test_samples": (505, 505, "likewise, 169 + 168 + 168"),
        "iou_max": (0.85, 0.85, "student predictions above this IoU are discarded (Section 3.2)"),
        "start": ("student", "student", "step-0 boxes: the student's predictions, or the truth perturbed at random (what the paper "
                  "first tried)", ("student", "perturbed")),
        "keep": ("errors", "errors", "errors: the filter above; all: what it discards is kept too, as trajectories that hold still "
                 "(not in the paper)", ("errors", "all")),
        "path": ("linear", "linear", "linear interpolation; direct: at the truth from step 1 on (not in the paper)", ("linear", "direct")),
        "teacher": ("vlm", "template", "vlm: the model writes the traces; template: computed from the geometry", ("vlm", "template")),
        "max_tokens": (160, 80, "per step"),
        "batch_size": (8, 64, "samples decoded at once; not in the paper"),
    },
    "sft": {
        "lr": (2e-5, 2e-3, "peak learning rate"),
        "epochs": (10, 4, ""),
        "batch_size": (4, 16, "trajectories per forward pass"),
        "grad_accum": (4, 1, "forward passes per update"),
        "warmup": (0.1, 0.1, "share of the updates with rising learning rate; cosine decay after"),
        "lora_rank": (64, 32, "on all attention and MLP projections of the language model"),
        "lora_alpha": (128, 64, "LoRA scale is alpha / rank"),
        "first_step": ("all", "all", "supervise step 0 in all trajectories, or only where its box is right (IoU 0.5 and more; not "
                       "in the paper)", ("all", "right")),
        "save_every": (10, 10, "updates between checkpoints"),
    },
    "grpo": {
        "lr": (2e-6, 1e-4, "constant"),
        "steps": ("2 0", "2 0", "T of each policy to train, one after the other; 0 is Table 1's single-step control"),
        "max_tokens": (160, 80, "per step"),
        "group_size": (6, 6, "N, trajectories per prompt"),
        "temperature_first": (1.0, 1.0, "at step 0"),
        "temperature": (0.7, 0.7, "at the refinement steps"),
        "beta": (0.04, 0.04, "weight of the KL term"),
        "entropy": (0.01, 0.01, "lambda, weight of the entropy bonus"),
        "kl": ("paper", "paper", "paper: mean |log pi - log ref|; k3: the unbiased, non-negative estimator", ("paper", "k3")),
        "reward": ("simple", "simple", "simple: Eq. 3; six: the composite that the paper tried first (Section 3.4)", ("simple", "six")),
        "grad_accum": (8, 8, "prompts per update"),
        "updates": (300, 40, "300 x 8 is one pass over 2,400 prompts; not in the paper"),
        "batch_size": (6, 6, "trajectories per forward pass of the update; not in the paper"),
        "prompts_at_once": (2, 16, "prompts decoded together; not in the paper"),
        "val_every": (25, 20, "updates between validations; not in the paper"),
        "val_prompts": (64, 128, "validation prompts; not in the paper"),
        "save_every": (5, 5, "updates between checkpoints"),
    },
    "evaluate": {
        "max_tokens": (160, 80, "per step"),
        "batch_size": (6, 64, "samples decoded at once; not in the paper"),
        "longest": (6, 6, "steps that an IVT row is played to, for the tables of adaptive refinement; not in the paper"),
        "agree": (1.0, 1.0, "--image stops when two boxes in a row have a higher IoU than this (adaptive refinement); 1: never"),
        "control_temperature": (1.0, 1.0, "of the control row that samples T + 1 single-shot answers; not in the paper"),
        "pictures": (6, 6, "rows of each filmstrip"),
    },
}

# The paper prints no prompts. The single-shot one is what Qwen3-VL's authors use for this task; the other two say what
# Section 3.1 says they do: think and answer; examine the red box, name the spatial error, output a corrected box.
SINGLE_PROMPT = ('Locate every object that matches the description "{expression}" in the image. '
                 "Report bbox coordinates in JSON format.")
IVT_PROMPT = ('Locate the object that matches the description "{expression}" in the image. First think inside '
              "<think> </think> about where it is, then report its bbox coordinates in JSON format.")
CORRECTION = ("The red box is your last prediction. Examine it: is it on the wrong object, shifted, too large or too "
              "small? Think inside <think> </think>, then report the corrected bbox coordinates in JSON format.")


# ------------------------------------------------------------------------------------------------------------------
# Boxes (Section 3.1, "Box representation")
# ------------------------------------------------------------------------------------------------------------------
def normalize_box(bbox, width, height):
    """Pixels -> integers in 0..1000: floor(x * 1000 / W), clamped, so that a box at the right edge gives 1000.

    `width` and `height` are those of the original image: the resize inside the image processor never matters.
    """
    return [min(1000, max(0, math.floor(v * 1000 / size))) for v, size in zip(bbox, (width, height, width, height))]


def denormalize_box(box, width, height):
    """0..1000 -> float pixels of the original image; the inverse of `normalize_box` to within a unit."""
    return [v * size / 1000 for v, size in zip(box, (width, height, width, height))]


def iou(a, b):
    """Intersection over union of two boxes in the same unit, on continuous coordinates (no +1 pixel)."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def box_iou(box, sample):
    """IoU in pixels of a box (0..1000, or None: no valid box, IoU 0) and the ground truth of a sample."""
    return iou(denormalize_box(box, sample["width"], sample["height"]), sample["bbox"]) if box else 0.0


def place(box):
    """Where on the image a box (0..1000) lies, in words."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row = "upper" if y < 333 else "lower" if y > 667 else ""
    column = "left" if x < 333 else "right" if x > 667 else ""
    return f"{row} {column}".strip() or "middle"


def format_box(box):
    """The text of a box: Qwen3-VL's native grounding format, without its label."""
    return '{"bbox_2d": [%d, %d, %d, %d]}' % tuple(box)


def step_text(trace, box):
    """What the model writes at one step: its reasoning, then its box (Section 3.1)."""
    return f"<think>{trace}</think>\n{format_box(box)}"


# Four numbers in one bracket, or two bracketed pairs; a number may be any length here, its range is checked later.
_NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_BOX = re.compile(r"[\[(]\s*[\[(]?" + _NUMBER + "," + _NUMBER + r"[\])]?\s*,\s*[\[(]?" + _NUMBER + "," + _NUMBER
                  + r",?\s*[\])]")


def answer_of(text):
    """What follows the reasoning; empty while the reasoning is still open."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def parse_box(text):
    """The first box of the answer as [x1, y1, x2, y2], integers in 0..1000, or None. Never raises, on any string.

    Numbers and boxes in the reasoning do not count. Reversed corners are sorted. A number outside 0..1000 or with a
    fraction, and a box without area, is no valid box; nothing is clamped into one.
    """
    match = _BOX.search(answer_of(text))
    if not match:
        return None
    values = [float(v) for v in match.groups()]
    if not all(0 <= v <= 1000 and v == int(v) for v in values):
        return None
    x1, x2 = sorted((int(values[0]), int(values[2])))
    y1, y2 = sorted((int(values[1]), int(values[3])))
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def box_complete(text):
    """Whether a step may end here: its box is closed, and so is the JSON object that holds it."""
    answer = answer_of(text)
    match = _BOX.search(answer)
    return bool(match) and ("{" not in answer[:match.start()] or "}" in answer[match.end():])


def draw_overlay(image, box, color=(255, 0, 0), alpha=0.25):
    """`image` (PIL, RGB) with a semi-transparent filled box (0..1000) and its outline; None gives a plain copy.

    Section 3.1, "Render". The paper names the colour only; fill and width of the line are ours.
    """
    if box is None:
        return image.copy()
    x1, y1, x2, y2 = denormalize_box(box, *image.size)
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    ImageDraw.Draw(layer).rectangle([x1, y1, x2, y2], fill=(*color, round(255 * alpha)), outline=(*color, 255),
                                    width=max(1, round(min(image.size) / 100)))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def views(image, boxes):
    """What the model sees at each step of a trajectory with these T + 1 boxes: the plain image, then box t - 1 on it.

    Every overlay is drawn on the original image, so that a step shows one box, never the boxes before it.
    """
    return [draw_overlay(image, box) for box in [None] + boxes[:-1]]


# ------------------------------------------------------------------------------------------------------------------
# Sequences. A trajectory is one token sequence inside one assistant turn (Section 3.1, "prefix-continuation"):
#   user: image, IVT_PROMPT   assistant: step 0, image + CORRECTION, step 1, image + CORRECTION, step 2
# ------------------------------------------------------------------------------------------------------------------
@dataclass
class VLM:
    """A Qwen3-VL checkpoint in its three parts. `model` may be wrapped by PEFT."""
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    checkpointing: bool = False  # whether a pass that trains recomputes activations instead of keeping them

    @property
    def base(self):  # LoRA lives inside the layers, so calling the wrapped model runs the active adapter
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def token(self, name):
        return self.tokenizer.convert_tokens_to_ids(name)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass
class ImageTokens:
    """What the language model receives of one image: n = rows * columns tokens."""
    embeds: torch.Tensor     # [n, D]
    deepstack: list          # of [n, D], one for each of the first layers of the language model
    rows: int
    columns: int


@dataclass
class Trajectory:
    """One token sequence and what is known of it. A target is a token that was (rollout) or is to be (SFT) generated."""
    ids: list = field(default_factory=list)            # the whole sequence, L tokens
    images: list = field(default_factory=list)         # ImageTokens, in the order of their place in `ids`
    predictor: list = field(default_factory=list)      # M indices into `ids`: the position whose logits give the target
    target: list = field(default_factory=list)         # M token ids
    step: list = field(default_factory=list)           # M numbers 0..T: the step that the target belongs to
    logprob: list = field(default_factory=list)        # M floats, when it was decoded: under the policy that sampled it
    texts: list = field(default_factory=list)          # T + 1 strings
    boxes: list = field(default_factory=list)          # T + 1 boxes; None where a step gave no valid one


@torch.no_grad()
def encode_images(vlm, images):
    """A list of PIL images -> a list of ImageTokens, in one pass of the vision tower.

    LoRA does not touch the vision tower, so these are constants: no gradient, and one encoding serves the rollout, the
    policy and the reference.
    """
    batch = vlm.image_processor(images=images, return_tensors="pt")
    visual = vlm.base.model.visual
    out = visual(batch["pixel_values"].to(visual.device, visual.dtype), grid_thw=batch["image_grid_thw"].to(visual.device),
                 return_dict=True)
    merge = visual.spatial_merge_size
    sizes = [(int(h) // merge, int(w) // merge) for _, h, w in batch["image_grid_thw"]]
    counts = [rows * columns for rows, columns in sizes]
    deepstack = list(zip(*(features.split(counts) for features in out.deepstack_features)))
    return [ImageTokens(e, list(d), *size) for e, d, size in zip(out.pooler_output.split(counts), deepstack, sizes)]


def image_ids(vlm, image):
    """The tokens that stand for one image: <|vision_start|>, a placeholder for each image token, <|vision_end|>."""
    return ([vlm.token("<|vision_start|>")] + [vlm.base.config.image_token_id] * (image.rows * image.columns)
            + [vlm.token("<|vision_end|>")])


def prompt_ids(vlm, image, prompt):
    """The user turn with one image and `prompt`, up to where the assistant begins, in the model's own chat layout."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = vlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = text.split("<|vision_start|><|image_pad|><|vision_end|>")
    return vlm.encode(before) + image_ids(vlm, image) + vlm.encode(after)


def continuation_ids(vlm, image):
    """What is injected before step t >= 1: the overlay and the corrective instruction, in the same assistant turn."""
    return vlm.encode("\n") + image_ids(vlm, image) + vlm.encode(f"\n{CORRECTION}\n")


def mrope_positions(ids, images, image_token_id, start=0):
    """M-RoPE positions of a piece of sequence that begins at offset `start`: ([3, L] long, the next offset).

    Text counts 1 per token on all three axes (time, row, column). An image holds time still, spans its rows and columns
    from the current offset, and moves the offset on by max(rows, columns) (Qwen2-VL, arXiv:2409.12191, Section 2.1).
    The running offset is why a continuation needs nothing but its own tokens: the model's `rope_deltas` are never used.
    """
    positions, i, images = [], 0, iter(images)
    while i < len(ids):
        if ids[i] == image_token_id:
            image = next(images)
            positions += [(start, start + r, start + c) for r in range(image.rows) for c in range(image.columns)]
            i, start = i + image.rows * image.columns, start + max(image.rows, image.columns)
        else:
            positions.append((start,) * 3)
            i, start = i + 1, start + 1
    return torch.tensor(positions, dtype=torch.long).T, start


def build_trajectory(vlm, prompt, images, texts):
    """The training sequence of Section 3.2: T + 1 texts, images[0] in the prompt and images[t] before step t.

    Targets are the tokens of the texts alone (reasoning and boxes). Prompt, image tokens and corrective instructions
    are context, never targets; that is known here, while the sequence is put together, not searched for afterwards.
    """
    out = Trajectory(ids=prompt_ids(vlm, images[0], prompt), images=list(images), texts=list(texts))
    for t, text in enumerate(texts):
        if t > 0:
            out.ids += continuation_ids(vlm, images[t])
        tokens = vlm.encode(text)
        out.predictor += range(len(out.ids) - 1, len(out.ids) - 1 + len(tokens))
        out.target += tokens
        out.step += [t] * len(tokens)
        out.ids += tokens
        out.boxes.append(parse_box(text))
    return out


# ------------------------------------------------------------------------------------------------------------------
# The model, called in its explicit form: embeddings, image tokens put in their places, the language model
# ------------------------------------------------------------------------------------------------------------------
def recompute_activations(vlm):
    """In a pass that trains with checkpointing, and in no other: a checkpointed layer does not write to the cache."""
    for layer in vlm.base.model.language_model.layers:
        layer.gradient_checkpointing = vlm.checkpointing and torch.is_grad_enabled()


def hidden_states(vlm, ids, positions, mask, images, cache=None):
    """ids [B, K], positions [3, B, K], mask [B, cached + K] (True: a real token) -> hidden states [B, K, D].

    `images`: the ImageTokens of all rows, row after row. With a `cache` the K tokens are appended to it.
    """
    base = vlm.base
    recompute_activations(vlm)
    embeds = base.model.language_model.embed_tokens(ids)                                         # [B, K, D]
    shown = ids == base.config.image_token_id                                                    # [B, K]
    visual = {}
    if images:
        features = torch.cat([image.embeds for image in images])                                 # [image tokens, D]
        embeds = embeds.masked_scatter(shown[..., None], features.to(embeds.dtype))
        visual = dict(visual_pos_masks=shown,
                      deepstack_visual_embeds=[torch.cat(level) for level in zip(*(i.deepstack for i in images))])
    return base.model.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask.long(),
                                     past_key_values=cache, use_cache=cache is not None, **visual).last_hidden_state


def text_logits(vlm, hidden):
    """Hidden states [..., D] -> float32 logits [..., V]. The image placeholder is no word: sampled, it would later be taken
    for an image, so it has no probability. (Finite, since -inf would make the entropy NaN.)"""
    logits = vlm.base.lm_head(hidden).float()
    return logits.index_fill(-1, torch.tensor([vlm.base.config.image_token_id], device=logits.device), -1e30)


def pad_rows(rows, value, device):
    """A list of B lists -> a tensor [B, longest], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows], device=device)


def pad_pieces(vlm, pieces, images, starts):
    """Pieces of sequence of different lengths, one per row, side by side.

    -> ids [B, K], positions [3, B, K], real [B, K] (False: padding, hidden from all attention), next offsets [B].
    """
    device = vlm.base.device
    ids = pad_rows(pieces, 0, device)
    real = pad_rows([[True] * len(piece) for piece in pieces], False, device)
    positions, offsets = torch.zeros(3, *ids.shape, dtype=torch.long), []
    for row, (piece, row_images, start) in enumerate(zip(pieces, images, starts)):
        positions[:, row, :len(piece)], offset = mrope_positions(piece, row_images, vlm.base.config.image_token_id, start)
        offsets.append(offset)
    return ids, positions.to(device), real, torch.tensor(offsets, device=device)


# ------------------------------------------------------------------------------------------------------------------
# The rollout: the loop of Section 3.1 over a key-value cache, for a batch of trajectories at once
# ------------------------------------------------------------------------------------------------------------------
class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache with room at its end; DynamicLayer copies all it holds for every token that comes."""
    room = None  # keys and values [B, heads, capacity, head dim]; self.keys and self.values are the part in use

    def update(self, keys, values, *args, **kwargs):
        held, length = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
        if self.room is None or len(self.room[0]) != len(keys) or length > self.room[0].shape[2]:  # full, or other rows than before
            before, self.room = (self.keys, self.values), [x.new_empty(*x.shape[:2], length + 128, x.shape[3]) for x in (keys, values)]
            for part, x in zip(self.room, before if held else ()):
                part[:, :, :held] = x
        for part, x in zip(self.room, (keys, values)):
            part[:, :, held:length] = x
        self.keys, self.values = (part[:, :, :length] for part in self.room)
        self.is_initialized = True
        return self.keys, self.values


def choose(logits, temperature, dice):
    """logits [n, V], dice [n] in 0..1 -> tokens [n]: the likeliest at temperature 0, else the one at which the cumulated
    probabilities pass the dice."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits / temperature).softmax(-1).cumsum(-1)
    return (cumulated <= dice[:, None] * cumulated[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def guess_next(ids, count, stop):
    """Up to `count` tokens that may follow `ids`: those that followed its last two tokens the time before, as far as `stop`."""
    for k in range(len(ids) - 2, 0, -1) if count > 0 else ():
        if ids[k] == ids[-1] and ids[k - 1] == ids[-2]:
            span = ids[k + 1:k + 1 + count]
            return span[:span.index(stop)] if stop in span else span
    return []


def with_lora_merged(decode):
    """While `decode` runs, LoRA is part of the weights, so that a projection is one small matrix product and not three.

    Only in float32, where the sum is the same policy to within rounding: bfloat16 would round much of the update away, and 4-bit
    weights cannot take it. Afterwards the weights are the old ones to the bit, which takes a copy of them (1 GiB at most).
    """
    @functools.wraps(decode)
    @torch.no_grad()
    def merged(vlm, *args, **kwargs):
        layers = [layer for layer in vlm.model.modules() if hasattr(layer, "lora_A")]
        exact = [layer.base_layer.weight.data for layer in layers]
        if not layers or any(w.dtype != torch.float32 for w in exact) or sum(w.nbytes for w in exact) > 2 ** 30 or layers[0].merged:
            return decode(vlm, *args, **kwargs)
        try:
            for layer, weight in zip(layers, exact):
                layer.base_layer.weight.data = weight.clone()
            vlm.model.merge_adapter()
            return decode(vlm, *args, **kwargs)
        finally:  # PEFT's unmerge_adapter() subtracts, which is not quite the inverse
            for layer, weight in zip(layers, exact):
                layer.base_layer.weight.data = weight
                layer.merged_adapters.clear()
    return merged


@with_lora_merged
def rollout(vlm, images, expressions, steps, max_tokens, prompt=IVT_PROMPT, group_size=1, temperatures=(0.0, 0.0), seeds=None,
            overlay=draw_overlay, agree=1.0, at_once=16):
    """Runs `group_size` trajectories for each of P (image, expression) pairs; returns P * group_size Trajectories.

    images: PIL, RGB. steps: T; 0 is single-shot. max_tokens: per step. temperatures: at step 0 and after; 0 is greedy.
    seeds: P integers, for temperatures above 0: what a prompt samples depends on its own seed alone, not on the prompts that
    share its batch, or on the number of processes (up to rounding, which differs from batch size to batch size).
    overlay: draws box t - 1 on the image for step t.
    agree: a trajectory ends early once its last two boxes have a higher IoU than this (adaptive refinement; 1: never).
    A step ends at a complete box, at the end-of-turn token (which is a target but never enters the context) or at
    max_tokens. Without a valid box the last valid one is drawn, else none.

    Raises ValueError when it is to sample without seeds.

    Each image is encoded once, each token of the context passes through the model once: a prompt is prefilled once and its cache
    repeated for the group, and a continuation prefills only its own image and instruction onto the cache. Rows that
    end a step early are padded in the cache; the mask hides the padding and the offsets do not count it.

    A refinement repeats much of what stands before it in its sequence. So in small batches the next tokens of a row are guessed,
    and up to `at_once` tokens of all rows go through the model in one pass, which reads its weights once. What is chosen at a
    position does not depend on a guess, greedy or sampled, since each position has its own dice (up to rounding: in bfloat16 a
    near tie may fall the other way); a guess that was not chosen stays in the cache, hidden like padding. Compare Leviathan et
    al., arXiv:2211.17192, and Saxena, "Prompt Lookup Decoding", 2023.
    """
    if max(temperatures) > 0 and not seeds:
        raise ValueError("sampling takes a seed for each prompt")
    device, eot, shown_next = vlm.base.device, vlm.token("<|im_end|>"), vlm.token("<|vision_start|>")
    spell = functools.cache(lambda token: vlm.tokenizer.decode([token]))
    dice = torch.stack([torch.rand(steps + 1, group_size, max_tokens, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds or [0] * len(images)], 1).to(device)                   # [T + 1, P, N, max_tokens]
    cache = DynamicCache(config=vlm.base.config.text_config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    # Of each row: its place among all, its picture, its last valid box, how many of its tokens are in the cache
    rows = everyone = [Trajectory() for _ in images]
    who, pictures, drawn, fed = list(range(len(rows))), list(images), [None] * len(rows) * group_size, [0] * len(rows)
    mask = torch.zeros(len(rows), 0, dtype=torch.bool, device=device)                            # [B, cached]
    offset = torch.zeros(len(rows), dtype=torch.long, device=device)                             # [B]

    for t in range(steps + 1):
        # Prefill: the prompt; later the last token of step t - 1, the overlay and the instruction
        shown = encode_images(vlm, [overlay(picture, box) if t else picture for picture, box in zip(pictures, drawn)])
        for row, image, i in zip(rows, shown, who):
            row.ids += continuation_ids(vlm, image) if t else prompt_ids(vlm, image, prompt.format(expression=expressions[i]))
            row.images.append(image)
        ids, positions, real, offset = pad_pieces(vlm, [row.ids[n:] for row, n in zip(rows, fed)], [[image] for image in shown], offset.tolist())
        mask, fed = torch.cat([mask, real], 1), [len(row.ids) for row in rows]
        hidden = hidden_states(vlm, ids, positions, mask, shown, cache)                          # [B, K, D]
        hidden = hidden[torch.arange(len(rows)), real.sum(1) - 1][:, None]                       # [B, 1, D]
        if t == 0 and group_size > 1:
            who = list(range(len(images) * group_size))
            cache.batch_repeat_interleave(group_size)
            hidden, mask, offset = (x.repeat_interleave(group_size, 0) for x in (hidden, mask, offset))
            pictures, fed = ([x for x in xs for _ in range(group_size)] for xs in (pictures, fed))
            rows = everyone = [Trajectory(ids=list(row.ids), images=list(row.images)) for row in rows for _ in range(group_size)]

        # Decode. Each pass gives a live row the token after its last one, and after each of its guesses as far as they are right.
        here = dice[t].flatten(0, 1)[who]                                                        # [B, max_tokens]
        begun, text, guess, live, width = [len(row.target) for row in rows], [""] * len(rows), [[]] * len(rows), range(len(rows)), 0
        while True:
            at = [(i, j, len(rows[i].target) - begun[i] + j) for i in live for j in range(len(guess[i]) + 1)]
            row_of, column, number = torch.tensor(at, device=device).T                           # [n] each
            logits = text_logits(vlm, hidden[row_of, column])                                    # [n, V]
            token = choose(logits, temperatures[min(t, 1)], here[row_of, number])                # [n]
            logprob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]                     # [n]
            said, going, kept = iter(zip(token.tolist(), logprob.tolist())), [], [0] * len(rows)
            for i in live:
                row = rows[i]
                for j, (chosen, p) in enumerate([next(said) for _ in range(len(guess[i]) + 1)]):
                    row.predictor.append(len(row.ids) - 1)
                    row.target.append(chosen)
                    row.step.append(t)
                    row.logprob.append(p)
                    if chosen != eot:
                        row.ids.append(chosen)
                        text[i] += spell(chosen)
                    right = chosen != eot and guess[i][j:j + 1] == [chosen]  # the end of turn may be in the cache, as a wrong guess
                    kept[i] = 1 + j + right
                    ended = (chosen == eot or len(row.target) - begun[i] == max_tokens
                             or any(c in spell(chosen) for c in "])}") and box_complete(text[i]))
                    if ended or not right:
                        break
                going += [i] * (not ended)
            if width:  # of the tokens that went in, those that were chosen stay
                stays = torch.tensor(kept, device=device)
                mask, offset = torch.cat([mask, torch.arange(width, device=device) < stays[:, None]], 1), offset + stays
                fed = [a + b for a, b in zip(fed, kept)]
            if not going:
                break
            live, guess = going, [[]] * len(rows)
            for i in live:
                count = min(at_once // len(rows), begun[i] + max_tokens - len(rows[i].target)) - 1
                guess[i] = guess_next(rows[i].ids, count, shown_next)
            pieces = [[rows[i].ids[-1]] + guess[i] if i in going else [] for i in range(len(rows))]
            ids, real = pad_rows(pieces, 0, device), pad_rows([[True] * len(piece) for piece in pieces], False, device)  # [B, K]
            width = ids.shape[1]
            positions = (offset[:, None] + torch.arange(width, device=device)).expand(3, -1, -1)
            hidden = hidden_states(vlm, ids, positions, torch.cat([mask, real], 1), [], cache)   # [B, K, D]

        for i, row in enumerate(rows):
            row.texts.append(vlm.tokenizer.decode([token for token, step in zip(row.target, row.step) if step == t and token != eot]))
            row.boxes.append(parse_box(row.texts[-1]))
            drawn[i] = row.boxes[-1] or drawn[i]
        if agree < 1 and t > 0:
            stay = [i for i, row in enumerate(rows) if not (all(row.boxes[-2:]) and iou(*row.boxes[-2:]) > agree)]
            if not stay:
                break
            if len(stay) < len(rows):
                cache.batch_select_indices(torch.tensor(stay, device=device))
                mask, offset = mask[stay], offset[stay]
                rows, who, pictures, drawn, fed = ([x[i] for i in stay] for x in (rows, who, pictures, drawn, fed))
    return everyone


LOGITS_AT_ONCE = 2 ** 23  # at a vocabulary of 152k: 55 targets at a time, 34 MB for each copy


def trajectory_logprobs(vlm, trajectories):
    """log-probabilities [M] and entropies [M] of all targets of a batch, row after row, in one pass over it.

    The targets are those that `rollout` sampled or `build_trajectory` laid down. Logits exist at their positions alone:
    a vocabulary of 152k times every image token would be most of the memory.
    """
    pieces, images = [t.ids for t in trajectories], [t.images for t in trajectories]
    ids, positions, mask, _ = pad_pieces(vlm, pieces, images, [0] * len(pieces))                 # [B, L], [3, B, L]
    hidden = hidden_states(vlm, ids, positions, mask, [image for row in images for image in row])  # [B, L, D]
    row = torch.tensor([i for i, t in enumerate(trajectories) for _ in t.target], device=ids.device)            # [M]
    predictor = torch.tensor([p for t in trajectories for p in t.predictor], device=ids.device)                 # [M]
    target = torch.tensor([v for t in trajectories for v in t.target], device=ids.device)                       # [M]

    def of_some(hidden, target):  # [m, D], [m] -> [m], [m]
        logprobs = text_logits(vlm, hidden).log_softmax(-1)                                      # [m, V]
        return logprobs.gather(1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    part = LOGITS_AT_ONCE // vlm.base.lm_head.out_features
    if len(target) <= part:
        return of_some(hidden[row, predictor], target)
    # recomputed in the backward pass: kept for all targets of six trajectories, 2,880, each copy would be 1.75 GB
    parts = [checkpoint(of_some, h, t, use_reentrant=False) for h, t in zip(hidden[row, predictor].split(part), target.split(part))]
    return tuple(torch.cat(part) for part in zip(*parts))                                        # [M], [M]


# ------------------------------------------------------------------------------------------------------------------
# Reward, advantage and loss of GRPO (Sections 3.3 and 3.4)
# ------------------------------------------------------------------------------------------------------------------
def reward(boxes, sample):
    """Eq. 3: IoU of the final step's box and the ground truth + 0.1 * share of the steps that gave a valid box."""
    return box_iou(boxes[-1], sample) + 0.1 * sum(box is not None for box in boxes) / len(boxes)


def six_component_reward(boxes, sample):
    """The kind of reward that Section 3.4 advises against: improvement, convergence, efficiency, format, and penalties for
    regression and stagnation. The paper names these six and says that they had 15 parameters; terms and weights are ours.
    """
    ious, steps = [box_iou(box, sample) for box in boxes], len(boxes) - 1
    moves = [b - a for a, b in zip(ious, ious[1:])]
    improvement = ious[-1] - ious[0]
    convergence = sum(ious[-1] >= threshold for threshold in (0.5, 0.7, 0.9)) / 3
    efficiency = 1 - min((t for t, v in enumerate(ious) if v >= 0.7), default=steps + 1) / (steps + 1)  # how early it is good
    valid = sum(box is not None for box in boxes) / len(boxes)
    regression = sum(max(0, -move - 0.01) for move in moves)
    stagnation = sum(a == b and v < 0.7 for a, b, v in zip(boxes, boxes[1:], ious[1:])) / max(1, steps)
    return 0.5 * improvement + 0.3 * convergence + 0.2 * efficiency + 0.1 * valid - 0.5 * regression - 0.2 * stagnation


def advantages(rewards, eps=1e-4):
    """Eq. 1, rewards [P, N] -> [P, N]: each reward against the mean and the deviation of its group of N.

    A group of equal rewards has advantage zero: it teaches nothing, and counts as `no_signal` in the log. eps is not in
    the paper; with it a group whose rewards differ by rounding alone is not blown up.
    """
    deviation = rewards.std(1, keepdim=True, unbiased=False)
    return (rewards - rewards.mean(1, keepdim=True)) / (deviation + eps)


def grpo_loss(logprob, ref_logprob, advantage, entropy, beta, entropy_weight, kl="paper"):
    """Eq. 2 as sums over the M generated tokens of a batch; all four tensors are [M], `advantage` that of the token's
    trajectory. Returns (loss, policy term, KL term, entropy), each a sum: the caller divides by the tokens of the whole
    update, so that micro-batches add up to one large batch.

    One update follows each batch of rollouts, so the policy that is updated is the one that sampled: the importance
    ratio is 1 and there is nothing to clip. (Steps >= 1 are sampled at temperature 0.7, and log pi is taken at 1: like
    the paper's Eq. 2, this leaves that difference aside.) The paper's KL term is mean |log pi - log ref|; `k3` is
    exp(log ref - log pi) - (log ref - log pi) - 1 (Schulman, "Approximating KL divergence", 2020).
    """
    policy = -(logprob * advantage).sum()
    difference = ref_logprob - logprob
    distance = (difference.abs() if kl == "paper" else difference.exp() - difference - 1).sum()
    entropy = entropy.sum()
    return policy + beta * distance - entropy_weight * entropy, policy, distance, entropy
