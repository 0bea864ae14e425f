"""The numbers of VisRL's evaluation, what they say about the paper's findings, tables, the page.

S samples. An estimate is [mean, low, high], a mean over samples with its 95 percent bootstrap
interval; differences between rows are paired.
"""

from common import box_iou, format_box, normalize_box
from support.report import tables
from support.report.page import chart, group, log_curves, write_page
from support.report.rows import Row
from support.report.statistics import estimate, judged, resamples
from support.report.tables import cells
from support.running.files import read_jsonl
from visrl.loop import crop_bbox

import numpy as np

BASE = "Base, no box"
BASE_BOX = "Base, box (no training)"
SFT = "SFT"
RL1 = "SFT + RL1"
RL2 = "SFT + RL1 + RL2"
ONLY = "SFT + RL2 only"
PLAIN = "Plain DPO, no box"
CONTROLS = {"true": "the true box", "random": "a random box", "whole": "the whole image"}
DIFFERENCES = (  # (row, the row it is compared with)
    (BASE_BOX, BASE),
    (SFT, BASE),
    (RL1, SFT),
    (RL2, RL1),
    (RL2, SFT),
    (ONLY, SFT),
    (RL2, ONLY),
    (PLAIN, BASE),
    (RL2, PLAIN),
)
RAISED = {  # a finding about answers -> the differences that lie above zero if it holds
    "In answers SFT < SFT + RL1 < SFT + RL1 + RL2": ((RL1, SFT), (RL2, RL1)),
    "The whole training raises answers over SFT": ((RL2, SFT),),
    "RL2 only lies between SFT and both stages, in answers": ((ONLY, SFT), (RL2, ONLY)),
    "Looking beats plain DPO on answers": ((RL2, PLAIN),),
    "A second iteration raises answers (Figure 4)": ((f"{RL2}, iteration 2", RL2),),
}
NEAR = 0.02  # SFT is "near" the base up to here; the paper names no threshold
PARTS = {  # --ablation -> its name in Table 6
    "no_controller": "without the diversity controller",
    "no_box_critic": "without the box critic",
    "sft_critic": "the SFT model as critic",
}
WHOLE = "the whole pipeline"


def control_name(name, kind):
    return f"{name}, shown {CONTROLS[kind]}"


def train_samples(data):
    return {row["id"]: row for row in read_jsonl(data / "train.jsonl", "python -m visrl.make_data")}


# Pairs (Table 6) ----------------------------------------------------------------------------------
def read_pairs(data):
    """name -> [pairs, 2] bool, whether the chosen and the rejected box are right (IoU > 0.5), of
    all files of pairs in the folder; {} when the training samples have no boxes to judge by."""
    train = train_samples(data)
    if not all("bbox" in sample for sample in train.values()):
        return {}
    found = {}
    for path in sorted(data.glob("pairs*.jsonl"), key=lambda path: (len(path.stem), path.stem)):
        name = pairs_name(path.stem.removeprefix("pairs").strip("_"))
        rows = []
        for pair in read_jsonl(path, ""):
            sample = train.get(pair["id"])
            sides = [pair[side]["box"] for side in ("chosen", "rejected")]
            if sample:
                rows.append([box_iou(box, sample) > 0.5 for box in sides])
        if rows:
            found[name] = np.array(rows)
    return found


def pairs_name(suffix):
    """What the end of a file's name says: "", "2", "no_controller", "no_controller_2"."""
    part, _, number = suffix.rpartition("_")
    if not number.isdigit():
        part, number = suffix, ""
    name = PARTS.get(part, part) or WHOLE
    return f"{name}, iteration {number}" if number else name


def pair_shares(right):
    """[pairs, 2] bool -> {"n", and an estimate of the share of each of Table 6's four kinds}."""
    chosen, rejected = right.T
    kinds = {
        "WP-LP": chosen & rejected,
        "WP-LN": chosen & ~rejected,
        "WN-LP": ~chosen & rejected,
        "WN-LN": ~chosen & ~rejected,
    }
    return {"n": len(right), **{kind: estimate(values) for kind, values in kinds.items()}}


