"""The tables and pictures of any system's boxes on the test samples of a run, without a model.

    python -m support.report.score_predictions --predictions theirs.jsonl --out runs/toy

A line is {"method": "...", "id": "...", "boxes": [[x1, y1, x2, y2], ...]}: T + 1 boxes in 0..1000
or null, and, if there are any, as many "texts"; "ordered": false where they are samples, and no
step follows another. The first method is what the others are compared against. Reads
data/test.jsonl; writes results.md, results.json and report.html to a folder under --out that is
named as the file, so that the run's own results stay.
"""

from pathlib import Path

from support.data.samples import is_inside, read_side
from support.report.analysis import LISTS, results_of
from support.report.page import write_evaluation
from support.report.pictures import drawing
from support.report.rows import Row
from support.report.tables import report, summary, write_results
from support.running.errors import stop
from support.running.files import read_jsonl
from support.running.flags import Flag, flags

LINE = '{"method": "...", "id": "...", "boxes": [[x1, y1, x2, y2], ...]}'


def read_predictions(path, samples):
    """A file of predictions -> {Row: its lines, in the order of the samples}."""
    number_of = {sample["id"]: i for i, sample in enumerate(samples)}
    lines_of = {}
    for number, line in enumerate(read_jsonl(path, "the system that makes it"), 1):
        try:
            place, boxes = number_of[line["id"]], line["boxes"]
            own = {"texts": [""] * len(boxes), **line}
            row = Row(line["method"], samples=1 if line.get("ordered", True) else len(boxes))
            lines = lines_of.setdefault(row, [None] * len(samples))
            usable = is_prediction(own) and lines[place] is None
        except (ValueError, LookupError, TypeError):
            usable = False
        if not usable:
            stop(
                f"{path}, line {number}: expected {LINE}, once for each id of test.jsonl, boxes in "
                f"0..1000 or null, and as many texts if any; found {str(line)[:80]}"
            )
        lines[place] = {key: own[key] for key in LISTS if key in own}
    for row, lines in lines_of.items():
        # A method that skips the hard ones would look better
        if None in lines or len({len(line["boxes"]) for line in lines}) > 1:
            need = f"needs each of the {len(lines)} test samples, all with as many boxes"
            stop(f"{path}: {row.name!r} {need}")
    return lines_of


def is_prediction(own):
    """Whether method, boxes and texts are of their kinds, and each box lies in 0..1000."""
    boxes, texts = own["boxes"], own["texts"]
    if not all(box is None or is_inside(box, 1000, 1000) for box in boxes):
        return False
    for values in (own[key] for key in LISTS[2:] if key in own):  # numbers, a step each
        known = [type(value) in (int, float) for value, box in zip(values, boxes) if box]
        if len(values) != len(boxes) or not all(known):
            return False
    words = [own["method"], *texts]
    return 0 < len(boxes) == len(texts) and all(isinstance(word, str) for word in words)


if __name__ == "__main__":
    args = flags("evaluate", __doc__, predictions=Flag("the .jsonl with the boxes", kind="file"))
    if not args.predictions:
        stop("give the file to score: --predictions theirs.jsonl")
    samples = read_side(args, "test")
    lines_of = read_predictions(args.predictions, samples)
    results = results_of(samples, lines_of, args.steps)
    folder = args.out / Path(args.predictions).stem
    write_results(results, folder, summary(results), report(results))
    with drawing(folder / "report.html"):
        write_evaluation(folder, args, results, samples, lines_of)
    print(f"tables and page of {args.predictions} in {folder}")
