"""Phase 0: samples, the student's predictions, and the trajectories that phase 1 learns from.

    python make_data.py                        the toy's world of scenes
    python make_data.py --data my.jsonl        your own samples (docs/your_gpu.md)
    python make_data.py --preset paper --refcocog DIR --refadv DIR --refl4 DIR --coco DIR

Section 3.2, in five steps:

1. Samples: a 1:1:1 mixture of the sources, split by image into train, val and test.
2. Student: the base model's greedy single-shot box for every training sample, a realistic error.
3. Filter: keep predictions with IoU in [0, 0.85]; the rest leave no room to improve.
4. Trajectory: T + 1 boxes on a straight line from the student's box (`--start perturbed`: from a
   box at random) to the truth. In a zoomed view, a box outside the view cannot be written.
5. Teacher: a reasoning trace for each step. It sees what the student will see: the plain image at
   step 0, the picture of box t - 1 at step t.

Departures from the paper, toy preset: `--teacher template` (support/data/teacher.py) computes the
traces from the boxes, since no small model can write them; `--teacher vlm` is the paper's.
`--right-boxes keep` makes trajectories of one step of the rest of 3: shown none but its mistakes, a
small model forgets what it got right, and its step 0 falls; `--right-boxes drop` is the paper's.

Writes {train,val,test,student,sft}.jsonl (a VLM teacher: and traces.jsonl) and images/ to data/.
"""

import random
import time
from collections import Counter
from dataclasses import replace

from common import (
    IVT,
    SINGLE_SHOT,
    answer_of,
    box_iou,
    format_box,
    normalize_box,
    rollout,
    written_boxes,
)
from support.data import sources, teacher
from support.data.samples import load_image
from support.model.decoding import rollouts
from support.model.loading import check_kind, load_vlm
from support.model.views import loop_of
from support.running.files import resumable
from support.running.flags import flags
from toy import world


# Trajectories of boxes ----------------------------------------------------------------------------
def interpolate(first, last, steps):
    """T + 1 boxes (0..1000) on the straight line from `first` to `last` (Section 3.2)."""
    boxes = []
    for t in range(steps + 1):
        x1, y1, x2, y2 = (round(a + (b - a) * t / steps) for a, b in zip(first, last))
        # Sides that lie one apart may be rounded onto each other, and no box is without an area
        boxes.append([x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)])
    return boxes


def in_view(boxes, loop):
    """Whether each box (0..1000) lies wholly in the picture that it is written for."""
    return all(0 <= v <= 1000 for box in written_boxes(boxes, loop) for v in box)


def boxes_to_the_truth(sample, prediction, args, loop):
    """Of a training sample and the student's prediction: the row of data/sft.jsonl that holds the
    T + 1 boxes (of a right box: it alone), without traces yet; or why there is none, in words.

    The student's own errors are where GRPO's rollouts will begin; from boxes perturbed at random
    the model learns to imitate bad starts (Section 3.2, "sandbagging").
    """
    truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
    first = prediction["box"]
    if first is None and args.start == "student":
        return "no valid box"
    # Rounding down to thousandths may leave a tiny true box without an area
    if truth[0] == truth[2] or truth[1] == truth[3]:
        return "true box below a thousandth of the image"
    # The paper keeps 934 of 2,400: a nearly perfect start has nothing to correct
    is_right = prediction["iou"] > args.iou_max
    if is_right and args.right_boxes == "drop":
        return f"IoU above {args.iou_max}"
    if args.start == "perturbed" and not is_right:
        first = teacher.perturb(random.Random(f"{args.seed} {sample['id']}"), truth, args.iou_max)
    boxes = [first] if is_right else interpolate(first, truth, args.steps)
    if not in_view(boxes, loop):
        return "next box outside the view"
    words = {"id": sample["id"], "expression": sample["expression"]}
    return {**words, "iou": box_iou(first, sample), "truth": truth, "boxes": boxes}


# The teacher, a VLM that is told the next box and may not say so ----------------------------------
def teacher_prompt(row, t, loop):
    """What the teacher is asked about step t, and told: the box that the step will write."""
    box = row["boxes"][t]
    words = teacher.ABOUT_STEP if t > 0 else teacher.ABOUT_FIRST
    if t > 0 and box == teacher.box_before(row, t):
        words = teacher.ABOUT_HOLD
    told = format_box(teacher.in_picture(box, row, t, loop))
    return words.format(expression=row["expression"], box=told)


