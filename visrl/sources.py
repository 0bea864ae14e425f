"""Where VisRL's samples come from: the toy's world, Visual CoT, your own file; and their split.

A sample is {"id", "source", "image", "width", "height", "question", "answer"}, optionally "key",
and "bbox" (pixels x1 y1 x2 y2 of the region that the answer is in) where the source has it.
"""

import json
import random
from collections import Counter
from pathlib import Path

from support.data.datasets import by_image, usable
from support.data.samples import VISRL_FIELDS, own_samples, read_side
from support.running.errors import explained, stop
from support.running.files import write_jsonl
from support.running.processes import RANK, barrier
from toy import world

from PIL import Image
from tqdm import tqdm

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


# Visual CoT as it is published (hub id deepcs233/Visual-CoT) --------------------------------------
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
FOLDERS = {"visual7w": "v7w", "textcap": "textvqa"}  # of images, where of another name
REQUEST = "Please provide the bounding box"  # what follows the question in a conversation
GET = (
    "It takes the files of hub id deepcs233/Visual-CoT (annotations Apache-2.0, images under their "
    "own licences, 143 GB), with the images unpacked to cot/<data set>/"
)


def viscot_samples(folder):
    """(training samples, test samples) of Visual CoT; what cannot be used is dropped and counted.

    Training samples are those of viscot_363k.json, test samples the rows of metadata/*.jsonl that
    are of no training split. Exits when a file is missing or not as published.
    """
    folder = Path(folder).resolve()
    conversations = folder / "viscot_363k.json"
    metadata = sorted((folder / "metadata").glob("*.jsonl"))
    if not conversations.exists() or not metadata:
        stop(f"--viscot {folder} has no viscot_363k.json or no metadata/*.jsonl. {GET}")
    with explained(f"--viscot {folder} is not as published", GET):
        words = ("question", "answer")
        train = usable("Visual CoT, training", conversation_rows(folder, conversations), words)
        test = usable("Visual CoT, test", metadata_rows(folder, metadata), words)
    tested = {sample["key"] for sample in test}
    return [sample for sample in train if sample["key"] not in tested], test


def conversation_rows(folder, path):
    """The rows of viscot_363k.json. Of its two boxes that behind ### is read, integer pixels of the
    image; the one in the conversation is relative to the image padded to a square."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    for number, row in enumerate(tqdm(rows, desc=path.name, unit="row", delay=2)):
        name, _, box = row["image"][1].partition("###")
        question = row["conversations"][0]["value"].removeprefix("<image>").split(REQUEST)[0]
        yield {
            "id": f"{row['dataset']}_{number}",
            "source": row["dataset"],
            **photo(folder / name),
            "question": question,
            "answer": row["conversations"][3]["value"],
            "bbox": json.loads(box),
        }


def metadata_rows(folder, paths):
    """The test rows of metadata/*.jsonl."""
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line) if line.strip() else {"split": "train"}
            if row["split"] == "train":
                continue
            name = row["dataset"]
            yield {
                "id": f"{name}_{row['split']}_{number}",
                "source": name,
                **photo(folder / "cot" / FOLDERS.get(name, name) / row["image"]),
                "question": row["question"],
                "answer": row["answer"],
                "bbox": row["bboxs"][0] if len(row["bboxs"]) == 1 else None,
            }


def photo(path):
    """What a sample says of its image. The photo's place is its key: textcap's are textvqa's."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError:
        width = height = None
    return {"image": str(path), "key": str(path), "width": width, "height": height}


# Sides --------------------------------------------------------------------------------------------
def equal_shares(samples, size):
    """source -> how many of `size` samples are wanted of it, the same of each, rounded up."""
    sources = sorted({sample["source"] for sample in samples})
    return {source: -(-size // len(sources)) for source in sources}


def shares_of_table_7(sizes):
    """side -> source -> how many are wanted, in the proportions of Table 7."""
    wanted = {}
    for column, side in enumerate(("sft", "train")):
        total = sum(row[column] for row in TABLE_7.values())
        size = sizes[side]
        wanted[side] = {name: -(-row[column] * size // total) for name, row in TABLE_7.items()}
    return wanted


def split(samples, wanted, seed):
    """Samples -> {side: samples}, by image: all that are asked about one image go to one side.

    wanted: side -> source -> count. An image goes where its samples are wanted most, as a share of
    what is wanted there; so a source that runs out is short on all sides alike. SFT takes samples
    with a box alone.
    """
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
        sides = split(samples, shares_of_table_7(sizes), args.seed)
        return sides | split(test, {"test": equal_shares(test, sizes["test"])}, args.seed)
    if args.data:
        samples = own_samples(args, VISRL_FIELDS)
    else:
        per_source = sum(-(-size // len(TOY_SOURCES)) for size in sizes.values())
        samples = toy_samples(data, per_source, args.seed)
    wanted = {side: equal_shares(samples, size) for side, size in sizes.items()}
    return split(samples, wanted, args.seed)
