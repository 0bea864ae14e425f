"""The results of an evaluation, put together, and their report: for the terminal, in Markdown
(results.md), and for the page.

A report is a list of sections: (name, text, head, rows), a table and what stands over it.
"""

import json
from pathlib import Path

from support.report import second_look, statistics
from support.report.claims import CLAIMS
from support.report.second_look import AGREEMENT
from support.report.statistics import METRICS, signed
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


def results_of(samples, lines_of, steps):
    """The numbers of any rows (rows.Row) on their lines, as results.json holds them."""
    return {
        "n": len(samples),
        "steps": steps,
        **statistics.analyse(samples, lines_of, steps),
        "second_look": second_look.analyse(samples, lines_of, steps),
        "ablations": {},
    }


def results_of_run(args, samples, lines_of, others):
    """All that results.json holds of an evaluation. others: as of `statistics.ablations`."""
    results = results_of(samples, lines_of, args.steps)
    results |= {"seed": args.seed, "model": Path(args.model).name}
    results |= {"feedback": args.feedback, "guard": args.guard}
    if (args.feedback, args.guard) != ("overlay", "off"):
        results["findings"] = []  # the paper's are about its own loop
    results["ablations"] = statistics.ablations(samples, args.steps, lines_of, others)
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


# The terminal -------------------------------------------------------------------------------------
def summary(results):
    """Tables 1 and 2 and the verdicts, without intervals."""
    width = max(map(len, results["table1"])) + 2
    lines = [
        f"{results['n']} test samples, T = {results['steps']}",
        "",
        *summary_of_table1(results, width),
        "",
        *summary_of_table2(results, width),
        "",
        *summary_of_findings(results),
    ]
    return "\n".join(lines)


def summary_of_table1(results, width):
    """A line per row, with the four metrics of three choices of a box."""
    ways = ("best of steps", "last step", "first step")
    head = " " * width + "".join(f"{way:26}" for way in ways)
    lines = ["Table 1: Acc@0.5, @0.7, @0.9, mean IoU", head.rstrip()]
    for name, row in results["table1"].items():
        line = f"{name:{width}}"
        for way in ways:
            if way == "best of steps" and "its only box" in row:
                way = "its only box"
            line += f"{means(row.get(way, {}).values()):26}"
        lines.append(line.rstrip())
    return lines


def means(estimates):
    """The means of some estimates, as text."""
    return " ".join(f"{mean:.3f}" for mean, _, _ in estimates)


def summary_of_table2(results, width):
    """A line per row: IoU per step, change, shares, valid boxes."""
    steps = results["steps"]
    lines = [
        f"Table 2: mean IoU of steps 0 to {steps}, change, improved / stagnated / degraded, "
        "valid boxes per step"
    ]
    for name, row in results["table2"].items():
        shares = [f"{100 * row[key][0]:.0f}%" for key in ("improved", "stagnated", "degraded")]
        parts = [means(row["iou"][: steps + 1]), f"{row['delta'][0]:+.3f}", " / ".join(shares)]
        lines.append(f"{name:{width}}{'  '.join([*parts, means(row['valid'])])}")
    return lines


def summary_of_findings(results):
    """The verdicts, a line each."""
    if not results["findings"]:
        return []
    lines = [f"{verdict}: {sentence}: {words}" for sentence, words, verdict in results["findings"]]
    return ["The paper's findings here", *lines]


# The report ---------------------------------------------------------------------------------------
def cell(value, sign=""):
    """An estimate as text, "" for None. With sign "+" it is a difference, and * marks an interval
    without zero."""
    if value is None:
        return ""
    if not sign:
        mean, low, high = value
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    _, low, high = value
    return signed(value) + (" *" if low > 0 or high < 0 else "")


def cells(values, sign=""):
    """`cell` of each."""
    return [cell(value, sign) for value in values]


def report(results):
    """The sections that have rows: Tables 1 and 2 and the verdicts first, then what goes beyond
    them."""
    made = f"{results['n']} test samples, T = {results['steps']}"
    if "model" in results:  # of other systems' boxes nothing is known
        made += f", greedy, seed {results['seed']}, model {results['model']}"
        made += f", feedback {results['feedback']}, guard {results['guard']}"
    first, *others = results["differences"].items()
    sections = [
        table1("Table 1", f"{made}. {INTERVALS} {CHOICE}", results["table1"].items()),
        table1("Table 1, differences from the first row, paired", CHOICE, others, "+"),
        sampling(results),
        table2(results),
        verdicts(results, "The 10 points are our threshold; the paper's fall is 31."),
        turns(results),
        rules(results),
        traces(results),
        trace_accuracy(results),
        strata(results),
        ablations(results),
    ]
    return [section for section in sections if section[-1]]


def table1(name, text, methods, sign=""):
    """A row per method and way to choose a box."""
    rows = []
    for method, ways in methods:
        rows += [[method, way, *cells(row.values(), sign)] for way, row in ways.items()]
    return name, text, ("Method", "box", *METRICS), rows


def sampling(results):
    """Whether refining one box gives more than sampling several, with the truth as judge."""
    text = (
        "With the truth as judge. Where the difference, paired, is above zero, a best-of column "
        "rewards having several boxes, not refining one."
    )
    rows = []
    if "sampling" in results:
        name, control, difference = results["sampling"].values()
        best = [results["table1"][row]["best of steps"]["mean IoU"] for row in (control, name)]
        rows = [[control, name, *cells(best), cell(difference, "+")]]
    head = ("samples", "steps", "mean IoU of samples", "mean IoU of steps", "difference")
    return "Best of samples and best of steps", text, head, rows


