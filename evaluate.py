"""Phase 3: what the trained model does on the test samples: the paper's tables with their uncertainty, and pictures (Section 4).

    python evaluate.py                       after make_data.py, sft.py and grpo.py; a missing policy leaves its row out
    python evaluate.py --ablations           adds the rows that ask whether the overlay matters; --compare adds other runs' rows
    python evaluate.py --image photo.jpg --expression "the cat on the left"      your own picture
    python evaluate.py --from-predictions theirs.jsonl                           scores any system's boxes, without a model

All decoding is greedy, except in the control row that samples T + 1 single-shot answers. IVT rows are played to
`--longest` steps; since a greedy trajectory of T steps is the beginning of a longer one, every smaller T is read off it.

Table 1 of the paper scores "the best predicted box" of a trajectory, which takes the ground truth to choose: `best of steps`
here. The other choices are a user's: first step, last step, last valid box, and the medoid, the box with the highest mean
IoU to the others. Accuracies and IoUs have 95 percent bootstrap intervals over the samples; differences are paired.

Reads data/test.jsonl, sft/, grpo/, grpo_single/. Writes results.md, results.json (every number), figures/*.png,
log/evaluate_*.jsonl under --out.
"""

import functools
import json
import textwrap
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import IVT_PROMPT, SINGLE_PROMPT, answer_of, box_iou, denormalize_box, draw_overlay, iou, rollout

BASE, CONTROL = "Base (single-shot)", "Base (single-shot), T + 1 samples"
# name in the tables, name of the log, adapter folder, prompt, kind of decoding, the command that makes the adapter ("": the
# row is no part of the paper's tables, and there when its adapter is)
CONFIGURATIONS = [
    (BASE, "base", None, SINGLE_PROMPT, "single", ""),
    (CONTROL, "base_samples", None, SINGLE_PROMPT, "samples", ""),
    ("Base + IVT (no training)", "base_ivt", None, IVT_PROMPT, "ivt", ""),
    ("SFT + IVT", "sft", "sft", IVT_PROMPT, "ivt", "python sft.py"),
    ("SFT + GRPO (single-step)", "grpo_single", "grpo_single", IVT_PROMPT, "single", "python grpo.py --steps 0"),
    ("SFT + GRPO + IVT", "grpo", "grpo", IVT_PROMPT, "ivt", "python grpo.py"),
    ("GRPO without SFT + IVT", "base_grpo", "base_grpo", IVT_PROMPT, "ivt", ""),
    ("SFT + GRPO, six-component reward + IVT", "grpo_six", "grpo_six", IVT_PROMPT, "ivt", ""),
]
METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mean IoU")


# ------------------------------------------------------------------------------------------------------------------
# Numbers with intervals. S samples; `ious` is [S, T + 1], IoU with the ground truth, 0 where a box is not valid.
# ------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def resamples(n, count=10_000):
    """The bootstrap (Efron, 1979): `count` draws of n samples with replacement, as weights [count, n] that sum to 1.

    The same draws for all rows, seeded: what is computed with them on two rows is paired.
    """
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), count).astype(np.float32)
    draws /= n  # in place: with a large test set this is gigabytes
    return draws


def estimate(values):
    """values [S] or [S, K], one per sample -> [3] or [K, 3]: mean, 2.5th and 97.5th percentile of the resampled means."""
    values = np.asarray(values, np.float32)
    low, high = np.percentile(resamples(len(values)) @ values, (2.5, 97.5), axis=0)
    return np.stack([values.mean(0), low, high], -1).astype(float).round(6).tolist()


def metrics(ious):
    """[S] IoU of one box per sample -> [S, 4], whose means are Acc@0.5, @0.7, @0.9 (IoU >= threshold) and mean IoU."""
    return np.stack([ious >= 0.5, ious >= 0.7, ious >= 0.9, ious], 1)


def changes(ious, threshold=0.01):
    """First to last step -> a dict of estimates: n, IoU first and last, delta, shares improved, stagnated, degraded."""
    change = ious[:, -1] - ious[:, 0]
    names = ("first", "last", "delta", "improved", "stagnated", "degraded")
    values = (ious[:, 0], ious[:, -1], change, change > threshold, abs(change) <= threshold, change < -threshold)
    return {"n": len(ious), **dict(zip(names, estimate(np.stack(values, 1))))}


