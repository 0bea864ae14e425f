"""The generated tables of README.md and docs/tables/, from finished runs on the toy.

    python -m support.report.docs_tables --runs runs/seed0 runs/seed1 runs/seed2
    python -m support.report.docs_tables --visrl runs/visrl0 runs/visrl1 runs/visrl2

Each run was made with its own `--seed` in every phase; those of --runs were evaluated with
`--ablations`. Start this on the machine that made the runs: its processor and its libraries are
named above each table.

Reads results.json and log/*.config.json of each run. Writes docs/tables/seeds.md (a column a run),
docs/tables/main.md (the first run) and the table of README.md (the mean of all); of --visrl
docs/tables/visrl.md.
"""

import argparse
import json
import re
from functools import reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path

from support.report.statistics import BASE, GRPO, GUARDED, SFT, SINGLE, UNTRAINED
from support.report.tables import INTERVALS, cell, main_sections, markdown, markdown_table
from support.running.errors import explained, stop, verify
from support.running.files import read_config, write_text
from support.running.flags import ROOT

ABLATIONS = "python evaluate.py --ablations"
ROWS = (BASE, UNTRAINED, SFT, SINGLE, GRPO, GUARDED)
BLOCK = re.compile(r"(<!-- table: seeds -->\n).*?(<!-- end -->)", re.S)
INTERVAL_OF_A_MEAN = re.compile(r"(?<![-+.\d])(\d\.\d{3}) \[[^]-]*\]")


def read_results(folder, part="findings", command="python evaluate.py"):
    path = folder / "results.json"
    with explained(f"{path} cannot be used", f"first run: {command} --out {folder}"):
        results = json.loads(path.read_bytes())
        verify(results[part], f"no {part}")
        return results


def settings(folder):
    """What the phases of a run were made with, without the seed and the files that follow it."""
    found = set()
    for path in (folder / "log").glob("*.config.json"):
        for key, value in read_config(path).items():
            if "/" not in key and key != "seed":
                found.add(f"{path.stem} {key}: {value}")
    return found


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
        first = over([way["first step"]["mean IoU"] for way in ways])
        best = over([way["best of steps"]["mean IoU"] for way in ways])
        change = over([run["table2"][name]["delta"] for run in runs], "+", spread=True)
        rows.append([name, first, last, change, best, sharp])
    head = ["mean IoU", "step 0", "last step", "change", "best of steps", "Acc@0.9, last step"]
    return markdown_table(head, rows)


def by_seed(rows, runs):
    """A table with a column per run, and below the rows the verdicts, with one number at most."""
    found = [{} for _ in runs]
    for own, run in zip(found, runs):
        for words, text, says in run["findings"]:
            own[words] = f"{text}: {says}" if text.count("[") < 2 else says
    rows += [[words, *(own.get(words, "") for own in found)] for words in found[0]]
    return markdown_table(["", *(f"seed {run['seed']}" for run in runs)], rows)


def seeds_table(runs):
    """A line per question, a column per run, with the run's own interval."""
    rows = []

    def ask(question, *place, sign=""):
        rows.append([question, *(cell(reduce(getitem, place, run), sign) for run in runs)])

    for name in (SFT, GRPO, GUARDED):
        ask(f"{name}: last step - step 0", "table2", name, "delta", sign="+")
    for name in (SFT, GRPO):
        place = ("differences", name, "last step", "mean IoU")
        ask(f"{name}: last step - {BASE}", *place, sign="+")
    for name in (f"{GRPO}, no overlay", f"{GRPO}, a box elsewhere", f"{GUARDED}, a view elsewhere"):
        ask(f"{name}: last step - that of its own box", "ablations", name, "against", sign="+")
    for name in (SFT, GRPO):
        row = ("table2", name)
        ask(f"{name}: share of the wrong boxes that it corrects", *row, "turns", "ECR")
        ask(f"{name}: share of the right boxes that it spoils", *row, "turns", "EIR")
        traces = (*row, "traces", 0)
        for box, words in (("wrong object", "on a wrong object"), ("right", "right")):
            question = f'{name}: of the boxes that are {words}, called "wrong object" at step 1'
            ask(question, *traces, "boxes", box, "wrong object")
        ask(f"{name}: balanced accuracy at step 1, chance 0.333", *traces, "balanced")
    return by_seed(rows, runs)


@explained("the tables cannot be made of these runs", "make what they lack")
def write_visrl(folders, root=ROOT):
    runs = [read_results(folder, command="python -m visrl.evaluate") for folder in folders]
    rows = []
    for what, words in (("answers", "right answers"), ("boxes", "right boxes, IoU > 0.5")):
        for name in runs[0][what]:
            rows.append([f"{name}: {words}", *(cell(run[what].get(name)) for run in runs)])
    head = f"# VisRL\n\n{machine()}; {runs[0]['n']} test samples a seed. {INTERVALS}\n\n"
    write_text(root / "docs/tables/visrl.md", head + "\n".join(by_seed(rows, runs)))


@explained("the tables cannot be made of these runs", "make what they lack")
def write_all(folders, root=ROOT):
    for folder in folders[1:]:
        differing = sorted(settings(folder) ^ settings(folders[0]))
        if differing:  # a mean of the two would say nothing
            stop(f"{folder} is not as {folders[0]}, but for the seed: {', '.join(differing)}")
    runs = [read_results(folder, "ablations", ABLATIONS) for folder in folders]
    made = f"{machine()}; {runs[0]['n']} test samples a seed, T = {runs[0]['steps']}, greedy."
    head = f"# Each seed\n\n{made} {INTERVALS}\n\n"
    write_text(root / "docs/tables/seeds.md", head + "\n".join(seeds_table(runs)))
    head = f"# Seed {runs[0]['seed']}\n\n{machine()}.\n\n"
    tables = INTERVAL_OF_A_MEAN.sub(r"\1", markdown(main_sections(runs[0])))  # docs are short
    write_text(root / "docs/tables/main.md", head + tables)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    head = f"Mean of seeds {seeds} (lowest to highest); {made}\n\n"
    block = head + "\n".join(mean_table(runs))
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = BLOCK.sub(lambda match: f"{match[1]}{block}\n{match[2]}", readme)
    write_text(root / "README.md", readme)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, help="folders, one a seed")
    parser.add_argument("--visrl", nargs="+", type=Path, help="folders of VisRL, one a seed")
    args = parser.parse_args()
    if not args.runs and not args.visrl:
        parser.error("give --runs or --visrl")
    if args.runs:
        write_all(args.runs)
    if args.visrl:
        write_visrl(args.visrl)
