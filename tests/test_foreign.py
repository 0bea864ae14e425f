"""Files of other trainers as --data: rows as published, or exactly as their pages document them."""

import json
from types import SimpleNamespace

from support.data.datasets import split
from support.data.foreign import own_samples
from support.running.files import write_jsonl
from tests.small import GOOD, one_line, picture
from tests.test_commands import SMALL, lines, run

import pytest
from PIL import Image

REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
PHOTO = "train2014/COCO_train2014_000000581857.jpg"  # 427 x 640
LADY = "the lady with the blue shirt"
TRUTH = [103.93, 299.99, 238.15, 477.41]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def objects(user, assistant, **of):
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    messages += [{"role": "user", "content": f"<image>{user}"}]
    messages += [{"role": "assistant", "content": assistant}]
    return {"messages": messages, "images": ["x.jpg"], "objects": of}


DOG, WOMAN = [331.5, 761.4, 853.5, 1594.8], [676.5, 685.8, 1099.5, 1427.4]
SHEEP = [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]
SWIFT = [  # its page on custom datasets; then bbox_type and image_id, as it describes them
    objects(
        "Describe the image.",
        "<ref-object><bbox> and <ref-object><bbox> are playing on the beach",
        ref=["a dog", "a woman"],
        bbox=[DOG, WOMAN],
    ),
    objects("Find the <ref-object> in the image", "<bbox><bbox>", ref=["sheep"], bbox=SHEEP),
    objects("Open Chrome", "Action: click(start_box='<bbox>')", ref=[], bbox=[[615, 226]]),
    objects(
        "Find <ref-object>", "<bbox>", ref=["it"], bbox=[[0.1, 0.2, 0.5, 1]], bbox_type="norm1"
    ),
]
SWIFT[3] |= {"images": ["other.jpg", "x.jpg"]}
SWIFT[3]["objects"]["image_id"] = [1]
INTERNVL = [
    f"<image>\n{REGION}<ref>{LADY}</ref>",
    f"<ref>{LADY}</ref><box>[[243, 469, 558, 746]]</box>",
]
INTERNVL += [f"{REGION}<ref>woman in gray shirt facing camera on right</ref>"]
INTERNVL += [
    "<ref>woman in gray shirt facing camera on right</ref><box>[[507, 409, 698, 740]]</box>"
]
UMD = {"img_path": "COCO_train2014_000000380440.jpg", "expression": "the man in yellow coat"}
UMD |= {"bbox": [374.31, 65.06, 510.35, 267.0], "dataset_name": "jxu124/refcocog", "height": 376}
UMD |= {"width": 640, "image_id": 380440, "sent_id": 8, "split": "test"}
COCO = {
    "images": [
        {"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
    ],
    "annotations": [
        {"id": 1768, "image_id": 397133, "category_id": 18, "bbox": [473.07, 395.93, 38.65, 28.67]},
        {"id": 1, "image_id": 397133, "category_id": 1, "bbox": [388.66, 69.92, 109.41, 277.62]},
        {"id": 2, "image_id": 397133, "category_id": 1, "bbox": [0.0, 262.81, 62.16, 36.77]},
    ],
    "categories": [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "animal", "id": 18, "name": "dog"},
    ],
}
for row in COCO["annotations"]:
    row |= {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], "segmentation": []}
ISSUE_11 = {"height": 640, "width": 427, "id": 0, "dataset_name": "refcoco", "image": PHOTO}
ISSUE_11 |= {"problem": f"{REGION}{LADY}.", "normal_caption": LADY, "solution": TRUTH}
LLAVA = {
    "id": "1",
    "image": "coco/314530.jpg",
    "conversations": turns(
        "<image>\nWhat is this?",
        "A man.",
        f"{REGION}a man bent over behind the cigarette.",
        "[0.61, 0.36, 0.92, 0.83]",
        "Please provide a short description for this region: [0.1, 0.1, 0.2, 0.2]",
        "A hat.",
    ),
}
QWEN = {
    "image": "house.jpg",
    "conversations": turns(
        "<image>\nLocate the house in this image.",
        '{"bbox_2d": [135, 114, 1016, 672], "label": "house"}',
    ),
}
NO_BOX = {"id": 1, "image": PHOTO, "conversations": turns("<image>What is purple?", "0")}


def read(folder, sizes, *files, **flags):
    """The samples of files (name -> rows, in an array, as lines, or a whole) with blank images."""
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
    for name, rows in files:
        text = json.dumps(rows)
        if name.endswith("l"):
            text = "\n".join(map(json.dumps, rows))
        (folder / name).write_text(text)
    paths = [folder / name for name, _ in files]
    args = SimpleNamespace(data=paths, images=None, boxes=None, skip_bad=False)
    vars(args).update(flags)
    return own_samples(args)