def table2(results):
    """A row of another system may have fewer steps; its cells stay empty."""
    steps = results["steps"]
    head = ["Method", *(f"step {t}" for t in range(steps + 1))]
    head += ["delta", "improved", "stagnated", "degraded", "repeats", "valid", "cost"]
    rows = []
    for name, row in results["table2"].items():
        ious = cells(row["iou"][: steps + 1])
        ious += [""] * (steps + 1 - len(ious))
        shares = cells(row[key] for key in ("improved", "stagnated", "degraded", "repeats"))
        valid = " / ".join(f"{mean:.3f}" for mean, _, _ in row["valid"])
        cost = f"{row['cost']:.2f}" if "cost" in row else ""
        rows.append([name, *ious, cell(row["delta"], "+"), *shares, valid, cost])
    text = (
        "Mean IoU per step; change from first to last; share that improves, stagnates or degrades "
        "(by more than 0.01); share whose boxes all repeat step 0; valid boxes per step; tokens "
        "through the model, relative to its step 0 alone."
    )
    return "Table 2", text, head, rows


def verdicts(results, more=""):
    rows = [[f"{verdict}: {sentence}", words] for sentence, words, verdict in results["findings"]]
    text = f"{VERDICTS} {more}".strip()
    return "The paper's findings here", text, ("finding", "differences"), rows


def turns(results):
    """What is corrected, and what is spoilt, from the first to the last step."""
    rows = []
    for name, look in results["second_look"].items():
        row = look["turns"]
        counts = [row[f"{a}, {b}"] for a in ("right", "wrong") for b in ("right", "wrong")]
        odds = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("ratio", "needed")]
        rates = cells([row["ECR"], row["EIR"]])
        rows.append([name, *counts, *rates, *odds, cell(row["change"], "+")])
    head = ("Method", "stays right", "right -> wrong", "wrong -> right", "stays wrong")
    head += ("ECR", "EIR", "ECR / EIR", "Acc / (1 - Acc)", "change of Acc@0.5")
    text = (
        "Right and wrong at IoU 0.5, first and last step. ECR: share of the wrong that is "
        "corrected; EIR: share of the right that is spoilt. A loop gains only if ECR / EIR > Acc / "
        "(1 - Acc), with Acc@0.5 of step 0."
    )
    return "The second look", text, head, rows


def rules(results):
    """What the rules that choose a step are worth."""
    rows = []
    for name, look in results["second_look"].items():
        for rule, row in look["rules"].items():
            gains = cells(row["gain"].values(), "+")
            rows.append([name, rule, cell(row["mean IoU"]), *gains])
    head = ("Method", "rule", "mean IoU", *(f"{metric}, change" for metric in second_look.GAINS))
    text = (
        "Changes are from stopping at step 0, paired. Agreement: the first box whose IoU with the "
        f"one before is above {AGREEMENT}; confidence: the box with the highest mean "
        "log-probability of its tokens; own trace: the box before the first trace that keeps it. "
        "The best of steps takes the truth."
    )
    return "Choosing a step without the truth", text, head, rows


def traces(results):
    """What the traces say of which boxes."""
    rows = []
    for name, look in results["second_look"].items():
        for truth in look.get("traces", []):
            for box, row in truth["boxes"].items():
                shares = cells(row[claim] for claim in CLAIMS)
                rows.append([name, truth["step"], box, row["n"], *shares])
    text = (
        "Of the boxes that a step was shown, on a wrong object (IoU 0), right (IoU 0.5 and more) "
        "and in between, the share whose trace says each of three things."
    )
    head = ("Method", "step", "the box is", "n", *(f'says "{claim}"' for claim in CLAIMS))
    return "Does the trace tell the truth", text, head, rows


def trace_accuracy(results):
    rows = []
    for name, look in results["second_look"].items():
        for row in look.get("traces", []):
            accuracy = [cell(row["balanced"]), f"{row['chance']:.3f}"]
            rows.append([name, row["step"], row["different"], *accuracy])
    text = "Balanced accuracy: the share that does, each of the three things weighing alike."
    head = ("Method", "step", "different traces", "balanced accuracy", "chance")
    return "Do traces say what the geometry says", text, head, rows


def strata(results):
    """The strata of the row that is shown."""
    shown = results["shown"]
    rows = []
    for group, parts in results["strata"].get(shown, {}).items():
        for stratum, row in parts.items():
            ends = [*cells([row["first"], row["last"]]), cell(row["delta"], "+")]
            shares = cells([row["improved"], row["degraded"]])
            rows.append([group, stratum, row["n"], *ends, *shares])
    last = f"step {results['steps']}"
    head = ("by", "stratum", "n", "step 0", last, "delta", "improved", "degraded")
    text = "By step-0 IoU, some of the change is chance: what was unluckily low can only rise."
    return f"Strata of {shown}", text, head, rows


def ablations(results):
    rows = []
    for name, row in results["ablations"].items():
        ends = [*cells([row["first"], row["last"]]), cell(row["delta"], "+")]
        rows.append([name, *ends, cell(row["against"], "+"), cell(row["Acc@0.5"])])
    text = (
        "The same model is shown something else. Against its own: the last step minus that of the "
        "same model that is shown its own boxes, paired."
    )
    head = ("Row", "step 0", f"step {results['steps']}", "delta", "against its own")
    return "Ablations", text, (*head, "Acc@0.5, last step"), rows
