"""Flags, files, checkpoints, models, samples: what a run does when something is not right."""

import argparse
import copy
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from common import (
    IVT,
    VLM,
    Trajectory,
    build_trajectory,
    encode_images,
    rollout,
    trajectory_logprobs,
)
from support import run
from support.data import samples
from support.model import adapters, checkpoints, decoding, loading, memory
from support.report import health
from support.report.rows import Row, begin_row
from support.running import errors, files, processes
from support.running.flags import ROOT, Flag, check_path, command, flags, model_path
from support.running.presets import PRESETS
from tests.small import GOOD, TEXTS, picture, vlm  # noqa: F401  vlm is a fixture

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file


def model_args(folder, **changes):
    """The flags that `load_vlm` reads."""
    values = dict(
        model=str(folder),
        dtype="float32",
        max_pixels=2**20,
        quantize="none",
        checkpointing="off",
    )
    return argparse.Namespace(**{**values, **changes})


def save_parts(vlm, folder):
    """A checkpoint folder of the small model."""
    vlm.base.save_pretrained(folder)
    vlm.tokenizer.save_pretrained(folder)
    vlm.image_processor.save_pretrained(folder)
    return folder


def one_line(call, *arguments, **options):
    """The message with which a call ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **options)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


# Flags --------------------------------------------------------------------------------------------
EXTRA = {
    "data": Flag(help="a file", kind="file"),
    "compare": Flag(help="folders", kind="folders"),
    "merge": Flag(help="100 % new", kind="new folder"),
    "init": Flag(help="where from", default="sft", choices=("sft", "base")),
    "ablations": Flag(help="more rows", kind="switch"),
}


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(phase, words) -> Namespace, of a run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def run(phase, words="", out="run"):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as if started by path
        monkeypatch.setattr(sys, "argv", ["sft.py", *words.split(), "--out", str(tmp_path / out)])
        return flags(phase, "A phase.\n\nMore.", **EXTRA)

    yield run
    signal.signal(signal.SIGINT, handler)


def test_flags_are_the_rows_of_the_presets_and_those_of_the_script(parse, tmp_path, capsys):
    args = parse("sft", "--lr 0.5 --compare . .. --ablations")
    assert (args.lr, args.epochs, args.seed) == (0.5, PRESETS["sft"]["epochs"].toy, 0)
    assert args.compare == [".", ".."] and args.ablations is True and args.init == "sft"
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


def test_each_path_that_is_not_what_it_should_be_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")  # unreadable, for the administrator of the machine too
    cases = {
        ("none", "file"): "no such file; give the path",
        ("file/none", "file"): "no such file; give the path",
        ("folder", "file"): "is a folder; give a file",
        ("loop", "file"): "cannot be read (Too many levels of symbolic links); allow",
        ("a\0b", "file"): "is no path",
        ("none", "folder"): "no such folder; give the path",
        ("file", "folder"): "is a file; give a folder",
        ("loop", "folder"): "cannot be read (Too many levels of symbolic links); allow",
        ("folder", "new file"): "is a folder; give the path of a file",
        ("file/x", "new file"): "cannot be written",
        ("loop", "new file"): "cannot be written (Too many levels of symbolic links); allow",
        ("file", "new folder"): "is a file; give a folder",
        ("file/x", "new folder"): "cannot be written",
        ("loop", "new folder"): "cannot be written",
        ("/proc/x", "new folder"): "cannot be written",
        ("/proc/x", "new file"): "cannot be written",
    }
    for (value, kind), words in cases.items():
        message = one_line(check_path, "--flag", value, kind)
        assert words in message and "error: --flag " in message, message
        assert value in message or repr(value) in message
    for value, kind in (
        ("file", "file"),
        ("folder", "folder"),
        ("file", "new file"),
        ("folder/new", "new file"),
        ("folder", "new folder"),
        ("new/folder", "new folder"),
    ):
        check_path("--flag", value, kind)
    assert not Path("folder/new").exists() and Path("new/folder").is_dir()


def test_flags_check_their_paths_before_any_work(parse):
    Path("file").touch()
    assert "--data nope.jsonl: no such file" in one_line(parse, "sft", "--data nope.jsonl")
    assert "--compare file: is a file" in one_line(parse, "sft", "--compare . file")
    assert "--merge file: is a file" in one_line(parse, "sft", "--merge file")
    assert "/file: is a file; give a folder" in one_line(parse, "sft", out="file")
    assert "/file/run: cannot be written" in one_line(parse, "sft", out="file/run")


def test_a_script_in_a_folder_is_named_as_it_is_started(tmp_path):
    script = tmp_path / "rooms/hello.py"
    script.parent.mkdir()
    script.write_text(
        "from support.running.flags import flags\n"
        "from support.running.processes import program\n"
        "flags(None, 'Says hello.')\n"
        "print(program())\n"
    )
    command = [sys.executable, "-m", "rooms.hello", "--out", "run"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    assert lines[0] == "python -m rooms.hello --preset toy --out run", ran
    assert lines[-1] == "python -m rooms.hello"


# Samples ------------------------------------------------------------------------------------------
def test_bad_samples_are_all_reported_at_once(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    without = {key: value for key, value in GOOD.items() if key != "expression"}
    bad = [
        (dict(GOOD, bbox=[5, 0, 0, 5]), "inverted"),
        (dict(GOOD, width=30, bbox=[0, 0, 25, 5]), "20 x 10"),
        (dict(GOOD, image="b.png"), "cannot be read"),
        (dict(GOOD, bbox=[0, 0, float("nan"), 1]), "finite"),
        (without, "expression is 'None'"),
        (dict(GOOD, image="cut.png"), "cut.png cannot be read"),
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
        ("big.png", "Pillow's limit", 150),
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


def test_a_row_depends_on_what_it_is_played_with(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text("{}\n")
    given = dict(guard="off", feedback="overlay", surroundings=1.5, seed=0)
    args = argparse.Namespace(out=tmp_path, restart=False, model="m", **given)
    refined = Row("b", "b", IVT, 2)
    flags = ("feedback", "guard")
    assert not begin_row(args, Row("a", "a", IVT)) and not begin_row(args, refined, *flags)
    args.seed, args.guard = 1, "on"  # nothing is sampled, and one box is not refined
    assert begin_row(args, Row("a", "a", IVT))
    with pytest.raises(SystemExit, match="guard: off then, on now"):
        begin_row(args, refined, *flags)
    args.restart = True
    assert not begin_row(args, refined, *flags) and begin_row(args, refined, *flags)


# Checkpoints --------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_checkpoint_is_data_and_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save_checkpoint("c", update=1, weight=torch.ones(3))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a full disk
    try:
        with pytest.raises(SystemExit, match="c cannot be written .*make room"):
            checkpoints.save_checkpoint("c", update=2, weight=torch.ones(100_000))
        log = files.Log("log")
        with pytest.raises(SystemExit, match="log cannot be written"):
            for _ in range(3):
                log.write(text="x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoints.load_checkpoint("c")["update"] == 1
    torch.save({"update": Evil()}, "c")
    assert "no checkpoint of this code" in one_line(checkpoints.load_checkpoint, "c")
    assert not Path("evil").exists()


def test_a_run_goes_on_where_its_last_checkpoint_was(vlm, tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, restart=False, **vars(model_args(tmp_path / "base")))
    save_parts(vlm, tmp_path / "base")

    def start():
        policy = loading.load_vlm(args)
        adapters.new_adapter(policy, 4, 8, "policy")
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        return policy, parameters, optimizer

    policy, parameters, optimizer = start()
    log, update, best = checkpoints.resume(args, "grpo", policy, optimizer)
    assert (log.rows, update, best) == (0, 0, (-1.0, 0))
    log.write(update=1)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoints.save_progress(
        args, "grpo", policy, optimizer, log, update=1, best=(0.5, 1), finished=False
    )
    log.write(update=2)  # not in the checkpoint: it is done again
    checkpoints.leave_if_finished(args, "grpo")

    again, others, optimizer = start()
    log, update, best = checkpoints.resume(args, "grpo", again, optimizer)
    assert (log.rows, update, best) == (1, 1, (0.5, 1))
    assert log.path.read_text() == '{"update": 1}\n'
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert optimizer.state_dict()["state"][0]["step"] == 1

    checkpoints.save_progress(
        args, "grpo", again, optimizer, log, update=2, best=(0.5, 1), finished=True
    )
    with pytest.raises(SystemExit):
        checkpoints.leave_if_finished(args, "grpo")
    assert "grpo is finished; --restart begins again" in capsys.readouterr().out
    args.restart = True
    checkpoints.leave_if_finished(args, "grpo")
    assert not (tmp_path / "grpo.checkpoint").exists()


def test_progress_is_saved_when_it_is_due(vlm, tmp_path, monkeypatch, capsys):
    base = save_parts(vlm, tmp_path / "base")
    policy = loading.load_vlm(model_args(base))
    adapters.new_adapter(policy, 4, 8)
    args = argparse.Namespace(out=tmp_path, save_every=3)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    file = tmp_path / "sft.checkpoint"

    def saved_at(update, last=None):
        log = files.Log(tmp_path / "log/sft.jsonl")
        file.unlink(missing_ok=True)
        checkpoints.save_if_due(args, "sft", policy, optimizer, log, update=update, last=last)
        return file.exists()

    assert [saved_at(update) for update in range(1, 7)] == [False, False, True] * 2
    assert not (tmp_path / "sft").exists()
    assert saved_at(4, last=4) and checkpoints.load_checkpoint(file)["finished"]
    assert (
        adapters.adapter_file(tmp_path / "sft", "")
        == checkpoints.best_adapter(tmp_path) / "adapter_model.safetensors"
    )
    assert "first run: python x" in one_line(adapters.adapter_file, tmp_path, "python x")
    assert "stopped" not in capsys.readouterr().out
    saved_at(3)
    checkpoints.best_adapter(tmp_path)
    assert "sft: the run stopped after update 3" in capsys.readouterr().out
    monkeypatch.setattr(processes, "_interrupt_asked", True)
    with pytest.raises(SystemExit) as ended:
        saved_at(5)
    assert ended.value.code == 130 and file.exists()


# Models and adapters ------------------------------------------------------------------------------
def test_foreign_models_and_adapters_are_refused(vlm, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    args = model_args(tmp_path)
    assert "model_type qwen3_vl" in one_line(loading.load_vlm, args)
    save_parts(vlm, tmp_path)
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), unk_token="<unk>")
    foreign.save_pretrained(tmp_path)
    assert re.search("tokenizer has no .*image_pad", one_line(loading.load_vlm, args))
    vlm.tokenizer.save_pretrained(tmp_path)

    one = loading.load_vlm(args)
    other = loading.load_vlm(args)
    adapters.new_adapter(one, 4, 8)
    adapters.save_adapter(one, tmp_path / "adapter")
    other.base.model.language_model.norm.weight.data.mul_(2)
    message = one_line(adapters.add_adapter, other, tmp_path / "adapter", "sft")
    assert "another base model" in message
    assert "adapter_config.json" in one_line(adapters.add_adapter, one, tmp_path, "sft")
    adapters.add_adapter(one, tmp_path / "adapter", "sft")
    adapters.add_adapter(one, tmp_path / "none", "sft")  # it is there, and is not read again
    assert one.model.active_adapter == "sft"

    for value in ("nope", "./nope", "a/b/c"):
        message = one_line(loading.load_vlm, model_args(value))
        assert f"--model {value}: no such folder, and not a hub id" in message
    file = tmp_path / "config.json"
    assert "is no folder that can be read" in one_line(loading.load_vlm, model_args(file))


def change_json(path, **changes):
    """None removes a value."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_the_file(vlm, tmp_path):
    whole = save_parts(vlm, tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    taller = {**config["text_config"], "num_hidden_layers": 3}
    wider = {**config["text_config"], "intermediate_size": 64}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}

    def cut(path):
        path.write_bytes(path.read_bytes()[:50_000])

    def two_shards(folder, content):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    def write(name, text):
        return lambda folder: (folder / name).write_text(text)

    def change(name, **changes):
        return lambda folder: change_json(folder / name, **changes)

    preprocessor = "preprocessor_config.json"
    cases = [
        (write("config.json", "{oops"), "config.json cannot be read as JSON"),
        (write("config.json", "[]"), "config.json holds no JSON object"),
        (change("config.json", text_config=3), "look at its config.json"),
        (change("config.json", text_config=taller), "lack .* config.json speaks of"),
        (change("config.json", text_config=wider), "another shape than config.json says"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "found no .*safetensors"),
        (lambda folder: two_shards(folder, json.dumps(index)), "model-2.safetensors is missing"),
        (lambda folder: two_shards(folder, "{}"), "index.json has no weight_map"),
        (lambda folder: (folder / preprocessor).unlink(), f"{preprocessor} is missing"),
        (write(preprocessor, "{"), f"{preprocessor} cannot be read as JSON"),
        (write(preprocessor, "[]"), f"{preprocessor} holds no JSON object"),
        (write(preprocessor, "{}"), f"{preprocessor}: its size has"),
        (change(preprocessor, size=None), f"{preprocessor}: its size has"),
        (change(preprocessor, size={"height": 3, "width": 3}), f"{preprocessor}: its size has"),
        (change(preprocessor, size={"shortest_edge": "a"}), f"{preprocessor}: its size has"),
        (change(preprocessor, patch_size=16), f"{preprocessor} says patch_size 16, config.json 8"),
        (change(preprocessor, patch_size=None), f"{preprocessor} says patch_size 14"),
        (change(preprocessor, merge_size=1), f"{preprocessor} says merge_size 1, config.json 2"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "look at its tokenizer.json"),
        (write("tokenizer.json", "{"), "look at its tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja"),
    ]
    for damage, words in cases:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage(folder)
        message = one_line(loading.load_vlm, model_args(folder))
        assert re.search(words, message) and str(folder) in message, message