@pytest.mark.parametrize(
    "file, sizes, units, expected, words",
    [
        (
            ("swift.jsonl", SWIFT),
            {"x.jpg": (1200, 1600), "other.jpg": (9, 9)},
            None,
            [("a dog", DOG), ("a woman", WOMAN), ("it", [120, 320, 600, 1600])],
            "4 of ms-swift; dropped: 2 without an expression and one box",
        ),
        (
            ("vlm_r1.jsonl", [{"id": 1, "image": [PHOTO], "conversations": turns(
                f"<image>{REGION}{LADY}.", str(TRUTH))}, NO_BOX]),
            {PHOTO: (427, 640)},
            None,
            [(LADY, TRUTH)],
            "2 of conversations (LLaVA, VLM-R1); dropped: 1 without an expression and one box",
        ),
        (("rec.json", [ISSUE_11]), {PHOTO: (427, 640)}, None, [(LADY, TRUTH)], "1 of problem"),
        (
            ("internvl.json", [{"image": PHOTO, "conversations": turns(*INTERNVL)}]),
            {PHOTO: (427, 640)},
            "0..1000",
            [(LADY, [103.761, 300.16, 238.266, 477.44]),
             ("woman in gray shirt facing camera on right", [216.489, 261.76, 298.046, 473.6])],
            "dropped: none",
        ),
        (
            ("llava.json", [LLAVA]),
            {"coco/314530.jpg": (640, 480)},
            "padded",
            [("a man bent over behind the cigarette", [390.4, 150.4, 588.8, 451.2])],
            "1 of conversations",
        ),
        (("q.json", [QWEN]), {"house.jpg": (1024, 700)}, None,
         [("the house in this image", [135, 114, 1016, 672])], "1 of conv"),
        (("umd.jsonl", [UMD]), {UMD["img_path"]: (640, 376)}, None,
         [(UMD["expression"], UMD["bbox"])], "1 of lines with img_path"),
        (("instances.json", COCO), {"000000397133.jpg": (640, 427)}, None,
         [("dog", [473.07, 395.93, 511.72, 424.6])],
         "dropped: 2 of a category that its image shows more than once"),
    ],
)  # fmt: skip
def test_each_form_is_told_and_read(tmp_path, capsys, file, sizes, units, expected, words):
    samples = read(tmp_path, sizes, file, boxes=units)
    assert [sample["expression"] for sample in samples] == [text for text, _ in expected]
    for sample, (_, bbox) in zip(samples, expected):
        assert sample["bbox"] == pytest.approx(bbox) and "x.jpg" in sample["image"] + "x.jpg"
        assert (sample["width"], sample["height"]) == sizes[next(iter(sizes))]
        assert sample["source"] == file[0].split(".")[0]
    printed = capsys.readouterr().out
    assert words in printed and printed.count("warning") == (file[0] == "q.json")


@pytest.mark.parametrize(
    "boxes, size, units",
    [
        ([[0.1, 0.2, 0.5, 1.0], [0, 0, 1, 1]], (64, 48), "0..1"),
        ([[100, 100, 900, 1000], [5, 5, 50, 50]], (1600, 1200), "0..1000"),
        ([[100, 100, 900, 1000], [5, 5, 50, 50]], (640, 480), "0..1000"),
        ([[30, 20, 10, 10], [5, 5, 50, 40], [40, 30, 20, 10]], (64, 48), "sizes"),
        ([[1, 2, 30, 40]], (64, 48), None),
        ([[900, 100, 1300, 400], [1, 2, 3, 4]], (1600, 1200), None),
    ],
)
def test_units_that_look_like_others_are_warned_of(tmp_path, capsys, boxes, size, units):
    rows = [{"id": i, "image": "a.png", "expression": "x", "bbox": b} for i, b in enumerate(boxes)]
    try:
        read(tmp_path, {"a.png": size}, ("own.jsonl", rows))
    except SystemExit as e:
        assert "line 1: bbox is" in str(e)
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == bool(units)
    if units:
        assert f"such as {boxes[0]} of 0" in printed and f"--boxes {units}" in printed
        for flag in (units, "pixels")[: 1 + (units == "0..1")]:
            assert len(read(tmp_path, {}, ("own.jsonl", rows), boxes=flag)) == len(boxes)
        assert "warning" not in capsys.readouterr().out


