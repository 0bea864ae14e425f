"""Phase 3: pairs of a good and a bad path, made by the model and judged by its base (Section 3.1).

    python -m visrl.sft && python -m visrl.make_pairs
    python -m visrl.make_pairs --ablation no_controller     a part left out, for Table 6
    python -m visrl.make_pairs --iteration 2                with the model that iteration 1 trained

For each question, in five steps, none of which sees a true box:

1. Boxes: the actor, the model trained so far, samples attempts of two boxes.
2. Diversity controller (Eq. 3): where both overlap (IoU above --iou-max), the second
   becomes a random box outside the first, of about its area.
3. Answers: the actor sees each box's crop and samples an answer. Box and answer are a path.
4. Critics: the model before SFT scores each path's box and answer, knowing the true answer.
5. Filter (Eq. 4): paths with two high scores win, with two low ones lose; a question without both
   is too easy or too hard. The chosen path has both highest scores, the rejected one both lowest.

Where the authors' code is weaker than the paper's text, it is the text (visrl/README.md). Ours: an
attempt with an invalid box, or without room for another, is lost; answers that do not end are no
candidates; a question is dropped where no winner has both highest scores, or no loser both lowest.

Reads data/train.jsonl and an adapter. Writes data/paths.jsonl and pairs.jsonl under --out, with the
iteration and the ablation in their names.
"""

import functools
import random
import time
from collections import Counter

from common import format_box, iou
from support.data.datasets import counted
from support.data.samples import VISRL_FIELDS, load_image, read_side
from support.model import adapters, loading
from support.model.decoding import rollouts
from support.running import errors, files, processes
from support.running.flags import Flag, flags
from visrl.critics import score_paths
from visrl.loop import LOOPS, actor, made_by, named

# The diversity controller (Eq. 3) -----------------------------------------------------------------
TOLERANCE = 0.4  # share of the area; the authors' code


def box_outside(rng, first, second):
    """A random box (0..1000) without overlap with `first`, of an area that differs from that of
    `second` by no more than TOLERANCE; None when 100 tries find none."""
    width, height = second[2] - second[0], second[3] - second[1]
    for _ in range(100):
        size, shape = rng.uniform(1 - TOLERANCE, 1 + TOLERANCE), rng.uniform(2 / 3, 3 / 2)
        w = round(width * (size * shape) ** 0.5)
        h = round(height * (size / shape) ** 0.5)
        if not (1 <= w <= 1000 and 1 <= h <= 1000):
            continue
        x, y = rng.randint(0, 1000 - w), rng.randint(0, 1000 - h)
        box = [x, y, x + w, y + h]
        close = abs(w * h - width * height) <= TOLERANCE * width * height  # rounding moves it
        if close and iou(box, first) == 0:
            return box
    return None


def controlled(rng, boxes, iou_max):
    """The boxes of all attempts, two each -> (boxes of the paths, Counter of what happened).
    iou_max: tau; None leaves all boxes as they are (the ablation)."""
    kept = []
    counts = Counter()
    for first, second in zip(boxes[::2], boxes[1::2]):
        if not first or not second:
            counts["attempts lost: invalid box"] += 1
            continue
        if iou_max is not None and iou(first, second) > iou_max:
            second = box_outside(rng, first, second)
            if second is None:
                counts["attempts lost: no room for another box"] += 1
                continue
            counts["second boxes replaced"] += 1
        kept += [first, second]
    return kept, counts


# Filter and pair (Eq. 4) --------------------------------------------------------------------------
ABLATIONS = ("no_controller", "no_box_critic", "sft_critic")
BOTH = ("box_score", "response_score")


def choose_pair(paths, win, lose, scores=BOTH):
    """The scored paths of a question -> (chosen, rejected), or why there is no pair, a sentence.
    scores: those that count; without the box critic the response's alone."""
    paths = [path for path in paths if None not in (path[name] for name in scores)]
    if not paths:
        return "no path with scores"
    winners = [path for path in paths if all(path[name] >= win for name in scores)]
    losers = [path for path in paths if all(path[name] <= lose for name in scores)]
    if not winners:
        return "no winning path"
    if not losers:
        return "no losing path"
    chosen = extreme(winners, max, scores)
    rejected = extreme(losers, min, scores)
    if not chosen or not rejected:
        return "no path is extreme in both scores"
    if chosen is rejected:  # with --win below --lose alone
        return "one path is both"
    return chosen, rejected


def extreme(paths, which, scores):
    """The first path whose scores are each the highest (or lowest) among the paths, or None."""
    ends = {name: which(path[name] for path in paths) for name in scores}
    return next((p for p in paths if all(p[name] == ends[name] for name in scores)), None)


