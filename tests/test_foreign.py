"""Files of other trainers as --data (forms.json says where its rows are from), and the way back."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from support.data.foreign import own_samples
from support.data.sources import begin_files
from tests.small import one_line, picture
from tests.test_commands import SMALL, lines, run

import pytest
from PIL import Image

FORMS = json.loads((Path(__file__).parent / "forms.json").read_text())
OWN = {"image": "a.png", "expression": "x", "bbox": [0, 0, 5, 5]}


def read(folder, sizes, files, boxes=None):
    """The samples of files (name -> rows) about blank images (name -> size)."""
    write(folder, sizes, files)
    paths = [folder / name for name in files]
    return own_samples(SimpleNamespace(data=paths, images=None, boxes=boxes, skip_bad=False))


def write(folder, sizes, files):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
    for name, rows in files.items():
        rows = rows if name.endswith("l") else [rows]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("form", FORMS, ids=[form["file"] for form in FORMS])
def test_each_form_is_told_and_read(tmp_path, capsys, form):
    samples = read(tmp_path, form["sizes"], {form["file"]: form["rows"]}, form["boxes"])
    assert [sample["expression"] for sample in samples] == [words for words, *_ in form["samples"]]
    for sample, (_, bbox, *image) in zip(samples, form["samples"]):
        name = (image or list(form["sizes"]))[0]
        assert sample["bbox"] == pytest.approx(bbox)
        assert [sample["width"], sample["height"]] == form["sizes"][name]
        assert sample["image"] == str(tmp_path / name) and sample["source"] in form["file"]
    assert capsys.readouterr().out.endswith(f"rows: {form['printed']}\n")


def files_of(boxes, taken):
    """Lines of ours, whose boxes are taken for pixels, or COCO's, for sizes."""
    if taken == "pixels":
        return {"s.jsonl": [{**OWN, "id": i, "bbox": box} for i, box in enumerate(boxes)]}
    named = [{"image_id": 3, "category_id": i, "bbox": box} for i, box in enumerate(boxes)]
    names = [{"id": i, "name": f"{i}"} for i in range(len(boxes))]
    images = [{"id": 3, "file_name": "a.png"}]
    return {"s.json": {"images": images, "categories": names, "annotations": named}}


@pytest.mark.parametrize(
    "boxes, size, taken, units",
    [
        ([[0.1, 0.2, 0.5, 1.0], [0, 0, 1, 1]], (64, 48), "pixels", "0..1"),
        ([[100, 100, 900, 1000], [5, 5, 50, 50]], (1600, 1200), "pixels", "0..1000"),
        ([[100, 100, 900, 1000], [5, 5, 50, 50]], (640, 480), "pixels", "0..1000"),
        ([[30, 20, 10, 10], [5, 5, 50, 40], [40, 30, 20, 10]], (64, 48), "pixels", "sizes"),
        (
            [[0.3, 0.2, 0.1, 0.1], [0, 0, 1, 1], [0.5, 0.5, 0.2, 0.1]],
            (9, 9),
            "pixels",
            "sizes-0..1",
        ),
        ([[1, 2, 30, 40]], (64, 48), "pixels", None),
        ([[900, 100, 1300, 400], [1, 2, 3, 4]], (1600, 1200), "pixels", None),
        ([[30, 20, 60, 40], [5, 5, 50, 40]], (64, 48), "sizes", "pixels"),
        ([[0.3, 0.2, 0.5, 0.5], [0, 0, 1, 1]], (64, 48), "sizes", "sizes-0..1"),
        ([[30, 20, 10, 10], [5, 5, 50, 40]], (64, 48), "sizes", None),
    ],
)
def test_units_that_look_like_others_are_warned_of(tmp_path, capsys, boxes, size, taken, units):
    files = files_of(boxes, taken)
    try:
        read(tmp_path, {"a.png": size}, files)
    except SystemExit as e:
        assert "1: bbox is" in str(e)
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == bool(units)
    if units:
        assert re.search(rf"such as {re.escape(str(boxes[0]))} of \S+, an image of", printed)
        assert f"What settles it: --boxes {units}, or --boxes {taken}," in printed
        assert len(read(tmp_path, {}, files, units)) == len(boxes)
        assert "warning" not in capsys.readouterr().out