def test_a_damaged_adapter_is_refused_in_one_line_that_names_the_file(vlm, tmp_path):
    def plain():
        return VLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.image_processor)

    trained = plain()
    adapters.new_adapter(trained, 4, 8)
    whole = tmp_path / "whole"
    adapters.save_adapter(trained, whole)
    weights = load_file(whole / "adapter_model.safetensors")
    first = sorted(weights)[0]
    config, tensors = "adapter_config.json", "adapter_model.safetensors"

    def cut(folder):
        (folder / tensors).write_bytes((folder / tensors).read_bytes()[:20_000])

    def fewer(folder):
        save_file({key: value for key, value in weights.items() if key != first}, folder / tensors)

    def narrow(folder):
        save_file({**weights, first: weights[first][:, :-1].contiguous()}, folder / tensors)

    cases = [
        (lambda folder: (folder / config).write_text("{oops"), f"{config} cannot be read as JSON"),
        (lambda folder: (folder / config).write_text("[]"), f"{config} holds no JSON object"),
        (lambda folder: change_json(folder / config, peft_type=None), f"{config}: peft_type is"),
        (lambda folder: change_json(folder / config, peft_type="IA3"), f"{config}: peft_type is"),
        (lambda folder: change_json(folder / config, r="x"), "does not fit"),
        (lambda folder: change_json(folder / config, r=8), "does not fit .*size mismatch"),
        (lambda folder: change_json(folder / config, target_modules="z"), "does not fit"),
        (lambda folder: change_json(folder / config, target_modules=r".*\.q_proj"), "does not fit"),
        (narrow, "does not fit .*size mismatch"),
        (fewer, "does not fit .*lora_A"),
        (cut, f"{tensors} is damaged"),
        (lambda folder: (folder / tensors).unlink(), f"{tensors} not there"),
        (lambda folder: (folder / "base.json").write_text("{"), "base.json cannot be read"),
    ]
    for damage, words in cases:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage(folder)
        message = one_line(adapters.add_adapter, plain(), folder, "policy")
        assert re.search(words, message) and str(folder) in message, message
        beside = plain()
        adapters.new_adapter(beside, 4, 8, "other")
        assert str(folder) in one_line(adapters.add_adapter, beside, folder, "policy")


