"""Where the samples of phase 0 come from: the toy's world, files of your own, the paper's data."""

from collections import Counter

from common import normalize_box
from support.data import datasets
from support.data.foreign import OWN_FLAGS, own_samples
from support.data.samples import read_side
from support.running.errors import stop
from support.running.files import begin, write_jsonl
from support.running.flags import Flag, command, flag_of
from support.running.processes import RANK, barrier, minutes

import torch
from tqdm import tqdm

SIDES = ("train", "val", "test")

FLAGS = {
    **OWN_FLAGS,
    "teacher_model": Flag("another checkpoint for --teacher vlm (default: --model, the paper's)"),
}
for name, dataset in datasets.DATASETS.items():  # missing_files says more than a path check
    FLAGS[name] = Flag(f"folder with {dataset['about']}")


def begin_data(args, data):
    """Checks the flags and the paper's files; ends the program when all is made already."""
    folders = folders_of(args)
    if args.data and any(folders.values()):
        stop("--data is for samples of your own, the folders are for the paper's; give one of them")
    if from_paper(args) and (args.restart or not split_is_there(data)):
        if missing := datasets.missing_files(folders):
            head = "the paper's data is not all there (for samples of your own: --data FILE.jsonl)"
            stop("\n".join([head, *missing]))
    names = (*SIDES, "student", "traces", "sft")
    begin_files(args, data, names, ignore=("batch_size", *datasets.DATASETS))


def begin_files(args, data, names, ignore=()):
    """Ends the program with a flag that needs --data, and when the last of data/<names>.jsonl is
    made already. With --restart all of them go, to be made anew. ignore: flags that do not change
    them."""
    if given := [flag_of(name) for name in OWN_FLAGS if getattr(args, name) and not args.data]:
        stop(f"{given[0]} is about the files of --data; give --data FILE, or leave it out")
    files = [data / f"{name}.jsonl" for name in names]
    if args.restart and not RANK:  # first: killed here, no run goes on with another's samples
        for file in reversed(files):  # the last tells that all is made
            file.unlink(missing_ok=True)
    begin(args, "make_data", *(args.data or ()), ignore=("skip_bad", *ignore))
    if files[-1].exists() and not args.restart:
        print(f"{files[-1]} is finished; --restart makes everything again")
        raise SystemExit


def folders_of(args):
    """flag -> folder of the paper's datasets, or None."""
    return {name: getattr(args, name) for name in datasets.DATASETS}


def from_paper(args):
    return not args.data and (args.preset == "paper" or any(folders_of(args).values()))


def split_is_there(data):
    return all((data / f"{side}.jsonl").exists() for side in SIDES)


def prepare(args, data, make_toy_samples):
    """The training samples; data/{train,val,test}.jsonl are made unless they are there.

    make_toy_samples: (folder, how many of each of three sources, seed) -> samples. All three sides
    are checked, so that a bad test image does not come to light after the training.
    """
    sizes = {side: getattr(args, f"{side}_samples") for side in SIDES}
    if not split_is_there(data) and not RANK:
        if args.data:
            samples = own_samples(args)
        elif from_paper(args):
            samples = datasets.paper_samples(folders_of(args), args.seed)
        else:
            samples = make_toy_samples(data, -(-sum(sizes.values()) // 3), args.seed)
        sides = datasets.split(samples, sizes, args.seed)
        if from_paper(args):
            everything = [sample for side in sides.values() for sample in side]
            datasets.write_images(everything, data, folders_of(args))
        for side, rows in sides.items():
            write_jsonl(data / f"{side}.jsonl", rows)
    barrier()
    checked = {side: read_side(args, side) for side in SIDES}
    print("samples: " + ", ".join(f"{side} {len(rows)}" for side, rows in checked.items()))
    return checked["train"]


def show_student(samples, predictions):
    """Prints how good the student is, and its first boxes beside the truth: coordinates that were
    converted twice, or not at all, show here and nowhere else."""
    ious = torch.tensor([row["iou"] for row in predictions])
    accuracy = (ious >= 0.5).float().mean()
    print(f"student: mean IoU {ious.mean():.3f}, Acc@0.5 {accuracy:.3f}; boxes, and the truth:")
    for sample, row in list(zip(samples, predictions))[:3]:
        truth = normalize_box(sample["bbox"], sample["width"], sample["height"])
        print(f"  {sample['expression']!r}: {row['box']}, truth {truth}")
    if ious.mean() < 0.1:
        print("warning: the student hardly ever hits; is the truth in pixels, its box in 0..1000?")


def show_kept(rows, dropped):
    """Prints what the filter did. dropped: a Counter of reasons."""
    right = sum(len(row["boxes"]) == 1 for row in rows)
    kept = f"{len(rows) - right} with room to improve, {right} right ones"
    total = len(rows) + dropped.total()
    print(f"filter: of {total} kept {kept}; dropped: {datasets.counted(dropped)}")


def write_trajectories(args, rows, start):
    """data/sft.jsonl, one of its trajectories, and what to run next. start: a time.time()."""
    if not rows:
        reasons = "the student is right (--iou-max) or invalid on all, or no trace was usable"
        stop(f"no trajectory is left for phase 1: {reasons}; the counts are above")
    path = args.out / "data/sft.jsonl"
    write_jsonl(path, rows)
    print("one trajectory:")
    longest = max(rows, key=lambda row: len(row["boxes"]))
    for box, text in zip(longest["boxes"], longest["traces"]):
        print(f"  {box}  {text}")
    then = command(args, "python sft.py")
    print(f"{len(rows)} trajectories in {path}, {minutes(start)}; next: {then}")


refused = []  # what `show_refused` has printed


def show_refused(traces, faults):
    """Prints the first refused traces as they come: a misread prompt shows after minutes."""
    for trace, fault in zip(traces, faults):
        if fault and len(refused) < 5 and not RANK:
            refused.append(trace)
            tqdm.write(f"teacher: refused, {fault}: {trace!r}")


def show_teacher(taught):
    """Prints which traces were refused. taught: rows of data/traces.jsonl."""
    rejections = Counter(fault for row in taught for fault in row["rejected"])
    unusable = sum(row["traces"] is None for row in taught)
    print(f"teacher: rejected traces: {datasets.counted(rejections)}; {unusable} rows dropped")
    if unusable > len(taught) / 10:
        print("warning: over a tenth, and the paper drops none; read the refusals above, then")
        print("  another --teacher-model, or for traces that are too long a larger --max-tokens")
