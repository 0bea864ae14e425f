"""The readers of the three published datasets, on small files in exactly the published types, and
the split."""

import hashlib
import io
import json
import random

from common import normalize_box
from support.data import datasets
from support.data.datasets import missing_files, paper_samples, split, write_images
from support.data.samples import load_image, read_samples
from support.running.files import write_jsonl
from tests.small import TURNED

import pytest
from PIL import Image

COCO_9 = "COCO_train2014_000000000009.jpg"
O365 = "objects365_v2_00922765.jpg"


# The downloads ------------------------------------------------------------------------------------
@pytest.fixture(params=["parquet", "stand-in"])
def folders(request, tmp_path, monkeypatch):
    """The downloads, COCO 9 in two of them; `stand-in` is for a machine without pyarrow."""
    rows_of = {}  # parquet file -> its rows
    if request.param == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table
    else:

        def stand_in(folder, names, files=None):
            for path in sorted(path for path in rows_of if folder in path.parents):
                yield from ({name: row[name] for name in names} for row in rows_of[path])

        monkeypatch.setattr(datasets, "read_parquet", stand_in)

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        rows_of[path] = rows
        if request.param == "parquet":
            write_table(pyarrow.Table.from_pylist(rows), path)

    paths = {name: tmp_path / name for name in datasets.DATASETS}
    write(paths["refcocog"] / "data/train.parquet", refcocog_rows())
    write(paths["refadv"] / "data/train-00000-of-00001.parquet", refadv_rows())
    make_refl4(paths["refl4"], write)
    (paths["coco"] / "train2014").mkdir(parents=True)
    (paths["coco"] / "train2014" / COCO_9).write_bytes(encoded("L"))
    return paths


def refcocog_rows():
    """As jxu124 publishes them, without the columns that nobody reads."""
    rows = []
    for number, image_id, texts, bbox in (
        (7, 9, ["the cat", "a cat on the left"], [12.0, 2.0, 20.0, 10.5]),
        (8, 9, ["gone"], [25.0, 2.0, 33.0, 10.0]),
        (9, 30, [" "], [0.0, 0.0, 5.0, 5.0]),
    ):
        name = f"COCO_train2014_{image_id:012d}.jpg"
        image = {"id": image_id, "file_name": name, "width": 20, "height": 10}
        sentences = []
        for i, text in enumerate(texts):
            words = text.split() or [""]
            sentences.append({"raw": text.upper(), "sent": text, "sent_id": i, "tokens": words})
        ref = {"ref_id": number, "image_id": image_id, "sentences": sentences, "bbox": bbox}
        ref |= {"file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg"}
        rows.append({**ref, "raw_image_info": json.dumps(image)})
    return rows


def refadv_rows():
    rows = []
    for name, origin, content in (
        ("000000000139.jpg", "COCO_val2017", encoded("P", "PNG")),
        ("0007786c9352aac1.jpg", "openimages", encoded("CMYK")),
    ):
        row = {"file_name": name, "image": {"bytes": content, "path": None}, "width": 20}
        row |= {"normal_caption": "the one", "solution": [1.0, 2.0, 20.0, 9.0], "height": 10}
        rows.append({**row, "image_source": origin})
    return rows


def make_refl4(folder, write):
    for side, number, image_id, name, (width, height) in (
        ("val", 0, "o365_922765", O365, (10, 20)),
        ("test", 1, "coco_9", COCO_9, (20, 10)),
    ):
        row = {"id": number, "caption": "this", "bbox": [1.5, 2.0, 3.0, 4.0], "file_name": name}
        row |= {"image_id": image_id, "width": width, "height": height}
        write(folder / f"ref-l4-{side}.parquet", [row])
    photos = {O365: encoded(exif=TURNED), COCO_9: encoded("L"), "not_asked_for.jpg": b""}
    (folder / "images").mkdir()  # unpacked
    for name, content in photos.items():
        (folder / "images" / name).write_bytes(content)


