"""Phase 0: samples, the student's predictions, and the correction trajectories that phase 1 learns from (Section 3.2).

    python make_data.py                                   the toy's world of scenes
    python make_data.py --data my.jsonl                   your own samples (README, "Your own data")

1. Samples: a 1:1:1 mixture of the sources, split by image into train, val and test.
2. Student: the base model's greedy single-shot box for every training sample, a realistic, model-own error.
3. Filter: keep predictions with IoU in [0, 0.85]; the rest leave no room to improve (`--keep all`: they are kept and hold
   still). A prediction without a valid box cannot be interpolated and is dropped too.
4. Trajectory: T + 1 boxes on a straight line from the student's box (`--start perturbed`: from a box at random) to the
   ground truth (`--path direct`: at the truth from step 1 on).
5. Teacher: a reasoning trace for each step. It sees what the student will see: the plain image at step 0, the overlay of
   box t - 1 at step t.

Departure from the paper, toy preset: `--teacher template` computes the traces from the geometry of the boxes, since no
small model can write them. `--teacher vlm` is the paper's.

Writes data/{train,val,test}.jsonl, data/images/, data/student.jsonl, data/sft.jsonl under --out.
"""

import math
import random
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from common import (SINGLE_PROMPT, answer_of, box_iou, draw_overlay, format_box, iou, normalize_box, place, rollout)