def test_boxes_are_what_the_flag_says(tmp_path):
    """Of all that a row does not say itself; an own line has no field for it."""
    norm1 = {"images": ["a.png"], "messages": [], "objects": {"ref": ["x"], "bbox": [[0, 0, 1, 1]]}}
    norm1["objects"]["bbox_type"] = "norm1"
    rows = [{**OWN, "bbox": [0, 0, 500, 500], "units": "0..1"}, norm1]
    samples = read(tmp_path, {"a.png": (20, 10)}, {"s.jsonl": rows}, "0..1000")
    assert [sample["bbox"] for sample in samples] == [[0, 0, 10, 5], [0, 0, 20, 10]]
    assert not any("units" in sample for sample in samples)
    args = SimpleNamespace(data=None, images=None, boxes="0..1", skip_bad=False)
    assert "--boxes is about the files of --data" in one_line(begin_files, args, tmp_path, "a")


def test_orientation_that_no_size_settles_is_counted(tmp_path, capsys):
    rows = []
    # Half a turn, mirrored, square, without a size; its size tells, not turned
    for tag, size, told in ((3, 2, 1), (2, 2, 1), (6, 1, 1), (8, 2, 0), (6, 2, 1), (1, 2, 0)):
        name, exif = f"{len(rows)}.jpg", Image.Exif()
        exif[0x0112] = tag
        picture(size * 10, 10, seed=len(rows)).save(tmp_path / name, exif=exif)
        rows.append({**OWN, "image": name, **({"width": size * 10, "height": 10} if told else {})})
    assert len(read(tmp_path, {}, {"own.jsonl": rows})) == 6
    assert "warning: 4 photos, such as " in capsys.readouterr().out


def test_a_picture_with_two_names_stays_on_one_side(tmp_path):
    for i in range(9):
        picture(20, 10, seed=i % 8).save(tmp_path / f"{i}.png")  # 8 shows what 0 does
    rows = [{**OWN, "id": i, "image": f"{i}.png"} for i in range(9)]
    more = [{**rows[1], "key": "b"}, {**rows[2], "key": "b"}, {**rows[3], "id": "new"}]
    more += [{**rows[2], "id": "x", "key": "c"}, {**rows[4], "key": "c"}]  # b and c are one
    samples = read(tmp_path, {}, {"own.jsonl": rows, "more.jsonl": more})
    keys = {sample["id"]: sample.get("key", sample["image"]) for sample in samples}
    assert keys["0"] == keys["8"] != keys["1"] == keys["2"] == keys["1 (2)"] == keys["2 (2)"]
    assert len(keys) == 14 and keys["3"] == keys["new"] != keys["1"] == keys["4"] == keys["x"]


