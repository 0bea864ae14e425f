"""Samples and their images: read, or refused by name before any work."""

import argparse
import json
import os
import re
from types import SimpleNamespace

from support.data import samples
from support.running import files
from support.running.flags import model_path
from tests.small import GOOD, TURNED, one_line, picture

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def test_bad_samples_are_all_reported_at_once(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    picture(2100, 10).save(tmp_path / "long.png")
    os.mkfifo(tmp_path / "pipe.png")
    without = {key: value for key, value in GOOD.items() if key != "expression"}
    bad = [
        (dict(GOOD, bbox=[5, 0, 0, 5]), "bbox is .*x1 < x2"),
        (dict(GOOD, width=30, bbox=[0, 0, 25, 5]), "20 x 10"),
        (dict(GOOD, image="b.png"), "b.png cannot be used .*No such file"),
        (dict(GOOD, bbox=[0, 0, float("nan"), 1]), "finite"),
        (without, "expression is 'None'"),
        (dict(GOOD, image="cut.png"), "cut.png cannot be used"),
        (GOOD, "id '1' is on line 1"),
        (dict(GOOD, image="pipe.png"), "not a regular file"),
        (dict(GOOD, image="a\0b.png"), "image is .*NUL"),
        (dict(GOOD, expression="word " * 401), "1 to 2000 characters"),
        (dict(GOOD, expression="a <|image_pad|>"), "special tokens"),
        (dict(GOOD, expression="the <think> sign"), "special tokens"),
        (dict(GOOD, expression="a </tool_call>"), "special tokens"),
        (dict(GOOD, image="long.png", width=2100, bbox=[0, 0, 25, 5]), "200 to 1"),
        (dict(GOOD, source="\ud800"), "surrogate"),
        (dict(GOOD, width=True), "width is 'True'; expected int"),
        (3, "not a JSON object"),
    ]
    path = tmp_path / "s.jsonl"
    files.write_jsonl(path, [GOOD])
    assert samples.read_samples(path, "") == [GOOD]

    lines = [json.dumps(sample) for sample in [GOOD, *(sample for sample, _ in bad)]]
    path.write_text("\n".join(lines) + "\n{oops\n")
    with pytest.raises(SystemExit) as ended:
        samples.read_samples(path, "")
    expected = [words for _, words in bad] + ["not JSON"]
    for line, words in enumerate(expected, 2):
        assert re.search(f"s.jsonl, line {line}: .*{words}", str(ended.value)), words
    assert samples.read_samples(path, "", skip_bad=True) == [GOOD]
    assert len((tmp_path / "s.jsonl.skipped").read_text().splitlines()) == len(expected) + 1
    path.write_bytes(b"")
    assert "s.jsonl is empty; make it again" in one_line(samples.read_samples, path, "x")
    missing = one_line(samples.read_samples, tmp_path / "none.jsonl", "python make_data.py")
    assert "first run: python make_data.py" in missing
    assert "cannot be read" in one_line(samples.read_samples, tmp_path, "python make_data.py")


def test_images_are_opened_once(tmp_path, monkeypatch):
    opened = []
    load = samples.load_image
    monkeypatch.setattr(samples, "load_image", lambda *of: opened.append(of) or load(*of))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.png"
    picture(20, 10).save(path)
    files.write_jsonl(tmp_path / "data/train.jsonl", [GOOD, {**GOOD, "id": "2"}])
    args = SimpleNamespace(out=tmp_path, preset="toy", model="m")
    for expected in (1, 1):  # one image of two samples; the second start opens none
        assert len(samples.read_side(args, "train")) == 2
        assert len(opened) == expected
    (tmp_path / "data/train.checked").write_bytes(b"\xff")  # damaged: checked again
    assert len(samples.read_side(args, "train")) == len(opened) == 2
    path.write_bytes(path.read_bytes()[:-30])  # another size, another time
    with pytest.raises(SystemExit, match="a.png cannot be used"):
        samples.read_side(args, "train")
    path.unlink()
    with pytest.raises(SystemExit, match="No such file"):
        samples.read_side(args, "train")


def test_rows_of_another_shape_are_refused(tmp_path):
    box = [0, 0, 500, 500]
    good = {"id": "1", "boxes": [box] * 3, "traces": ["a"] * 3}
    one = {"id": "1", "boxes": [box], "traces": ["a"]}
    args = argparse.Namespace(out=tmp_path, preset="toy", model=model_path("toy/base"), steps=2)
    picture(20, 10).save(tmp_path / "a.png")
    files.write_jsonl(tmp_path / "data/train.jsonl", [dict(GOOD, image="../a.png")])

    def read(*rows):
        files.write_jsonl(tmp_path / "data/sft.jsonl", rows)
        return samples.read_trajectories(args, tmp_path / "data")

    # Any length: that is counted in tokens, where a teacher's traces are looked at
    assert [len(row["boxes"]) for row in read(good, {**one, "traces": ["a " * 2000]})] == [3, 1]
    wrong = [{"boxes": [box]}, [1], 7, None, "x", dict(good, boxes=["x"] * 3), dict(good, id=[])]
    wrong += [dict(good, boxes=[box]), dict(one, traces=["a"] * 3), dict(good, boxes=7)]
    wrong += [{"id": "1"}, dict(one, boxes=[[0, 0, 1, 1001]]), dict(one, boxes=[[5, 5, 5, 9]])]
    wrong += [dict(one, traces=[None]), dict(one, traces=["<|"]), dict(one, traces="a")]
    for row in wrong:
        assert "sft.jsonl, line 2: no row of such a file" in one_line(read, good, row)
    two = dict(good, boxes=[box] * 2, traces=["a"] * 2)
    assert "holds 2 boxes a trajectory" in one_line(read, two)
    (tmp_path / "data/sft.jsonl").write_text("[" * 100_000)
    assert "line 1: not JSON" in one_line(samples.read_trajectories, args, tmp_path / "data")


def test_every_kind_of_image_is_read_or_refused_by_name(tmp_path, monkeypatch, capsys):
    def load(name, width=20, height=10):
        sample = {"image": name, "width": width, "height": height}
        return samples.load_image(sample, tmp_path)

    color = Image.new("RGB", (20, 10), (200, 100, 50))
    for mode, name in (("L", "grey.png"), ("P", "p.png"), ("CMYK", "cmyk.jpg"), ("1", "bit.png")):
        color.convert(mode).save(tmp_path / name)
        assert load(name).mode == "RGB" and load(name).size == (20, 10)
    pixel = load("cmyk.jpg").getpixel((3, 3))
    assert max(abs(a - b) for a, b in zip(pixel, (200, 100, 50))) < 12

    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load("clear.png").getpixel((0, 0)) == (255, 255, 255)

    ramp = torch.arange(200, dtype=torch.int32).view(10, 20).numpy()
    for count, values in enumerate((ramp.astype("uint16"), ramp * 10**7, ramp - 1000)):
        name = "low.png" if count == 0 else "low.tiff"  # a PNG has no 32 bits
        Image.fromarray(values).save(tmp_path / name)
        assert load(name).getextrema() == ((0, 255),) * 3  # it was black
        assert capsys.readouterr().out.count("stretched") == (count == 0)

    color.save(tmp_path / "turned.jpg", exif=TURNED)
    assert load("turned.jpg").size == (20, 10) and load("turned.jpg", 10, 20).size == (10, 20)
    for tag in (b"\0\x02\0\0\0\x02\x36\0", b"\0\x03\0\0\0\x01\0\x63"):  # "6", 99
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + tag + b"\0" * 6
        color.save(tmp_path / "odd.jpg", exif=exif)
        own = samples.load_image({"image": "odd.jpg", "width": 0, "height": 0}, tmp_path, True)
        assert own.size == load("odd.jpg").size == (20, 10)
        with pytest.raises(ValueError, match="it is 20 x 10, the sample says 10 x 20"):
            load("odd.jpg", 10, 20)

    preview = color.resize((4, 2))
    color.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[preview])
    assert load("phone.jpg").size == (20, 10)

    second = Image.new("RGB", (20, 10))
    color.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    Image.new("F", (20, 10)).save(tmp_path / "float.tiff")
    color.save(tmp_path / "big.png")
    for name, words, limit in (
        ("moving.gif", "animation", 10**9),
        ("float.tiff", "floating-point", 10**9),
        ("big.png", "exceeds limit of 150", 150),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=words):
            load(name)


VALUES = st.sampled_from([None, True, [], {}]) | st.floats() | st.integers() | st.text(max_size=5)
ANY = VALUES | st.lists(VALUES, max_size=4) | st.lists(VALUES, min_size=4, max_size=4)
LINES = st.builds(lambda name, value: {**GOOD, name: value}, st.sampled_from(list(GOOD)), ANY)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | LINES.map(json.dumps))
def test_fuzz_the_manifest(tmp_path_factory, line):
    path = tmp_path_factory.mktemp("fuzz") / "s.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    picture(20, 10).save(path.with_name("a.png"))
    try:
        assert len(samples.read_samples(path, "")) == 1
    except SystemExit as e:
        assert "problems in" in str(e) or "is empty" in str(e)
