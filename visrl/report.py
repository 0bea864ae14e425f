"""The numbers of VisRL's evaluation, what they say about the paper's findings, tables, filmstrips.

S samples. An estimate is [mean, low, high], a mean over samples with its 95 percent bootstrap
interval; differences between rows are paired.
"""

import json
import textwrap

from common import box_iou, format_box, normalize_box
from support.data.samples import load_image
from support.report.page import group, log_curves, write_page
from support.report.pictures import (
    BOLD,
    GAP,
    GREY,
    LINE,
    NORMAL,
    header,
    panel,
    stack,
    write_picture,
)
from support.report.statistics import estimate, resamples, signed, verdict
from support.report.tables import cell, section
from support.running.files import read_jsonl, write_text
from visrl.loop import crop_bbox

import numpy as np
from PIL import Image, ImageDraw

BASE = "Base, no box"
BASE_BOX = "Base, box (no training)"
SFT = "SFT"
RL1 = "SFT + RL1"
RL2 = "SFT + RL1 + RL2"
ONLY = "SFT + RL2 only"
PLAIN = "Plain DPO, no box"
ORDER = (BASE, BASE_BOX, SFT, RL1, RL2, ONLY, PLAIN)
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
NEAR = 0.02  # SFT is "near" the base up to here; the paper names no threshold
PARTS = {  # --ablation -> its name in Table 6
    "no_controller": "without the diversity controller",
    "no_box_critic": "without the box critic",
    "sft_critic": "the SFT model as critic",
}
WHOLE = "the whole pipeline"


def control_name(name, kind):
    return f"{name}, shown {CONTROLS[kind]}"


# Pairs (Table 6) ----------------------------------------------------------------------------------
def read_pairs(data):
    """name -> [pairs, 2] bool, whether the chosen and the rejected box are right (IoU > 0.5), of
    all files of pairs in the folder; {} when the training samples have no boxes to judge by."""
    train = {
        row["id"]: row for row in read_jsonl(data / "train.jsonl", "python -m visrl.make_data")
    }
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
    order = {name: i for i, name in enumerate(ORDER)}

    def place(name):
        """Further iterations stand behind the first, each with its stages in order."""
        first, _, iteration = name.partition(", iteration ")
        if iteration:
            return order[RL2], int(iteration), order[first]
        return order.get(name, len(order)), 0, 0

    names = sorted(lines_of, key=place)
    right = {name: np.array([line["right"] for line in lines_of[name]], float) for name in names}
    hit = {}  # of rows with boxes of their own, where the samples have true ones
    for name in names:
        ious = [line.get("iou") for line in lines_of[name]]
        if None not in ious and " shown " not in name:
            hit[name] = (np.array(ious) > 0.5).astype(float)
    groups = {"all": np.full(len(samples), True)}
    groups |= {source: sources == source for source in sorted(set(sources.tolist()))}

    def by_source(values):
        return {group: estimate(values[mask]) for group, mask in groups.items()}

    results = {"answers": {name: by_source(right[name]) for name in names}}
    results["boxes"] = {name: by_source(values) for name, values in hit.items()}
    results["differences"] = []
    compared = [pair for pair in DIFFERENCES if all(name in right for name in pair)]
    compared += [(name, RL2) for name in names if RL2 in right and " shown " in name]
    for name, other in compared:
        row = {"row": name, "against": other, "answers": by_source(right[name] - right[other])}
        if name in hit and other in hit:
            row["boxes"] = by_source(hit[name] - hit[other])
        results["differences"].append(row)
    results["pairs"] = {name: pair_shares(boxes) for name, boxes in pairs.items()}
    results["findings"] = findings(right, hit, groups, pairs)
    return results


