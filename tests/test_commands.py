"""The real commands, very small: whole runs, killed runs, two processes, and users' mistakes."""

import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from support.model.checkpoints import load_checkpoint
from tests.small import picture

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # a step of the main job -> its command, in the order of the README
    "make_data": "make_data.py --train-samples 54 --val-samples 6 --test-samples 7 --max-tokens 60",
    "sft": "sft.py --epochs 1 --batch-size 2 --grad-accum 2 --save-every 2",
    "grpo": "grpo.py --updates 2 --val-every 2 --val-prompts 3 --grad-accum 2 --group-size 2 "
    "--max-tokens 60",
    "grpo_single": "grpo.py --steps 0 --updates 2 --val-every 2 --val-prompts 3 --grad-accum 2 "
    "--group-size 2 --max-tokens 60",
    "evaluate": "evaluate.py --pictures 2 --max-tokens 60 --longest 3",
}

# It forks from a process that has loaded the libraries, which saves seconds at every start
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["peft", "bitsandbytes", "transformers.models.qwen3_vl.modeling_qwen3_vl", __name__]
)


def child(argv, folder, output, environment):
    """`python argv` in this process, in `folder`; what it prints goes to the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.update(environment)
    for name in list(sys.modules):
        if name.split(".")[0] in ("common", "support", "toy", "visrl", "speed"):
            del sys.modules[name]
    if environment:  # one of two processes on two cores
        torch.set_num_threads(1)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / argv[0]), *argv[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def start(argv, folder, **environment):
    """-> the running process; its output is in the file process.output."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output_{time.time_ns()}"
    output.touch()
    process = server.Process(target=child, args=(argv, folder, output, environment))
    process.start()
    process.output = output
    return process


def run(argv, folder):
    """-> (exit status, what was printed)."""
    process = start(argv, folder)
    process.join()
    return process.exitcode, process.output.read_text()


def command(step, out, *more):
    """A step of SMALL on the run folder `out`, with more flags."""
    return run([*SMALL[step].split(), "--out", str(out), *more], out.parent)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The main job, each step started once and never stopped: (run folder, seconds of each)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, printed = command("sft", out)
    assert status == 1 and "first run: python make_data.py" in printed
    seconds = {}
    for step in SMALL:
        began = time.time()
        status, printed = command(step, out)
        seconds[step] = time.time() - began
        assert status == 0, printed
        assert not re.search(r"warn|Traceback|deprecat|failed", printed, re.I), printed
    return out, seconds


