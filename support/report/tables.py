"""The results of an evaluation, put together, and their report: for the terminal, and in Markdown
(results.md)."""

import json
from pathlib import Path

from support.report import second_look, statistics
from support.report.claims import CLAIMS
from support.report.second_look import AGREEMENT
from support.report.statistics import CONTROL, METRICS, main_row, signed
from support.running.files import write_text

CHOICE = "Best of steps, the paper's choice, needs the ground truth; the others do not."
VERDICTS = (
    "A finding holds when its whole interval lies on the side it claims, does not hold when the "
    "whole interval lies on the other side, and is not settled in between. The 10 points are our "
    "threshold; the paper's fall is 31."
)


def results_of(args, samples, lines_of, others, logs):
    """All that results.json holds of an evaluation.

    lines_of: the name of each row -> its lines; others: of the ablations, "row, what is shown";
    logs: name -> the row's log.
    """
    shown = main_row(lines_of)
    results = {"n": len(samples), "seed": args.seed, "steps": args.steps}
    results["model"] = Path(args.model).name
    results |= {"feedback": args.feedback, "guard": args.guard}
    results |= statistics.analyse(samples, lines_of, args.steps, shown, CONTROL)
    if (args.feedback, args.guard) != ("overlay", "off"):
        results["findings"] = []  # the paper's are about its own loop
    results["second_look"] = second_look.analyse(samples, lines_of, args.steps)
    results["ablations"] = statistics.ablations(samples, args, lines_of, others, logs)
    return results


def write_results(results, folder):
    """Prints the summary; writes results.md and results.json (every number) to the folder."""
    print(f"\n{results['n']} test samples, T = {results['steps']}\n\n{summary(results)}\n")
    write_text(folder / "results.md", report(results))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