def findings(right, hit, groups, pairs):
    """The paper's findings as hypotheses on these rows: a list of (sentence, numbers, verdict)."""
    found = []

    def judge(sentence, estimates, **side):
        found.append((sentence, ", ".join(map(signed, estimates)), verdict(estimates, **side)))

    def answers(name, other):
        return estimate(right[name] - right[other])

    def have(*names):
        return all(name in right for name in names)

    if have(SFT, BASE):
        each = {g: estimate((right[SFT] - right[BASE])[mask]) for g, mask in groups.items()}
        del each["all"]
        source = min(each, key=lambda group: each[group][0])
        sentence = "SFT answers less, or hardly more, than the base without a box on some source"
        judge(f"{sentence} (at most {NEAR} more; {source})", [each[source]], below=NEAR)
    if RL1 in hit and SFT in hit:
        judge("RL1 raises box accuracy, without boxes", [estimate(hit[RL1] - hit[SFT])], above=0)
    if have(SFT, RL1, RL2):
        steps = [answers(RL1, SFT), answers(RL2, RL1)]
        judge("In answers SFT < SFT + RL1 < SFT + RL1 + RL2", steps, above=0)
        judge("The whole training raises answers over SFT", [answers(RL2, SFT)], above=0)
    if have(SFT, RL2, ONLY):
        steps = [answers(ONLY, SFT), answers(RL2, ONLY)]
        judge("RL2 only lies between SFT and both stages, in answers", steps, above=0)
    if have(PLAIN, RL2):
        judge("Looking beats plain DPO on answers", [answers(RL2, PLAIN)], above=0)
    later = f"{RL2}, iteration 2"
    if have(RL2, later):
        judge("A second iteration raises answers (Figure 4)", [answers(later, RL2)], above=0)
    for part in PARTS.values():
        if WHOLE in pairs and part in pairs:
            whole, other = (boxes[:, 0] & ~boxes[:, 1] for boxes in (pairs[WHOLE], pairs[part]))
            sentence = f"The pipeline has more right pairs (WP-LN) than {part}"
            judge(sentence, [unpaired(whole, other)], above=0)
    return found


# Tables -------------------------------------------------------------------------------------------
def write(results, folder):
    """Prints the summary; writes results.md and results.json (every number) to the folder."""
    print(f"\n{results['n']} test samples\n\n{summary(results)}\n")
    write_text(folder / "results.md", markdown(results))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


def summary(results):
    """Answers and boxes of each row and the verdicts, without intervals."""
    width = max(map(len, results["answers"])) + 2
    sources = list(next(iter(results["answers"].values())))
    lines = ["Right answers, and right boxes (IoU > 0.5): " + " / ".join(sources)]
    for name, row in results["answers"].items():
        line = f"{name:{width}}" + " ".join(f"{mean:.3f}" for mean, _, _ in row.values())
        if name in results["boxes"]:
            boxes = results["boxes"][name].values()
            line += "   boxes " + " ".join(f"{mean:.3f}" for mean, _, _ in boxes)
        lines.append(line)
    lines += ["", "The paper's findings here"]
    lines += [f"{word}: {sentence}: {numbers}" for sentence, numbers, word in results["findings"]]
    return "\n".join(lines)


def markdown(results):
    """results.md: answers, boxes, differences, pairs, verdicts."""
    groups = list(next(iter(results["answers"].values())))
    lines = [
        f"{results['n']} test samples, greedy, seed {results['seed']}, model `{results['model']}`. "
        "[low, high]: 95 percent bootstrap interval over the samples; *: the interval of a "
        "difference excludes zero.",
        "",
    ]
    for title, key in (("Right answers.", "answers"), ("Right boxes, IoU > 0.5.", "boxes")):
        rows = [[name, *map(cell, row.values())] for name, row in results[key].items()]
        if rows:
            lines += section(f"**{title}**", ("Row", *groups), rows)
    rows = []
    for row in results["differences"]:
        for what in ("answers", "boxes"):
            if what in row:
                cells = [cell(value, "+") for value in row[what].values()]
                rows.append([row["row"], row["against"], what, *cells])
    title = "**Differences, paired.**"
    lines += section(title, ("Row", "against", "right", *groups), rows)
    if results["pairs"]:
        rows = []
        for name, row in results["pairs"].items():
            shares = [cell(value) for kind, value in row.items() if kind != "n"]
            rows.append([name, row["n"], *shares])
        lines += section(
            "**Pairs (Table 6).** W, L: the chosen and the rejected box; P, N: right or not.",
            ("Pipeline", "pairs", "WP-LP", "WP-LN", "WN-LP", "WN-LN"),
            rows,
        )
    lines += [
        "**The paper's findings here.** A finding holds when its whole interval lies on the side "
        "it claims, does not hold when it lies on the other side, and is not settled in between.",
        "",
        *(f"- {word}: {sentence}: {numbers}" for sentence, numbers, word in results["findings"]),
    ]
    return "\n".join(lines) + "\n"


