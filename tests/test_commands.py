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

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
# A small rate, so that two processes and one differ by rounding alone; an entropy bonus, so that
# there is a gradient where the rewards of all groups are equal
GRPO = "grpo.py --updates 2 --val-every 2 --val-prompts 3 --grad-accum 2 --group-size 2 --lr 1e-4"
GRPO += " --entropy 0.01"
SMALL = {  # a step of the main job -> its command, in the order of the README
    "make_data": "make_data.py --train-samples 54 --val-samples 6 --test-samples 7 --max-tokens 60",
    "sft": "sft.py --epochs 1 --batch-size 2 --grad-accum 2 --lr 1e-3 --save-every 2",
    "grpo": f"{GRPO} --max-tokens 60",
    "grpo_single": f"{GRPO} --max-tokens 60 --steps 0",
    "evaluate": "evaluate.py --max-tokens 60",
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


def unbroken(steps, out):
    """Starts each of these commands once, and never stops it -> the seconds of each."""
    seconds = {}
    for step, text in steps.items():
        began = time.time()
        status, printed = run([*text.split(), "--out", str(out)], out.parent)
        seconds[step] = time.time() - began
        assert status == 0, printed
        assert not re.search(r"warn|Traceback|deprecat|failed", printed, re.I), printed
    return seconds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The main job: (run folder, seconds of each step)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, printed = command("sft", out)
    assert status == 1 and "first run: python make_data.py" in printed
    return out, unbroken(SMALL, out)


def test_the_main_job(whole):
    out, _ = whole
    names = ["Base (single-shot)", "Base + IVT", "SFT + IVT", "SFT + GRPO + IVT", "single-step"]
    assert all(name in (out / "results.md").read_text() for name in names)
    page = (out / "report.html").read_text()
    [test] = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["groups"]
    assert len(test["samples"]) == 7 and len(test["methods"]) == 7
    assert page.count("<summary>Training: ") == 3
    rows = lines(out / "log/grpo.jsonl")
    updates = [row for row in rows if "reward" in row]
    validations = [row["val_reward"] for row in rows if "val_reward" in row]
    gain = rows[-1]["change"][0]
    assert gain == pytest.approx(max(validations) - validations[0], abs=1e-4)
    # The reference is the adapter that training began from
    assert updates[0]["kl"] < 1e-5 < updates[1]["kl"]
    # The result is the best by validation, here the first or the last
    result = load_file(out / "grpo/adapter_model.safetensors")
    other = load_file(out / "sft/adapter_model.safetensors")
    if validations[1] > validations[0]:
        other = load_checkpoint(out / "grpo.checkpoint")["adapter"]
    assert all(torch.equal(result[key], other[key]) for key in result)
    status, printed = command("sft", out)
    assert status == 0 and "is finished; --restart begins again" in printed, printed


def test_scripts_around_a_run(whole, tmp_path):
    """Ablations, other systems, pictures of one's own, the merged checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)

    def well(argv):
        status, printed = run([*argv.split(), "--out", str(out)], tmp_path)
        assert status == 0, printed
        return printed

    well(f"{SMALL['evaluate']} --ablations --predictions theirs.jsonl")
    before = json.loads((out / "results.json").read_text())
    own = before["ablations"]["SFT + GRPO + IVT, a box elsewhere"]
    assert own["first"] == before["table2"]["SFT + GRPO + IVT"]["first"]  # step 0 sees no box
    ways = before["table1"]
    assert "confidence" in ways["SFT + IVT"]  # where a box can be refused, it is not its own
    assert "confidence" not in ways["Base, asked again, zoomed and guarded"]

    well("-m support.report.score_predictions --predictions theirs.jsonl")
    after = json.loads((out / "theirs/results.json").read_text())
    for key in ("table1", "table2", "differences", "findings"):
        assert after[key] == before[key], key

    picture(90, 70).save(tmp_path / "photo.png")
    own = [{"image": "photo.png", "expression": word} for word in ("the star", "the cross")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    printed = well(f"{SMALL['evaluate']} --image own.jsonl")
    assert "photo.png: the cross" in printed and "step 2: " in printed, printed
    assert (out / "figures/2_photo.png").exists()

    printed = well("-m support.model.merge --folder merged")
    assert load_file(tmp_path / "merged/model.safetensors"), printed


def test_the_zoomed_loop_goes_through_all_phases(tmp_path):
    out = tmp_path / "run"
    zoomed = ("--feedback", "zoom", "--surroundings", "3")
    for step, more in (
        ("make_data", ()),
        ("sft", ()),
        ("grpo", ("--guard", "on")),
        ("evaluate", ("--guard", "on", "--ablations")),
    ):
        status, printed = command(step, out, *zoomed, *more)
        assert status == 0, printed
    results = json.loads((out / "results.json").read_text())
    names = [name for name in results["ablations"] if "SFT + GRPO + IVT, " in name]
    assert names == ["SFT + GRPO + IVT, a view elsewhere", "SFT + GRPO + IVT, no box drawn"]
    assert results["findings"] == []  # the paper's are about its own loop
    status, printed = command("sft", out, "--restart")
    assert status == 1 and "was made with --feedback zoom, and now it is overlay" in printed


# Users' mistakes: one clear line each -------------------------------------------------------------
MISTAKES = [  # a command on the whole run -> what it says
    (f"{SMALL['sft']} --epochs 2", "epochs: 1 then, 2 now"),
    ("sft.py --model empty", "was made with --model"),
    ("-m support.report.score_predictions --predictions file", "file, line 1: "),
]


@pytest.mark.parametrize("line, words", MISTAKES)
def test_a_mistake_ends_with_one_line(whole, tmp_path, line, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{")
    argv = line.split()
    if "--out" not in argv:
        argv += ["--out", str(whole[0])]
    status, printed = run(argv, tmp_path)
    assert status == 1 and "Traceback" not in printed, printed
    message = printed[printed.index("error: ") :]
    assert words in message and message.count("error:") == 1, printed


def test_a_wrong_teacher_is_refused_before_the_student_plays(tmp_path):
    (tmp_path / "empty").mkdir()
    status, printed = command(
        "make_data", tmp_path / "run", *"--teacher vlm --teacher-model empty".split()
    )
    assert status == 1 and "error: --teacher-model empty cannot be loaded" in printed, printed
    assert not (tmp_path / "run/data/student.jsonl").exists()


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
    for step in ("make_data", "sft", "grpo", "evaluate"):
        for process in together([*SMALL[step].split(), "--out", str(out)], tmp_path):
            assert process.exitcode == 0, process.output.read_text()
    assert lines(out / "data/student.jsonl") == lines(one / "data/student.jsonl")
    for name in ("log/sft.jsonl", "log/grpo.jsonl"):
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


def kill(argv, folder, when):
    """Starts a command and kills it once `when()` is true -> whether it was still at work."""
    process = start(argv, folder)
    while process.is_alive() and not when():
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_at_random(argv, folder, seconds):
    """Kills a command that takes about so many seconds."""
    after = random.uniform(0, 0.8) * seconds
    print("killed after", after, "seconds:", argv)
    moment = time.time() + after
    kill(argv, folder, lambda: time.time() > moment)


def test_a_killed_run_ends_as_one_that_never_stopped(whole, tmp_path):
    """Each step killed at a random moment, SFT in the middle of a write too.

    Both runs are started in the same way: another number of threads sums in another order.
    """
    one, seconds = whole
    out = tmp_path / "run"
    for step, text in SMALL.items():
        argv = [*text.split(), "--out", str(out)]
        if step == "sft":
            writing = (out / "sft.checkpoint.tmp").exists
            # On a busy machine the moment may be slept over; then the step begins again
            assert any(kill([*argv, "--restart"], tmp_path, writing) for _ in range(10))
        kill_at_random(argv, tmp_path, seconds[step])
        status, printed = command(step, out)
        assert status == 0, printed
    kinds = (".jsonl", ".json", ".safetensors", ".md", ".html", ".png")
    files = [file for file in one.rglob("*") if file.suffix in kinds]
    assert len(files) > 30
    for file in files:
        name = file.relative_to(one)
        assert (out / name).read_bytes() == file.read_bytes(), name