def test_a_models_fingerprint_is_computed_once(vlm, monkeypatch):
    first = adapters.fingerprint(vlm)
    monkeypatch.setattr(adapters.hashlib, "sha256", lambda: pytest.fail("computed again"))
    assert adapters.fingerprint(vlm) == first


def test_another_adapter_is_used_for_a_while(vlm, tmp_path):
    both = loading.load_vlm(model_args(save_parts(vlm, tmp_path)))
    for name in ("policy", "reference"):
        adapters.new_adapter(both, *adapters.lora_size("toy"), name)
    both.model.set_adapter("policy")

    def trainable():
        return {name for name, p in both.model.named_parameters() if p.requires_grad}

    before = trainable()
    with pytest.raises(ZeroDivisionError), adapters.using(both, "reference"):
        assert both.model.active_adapter == "reference"
        raise ZeroDivisionError
    assert both.model.active_adapter == "policy" and trainable() == before
    assert before and all("policy" in name for name in before)


def test_lora_is_part_of_the_weights_for_a_while(vlm, tmp_path):
    folder = save_parts(vlm, tmp_path)
    one = loading.load_vlm(model_args(folder))
    for name in ("reference", "policy"):
        adapters.new_adapter(one, 4, 8, name)
    for name, p in one.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)

    def weights():
        return {k: p.detach().clone() for k, p in one.model.named_parameters() if "base_layer" in k}

    asked = [picture(32, 32)], ["x"], 1
    before = weights()
    for adapter in ("policy", "reference"):
        one.model.set_adapter(adapter)
        beside = rollout(one, *asked, max_tokens=9)[0]
        with pytest.raises(ZeroDivisionError), decoding.merged(one):
            changed = [not torch.equal(before[key], weight) for key, weight in weights().items()]
            assert all(changed) and len(changed) == 2 * 7
            within = rollout(one, *asked, max_tokens=9)[0]
            raise ZeroDivisionError
        assert within.target == beside.target
        assert within.logprob == pytest.approx(beside.logprob, abs=1e-4)
        after = weights()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = rollout(one, *asked, max_tokens=9)[0]
        assert again.logprob == beside.logprob  # LoRA is beside the weights again
    with one.model.disable_adapter(), decoding.merged(one):  # the model before SFT, as a critic
        assert all(torch.equal(before[key], weight) for key, weight in weights().items())
    one.model.to(torch.bfloat16)
    before = weights()
    with decoding.merged(one):
        assert all(torch.equal(before[key], weight) for key, weight in weights().items())


