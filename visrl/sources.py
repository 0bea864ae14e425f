"""Where VisRL's samples come from: the toy's world, Visual CoT, your own file; and their split.

A sample is {"id", "source", "image", "width", "height", "question", "answer"}, optionally "key",
and "bbox" (pixels x1 y1 x2 y2 of the region that the answer is in) where the source has it.
"""

import json
import random
from collections import Counter
from pathlib import Path

from support.data.datasets import by_image, usable
from support.data.foreign import own_samples
from support.data.samples import VISRL_FIELDS, header, in_threads, read_side
from support.running.errors import explained, stop
from support.running.files import write_jsonl
from support.running.processes import RANK, barrier
from toy import world

BOXED = {**VISRL_FIELDS, "bbox": list}
SIDES = {"sft": BOXED, "train": VISRL_FIELDS, "test": VISRL_FIELDS}  # side -> what it needs


# The toy's questions ------------------------------------------------------------------------------
# In the whole scene, as small as the model sees it, no mark can be read.
TOY_SOURCES = {  # source of a question -> how its expression describes the object (toy/world.py)
    "mark": "attributes",
    "superlative": "distractors",
    "relation": "relations",
}


def toy_samples(folder, count, seed):
    """`count` questions about marks from each source, each with a scene in folder/images."""

    def words(expression, target):
        return {"question": f"What mark is on {expression}?", "answer": f"a {target['mark']}"}

    return world.make_samples(folder, count, f"visrl {seed}", TOY_SOURCES, words)


# Visual CoT as it is published (visrl/README.md has the commands) ---------------------------------
TABLE_2 = (  # the benchmark's data sets in the paper's Table 2; it holds two more
    "docvqa textcap textvqa dude sroie infographicsvqa flickr30k gqa openimages vsr cub"
).split()
TABLE_7 = {  # data set -> samples for SFT, questions for RL
    "flickr30k": (4000, 32500),
    "gqa": (4000, 30000),
    "infographicsvqa": (4055, 11000),
    "openimages": (3053, 40000),
    "textcap": (4152, 28000),
    "textvqa": (3524, 15000),
    "vsr": (1876, 1500),
    "cub": (1987, 2000),
    "visual7w": (4000, 20000),
}
NAMES = {"v7w": "visual7w"}  # of data sets, where the rows have another
REQUEST = "Please provide the bounding box"  # what follows the question in a conversation
GET = (
    "It takes viscot_363k.json and the images, unpacked to cot/, of hub id deepcs233/Visual-CoT "
    "(Apache-2.0, images under their own licences, 143 GB), and viscot_benchmark/ of the GitHub "
    "repository of that name; visrl/README.md has the commands"
)


def viscot_samples(folder):
    """(training samples, test samples) of Visual CoT: the rows of viscot_363k.json, of the data
    sets of Table 7; those of the benchmark, of Table 2, whose photos are in no training sample.
    Exits when a file is missing or not as published, before any image is opened."""
    folder = Path(folder).resolve()
    files = [folder / f"viscot_benchmark/benchmark/{name}.json" for name in TABLE_2]
    files.insert(0, folder / "viscot_363k.json")
    stop_if_missing(folder, files)
    words = ("question", "answer")
    with explained(f"--viscot {folder} is not as published", GET):
        train, *tests = (list(conversation_rows(folder, file)) for file in files)
        train = [row for row in train if row["source"] in TABLE_7]
        test = sum(tests, [])
        stop_if_missing(folder, {Path(row["image"]).parent for row in train + test})
        test = usable("Visual CoT, test", in_threads(with_size, test, "images"), words)
        tested = {sample["key"] for sample in test}
        train = [row for row in train if row["key"] not in tested]
        train = usable("Visual CoT, training", in_threads(with_size, train, "images"), words)
        return train, test


def stop_if_missing(folder, paths):
    """Exits with those of the paths in the folder that are not there."""
    missing = sorted(str(path.relative_to(folder)) for path in paths if not path.exists())
    if missing:
        names = ", ".join([*missing[:12], *["..."] * (len(missing) > 12)])
        stop(f"--viscot {folder} has no {names}. {GET}")