def unpaired(a, b):
    """An estimate of mean(a) - mean(b) of two samples that have nothing to do with each other."""
    means = []
    for values in (a, b):
        means.append(resamples(len(values)) @ np.asarray(values, np.float32))
    # One of them backwards: with as many values both would get the same draws
    low, high = np.percentile(means[0] - means[1][::-1], (2.5, 97.5))
    return [round(float(v), 6) for v in (np.mean(a) - np.mean(b), low, high)]


# All numbers --------------------------------------------------------------------------------------
def analyse(samples, lines_of, pairs):
    """Everything that results.json holds, of name -> the lines of its log and name -> the right
    boxes of its pairs."""
    sources = np.array([sample["source"] for sample in samples])
    right = {}
    hit = {}  # of rows with boxes of their own, where the samples have true ones
    for name, lines in lines_of.items():
        right[name] = np.array([line["right"] for line in lines], float)
        ious = [line.get("iou") for line in lines]
        if None not in ious and " shown " not in name:
            hit[name] = (np.array(ious) > 0.5).astype(float)
    groups = {"all": np.full(len(samples), True)}
    groups |= {source: sources == source for source in sorted(set(sources.tolist()))}

    def by_source(values):
        return {group: estimate(values[mask]) for group, mask in groups.items()}

    results = {"answers": {name: by_source(values) for name, values in right.items()}}
    results["boxes"] = {name: by_source(values) for name, values in hit.items()}
    results["differences"] = []
    compared = [pair for pair in DIFFERENCES if all(name in right for name in pair)]
    compared += [(name, RL2) for name in right if RL2 in right and " shown " in name]
    for name, other in compared:
        row = {"row": name, "against": other, "answers": by_source(right[name] - right[other])}
        if name in hit and other in hit:
            row["boxes"] = by_source(hit[name] - hit[other])
        results["differences"].append(row)
    results["pairs"] = {name: pair_shares(boxes) for name, boxes in pairs.items()}
    results["findings"] = findings(right, hit, groups, pairs)
    return results


def findings(right, hit, groups, pairs):
    """The paper's findings as hypotheses on these rows: a list of `judged`."""
    found = []
    if SFT in right and BASE in right:
        change = right[SFT] - right[BASE]
        each = {name: estimate(change[mask]) for name, mask in groups.items() if name != "all"}
        source = min(each, key=lambda name: each[name][0])
        sentence = "SFT answers less, or hardly more, than the base without a box on some source"
        sentence += f" (at most {NEAR} more; {source})"
        found.append(judged(sentence, [each[source]], below=NEAR))
    if RL1 in hit and SFT in hit:
        sentence = "RL1 raises box accuracy, without boxes"
        found.append(judged(sentence, [estimate(hit[RL1] - hit[SFT])], above=0))
    for sentence, compared in RAISED.items():
        if all(row in right and other in right for row, other in compared):
            changes = [estimate(right[row] - right[other]) for row, other in compared]
            found.append(judged(sentence, changes, above=0))
    for part in PARTS.values():
        if WHOLE in pairs and part in pairs:
            whole, other = (boxes[:, 0] & ~boxes[:, 1] for boxes in (pairs[WHOLE], pairs[part]))
            sentence = f"The pipeline has more right pairs (WP-LN) than {part}"
            found.append(judged(sentence, [unpaired(whole, other)], above=0))
    return found


# Tables -------------------------------------------------------------------------------------------
def write(results, folder):
    """Prints the summary; writes results.md and results.json (every number) to the folder."""
    tables.write_results(results, folder, summary(results), sections(results))


def summary(results):
    """Answers and boxes of each row and the verdicts, without intervals."""
    width = max(map(len, results["answers"])) + 2
    sources = " / ".join(next(iter(results["answers"].values())))
    lines = [f"{results['n']} test samples", ""]
    lines.append(f"Right answers, and right boxes (IoU > 0.5): {sources}")
    for name, row in results["answers"].items():
        line = f"{name:{width}}{tables.means(row.values())}"
        if name in results["boxes"]:
            line += f"   boxes {tables.means(results['boxes'][name].values())}"
        lines.append(line)
    return "\n".join([*lines, "", *tables.summary_of_findings(results)])