def test_faults_of_foreign_rows_are_named(tmp_path):
    listed = {"img_path": "a.png", "expression": "x", "bbox": [0, 0, 30, 5]}
    for row, words in (
        ({"messages": [], "objects": {}}, "cannot be used as one of ms-swift .KeyError: 'images'"),
        (listed, r"bbox is \[0, 0, 30, 5\]; expected four finite .* 20 x 10"),
        ({**listed, "bbox": None}, "bbox is 'None'; expected list"),
        ({**OWN, "bbox": [0, 0, 5, 10**400]}, "bbox is .*expected four finite"),
        ({**OWN, "width": 10**400}, "bbox is|image .* cannot be used"),
        ({**listed, "img_path": "b.png"}, "cannot be used .*No such file.*--images DIR"),
        ({"expression": 3}, "cannot be used as one of our own lines .KeyError: 'image'"),
        ("x", "cannot be used as one of our own lines .TypeError"),
    ):
        with pytest.raises(SystemExit, match=rf"s.json, row 1: {words}"):
            read(tmp_path, {"a.png": (20, 10)}, {"s.json": [row]})
    with pytest.raises(SystemExit, match="s.jsonl, line 2: cannot be used .*TypeError"):
        read(tmp_path, {}, {"s.jsonl": [OWN, 3]})
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(OWN)}\n{{'image': 1}}\n")
    args = SimpleNamespace(data=[tmp_path / "s.jsonl"], images=None, boxes=None, skip_bad=False)
    with pytest.raises(SystemExit, match="s.jsonl, line 2: not JSON .*; repair or remove the line"):
        own_samples(args)
    with pytest.raises(SystemExit, match=r"s.json is not as COCO's .*\(KeyError: 397133\); repair"):
        read(tmp_path, {}, {"s.json": {**FORMS[-1]["rows"], "images": []}})


@pytest.mark.slow
@pytest.mark.parametrize("boxes", [None, "0..1000", "0..1"])
def test_each_form_goes_through_make_data(tmp_path, boxes):
    forms = [form for form in FORMS if form["boxes"] == boxes]
    files = {form["file"]: form["rows"] for form in forms}
    write(tmp_path, {name: size for form in forms for name, size in form["sizes"].items()}, files)
    # Sides are split by picture and balanced over the files: the first fills val and test
    others = [{**OWN, "image": f"{i}.png", "bbox": [0, 0, 1, 1]} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, others)))
    for i in range(3):
        picture(20, 10, seed=i).save(tmp_path / f"{i}.png")
    argv = f"make_data.py --data a.jsonl {' '.join(files)}" + f" --boxes {boxes}" * bool(boxes)
    argv += f" --train-samples {len(files) + 1} --val-samples 1 --test-samples 1 --max-tokens 40"
    status, printed = run([*argv.split(), "--out", "run"], tmp_path)
    assert status == 0, printed
    made = lines(tmp_path / "run/data/train.jsonl")
    assert sorted(row["source"] for row in made) == sorted(["a", *(Path(f).stem for f in files)])
    words = {words for form in forms for words, *_ in form["samples"]}
    assert {row["expression"] for row in made} <= {"x", *words}


@pytest.mark.slow
def test_a_foreign_form_goes_through_all_phases_and_out(tmp_path):
    text = json.dumps(FORMS[1]["rows"][0]).replace("lady", "star")
    text = re.sub(r"\[103.*?\]", "[9, 9, 60, 50]", text)
    for name, seeds in (("a", range(8)), ("b", range(8, 16))):
        rows = [re.sub(r"train2014.*?jpg", f"{i}.png", text) for i in seeds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        for i in seeds:
            picture(90, 70, seed=i).save(tmp_path / f"{i}.png")
    few = " --data a.jsonl b.jsonl --train-samples 10 --val-samples 2 --test-samples 4"
    phases = {**SMALL, "make_data": SMALL["make_data"] + few, "out": "-m support.report.export"}
    for phase in ("make_data", "sft", "grpo", "evaluate", "out"):
        status, printed = run([*phases[phase].split(), "--out", "run"], tmp_path)
        assert status == 0, printed
    for file in ("test_grpo", "train"):
        for line in lines(tmp_path / f"run/swift/{file}.jsonl"):
            texts = [turn["content"] for turn in line["messages"]]
            assert "the star with the blue shirt" in texts[0]
            assert [text.count("<image>") for text in texts] == [1, 0] * len(line["images"])
            assert {Image.open(path).size for path in line["images"]} == {(90, 70)}
            assert len(line["images"]) in (1, 3) and line["solution"] == [100, 128, 666, 714]
    assert '{"bbox_2d": [100, 128, 666, 714]}' in texts[-1]
