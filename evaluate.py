"""Phase 3: the paper's Tables 1 and 2 on the test samples, and pictures of the trajectories (Section 4).

    python evaluate.py                       after make_data.py, sft.py and grpo.py; a missing policy leaves its row out

All decoding is greedy. Table 1 of the paper scores "the best predicted box" of a trajectory, which takes the ground truth
to choose; that column is `best of steps` here, and `last step` and `first step` stand beside it, since a user has only
those. Table 2 shows the steps themselves.

Reads data/test.jsonl, sft/, grpo/, grpo_single/. Writes results.md, results.json, figures/{corrections,failures}.png,
log/evaluate_*.jsonl under --out.
"""

import json
import textwrap
import time

from PIL import Image, ImageDraw, ImageFont

from common import IVT_PROMPT, SINGLE_PROMPT, answer_of, box_iou, denormalize_box, rollout

# name in the tables, name of the log, adapter folder, prompt, whether it refines, the command that makes it ("": not part of Table 1,
# evaluated when it is there)
CONFIGURATIONS = [
    ("Base (single-shot)", "base", None, SINGLE_PROMPT, False, ""),
    ("Base + IVT (no training)", "base_ivt", None, IVT_PROMPT, True, ""),
    ("SFT + IVT", "sft", "sft", IVT_PROMPT, True, "python sft.py"),
    ("SFT + GRPO (single-step)", "grpo_single", "grpo_single", IVT_PROMPT, False, "python grpo.py --steps 0"),
    ("SFT + GRPO + IVT", "grpo", "grpo", IVT_PROMPT, True, "python grpo.py"),
    ("GRPO without SFT + IVT", "base_grpo", "base_grpo", IVT_PROMPT, True, ""),
]


# ------------------------------------------------------------------------------------------------------------------
# Metrics. `ious` is a list of S samples, each a list of T + 1 IoUs with the ground truth; an invalid box counts 0.
# ------------------------------------------------------------------------------------------------------------------
def accuracy(values):
    """Acc@0.5, @0.7, @0.9 (share of IoU >= threshold) and mean IoU of one IoU per sample (Section 4.1, "Metrics")."""
    return {**{f"acc{t}": sum(v >= t for v in values) / len(values) for t in (0.5, 0.7, 0.9)},
            "iou": sum(values) / len(values)}


def table1(ious):
    """The three ways to choose one box of a trajectory: the paper's, which needs the truth, and two that do not."""
    return {"best of steps": accuracy([max(row) for row in ious]), "last step": accuracy([row[-1] for row in ious]),
            "first step": accuracy([row[0] for row in ious])}


def table2(ious, valid, threshold=0.01):
    """Mean IoU and valid-box rate per step; the share of samples whose last IoU differs from the first by > threshold."""
    n, steps = len(ious), len(ious[0])
    change = [row[-1] - row[0] for row in ious]
    improved, degraded = sum(c > threshold for c in change) / n, sum(c < -threshold for c in change) / n
    return {"iou": [sum(row[t] for row in ious) / n for t in range(steps)], "delta": sum(change) / n,
            "improved": improved, "stagnated": 1 - improved - degraded, "degraded": degraded,
            "valid": [sum(row[t] for row in valid) / n for t in range(steps)]}