def ask_once(vlm, images, rows, t, seeds, *, temperature, max_tokens, loop, roll):
    """The teacher's trace of step t for each row."""
    trajectories = roll(
        vlm,
        [loop.feedback(image, teacher.box_before(row, t)) for image, row in zip(images, rows)],
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

    rows: dicts with id, expression and boxes. Returns for each {"id", "traces", "rejected"}: a
    trace for each box, or None when one stayed unusable; the faults of those that were refused.
    """
    made = [{"id": row["id"], "traces": [], "rejected": []} for row in rows]
    options = dict(max_tokens=max_tokens, loop=loop, roll=roll)
    for t in range(max(len(row["boxes"]) for row in rows)):
        left = [len(row["boxes"]) > t for row in rows]
        todo = [i for i, row in enumerate(made) if left[i] and row["traces"] is not None]
        # The likeliest trace first; asked again, greedy decoding would repeat it
        for attempt, temperature in enumerate((0.0, 0.7, 0.7)):
            if not todo:
                break
            part = [images[i] for i in todo], [rows[i] for i in todo]
            again = [seeds[i] + attempt for i in todo]
            texts = ask_once(vlm, *part, t, again, temperature=temperature, **options)
            names = [row["expression"] for row in part[1]]
            faults = [teacher.trace_fault(vlm, *pair, max_tokens) for pair in zip(texts, names)]
            sources.show_refused(texts, faults)
            for i, text, fault in zip(todo, texts, faults):
                made[i]["rejected" if fault else "traces"].append(fault or text)
            todo = [i for i, fault in zip(todo, faults) if fault]
        for i in todo:
            made[i]["traces"] = None  # the trajectory is dropped
    return made


if __name__ == "__main__":
    args = flags("make_data", __doc__, **sources.FLAGS)
    loop = loop_of(args)
    start = time.time()
    data = args.out / "data"
    if args.teacher == "vlm" and args.teacher_model:  # now, not when the student is done
        check_kind(args.teacher_model, args.quantize, "--teacher-model")
    sources.begin_data(args, data)

    # 1. Samples -----------------------------------------------------------------------------------
    # Split by image, whatever the source: no test image is ever trained on.
    train = sources.prepare(args, data, world.make_samples)

    # 2. The student's predictions -----------------------------------------------------------------
    # Greedy and single-shot: the errors that this model makes, not those that we would think of.
    vlm = load_vlm(args)
    roll = rollouts(args)

    def predict(batch):
        part = [sample for _, sample in batch]
        images = [load_image(sample, data) for sample in part]
        texts = [sample["expression"] for sample in part]
        trajectories = roll(vlm, images, texts, 0, max_tokens=args.max_tokens, loop=SINGLE_SHOT)
        rows = []
        for sample, trajectory in zip(part, trajectories):
            [box] = trajectory.boxes
            rows.append({"id": sample["id"], "box": box, "iou": box_iou(box, sample)})
        return rows

    student = resumable(data / "student.jsonl", train, args.batch_size, "student", predict)
    sources.show_student(train, student)

    # 3. and 4. Filter and trajectories of boxes ---------------------------------------------------
    rows = []
    dropped = Counter()
    for sample, prediction in zip(train, student):
        row = boxes_to_the_truth(sample, prediction, args, loop)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows.append(row)
    sources.show_kept(rows, dropped)

    # 5. Traces ------------------------------------------------------------------------------------
    # The teacher sees at each step what the student will see there, and knows the next box besides.
    if args.teacher == "template":
        for row in rows:
            row["traces"] = [
                teacher.geometric_trace(row, t, loop) for t in range(len(row["boxes"]))
            ]
    else:
        if args.teacher_model:
            vlm = None  # free it before another model is loaded
            vlm = load_vlm(args, args.teacher_model)

        def teach(batch):
            numbers, part = zip(*batch)
            images = [load_image(row, data) for row in part]
            seeds = [args.seed * 1_000_003 + 3 * number for number in numbers]
            options = dict(max_tokens=args.max_tokens, loop=loop, roll=roll)
            return vlm_traces(vlm, images, part, seeds, **options)

        sample_of = {sample["id"]: sample for sample in train}
        todo = [{**sample_of[row["id"]], **row} for row in rows]
        taught = resumable(data / "traces.jsonl", todo, args.batch_size, "teacher", teach)
        sources.show_teacher(taught)
        rows = [{**row, "traces": made["traces"]} for row, made in zip(rows, taught)]
        rows = [row for row in rows if row["traces"]]
    sources.write_trajectories(args, rows, start)
