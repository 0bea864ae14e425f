"""The commands of VisRL, very small: a whole run; and one that is killed in every phase, whose
questions have no boxes."""

import json

from tests.test_commands import kill_at_random, lines, run, unbroken

import pytest

pytestmark = pytest.mark.slow
# With these thresholds a base without skill gives pairs
PAIRS = "-m visrl.make_pairs --attempts 2 --batch-size 4 --max-tokens 24 --win 0 --lose 1"
DPO = "-m visrl.dpo --epochs 1 --batch-size 2 --save-every 2"
SMALL = {  # a step of the main job -> its command, in the order of visrl/README.md
    "make_data": "-m visrl.make_data --sft-samples 24 --train-samples 9 --test-samples 6",
    "sft": "-m visrl.sft --epochs 1 --batch-size 4 --save-every 2",
    "sft_8": "-m visrl.sft --epochs 1 --batch-size 4 --samples 8",
    "pairs": PAIRS,
    "no_controller": f"{PAIRS} --ablation no_controller",
    "rl1": f"{DPO} --stage 1",
    "rl2": f"{DPO} --stage 2",
    "rl2_only": f"{DPO} --stage 2 --init sft",
    "plain_dpo": f"{DPO} --stage answers",
    "plain_sft": f"{DPO} --stage answers --loss sft",
    "plain_kto": f"{DPO} --stage answers --loss kto",
    "pairs_2": f"{PAIRS} --iteration 2",
    "evaluate": "-m visrl.evaluate --max-tokens 24 --judge base",
}


def command(step, out, *more):
    return run([*SMALL[step].split(), "--out", str(out), *more], out.parent)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, seconds of each step)."""
    out = tmp_path_factory.mktemp("visrl") / "run"
    status, printed = command("pairs", out)
    assert status == 1 and "first run: python -m visrl.make_data" in printed
    return out, unbroken(SMALL, out)


def test_the_main_job(whole):
    out, _ = whole
    report = (out / "results.md").read_text()
    names = ["Base, no box", "RL2, shown the true box", "RL2 only", "Plain DPO", "pairs_2", "KTO"]
    names += ["SFT, 8 samples", "SFT on chosen answers", "well-formed boxes", "judge's score"]
    assert all(name in report for name in [*names, "without the diversity controller"])
    assert (out / "report.html").exists()
    for name, steps in (("rl1", 1), ("rl2", 2), ("rl2_only", 2), ("plain_dpo", 1)):
        first, *later = lines(out / f"log/{name}.jsonl")
        # The policy begins as its reference, and leaves it
        assert first["loss"] == pytest.approx(0.693147) and first["kl"] < 1e-6 < later[-1]["kl"]
        assert first["margin"] == pytest.approx([0.0] * steps, abs=1e-5)
    first, *later = lines(out / "log/plain_sft.jsonl")
    assert first["loss"] == pytest.approx(first["nll"]) and later[-1]["nll"] < first["nll"]
    assert lines(out / "log/plain_kto.jsonl")[0]["loss"] != pytest.approx(0.693147)
    assert all(0 <= line["score"] <= 1 for line in lines(out / "log/evaluate_rl2.jsonl"))
    pairs = lines(out / "data/pairs.jsonl")
    assert len(pairs) > 3
    for pair in pairs:
        assert pair["chosen"]["box_score"] >= pair["rejected"]["box_score"]
    # The same boxes, but for those that the controller replaced
    one, other = (lines(out / f"data/paths{name}.jsonl") for name in ("", "_no_controller"))
    assert one != other
    assert [row["boxes"] for row in one] == [row["boxes"] for row in other]
    for row in other:
        assert all(path["box"] in row["boxes"] for path in row["paths"])


@pytest.mark.parametrize(
    "step, flags, words",
    [
        ("rl1", "--beta 0.2", "beta: 0.1 then, 0.2 now"),
        ("rl1", "--init sft", "--init sft is for --stage 2"),
        ("rl1", "--loss kto", "--loss kto is for --stage answers"),
        ("rl2", "--iteration 3", "first run: python -m visrl.make_pairs --iteration 3 --out"),
        ("make_data", "--preset paper --out other", "--viscot DIR"),
    ],
)
def test_mistakes_end_with_one_clear_message(whole, step, flags, words):
    status, printed = command(step, whole[0], *flags.split())
    assert status == 1 and words in printed and "Traceback" not in printed, printed


def test_a_stopped_run_without_boxes_ends_as_one_that_never_stopped(whole, tmp_path):
    """Every phase killed at a random moment, and every true box taken out of the questions before
    the first pair is made: the same pairs, the same adapters, to the byte."""
    one, seconds = whole
    out = tmp_path / "run"
    for step in ("make_data", "sft", "pairs", "rl1", "rl2"):
        if step == "pairs":
            questions = lines(out / "data/train.jsonl")
            assert all(row.pop("bbox") for row in questions)
            text = "".join(json.dumps(row) + "\n" for row in questions)
            (out / "data/train.jsonl").write_text(text)
        kill_at_random([*SMALL[step].split(), "--out", str(out)], tmp_path, seconds[step])
        status, printed = command(step, out)
        assert status == 0, printed
    files = [file for kind in ("jsonl", "safetensors") for file in out.rglob(f"*.{kind}")]
    assert len(files) >= 3 + 2 + 3 + 3  # data, pairs and the paths before them, logs, adapters
    for file in files:
        name = file.relative_to(out)
        if name.name != "train.jsonl":
            assert file.read_bytes() == (one / name).read_bytes(), name