def split(samples, sizes, seed):
    """Samples -> {"train": [...], "val": [...], "test": [...]} of the given sizes, 1:1:1 over the sources, by image.

    All samples of one image go to one side, so no test image is ever trained on, whatever source it comes from. Smaller
    sides are filled first. Raises ValueError naming the source that runs out.
    """
    rng = random.Random(seed)
    sources = sorted({s["source"] for s in samples})
    by_image = defaultdict(list)
    for sample in samples:
        by_image[sample["image"]].append(sample)
    images = sorted(by_image)
    rng.shuffle(images)
    out = {}
    for side in sorted(sizes, key=sizes.get):
        # 505 over three sources is 169 + 168 + 168
        wanted = {s: sizes[side] // len(sources) + (i < sizes[side] % len(sources)) for i, s in enumerate(sources)}
        out[side], rest = [], []
        for image in images:
            useful = [s for s in by_image[image] if wanted[s["source"]] > 0]
            if not useful:
                rest.append(image)  # stays for another side
                continue
            for sample in useful:
                if wanted[sample["source"]] > 0:
                    wanted[sample["source"]] -= 1
                    out[side].append(sample)
        images = rest
        if any(wanted.values()):
            raise ValueError(f"too few samples for {sizes[side]} in {side}: missing "
                             + ", ".join(f"{n} of {s}" for s, n in wanted.items() if n))
        rng.shuffle(out[side])
    return out


def perturb(rng, box, iou_max):
    """A box (0..1000) moved and stretched at random until its IoU with the original is at most iou_max, but above 0.1."""
    x1, y1, x2, y2 = box
    while True:
        dx, dy, kx, ky = (rng.gauss(0, 0.3) for _ in range(4))
        x, y, w, h = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1), (x2 - x1) * math.exp(kx), (y2 - y1) * math.exp(ky)
        out = [min(1000, max(0, round(v))) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        if 0.1 < iou(out, box) <= iou_max:
            return out


def interpolate(first, last, steps):
    """T + 1 boxes (0..1000) on the straight line from `first` to `last` (Section 3.2)."""
    if steps == 0:
        return [first]
    return [[round(a + (b - a) * t / steps) for a, b in zip(first, last)] for t in range(steps + 1)]


# ------------------------------------------------------------------------------------------------------------------
# Teachers. Both give the T + 1 traces of a trajectory; a trace is what stands between <think> and </think>.
# ------------------------------------------------------------------------------------------------------------------
def join(words):
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def template_trace(boxes, truth, t):
    """The trace of step t, from the geometry alone: what is wrong with box t - 1, and how to get to box t.

    The description is not repeated: a model as small as the toy's copies it wrongly, and then finds what it wrote.
    Sizes and shifts count from a tenth of the true box on; directions are all the student could see for itself.
    """
    if t == 0:  # forward reasoning: why this region, whatever it is (Section 3.2)
        return f"I look for the object. I see it at the {place(boxes[0])}."
    before, after = boxes[t - 1], boxes[t]
    width, height = truth[2] - truth[0], truth[3] - truth[1]

    def across(a, b, i, size):  # shift of the centre from a to b, in sizes of the true box
        return (b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 / max(size, 1)

    dx, dy = across(before, truth, 0, width), across(before, truth, 1, height)
    moves = ["right"] * (dx > 0.1) + ["left"] * (dx < -0.1) + ["down"] * (dy > 0.1) + ["up"] * (dy < -0.1)
    if iou(before, truth) == 0:
        return (f"The red box is on the wrong object. I see the target at the {place(truth)}. "
                f"I move the box {join(moves or ['there'])}.")
    wider, taller = width / max(before[2] - before[0], 1), height / max(before[3] - before[1], 1)
    faults = (["too far left"] * (dx > 0.1) + ["too far right"] * (dx < -0.1) + ["too high"] * (dy > 0.1)
              + ["too low"] * (dy < -0.1) + ["too narrow"] * (wider > 1.15) + ["too wide"] * (wider < 0.87)
              + ["too short"] * (taller > 1.15) + ["too tall"] * (taller < 0.87))
    if not faults:
        return "The red box fits well. I keep it." if before == after else "The red box is nearly right. I tighten it slightly."
    sizes = (["wider"] * (wider > 1.15) + ["narrower"] * (wider < 0.87) + ["taller"] * (taller > 1.15)
             + ["shorter"] * (taller < 0.87))
    fix = join([f"move it {join(moves)}"] * bool(moves) + [f"make it {join(sizes)}"] * bool(sizes))
    return f"The red box is {join(faults)}. I {fix}."


TEACHER_FIRST = ('You located "{expression}" in this image and chose the region {box} (coordinates relative to 1000). In two '
                 "sentences, in the first person, reason forward from the description to this region: what you look for, "
                 "where you see it and why it fits. Do not write any number or coordinate, and no box.")
TEACHER_STEP = ('The red box in this image is your last prediction for "{expression}". A better region is {box} (coordinates '
                "relative to 1000); never mention that you were told. In two or three sentences, in the first person, examine "
                "the red box: say what is wrong with it (shifted, too large, too small, on the wrong object) and which "
                "spatial correction is needed. Do not write any number or coordinate, and no box.")


def trace_fault(trace, expression):
    """Why a teacher's trace cannot be used, in a word, or None. It must not hold what the student could not know."""
    if not trace:
        return "empty"
    if not trace.endswith((".", "!", "?")):
        return "unfinished"
    if set(re.findall(r"\d+", trace)) - set(re.findall(r"\d+", expression)) or "[" in trace:
        return "coordinates"
    if re.search(r"ground truth|was told|better region|bbox", trace, re.I):
        return "leak"
    if len(re.findall(r"[.!?](?:\s|$)", trace)) not in (1, 2, 3, 4):
        return "sentences"
    return None


def vlm_traces(vlm, images, rows, args, seeds):
    """The paper's teacher for a batch of rows: prompts a VLM for each step, checks the trace, asks again up to twice.

    Returns (traces, rejections): a list of T + 1 traces per row, None where a step stayed unusable, and a Counter of
    the reasons. The next box is known to the prompt and may not show in the trace's words.
    """
    traces, rejections = [[None] * (args.steps + 1) for _ in rows], Counter()
    for t in range(args.steps + 1):
        for attempt in range(3):
            todo = [i for i, row in enumerate(traces) if row[t] is None]
            if not todo:
                break
            prompts = [(TEACHER_STEP if t else TEACHER_FIRST).format(expression=rows[i]["expression"],
                                                                    box=format_box(rows[i]["boxes"][t])) for i in todo]
            seen = [draw_overlay(images[i], rows[i]["boxes"][t - 1] if t else None) for i in todo]
            said = rollout(vlm, seen, prompts, 0, args.max_tokens, prompt="{expression}", seeds=[seeds[i] + attempt for i in todo],
                           temperatures=(0.0 if attempt == 0 else 0.7,) * 2)
            for i, trajectory in zip(todo, said):
                trace = " ".join(answer_of(trajectory.texts[0]).split())
                fault = trace_fault(trace, rows[i]["expression"])
                if fault:
                    rejections[fault] += 1
                else:
                    traces[i][t] = trace
    return [row if all(row) else None for row in traces], rejections


if __name__ == "__main__":
    import torch

    from runtime import (RANK, Log, barrier, begin, flags, gather, leave_if_interrupted, load_image, load_vlm, memory_for, minutes,
                         read_jsonl, read_samples, seed_all, share, stop, whole_batches, write_jsonl)
    args = flags("make_data", __doc__, data=(None, "your own samples: a .jsonl file to split into train, val and test"),
                 teacher_model=(None, "another checkpoint for --teacher vlm (default: --model, as in the paper)"))
    start, data = time.time(), args.out / "data"
    seed_all(args.seed)
    begin(args, "make_data", *[args.data] * bool(args.data))
    if (data / "sft.jsonl").exists() and not args.restart:
        print(f"{data / 'sft.jsonl'} is finished; --restart makes everything again")
        raise SystemExit
    if args.restart and not RANK:
        for name in ("train", "val", "test", "student", "traces", "sft"):
            (data / f"{name}.jsonl").unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------------------
    # 1. Samples
    # --------------------------------------------------------------------------------------------------------------
    sizes = {"train": args.train_samples, "val": args.val_samples, "test": args.test_samples}
    if not RANK and not all((data / f"{side}.jsonl").exists() for side in sizes):
        if args.data:
            samples = read_samples(args.data, "make_data.py with --data naming an existing file", args.skip_bad)
            for sample in samples:  # image paths are relative to the file they stand in
                sample["image"] = str((Path(args.data).parent / sample["image"]).resolve())
        elif args.preset == "toy":
            import toy
            samples = toy.make_samples(data, -(-sum(sizes.values()) // 3), args.seed)
        else:
            stop("--preset paper needs samples: --data FILE.jsonl, a line per expression (README, \"Your own data\")")
        try:
            sides = split(samples, sizes, args.seed)
        except ValueError as e:
            stop(f"{e}; give more samples or lower --train-samples, --val-samples, --test-samples")
        for side, rows in sides.items():
            write_jsonl(data / f"{side}.jsonl", rows)
    barrier()
    train = read_samples(data / "train.jsonl", "python make_data.py")
    print("samples: " + ", ".join(f"{side} {size}" for side, size in sizes.items()))

    # --------------------------------------------------------------------------------------------------------------
    # 2. The student's predictions: greedy, single-shot. A killed run goes on after its last batch.
    # --------------------------------------------------------------------------------------------------------------
    vlm = load_vlm(args)
    path = data / "student.jsonl"
    done = whole_batches(path, args.batch_size, len(train))
    log, advice = Log(path, keep=done), "--max-pixels or --batch-size"
    with tqdm(total=len(train), initial=done, desc="student", unit="sample", disable=RANK > 0) as bar:
        for i in range(done, len(train), args.batch_size):
            batch = train[i:i + args.batch_size]
            mine = share(batch)
            with memory_for(mine, advice):
                said = rollout(vlm, [load_image(s, data) for s in mine], [s["expression"] for s in mine], 0,
                               args.max_tokens, prompt=SINGLE_PROMPT) if mine else []
            for sample, box in zip(batch, gather([trajectory.boxes[0] for trajectory in said])):
                log.write(id=sample["id"], box=box, iou=box_iou(box, sample))
            bar.update(len(batch))
            leave_if_interrupted()
    barrier()
    student = read_jsonl(path, "")
    ious = torch.tensor([row["iou"] for row in student])
    print(f"student: mean IoU {ious.mean():.3f}, Acc@0.5 {(ious >= 0.5).float().mean():.3f}; "
          "the first boxes beside the truth:")
    for sample, row in list(zip(train, student))[:3]:
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        print(f"  {sample['expression']!r}: {row['box']}, truth {truth}")
    if ious.mean() < 0.1:
        print("warning: the student hardly ever hits; are its boxes in 0..1000, and is the ground truth in pixels?")

    # --------------------------------------------------------------------------------------------------------------
    # 3. and 4. Filter and trajectories
    # --------------------------------------------------------------------------------------------------------------
    rows, dropped = [], Counter()
    for sample, row in zip(train, student):
        if row["box"] is None:
            dropped["no valid box"] += 1
        elif row["iou"] > args.iou_max and args.keep == "errors":
            dropped[f"IoU above {args.iou_max}"] += 1
        else:
            truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
            first, last = row["box"], truth
            if row["iou"] > args.iou_max:
                last = first  # holds still
            elif args.start == "perturbed":
                first = perturb(random.Random(f"{args.seed} {sample['id']}"), truth, args.iou_max)
            boxes = interpolate(first, last, args.steps) if args.path == "linear" else [first] + [last] * args.steps
            rows.append({"id": sample["id"], "expression": sample["expression"], "iou": box_iou(first, sample), "truth": last, "boxes": boxes})
    print(f"filter: {len(rows)} of {len(train)} kept; dropped: "
          + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"))

    # --------------------------------------------------------------------------------------------------------------
    # 5. Traces
    # --------------------------------------------------------------------------------------------------------------
    if args.teacher == "template":
        for row in rows:
            row["traces"] = [template_trace(row["boxes"], row["truth"], t)
                             for t in range(args.steps + 1)]
    else:
        if args.teacher_model:
            vlm = None  # its memory goes before another model comes
            vlm = load_vlm(args, args.teacher_model)
        samples, path = {s["id"]: s for s in train}, data / "traces.jsonl"
        done = whole_batches(path, args.batch_size, len(rows))
        log = Log(path, keep=done)
        with tqdm(total=len(rows), initial=done, desc="teacher", unit="sample", disable=RANK > 0) as bar:
            for i in range(done, len(rows), args.batch_size):
                batch = list(enumerate(rows))[i:i + args.batch_size]
                numbers, mine = zip(*share(batch)) if share(batch) else ((), ())
                seen = [samples[row["id"]] for row in mine]
                with memory_for(seen, advice):
                    traces, rejected = vlm_traces(vlm, [load_image(s, data) for s in seen], mine, args,
                                                  [args.seed * 1_000_003 + 3 * number for number in numbers])
                told = [dict(id=row["id"], traces=trace, rejected={}) for row, trace in zip(mine, traces)]
                for row in told[:1]:
                    row["rejected"] = rejected  # the counts of a batch stand in its first line
                for row in gather(told):
                    log.write(**row)
                bar.update(len(batch))
                leave_if_interrupted()
        barrier()
        rejections = Counter()
        for row, said in zip(rows, read_jsonl(path, "")):
            row["traces"] = said["traces"]
            rejections.update(said["rejected"])
        print(f"teacher: rejected traces: {dict(rejections) or 'none'}; "
              f"{sum(row['traces'] is None for row in rows)} trajectories dropped")
        rows = [row for row in rows if row["traces"]]
    if not rows:
        stop("no trajectory is left for phase 1: the student is right, or invalid, on every sample (--iou-max)")
    write_jsonl(data / "sft.jsonl", rows)
    print("one trajectory:")
    for box, trace in zip(rows[0]["boxes"], rows[0]["traces"]):
        print(f"  {box}  {trace}")
    print(f"{len(rows)} trajectories in {data / 'sft.jsonl'}, {minutes(start)}; next: python sft.py")