def choices(ious, boxes):
    """Ways to choose one box of each trajectory: name -> [S] IoU of the chosen one. Only the first one needs the truth.

    The medoid is the valid box whose mean IoU to the other valid ones is highest, the latest of equals.
    """
    last_valid, medoid = [], []
    for row, seen in zip(ious, boxes):
        valid = [t for t, box in enumerate(seen) if box]
        agreement = [sum(iou(seen[t], seen[k]) for k in valid) for t in valid]
        last_valid.append(row[valid[-1]] if valid else 0.0)
        medoid.append(row[max(zip(agreement, valid))[1]] if valid else 0.0)
    return {"best of steps": ious.max(1), "last step": ious[:, -1], "first step": ious[:, 0],
            "last valid": np.array(last_valid), "medoid": np.array(medoid)}


def strata(samples, first):
    """Groups of the samples: name -> {stratum: [S] bool}. By IoU at step 0 (Section 4.3), source, and size of the object
    (thirds of the test samples by the share of the image that the true box covers)."""
    area = np.array([(b[2] - b[0]) * (b[3] - b[1]) / s["width"] / s["height"] for s in samples for b in [s["bbox"]]])
    small, large = np.quantile(area, (1 / 3, 2 / 3))
    sources = np.array([s["source"] for s in samples])
    return {"step-0 IoU": {"hard, below 0.5": first < 0.5, "medium": (first >= 0.5) & (first < 0.75), "easy, from 0.75": first >= 0.75},
            "source": {s: sources == s for s in sorted(set(sources.tolist()))},
            "size": {"small third": area <= small, "middle": (area > small) & (area <= large), "large third": area > large}}


def stop_step(boxes, threshold, longest):
    """Adaptive refinement: the first step t >= 1 whose box agrees with that of t - 1 (IoU above threshold), else `longest`."""
    for t in range(1, longest + 1):
        if boxes[t] and boxes[t - 1] and iou(boxes[t], boxes[t - 1]) > threshold:
            return t
    return longest


def adaptive(ious, rows, thresholds=(0.5, 0.7, 0.8, 0.9, 0.95, 1.0)):
    """Every threshold (1.0: never stop early) with every T from 0 to the longest, each read off the one longest run.

    -> a list of {"threshold", "T", the four metrics of the box it stops at, "steps": mean refinements done, "cost": tokens
    that pass through the model, relative to step 0 alone}.
    """
    read, out = np.array([row["read"] for row in rows], float), []
    for threshold in thresholds:
        for T in range(ious.shape[1]):
            stop = np.array([stop_step(row["boxes"], threshold, T) for row in rows])
            at = np.arange(len(rows)), stop
            out.append({"threshold": threshold, "T": T, **dict(zip(METRICS, estimate(metrics(ious[at])))),
                        "steps": stop.mean().item(), "cost": (read[at].sum() / read[:, 0].sum()).item()})
    return out


def analyse(samples, played, steps, shown=None):
    """All tables: name -> rows of the log (boxes, read, texts) becomes a dict of estimates, as results.json holds it.

    The first row is what the others are compared against. shown: the row that strata and adaptive refinement are printed of.
    """
    out = {"shown": shown, "table1": {}, "differences": {}, "table2": {}, "strata": {}, "adaptive": {}}
    full = {name: all_ious(samples, rows) for name, rows in played.items()}
    base = metrics(full[next(iter(full))][:, 0])
    for name, rows in played.items():
        ious, boxes = full[name][:, :steps + 1], [row["boxes"][:steps + 1] for row in rows]
        chosen = choices(ious, boxes) if ious.shape[1] > 1 else {"its only box": ious[:, 0]}
        if name == CONTROL:  # its samples have no order
            chosen = {way: chosen[way] for way in ("best of steps", "medoid")}
        out["table1"][name] = {way: dict(zip(METRICS, estimate(metrics(v)))) for way, v in chosen.items()}
        out["differences"][name] = {way: dict(zip(METRICS, estimate(metrics(v) - base))) for way, v in chosen.items()}
        if ious.shape[1] == 1 or name == CONTROL:
            continue
        out["table2"][name] = {"iou": estimate(full[name]), **changes(ious), "repeats": repeats(boxes),
                               "valid": estimate([[box is not None for box in row] for row in boxes])}
        out["strata"][name] = {group: {stratum: changes(ious[mask]) for stratum, mask in parts.items() if mask.any()}
                               for group, parts in strata(samples, ious[:, 0]).items()}
        if all("read" in row for row in rows):
            out["adaptive"][name] = adaptive(full[name], rows)
    out["findings"] = findings(out, {name: ious[:, :steps + 1] for name, ious in full.items()})
    return out


