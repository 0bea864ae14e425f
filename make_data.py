"""Phase 0: samples, the student's predictions, and the correction trajectories that phase 1 learns from (Section 3.2).

    python make_data.py                                   the toy's world of scenes
    python make_data.py --data my.jsonl                   your own samples (README, "Your own data")
    python make_data.py --preset paper --refcocog DIR --refadv DIR --refl4 DIR --coco DIR     (README, "The paper's data")

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

import json
import math
import pickle
import random
import re
import shlex
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from common import (SINGLE_PROMPT, answer_of, box_iou, draw_overlay, format_box, iou, normalize_box, place, rollout)
from runtime import (RANK, barrier, begin, flags, load_image, load_vlm, minutes, read_samples, resumable, seed_all, stop, write_bytes,
                     write_jsonl)

# ------------------------------------------------------------------------------------------------------------------
# The paper's three datasets, as they are published. A reader yields dicts with id, image, key, width, height, expression
# and bbox (pixels, xyxy from here on); `usable` makes samples of them. The key names the photo, and is the same in all three.
# ------------------------------------------------------------------------------------------------------------------
DATASETS = {  # flag -> (sets of files of which one will do, what it is, the shell line that gets it)
    "refcocog": ((("refs(umd).p", "instances.json"), ("**/*.parquet",)),
                 "RefCOCOg (UMD split), the parquet files of hub id jxu124/refcocog (its page there has size and licence), or the "
                 "original refs(umd).p with instances.json",
                 "hf download jxu124/refcocog --repo-type dataset --local-dir {folder}"),
    "refadv": ((("**/*.parquet",),),
               "Ref-Adv-s, one parquet file with its images, hub id dddraxxx/ref-adv-s, about 255 MB, CC BY 4.0",
               "hf download dddraxxx/ref-adv-s --repo-type dataset --local-dir {folder}"),
    "refl4": ((("ref-l4-val.parquet", "ref-l4-test.parquet", "images.tar.gz"), ("ref-l4-val.parquet", "ref-l4-test.parquet", "images/*")),
              "Ref-L4, ref-l4-val.parquet, ref-l4-test.parquet and images.tar.gz (3.5 GB), hub id JierunChen/Ref-L4, CC BY-NC 4.0",
              "hf download JierunChen/Ref-L4 ref-l4-val.parquet ref-l4-test.parquet images.tar.gz --repo-type dataset "
              "--local-dir {folder}"),
    "coco": ((("COCO_train2014_*.jpg",), ("train2014/COCO_train2014_*.jpg",)),
             "the COCO train2014 images, which RefCOCOg's expressions are about; size and terms of use: cocodataset.org",
             "curl -LO http://images.cocodataset.org/zips/train2014.zip && unzip -q train2014.zip -d {folder}"),
}


def how_to_get(name, folder):
    return f"It takes {DATASETS[name][1]}:\n    " + DATASETS[name][2].format(folder=shlex.quote(str(folder)))


def missing_files(folders):
    """What is not there of flag -> folder (or None): per dataset what is missing and how to get it; [] when all is there."""
    problems = []
    for name, (choices, _, _) in DATASETS.items():
        folder = Path(folders[name] or f"datasets/{name}")
        lacking = min(([p for p in files if next(folder.glob(p), None) is None] for files in choices), key=len)
        if lacking or not folders[name]:
            fault = f"{folder} has no {' and no '.join(lacking)}" if folders[name] else "not given"
            problems.append(f"--{name}: {fault}. {how_to_get(name, folder)}")
    return problems


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: whatever a pickle runs it looks up by name first, and here no name is found."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; a list of expressions needs no code")


def read_refs(path):
    """The list of dicts in refs(umd).p. Exits when it holds anything but plain data."""
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()  # from Python 2, whose strings are bytes
        except Exception as e:  # a damaged pickle raises nearly anything
            stop(f"{path} is not the plain list that RefCOCOg's authors published ({e}); get it again")


def read_parquet(path, columns):
    """Yields the rows of a parquet file as dicts of these columns; no other column is read, few rows are held at once."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        stop(f"reading {path} needs pyarrow: pip install pyarrow")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        lacking = set(columns) - set(file.schema_arrow.names)
        if lacking:
            stop(f"{path} has no column {', '.join(sorted(lacking))}; it has {', '.join(file.schema_arrow.names)}. Is it the right file?")
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        stop(f"{path} cannot be read ({e}); get it again")


