"""The results of an evaluation, put together, and their report: for the terminal, and in Markdown
(results.md)."""

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
    "**The paper's findings here.** A finding holds when its whole interval lies on the side it "
    "claims, does not hold when the whole interval lies on the other side, and is not settled in "
    "between."
)
THRESHOLD = "The 10 points are our threshold; the paper's fall is 31."


def results_of(samples, lines_of, steps):
    """The numbers of any rows (rows.Row) on their lines, as results.json holds them."""
    return {
        "n": len(samples),
        "steps": steps,
        **statistics.analyse(samples, lines_of, steps),
        "second_look": second_look.analyse(samples, lines_of, steps),
        "ablations": {},
    }


def results_of_run(args, samples, rows, lines_of, others):
    """All that results.json holds of an evaluation. rows: all of them, played or not; others: as
    of `statistics.ablations`."""
    results = results_of(samples, lines_of, args.steps)
    results |= {"seed": args.seed, "model": Path(args.model).name}
    results |= {"feedback": args.feedback, "guard": args.guard}
    if (args.feedback, args.guard) != ("overlay", "off"):
        results["findings"] = []  # the paper's are about its own loop
    results["ablations"] = statistics.ablations(samples, args, rows, lines_of, others)
    return results


def write_results(results, folder, words, markdown):
    """Prints a summary; writes results.md and results.json (every number) to the folder."""
    print(f"\n{words}\n")
    write_text(folder / "results.md", markdown)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


