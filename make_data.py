"""Phase 0: samples, the student's predictions, and the trajectories that phase 1 learns from.

    python make_data.py                        the toy's world of scenes
    python make_data.py --data my.jsonl        your own samples (README, "Your own data")
    python make_data.py --preset paper --refcocog DIR --refadv DIR --refl4 DIR --coco DIR
                                               the paper's data (docs/paper_preset.md)

Section 3.2, in five steps:

1. Samples: a 1:1:1 mixture of the sources, split by image into train, val and test.
2. Student: the base model's greedy single-shot box for every training sample, a realistic error.
3. Filter: keep predictions with IoU in [0, 0.85]; the rest leave no room to improve. A prediction
   without a valid box is no start, and dropped too.
4. Trajectory: T + 1 boxes on a straight line from the student's box (`--start perturbed`: from a
   box at random) to the truth. With `--feedback zoom` a box can only be written while it lies in
   the view of the one before; the rest is dropped.
5. Teacher: a reasoning trace for each step. It sees what the student will see: the plain image at
   step 0, the overlay of box t - 1 (or the view of it) at step t.

A departure from the paper, toy preset: `--teacher template` (support/data/teacher.py) computes the
traces from the geometry of the boxes, since no small model can write them; `--teacher vlm` is the
paper's.

Writes data/{train,val,test}.jsonl, data/images/, data/student.jsonl, data/sft.jsonl (and, for a VLM
teacher, data/traces.jsonl) under --out.
"""

import random
import time
from collections import Counter
from dataclasses import replace

from common import (
    IVT,
    SINGLE_SHOT,
    answer_of,
    box_in_view,
    box_iou,
    format_box,
    iou,
    normalize_box,
    rollout,
    written_boxes,
)
from support.data import samples, sources
from support.data.teacher import template_trace, trace_fault
from support.model import loading
from support.model.decoding import rollouts
from support.model.views import loop_of
from support.running import errors, files, processes
from support.running.flags import command, flags
from toy import world


# Trajectories of boxes ----------------------------------------------------------------------------
def interpolate(first, last, steps):
    """T + 1 boxes (0..1000) on the straight line from `first` to `last` (Section 3.2)."""
    boxes = []
    for t in range(steps + 1):
        boxes.append([round(a + (b - a) * t / steps) for a, b in zip(first, last)])
    return boxes


def in_view(boxes, loop):
    """Whether each box (0..1000) lies wholly in the picture that it is written for."""
    return all(0 <= v <= 1000 for box in written_boxes(boxes, loop) for v in box)


def perturb(rng, box, iou_max):
    """The box (0..1000), its sides moved at random: an IoU of 0.1 to iou_max with the original.

    What the paper tried first, and found to teach poor first answers. Stops when iou_max asks for
    what hardly exists.
    """
    x1, y1, x2, y2 = box
    for _ in range(10_000):
        # Sides that cross leave a box with which nothing has an IoU
        moved = [v + rng.gauss(0, 0.3) * side for v, side in zip(box, (x2 - x1, y2 - y1) * 2)]
        out = [min(1000, max(0, round(v))) for v in moved]
        if 0.1 < iou(out, box) <= iou_max:
            return out
    errors.stop(f"no box with an IoU of 0.1 to {iou_max} with {box}; raise --iou-max")


# The teacher, a VLM that is told the next box and may not say so ----------------------------------
# The paper does not print the teacher's prompts either. At step 0 it reasons forward, whether the
# box is right or wrong: the student cannot know that when it writes its first box (Section 3.2).
TEACHER_FIRST = (
    'You located "{expression}" in this image and chose the region {box} (coordinates relative to '
    "1000). In two sentences, in the first person, reason forward from the description to this "
    "region: what you look for, where you see it and why it fits. Do not write any number or "
    "coordinate, and no box."
)
TEACHER_STEP = (
    'The red box in this image is your last prediction for "{expression}". A better region is '
    "{box} (coordinates relative to 1000); never mention that you were told. In two or three "
    "sentences, in the first person, examine the red box: say what is wrong with it (shifted, too "
    "large, too small, on the wrong object) and which spatial correction is needed. Do not write "
    "any number or coordinate, and no box."
)
TEACHER_HOLD = (  # where the next box is the same one: near the truth, with --iou-max 1
    'The red box in this image is your last prediction for "{expression}", and it is right. In two '
    "sentences, in the first person, examine the red box: say why it fits and that you keep it. Do "
    "not write any number or coordinate, and no box."
)