def xyxy(bbox):
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def image_key(origin, name):
    """The photo behind a file or image id: coco_9, 000000000009.jpg and COCO_train2014_000000000009.jpg are all "coco 9"."""
    number = re.search(r"\d+$", Path(name).stem)
    return f"coco {int(number[0])}" if "coco" in origin and number else f"{origin} {Path(name).stem}"


def inside(file_name):
    """Where an image that comes inside a parquet or tar file is put, relative to data/. No folder in its name counts."""
    return f"images/{Path(file_name).name}"


def refcocog(folder, coco):
    """RefCOCOg, a row per sentence: refs(umd).p with instances.json (boxes xywh), else jxu124's parquet files (xyxy)."""
    if (folder / "refs(umd).p").exists():
        instances = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
        images = {image["id"]: image for image in instances["images"]}
        boxes = {annotation["id"]: xyxy(annotation["bbox"]) for annotation in instances["annotations"]}
        refs = ((ref, images[ref["image_id"]], boxes[ref["ann_id"]]) for ref in read_refs(folder / "refs(umd).p"))
    else:
        columns = ["ref_id", "image_id", "bbox", "raw_image_info", "sentences"]
        refs = ((ref, json.loads(ref["raw_image_info"]), ref["bbox"]) for path in sorted(folder.rglob("*.parquet"))
                for ref in read_parquet(path, columns))
    coco = (coco / "train2014" if (coco / "train2014").is_dir() else coco).resolve()
    for ref, image, bbox in refs:
        name = f"COCO_train2014_{ref['image_id']:012d}.jpg"  # the ref's own file_name ends in the annotation's number: no such file
        for sentence in ref["sentences"]:
            yield {"id": f"{ref['ref_id']}-{sentence['sent_id']}", "image": str(coco / name), "key": image_key("coco", name),
                   "width": image["width"], "height": image["height"], "expression": sentence["sent"], "bbox": bbox}


def refadv(folder):
    """Ref-Adv-s; its id is the row's number. The images stay in the parquet until `write_images`."""
    columns = ["file_name", "normal_caption", "solution", "width", "height", "image_source"]
    rows = (row for path in sorted(folder.rglob("*.parquet")) for row in read_parquet(path, columns))
    for number, row in enumerate(rows):
        yield {"id": str(number), "image": inside(row["file_name"]), "key": image_key(row["image_source"], row["file_name"]),
               "width": row["width"], "height": row["height"], "expression": row["normal_caption"], "bbox": row["solution"]}


def refl4(folder):
    """Ref-L4, boxes xywh. An image unpacked to images/ is used where it lies, others stay in the tar until `write_images`."""
    unpacked = (folder / "images").resolve()
    for name in ("ref-l4-val.parquet", "ref-l4-test.parquet"):
        for row in read_parquet(folder / name, ["id", "caption", "bbox", "image_id", "width", "height", "file_name"]):
            origin, _, number = row["image_id"].rpartition("_")
            file = unpacked / Path(row["file_name"]).name
            yield {"id": str(row["id"]), "image": str(file) if file.exists() else inside(row["file_name"]),
                   "key": image_key(origin, number), "width": row["width"], "height": row["height"],
                   "expression": row["caption"], "bbox": xyxy(row["bbox"])}


