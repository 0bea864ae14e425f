"""The three published datasets of the paper as samples, and their split (docs/paper_preset.md).

A reader yields dicts with id, image, key, width, height, expression and bbox (pixels, [x1, y1,
x2, y2] from here on); `usable` makes samples of them. The key names the photo, and is the same in
all three datasets, so that a photo in two of them stays on one side of the split.
"""

import json
import pickle
import random
import re
import shlex
import tarfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from support.running.errors import stop
from support.running.files import write_bytes

from tqdm import tqdm

# flag -> files: sets of file patterns, of which one set has to be there; about: what it is;
# get: the shell command that downloads it
DATASETS = {
    "refcocog": {
        "files": [["refs(umd).p", "instances.json"], ["**/*.parquet"]],
        "about": "RefCOCOg (UMD split), the parquet files of hub id jxu124/refcocog (its page "
        "there has size and licence), or the original refs(umd).p with instances.json",
        "get": "hf download jxu124/refcocog --repo-type dataset --local-dir {folder}",
    },
    "refadv": {
        "files": [["**/*.parquet"]],
        "about": "Ref-Adv-s, one parquet file with its images, hub id dddraxxx/ref-adv-s, about "
        "255 MB, CC BY 4.0",
        "get": "hf download dddraxxx/ref-adv-s --repo-type dataset --local-dir {folder}",
    },
    "refl4": {
        "files": [
            ["ref-l4-val.parquet", "ref-l4-test.parquet", "images.tar.gz"],
            ["ref-l4-val.parquet", "ref-l4-test.parquet", "images/*"],
        ],
        "about": "Ref-L4, ref-l4-val.parquet, ref-l4-test.parquet and images.tar.gz (3.5 GB), hub "
        "id JierunChen/Ref-L4, CC BY-NC 4.0",
        "get": "hf download JierunChen/Ref-L4 ref-l4-val.parquet ref-l4-test.parquet images.tar.gz "
        "--repo-type dataset --local-dir {folder}",
    },
    "coco": {
        "files": [["COCO_train2014_*.jpg"], ["train2014/COCO_train2014_*.jpg"]],
        "about": "the COCO train2014 images, which RefCOCOg's expressions are about; size and "
        "terms of use: cocodataset.org",
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
    """What is not there of flag -> folder (or None): a sentence per dataset with what is missing
    and how to get it; [] when all is there."""
    problems = []
    for name, dataset in DATASETS.items():
        folder = Path(folders[name] or f"datasets/{name}")
        lacking = [absent(folder, patterns) for patterns in dataset["files"]]
        fewest = min(lacking, key=len)  # the set of files that the folder comes closest to
        if not folders[name]:
            fault = "not given"
        elif fewest:
            fault = f"{folder} has no {' and no '.join(fewest)}"
        else:
            continue
        problems.append(f"--{name}: {fault}. {how_to_get(name, folder)}")
    return problems


def absent(folder, patterns):
    """Those of the file patterns that no file in the folder matches."""
    return [pattern for pattern in patterns if next(folder.glob(pattern), None) is None]


# The two kinds of files, read without running anything that is in them ----------------------------
class PlainUnpickler(pickle.Unpickler):
    """Loads lists, dicts, strings and numbers only: whatever a pickle runs it looks up by name
    first, and here no name is found."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}; a list of expressions needs no code"
        )


def read_refs(path):
    """The list of dicts in refs(umd).p. Exits when it holds anything but plain data."""
    with open(path, "rb") as file:
        try:
            # from Python 2, whose strings are bytes
            return PlainUnpickler(file, encoding="latin1").load()
        except Exception as e:  # a damaged pickle raises nearly anything
            stop(
                f"{path} is not the plain list that RefCOCOg's authors published ({e}); "
                "get it again"
            )


def read_parquet(path, columns):
    """Yields the rows of a parquet file as dicts of these columns; no other column is read, and few
    rows are in memory at once. Exits when the file is damaged or lacks a column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        stop(f"reading {path} needs pyarrow: pip install pyarrow")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        lacking = sorted(set(columns) - set(names))
        if lacking:
            stop(
                f"{path} has no column {', '.join(lacking)}; it has {', '.join(names)}. "
                "Is it the right file?"
            )
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        stop(f"{path} cannot be read ({e}); get it again")


# The readers --------------------------------------------------------------------------------------
def xyxy(bbox):
    """[x, y, width, height] -> [x1, y1, x2, y2]."""
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def image_key(origin, name):
    """The photo behind a file name or image id: coco_9, 000000000009.jpg and
    COCO_train2014_000000000009.jpg are all "coco 9"."""
    stem = Path(name).stem
    number = re.search(r"\d+$", stem)
    if "coco" in origin and number:
        return f"coco {int(number[0])}"
    return f"{origin} {stem}"


def inside(file_name):
    """Where an image that comes inside a parquet or tar file is put, relative to data/. Folders
    in its name are dropped, so that nothing is ever written elsewhere."""
    return f"images/{Path(file_name).name}"


def refcocog(folder, coco):
    """RefCOCOg, a row per sentence, from the original files if they are there, else from parquet.

    Its images are those of COCO train2014, in the folder `coco` or in its subfolder train2014.
    """
    if (folder / "refs(umd).p").exists():
        refs = original_refs(folder)
    else:
        refs = parquet_refs(folder)
    if (coco / "train2014").is_dir():
        coco = coco / "train2014"
    coco = coco.resolve()
    for ref, image, bbox in refs:
        # not the ref's own file_name, which ends in the annotation's number: there is no such file
        name = f"COCO_train2014_{ref['image_id']:012d}.jpg"
        for sentence in ref["sentences"]:
            yield {
                "id": f"{ref['ref_id']}-{sentence['sent_id']}",
                "image": str(coco / name),
                "key": image_key("coco", name),
                "width": image["width"],
                "height": image["height"],
                "expression": sentence["sent"],
                "bbox": bbox,
            }


def original_refs(folder):
    """Yields (ref, image, bbox) from refs(umd).p and instances.json, whose boxes are xywh."""
    instances = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    images = {image["id"]: image for image in instances["images"]}
    boxes = {row["id"]: xyxy(row["bbox"]) for row in instances["annotations"]}
    for ref in read_refs(folder / "refs(umd).p"):
        yield ref, images[ref["image_id"]], boxes[ref["ann_id"]]


def parquet_refs(folder):
    """Yields (ref, image, bbox) from jxu124's parquet files, whose boxes are xyxy."""
    columns = ["ref_id", "image_id", "bbox", "raw_image_info", "sentences"]
    for path in sorted(folder.rglob("*.parquet")):
        for ref in read_parquet(path, columns):
            yield ref, json.loads(ref["raw_image_info"]), ref["bbox"]


def refadv(folder):
    """Ref-Adv-s; the id is the row number. The images stay in the parquet until `write_images`."""
    columns = ["file_name", "normal_caption", "solution", "width", "height", "image_source"]
    number = 0
    for path in sorted(folder.rglob("*.parquet")):
        for row in read_parquet(path, columns):
            yield {
                "id": str(number),
                "image": inside(row["file_name"]),
                "key": image_key(row["image_source"], row["file_name"]),
                "width": row["width"],
                "height": row["height"],
                "expression": row["normal_caption"],
                "bbox": row["solution"],
            }
            number += 1


def refl4(folder):
    """Ref-L4, whose boxes are xywh. An image that is unpacked in images/ is used where it lies;
    others stay in the tar until `write_images`."""
    columns = ["id", "caption", "bbox", "image_id", "width", "height", "file_name"]
    unpacked = (folder / "images").resolve()
    for name in ("ref-l4-val.parquet", "ref-l4-test.parquet"):
        for row in read_parquet(folder / name, columns):
            origin, _, number = row["image_id"].rpartition("_")
            file = unpacked / Path(row["file_name"]).name
            yield {
                "id": str(row["id"]),
                "image": str(file) if file.exists() else inside(row["file_name"]),
                "key": image_key(origin, number),
                "width": row["width"],
                "height": row["height"],
                "expression": row["caption"],
                "bbox": xyxy(row["bbox"]),
            }


# Samples ------------------------------------------------------------------------------------------
def usable(source, rows):
    """The rows of a reader as samples, in the order of their ids: boxes are clipped to the image,
    and what cannot be used is dropped. Prints how many are dropped, and why."""
    samples = {}
    dropped = Counter()
    for row in rows:
        x1, y1, x2, y2 = clip(row["bbox"], row["width"], row["height"])
        name = f"{source}_{row['id']}"
        expression = row["expression"].strip()
        if not (x1 < x2 and y1 < y2):
            dropped["without a box inside the image"] += 1
        elif not expression:
            dropped["without words"] += 1
        elif name in samples:
            dropped["with the id of another"] += 1
        else:
            own = {"id": name, "expression": expression, "bbox": [x1, y1, x2, y2]}
            samples[name] = {"source": source, **row, **own}
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    read = len(samples) + dropped.total()
    print(f"{source}: {read} read, {len(samples)} kept; dropped: {reasons}")
    return [samples[name] for name in sorted(samples)]


def clip(bbox, width, height):
    """A box in pixels, cut off at the edges of the image, as floats."""
    return [float(min(max(v, 0), limit)) for v, limit in zip(bbox, (width, height) * 2)]


def paper_samples(folders, seed):
    """flag -> folder becomes the samples of the three datasets, each cut at random to the size of
    the smallest, Ref-Adv-s (1,142).

    The paper tells the sizes, 800 + 170 + 172 of each source, and not from which published
    splits; Ref-Adv-s and Ref-L4 have none to train on. So what there is of each is pooled here
    and split anew, by image. Exits when a file is not as published.
    """
    folders = {name: Path(folder) for name, folder in folders.items()}
    readers = {
        "refcocog": refcocog(folders["refcocog"], folders["coco"]),
        "refadv": refadv(folders["refadv"]),
        "refl4": refl4(folders["refl4"]),
    }
    sources = []
    for name, rows in readers.items():
        try:
            sources.append(usable(name, rows))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            stop(
                f"--{name}: {folders[name]} is not as published ({type(e).__name__}: {e}). "
                + how_to_get(name, folders[name])
            )
    rng = random.Random(seed)
    smallest = min(map(len, sources))
    mixture = []
    for samples in sources:
        mixture += rng.sample(samples, smallest)
    return mixture


def write_images(samples, data, folders):
    """Writes those images of the samples to data/images that lie inside Ref-Adv-s' parquet or
    Ref-L4's tar, and no others. Exits when one is nowhere."""
    wanted = {}  # image -> the flag of the dataset that should hold it
    for sample in samples:
        if not (data / sample["image"]).exists():
            source = sample["source"]
            wanted[sample["image"]] = "coco" if source == "refcocog" else source
    archive = Path(folders["refl4"]) / "images.tar.gz"
    write_wanted(parquet_images(Path(folders["refadv"])), wanted, data)
    try:
        write_wanted(tar_images(archive, wanted), wanted, data)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        stop(f"--refl4: {archive} is damaged ({e}). {how_to_get('refl4', folders['refl4'])}")
    if wanted:
        image, name = min(wanted.items())
        stop(
            f"{len(wanted)} images are missing, such as {image}, which --{name} should hold. "
            + how_to_get(name, folders[name])
        )


def write_wanted(images, wanted, data):
    """Writes those (file name, bytes) that are wanted, and takes them off `wanted`; ends when
    nothing is wanted any more, so that the rest of an archive need not be unpacked."""
    if not wanted:
        return
    for name, content in images:
        image = inside(name)
        if image in wanted:
            write_bytes(data / image, lambda file: file.write(content))
            del wanted[image]
        if not wanted:
            return


def parquet_images(folder):
    """Yields the (file name, bytes) of Ref-Adv-s' images."""
    for path in sorted(folder.rglob("*.parquet")):
        for row in read_parquet(path, ["file_name", "image"]):
            yield row["file_name"], row["image"]["bytes"]


def tar_images(archive, wanted):
    """Yields the (file name, bytes) of those images of Ref-L4's tar that are wanted."""
    if not archive.exists():
        return
    with tarfile.open(archive, "r:gz") as tar:
        for member in tqdm(tar, desc=archive.name, unit="file", delay=2):
            if member.isfile() and inside(member.name) in wanted:
                yield member.name, tar.extractfile(member).read()


# Split --------------------------------------------------------------------------------------------
def split(samples, sizes, seed):
    """Samples -> {"train": [...], "val": [...], "test": [...]} of the given sizes, 1:1:1 over the
    sources, by image.

    All samples of one image (the same `key`, or without one the same file) go to one side, so no
    test image is ever trained on, whatever source it comes from. Smaller sides are filled first.
    Raises ValueError naming the source that runs out.
    """
    rng = random.Random(seed)
    sources = sorted({sample["source"] for sample in samples})
    by_image = defaultdict(list)
    for sample in samples:
        by_image[sample.get("key", sample["image"])].append(sample)
    images = sorted(by_image)
    rng.shuffle(images)
    groups = [by_image[image] for image in images]

    sides = {}
    for side in sorted(sizes, key=sizes.get):
        wanted = shares(sizes[side], sources)
        # What is cut off an image to fit is lost to every side, so images that fit whole go first:
        # Ref-Adv-s has 1,142 samples, up to six of one image, and 1,139 are needed.
        whole, groups = take(groups, wanted, fits_whole)
        partial, groups = take(groups, wanted, fits_partly)
        if any(wanted.values()):
            missing = ", ".join(f"{count} of {source}" for source, count in wanted.items() if count)
            raise ValueError(f"too few samples for {sizes[side]} in {side}: missing {missing}")
        sides[side] = whole + partial
        rng.shuffle(sides[side])
    return sides


def shares(size, sources):
    """source -> how many of `size` samples come from it: 505 over three sources is 169 + 168 +
    168."""
    each, more = divmod(size, len(sources))
    return {source: each + (i < more) for i, source in enumerate(sources)}


def take(groups, wanted, fits):
    """Goes through the groups (the samples of one image) and takes what `wanted` asks for of each
    that fits, lowering `wanted`. Returns the samples taken, and the groups that stay for another
    side."""
    taken = []
    others = []
    for group in groups:
        if not fits(group, wanted):
            others.append(group)
            continue
        for sample in group:
            if wanted[sample["source"]] > 0:
                wanted[sample["source"]] -= 1
                taken.append(sample)
    return taken, others


def fits_whole(group, wanted):
    """Whether every sample of the image is asked for."""
    counts = Counter(sample["source"] for sample in group)
    return all(count <= wanted[source] for source, count in counts.items())


def fits_partly(group, wanted):
    """Whether some sample of the image is asked for."""
    return any(wanted[sample["source"]] for sample in group)