def findings(rows):
    """The paper's three findings as hypotheses on these rows: a list of (sentence, numbers, whether it holds)."""
    out, get = [], lambda name, way="best of steps": rows[name]["table1"][way] if name in rows else None
    base, naive, sft = get("Base (single-shot)"), get("Base + IVT (no training)"), get("SFT + IVT")
    if naive:
        out.append(("Untrained, IVT falls far below single-shot (Acc@0.5, 10 points or more)",
                    f"{base['acc0.5']:.3f} -> {naive['acc0.5']:.3f}", naive["acc0.5"] <= base["acc0.5"] - 0.1))
    if sft:
        out.append(("SFT + IVT passes the base on every metric (best of steps, as in the paper)",
                    ", ".join(f"{base[k]:.3f} -> {sft[k]:.3f}" for k in base), all(sft[k] > base[k] for k in base)))
        last = get("SFT + IVT", "last step")
        out.append(("... and still does when the last step is scored, which needs no ground truth",
                    ", ".join(f"{base[k]:.3f} -> {last[k]:.3f}" for k in base), all(last[k] > base[k] for k in base)))
    if sft and "SFT + GRPO + IVT" in rows:
        a, b = (rows[name]["table2"]["delta"] for name in ("SFT + IVT", "SFT + GRPO + IVT"))
        out.append(("GRPO cuts the decline from step 0 to step T at least by half", f"{a:+.3f} -> {b:+.3f}",
                    a < 0 and b > a / 2))
    return out