def all_ious(samples, rows):
    """[S, T + 1] IoU of every box of a row with the truth."""
    return np.array([[box_iou(box, sample) for box in row["boxes"]] for sample, row in zip(samples, rows)])


def repeats(boxes):
    """The share of trajectories whose boxes are all that of step 0 (Section 4.2's stagnation), as an estimate."""
    return estimate([all(box == row[0] for box in row) for row in boxes])


def ablation(samples, rows, steps, log):
    """A row of the ablation table. log: the path of its GRPO log, of which the validations before and after are shown."""
    ious, boxes = all_ious(samples, rows)[:, :steps + 1], [row["boxes"][:steps + 1] for row in rows]
    seen = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if "val_iou" in line] if log.is_file() else []
    return {**changes(ious), "repeats": repeats(boxes), "Acc@0.5": estimate(ious[:, -1] >= 0.5),
            "validation": [row["val_iou"][0] for row in seen[:1] + seen[-1:]]}


def findings(results, full):
    """The paper's findings as hypotheses on these rows: (sentence, numbers, verdict). What holds has its interval on its side;
    what has only its mean there is not settled."""
    out = []

    def judge(sentence, values, numbers=""):
        means, lows = [v[0] for v in values], [v[1] for v in values]
        verdict = "holds" if min(lows) > 0 else "NOT SETTLED" if min(means) > 0 else "DOES NOT HOLD"
        out.append((sentence, numbers or ", ".join(f"{v[0]:+.3f} [{v[1]:+.3f}, {v[2]:+.3f}]" for v in values), verdict))

    full = {name: ious for name, ious in full.items() if name in results["table2"]}  # other systems may have one box
    naive, sft, grpo = "Base + IVT (no training)", "SFT + IVT", "SFT + GRPO + IVT"
    for way in ("best of steps", "last step"):
        if naive in full:
            mean, low, high = results["differences"][naive][way]["Acc@0.5"]
            judge(f"Untrained, IVT falls 10 points or more below single-shot in Acc@0.5 ({way})", [[-mean - 0.1, -high - 0.1]],
                  f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    for way in ("best of steps", "last step"):
        if sft in full:
            judge(f"SFT + IVT passes single-shot on every metric ({way})", list(results["differences"][sft][way].values()))
    if sft in full:
        mean, low, high = results["table2"][sft]["delta"]
        judge("SFT declines from step 0 to step T", [[-mean, -high]], f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    if sft in full and grpo in full:
        a, b = (full[name][:, -1] - full[name][:, 0] for name in (sft, grpo))
        judge("GRPO's change from step 0 to step T is better than SFT's", [estimate(b - a)])
    return out


# ------------------------------------------------------------------------------------------------------------------
# The report, in Markdown
# ------------------------------------------------------------------------------------------------------------------
def cell(value, sign=""):
    mean, low, high = value
    mark = " *" if sign and (low > 0 or high < 0) else ""
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{mark}"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"] + ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def summary(results):
    """What the terminal shows: Tables 1 and 2 and the verdicts, without intervals."""
    ways, width = ("best of steps", "last step", "first step"), max(map(len, results["table1"])) + 2
    lines = ["Table 1: Acc@0.5, @0.7, @0.9, mean IoU", " " * width + "".join(f"{way:26}" for way in ways).rstrip()]
    for name, row in results["table1"].items():
        cells = [row.get("its only box", row.get(ways[0])), row.get(ways[1]), row.get(ways[2])]
        lines.append(f"{name:{width}}" + "".join(f"{' '.join(f'{v[0]:.3f}' for v in (c or {}).values()):26}" for c in cells).rstrip())
    lines += ["", f"Table 2: mean IoU of steps 0 to {results['steps']}, change, improved / stagnated / degraded, valid boxes per step"]
    for name, row in results["table2"].items():
        lines.append(f"{name:{width}}" + " ".join(f"{v[0]:.3f}" for v in row["iou"][:results["steps"] + 1]) + f"  {row['delta'][0]:+.3f}  "
                     + " / ".join(f"{100 * row[k][0]:.0f}%" for k in ("improved", "stagnated", "degraded")) + "  "
                     + " ".join(f"{v[0]:.3f}" for v in row["valid"]))
    return "\n".join(lines + ["", "The paper's findings here"] + [f"{verdict}: {sentence}: {numbers}" for sentence, numbers, verdict in results["findings"]])


def report(results):
    """results.md: Tables 1 and 2 and the verdicts first, then what goes beyond them."""
    steps, shown = results["steps"], results["shown"]
    lines = [f"{results['n']} test samples, T = {steps}, greedy, seed {results['seed']}, model `{results['model']}`. "
             "[low, high]: 95 percent bootstrap interval over the samples; *: the interval of a difference excludes zero.", ""]
    for title, key, sign in (("Table 1", "table1", ""), ("Table 1, differences from the first row, paired", "differences", "+")):
        rows = [(name, way, *(cell(row[m], sign) for m in METRICS)) for name, ways in results[key].items()
                for way, row in ways.items() if not sign or name != next(iter(results[key]))]
        lines += [f"**{title}.** Best of steps, the paper's choice, needs the ground truth; the others do not.", "",
                  *table(("Method", "box", *METRICS), rows)]
    if CONTROL in results["table1"] and shown in results["table2"]:
        a, b = (results["table1"][name]["best of steps"]["mean IoU"][0] for name in (CONTROL, shown))
        lines += [f"With the truth as judge, {steps + 1} sampled single-shot answers of the untrained model reach mean IoU {a:.3f} and "
                  f"{shown} {b:.3f}: " + ("a best-of column rewards having several boxes, not refining one."
                                          if a >= b else "refining one box gives more than sampling several."), ""]
    lines += ["**Table 2.** Mean IoU per step; change from first to last; share that improves, stagnates or degrades (by more than "
              "0.01); share whose boxes all repeat step 0; valid boxes per step.", "",
              *table(("Method", *(f"step {t}" for t in range(steps + 1)), "delta", "improved", "stagnated", "degraded", "repeats", "valid"),
                     [(name, *([*map(cell, row["iou"])] + [""] * steps)[:steps + 1], cell(row["delta"], "+"),
                       *(cell(row[k]) for k in ("improved", "stagnated", "degraded", "repeats")),
                       " / ".join(f"{v[0]:.3f}" for v in row["valid"])) for name, row in results["table2"].items()]),
              "**The paper's findings here**", "",
              *(f"- {verdict}: {sentence}: {numbers}" for sentence, numbers, verdict in results["findings"]), ""]
    if shown in results["strata"]:
        lines += [f"**Strata** of {shown}. By step-0 IoU, some of the change is chance: what was unluckily low can only rise.", "",
                  *table(("by", "stratum", "n", "step 0", f"step {steps}", "delta", "improved", "degraded"),
                         [(group, stratum, row["n"], cell(row["first"]), cell(row["last"]), cell(row["delta"], "+"), cell(row["improved"]),
                           cell(row["degraded"])) for group, parts in results["strata"][shown].items() for stratum, row in parts.items()])]
    if shown in results["adaptive"]:
        rows = results["adaptive"][shown]
        lines += [f"**Adaptive refinement** of {shown}: stop when a box agrees with the one before it (IoU above the threshold), after T "
                  "steps at most. Cost: tokens through the model, relative to step 0 alone.", "",
                  *table(("stop above", "T", "Acc@0.5", "mean IoU", "steps", "cost"),
                         [("never" if row["threshold"] == 1 else row["threshold"], row["T"], cell(row["Acc@0.5"]), cell(row["mean IoU"]),
                           f"{row['steps']:.2f}", f"{row['cost']:.2f}") for row in rows
                          if row["threshold"] == 1 or row["T"] in (steps, rows[-1]["T"])])]
    if results["ablations"]:
        lines += ["**Ablations.** Same test samples. Validation: mean IoU of step 0 at the first and the last validation of GRPO.", "",
                  *table(("Run", "step 0", f"step {steps}", "delta", "repeats", "Acc@0.5, last step", "validation, step 0"),
                         [(name, cell(row["first"]), cell(row["last"]), cell(row["delta"], "+"), cell(row["repeats"]), cell(row["Acc@0.5"]),
                           " -> ".join(f"{v:.3f}" for v in row["validation"])) for name, row in results["ablations"].items()])]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------
def filmstrip(items, title, width=320):
    """items: (sample, image, row of the log with boxes and texts) -> one PIL image: a row per sample, a picture per step.

    A sample without "bbox" has no truth to show.
    """
    small, font, bold = (ImageFont.load_default(size) for size in (12, 14, 16))
    gap, columns = 14, max(len(row["boxes"]) for _, _, row in items)
    strips = [Image.new("RGB", (columns * (width + gap) + gap, 34), "white")]
    pen = ImageDraw.Draw(strips[0])
    pen.text((gap, 8), title, fill="black", font=bold)
    x = gap + 30 + pen.textlength(title, font=bold)
    for color, word in (((0, 170, 0), "ground truth"), ((255, 0, 0), "prediction")):
        pen.rectangle((x, 12, x + 16, 24), outline=color, width=3)
        pen.text((x + 22, 9), word, fill="black", font=font)
        x += 130
    for sample, image, row in items:
        # whole multiples of a small image's pixels stay sharp
        scale = max(1, width // image.width) if image.width <= width else width / image.width
        size = round(image.width * scale), round(image.height * scale)
        panel = image.resize(size, Image.NEAREST if scale >= 1 else Image.LANCZOS)
        traces = ["\n".join(textwrap.wrap(text.removesuffix(answer_of(text)).replace("<think>", "").replace("</think>", "").strip(), width // 7)[:8])
                  for text in row["texts"]]
        words = textwrap.wrap(sample["expression"], (strips[0].width - 2 * gap) // 9)
        top = 16 + 20 * len(words)
        strip = Image.new("RGB", (strips[0].width, top + size[1] + 52 + 15 * max(trace.count("\n") for trace in traces)), "white")
        draw = ImageDraw.Draw(strip)
        draw.line((gap, 2, strip.width - gap, 2), fill=(210, 210, 210))
        draw.text((gap, 10), "\n".join(words), fill="black", font=bold)
        for t, (box, trace) in enumerate(zip(row["boxes"], traces)):
            left, shown = gap + t * (width + gap), panel.copy()
            pen = ImageDraw.Draw(shown)
            if "bbox" in sample:
                pen.rectangle([v * scale for v in sample["bbox"]], outline=(0, 170, 0), width=3)
            if box:
                pen.rectangle(denormalize_box(box, *size), outline=(255, 0, 0), width=3)
            strip.paste(shown, (left, top))
            head = f"step {t}" + ("" if box else ": no valid box")
            if box and "bbox" in sample:
                head += f": IoU {box_iou(box, sample):.2f}"
            draw.text((left, top + size[1] + 6), head, fill="black", font=font)
            draw.text((left, top + size[1] + 26), trace, fill=(70, 70, 70), font=small)
        strips.append(strip)
    sheet, y = Image.new("RGB", (strips[0].width, sum(s.height for s in strips)), "white"), 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def charts(results):
    """The paper's Figure 1 (bars), IoU per step, and IoU against cost, as {name: matplotlib figure}; {} without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    bars, curve, cost = (Figure(figsize=(7, 4), layout="constrained") for _ in range(3))
    axes, names = bars.subplots(), list(results["table1"])
    for i, name in enumerate(names):
        row = next(iter(results["table1"][name].values()))  # best of steps, as the paper
        mean, low, high = np.array([row[m] for m in METRICS]).T
        at = np.arange(4) + (i - len(names) / 2 + 0.5) * 0.8 / len(names)
        axes.bar(at, mean, 0.8 / len(names), yerr=(mean - low, high - mean), label=name, capsize=2, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(4), METRICS)
    axes.set_title("Best of steps, 95 percent intervals", fontsize=10)
    axes.legend(fontsize=7, ncols=2, loc="upper right", framealpha=0.9)
    axes.set_ylim(0, 1.25)
    axes = curve.subplots()
    for name, row in results["table2"].items():
        mean, low, high = np.array(row["iou"]).T
        axes.plot(mean, marker="o", label=name)
        axes.fill_between(range(len(mean)), low, high, alpha=0.15)
    axes.set(xlabel="step", ylabel="mean IoU")
    axes.legend(fontsize=7)
    axes, seen = cost.subplots(), results["adaptive"].get(results["shown"], [])
    for threshold in sorted({row["threshold"] for row in seen}):
        rows = [row for row in seen if row["threshold"] == threshold]
        axes.plot([row["cost"] for row in rows], [row["mean IoU"][0] for row in rows], marker=".",
                  label="never stop early" if threshold == 1 else f"stop above IoU {threshold}")
    axes.set(xlabel="cost (tokens through the model, step 0 alone = 1)", ylabel="mean IoU")
    axes.legend(fontsize=7)
    return {"bars": bars, "steps": curve, "adaptive": cost}


# ------------------------------------------------------------------------------------------------------------------
# Does the overlay matter? What is shown at step t instead of box t - 1; each draws on a copy of the image
# ------------------------------------------------------------------------------------------------------------------
def box_elsewhere(image, box):
    """The overlay of a random box: what changes is whether the red box is the model's own."""
    rng = np.random.default_rng([1] + (box or []))
    x1, y1 = rng.integers(0, 700, 2).tolist()
    w, h = rng.integers(100, 300, 2).tolist()
    return draw_overlay(image, [x1, y1, x1 + w, y1 + h])


def random_text(image, box):
    """Red letters all over the image, and no box."""
    rng, image = np.random.default_rng([2] + (box or [])), image.copy()
    size = max(8, image.height // 8)
    for _ in range(12):
        at = rng.integers(0, [image.width, image.height]).tolist()
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5))
        ImageDraw.Draw(image).text(at, word, fill=(255, 0, 0), font=ImageFont.load_default(size), anchor="mm")
    return image


OVERLAYS = {"no overlay": lambda image, box: image, "random text": random_text, "a box elsewhere": box_elsewhere}


def read_predictions(path, samples):
    """A file of predictions -> {method: its rows, in the order of the samples}; the first method is compared against.

    A line: {"method", "id", "boxes": T + 1 boxes in 0..1000 or null}, and, if known, "texts". Raises ValueError with line,
    value and remedy.
    """
    played, at = {}, {s["id"]: i for i, s in enumerate(samples)}
    for number, line in enumerate(open(path, "rb").read().removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            method, name, boxes = row["method"], row["id"], row["boxes"]
            texts = row.setdefault("texts", [""] * len(boxes))
            good = isinstance(method, str) and method and boxes and len(texts) == len(boxes) and all(isinstance(t, str) for t in texts)
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise ValueError(f'{where}: expected {{"method": "...", "id": "...", "boxes": [[x1, y1, x2, y2], ...]}}, and as many "texts" if '
                             f"any; found {line[:80]!r}")
        for box in boxes:
            if box is not None and not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and 0 <= v <= 1000 for v in box)
                                        and box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"{where}: box {box}; expected [x1, y1, x2, y2] in 0..1000 with x1 < x2, y1 < y2, or null")
        if not isinstance(name, str) or name not in at:
            raise ValueError(f"{where}: id {name!r} is not in test.jsonl; give the ids of that file")
        rows = played.setdefault(method, [None] * len(samples))
        if rows[at[name]]:
            raise ValueError(f"{where}: a second line for {method!r} and id {name!r}; give one")
        rows[at[name]] = row
    for method, rows in played.items():
        if None in rows or len({len(row["boxes"]) for row in rows}) != 1:
            raise ValueError(f"{path}: {method!r} has {len(rows) - rows.count(None)} of the {len(samples)} test samples; all are "
                             "needed, each with the same number of boxes")
    return played


def steps_of(group):
    """Of each step of these trajectories: log pi of its text, and how many tokens of its sequence it has read when it ends."""
    each = [[(t.logprob[m], t.predictor[m] + 1) for m in range(len(t.target)) if t.step[m] == k] for t in group for k in range(len(t.boxes))]
    return {"logprob": [round(sum(p for p, _ in step), 4) for step in each], "read": [step[-1][1] for step in each]}


if __name__ == "__main__":
    from pathlib import Path

    from runtime import (add_adapter, begin, best_adapter, flags, load_image, load_vlm, memory_for, minutes, read_jsonl, read_samples, resumable,
                         save_merged, seed_all, stop, write_bytes, write_jsonl, write_text)
    own = dict(ablations=(False, "add rows with other overlays than the predicted box"), compare=((), "folders of other runs, for rows"),
               image=(None, "a picture of yours, instead of the test samples"), expression=(None, "what to find in it"),
               predictions=(None, "write every trajectory of every row to this .jsonl file"),
               from_predictions=(None, "score the boxes in this .jsonl file; no model is loaded"),
               merge=(None, "write base and best adapter as one checkpoint to this folder, for other engines"))
    args = flags("evaluate", __doc__, **own)
    start, data, out = time.time(), args.out / "data", args.out
    seed_all(args.seed)
    if bool(args.image) != bool(args.expression):
        stop('--image and --expression go together: --image photo.jpg --expression "what to find"')
    if sum(map(bool, (args.image, args.merge, args.from_predictions, args.ablations or args.compare))) > 1:
        stop("--image, --merge, --from-predictions, and --ablations or --compare are different things to do; give one")

    # --------------------------------------------------------------------------------------------------------------
    # The best adapter of the run alone: merged into its base, or on a picture of your own
    # --------------------------------------------------------------------------------------------------------------
    best = best_adapter(out)
    if (args.merge or args.image) and not best:
        stop(f"{out} has no adapter; first run: python sft.py --preset {args.preset}")
    if args.merge:
        save_merged(args, best, args.merge)
        print(f"{best} merged into {args.model}: {args.merge}")
        raise SystemExit
    if args.image:
        try:
            with Image.open(args.image) as picture:
                width, height = picture.size[::-1] if picture.getexif().get(0x0112, 1) >= 5 else picture.size
            sample = {"id": args.image, "image": str(Path(args.image).resolve()), "width": width, "height": height}
            picture = load_image(sample, "/", upright=True)
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            stop(f"--image {args.image}: {e}")
        vlm = load_vlm(args)
        add_adapter(vlm, best, "policy")
        with memory_for([sample], "--max-pixels"):
            [played] = rollout(vlm, [picture], [args.expression], args.steps, args.max_tokens, agree=args.agree)
        for t, (box, text) in enumerate(zip(played.boxes, played.texts)):
            pixels = [round(v, 1) for v in denormalize_box(box, width, height)] if box else "no valid box"
            print(f"step {t}: {pixels}\n  {text.strip()}")
        path = out / f"figures/{Path(args.image).stem}.png"
        sheet = filmstrip([({"expression": args.expression}, picture, {"boxes": played.boxes, "texts": played.texts})], best.name)
        write_bytes(path, lambda f: sheet.save(f, format="PNG"))
        print(f"{best} on {args.image}: {path}")
        raise SystemExit

    # --------------------------------------------------------------------------------------------------------------
    # The rows, on the same samples; log/evaluate_<name>.jsonl has a line per sample
    # --------------------------------------------------------------------------------------------------------------
    samples = read_samples(data / "test.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad)
    vlm, played, others, longest = None, {}, {}, max(args.steps, args.longest)

    def play(name, file, adapter, prompt, kind, overlay=draw_overlay):
        """The rows of log/evaluate_<file>.jsonl. Only what a row depends on is compared with an earlier run; with --restart a
        row is played anew if that has changed."""
        count = args.steps + 1 if kind == "samples" else 1
        same = begin(args, f"evaluate_{file}", data / "test.jsonl", *[out / str(adapter) / "adapter_model.safetensors"] * bool(adapter),
                     only=("model", "quantize", "dtype", "max_pixels", "max_tokens") + ("seed", "control_temperature") * (kind == "samples"),
                     **({"longest": longest} if kind == "ivt" else {"samples": count}))

        def work(batch):
            global vlm
            vlm = vlm or load_vlm(args)
            if adapter:
                add_adapter(vlm, out / adapter, adapter)
            said = rollout(vlm, [load_image(s, data) for _, s in batch], [s["expression"] for _, s in batch], longest if kind == "ivt" else 0,
                           args.max_tokens, prompt, count, (args.control_temperature if kind == "samples" else 0.0,) * 2,
                           [args.seed * 1_000_003 + number for number, _ in batch], overlay)
            rows = []
            for j, (_, sample) in enumerate(batch):
                group = said[j * count:(j + 1) * count]  # one trajectory, or T + 1 single-shot ones
                boxes = [box for t in group for box in t.boxes]
                rows.append(dict(id=sample["id"], boxes=boxes, iou=[round(box_iou(box, sample), 6) for box in boxes],
                                 texts=[text for t in group for text in t.texts], **steps_of(group)))
            return rows

        return resumable(out / f"log/evaluate_{file}.jsonl", samples, args.batch_size, name, work, args.restart and not same)

    for name, file, adapter, prompt, kind, command in CONFIGURATIONS * (not args.from_predictions):
        if not adapter or (out / adapter / "adapter_model.safetensors").exists():
            played[name] = play(name, file, adapter, prompt, kind)
        elif command:
            print(f"{name}: left out, {out / adapter} is missing; to add it: {command} --preset {args.preset}")
    if args.from_predictions:
        out = out / Path(args.from_predictions).stem  # the run's own results stay
        try:
            played = read_predictions(args.from_predictions, samples)
        except (OSError, ValueError) as e:
            stop(str(e))
    trained = [name for name in ("Base + IVT (no training)", "SFT + IVT", "SFT + GRPO + IVT") if name in played]
    trained = trained[-1] if trained else list(played)[-1]
    if args.ablations:
        _, file, adapter, prompt, kind, _ = next(row for row in CONFIGURATIONS if row[0] == trained)
        for word, overlay in OVERLAYS.items():
            others[f"{trained}, {word}"] = play(word, f"{file}_{word.replace(' ', '_')}", adapter, prompt, kind, overlay), Path()
    for folder in map(Path, args.compare):
        for name, file, *_ in CONFIGURATIONS[3:]:
            path = folder / f"log/evaluate_{file}.jsonl"
            rows = read_jsonl(path, "") if path.exists() else []
            if rows and [row["id"] for row in rows] != [s["id"] for s in samples]:
                stop(f"{folder} was evaluated on other test samples; make its data with the same --seed and sizes")
            if rows and len(rows[0]["boxes"]) > args.steps:
                others[f"{folder}: {name}"] = rows, folder / f"log/{file}.jsonl"

    # --------------------------------------------------------------------------------------------------------------
    # Report
    # --------------------------------------------------------------------------------------------------------------
    results = {"n": len(samples), "seed": args.seed, "steps": args.steps, "model": Path(args.model).name,
               **analyse(samples, played, args.steps, trained)}
    if others:
        others = {**{name: (played[name], out / f"log/{file}.jsonl") for name, file, *_ in CONFIGURATIONS if name in results["table2"]}, **others}
    results["ablations"] = {name: ablation(samples, rows, args.steps, log) for name, (rows, log) in others.items()}
    print(f"\n{len(samples)} test samples, T = {args.steps}\n\n{summary(results)}\n")
    write_text(out / "results.md", report(results))
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    if args.predictions:
        write_jsonl(args.predictions, [{"method": name, **row} for name, rows in played.items() for row in rows])

    rows = [{k: row[k][:args.steps + 1] for k in ("boxes", "texts")} for row in played[trained]]
    gain = sorted(range(len(samples)), key=lambda i: box_iou(rows[i]["boxes"][-1], samples[i]) - box_iou(rows[i]["boxes"][0], samples[i]))
    for file, title, chosen in (("corrections", "largest gain", gain[::-1]), ("failures", "largest loss", gain),
                                ("first", "first of the test set", range(len(samples)))):
        sheet = filmstrip([(samples[i], load_image(samples[i], data), rows[i]) for i in chosen[:args.pictures]], f"{trained}: {title}")
        write_bytes(out / f"figures/{file}.png", lambda f: sheet.save(f, format="PNG"))
    drawn = charts(results)
    for name, figure in drawn.items():
        write_bytes(out / f"figures/{name}.png", lambda f: figure.savefig(f, format="png", dpi=150))
    print(f"pictures of {trained} in {out / 'figures'}, tables in {out / 'results.md'}, {minutes(start)}"
          + ("" if drawn else "; with matplotlib installed, charts too"))
