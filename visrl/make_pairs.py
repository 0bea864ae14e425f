"""Phase 3: pairs of a good and a bad path, made by the model and judged by its base (Section 3.1).

    python -m visrl.sft && python -m visrl.make_pairs
    python -m visrl.make_pairs --ablation no_controller     a part left out, for Table 6
    python -m visrl.make_pairs --iteration 2                with the model that iteration 1 trained

For each question, in five steps, none of which sees a true box:

1. Boxes: the actor, the model trained so far, samples 3 attempts of two boxes, at temperature 2.
2. Diversity controller (Eq. 3): where the two boxes of an attempt overlap (IoU above tau), the
   second becomes a random box outside the first, of about its area.
3. Answers: the actor sees each box's crop and samples an answer. Box and answer are a path.
4. Critics: the model before SFT scores each path's box and answer, knowing the true answer.
   `prompted` asks it for JSON scores: of the box it sees the crop alone, of the answer the whole
   image. `likelihood` (ours, for a base too small for such prompts) takes as the box's score the
   probability that it gives to the true answer when it is shown the crop and the bare question,
   and as the answer's score whether it is the true one.
5. Filter (Eq. 4): paths with two high scores win, with two low ones lose; a question without both
   is too easy or too hard. The chosen path has the highest of both scores among the winners, the
   rejected one the lowest of both among the losers; where no path has, the question is dropped.

Departures from the authors' code, which the paper's text settles: chosen and rejected are extremes,
and the random box has the area of the second box, not the sides of the first. Ours: an attempt with
an invalid box, or without room for another, is lost; answers that do not end are no candidates; the
tolerance of Eq. 3 is theirs (40 percent); the critics' wording.

Reads data/train.jsonl and an adapter. Writes data/boxes.jsonl, paths.jsonl, scores.jsonl and
pairs.jsonl under --out, each with the iteration and the ablation in its name.
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
from visrl.loop import END, LOOPS, actor, made_by, named

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

    iou_max: tau; None leaves all boxes as they are (the ablation).
    """
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

    scores: those that count; without the box critic the response's alone.
    """
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
    args = flags(
        "visrl.make_pairs",
        __doc__,
        ablation=Flag("a change that Table 6 measures", "none", ("none", *ABLATIONS)),
    )
    start = time.time()
    data = args.out / "data"
    loop = LOOPS[args.crop]
    roll = rollouts(args)
    train = read_side(args, "train", "python -m visrl.make_data", VISRL_FIELDS)
    for sample in train:
        sample.pop("bbox", None)  # from here on nothing can look at it
    policy = actor(args.iteration)
    inputs = [data / "train.jsonl", adapters.weights_of(args, policy, made_by(policy), "crop")]
    depends_on = "model quantize dtype engine max_pixels max_tokens seed iteration".split()

    @functools.cache
    def load_model():
        """The base with two adapters, actor and (for an ablation) critic, when a step needs it."""
        vlm = loading.load_vlm(args)
        if args.ablation == "sft_critic":
            adapters.add_adapter(vlm, args.out / "sft", "critic")
        adapters.add_adapter(vlm, args.out / policy, "actor")
        return vlm

    def place(name, *of):
        """data/<name>.jsonl, with the iteration in its name, and the ablation if it is one of
        these, which change it."""
        if args.ablation in of:
            name = f"{name}_{args.ablation}"
        return data / f"{named(name, args.iteration)}.jsonl"

    def step(name, of, work, *more):
        """The rows of data/<name>.jsonl, one for each question; those not yet there are made.

        of: the ablations that change this step or one before it. more: the flags that do.
        """
        path = place(name, *of)
        depends_on.extend(more)
        files.begin(args, path.stem, *inputs, only=depends_on, log=path)
        return files.resumable(path, train, args.batch_size, path.stem, work)

    # 1. Boxes -------------------------------------------------------------------------------------
    def sample_boxes(batch):
        trajectories = roll(
            load_model(),
            [load_image(sample, data) for _, sample in batch],
            [sample["question"] for _, sample in batch],
            0,
            max_tokens=args.max_tokens,
            loop=loop,
            group_size=2 * args.attempts,
            temperatures=(args.temperature,) * 2,
            seeds=[seed_of(number) for number, _ in batch],
        )
        boxes = iter([trajectory.boxes[0] for trajectory in trajectories])
        each = range(2 * args.attempts)
        return [{"id": sample["id"], "boxes": [next(boxes) for _ in each]} for _, sample in batch]

    def seed_of(number):
        """Of a question's boxes; those of its paths' answers follow."""
        return args.seed * 1_000_003 + (2 * args.attempts + 1) * number

    boxes = step("boxes", (), sample_boxes, "attempts", "temperature")

    # 2. and 3. Diversity controller, answers ------------------------------------------------------
    controls = []
    for sample, row in zip(train, boxes):
        tau = None if args.ablation == "no_controller" else args.iou_max
        rng = random.Random(f"{args.seed} {args.iteration} {sample['id']}")
        controls.append(controlled(rng, row["boxes"], tau))

    def sample_answers(batch):
        flat = []  # (number of the question, sample, box, seed) of each path
        for number, sample in batch:
            for i, box in enumerate(controls[number][0]):
                flat.append((number, sample, box, seed_of(number) + 1 + i))
        paths = {number: [] for number, _ in batch}
        trajectories = []
        if flat:
            trajectories = roll(
                load_model(),
                [load_image(sample, data) for _, sample, _, _ in flat],
                [sample["question"] for _, sample, _, _ in flat],
                1,
                max_tokens=args.max_tokens,
                loop=loop,
                temperatures=(args.temperature,) * 2,
                seeds=[seed for *_, seed in flat],
                first_texts=[format_box(box) for _, _, box, _ in flat],
            )
        for (number, _, box, _), trajectory in zip(flat, trajectories):
            answer = trajectory.texts[1]
            # Cut short, or with a special token in it, it is no text to be learnt
            if trajectory.target[-1] == load_model().token(END) and "<|" not in answer:
                paths[number].append({"box": box, "answer": answer})
        return [{"id": sample["id"], "paths": paths[number]} for number, sample in batch]

    paths = step("paths", ("no_controller",), sample_answers, "iou_max", "crop")

    # 4. Critics -----------------------------------------------------------------------------------
    def score(batch):
        vlm = load_model()
        judge = vlm.model.disable_adapter()  # the model before SFT
        if args.ablation == "sft_critic":
            judge = adapters.using(vlm, "critic")
        items = []
        for number, sample in batch:
            image = load_image(sample, data)
            items += [(image, sample, path) for path in paths[number]["paths"]]
        options = dict(critic=args.critic, crop=loop.feedback, max_tokens=args.max_tokens)
        with judge:
            made = iter(score_paths(vlm, items, **options, roll=roll) if items else [])
        rows = []
        for number, sample in batch:
            own = [next(made) for _ in paths[number]["paths"]]
            rows.append({"id": sample["id"], "paths": own})
        return rows

    scored = step("scores", ("no_controller", "sft_critic"), score, "critic")

    # 5. Filter and pairs --------------------------------------------------------------------------
    counting = ("response_score",) if args.ablation == "no_box_critic" else BOTH
    pairs = []
    dropped = Counter()
    for row in scored:
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

    counts = sum((count for _, count in controls), Counter())
    flat = [path for row in scored for path in row["paths"]]
    unfinished = sum(len(kept) for kept, _ in controls) - len(flat)
    print(f"{args.attempts * len(train)} attempts at {len(train)} questions: {counted(counts)}")
    print(f"{unfinished} answers did not end; {len(flat)} candidates")
    for key in BOTH:
        given = [path[key] for path in flat if path[key] is not None]
        high, low = sum(v >= args.win for v in given), sum(v <= args.lose for v in given)
        spread = f"{high} from {args.win} on, {low} up to {args.lose}"
        print(f"  {key}: {spread}, {len(flat) - len(given)} without")
    print(f"questions dropped: {counted(dropped)}")
    print(f"{len(pairs)} pairs in {file}, {processes.minutes(start)}")
