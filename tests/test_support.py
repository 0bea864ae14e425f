"""Flags, files, samples, messages: what a run does when something is not right."""

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from common import IVT, Trajectory
from support.data import samples
from support.report import health
from support.report.rows import Row, play_row
from support.running import errors, files
from support.running.flags import ROOT, Flag, check_path, command, flags, model_path
from support.running.presets import PRESETS
from tests.small import GOOD, one_line, picture

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

# Flags --------------------------------------------------------------------------------------------
EXTRA = {
    "data": Flag(help="a file", kind="file"),
    "folder": Flag(help="a folder", kind="folder"),
    "merge": Flag(help="100 % new", kind="new folder"),
    "init": Flag(help="where from", default="sft", choices=("sft", "base")),
    "ablations": Flag(help="more rows", kind="switch"),
}


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(phase, words) -> Namespace, of a run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGINT)

    def run(phase, words="", out="run"):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as if started by path
        monkeypatch.setattr(sys, "argv", ["sft.py", *words.split(), "--out", str(tmp_path / out)])
        return flags(phase, "A phase.\n\nMore.", **EXTRA)

    yield run
    signal.signal(signal.SIGINT, handler)


def test_flags_are_the_rows_of_the_presets_and_those_of_the_script(parse, tmp_path, capsys):
    args = parse("sft", "--lr 0.5 --folder . --ablations")
    assert (args.lr, args.epochs, args.seed) == (0.5, PRESETS["sft"]["epochs"].toy, 0)
    assert args.folder == "." and args.ablations is True and args.init == "sft"
    assert args.out == tmp_path / "run" and args.data is None and args.merge is None
    assert args.model == str(ROOT / "toy/base")
    printed = capsys.readouterr().out
    assert printed.startswith("python sft.py --preset toy") and "seed=0" in printed
    assert parse("sft", "--preset paper", out="other").lr == PRESETS["sft"]["lr"].paper
    assert parse("grpo", "--steps 0", out="third").steps == 0
    assert not hasattr(parse(None, out="fourth"), "lr")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr nan", "--lr is nan; expected 1e-09 to 1"),
        ("--lr 2", "--lr is 2.0; expected 1e-09 to 1"),
        ("--steps 50", "--steps is 50; expected 1 to 20"),
        ("--epochs 0", "--epochs is 0; expected 1 to 1000000000"),
        ("--epochs x", "invalid int value"),
        ("--dtype float16", "invalid choice"),
        ("--learning-rate 1", "unrecognized arguments"),
        ("--ep 1", "unrecognized arguments"),
    ],
)
def test_values_out_of_range_are_refused(parse, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        parse("sft", words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, kind, reason",
    [
        ("none", "file", "no such file or directory"),
        ("folder", "file", "is a directory"),
        ("loop", "file", "too many levels of symbolic links"),
        ("file", "folder", "not a directory"),
        ("none", "file or folder", "no such file or directory"),
        ("folder", "new file", "is a directory"),
        ("file/x", "new file", "file exists"),
        ("file", "new folder", "file exists"),
        ("loop", "new folder", "file exists"),
        ("/proc/x", "new folder", "no such file or directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_in_one_line(
    tmp_path, monkeypatch, value, kind, reason
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")  # unreadable, for the administrator of the machine too
    message = f"error: --flag {value}: {reason}; give a path that can be used as a {kind}"
    assert message == one_line(check_path, "--flag", value, kind)
    for good in (("file", "file"), ("folder", "file or folder"), ("file", "file or folder")):
        check_path("--flag", *good)
    for new in (("new/file", "new file"), ("new/folder", "new folder"), ("file", "new file")):
        check_path("--flag", *new)


def test_flags_check_their_paths_before_any_work(parse):
    Path("file").touch()
    assert "--data nope.jsonl: no such file" in one_line(parse, "sft", "--data nope.jsonl")
    assert "--folder file: not a directory" in one_line(parse, "sft", "--folder file")
    assert "/file/run: not a directory" in one_line(parse, "sft", out="file/run")


def test_another_phase_is_named_with_the_runs_own_flags():
    args = argparse.Namespace(preset="toy", out=Path("runs/toy"), model=model_path("toy/base"))
    assert command(args, "python sft.py") == "python sft.py"
    args.model = "runs/toy_base/base"
    assert command(args, "python sft.py") == "python sft.py --model runs/toy_base/base"
    model = "Qwen/Qwen3-VL-4B-Instruct"
    args = argparse.Namespace(preset="paper", out=Path("my runs/1"), model=model)
    assert command(args, "python grpo.py --steps 0").endswith("0 --preset paper --out 'my runs/1'")
    args.out = Path("runs/visrl_paper")
    assert command(args, "python -m visrl.sft") == "python -m visrl.sft --preset paper"


# Samples ------------------------------------------------------------------------------------------
def test_bad_samples_are_all_reported_at_once(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    without = {key: value for key, value in GOOD.items() if key != "expression"}
    bad = [
        (dict(GOOD, bbox=[5, 0, 0, 5]), "bbox is .*x1 < x2"),
        (dict(GOOD, width=30, bbox=[0, 0, 25, 5]), "20 x 10"),
        (dict(GOOD, image="b.png"), "b.png cannot be used .*No such file"),
        (dict(GOOD, bbox=[0, 0, float("nan"), 1]), "finite"),
        (without, "expression is 'None'"),
        (dict(GOOD, image="cut.png"), "cut.png cannot be used"),
        (GOOD, "id '1' is on line 1"),
        (dict(GOOD, expression="a <|image_pad|>"), "special tokens"),
        (dict(GOOD, width=4200), "200 to 1"),
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
    missing = one_line(samples.read_samples, tmp_path / "none.jsonl", "python make_data.py")
    assert "first run: python make_data.py" in missing
    assert "cannot be read" in one_line(samples.read_samples, tmp_path, "python make_data.py")


def test_every_kind_of_image_is_read_or_refused_by_name(tmp_path, monkeypatch):
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

    deep = torch.full((10, 20), 128 * 256, dtype=torch.int32).numpy().astype("uint16")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert load("deep.png").getpixel((0, 0)) == (128, 128, 128)

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer shows it as 10 x 20
    color.save(tmp_path / "turned.jpg", exif=exif)
    assert load("turned.jpg").size == (20, 10) and load("turned.jpg", 10, 20).size == (10, 20)

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


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)
manifest_lines = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda field, value: json.dumps(dict(GOOD, **{field: value})).encode(),
        st.sampled_from(list(GOOD)),
        anything,
    ),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(manifest_lines)
def test_fuzz_the_manifest(tmp_path, line):
    (tmp_path / "s.jsonl").write_bytes(line)
    picture(20, 10).save(tmp_path / "a.png")
    try:
        assert len(samples.read_samples(tmp_path / "s.jsonl", "")) == 1
    except SystemExit as e:
        assert "problems in" in str(e)


# Files of a run -----------------------------------------------------------------------------------
def test_resumed_rows_belong_to_their_samples(tmp_path):
    """Rows count while their ids are the samples', whatever line ends a text holds; a line cut
    short does not."""
    rows_of = [{"id": str(i), "width": 1, "height": 1} for i in range(5)]
    path = tmp_path / "log"
    asked = []

    def work(batch):
        asked.extend(number for number, _ in batch)
        return [{"id": sample["id"], "text": "a\u2028b\u0085"} for _, sample in batch]

    def run():
        return files.resumable(path, rows_of, 2, "x", work)

    rows = run()
    assert [row["id"] for row in rows] == list("01234") and asked == [0, 1, 2, 3, 4]
    assert run() == rows and len(asked) == 5
    path.write_bytes(path.read_bytes()[:-4])
    assert run() == rows and asked[5:] == [4]
    del rows_of[2]  # the batch of 0 and 1 stays
    assert [row["id"] for row in run()] == list("0134") and asked[6:] == [2, 3]


def test_one_run_at_a_time_under_one_configuration(tmp_path):
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", lr=0.1)
    assert not files.begin(args, "sft")
    assert files.begin(args, "sft")
    args.lr = 0.2
    with pytest.raises(SystemExit, match="lr: 0.1 then, 0.2 now(.|\n)*--restart"):
        files.begin(args, "sft")
    files.lock(tmp_path)
    with pytest.raises(SystemExit, match="another run works in"):
        files.lock(tmp_path)
    (tmp_path / "log/sft.config.json").write_text("[")
    assert "sft.config.json cannot be read" in one_line(files.begin, args, "sft")


# Rows and logs ------------------------------------------------------------------------------------
def test_a_row_is_played_again_when_what_it_depends_on_changes(tmp_path):
    files.write_jsonl(tmp_path / "data/test.jsonl", [GOOD])
    given = dict(guard="off", seed=0, batch_size=1)
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", **given)
    made = []

    def work(batch):
        made.extend(batch)
        return [{"id": sample["id"]} for _, sample in batch]

    def plays(name, *flags):
        made.clear()
        play_row(args, Row(name, name), [GOOD], work, *flags)
        return len(made)

    assert plays("once") == 1 and plays("refined", "guard") == 1
    args.seed, args.guard = 1, "on"  # nothing is sampled, and one box is not refined
    assert plays("once") == 0
    with pytest.raises(SystemExit, match="guard: off then, on now"):
        plays("refined", "guard")
    args.restart = True
    assert plays("refined", "guard") == 1 and plays("refined", "guard") == 0


def test_what_the_log_says_of_a_batch_of_rollouts():
    truth = dict(GOOD, width=100, height=100, bbox=[0, 0, 50, 100])
    right, half = [0, 0, 500, 1000], [0, 0, 1000, 1000]
    boxes = [[half, right], [None, right], [half, half], [half, None]]
    trajectories = [Trajectory(target=[1] * n, boxes=pair) for n, pair in enumerate(boxes, 1)]
    rewards = torch.tensor([[1.0, 0.5], [0.3, 0.3]])
    facts = health.rollout_facts(rewards, trajectories, [truth] * 4, [0.1] * 9 + [0.6])
    assert facts == {
        "reward": pytest.approx(0.525),
        "reward_std": 0.125,  # of 0.25 and 0
        "no_signal": 0.5,
        "iou": [0.375, 0.625],
        "valid": 0.75,
        "tokens": 2.5,
        "sampler_gap": pytest.approx(0.15),
        "sampler_gap_max": 0.6,
    }


# Memory -------------------------------------------------------------------------------------------
WORKER = """
import torch
from support.running.errors import working_on
from support.running.flags import flags
from support.running.processes import RANK, WORLD, gather, program

flags(None, "Runs out of memory.")
print(program())
working_on([{"id": "7", "width": 20, "height": 10}])
if RANK == WORLD - 1:
    torch.empty(10**15)
gather([1])
"""


def test_running_out_of_memory_names_the_samples_and_the_flag(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: others.append(arguments))

    def end_with(error):
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err

    errors.explain_out_of_memory("--batch-size")
    errors.explain_out_of_memory("--max-pixels")
    errors.working_on([GOOD])
    cuda = torch.OutOfMemoryError("CUDA out of memory")
    end = "lower --max-pixels. What was saved before is whole\n"
    assert end_with(cuda) == f"error: out of memory with the samples 1 (20 x 10); {end}"
    errors.working_on([dict(GOOD, id=str(i)) for i in range(5)])
    assert f"3 (20 x 10), ...; {end}" in end_with(MemoryError())
    assert others == []
    error = RuntimeError("another")
    assert end_with(error) == "" and others == [(RuntimeError, error, None)]


@pytest.mark.parametrize("processes", (1, 2))
def test_running_out_of_memory_ends_all_processes(tmp_path, processes):
    """The last of them runs out; alone it prints nothing but the message. A script in a folder is
    named as it was started."""
    script = tmp_path / "rooms/worker.py"
    script.parent.mkdir()
    script.write_text(WORKER)
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    start += ["rooms.worker", "--out", "run"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ran = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True)
    message = "error: out of memory with the samples 7 (20 x 10); lower --max-pixels."
    assert ran.returncode == 1 and message in ran.stderr, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "python -m rooms.worker --preset toy --out run", ran
    assert lines[-1] == "python -m rooms.worker"
    if processes == 1:
        assert len(ran.stderr.splitlines()) == 1
