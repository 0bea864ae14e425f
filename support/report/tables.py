"""The results of an evaluation and their report: for the terminal, in Markdown (results.md), for
the page. It is a list of sections: (name, text, head, rows), a table and what stands over it."""

import json
import re
from pathlib import Path

from support.report.analysis import AGREEMENT, ablations_of, results_of
from support.report.claims import CLAIMS
from support.report.statistics import METRICS, SAME, signed
from support.running.files import write_text

CHOICE = "Best of steps, the paper's choice, needs the ground truth; the others do not."
INTERVALS = (
    "[low, high]: 95 percent bootstrap interval over the samples; *: the interval of a difference "
    "excludes zero."
)
VERDICTS = (
    "A finding holds when its whole interval lies on the side it claims, does not hold when the "
    "whole interval lies on the other side, and is not settled in between."
)
FINDINGS = "The paper's findings here"
MAIN = ("Table 1", "Table 2", FINDINGS)
MAIN_WAYS = ("its only box", "best of steps", "last step")  # of Table 1


def results_of_run(args, samples, lines_of, others):
    """All that results.json holds of an evaluation. others: as of `ablations_of`."""
    results = results_of(samples, lines_of, args.steps)
    results |= {"seed": args.seed, "model": Path(args.model).name}
    results |= {"feedback": args.feedback, "guard": args.guard}
    if (args.feedback, args.guard) != ("overlay", "off"):
        results["findings"] = []  # the paper's are about its own loop
    results["ablations"] = ablations_of(samples, args.steps, lines_of, others)
    return results


def write_results(results, folder, words, sections):
    """Prints a summary; writes results.md and results.json (every number) to the folder."""
    print(f"\n{words}\n")
    write_text(folder / "results.md", markdown(sections))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


def markdown(sections):
    """A report as results.md has it."""
    lines = []
    for name, text, head, rows in sections:
        lines += [f"**{name}.** {text}", "", *markdown_table(head, rows)]
    return "\n".join(lines)


