"""The generated tables of README.md and docs/tables/, from finished runs on the toy.

    python -m support.report.docs_tables --runs runs/seed0 runs/seed1 runs/seed2

Each run was made with its own `--seed` in every phase, and evaluated with `--ablations`. Start this
on the machine that made the runs: its processor and its libraries are named above each table.

Reads results.json and log/*.config.json of each run. Writes docs/tables/seeds.md (a column a run),
docs/tables/main.md (the first run) and the table of README.md (the mean of all).
"""

import argparse
import json
import re
from functools import reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path

from support.report.tables import INTERVALS, cell, markdown, markdown_table, report
from support.running.errors import stop
from support.running.files import read_config, write_text
from support.running.flags import ROOT

SFT, GRPO, GUARDED = "SFT + IVT", "SFT + GRPO + IVT", "Base, asked again, zoomed and guarded"
CHOSEN = "best of steps"  # with the truth
BASE = "Base (single-shot)"
ROWS = (BASE, "Base + IVT (no training)", SFT, "SFT + GRPO (single-step)", GRPO, GUARDED)
PHASES = ("make_data", "sft", "grpo", "grpo_single", "evaluate_grpo")
BLOCK = re.compile(r"(<!-- table: seeds -->\n).*?(<!-- end -->)", re.S)
SECTIONS = ("Table 1", "Table 2", "The paper's findings here")
WAYS = ("its only box", CHOSEN, "last step")  # of Table 1
INTERVAL_OF_A_MEAN = re.compile(r"(?<![-+.\d])(\d\.\d{3}) \[[^]-]*\]")


def read_results(folder):
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not results.get("ablations"):
        stop(f"{path} has no ablations; first run: python evaluate.py --ablations --out {folder}")
    return results


def settings(folder, phase):
    """What a phase was made with, without the seed and the files, which follow it."""
    config = read_config(folder / f"log/{phase}.config.json")
    return {key: value for key, value in config.items() if "/" not in key and key != "seed"}


def refuse_others(folders):
    """Stops where a run has other settings than the first: a mean of the two would say nothing."""
    for folder in folders[1:]:
        for phase in PHASES:
            first, own = settings(folders[0], phase), settings(folder, phase)
            for key in first.keys() | own.keys():
                if first.get(key) != own.get(key):
                    both = f"{first.get(key)} in {folders[0]} and {own.get(key)} in {folder}"
                    stop(f"{phase}: {key} is {both}; give runs that differ in their seed alone")


def machine():
    """The processor and the libraries of this machine, in words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
    return ", ".join([*names[:1], *libraries])


def over(values, sign="", spread=False):
    """The mean over the runs of estimates; with spread the lowest and the highest of them too."""
    means = [value[0] for value in values]
    text = f"{sum(means) / len(means):{sign}.3f}"
    return f"{text} ({min(means):{sign}.3f} to {max(means):{sign}.3f})" if spread else text


def mean_table(runs):
    """The table of README.md."""
    rows = []
    for name in ROWS:
        ways = [run["table1"][name] for run in runs]
        ends = [way.get("last step") or way["its only box"] for way in ways]
        last = over([end["mean IoU"] for end in ends], spread=True)
        sharp = over([end["Acc@0.9"] for end in ends])
        if name not in runs[0]["table2"]:
            rows.append([name, last, "", "", "", sharp])
            continue
        first, best = ([way[box]["mean IoU"] for way in ways] for box in ("first step", CHOSEN))
        change = over([run["table2"][name]["delta"] for run in runs], "+", spread=True)
        rows.append([name, over(first), last, change, over(best), sharp])
    head = ["mean IoU", "step 0", "last step", "change", CHOSEN, "Acc@0.9, last step"]
    return markdown_table(head, rows)


def seeds_table(runs):
    """A line per question, a column per run, with the run's own interval."""
    questions = {}
    for name in (SFT, GRPO, GUARDED):
        questions[f"{name}: last step - step 0"] = ("table2", name, "delta")
    for name in (SFT, GRPO):
        end = ("differences", name, "last step", "mean IoU")
        questions[f"{name}: last step - {BASE}"] = end
    for name in (f"{GRPO}, no overlay", f"{GRPO}, a box elsewhere", f"{GUARDED}, a view elsewhere"):
        questions[f"{name}: last step - that of its own box"] = ("ablations", name, "against")
    for name in (SFT, GRPO):
        turns = ("second_look", name, "turns")
        questions[f"{name}: share of the wrong boxes that it corrects"] = (*turns, "ECR")
        questions[f"{name}: share of the right boxes that it spoils"] = (*turns, "EIR")
        traces = ("second_look", name, "traces", 0)
        for box, words in (("wrong object", "on a wrong object"), ("right", "right")):
            question = f'{name}: of the boxes that are {words}, called "wrong object" at step 1'
            questions[question] = (*traces, "boxes", box, "wrong object")
        questions[f"{name}: balanced accuracy at step 1, chance 0.333"] = (*traces, "balanced")
    rows = []
    for question, place in questions.items():
        sign = "" if place[0] == "second_look" else "+"
        rows.append([question, *(cell(reduce(getitem, place, run), sign) for run in runs)])
    return markdown_table(["", *(f"seed {run['seed']}" for run in runs)], rows)


def main_tables(results):
    """The first tables of results.md, without the intervals of means: docs are to be short."""
    sections = []
    for name, text, head, rows in report(results):
        if name == "Table 1":
            rows = [row for row in rows if row[1] in WAYS]
        if name in SECTIONS:
            sections.append((name, text, head, rows))
    return INTERVAL_OF_A_MEAN.sub(r"\1", markdown(sections))


def write_all(folders, root=ROOT):
    refuse_others(folders)
    runs = [read_results(folder) for folder in folders]
    made = f"{machine()}; {runs[0]['n']} test samples a seed, T = {runs[0]['steps']}, greedy."
    head = ["# Each seed", "", f"{made} {INTERVALS}", ""]
    write_text(root / "docs/tables/seeds.md", "\n".join(head + seeds_table(runs)))
    head = f"# Seed {runs[0]['seed']}\n\n{machine()}.\n\n"
    write_text(root / "docs/tables/main.md", head + main_tables(runs[0]))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    head = [f"Mean of seeds {seeds} (lowest to highest); {made}", ""]
    block = "\n".join(head + mean_table(runs))
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = BLOCK.sub(lambda match: f"{match[1]}{block}\n{match[2]}", readme)
    write_text(root / "README.md", readme)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders, one a seed")
    write_all(parser.parse_args().runs)
