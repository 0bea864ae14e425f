"""The numbers of VisRL's evaluation, what they say about the paper's findings, tables, the page.

S samples. An estimate is [mean, low, high], a mean over samples with its 95 percent bootstrap
interval; differences between rows are paired. A row is one of evaluate.py, a line one of its log.
"""

from common import WHOLE, box_iou, format_box, normalize_box
from support.data.samples import with_samples
from support.report import tables
from support.report.page import STYLES, chart, group, write_page
from support.report.rows import Row
from support.report.statistics import estimate, judged, main_row, resampled
from support.report.tables import cells
from support.running.files import read_jsonl
from visrl.loop import crop_bbox, is_pair

import numpy as np

BASE = "Base, no box"
BASE_BOX = "Base, box (no training)"
SFT = "SFT"
RL1 = "SFT + RL1"
RL2 = "SFT + RL1 + RL2"
ONLY = "SFT + RL2 only"
PLAIN = "Plain DPO, no box"
DIRECT = {"plain_sft": "SFT on chosen answers, no box", "plain_kto": "KTO, no box"}  # Table 5
MAIN = (RL2, RL1, SFT, BASE)  # the first that is there is shown first, and has controls
FINDINGS = (  # the paper's: in words, of what, and the differences above zero if it holds
    ("RL1 raises box accuracy, without boxes", "boxes", [(RL1, SFT)]),
    ("In answers SFT < SFT + RL1 < SFT + RL1 + RL2", "answers", [(RL1, SFT), (RL2, RL1)]),
    ("The whole training raises answers over SFT", "answers", [(RL2, SFT)]),
    ("In answers SFT < RL2 only < both stages", "answers", [(ONLY, SFT), (RL2, ONLY)]),
    ("Looking beats plain DPO on answers", "answers", [(RL2, PLAIN)]),
    ("A second iteration raises answers (Figure 4)", "answers", [(f"{RL2}, iteration 2", RL2)]),
)
ABOUT = (  # the words of the page
    "No box: one answer to the whole image; else the model names a box, then answers to what its "
    "crop shows. Base: the model untrained; SFT: trained on given boxes and answers; RL1: then by "
    "DPO on better and worse boxes of its own; RL2: and on its answers. IoU: the area that two "
    "boxes share over the area that they cover. [low, high]: 95 percent interval."
)
PARTS = {  # a file of pairs -> what of the pipeline is missing (Table 6)
    "pairs_no_controller": "without the diversity controller",
    "pairs_no_box_critic": "without the box critic",
    "pairs_sft_critic": "with the SFT model as critic",
}


# Pairs (Table 6) ----------------------------------------------------------------------------------
def read_pairs(data):
    """name -> the pairs of data/<name>.jsonl, each with all that its sample says."""
    train = read_jsonl(data / "train.jsonl", "python -m visrl.make_data")
    given = train, "python -m visrl.make_pairs", is_pair
    found = {path.stem: with_samples(path, *given) for path in sorted(data.glob("pairs*.jsonl"))}
    return {name: pairs for name, pairs in found.items() if pairs}  # others are of an earlier run


def right_pairs(pairs):
    """[pairs] bool: whether the chosen box is right (IoU > 0.5) and the rejected one is not."""
    sides = "chosen", "rejected"
    ious = [[box_iou(pair[side]["box"], pair) for side in sides] for pair in pairs]
    return np.array([chosen > 0.5 >= rejected for chosen, rejected in ious])


def unpaired(a, b):
    """An estimate of mean(a) - mean(b) of two samples that have nothing to do with each other."""
    means = [resampled(values.astype(np.float32)) for values in (a, b)]
    # One of them backwards: with as many values both would get the same draws
    low, high = np.percentile(means[0] - means[1][::-1], (2.5, 97.5))
    return [round(float(v), 6) for v in (np.mean(a) - np.mean(b), low, high)]


# All numbers --------------------------------------------------------------------------------------
def analyse(samples, lines_of, pairs):
    """Everything that results.json holds, of row -> its lines and name -> pairs."""
    # Of what -> name of the row -> [S]
    right = {"answers": {}, "boxes": {}, "well-formed": {}, "judge": {}}
    for row, lines in lines_of.items():
        right["answers"][row.name] = np.array([line["right"] for line in lines], float)
        scores = [line.get("score") for line in lines]
        if None not in scores:
            right["judge"][row.name] = np.array(scores, float)
        if "first_text" in lines[0] and row.box == "own":
            right["well-formed"][row.name] = np.array([bool(line["box"]) for line in lines], float)
        ious = [line.get("iou") for line in lines]
        if row.box == "own" and None not in ious:  # the samples have true ones
            right["boxes"][row.name] = (np.array(ious) > 0.5).astype(float)
    results = {}
    for what, rows in right.items():
        results[what] = {name: estimate(values) for name, values in rows.items()}
    source_of = np.array([sample["source"] for sample in samples])
    sources = sorted(set(source_of.tolist()))
    for place, what in (("sources", "answers"), ("boxes by source", "boxes")):
        results[place] = {
            name: {source: estimate(values[source_of == source]) for source in sources}
            for name, values in right[what].items()
        }
    boxed = [name for name in pairs if all("bbox" in pair for pair in pairs[name])]
    good = {name: right_pairs(pairs[name]) for name in boxed}
    results["pairs"] = {n: {"pairs": len(v), "WP-LN": estimate(v)} for n, v in good.items()}
    results["findings"] = findings(right, good)
    return results