def test_4_bit_weights_are_unpacked_for_a_while(vlm, tmp_path, monkeypatch, capsys):
    save_parts(vlm, tmp_path)
    one = loading.load_vlm(model_args(tmp_path, quantize="nf4"))
    asked = [picture(32, 32)], ["x"], 1

    def same_as_packed():
        packed = rollout(one, *asked, max_tokens=9)[0]
        with pytest.raises(ZeroDivisionError), decoding.unpacked(one):
            within = rollout(one, *asked, max_tokens=9)[0]
            raise ZeroDivisionError
        assert within.target == packed.target
        assert within.logprob == pytest.approx(packed.logprob, abs=1e-4)
        assert rollout(one, *asked, max_tokens=9)[0].logprob == packed.logprob
        assert not any("forward" in vars(module) for module in one.model.modules())
        return packed.logprob

    found = [same_as_packed()]
    for name in ("reference", "policy"):
        adapters.new_adapter(one, 4, 8, name)
    for name, p in one.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    for adapter in ("policy", "reference"):
        one.model.set_adapter(adapter)
        found.append(same_as_packed())
    with one.model.disable_adapter(), decoding.unpacked(one):
        assert rollout(one, *asked, max_tokens=9)[0].logprob == found[0]
    assert found[0] != found[1] != found[2]
    layer = one.base.model.language_model.layers[0].self_attn.q_proj
    layer.lora_dropout["reference"] = torch.nn.Dropout(0.5)  # PEFT's own business
    with decoding.unpacked(one):
        changed = ["forward" in vars(m) for m in one.model.modules() if isinstance(m, LoraLayer)]
        assert "forward" not in vars(layer) and sum(changed) == len(changed) - 1
    layer.lora_dropout["reference"] = torch.nn.Identity()

    as_it_is = decoding.rollout
    projection = one.base.model.language_model.layers[0].mlp.up_proj
    tries = []
    held = []

    def little_room(vlm, *args, **options):
        tries.append("forward" in vars(projection))
        assert not any(tensor() is not None for tensor in held)  # free before the second try
        if tries[-1]:
            cache = torch.zeros(10)
            held.append(weakref.ref(cache))
            raise torch.OutOfMemoryError
        return as_it_is(vlm, *args, **options)

    monkeypatch.setattr(decoding, "rollout", little_room)
    monkeypatch.setattr(decoding, "no_room", float("inf"))
    rows = [decoding.play(one, *asked, max_tokens=9)[0] for _ in range(2)]
    assert tries == [True, False, False]
    decoding.play(one, [picture(32, 16)], ["x"], 1, max_tokens=2)  # a smaller one is tried
    assert tries == [True, False, False, True, False]
    assert rows[0].logprob == rows[1].logprob == found[2]
    assert capsys.readouterr().out.count("no room") == 2

    def no_room_at_all(*args, **options):
        tries.append("once")
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoding, "rollout", no_room_at_all)
    monkeypatch.setattr(decoding, "no_room", float("inf"))
    with one.model.disable_adapter(), pytest.raises(torch.OutOfMemoryError):  # there are no copies
        decoding.play(one, *asked, max_tokens=2)
    assert tries.count("once") == 1 and decoding.no_room == float("inf")