def markdown_table(head, rows):
    """Its lines, and an empty one."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


# In short -----------------------------------------------------------------------------------------
def main_sections(results):
    """Table 1 of the main ways to choose a box, Table 2, and the verdicts."""
    sections = []
    for name, text, head, rows in report(results):
        if name == "Table 1":
            rows = [row for row in rows if row[1] in MAIN_WAYS]
        if name in MAIN:
            sections.append((name, text, head, rows))
    return sections


def summary(results):
    """The same for the terminal, of Table 2 the columns for which there is room."""
    lines = [f"{results['n']} test samples, T = {results['steps']}", ""]
    room = results["steps"] + 6
    for name, text, head, rows in main_sections(results)[:2]:
        lines += plain(name, head[:room], [row[:room] for row in rows])
    return "\n".join([*lines, *summary_of_findings(results)])


def plain(name, head, rows):
    """A table for the terminal, without intervals: its lines, and an empty one."""
    columns = [[re.sub(r" \[.*", "", cell) for cell in column] for column in zip(head, *rows)]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns)]
    return [name, *lines, ""]


def summary_of_findings(results):
    """The verdicts, a line each."""
    lines = [f"{verdict}: {sentence}: {words}" for sentence, words, verdict in results["findings"]]
    return [FINDINGS, *lines] if lines else []


# The report ---------------------------------------------------------------------------------------
def cell(value, sign=""):
    """An estimate as text; sign "+": of a difference, where * marks an interval without zero."""
    if value is None:
        return ""
    mean, low, high = value
    if not sign:
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return signed(value) + (" *" if low > 0 or high < 0 else "")


def cells(values, sign=""):
    """`cell` of each."""
    return [cell(value, sign) for value in values]


def report(results):
    """The sections that have rows: Tables 1 and 2 and the verdicts, then what goes beyond them."""
    sections = [
        table1(results),
        differences(results),
        table2(results),
        verdicts(results, "The 10 points are our threshold; the paper's fall is 31."),
        turns(results),
        traces(results),
        strata(results),
        ablations(results),
    ]
    return [section for section in sections if section[-1]]


def table1(results):
    """A row per method and way to choose a box."""
    made = f"{results['n']} test samples, T = {results['steps']}"
    if "model" in results:  # of other systems' boxes nothing is known
        made += f", greedy, seed {results['seed']}, model {results['model']}"
        made += f", feedback {results['feedback']}, guard {results['guard']}"
    rows = []
    for name, ways in results["table1"].items():
        rows += [[name, way, *cells(row.values())] for way, row in ways.items()]
    return "Table 1", f"{made}. {INTERVALS} {CHOICE}", ("Method", "box", *METRICS), rows


def differences(results):
    rows = []
    for name, ways in results["differences"].items():
        gains = results["table2"].get(name, {}).get("gains", {})
        for way, row in ways.items():
            rows.append([name, way, *cells(row.values(), "+"), cell(gains.get(way), "+")])
    text = (
        f"Agreement: the first box whose IoU with the one before is above {AGREEMENT}; confidence: "
        "the box with the highest mean log-probability; own trace: the box before the first trace "
        "that keeps it."
    )
    head = ("Method", "box", *METRICS, "mean IoU, from its own step 0")
    return "Table 1, differences from the first row, paired", text, head, rows


def table2(results):
    """A row of another system may have fewer steps; its cells stay empty."""
    steps = results["steps"]
    head = ["Method", *(f"step {t}" for t in range(steps + 1))]
    head += ["delta", "improved", "stagnated", "degraded", "repeats", "valid", "cost"]
    rows = []
    for name, row in results["table2"].items():
        ious = cells(row["iou"])
        ious += [""] * (steps + 1 - len(ious))
        shares = cells(row[key] for key in ("improved", "stagnated", "degraded", "repeats"))
        valid = " / ".join(f"{mean:.3f}" for mean, _, _ in row["valid"])
        cost = f"{row['cost']:.2f}" if "cost" in row else ""
        rows.append([name, *ious, cell(row["delta"], "+"), *shares, valid, cost])
    text = (
        "Mean IoU per step; change from first to last; share that improves, stagnates or degrades "
        f"(by more than {SAME}); share whose boxes all repeat step 0; valid boxes per step; tokens "
        "through the model, relative to its step 0 alone."
    )
    return "Table 2", text, head, rows


def verdicts(results, more=""):
    rows = [[f"{verdict}: {sentence}", words] for sentence, words, verdict in results["findings"]]
    text = f"{VERDICTS} {more}".strip()
    return FINDINGS, text, ("finding", "differences"), rows


def turns(results):
    """What is corrected, and what is spoilt, from the first to the last step."""
    rows = []
    for name, row in results["table2"].items():
        wrong, corrected, right, spoilt, change = row["turns"].values()
        rows.append([name, wrong, cell(corrected), right, cell(spoilt), cell(change, "+")])
    text = (
        "Right: IoU 0.5 or more. ECR: share of the wrong at step 0 that the last step corrects; "
        "EIR: share of the right that it spoils. Acc@0.5 changes by (1 - Acc) ECR - Acc EIR."
    )
    head = ("Method", "wrong at step 0", "ECR", "right at step 0", "EIR", "change of Acc@0.5")
    return "The second look", text, head, rows


def traces(results):
    """What the traces say of which boxes."""
    rows = []
    for name, row in results["table2"].items():
        for step, truth in enumerate(row.get("traces", []), 1):
            for box, said in truth["boxes"].items():
                accuracy = cell(truth["balanced"]) if box == "any" else ""
                shares = cells(said[claim] for claim in CLAIMS)
                rows.append([name, step, box, said["n"], *shares, accuracy])
    text = (
        "Of the boxes that a step was shown, on a wrong object (IoU 0), right (IoU 0.5 and more) "
        "and in between, the share whose trace says each of three things. Balanced accuracy: the "
        "share that says what the geometry says, the three weighing alike; chance is 1/3."
    )
    head = ("Method", "step", "the box is", "n", *(f'says "{claim}"' for claim in CLAIMS))
    return "Does the trace tell the truth", text, (*head, "balanced accuracy"), rows


def strata(results):
    """The strata of the row that is shown."""
    shown = results["shown"]
    rows = []
    for name, row in results["table2"].get(shown, {}).get("strata", {}).items():
        shares = cells([row["improved"], row["degraded"]])
        rows.append([name, row["n"], *first_and_last(row), *shares])
    head = ("stratum", "n", "step 0", f"step {results['steps']}", "delta", "improved", "degraded")
    text = "By step-0 IoU, some of the change is chance: what was unluckily low can only rise."
    return f"Strata of {shown}", text, head, rows


def ablations(results):
    rows = []
    for name, row in results["ablations"].items():
        rows.append([name, *first_and_last(row), cell(row["against"], "+")])
    text = (
        "The same model is shown something else. Against its own: the last step minus that of the "
        "same model that is shown its own boxes, paired."
    )
    head = ("Row", "step 0", f"step {results['steps']}", "delta", "against its own")
    return "Ablations", text, head, rows


def first_and_last(row):
    """The cells of the IoU at both ends, and of its change."""
    return [cell(row["first"]), cell(row["last"]), cell(row["delta"], "+")]