if __name__ == "__main__":
    ablation = Flag("a change that Table 6 measures", "none", ("none", *ABLATIONS))
    args = flags("visrl.make_pairs", __doc__, ablation=ablation)
    start = time.time()
    data = args.out / "data"
    loop = LOOPS[args.crop]
    roll = rollouts(args)
    train = read_side(args, "train", "python -m visrl.make_data", VISRL_FIELDS)
    for sample in train:
        sample.pop("bbox", None)  # from here on nothing can look at it
    policy = actor(args.iteration)
    inputs = [data / "train.jsonl", *adapters.weights_of(args, policy, made_by(policy), "crop")]
    options = dict(max_tokens=args.max_tokens, loop=loop, temperatures=(args.temperature,) * 2)
    options |= dict(top_p=args.top_p, top_k=args.top_k)
    size = 2 * args.attempts  # boxes of a question

    @functools.cache
    def load_model():
        """The base with two adapters, actor and (for an ablation) critic, when it is needed."""
        vlm = loading.load_vlm(args)
        if args.ablation == "sft_critic":
            adapters.add_adapter(vlm, args.out / "sft", "critic")
        adapters.add_adapter(vlm, args.out / policy, "actor")
        return vlm

    def place(name, *of):
        """data/<name>.jsonl of this iteration, and of the ablation if it is one of these."""
        if args.ablation in of:
            name = f"{name}_{args.ablation}"
        return data / f"{named(name, args.iteration)}.jsonl"

    def make_paths(batch):
        """All that is kept of these questions: sampled boxes, what became of them, scored paths."""
        vlm = load_model()
        images = [load_image(sample, data) for _, sample in batch]
        # 1. Two boxes or None for each attempt
        questions = [sample["question"] for _, sample in batch]
        seeds = [args.seed * 1_000_003 + (size + 1) * number for number, _ in batch]
        made = roll(vlm, images, questions, 0, group_size=size, seeds=seeds, **options)
        rows, paths = {}, []  # of each question; of each path: image, sample, box, seed
        for i, ((_, sample), image, seed) in enumerate(zip(batch, images, seeds)):
            # 2. The diversity controller
            boxes = [row.boxes[0] for row in made[i * size : (i + 1) * size]]
            tau = None if args.ablation == "no_controller" else args.iou_max
            rng = random.Random(f"{args.seed} {args.iteration} {sample['id']}")
            kept, counts = controlled(rng, boxes, tau)
            counts["answers without an end"] = len(kept)  # less those that end, below
            rows[sample["id"]] = {"id": sample["id"], "boxes": boxes, "paths": [], "counts": counts}
            paths += [(image, sample, box, seed + n) for n, box in enumerate(kept, 1)]
        if not paths:
            return list(rows.values())
        # 3. An answer after the crop of each box
        images, samples, boxes, seeds = map(list, zip(*paths))
        questions = [sample["question"] for sample in samples]
        given = dict(seeds=seeds, first_texts=[format_box(box) for box in boxes])
        made = roll(vlm, images, questions, 1, **given, **options)
        items = []
        for image, sample, box, row in zip(images, samples, boxes, made):
            # Cut short, or with a special token in it, it is no text to be learnt
            if row.target[-1] in vlm.turn_ends and "<|" not in row.texts[1]:
                items.append((image, sample, {"box": box, "answer": row.texts[1]}))
        # 4. The critics' scores, of the model before SFT
        sft_judges = args.ablation == "sft_critic"
        critics = dict(critic=args.critic, crop=loop.feedback, max_tokens=args.max_tokens)
        with adapters.using(vlm, "critic") if sft_judges else vlm.model.disable_adapter():
            scored = score_paths(vlm, items, **critics, roll=roll)
        for (_, sample, _), path in zip(items, scored):
            rows[sample["id"]]["paths"].append(path)
            rows[sample["id"]]["counts"]["answers without an end"] -= 1
        return list(rows.values())

    only = "model quantize dtype engine max_pixels max_tokens seed iteration attempts temperature"
    only = [*only.split(), "top_p", "top_k", "iou_max", "crop", "critic"]
    path = place("paths", "no_controller", "sft_critic")
    files.begin(args, path.stem, *inputs, only=only, log=path)
    made = files.resumable(path, train, args.batch_size, path.stem, make_paths)

    # 5. Filter and pairs --------------------------------------------------------------------------
    counting = ("response_score",) if args.ablation == "no_box_critic" else BOTH
    pairs = []
    dropped = Counter()
    for row in made:
        pair = choose_pair(row["paths"], args.win, args.lose, counting)
        if isinstance(pair, str):
            dropped[pair] += 1
        else:
            pairs.append({"id": row["id"], "chosen": pair[0], "rejected": pair[1]})
    if not pairs:
        reasons = f"dropped: {dict(dropped)}"
        errors.stop(f"no question gave a pair ({reasons}); look at --win, --lose, --temperature")
    file = place("pairs", *ABLATIONS)
    files.write_jsonl(file, pairs)

    counts = sum((Counter(row["counts"]) for row in made), Counter())
    flat = [path for row in made for path in row["paths"]]
    print(f"{args.attempts * len(train)} attempts at {len(train)} questions: {counted(counts)}")
    for key in BOTH:
        given = [path[key] for path in flat if path[key] is not None]
        high, low = sum(v >= args.win for v in given), sum(v <= args.lose for v in given)
        spread = f"{high} from {args.win} on, {low} up to {args.lose}"
        print(f"  {key}: {spread}, {len(flat) - len(given)} without")
    print(f"questions dropped: {counted(dropped)}")
    print(f"{len(pairs)} pairs in {file}, {processes.minutes(start)}")