def findings(right, good):
    """The paper's findings, a list of `judged`. good: a file of pairs -> its `right_pairs`."""
    found = []
    for sentence, what, pairs in FINDINGS:
        rows = right[what]
        if all(name in rows for pair in pairs for name in pair):
            changes = [estimate(rows[name] - rows[other]) for name, other in pairs]
            names = [f"{name} - {other}" for name, other in pairs] if len(pairs) > 1 else [""]
            found.append(judged(sentence, changes, names, above=0))
    for name, words in PARTS.items():
        if name in good and "pairs" in good:
            more = unpaired(good["pairs"], good[name])
            sentence = f"The pipeline has more right pairs (WP-LN) than one {words}"
            found.append(judged(sentence, [more], above=0))
    return found


# Tables -------------------------------------------------------------------------------------------
def summary(results):
    """Answers and boxes of each row and the verdicts, without intervals."""
    lines = [f"{results['n']} test samples: right answers, right boxes (IoU > 0.5)"]
    for name in results["answers"]:
        shares = [results[what][name][0] for what in ("answers", "boxes") if name in results[what]]
        lines.append(f"{name:40}" + " ".join(f"{share:.3f}" for share in shares))
    return "\n".join([*lines, "", *tables.summary_of_findings(results)])


def sections(results):
    """As of tables.report: answers and boxes, pairs, verdicts."""
    made = f"{results['n']} test samples, greedy, seed {results['seed']}, model {results['model']}."
    rows = []
    for name, answers in results["answers"].items():
        others = [results[what].get(name) for what in ("boxes", "well-formed", "judge")]
        rows.append([name, *cells([answers, *others])])
    head = ("Row", "right answers", "right boxes, IoU > 0.5", "well-formed boxes", "judge's score")
    found = [("Answers and boxes", f"{made} {tables.INTERVALS}", head, rows)]
    head = ("Row", *results["sources"][BASE], "mean of these")
    for title, place in (("answers", "sources"), ("boxes", "boxes by source")):
        rows = []
        for name, own in results[place].items():
            mean = sum(value[0] for value in own.values()) / len(own)  # the paper's Avg
            rows.append([name, *cells(own.values()), f"{mean:.3f}"])
        found.append((f"Right {title} by source", "Of the test samples of each.", head, rows))
    rows = [[name, row["pairs"], *cells([row["WP-LN"]])] for name, row in results["pairs"].items()]
    text = "WP-LN: the chosen box is right and the rejected one is not."
    found.append(("Pairs (Table 6)", text, ("file", "pairs", "WP-LN"), rows))
    return [section for section in [*found, tables.verdicts(results)] if section[-1]]


# The page -----------------------------------------------------------------------------------------
def page(args, results, samples, lines_of, pairs):
    """report.html: tables, curves, what each row looks at and answers, and the scored pairs."""
    lines = {}
    [base_lines] = [own for row, own in lines_of.items() if row.name == BASE]
    for row, rows in lines_of.items():
        lines[row] = []
        for sample, line, base in zip(samples, rows, base_lines):
            ends = base["right"], line["right"]
            first, last = ("right" if right else "wrong" for right in ends)
            words = {"words": f"{BASE}: {first}; here: {last}", "ends": ends}
            lines[row].append({**page_line(args, sample, line), **words})
    shown = main_row(lines_of, MAIN).name
    groups = [group("test", samples, lines, 1, shown=shown)]
    for name, rows in pairs.items():
        sides = {}
        for side in ("chosen", "rejected"):
            sides[Row(side, drawn=False)] = [pair_line(args, row, row[side]) for row in rows]
        groups.append(group(name, rows, sides, 1, shown="chosen"))
    share = {row.name: results["answers"][row.name][0] for row in lines_of if row.box == "own"}
    best = max(share, key=share.get)
    write_page(
        args.out,
        title=f"{args.out.name}, {results['n']} test questions: best is “{best}”, with a share of "
        f"{share[best]:.3f} right answers; {shown}: {share[shown]:.3f}; {BASE}: {share[BASE]:.3f}",
        chart=stages_chart(results),
        about=ABOUT,
        tables=sections(results),
        groups=groups,
        data=args.out / "data",
    )


def stages_chart(results):
    """Right answers after each stage and iteration (Figure 4): all questions, and each source's."""
    answers = results["answers"]
    stages = [name for name in answers if name in (BASE, SFT, RL1, RL2) or "iteration" in name]
    series = {"all": [[t, *answers[name]] for t, name in enumerate(stages)]}
    sources = list(results["sources"][BASE])
    for source in sources if len(sources) < STYLES else []:
        series[source] = [[t, *results["sources"][name][source]] for t, name in enumerate(stages)]
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
        "view": [WHOLE, normalize_box(part, *size)],
    }


def pair_line(args, sample, path):
    """One side of a pair as the page takes it, with its scores."""
    line = page_line(args, sample, {**path, "first_text": format_box(path["box"])})
    scores = {"box critic": path["box_score"], "answer critic": path["response_score"]}
    given = [f"{name} {score:.3g}" for name, score in scores.items() if score is not None]
    return {**line, "words": ", ".join(given)}