# Filmstrips: the whole image with its boxes, the crop, the answer ---------------------------------
def filmstrips(samples, lines_of, data, folder, feedback, count):
    """Writes figures/{gains,losses,first}.png of the last trained row against SFT -> its name."""
    names = [name for name in (SFT, RL1, RL2) if name in lines_of]
    if not names:
        return "nothing"
    shown, first = names[-1], names[0]
    lines = lines_of[shown]
    change = [a["right"] - b["right"] for a, b in zip(lines, lines_of[first])]
    chosen = {
        "gains": [i for i, value in enumerate(change) if value > 0],
        "losses": [i for i, value in enumerate(change) if value < 0],
        "first": list(range(len(samples))),
    }
    for name, numbers in chosen.items():
        rule = "first of the test set"
        if name != "first":
            rule = f"first {name} against {first}"
        strips = [header(f"{shown}: {rule}", 760)]
        for i in numbers[:count]:
            strips.append(strip(samples[i], load_image(samples[i], data), lines[i], feedback))
        write_picture(folder / f"figures/{name}.png", stack(strips))
    return shown


def strip(sample, image, line, feedback, side=240):
    """One sample, 760 pixels wide: the image with true and predicted box, the crop, the words."""
    picture = Image.new("RGB", (760, side + 44), "white")
    pen = ImageDraw.Draw(picture)
    pen.line((GAP, 2, 760 - GAP, 2), fill=LINE)
    pen.text((GAP, 10), textwrap.shorten(sample["question"], 80), fill="black", font=BOLD)
    crop = feedback(image, line["box"])
    shown = panel(sample, image, line["box"], fitting(image, side))
    for left, part in ((GAP, shown), (2 * GAP + side, crop.resize(fitting(crop, side)))):
        picture.paste(part, (left, 36))
    words = [f"answer: {line['answer']}", f"truth: {sample['answer']}"]
    words.append("right" if line["right"] else "wrong")
    if "iou" in line:
        words.append(f"IoU {line['iou']:.2f}")
    lines = [part for word in words for part in textwrap.wrap(word, 26) or [""]][:12]
    pen.text((3 * GAP + 2 * side, 36), "\n".join(lines), fill=GREY, font=NORMAL)
    return picture


def fitting(image, side):
    """The size of an image that is brought into a square of `side` pixels."""
    scale = side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


# The page -----------------------------------------------------------------------------------------
def page(args, results, samples, lines_of):
    """report.html of the run: tables, curves, what each row looks at and answers, and the pairs
    with their scores; returns its path."""
    shown = next((name for name in (RL2, RL1, SFT) if name in lines_of), BASE)
    lines = {
        name: [page_line(args, *pair) for pair in zip(samples, rows)]
        for name, rows in lines_of.items()
    }
    groups = [group("test", samples, lines, 1, shown=shown, limit=args.page_samples)]
    groups += pair_groups(args)
    return write_page(
        args.out / "report.html",
        title=f"{args.out.name} · VisRL, {results['model']} · {results['n']} test samples",
        tables=markdown(results),
        curves=log_curves(args.out / "log"),
        groups=groups,
        data=args.out / "data",
    )


def page_line(args, sample, line):
    """A line of a log as the page takes it: the box, then the answer to what its crop shows."""
    if "first_text" not in line:
        return {"boxes": [None], "texts": [line["answer"]], "name": ["answer"]}
    return path_line(args, sample, line["box"], line["first_text"], line["answer"])


def path_line(args, sample, box, text, answer):
    size = sample["width"], sample["height"]
    part = normalize_box(crop_bbox(box, *size, square=args.crop == "square"), *size)
    return {
        "boxes": [box, None],
        "texts": [text, answer],
        "name": ["box", "answer"],
        "view": [None, part],
        "seen": [None, None],
    }


def pair_groups(args):
    """What DPO learnt from in each iteration, chosen beside rejected."""
    train = {s["id"]: s for s in read_jsonl(args.out / "data/train.jsonl", "visrl.make_data")}
    groups = []
    for path in sorted((args.out / "data").glob("pairs*.jsonl")):
        pairs = [pair for pair in read_jsonl(path, "visrl.make_pairs") if pair["id"] in train]
        if not pairs:  # of an earlier run
            continue
        questions = [train[pair["id"]] for pair in pairs]
        lines = {}
        for side in ("chosen", "rejected"):
            lines[side] = []
            for sample, pair in zip(questions, pairs):
                own = pair[side]
                line = path_line(args, sample, own["box"], format_box(own["box"]), own["answer"])
                scores = {"box critic": own["box_score"], "answer critic": own["response_score"]}
                lines[side].append({**line, "scores": scores})
        groups.append(
            group(path.stem, questions, lines, 1, shown="chosen", limit=args.page_samples)
        )
    return groups