# The terminal -------------------------------------------------------------------------------------
def summary(results):
    """Tables 1 and 2 and the verdicts, without intervals."""
    width = max(map(len, results["table1"])) + 2
    lines = [*summary_of_table1(results, width), "", *summary_of_table2(results, width), ""]
    lines += summary_of_second_look(results, width)
    if results["findings"]:
        lines.append("The paper's findings here (of the first, the 10 points are our threshold)")
    lines += [
        f"{verdict}: {sentence}: {numbers}" for sentence, numbers, verdict in results["findings"]
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
            line += f"{means(row.get(way, {})):26}"
        lines.append(line.rstrip())
    return lines


def means(estimates):
    """The means of a dict of estimates, as text."""
    return " ".join(f"{mean:.3f}" for mean, _, _ in estimates.values())


def summary_of_second_look(results, width):
    """What each row corrects and spoils; of the row that is shown, the rules that choose a step and
    whether its traces tell the truth."""
    looks = results["second_look"]
    if not looks:
        return []
    lines = [
        "The second look: corrected of the wrong, spoilt of the right (IoU 0.5); ECR / EIR, needed"
    ]
    for name, look in looks.items():
        turns = look["turns"]
        counts = f"{of_wrong(turns)}, {of_right(turns)}"
        lines.append(f"{name:{width}}{counts:24}{odds(turns['ratio'])}, {odds(turns['needed'])}")
    look = looks.get(results["shown"])
    if not look:
        return [*lines, ""]
    lines += ["", f"{results['shown']}: a step chosen without the truth, mean IoU against step 0"]
    for rule, row in look["rules"].items():
        words = "best of steps (takes the truth)" if rule == "best of steps" else rule
        lines.append(f"{words:{width}}{row['mean IoU'][0]:.3f}  {signed(row['gain']['mean IoU'])}")
    if "traces" in look:
        accuracies = [f"step {row['step']} {of_chance(row)}" for row in look["traces"]]
        lines.append(f"Its traces say what the geometry says: {'; '.join(accuracies)}")
    return [*lines, ""]


def of_wrong(turns):
    """How many of those that are wrong at step 0 end right."""
    return f"{turns['wrong, right']} of {turns['wrong, right'] + turns['wrong, wrong']}"


def of_right(turns):
    """How many of those that are right at step 0 end wrong."""
    return f"{turns['right, wrong']} of {turns['right, right'] + turns['right, wrong']}"


def odds(value):
    """A quotient as text; "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"


def of_chance(truth):
    """With what balanced accuracy the traces of a step say what the geometry says, as text."""
    if truth["balanced"] is None:
        return "no box was shown"
    return f"{cell(truth['balanced'])}, chance {truth['chance']:.3f}"


def summary_of_table2(results, width):
    """A line per row: IoU per step, change, shares, valid boxes."""
    steps = results["steps"]
    lines = [
        f"Table 2: mean IoU of steps 0 to {steps}, change, improved / stagnated / degraded, "
        "valid boxes per step"
    ]
    for name, row in results["table2"].items():
        ious = " ".join(f"{mean:.3f}" for mean, _, _ in row["iou"][: steps + 1])
        shares = [f"{100 * row[key][0]:.0f}%" for key in ("improved", "stagnated", "degraded")]
        valid = " ".join(f"{mean:.3f}" for mean, _, _ in row["valid"])
        change = row["delta"][0]
        lines.append(f"{name:{width}}{ious}  {change:+.3f}  {' / '.join(shares)}  {valid}")
    return lines


# Markdown -----------------------------------------------------------------------------------------
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


def table(head, rows):
    """A Markdown table as lines, with an empty one behind it."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def section(title, head, rows):
    """A line of explanation over a table, as lines."""
    return [title, "", *table(head, rows)]


def report(results):
    """results.md: Tables 1 and 2 and the verdicts first, then what goes beyond them."""
    made = ""
    if "model" in results:  # of other systems' boxes nothing is known
        made = f", greedy, seed {results['seed']}, model `{results['model']}`"
        if results["feedback"] != "overlay":
            made += f", feedback {results['feedback']}"
        if results["guard"] == "on":
            made += ", guarded"
    lines = [
        f"{results['n']} test samples, T = {results['steps']}{made}. "
        "[low, high]: 95 percent bootstrap interval over the samples; "
        "*: the interval of a difference excludes zero.",
        "",
        *section(f"**Table 1.** {CHOICE}", ("Method", "box", *METRICS), table1_rows(results)),
        *section(
            f"**Table 1, differences from the first row, paired.** {CHOICE}",
            ("Method", "box", *METRICS),
            difference_rows(results),
        ),
        *sampling_lines(results),
        *table2_lines(results),
        *finding_lines(results),
        *turn_lines(results),
        *rule_lines(results),
        *confidence_lines(results),
        *trace_lines(results),
        *strata_lines(results),
        *adaptive_lines(results),
        *ablation_lines(results),
    ]
    return "\n".join(lines)


def table1_rows(results):
    """Yields a row per method and way to choose a box."""
    for name, ways in results["table1"].items():
        for way, row in ways.items():
            yield name, way, *(cell(row[metric]) for metric in METRICS)


def difference_rows(results):
    """As `table1_rows`, of the differences from the first method."""
    first = next(iter(results["differences"]))
    for name, ways in results["differences"].items():
        if name == first:
            continue
        for way, row in ways.items():
            yield name, way, *(cell(row[metric], "+") for metric in METRICS)


def sampling_lines(results):
    """Whether refining one box gives more than sampling several, with the truth as judge."""
    if "sampling" not in results:
        return []
    name = results["sampling"]["row"]
    control = results["sampling"]["control"]
    difference = results["sampling"]["difference"]
    best = [results["table1"][row]["best of steps"]["mean IoU"][0] for row in (control, name)]
    _, low, high = difference
    if low > 0:
        words = "a best-of column rewards having several boxes, not refining one"
    elif high < 0:
        words = "refining one box gives more than sampling several"
    else:
        words = "which of the two is better is not settled"
    return [
        f"With the truth as judge, {results['steps'] + 1} sampled single-shot answers of the "
        f"base reach mean IoU {best[0]:.3f} and {name} {best[1]:.3f} (difference "
        f"{signed(difference)}, paired): {words}.",
        "",
    ]


def table2_lines(results):
    """Table 2 as lines. A row of another system may have fewer steps; its cells stay empty."""
    steps = results["steps"]
    head = ["Method", *(f"step {t}" for t in range(steps + 1))]
    head += ["delta", "improved", "stagnated", "degraded", "repeats", "valid", "cost"]
    rows = []
    for name, row in results["table2"].items():
        ious = [cell(value) for value in row["iou"][: steps + 1]]
        ious += [""] * (steps + 1 - len(ious))
        shares = [cell(row[key]) for key in ("improved", "stagnated", "degraded", "repeats")]
        valid = " / ".join(f"{mean:.3f}" for mean, _, _ in row["valid"])
        cost = f"{row['cost']:.2f}" if "cost" in row else ""
        rows.append([name, *ious, cell(row["delta"], "+"), *shares, valid, cost])
    return section(
        "**Table 2.** Mean IoU per step; change from first to last; share that improves, stagnates "
        "or degrades (by more than 0.01); share whose boxes all repeat step 0; valid boxes per "
        "step; tokens through the model, relative to its step 0 alone.",
        head,
        rows,
    )


def finding_lines(results):
    """The verdicts as a list; nothing where there are none."""
    if not results["findings"]:
        return []
    lines = [f"**The paper's findings here.** {VERDICTS}", ""]
    for sentence, numbers, verdict in results["findings"]:
        lines.append(f"- {verdict}: {sentence}: {numbers}")
    return [*lines, ""]


def turn_lines(results):
    """What is corrected, and what is spoilt, from the first to the last step."""
    rows = []
    sentences = []
    for name, look in results["second_look"].items():
        turns = look["turns"]
        counts = [turns[f"{a}, {b}"] for a in ("right", "wrong") for b in ("right", "wrong")]
        rates = [cell(turns["ECR"]), cell(turns["EIR"])]
        quotients = [odds(turns["ratio"]), odds(turns["needed"])]
        rows.append([name, *counts, *rates, *quotients, cell(turns["change"], "+")])
        sentences.append(
            f"- {name}: {of_wrong(turns)} wrong boxes are corrected and {of_right(turns)} right "
            f"ones spoilt; ECR / EIR is {quotients[0]}, and a gain needs more than {quotients[1]}."
        )
    if not rows:
        return []
    head = ("Method", "stays right", "right -> wrong", "wrong -> right", "stays wrong")
    head += ("ECR", "EIR", "ECR / EIR", "Acc / (1 - Acc)", "change of Acc@0.5")
    return [
        *section(
            "**The second look**, right and wrong at IoU 0.5, first and last step. ECR: share of "
            "the wrong that is corrected; EIR: share of the right that is spoilt. A loop gains "
            "only if ECR / EIR > Acc / (1 - Acc), with Acc@0.5 of step 0.",
            head,
            rows,
        ),
        *sentences,
        "",
    ]


def rule_lines(results):
    """Rules that choose a step."""
    rows = []
    for name, look in results["second_look"].items():
        for rule, row in look["rules"].items():
            gains = [cell(gain, "+") for gain in row["gain"].values()]
            rows.append([name, rule, cell(row["mean IoU"]), *gains])
    if not rows:
        return []
    return section(
        "**Choosing a step without the truth**; changes are from stopping at step 0, paired. "
        f"Agreement: the first box whose IoU with the one before is above {AGREEMENT}; confidence: "
        "the box with the highest mean log-probability of its tokens; own trace: the box before "
        "the first trace that keeps it. The best of steps takes the truth.",
        ("Method", "rule", "mean IoU", *(f"{metric}, change" for metric in row["gain"])),
        rows,
    )


def confidence_lines(results):
    """How well confidence and IoU go together."""
    rows = []
    for name, look in results["second_look"].items():
        if "confidence" in look:
            rows.append([name, *map(cell, look["confidence"].values())])
    if not rows:
        return []
    return section(
        "**Does confidence know?** Pearson's r between the mean log-probability of a box's tokens "
        "and its IoU.",
        ("Method", "step 0", "all steps"),
        rows,
    )


def trace_lines(results):
    """Whether the traces tell the truth."""
    rows = []
    sentences = []
    for name, look in results["second_look"].items():
        for truth in look.get("traces", []):
            for box, row in truth["boxes"].items():
                shares = [cell(row[claim]) for claim in CLAIMS]
                rows.append([name, truth["step"], box, row["n"], *shares])
            sentences.append(
                f"- {name}, step {truth['step']}: {truth['different']} different traces. A trace "
                f"says what the geometry says with balanced accuracy {of_chance(truth)}."
            )
    if not rows:
        return []
    return [
        *section(
            "**Does the trace tell the truth?** Of the boxes that a step was shown, on a wrong "
            "object (IoU 0), right (IoU 0.5 and more) and in between, the share whose trace says "
            "each of three things.",
            ("Method", "step", "the box is", "n", *(f'says "{claim}"' for claim in CLAIMS)),
            rows,
        ),
        *sentences,
        "",
    ]


def strata_lines(results):
    """The strata of the row that is shown."""
    shown = results["shown"]
    rows = []
    for group, parts in results["strata"].get(shown, {}).items():
        for stratum, row in parts.items():
            ends = [cell(row["first"]), cell(row["last"]), cell(row["delta"], "+")]
            shares = [cell(row["improved"]), cell(row["degraded"])]
            rows.append([group, stratum, row["n"], *ends, *shares])
    if not rows:
        return []
    last = f"step {results['steps']}"
    return section(
        f"**Strata** of {shown}. By step-0 IoU, some of the change is chance: what was unluckily "
        "low can only rise.",
        ("by", "stratum", "n", "step 0", last, "delta", "improved", "degraded"),
        rows,
    )


def adaptive_lines(results):
    """Adaptive refinement of the row that is shown: all T without stopping, and with each threshold
    the T of the tables and the longest."""
    shown = results["shown"]
    settings = results["adaptive"].get(shown)
    if not settings:
        return []
    rows = []
    for row in settings:
        if row["threshold"] < 1 and row["T"] not in (results["steps"], settings[-1]["T"]):
            continue
        scores = [cell(row["Acc@0.5"]), cell(row["mean IoU"])]
        spent = [f"{row['steps']:.2f}", f"{row['cost']:.2f}"]
        rows.append([stopping(row["threshold"]), row["T"], *scores, *spent])
    return [
        *section(
            f"**Adaptive refinement** of {shown}: stop when a box agrees with the one before it "
            "(IoU above the threshold), after T steps at most. Cost: tokens through the model, "
            "relative to step 0 alone.",
            ("stop above", "T", "Acc@0.5", "mean IoU", "steps", "cost"),
            rows,
        ),
        refining_sentence(settings),
        "",
    ]


def stopping(threshold):
    """A threshold in words; 1 is never reached."""
    return "never" if threshold == 1 else threshold


def refining_sentence(settings):
    """Whether any setting that refines (T >= 1) has a higher Acc@0.5 or mean IoU than T = 0."""
    refining = [row for row in settings if row["T"] > 0]
    parts = []
    for metric in ("Acc@0.5", "mean IoU"):
        best = max(refining, key=lambda row: row["gain"][metric][0])
        setting = f"stop above {stopping(best['threshold'])}, T = {best['T']}"
        parts.append(f"{signed(best['gain'][metric])} in {metric} ({setting})")
    best = f"the best differ from it by {' and by '.join(parts)}"
    better = sum(any(low > 0 for _, low, _ in row["gain"].values()) for row in refining)
    if not better:
        return (
            "Nothing here beats not refining (T = 0) with a paired interval above zero: of "
            f"{len(refining)} settings with T >= 1, {best}."
        )
    return (
        f"{better} of {len(refining)} settings with T >= 1 beat not refining (T = 0) with a paired "
        f"interval above zero (of so many, a few do so by chance): {best}."
    )


def ablation_lines(results):
    """The ablation table, when there is one."""
    if not results.get("ablations"):
        return []
    rows = []
    for name, row in results["ablations"].items():
        ends = [cell(row["first"]), cell(row["last"]), cell(row["delta"], "+")]
        validation = " -> ".join(f"{iou:.3f}" for iou in row["validation"])
        against = cell(row["against"], "+") if "against" in row else ""
        own = [cell(row["repeats"]), cell(row["Acc@0.5"]), validation]
        rows.append([name, *ends, against, *own])
    last = f"step {results['steps']}"
    title = (
        "**Ablations.** Same test samples. Validation: mean IoU of step 0 at the first and the "
        "last validation of GRPO. Against its own: the last step minus that of the same model that "
        "is shown its own boxes, paired."
    )
    head = ["Run", "step 0", last, "delta", "against its own", "repeats", "Acc@0.5, last step"]
    return section(title, [*head, "validation, step 0"], rows)