def test_lora_gradients_through_4_bit_weights(vlm, tmp_path):
    """NF4 with gradient checkpointing, as the paper preset loads it, after decoding, against the
    same weights in float32."""
    import bitsandbytes as bnb

    save_parts(vlm, tmp_path)
    quantized = loading.load_vlm(model_args(tmp_path, quantize="nf4", checkpointing="on"))
    plain = loading.load_vlm(model_args(tmp_path))
    language = plain.base.model.language_model
    for name, module in quantized.base.model.language_model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            exact = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            language.get_submodule(name).weight.data.copy_(exact)
    down = quantized.base.model.language_model.layers[1].mlp.down_proj
    assert isinstance(down, bnb.nn.Linear4bit)

    gradients = []
    for one in (quantized, plain):
        torch.manual_seed(0)
        adapters.new_adapter(one, 4, 8)
        rollout(one, [picture(32, 32)], ["x"], 1, max_tokens=4)
        images = encode_images(one, [picture(32, 32)] * 2)
        trajectory = build_trajectory(one, images, "it", TEXTS, IVT)
        trajectory_logprobs(one, [trajectory])[0].mean().backward()
        named = one.model.named_parameters()
        gradients.append({name: p.grad for name, p in named if "lora_B" in name})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-4, name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-2, atol=1e-4), name