def report(rows, args, n):
    """The tables as Markdown."""
    ways = ("best of steps", "last step", "first step")
    lines = [f"{n} test samples, T = {args.steps}, greedy, seed {args.seed}, model `{args.model_name}`", "",
             "**Table 1.** Acc@0.5 / Acc@0.7 / Acc@0.9 / mean IoU. The paper scores the best of the steps, which needs the "
             "ground truth to choose; the last and the first step do not.", "",
             "| Method | IVT | " + " | ".join(ways) + " |", "|---|---|" + "---|" * len(ways)]
    for name, row in rows.items():
        cells = [" / ".join(f"{v:.3f}" for v in row["table1"][way].values()) for way in ways]
        if not row["refines"]:
            cells[1:] = ["", ""]  # one step: the same box
        lines.append(f"| {name} | {'yes' if row['refines'] else 'no'} | " + " | ".join(cells) + " |")
    lines += ["", "**Table 2.** Mean IoU per step, the change from first to last, samples that improve, stagnate or degrade "
              "(by more than 0.01), valid boxes per step.", "",
              "| Method | " + " | ".join(f"step {t}" for t in range(args.steps + 1))
              + " | delta | improved | stagnated | degraded | valid |", "|---|" + "---|" * (args.steps + 6)]
    for name, row in rows.items():
        if row["refines"]:
            t = row["table2"]
            lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in t["iou"]) + f" | {t['delta']:+.3f} | "
                         + " | ".join(f"{100 * t[k]:.1f}%" for k in ("improved", "stagnated", "degraded"))
                         + " | " + " / ".join(f"{v:.3f}" for v in t["valid"]) + " |")
    lines += ["", "**The paper's findings here**", ""]
    lines += [f"- {'holds' if holds else 'DOES NOT HOLD'}: {text}: {numbers}" for text, numbers, holds in findings(rows)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------------
# Filmstrips: a row per sample, a picture per step, the truth in green, the prediction in red
# ------------------------------------------------------------------------------------------------------------------
def filmstrip(items, width=300):
    """items: (sample, image, a line of the log), T + 1 pictures each -> one PIL image."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    strips = []
    for sample, image, row in items:
        height = round(image.height * width / image.width)
        columns = len(row["boxes"])
        strip = Image.new("RGB", (columns * (width + 12) + 12, height + 150), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((12, 6), sample["expression"], fill="black", font=bold)
        for t, (box, text) in enumerate(zip(row["boxes"], row["texts"])):
            left, panel = 12 + t * (width + 12), image.resize((width, height), Image.LANCZOS)
            pen = ImageDraw.Draw(panel)
            truth = [v * width / sample["width"] for v in sample["bbox"]]
            pen.rectangle(truth, outline=(0, 190, 0), width=3)
            if box:
                pen.rectangle(denormalize_box(box, width, height), outline=(255, 0, 0), width=3)
            strip.paste(panel, (left, 30))
            head = f"step {t}: IoU {box_iou(box, sample):.2f}" if box else f"step {t}: no valid box"
            draw.text((left, height + 36), head, fill="black", font=bold)
            trace = text.removesuffix(answer_of(text)).replace("<think>", "").replace("</think>", "").strip()
            draw.text((left, height + 58), "\n".join(textwrap.wrap(trace, width // 7)[:5]), fill=(70, 70, 70), font=font)
        strips.append(strip)
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, sum(s.height for s in strips[:i])))
    return sheet


if __name__ == "__main__":
    from pathlib import Path

    from tqdm import tqdm

    from runtime import (Log, add_adapter, begin, flags, leave_if_interrupted, load_image, load_vlm, minutes, read_jsonl,
                         read_samples, seed_all, whole_batches, write_bytes, write_text)
    args = flags("evaluate", __doc__)
    start, data = time.time(), args.out / "data"
    args.model_name = Path(args.model).name
    seed_all(args.seed)
    samples = read_samples(data / "test.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad)

    # --------------------------------------------------------------------------------------------------------------
    # The configurations of Table 1, on the same samples; log/evaluate_<name>.jsonl has a line per sample
    # --------------------------------------------------------------------------------------------------------------
    vlm, rows, played = None, {}, {}
    for name, file, adapter, prompt, refines, command in CONFIGURATIONS:
        weights = args.out / str(adapter) / "adapter_model.safetensors"
        if adapter and not weights.exists():
            if command:
                print(f"{name}: left out, {args.out / adapter} is missing; to add it: {command} --preset {args.preset}")
            continue
        path = args.out / f"log/evaluate_{file}.jsonl"
        begin(args, f"evaluate_{file}", data / "test.jsonl", *[weights] * bool(adapter))
        done = whole_batches(path, args.batch_size, len(samples), args.restart)
        log = Log(path, keep=done)
        if done < len(samples):
            vlm = vlm or load_vlm(args)
            if adapter:
                add_adapter(vlm, args.out / adapter, adapter)
            with tqdm(total=len(samples), initial=done, desc=name, unit="sample") as bar:
                for i in range(done, len(samples), args.batch_size):
                    part = samples[i:i + args.batch_size]
                    batch = rollout(vlm, [load_image(s, data) for s in part], [s["expression"] for s in part],
                                    args.steps if refines else 0, args.max_tokens, prompt=prompt)
                    for sample, t in zip(part, batch):
                        log.write(id=sample["id"], boxes=t.boxes, iou=[round(box_iou(box, sample), 6) for box in t.boxes], texts=t.texts)
                    bar.update(len(part))
                    leave_if_interrupted()
        played[name] = read_jsonl(path, "")
        ious = [row["iou"] for row in played[name]]
        valid = [[box is not None for box in row["boxes"]] for row in played[name]]
        rows[name] = {"refines": refines, "table1": table1(ious), "table2": table2(ious, valid)}

    # --------------------------------------------------------------------------------------------------------------
    # Report
    # --------------------------------------------------------------------------------------------------------------
    if vlm is None:
        print("every row was evaluated before; --restart begins again")
    text = report(rows, args, len(samples))
    print("\n" + text)
    write_text(args.out / "results.md", text)
    write_text(args.out / "results.json", json.dumps({"n": len(samples), "seed": args.seed, "model": args.model_name,
                                                      "rows": rows}, indent=1) + "\n")

    trained = [name for name in ("Base + IVT (no training)", "SFT + IVT", "SFT + GRPO + IVT") if name in rows][-1]
    order = sorted(range(len(samples)), key=lambda i: played[trained][i]["iou"][-1] - played[trained][i]["iou"][0])
    for file, chosen in (("corrections", order[::-1][:args.pictures]), ("failures", order[:args.pictures])):
        sheet = filmstrip([(samples[i], load_image(samples[i], data), played[trained][i]) for i in chosen])
        write_bytes(args.out / f"figures/{file}.png", lambda f: sheet.save(f, format="PNG"))
    print(f"pictures of {trained} in {args.out / 'figures'}, tables in {args.out / 'results.md'}, {minutes(start)}")