def box_before(row, t):
    """The box that step t of a row will see: none at step 0."""
    return row["boxes"][t - 1] if t > 0 else None


def in_picture(box, row, t, loop):
    """A box as step t of a row has to write it: relative to the picture that the step sees."""
    return box_in_view(box, loop.view(box_before(row, t)))


def teacher_prompt(row, t, loop):
    """What the teacher is asked about step t, and told: the box that the step will write."""
    box = row["boxes"][t]
    words = TEACHER_STEP if t > 0 else TEACHER_FIRST
    if t > 0 and box == box_before(row, t):
        words = TEACHER_HOLD
    told = format_box(in_picture(box, row, t, loop))
    return words.format(expression=row["expression"], box=told)


def ask_once(vlm, images, rows, t, seeds, *, temperature, max_tokens, loop, roll):
    """The teacher's trace of step t for each row."""
    trajectories = roll(
        vlm,
        [loop.feedback(image, box_before(row, t)) for image, row in zip(images, rows)],
        [teacher_prompt(row, t, loop) for row in rows],
        0,
        max_tokens=max_tokens,
        loop=replace(IVT, prompt="{text}"),
        temperatures=(temperature, temperature),
        seeds=seeds,
    )
    return [" ".join(answer_of(trajectory.texts[0]).split()) for trajectory in trajectories]


def vlm_traces(vlm, images, rows, seeds, *, max_tokens, loop=IVT, roll=rollout):
    """The paper's teacher for a batch of rows: a VLM is asked for each step, up to three times.

    rows: dicts with id, expression and boxes. Returns for each {"id", "traces", "rejected"}: T + 1
    traces, or None when a step stayed unusable; the faults of the traces that were refused.
    """
    made = [{"id": row["id"], "traces": [], "rejected": []} for row in rows]
    options = dict(max_tokens=max_tokens, loop=loop, roll=roll)
    for t in range(len(rows[0]["boxes"])):
        todo = [i for i, row in enumerate(made) if row["traces"] is not None]
        # The likeliest trace first; asked again, greedy decoding would repeat it
        for attempt, temperature in enumerate((0.0, 0.7, 0.7)):
            if not todo:
                break
            part = [images[i] for i in todo], [rows[i] for i in todo]
            again = [seeds[i] + attempt for i in todo]
            texts = ask_once(vlm, *part, t, again, temperature=temperature, **options)
            faults = [trace_fault(text, row["expression"]) for text, row in zip(texts, part[1])]
            for i, text, fault in zip(todo, texts, faults):
                made[i]["rejected" if fault else "traces"].append(fault or text)
            todo = [i for i, fault in zip(todo, faults) if fault]
        for i in todo:
            made[i]["traces"] = None  # the trajectory is dropped
    return made


def geometric_trace(row, t, loop):
    """The other teacher: the trace of step t, from where the boxes lie in its picture."""
    boxes = [in_picture(box, row, t, loop) for box in row["boxes"]]
    return template_trace(boxes, in_picture(row["truth"], row, t, loop), t)