def test_the_main_job(whole):
    out, _ = whole
    report = (out / "results.md").read_text()
    for name in (
        "Base (single-shot)",
        "Base + IVT",
        "SFT + IVT",
        "single-step",
        "SFT + GRPO + IVT",
    ):
        assert name in report
    for file in ("figures/corrections.png", "figures/lead.png", "grpo_single/adapter_config.json"):
        assert (out / file).exists()
    page = (out / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    test, *validations = data["groups"]
    assert len(test["samples"]) == 7 and len(test["methods"]) == 8
    names = [(group["name"], [m["name"] for m in group["methods"]]) for group in validations]
    updates = ["update 0", "update 2"]
    assert names == [("validation of grpo", updates), ("validation of grpo_single", updates)]
    assert [curve["heading"] for curve in data["curves"]][1] == "Training: sft"
    rows = lines(out / "log/grpo.jsonl")
    updates = [row for row in rows if "reward" in row]
    validations = [row["val_reward"] for row in rows if "val_reward" in row]
    assert len(updates) == 2 and len(validations) == 2
    # The reference is the adapter that training began from
    assert updates[0]["kl"] < 1e-5 < updates[1]["kl"]
    # The result is the best by validation, here the first or the last
    result = load_file(out / "grpo/adapter_model.safetensors")
    best = validations.index(max(validations))
    other = load_file(out / "sft/adapter_model.safetensors")
    if best == 1:
        other = load_checkpoint(out / "grpo.checkpoint")["adapter"]
    assert all(torch.equal(result[key], other[key]) for key in result)


@pytest.mark.parametrize(
    "flags, status, words",
    [
        ("", 0, "is finished"),
        ("--epochs 2", 1, "epochs: 1 then, 2 now"),
        ("--learning-rate 1", 2, "--learning-rate"),
        ("--lr nan", 2, "expected 1e-09 to 1"),
    ],
)
def test_a_finished_phase_is_not_made_anew_nor_otherwise(whole, flags, status, words):
    ended, printed = command("sft", whole[0], *flags.split())
    assert ended == status and words in printed, printed


def test_steps_have_a_range(whole):
    status, printed = command("grpo", whole[0], "--steps", "50")
    assert status == 2 and "expected 0 to 20" in printed


def test_scripts_around_a_run(whole, tmp_path):
    """Ablations, other runs and other systems, a picture of one's own, the merged checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    file = tmp_path / "predictions.jsonl"
    more = ["--ablations", "--compare", str(whole[0]), "--predictions", str(file)]
    status, printed = command("evaluate", out, *more)
    assert status == 0, printed
    before = json.loads((out / "results.json").read_text())
    assert len(before["ablations"]) == 5 + 4 + 2
    look = before["second_look"]
    assert "confidence" in look["SFT + IVT"]  # and where a box can be refused, it is not its own
    assert "confidence" not in look["Base, asked again, zoomed and guarded"]
    own = before["ablations"]["SFT + GRPO + IVT"]
    other = before["ablations"][f"{whole[0]}: SFT + GRPO + IVT"]
    assert own["first"] == other["first"] and own["validation"] == other["validation"]

    argv = ["-m", "support.report.score_predictions", "--predictions", str(file), "--out", str(out)]
    status, printed = run(argv, tmp_path)
    assert status == 0, printed
    after = json.loads((out / "predictions/results.json").read_text())
    tables = ("table1", "table2", "differences", "strata", "adaptive", "findings", "second_look")
    for key in tables:
        assert after[key] == before[key], key

    picture(90, 70).save(tmp_path / "photo.png")
    more = ["--image", str(tmp_path / "photo.png"), "--expression", "the red star"]
    status, printed = command("evaluate", out, *more)
    assert status == 0 and "step 2: " in printed, printed
    assert (out / "figures/photo.png").exists() and (out / "figures/photo.html").exists()

    own = [{"image": "photo.png", "expression": word} for word in ("the star", "the cross")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    status, printed = command("evaluate", out, "--image", str(tmp_path / "own.jsonl"))
    assert status == 0 and "2 photo.png: the cross" in printed, printed
    assert "the cross" in (out / "figures/own.html").read_text()
    for row, words in (({"image": "photo.png"}, "line 2: expected"), ({}, "line 2: expected")):
        (tmp_path / "own.jsonl").write_text(json.dumps(own[0]) + "\n" + json.dumps(row))
        status, printed = command("evaluate", out, "--image", str(tmp_path / "own.jsonl"))
        assert status == 1 and words in printed, printed
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "photo.png", tmp_path / "folder/a.png")
    more = ["--image", str(tmp_path / "folder"), "--expression", "the red star"]
    status, printed = command("evaluate", out, *more)
    assert status == 0 and (out / "figures/folder.html").exists(), printed

    for more in (["--image", str(tmp_path / "photo.png")], ["--expression", "the red star"]):
        status, printed = command("evaluate", out, *more)
        assert status == 1 and "give both" in printed, printed

    merged = tmp_path / "merged"
    argv = ["-m", "support.model.merge", "--folder", str(merged), "--out", str(out)]
    status, printed = run(argv, tmp_path)
    assert status == 0 and load_file(merged / "model.safetensors"), printed


def test_the_zoomed_loop_goes_through_all_phases(tmp_path):
    out = tmp_path / "run"
    zoomed = ("--feedback", "zoom", "--surroundings", "3")
    for step, more in (
        ("make_data", ()),
        ("sft", ()),
        ("grpo", ("--guard", "on")),
        ("evaluate", ("--guard", "on", "--ablations", "--longest", "2")),
    ):
        status, printed = command(step, out, *zoomed, *more)
        assert status == 0, printed
    results = json.loads((out / "results.json").read_text())
    names = [name for name in results["ablations"] if "SFT + GRPO + IVT, " in name]
    assert names == ["SFT + GRPO + IVT, a view elsewhere", "SFT + GRPO + IVT, no box drawn"]
    assert results["findings"] == []  # the paper's are about its own loop
    assert "confidence" not in results["second_look"]["SFT + GRPO + IVT"]
    status, printed = command("sft", out, "--restart")
    assert status == 1 and "was made with --feedback zoom, and now it is overlay" in printed


# Users' mistakes: one clear line each -------------------------------------------------------------
SCRIPTS = {  # a script -> its flags that read a path: (flag, "file" or "folder", other flags)
    "make_data.py": [("--data", "file", ""), ("--out", "folder", "")],
    "sft.py": [("--model", "folder", ""), ("--out", "folder", "")],
    "grpo.py": [("--model", "folder", ""), ("--out", "folder", "")],
    "evaluate.py": [
        ("--image", "file", "--expression x"),
        ("--compare", "folder", ""),
        ("--model", "folder", "--restart"),
        ("--out", "folder", ""),
    ],
    "-m support.report.score_predictions": [("--predictions", "file", "")],
    "-m speed.benchmark": [("--run", "folder", "")],
}
PATHS = [(script, *rest) for script, flags in SCRIPTS.items() for rest in flags]


@pytest.mark.parametrize("script, flag, kind, more", PATHS)
def test_wrong_paths_end_with_one_line(whole, tmp_path, script, flag, kind, more):
    """What is missing, a folder for a file, a file for a folder, and what cannot be read."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # unreadable for everybody
    file = tmp_path / "file"
    file.write_text("{")
    wrong = [loop, tmp_path / "empty" if kind == "file" else file]
    (tmp_path / "empty").mkdir()
    if flag != "--out":
        wrong.append(tmp_path / "missing")
    if flag in ("--compare", "--run"):
        wrong.append(tmp_path / "empty")
    for path in wrong:
        out = tmp_path / "run"
        if not out.exists():
            shutil.copytree(whole[0], out)
        argv = [*script.split(), *more.split(), flag, str(path)]
        if script.endswith(".py") and flag != "--out":
            argv += ["--out", str(out)]
        status, printed = run(argv, tmp_path)
        assert status in (1, 2), printed
        assert "Traceback" not in printed and path.name in printed, printed
        errors = [line for line in printed.splitlines() if "error:" in line]
        assert len(errors) == 1, printed


# Several processes, and runs that are stopped -----------------------------------------------------
def together(argv, folder):
    """Two processes of one command, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in "01":
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        processes.append(start(argv, folder, MASTER_ADDR="localhost", MASTER_PORT=port, **ranks))
    for process in processes:
        process.join()
    return processes


def test_two_processes_do_what_one_does(whole, tmp_path):
    """The same global batches, shared: the same boxes, and losses up to rounding."""
    one, _ = whole
    out = tmp_path / "run"
    for text in SMALL.values():
        for process in together([*text.split(), "--out", str(out)], tmp_path):
            assert process.exitcode == 0, process.output.read_text()
    assert lines(out / "data/student.jsonl") == lines(one / "data/student.jsonl")
    for name in ("log/sft.jsonl", "log/grpo.jsonl", "log/grpo_single.jsonl"):
        for a, b in zip(lines(out / name), lines(one / name), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (name, key)
    name = "log/evaluate_base.jsonl"
    for a, b in zip(lines(out / name), lines(one / name), strict=True):
        assert a["id"] == b["id"] and a["boxes"] == b["boxes"]
    argv = [*SMALL["sft"].split(), "--grad-accum", "3", "--out", str(out)]
    process = together(argv, tmp_path)[0]
    printed = process.output.read_text()
    assert process.exitcode == 1 and "not a multiple of the 2 processes" in printed, printed


def interrupt(step, out, when, number=signal.SIGKILL, again=False):
    """Starts a step and sends it a signal once `when()` is true -> (exit status, output).

    On a busy machine the moment may be slept over; then the step begins again.
    """
    more = []
    for _ in range(10):
        process = start([*SMALL[step].split(), *more, "--out", str(out)], out.parent)
        while process.is_alive() and not when():
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        if process.exitcode or not again:
            break
        more = ["--restart"]
    return process.exitcode, process.output.read_text()


def test_a_stopped_run_ends_as_one_that_never_stopped(whole, tmp_path):
    """Each step killed at a random moment, SFT in the middle of a write and by Ctrl-C too.

    Both runs are started in the same way: another number of threads sums in another order.
    """
    unbroken, seconds = whole
    out = tmp_path / "run"
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for step in SMALL:
        if step == "sft":
            file = out / "sft.checkpoint"
            status, printed = interrupt(step, out, (out / "sft.checkpoint.tmp").exists, again=True)
            assert status == -signal.SIGKILL, printed
            before = file.stat().st_mtime_ns if file.exists() else 0

            def saved(file=file, before=before):
                return file.exists() and file.stat().st_mtime_ns > before

            status, printed = interrupt(step, out, saved, signal.SIGINT, again=True)
            assert status == 130 and "to go on: python" in printed, printed
            assert "Traceback" not in printed, printed
        moment = time.time() + rng.uniform(0, 0.8) * seconds[step]
        interrupt(step, out, lambda moment=moment: time.time() > moment)
        status, printed = command(step, out)
        assert status == 0, printed
    kinds = (".jsonl", ".json", ".safetensors", ".md", ".html", ".png")
    files = [file for file in unbroken.rglob("*") if file.suffix in kinds]
    assert len(files) > 40
    for file in files:
        name = file.relative_to(unbroken)
        assert (out / name).read_bytes() == file.read_bytes(), f"{name}, seed {seed}"