def usable(source, rows):
    """The rows of a reader as samples, in the order of their ids: boxes clipped to the image, the useless dropped by reason."""
    samples, dropped, read = {}, Counter(), 0
    for read, row in enumerate(rows, 1):
        size = row["width"], row["height"]
        x1, y1, x2, y2 = bbox = [float(min(max(v, 0), limit)) for v, limit in zip(row["bbox"], size * 2)]
        name, expression = f"{source}_{row['id']}", row["expression"].strip()
        why = ("without a box inside the image" if not (x1 < x2 and y1 < y2) else "without words" if not expression
               else "with the id of another" if name in samples else None)
        if why:
            dropped[why] += 1
        else:
            samples[name] = {"source": source, **row, "id": name, "expression": expression, "bbox": bbox}
    print(f"{source}: {read} read, {len(samples)} kept; dropped: " + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"))
    return [samples[name] for name in sorted(samples)]


def paper_samples(folders, seed):
    """flag -> folder: the samples of the three datasets, each cut at random to the size of the smallest, Ref-Adv-s (1,142).

    The paper tells the sizes, 800 + 170 + 172 of each source, and not from which published splits; Ref-Adv-s and Ref-L4 have
    none to train on. So what there is of each is pooled here and split anew, by image. Exits when a file is not as published.
    """
    path, sources, rng = {name: Path(folder) for name, folder in folders.items()}, [], random.Random(seed)
    for name, rows in {"refcocog": refcocog(path["refcocog"], path["coco"]), "refadv": refadv(path["refadv"]),
                       "refl4": refl4(path["refl4"])}.items():
        try:
            sources.append(usable(name, rows))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            stop(f"--{name}: {path[name]} is not as published ({type(e).__name__}: {e}). {how_to_get(name, path[name])}")
    smallest = min(map(len, sources))
    return [sample for samples in sources for sample in rng.sample(samples, smallest)]


def write_images(samples, data, folders):
    """Writes those images of the samples to data/images that lie inside Ref-Adv-s' parquet or Ref-L4's tar; no others."""
    wanted = {s["image"]: "coco" if s["source"] == "refcocog" else s["source"] for s in samples if not (data / s["image"]).exists()}
    archive = Path(folders["refl4"]) / "images.tar.gz"

    def embedded():  # (file name, bytes)
        for path in sorted(Path(folders["refadv"]).rglob("*.parquet")):
            yield from ((row["file_name"], row["image"]["bytes"]) for row in read_parquet(path, ["file_name", "image"]))
        if wanted and archive.exists():
            with tarfile.open(archive, "r:gz") as tar:
                for member in tqdm(tar, desc=archive.name, unit="file", delay=2):
                    if member.isfile() and inside(member.name) in wanted:
                        yield member.name, tar.extractfile(member).read()

    try:
        for name, content in embedded():
            if inside(name) in wanted:
                write_bytes(data / inside(name), lambda file: file.write(content))
                del wanted[inside(name)]
            if not wanted:
                break  # the rest of the archive need not be unpacked
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        stop(f"--refl4: {archive} is damaged ({e}). {how_to_get('refl4', folders['refl4'])}")
    if wanted:
        image, name = min(wanted.items())
        stop(f"{len(wanted)} images are missing, such as {image}, which --{name} should hold. {how_to_get(name, folders[name])}")


def split(samples, sizes, seed):
    """Samples -> {"train": [...], "val": [...], "test": [...]} of the given sizes, 1:1:1 over the sources, by image.

    All samples of one image (the same `key`, or without one the same file) go to one side, so no test image is ever trained
    on, whatever source it comes from. Smaller sides are filled first. Raises ValueError naming the source that runs out.
    """
    rng = random.Random(seed)
    sources = sorted({s["source"] for s in samples})
    by_image = defaultdict(list)
    for sample in samples:
        by_image[sample.get("key", sample["image"])].append(sample)
    images = sorted(by_image)
    rng.shuffle(images)
    out = {}
    for side in sorted(sizes, key=sizes.get):
        # 505 over three sources is 169 + 168 + 168
        wanted = {s: sizes[side] // len(sources) + (i < sizes[side] % len(sources)) for i, s in enumerate(sources)}
        out[side] = []
        # What is cut off an image to fit is lost to every side. So images that fit whole go first: Ref-Adv-s has 1,142 samples,
        # up to six of one image, and 1,139 are needed.
        for whole in (True, False):
            rest = []
            for image in images:
                counts = Counter(s["source"] for s in by_image[image])
                if not (all(n <= wanted[s] for s, n in counts.items()) if whole else any(wanted[s] for s in counts)):
                    rest.append(image)  # stays for another side
                    continue
                for sample in by_image[image]:
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
    for _ in range(10_000):  # more than enough, unless iou_max asks for what hardly exists
        dx, dy, kx, ky = (rng.gauss(0, 0.3) for _ in range(4))
        x, y, w, h = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1), (x2 - x1) * math.exp(kx), (y2 - y1) * math.exp(ky)
        out = [min(1000, max(0, round(v))) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        if 0.1 < iou(out, box) <= iou_max:
            return out
    raise ValueError(f"no box with an IoU of 0.1 to {iou_max} with {box} in 10,000 tries; raise --iou-max")


def interpolate(first, last, steps, path="linear"):
    """T + 1 boxes (0..1000) on the straight line from `first` to `last` (Section 3.2); path "direct": at `last` from step 1 on."""
    if path == "direct":
        return [first] + [last] * steps
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

    args = flags("make_data", __doc__, data=(None, "your own samples: a .jsonl file to split into train, val and test"),
                 **{name: (None, f"folder with {what}") for name, (_, what, _) in DATASETS.items()},
                 teacher_model=(None, "another checkpoint for --teacher vlm (default: --model, as in the paper)"))
    start, data, folders = time.time(), args.out / "data", {name: getattr(args, name) for name in DATASETS}
    from_paper = not args.data and (args.preset == "paper" or any(folders.values()))
    sizes = {"train": args.train_samples, "val": args.val_samples, "test": args.test_samples}
    fresh = args.restart or not all((data / f"{side}.jsonl").exists() for side in sizes)
    if args.data and any(folders.values()):
        stop("--data is for samples of your own, the folders are for the paper's; give one or the other")
    if from_paper and fresh and missing_files(folders):
        stop("\n".join(["the paper's data is not all there (for samples of your own: --data FILE.jsonl)", *missing_files(folders)]))
    seed_all(args.seed)
    begin(args, "make_data", *[args.data] * bool(args.data), ignore=("batch_size", *DATASETS))
    if (data / "sft.jsonl").exists() and not args.restart:
        print(f"{data / 'sft.jsonl'} is finished; --restart makes everything again")
        raise SystemExit
    if args.restart and not RANK:
        for name in ("train", "val", "test", "student", "traces", "sft"):
            (data / f"{name}.jsonl").unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------------------
    # 1. Samples
    # --------------------------------------------------------------------------------------------------------------
    if fresh and not RANK:
        if args.data:
            samples = read_samples(args.data, "make_data.py with --data naming an existing file", args.skip_bad)
            for sample in samples:  # image paths are relative to the file they stand in
                sample["image"] = str((Path(args.data).parent / sample["image"]).resolve())
        elif from_paper:
            samples = paper_samples(folders, args.seed)
        else:
            import toy
            samples = toy.make_samples(data, -(-sum(sizes.values()) // 3), args.seed)
        try:
            sides = split(samples, sizes, args.seed)
        except ValueError as e:
            stop(f"{e}; give more samples or lower --train-samples, --val-samples, --test-samples")
        if from_paper:
            write_images([sample for rows in sides.values() for sample in rows], data, folders)
        for side, rows in sides.items():
            write_jsonl(data / f"{side}.jsonl", rows)
    barrier()
    # all three are checked now: a bad test image should not come to light after the training
    train, *_ = [read_samples(data / f"{side}.jsonl", "python make_data.py", args.skip_bad) for side in sizes]
    print("samples: " + ", ".join(f"{side} {size}" for side, size in sizes.items()))

    # --------------------------------------------------------------------------------------------------------------
    # 2. The student's predictions: greedy, single-shot. A killed run goes on after its last batch.
    # --------------------------------------------------------------------------------------------------------------
    vlm = load_vlm(args)

    def predict(batch):
        samples = [sample for _, sample in batch]
        said = rollout(vlm, [load_image(s, data) for s in samples], [s["expression"] for s in samples], 0, args.max_tokens,
                       prompt=SINGLE_PROMPT)
        return [dict(id=s["id"], box=t.boxes[0], iou=box_iou(t.boxes[0], s)) for s, t in zip(samples, said)]

    student = resumable(data / "student.jsonl", train, args.batch_size, "student", predict)
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
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        if row["box"] is None:
            dropped["no valid box"] += 1
        elif truth[0] == truth[2] or truth[1] == truth[3]:
            dropped["true box below a thousandth of the image"] += 1
        elif row["iou"] > args.iou_max and args.keep == "errors":
            dropped[f"IoU above {args.iou_max}"] += 1
        else:
            first, last = row["box"], truth
            if args.start == "perturbed":
                first = perturb(random.Random(f"{args.seed} {sample['id']}"), truth, args.iou_max)
            elif row["iou"] > args.iou_max:
                last = first  # a good prediction holds still
            boxes = interpolate(first, last, args.steps, args.path)
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

        def trace(batch):
            numbers, part = zip(*batch)
            traces, rejected = vlm_traces(vlm, [load_image(row, data) for row in part], part, args,
                                          [args.seed * 1_000_003 + 3 * number for number in numbers])
            said = [dict(id=row["id"], traces=one, rejected={}) for row, one in zip(part, traces)]
            said[0]["rejected"] = rejected  # of the whole batch
            return said

        samples, rejections = {s["id"]: s for s in train}, Counter()
        for row, said in zip(rows, resumable(data / "traces.jsonl", [{**samples[row["id"]], **row} for row in rows], args.batch_size,
                                             "teacher", trace)):
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
