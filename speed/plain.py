"""The loop played the plainest correct way, with the public API of transformers alone: `generate()`
over the whole context, encoded anew at every step."""

from common import IVT, ImageTokens, begin, continuation_ids, last_valid, read_box

import torch


def size_in_tokens(vlm, image):
    """An ImageTokens without content, for its number of placeholders."""
    size = vlm.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0, 1:]
    merge = vlm.base.config.vision_config.spatial_merge_size
    return ImageTokens(None, [], *(int(v) // merge for v in size))


def model_inputs(vlm, sequences, images):
    """The arguments of the model's own forward pass, padded on the left as generate() wants it.
    sequences: lists of ids; images: for each of them, a list of PIL images."""
    device = vlm.base.device
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences], device=device)
    mask = [[0] * (longest - len(s)) + [1] * len(s) for s in sequences]
    pixels = vlm.image_processor(images=sum(images, []), return_tensors="pt")
    return dict(
        input_ids=ids,
        attention_mask=torch.tensor(mask, device=device),
        mm_token_type_ids=(ids == vlm.base.config.image_token_id).int(),
        pixel_values=pixels["pixel_values"].to(device, vlm.base.dtype),
        image_grid_thw=pixels["image_grid_thw"].to(device),
    )


def append_written(vlm, row, tokens, t):
    """Appends what generate() wrote for a row at step t, as far as where the step ends."""
    text = ""
    for token in tokens:
        row.target.append(token)
        if token in vlm.turn_ends:
            break
        row.ids.append(token)
        text += vlm.tokenizer.decode([token])
        if IVT.ends(text, t):
            break
    row.boxes.append(read_box(text, last_valid(row.boxes), IVT))


@torch.no_grad()
def plain_rollout(vlm, images, texts, steps, *, max_tokens, group_size):
    """As `rollout`, greedy, but all images and all tokens so far go through the model at every
    step. Returns Trajectories with their ids, targets and boxes; `images` are PIL."""
    turn_ends = sorted(vlm.turn_ends)
    for layer in vlm.base.model.language_model.layers:
        layer.gradient_checkpointing = False  # a checkpointed layer writes no cache
    owners = [pair for pair in zip(images, texts) for _ in range(group_size)]
    rows = [begin(vlm, size_in_tokens(vlm, image), text, IVT) for image, text in owners]
    shown = [[image] for image, _ in owners]  # the pictures of each row
    for t in range(steps + 1):
        if t > 0:
            for row, pictures, (image, text) in zip(rows, shown, owners):
                last_box = last_valid(row.boxes)
                picture = IVT.feedback(image, last_box)
                pictures.append(picture)
                row.ids += continuation_ids(vlm, size_in_tokens(vlm, picture), text, IVT, last_box)
        inputs = model_inputs(vlm, [row.ids for row in rows], shown)
        start = inputs["input_ids"].shape[1]

        def step_ends(ids, scores, start=start, t=t, **_):
            ends = [IVT.ends(vlm.tokenizer.decode(row[start:]), t) for row in ids]
            return torch.tensor(ends, device=ids.device)

        out = vlm.base.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=turn_ends,
            pad_token_id=turn_ends[0],
            stopping_criteria=[step_ends],
            suppress_tokens=[vlm.base.config.image_token_id],
        )
        for row, tokens in zip(rows, out[:, start:].tolist()):
            append_written(vlm, row, tokens, t)
    return rows