def encoded(mode="RGB", format="JPEG", **options):
    """The bytes of a 20 x 10 image."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode).save(file, format, **options)
    return file.getvalue()


# Readers ------------------------------------------------------------------------------------------
def test_the_published_files_become_samples(folders, tmp_path, capsys):
    assert missing_files(folders) == []
    samples = {s["id"]: s for s in paper_samples(folders, 0)}
    printed = capsys.readouterr().out
    faults = "1 without a box inside the image, 1 without words, or with too many or special tokens"
    assert f"refcocog: 4 read, 2 kept; dropped: {faults}\n" in printed
    assert "refadv: 2 read, 2 kept; dropped: none\n" in printed
    assert {i: (s["key"], s["bbox"], s["expression"]) for i, s in samples.items()} == {
        "refcocog_7-0": ("coco 9", [12, 2, 20, 10], "the cat"),
        "refcocog_7-1": ("coco 9", [12, 2, 20, 10], "a cat on the left"),
        "refadv_0": ("coco 139", [1, 2, 20, 9], "the one"),
        "refadv_1": ("openimages 0007786c9352aac1", [1, 2, 20, 9], "the one"),
        "refl4_0": ("o365 922765", [1.5, 2, 4.5, 6], "this"),
        "refl4_1": ("coco 9", [1.5, 2, 4.5, 6], "this"),
    }
    assert normalize_box(samples["refadv_0"]["bbox"], 20, 10)[2] == 1000

    data = tmp_path / "data"
    everything = list(samples.values())
    write_images([s for i, s in samples.items() if i != "refadv_1"], data, folders)
    written = sorted(file.name for file in (data / "images").iterdir())
    assert written == ["000000000139.jpg"]
    write_images(everything, data, folders)
    write_jsonl(data / "s.jsonl", everything)
    assert read_samples(data / "s.jsonl", "") == everything  # every image is what its sample says
    assert load_image(samples["refl4_0"], data).size == (10, 20)

    (folders["coco"] / "train2014" / COCO_9).unlink()
    words = "1 images are missing, .*000009.jpg, which --coco should hold(.|\n)*curl"
    with pytest.raises(SystemExit, match=words):
        write_images(everything, data, folders)


def test_damaged_files_are_named_with_what_gets_them(folders, monkeypatch):
    monkeypatch.setattr(datasets, "read_parquet", lambda *path: [{"caption": "x"}])
    words = "--refcocog: .* is not as published .KeyError: 'image_id'(.|\n)*hf download"
    with pytest.raises(SystemExit, match=words):
        paper_samples(folders, 0)


def test_missing_files_are_named_with_what_gets_them(tmp_path):
    given = {**dict.fromkeys(datasets.DATASETS, tmp_path), "refadv": None}
    refl4 = "has no ref-l4-val.parquet and no ref-l4-test.parquet and no **/*.jpg."
    expected = {
        "--refcocog": ["has no **/*.parquet.", "jxu124/refcocog", "hf download"],
        "--refadv": ["not given", "about 255 MB, CC BY 4.0", "--local-dir datasets/refadv"],
        "--refl4": [refl4, "(3.5 GB), hub id JierunChen/Ref-L4", f"--local-dir {tmp_path}"],
        "--coco": ["has no **/COCO_train2014_*.jpg", "curl -LO http://images.cocodataset.org"],
    }
    problems = {problem.split(":")[0]: problem for problem in missing_files(given)}
    assert list(problems) == list(expected)
    for flag, words in expected.items():
        assert all(word in problems[flag] for word in words), problems[flag]


# Split --------------------------------------------------------------------------------------------
def test_too_few_samples_are_named():
    samples = [{"source": "abc"[i % 3], "image": f"{i // 2}.png"} for i in range(120)]
    with pytest.raises(SystemExit, match="for 119 in train: missing 2 of a, 2 of b, 1 of c; give"):
        split(samples, {"train": 119, "val": 1, "test": 3}, 0)


def test_an_image_of_two_sources_stays_on_one_side():
    """Ref-Adv-s as it is: 1,142 rows, up to six of an image; the other two, as large, share half of
    their images."""
    samples = []
    for i in range(1142):
        key = f"openimages {i // 6 if i < 600 else i}"
        samples.append({"source": "refadv", "image": f"{i}", "key": key})
    for source, first in (("refcocog", 0), ("refl4", 285)):
        for i in range(1142):
            key = f"coco {i // 2 + first}"
            samples.append({"source": source, "image": f"{source} {i}", "key": key})
    sizes = {"train": 2400, "val": 510, "test": 505}
    for seed in range(3):
        sides = split(samples, sizes, seed)
        assert {side: len(rows) for side, rows in sides.items()} == sizes
        keys = [{s["key"] for s in rows} for rows in sides.values()]
        assert len(set.union(*keys)) == sum(map(len, keys))
    assert sides == split(samples, sizes, 2) != split(samples, sizes, 3)
    sources = ("refadv", "refcocog", "refl4")
    assert [sum(s["source"] == x for s in sides["test"]) for x in sources] == [169, 168, 168]


def test_the_split_of_a_seed_never_changes():
    """Or an old run's training images would be a new run's test images."""
    rng = random.Random(0)
    samples = []
    for i in range(400):
        key = f"k{rng.randrange(90)}"
        samples.append({"id": str(i), "source": rng.choice("abc"), "image": f"{i}.png", "key": key})
    sides = split(samples, {"train": 200, "val": 50, "test": 40}, 3)
    ids = {side: [s["id"] for s in rows] for side, rows in sides.items()}
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12] == "c609097a88d9"