def sections(results):
    """As of tables.report: answers, boxes, differences, pairs, verdicts."""
    groups = list(next(iter(results["answers"].values())))
    made = f"{results['n']} test samples, greedy, seed {results['seed']}, model {results['model']}."
    found = []
    for name, key in (("Right answers", "answers"), ("Right boxes, IoU > 0.5", "boxes")):
        rows = [[row, *cells(values.values())] for row, values in results[key].items()]
        found.append((name, f"{made} {tables.INTERVALS}", ("Row", *groups), rows))
    rows = []
    for row in results["differences"]:
        for what in ("answers", "boxes"):
            if what in row:
                rows.append([row["row"], row["against"], what, *cells(row[what].values(), "+")])
    found.append(("Differences, paired", "", ("Row", "against", "right", *groups), rows))
    kinds = ("WP-LP", "WP-LN", "WN-LP", "WN-LN")
    rows = []
    for name, row in results["pairs"].items():
        rows.append([name, row["n"], *cells(row[kind] for kind in kinds)])
    text = "W, L: the chosen and the rejected box; P, N: right or not."
    found.append(("Pairs (Table 6)", text, ("Pipeline", "pairs", *kinds), rows))
    return [section for section in [*found, tables.verdicts(results)] if section[-1]]


# The page -----------------------------------------------------------------------------------------
def page(args, results, samples, lines_of):
    """report.html of the run: tables, curves, what each row looks at and answers, and the pairs
    with their scores; returns its path."""
    shown = next((name for name in (RL2, RL1, SFT) if name in lines_of), BASE)
    lines = {}
    for name, rows in lines_of.items():
        own = lines[Row(name, drawn=False)] = []
        for sample, line, base in zip(samples, rows, lines_of[BASE]):
            ends = base["right"], line["right"]
            first, last = ("right" if right else "wrong" for right in ends)
            words = {"words": f"{BASE}: {first}; here: {last}", "ends": ends}
            own.append({**page_line(args, sample, line), **words})
    share, base = (results["answers"][name]["all"][0] for name in (shown, BASE))
    return write_page(
        args.out / "report.html",
        title=f"{args.out.name}: of {results['n']} test questions, {shown} (model "
        f"{results['model']}) answers a share of {share:.3f}; {BASE}: {base:.3f}",
        chart=stages_chart(results["answers"]),
        findings=results["findings"],
        tables=sections(results),
        curves=log_curves(args.out / "log"),
        groups=[group("test", samples, lines, 1, shown=shown), *pair_groups(args)],
        data=args.out / "data",
    )


def stages_chart(answers):
    """Right answers after each stage of the training, and iteration (Figure 4): all questions, and
    those of each source."""
    stages = [name for name in answers if name in (BASE, SFT, RL1, RL2) or "iteration" in name]
    series = {}
    for t, name in enumerate(stages):
        for source, value in answers[name].items():
            series.setdefault(source, []).append([t, *value])
    names = "; ".join(f"{t}: {name}" for t, name in enumerate(stages))
    return chart(f"Share of right answers, with 95 percent intervals. {names}", "stage", series)


def page_line(args, sample, line):
    """A line of a log as the page takes it: the box, then the answer to what its crop shows."""
    if "first_text" not in line:
        return {"boxes": [None], "texts": [line["answer"]], "name": ["answer"]}
    size = sample["width"], sample["height"]
    part = crop_bbox(line["box"], *size, square=args.crop == "square")
    return {
        "boxes": [line["box"], None],
        "texts": [line["first_text"], line["answer"]],
        "name": ["box", "answer"],
        "view": [[0, 0, 1000, 1000], normalize_box(part, *size)],
    }


def pair_groups(args):
    """What DPO learnt from in each iteration, chosen beside rejected."""
    train = train_samples(args.out / "data")
    groups = []
    for path in sorted((args.out / "data").glob("pairs*.jsonl")):
        pairs = [pair for pair in read_jsonl(path, "visrl.make_pairs") if pair["id"] in train]
        if not pairs:  # of an earlier run
            continue
        questions = [train[pair["id"]] for pair in pairs]
        lines = {}
        for side in ("chosen", "rejected"):
            own = lines[Row(side, drawn=False)] = []
            for sample, pair in zip(questions, pairs):
                taken = {**pair[side], "first_text": format_box(pair[side]["box"])}
                line = page_line(args, sample, taken)
                box, answer = taken["box_score"], taken["response_score"]
                line["words"] = f"box critic {box:.3g}, answer critic {answer:.3g}"
                own.append(line)
        groups.append(group(path.stem, questions, lines, 1, shown="chosen"))
    return groups