def test_orientation_that_no_size_settles_is_counted(tmp_path, capsys):
    rows = []
    for name, tag, size, given in (
        ("half", 3, (20, 10), True),
        ("mirrored", 2, (20, 10), True),
        ("square", 6, (10, 10), True),
        ("sizeless", 8, (20, 10), False),
        ("settled", 6, (20, 10), True),
        ("upright", 1, (20, 10), False),
    ):
        exif = Image.Exif()
        exif[0x0112] = tag
        picture(*size, seed=tag).save(tmp_path / f"{name}.jpg", exif=exif)
        size = dict(zip(("width", "height"), size)) if given else {}
        rows.append({"image": f"{name}.jpg", "expression": "x", "bbox": [0, 0, 5, 5], **size})
    read(tmp_path, {}, ("own.jsonl", rows))
    assert "warning: 4 photos are marked as turned or mirrored, such as" in capsys.readouterr().out


def test_a_picture_with_two_names_stays_on_one_side(tmp_path, capsys):
    """And ids of several files stay apart."""
    rows = [
        {"id": i, "image": f"{i}.png", "expression": "x", "bbox": [0, 0, 5, 5]} for i in range(9)
    ]
    for i in range(9):
        picture(20, 10, seed=i % 8).save(tmp_path / f"{i}.png")  # 8 shows what 0 does
    named = {**rows[1], "key": "b", "source": "s"}, {**rows[2], "key": "b", "source": "s"}
    also = {**rows[1], "key": "a", "source": "s"}
    samples = read(
        tmp_path,
        {},
        ("own.jsonl", rows),
        ("more.jsonl", [*named[:1], *named[1:], also | {"id": 7}]),
    )
    assert len({sample["id"] for sample in samples}) == 12
    assert "pictures with several names: 2, each kept" in capsys.readouterr().out
    sides = split(
        [s for s in samples if s["source"] == "own"], {"train": 3, "val": 2, "test": 3}, 0
    )
    where = {s["id"]: side for side, rows in sides.items() for s in rows}
    assert where.get("0") == where.get("8") or None in (where.get("0"), where.get("8"))
    keys = {s["id"]: s.get("key") for s in samples}
    assert keys["0"] == keys["8"] != keys["1"] == keys["2"] == keys["1 (2)"] and keys["3"] is None


def test_faults_of_foreign_rows_are_named(tmp_path):
    bad = {"messages": [], "images": ["a.png"], "objects": {"ref": ["x"]}}
    outside = {"img_path": "a.png", "expression": "x", "bbox": [0, 0, 30, 5]}
    lost = {"img_path": "b.png", "expression": "x", "bbox": [0, 0, 5, 5]}
    for rows, words in (
        ([bad], "row 1: no row of ms-swift .KeyError: 'bbox'.; repair it: "),
        ([outside], r"row 1: bbox is \[0, 0, 30, 5\]; expected four .* 20 x 10"),
        ([{**outside, "bbox": None}], "row 1: bbox is 'None'; expected list"),
        ([lost], "row 1: image .*b.png cannot be used .*No such file"),
        ([{"expression": 3}, 7], "row 1: image is 'None'"),
    ):
        with pytest.raises(SystemExit, match=f"problems in .*s.json(.|\n)*s.json, {words}"):
            read(tmp_path, {"a.png": (20, 10)}, ("s.json", rows))
    broken = {**COCO, "images": []}
    message = one_line(read, tmp_path, {}, ("s.json", broken))
    assert "s.json is not as COCO's instances.json (KeyError: 397133)" in message


@pytest.mark.slow
def test_a_foreign_form_goes_through_all_phases_and_out(tmp_path):
    rows = []
    for i in range(14):
        picture(90, 70, seed=i).save(tmp_path / f"{i}.png")
        asked = f"<image>{REGION}the star number {'abcdefghijklmn'[i]}."
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns(asked, "[9, 9, 60, 50]")})
    for name, part in (("a", rows[:7]), ("b", rows[7:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    for name in ("make_data", "sft", "grpo", "evaluate"):
        argv = [*SMALL[name].split(), "--out", "run"]
        if name == "make_data":
            argv += "--data a.jsonl b.jsonl --train-samples 8 --val-samples 2".split()
            argv += "--test-samples 4 --start perturbed --iou-max 0.9".split()
        status, printed = run(argv, tmp_path)
        assert status == 0, printed
    status, printed = run("-m support.report.export --out run".split(), tmp_path)
    assert status == 0, printed
    for file in ("train", "test_grpo"):
        for line in lines(tmp_path / f"run/swift/{file}.jsonl"):
            texts = [turn["content"] for turn in line["messages"]]
            assert "the star" in texts[0] and line["solution"] == [100, 128, 666, 714]
            assert sum(text.count("<image>") for text in texts) == len(line["images"])
            assert [Image.open(path).size for path in line["images"]] == [(90, 70)] * len(
                texts[::2]
            )
    assert '{"bbox_2d": [100, 128, 666, 714]}' in texts[-1] or file != "train"
