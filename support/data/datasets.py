"""The three published datasets of the paper as samples, and their split (docs/your_gpu.md).

A reader yields dicts with id, source, image, key, width, height, expression and bbox (pixels, [x1,
y1, x2, y2] from here on); `usable` makes samples of them. The key names the photo, and is the same
in all three datasets, so that a photo in two of them stays on one side of the split.
"""

import json
import random
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

from support.data.samples import is_words
from support.running.errors import explained, stop
from support.running.files import write_bytes

# flag -> files: patterns of what has to be there; about: what it is; get: what downloads it
DATASETS = {
    "refcocog": {
        "files": ["**/*.parquet"],
        "about": "RefCOCOg (UMD split), hub id jxu124/refcocog, whose page has size and licence",
        "get": "hf download jxu124/refcocog --repo-type dataset --local-dir {folder}",
    },
    "refadv": {
        "files": ["**/*.parquet"],
        "about": "Ref-Adv-s with its images, hub id dddraxxx/ref-adv-s, about 255 MB, CC BY 4.0",
        "get": "hf download dddraxxx/ref-adv-s --repo-type dataset --local-dir {folder}",
    },
    "refl4": {
        "files": ["ref-l4-val.parquet", "ref-l4-test.parquet", "**/*.jpg"],
        "about": "Ref-L4 with its images (3.5 GB), hub id JierunChen/Ref-L4, CC BY-NC 4.0",
        "get": "hf download JierunChen/Ref-L4 ref-l4-val.parquet ref-l4-test.parquet images.tar.gz "
        "--repo-type dataset --local-dir {folder} && tar -xzf {folder}/images.tar.gz -C {folder}",
    },
    "coco": {
        "files": ["**/COCO_train2014_*.jpg"],
        "about": "COCO's train2014 images, of RefCOCOg; size and terms of use: cocodataset.org",
        "get": "curl -LO http://images.cocodataset.org/zips/train2014.zip && "
        "unzip -q train2014.zip -d {folder}",
    },
}


def how_to_get(name, folder):
    """What a dataset is and the command that downloads it to `folder`, as a sentence."""
    dataset = DATASETS[name]
    command = dataset["get"].format(folder=shlex.quote(str(folder)))
    return f"It takes {dataset['about']}:\n    {command}"


def missing_files(folders):
    """What is not there of flag -> folder (or None): a sentence per dataset, with how to get it."""
    problems = []
    for name, dataset in DATASETS.items():
        folder = Path(folders[name] or f"datasets/{name}")
        lacking = [p for p in dataset["files"] if next(folder.glob(p), None) is None]
        fault = f"{folder} has no {' and no '.join(lacking)}" if folders[name] else "not given"
        if lacking or not folders[name]:
            problems.append(f"--{name}: {fault}. {how_to_get(name, folder)}")
    return problems


# The readers --------------------------------------------------------------------------------------
def read_parquet(folder, columns, files="*.parquet"):
    """Yields the rows of a folder's parquet files as dicts of these columns, a few in memory."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        stop(f"reading {folder} needs pyarrow: pip install pyarrow")
    for path in sorted(folder.rglob(files)):
        for batch in ParquetFile(path).iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()


def image_key(origin, name):
    """The photo behind a file name or image id: coco_9, 000000000009.jpg and
    COCO_train2014_000000000009.jpg are all "coco 9"."""
    stem = Path(name).stem
    number = re.search(r"\d+$", stem)
    if "coco" in origin.lower() and number:
        return f"coco {int(number[0])}"
    return f"{origin} {stem}"


def refcocog(folder, coco):
    """RefCOCOg, a row per sentence. coco: COCO's train2014 images, or the folder around them."""
    if (coco / "train2014").is_dir():
        coco = coco / "train2014"
    columns = ["ref_id", "image_id", "bbox", "raw_image_info", "sentences"]
    for ref in read_parquet(folder, columns):
        # The ref's own file_name ends in the annotation's number: there is no such file
        name = f"COCO_train2014_{ref['image_id']:012d}.jpg"
        image = json.loads(ref["raw_image_info"])
        for sentence in ref["sentences"]:
            yield {
                "id": f"refcocog_{ref['ref_id']}-{sentence['sent_id']}",
                "source": "refcocog",
                "image": str((coco / name).resolve()),
                "key": image_key("coco", name),
                "width": image["width"],
                "height": image["height"],
                "expression": sentence["sent"],
                "bbox": ref["bbox"],
            }


def refadv(folder):
    """Ref-Adv-s; the id is the row number. The images stay in the parquet until `write_images`;
    folders in their names are dropped, so that nothing is ever written elsewhere."""
    columns = ["file_name", "normal_caption", "solution", "width", "height", "image_source"]
    for number, row in enumerate(read_parquet(folder, columns)):
        yield {
            "id": f"refadv_{number}",
            "source": "refadv",
            "image": f"images/{Path(row['file_name']).name}",
            "key": image_key(row["image_source"], row["file_name"]),
            "width": row["width"],
            "height": row["height"],
            "expression": row["normal_caption"],
            "bbox": row["solution"],
        }


def refl4(folder):
    """Ref-L4, whose boxes are xywh; its images lie anywhere in the folder."""
    columns = ["id", "caption", "bbox", "image_id", "width", "height", "file_name"]
    images = {path.name: path.resolve() for path in folder.rglob("*.jpg")}
    for row in read_parquet(folder, columns, "ref-l4-*.parquet"):
        origin, _, number = row["image_id"].rpartition("_")
        x, y, width, height = row["bbox"]
        yield {
            "id": f"refl4_{row['id']}",
            "source": "refl4",
            "image": str(images.get(Path(row["file_name"]).name, row["file_name"])),
            "key": image_key(origin, number),
            "width": row["width"],
            "height": row["height"],
            "expression": row["caption"],
            "bbox": [x, y, x + width, y + height],
        }