# Around a training loop ---------------------------------------------------------------------------
WORKER = """
import sys
import torch
from support.running.errors import explain_out_of_memory, working_on
from support.running.processes import RANK, gather, start_processes

start_processes()
explain_out_of_memory("--max-pixels")
working_on([{"id": "7", "width": 20, "height": 10}])
if RANK == int(sys.argv[1]):
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
    """The last of them runs out; alone it prints nothing but the message."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start += [str(script), str(processes - 1)]
    ran = subprocess.run(start, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    message = "error: out of memory with the samples 7 (20 x 10); lower --max-pixels."
    assert ran.returncode == 1 and message in ran.stderr, ran.stderr
    if processes == 1:
        assert len(ran.stderr.splitlines()) == 1


def test_the_probe_takes_what_is_largest_after_the_reduction(vlm, tmp_path, monkeypatch, capsys):
    """The second is larger in pixels; reduced to --max-pixels, the first is."""
    sizes = {"square": (128, 128), "long": (512, 64), "small": (32, 32)}
    made = {}
    for name, (width, height) in sizes.items():
        picture(width, height).save(tmp_path / f"{name}.png")
        made[name] = dict(GOOD, id=name, image=f"{name}.png", width=width, height=height)
    monkeypatch.setattr(
        vlm.image_processor, "size", {"shortest_edge": 256, "longest_edge": 128 * 128}
    )
    for sample in made.values():
        images = encode_images(vlm, [samples.load_image(sample, tmp_path)])
        assert memory.image_token_count(vlm, sample) == images[0].rows * images[0].columns
    weight = vlm.base.model.language_model.norm.weight.requires_grad_(True)
    probed = []

    def examples(rows):
        probed.extend(row["id"] for row in rows)
        pictures = [samples.load_image(made[row["id"]], tmp_path) for row in rows]
        images = encode_images(vlm, pictures)
        return [build_trajectory(vlm, [image], "it", TEXTS[:1], IVT) for image in images]

    rows = [{"id": name, "traces": "x" * length} for length, name in enumerate(sizes)]
    args = argparse.Namespace(steps=2, max_tokens=7, batch_size=3, grad_accum=4, group_size=6)
    memory.probe_sft(vlm, rows, made, examples, args)
    assert probed == ["square"] and weight.grad is None
    assert re.search(r"forward and backward, 3 x \d+ tokens", capsys.readouterr().out)
    args.batch_size, args.val_prompts = 2, 8
    memory.probe_grpo(vlm, list(made.values()), args, tmp_path, IVT)
    weight.requires_grad_(False)
    count = int(re.search(r"2 x (\d+) tokens", capsys.readouterr().out)[1])
    assert count > 3 * (64 + 7)
    assert errors._at_work["samples"] == [made["square"]]


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
    run.stop_unless_finite(3, 0.5, 1.0, [truth])
    message = one_line(run.stop_unless_finite, 3, float("nan"), 1.0, [truth])
    assert "update 3: loss nan" in message and "['1']; lower --lr" in message
