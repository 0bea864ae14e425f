"""The tables of the docs: means over runs, and runs that do not belong together."""

import json

from support.report import docs_tables
from support.report.docs_tables import BASE, GRPO, GUARDED, ROWS, SFT, SINGLE

import pytest


def make_run(folder, seed, value, lr=0.1):
    """A finished run in which every mean is `value`."""
    estimate = [value, value - 0.1, value + 0.1]
    box = {metric: estimate for metric in ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mean IoU")}
    ways = {way: box for way in ("best of steps", "last step", "first step")}
    loops = [name for name in ROWS if name not in (BASE, SINGLE)]
    called = {"wrong object": estimate}
    traces = [{"boxes": {"wrong object": called, "right": called}, "balanced": estimate}]
    others = (f"{GRPO}, no overlay", f"{GRPO}, a box elsewhere", f"{GUARDED}, a view elsewhere")
    results = {"n": 5, "seed": seed, "steps": 2, "findings": [["it looks", "+0.1", "holds"]]}
    results["table1"] = {name: ways if name in loops else {"its only box": box} for name in ROWS}
    row = {"delta": estimate, "turns": {"ECR": estimate, "EIR": estimate}, "traces": traces}
    results["table2"] = dict.fromkeys(loops, row)
    results["differences"] = {name: {"last step": box} for name in (SFT, GRPO, GUARDED)}
    results["ablations"] = {name: {"against": estimate} for name in others}
    (folder / "log").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    config = {"lr": lr, "seed": seed, "data/train.jsonl": f"hash of {seed}"}
    (folder / "log/sft.config.json").write_text(json.dumps(config))
    return folder


def test_the_tables_are_of_all_runs_and_only_their_place_is_changed(tmp_path, monkeypatch):
    sections = [("Table 2", "words", ("head",), [["0.500 [0.400, 0.600]"]])]
    monkeypatch.setattr(docs_tables, "main_sections", lambda results: sections)
    block = "<!-- table: seeds -->\nold\n<!-- end -->"
    (tmp_path / "README.md").write_text(f"before\n{block}\nafter\n")
    folders = [make_run(tmp_path / f"{seed}", seed, 0.4 + 0.1 * seed) for seed in (0, 1)]
    docs_tables.write_all(folders, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- table: seeds -->\nMean of seeds 0, 1 (lowest")
    assert readme.endswith("|\n\n<!-- end -->\nafter\n") and "old" not in readme
    assert f"| {BASE} | 0.450 (0.400 to 0.500) |  |  |  | 0.450 |" in readme
    changes = "0.450 | 0.450 (0.400 to 0.500) | +0.450 (+0.400 to +0.500) | 0.450 | 0.450"
    assert f"| {SFT} | {changes} |" in readme
    seeds = (tmp_path / "docs/tables/seeds.md").read_text()
    assert "| +0.400 [+0.300, +0.500] * | +0.500 [+0.400, +0.600] * |" in seeds
    assert seeds.endswith("| it looks | +0.1: holds | +0.1: holds |\n")
    main = (tmp_path / "docs/tables/main.md").read_text()
    assert main.startswith("# Seed 0") and "**Table 2.**" in main and "| 0.500 |" in main


def test_runs_that_differ_in_more_than_the_seed_and_unfinished_ones_are_refused(tmp_path):
    folders = [make_run(tmp_path / "a", 0, 0.4), make_run(tmp_path / "b", 1, 0.5, lr=0.2)]
    with pytest.raises(SystemExit, match="for the seed: sft.config lr: 0.1, sft.config lr: 0.2"):
        docs_tables.write_all(folders, tmp_path)
    for content in ("{", "[1]", '{"ablations": {}}', '{"ablations": {"no": "row"}}'):
        (tmp_path / "a/results.json").write_text(content)
        with pytest.raises(SystemExit, match="evaluate.py --ablations --out|make what they lack"):
            docs_tables.write_all(folders[:1], tmp_path)


def test_the_table_of_visrl_has_a_column_for_each_run(tmp_path):
    for seed in (0, 1):
        results = {"n": 9, "seed": seed, "findings": [["it looks", f"+0.{seed}", "holds"]]}
        results |= {"answers": {"SFT": [seed, 0, 1]}, "boxes": {}}
        if not seed:  # the second run lacks a row
            results["answers"]["KTO"] = [0, 0, 0]
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/results.json").write_text(json.dumps(results))
    docs_tables.write_visrl([tmp_path / "0", tmp_path / "1"], tmp_path)
    table = (tmp_path / "docs/tables/visrl.md").read_text()
    assert "9 test samples a seed" in table and "| seed 0 | seed 1 |" in table
    assert "| SFT: right answers | 0.000 [0.000, 1.000] | 1.000 [0.000, 1.000] |" in table
    assert "| KTO: right answers | 0.000 [0.000, 0.000] |  |" in table
    assert "| it looks | +0.0: holds | +0.1: holds |" in table