def conversation_rows(folder, path):
    """The rows of a file of conversations, without the sizes of their images.

    The box is that behind ###, integer pixels; the one in the conversation is relative to the image
    padded to a square. The key is the photo's name alone: textcap's photos are textvqa's, and both
    share Open Images' names with openimages, as visual7w and gqa share Visual Genome's.
    """
    for number, row in enumerate(json.loads(path.read_bytes())):
        name, _, box = row["image"][1].partition("###")
        question = row["conversations"][0]["value"].removeprefix("<image>").split(REQUEST)[0]
        yield {
            "id": f"{row['dataset']}_{row['split']}_{number}",
            "source": NAMES.get(row["dataset"], row["dataset"]),
            "image": str(folder / name),
            "key": Path(name).stem.removeprefix("v7w_"),
            "question": question,
            "answer": row["conversations"][3]["value"],
            "bbox": json.loads(box),
        }


def with_size(row):
    """A row with the size of its image, None where it cannot be read."""
    try:
        width, height, _ = header(row["image"])
    except Exception:  # Pillow's readers raise nearly anything at a damaged file
        width = height = None
    return {**row, "width": width, "height": height}


# Sides --------------------------------------------------------------------------------------------
def in_proportion(counts, size):
    """source -> how many of `size` samples are wanted of it, in proportion to its count."""
    total = sum(counts.values())
    return {source: -(-count * size // total) for source, count in counts.items()}


def split(samples, wanted, seed):
    """Samples -> {side: samples}, by image. wanted: side -> source -> count. An image goes where
    its samples are wanted most, as a share of what is wanted there; so a source that runs out is
    short on all sides alike. SFT takes samples with a box alone."""
    rng = random.Random(seed)
    sides = {side: [] for side in wanted}
    have = {side: Counter() for side in wanted}

    def lacking(side, sample):
        source = sample["source"]
        if side == "sft" and "bbox" not in sample or not wanted[side].get(source):
            return 0
        return 1 - have[side][source] / wanted[side][source]

    for group in by_image(samples, rng):
        side = max(wanted, key=lambda side: sum(lacking(side, sample) for sample in group))
        for sample in group:
            if lacking(side, sample) > 0:
                have[side][sample["source"]] += 1
                sides[side].append(sample)
    for rows in sides.values():
        rng.shuffle(rows)
    return sides


def prepare(args, data):
    """Writes data/{sft,train,test}.jsonl and reads them again, all checked; -> side -> samples."""
    if not RANK:
        for side, rows in make_sides(args, data).items():
            if not rows:
                others = f"give more, or lower the --*-samples of the other sides than {side}"
                stop(f"no sample is left for {side}; {others}")
            write_jsonl(data / f"{side}.jsonl", rows)
    barrier()
    command = "python -m visrl.make_data"
    return {side: read_side(args, side, command, fields) for side, fields in SIDES.items()}


def make_sides(args, data):
    """side -> samples, from where the flags say."""
    sizes = {side: getattr(args, f"{side}_samples") for side in SIDES}
    if args.viscot:
        samples, test = viscot_samples(args.viscot)
        wanted = {}
        for column, side in enumerate(("sft", "train")):
            counts = {source: row[column] for source, row in TABLE_7.items()}
            wanted[side] = in_proportion(counts, sizes[side])
        of_test = in_proportion(Counter(sample["source"] for sample in test), sizes["test"])
        return split(samples, wanted, args.seed) | split(test, {"test": of_test}, args.seed)
    if args.data:
        samples = own_samples(args, VISRL_FIELDS)
    else:
        per_source = sum(-(-size // len(TOY_SOURCES)) for size in sizes.values())
        samples = toy_samples(data, per_source, args.seed)
    equal = {sample["source"]: 1 for sample in samples}
    wanted = {side: in_proportion(equal, size) for side, size in sizes.items()}
    return split(samples, wanted, args.seed)