if __name__ == "__main__":
    args = flags("make_data", __doc__, **sources.FLAGS)
    loop = loop_of(args)
    processes.seed_all(args.seed)
    start = time.time()
    data = args.out / "data"
    sources.begin_data(args, data)

    # 1. Samples -----------------------------------------------------------------------------------
    # Split by image, whatever the source: no test image is ever trained on.
    train = sources.prepare(args, data, world.make_samples)

    # 2. The student's predictions -----------------------------------------------------------------
    # Greedy and single-shot: the errors that this model makes, not those that we would think of.
    vlm = loading.load_vlm(args)
    roll = rollouts(args)

    def predict(batch):
        part = [sample for _, sample in batch]
        trajectories = roll(
            vlm,
            [samples.load_image(sample, data) for sample in part],
            [sample["expression"] for sample in part],
            0,
            max_tokens=args.max_tokens,
            loop=SINGLE_SHOT,
        )
        rows = []
        for sample, trajectory in zip(part, trajectories):
            [box] = trajectory.boxes
            rows.append({"id": sample["id"], "box": box, "iou": box_iou(box, sample)})
        return rows

    path = data / "student.jsonl"
    student = files.resumable(path, train, args.batch_size, "student", predict)
    sources.show_student(train, student)

    # 3. and 4. Filter and trajectories of boxes ---------------------------------------------------
    # The student's own errors are where GRPO's rollouts will begin; from boxes perturbed at random
    # the model learns to imitate bad starts (Section 3.2, "sandbagging").
    rows = []
    dropped = Counter()
    for sample, row in zip(train, student):
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        if row["box"] is None:
            dropped["no valid box"] += 1
            continue
        # Rounding down to thousandths may leave a tiny true box without an area
        if truth[0] == truth[2] or truth[1] == truth[3]:
            dropped["true box below a thousandth of the image"] += 1
            continue
        # The paper keeps 934 of 2,400: a nearly perfect start has nothing to correct
        if row["iou"] > args.iou_max:
            dropped[f"IoU above {args.iou_max}"] += 1
            continue
        first = row["box"]
        if args.start == "perturbed":
            rng = random.Random(f"{args.seed} {sample['id']}")
            first = perturb(rng, truth, args.iou_max)
        boxes = interpolate(first, truth, args.steps)
        if not in_view(boxes, loop):
            dropped["next box outside the view"] += 1
            continue
        kept = {"id": sample["id"], "expression": sample["expression"]}
        rows.append({**kept, "iou": box_iou(first, sample), "truth": truth, "boxes": boxes})
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    print(f"filter: {len(rows)} of {len(train)} kept; dropped: {reasons}")

    # 5. Traces ------------------------------------------------------------------------------------
    # The teacher sees at each step what the student will see there, and knows the next box besides.
    if args.teacher == "template":
        steps = range(args.steps + 1)
        for row in rows:
            row["traces"] = [geometric_trace(row, t, loop) for t in steps]
    else:
        if args.teacher_model:
            vlm = None  # free it before another model is loaded
            vlm = loading.load_vlm(args, args.teacher_model)

        def teach(batch):
            numbers, part = zip(*batch)
            images = [samples.load_image(row, data) for row in part]
            seeds = [args.seed * 1_000_003 + 3 * number for number in numbers]
            options = dict(max_tokens=args.max_tokens, loop=loop, roll=roll)
            return vlm_traces(vlm, images, part, seeds, **options)

        sample_of = {sample["id"]: sample for sample in train}
        todo = [{**sample_of[row["id"]], **row} for row in rows]
        path = data / "traces.jsonl"
        taught = files.resumable(path, todo, args.batch_size, "teacher", teach)
        rejections = Counter()
        for row, made in zip(rows, taught):
            row["traces"] = made["traces"]
            rejections.update(made["rejected"])
        unusable = sum(row["traces"] is None for row in rows)
        print(f"teacher: rejected traces: {dict(rejections) or 'none'}; {unusable} rows dropped")
        rows = [row for row in rows if row["traces"] and None not in row["traces"]]
    if not rows:
        errors.stop(
            "no trajectory is left for phase 1: the student is right or invalid on every sample "
            "(--iou-max), or no trace of the teacher was usable (the counts are above)"
        )
    files.write_jsonl(data / "sft.jsonl", rows)
    print("one trajectory:")
    for box, text in zip(rows[0]["boxes"], rows[0]["traces"]):
        print(f"  {box}  {text}")
    count = f"{len(rows)} trajectories in {data / 'sft.jsonl'}"
    print(f"{count}, {processes.minutes(start)}; next: {command(args, 'python sft.py')}")