# Samples ------------------------------------------------------------------------------------------
def usable(title, rows, texts=("expression",)):
    """The rows of a reader as samples, in the order of their ids: boxes are clipped to the image,
    and what cannot be used is dropped. Prints how many are dropped, and why.

    texts: the fields that hold words. A reader gives None for the bbox of a row that has not one,
    and for the width of an image that cannot be read.
    """
    samples = {}
    dropped = Counter()
    for row in rows:
        row |= {name: row[name].strip() for name in texts}
        words = [row[name] for name in texts]
        x1, y1, x2, y2 = box = clip(row["bbox"] or [0] * 4, row["width"] or 0, row["height"] or 0)
        faults = {
            "with the id of another": row["id"] in samples,
            "without words, or with too many or special tokens": not all(map(is_words, words)),
            "without one box": not row["bbox"],
            "without a readable image": not row["width"],
            "without a box inside the image": not (x1 < x2 and y1 < y2),
        }
        found = [fault for fault, is_so in faults.items() if is_so]
        if found:
            dropped[found[0]] += 1
        else:
            samples[row["id"]] = {**row, "bbox": box}
    read = len(samples) + dropped.total()
    print(f"{title}: {read} read, {len(samples)} kept; dropped: {counted(dropped)}")
    return [samples[name] for name in sorted(samples)]


def counted(dropped):
    """A Counter in words: "3 without words", or "none"."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def clip(bbox, width, height):
    """A box in pixels, cut off at the edges of the image, as floats."""
    return [float(min(max(v, 0), limit)) for v, limit in zip(bbox, (width, height) * 2)]


def paper_samples(folders, seed):
    """flag -> folder becomes the samples of the three datasets, each cut at random to the size of
    the smallest, Ref-Adv-s (1,142).

    The paper tells the sizes, 800 + 170 + 172 of each source, and not from which published splits;
    Ref-Adv-s and Ref-L4 have none to train on. So what there is is pooled and split anew.
    """
    folders = {name: Path(folder) for name, folder in folders.items()}
    readers = {
        "refcocog": refcocog(folders["refcocog"], folders["coco"]),
        "refadv": refadv(folders["refadv"]),
        "refl4": refl4(folders["refl4"]),
    }
    sources = []
    for name, rows in readers.items():
        fault = f"--{name}: {folders[name]} is not as published"
        with explained(fault, how_to_get(name, folders[name])):
            sources.append(usable(name, rows))
    rng = random.Random(seed)
    smallest = min(map(len, sources))
    mixture = []
    for samples in sources:
        mixture += rng.sample(samples, smallest)
    return mixture


def write_images(samples, data, folders):
    """Writes those images of the samples to data/images that lie inside Ref-Adv-s' parquet."""
    wanted = {s["image"]: s["source"] for s in samples if not (data / s["image"]).exists()}
    folder = Path(folders["refadv"])
    with explained(f"--refadv: {folder} is not as published", how_to_get("refadv", folder)):
        for row in read_parquet(folder, ["file_name", "image"]):
            image = f"images/{Path(row['file_name']).name}"
            if wanted.pop(image, None):
                write_bytes(data / image, lambda file: file.write(row["image"]["bytes"]))
    for image, source in sorted(wanted.items())[:1]:
        name = "coco" if source == "refcocog" else source
        count = f"{len(wanted)} images are missing, such as {image}"
        stop(f"{count}, which --{name} should hold. {how_to_get(name, folders[name])}")


# Split --------------------------------------------------------------------------------------------
def by_image(samples, rng):
    """The samples of each image (the same `key`, else the same file), lists in a random order."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.get("key", sample["image"])].append(sample)
    images = sorted(groups)
    rng.shuffle(images)
    return [groups[image] for image in images]


def split(samples, sizes, seed):
    """Samples -> {"train": [...], "val": [...], "test": [...]} of the given sizes, 1:1:1 over the
    sources, the smaller sides first. All samples of one image go to one side, so no test image is
    ever trained on, whatever source it comes from."""
    rng = random.Random(seed)
    sources = sorted({sample["source"] for sample in samples})
    groups = by_image(samples, rng)
    sides = {}
    for side in sorted(sizes, key=sizes.get):
        each, more = divmod(sizes[side], len(sources))  # 505 over three are 169 + 168 + 168
        wanted = {source: each + (i < more) for i, source in enumerate(sources)}
        # What is cut off an image to fit is lost to every side, so images that fit whole go first:
        # Ref-Adv-s has 1,142 samples, up to six of one image, and 1,139 are needed.
        whole, groups = take(groups, wanted, cut=False)
        partial, groups = take(groups, wanted, cut=True)
        if any(wanted.values()):
            missing = ", ".join(f"{count} of {source}" for source, count in wanted.items() if count)
            remedy = "give more, or lower --train-samples, --val-samples, --test-samples"
            stop(f"too few samples for {sizes[side]} in {side}: missing {missing}; {remedy}")
        sides[side] = whole + partial
        rng.shuffle(sides[side])
    return sides


def take(groups, wanted, cut):
    """Takes what `wanted` asks for of the groups (the samples of one image), lowering it: of those
    that fit whole, or with `cut` of all. Returns what it took, and the groups that stay."""
    taken = []
    others = []
    for group in groups:
        left = dict(wanted)
        fitting = []
        for sample in group:
            if left[sample["source"]] > 0:
                left[sample["source"]] -= 1
                fitting.append(sample)
        if fitting and (cut or len(fitting) == len(group)):
            taken += fitting
            wanted.update(left)
        else:
            others.append(group)
    return taken, others