# The terminal -------------------------------------------------------------------------------------
def summary(results):
    """Tables 1 and 2, what is corrected and spoilt, and the verdicts, without intervals."""
    width = max(map(len, results["table1"])) + 2
    lines = [
        f"{results['n']} test samples, T = {results['steps']}",
        "",
        *summary_of_table1(results, width),
        "",
        *summary_of_table2(results, width),
        "",
        *summary_of_second_look(results, width),
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


def summary_of_second_look(results, width):
    """What each row corrects and spoils, and whether the traces of the row that is shown tell the
    truth."""
    lines = [
        "The second look: corrected of the wrong, spoilt of the right (IoU 0.5); ECR / EIR, needed"
    ]
    for name, look in results["second_look"].items():
        turns = look["turns"]
        corrected, spoilt = turns["wrong, right"], turns["right, wrong"]
        counts = f"{corrected} of {corrected + turns['wrong, wrong']}, "
        counts += f"{spoilt} of {spoilt + turns['right, right']}"
        lines.append(f"{name:{width}}{counts:24}{odds(turns['ratio'])}, {odds(turns['needed'])}")
    traces = results["second_look"].get(results["shown"], {}).get("traces", [])
    if traces:
        words = "; ".join(f"step {row['step']} {of_chance(row)}" for row in traces)
        lines.append(f"The traces of {results['shown']} say what the geometry says: {words}")
    return lines


def summary_of_findings(results):
    """The verdicts, a line each."""
    if not results["findings"]:
        return []
    lines = [f"{verdict}: {sentence}: {words}" for sentence, words, verdict in results["findings"]]
    return ["The paper's findings here", *lines]


def odds(value):
    """A quotient as text; "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"


def of_chance(truth):
    """With what balanced accuracy the traces of a step say what the geometry says, as text."""
    if truth["balanced"] is None:
        return "no box was shown"
    return f"{cell(truth['balanced'])}, chance {truth['chance']:.3f}"


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


def cells(values, sign=""):
    """`cell` of each."""
    return [cell(value, sign) for value in values]


def section(title, head, rows):
    """A line of explanation over a Markdown table, as lines; none without rows."""
    rows = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not rows:
        return []
    return [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, ""]


def report(results):
    """results.md: Tables 1 and 2 and the verdicts first, then what goes beyond them."""
    made = ""
    if "model" in results:  # of other systems' boxes nothing is known
        made = f", greedy, seed {results['seed']}, model `{results['model']}`"
        if results["feedback"] != "overlay":
            made += f", feedback {results['feedback']}"
        if results["guard"] == "on":
            made += ", guarded"
    first, *others = results["differences"].items()
    title = f"**Table 1, differences from the first row, paired.** {CHOICE}"
    lines = [
        f"{results['n']} test samples, T = {results['steps']}{made}. {INTERVALS}",
        "",
        *table1_lines(f"**Table 1.** {CHOICE}", results["table1"].items()),
        *table1_lines(title, others, "+"),
        *sampling_lines(results),
        *table2_lines(results),
        *finding_lines(results, THRESHOLD),
        *turn_lines(results),
        *rule_lines(results),
        *confidence_lines(results),
        *trace_lines(results),
        *strata_lines(results),
        *adaptive_lines(results),
        *ablation_lines(results),
    ]
    return "\n".join(lines)


def table1_lines(title, methods, sign=""):
    """A row per method and way to choose a box."""
    rows = []
    for name, ways in methods:
        rows += [[name, way, *cells(row.values(), sign)] for way, row in ways.items()]
    return section(title, ("Method", "box", *METRICS), rows)


def sampling_lines(results):
    """Whether refining one box gives more than sampling several, with the truth as judge."""
    if "sampling" not in results:
        return []
    name, control, difference = results["sampling"].values()
    best = [results["table1"][row]["best of steps"]["mean IoU"][0] for row in (control, name)]
    _, low, high = difference
    words = "which of the two is better is not settled"
    if low > 0:
        words = "a best-of column rewards having several boxes, not refining one"
    if high < 0:
        words = "refining one box gives more than sampling several"
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
        ious = cells(row["iou"][: steps + 1])
        ious += [""] * (steps + 1 - len(ious))
        shares = cells(row[key] for key in ("improved", "stagnated", "degraded", "repeats"))
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


def finding_lines(results, threshold):
    """The verdicts as a list; nothing where there are none."""
    if not results["findings"]:
        return []
    _, *verdicts = summary_of_findings(results)
    return [f"{VERDICTS} {threshold}", "", *(f"- {verdict}" for verdict in verdicts), ""]


def turn_lines(results):
    """What is corrected, and what is spoilt, from the first to the last step."""
    rows = []
    for name, look in results["second_look"].items():
        turns = look["turns"]
        counts = [turns[f"{a}, {b}"] for a in ("right", "wrong") for b in ("right", "wrong")]
        quotients = [odds(turns["ratio"]), odds(turns["needed"])]
        rates = cells([turns["ECR"], turns["EIR"]])
        rows.append([name, *counts, *rates, *quotients, cell(turns["change"], "+")])
    head = ("Method", "stays right", "right -> wrong", "wrong -> right", "stays wrong")
    head += ("ECR", "EIR", "ECR / EIR", "Acc / (1 - Acc)", "change of Acc@0.5")
    return section(
        "**The second look**, right and wrong at IoU 0.5, first and last step. ECR: share of the "
        "wrong that is corrected; EIR: share of the right that is spoilt. A loop gains only if "
        "ECR / EIR > Acc / (1 - Acc), with Acc@0.5 of step 0.",
        head,
        rows,
    )


def rule_lines(results):
    """What the rules that choose a step are worth."""
    rows = []
    for name, look in results["second_look"].items():
        for rule, row in look["rules"].items():
            gains = cells(row["gain"].values(), "+")
            rows.append([name, rule, cell(row["mean IoU"]), *gains])
    changes = (f"{metric}, change" for metric in second_look.GAINS)
    return section(
        "**Choosing a step without the truth**; changes are from stopping at step 0, paired. "
        f"Agreement: the first box whose IoU with the one before is above {AGREEMENT}; confidence: "
        "the box with the highest mean log-probability of its tokens; own trace: the box before "
        "the first trace that keeps it. The best of steps takes the truth.",
        ("Method", "rule", "mean IoU", *changes),
        rows,
    )


def confidence_lines(results):
    """How well confidence and IoU go together."""
    looks = results["second_look"].items()
    return section(
        "**Does confidence know?** Pearson's r between the mean log-probability of a box's tokens "
        "and its IoU.",
        ("Method", "step 0", "all steps"),
        [
            [name, *cells(look["confidence"].values())]
            for name, look in looks
            if "confidence" in look
        ],
    )


def trace_lines(results):
    """Whether the traces tell the truth."""
    rows = []
    sentences = []
    for name, look in results["second_look"].items():
        for truth in look.get("traces", []):
            for box, row in truth["boxes"].items():
                shares = cells(row[claim] for claim in CLAIMS)
                rows.append([name, truth["step"], box, row["n"], *shares])
            sentences.append(
                f"- {name}, step {truth['step']}: {truth['different']} different traces. A trace "
                f"says what the geometry says with balanced accuracy {of_chance(truth)}."
            )
    lines = section(
        "**Does the trace tell the truth?** Of the boxes that a step was shown, on a wrong "
        "object (IoU 0), right (IoU 0.5 and more) and in between, the share whose trace says "
        "each of three things.",
        ("Method", "step", "the box is", "n", *(f'says "{claim}"' for claim in CLAIMS)),
        rows,
    )
    return [*lines, *sentences, ""] if rows else []


def strata_lines(results):
    """The strata of the row that is shown."""
    shown = results["shown"]
    rows = []
    for group, parts in results["strata"].get(shown, {}).items():
        for stratum, row in parts.items():
            ends = [*cells([row["first"], row["last"]]), cell(row["delta"], "+")]
            shares = cells([row["improved"], row["degraded"]])
            rows.append([group, stratum, row["n"], *ends, *shares])
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
        scores = cells([row["Acc@0.5"], row["mean IoU"]])
        spent = [f"{row['steps']:.2f}", f"{row['cost']:.2f}"]
        rows.append([stopping(row["threshold"]), row["T"], *scores, *spent])
    lines = section(
        f"**Adaptive refinement** of {shown}: stop when a box agrees with the one before it "
        "(IoU above the threshold), after T steps at most. Cost: tokens through the model, "
        "relative to step 0 alone.",
        ("stop above", "T", "Acc@0.5", "mean IoU", "steps", "cost"),
        rows,
    )
    return [*lines, refining_sentence(settings), ""]


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
    better = sum(any(low > 0 for _, low, _ in row["gain"].values()) for row in refining)
    return (
        f"Of {len(refining)} settings with T >= 1, {better} beat not refining (T = 0) with a "
        "paired interval above zero (of so many, a few would by chance); the best differ from it "
        f"by {' and by '.join(parts)}."
    )


def ablation_lines(results):
    """The ablation table, when there is one."""
    rows = []
    for name, row in results["ablations"].items():
        ends = [*cells([row["first"], row["last"]]), cell(row["delta"], "+")]
        own = [cell(row.get("against"), "+"), *cells([row["repeats"], row["Acc@0.5"]])]
        validation = " -> ".join(f"{iou:.3f}" for iou in row["validation"])
        rows.append([name, *ends, *own, validation])
    head = ("Run", "step 0", f"step {results['steps']}", "delta", "against its own", "repeats")
    return section(
        "**Ablations.** Same test samples. Validation: mean IoU of step 0 at the first and the "
        "last validation of GRPO. Against its own: the last step minus that of the same model that "
        "is shown its own boxes, paired.",
        (*head, "Acc@0.5, last step", "validation, step 0"),
        rows,
    )
