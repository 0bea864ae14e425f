"""The tables and pictures of any system's boxes on the test samples of a run, without a model.

    python -m support.report.score_predictions --predictions theirs.jsonl --out runs/toy

A line is {"method": "...", "id": "...", "boxes": [[x1, y1, x2, y2], ...]}: T + 1 boxes in 0..1000
or null, and, if there are any, as many "texts". The first method is what the others are compared
against. Reads data/test.jsonl; writes results.md, results.json, report.html and figures/*.png to a
folder under --out that is named as the file, so that the run's own results stay.
"""

import json
from pathlib import Path

from support.data.samples import read_side
from support.report import second_look
from support.report.page import group, result_curves, write_page
from support.report.pictures import write_figures
from support.report.statistics import CONTROL, analyse, main_row
from support.report.tables import report, write_results
from support.running.errors import stop
from support.running.files import read_lines
from support.running.flags import Flag, flags

LINE = '{"method": "...", "id": "...", "boxes": [[x1, y1, x2, y2], ...]}'


def read_predictions(path, samples):
    """A file of predictions -> {method: its rows, in the order of the samples}.

    Raises ValueError with line, value and remedy.
    """
    number_of = {sample["id"]: i for i, sample in enumerate(samples)}
    rows_of = {}
    for number, line in enumerate(read_lines(path, "the system that makes it"), 1):
        where = f"{path}, line {number}"
        row = read_prediction(line, where)
        name = row["id"]
        if not isinstance(name, str) or name not in number_of:
            raise ValueError(
                f"{where}: id {name!r} is not in test.jsonl; give the ids of that file"
            )
        rows = rows_of.setdefault(row["method"], [None] * len(samples))
        if rows[number_of[name]]:
            twice = f"a second line for {row['method']!r} and id {name!r}"
            raise ValueError(f"{where}: {twice}; give one")
        rows[number_of[name]] = row
    for method, rows in rows_of.items():
        check_method(path, method, rows)
    return rows_of


def read_prediction(line, where):
    """A line (bytes) as a dict with method, id, boxes and texts."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and isinstance(row.get("boxes"), list):
        row.setdefault("texts", [""] * len(row["boxes"]))
    if not well_formed(row):
        found = line[:80].decode("utf-8", "backslashreplace")
        raise ValueError(f'{where}: expected {LINE}, and as many "texts" if any; found {found!r}')
    for box in row["boxes"]:
        if box is not None and not is_box(box):
            raise ValueError(
                f"{where}: box {box}; expected [x1, y1, x2, y2] in 0..1000 with x1 < x2, y1 < y2, "
                "or null"
            )
    return row


def well_formed(row):
    """Whether a row has all its parts, whatever its id and boxes say."""
    if not isinstance(row, dict) or "id" not in row:
        return False
    method, boxes, texts = row.get("method"), row.get("boxes"), row.get("texts")
    if not isinstance(method, str) or not method:
        return False
    if not isinstance(boxes, list) or not isinstance(texts, list):
        return False
    return bool(boxes) and len(texts) == len(boxes) and all(isinstance(t, str) for t in texts)


def is_box(box):
    """Whether this is a box in 0..1000."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(type(v) in (int, float) and 0 <= v <= 1000 for v in box):  # NaN is in no range
        return False
    return box[0] < box[2] and box[1] < box[3]


def check_method(path, method, rows):
    """Every sample is needed: a method that skips the hard ones would look better."""
    counts = {len(row["boxes"]) for row in rows if row}
    if None in rows or len(counts) != 1:
        there = len(rows) - rows.count(None)
        raise ValueError(
            f"{path}: {method!r} has {there} of the {len(rows)} test samples; all are needed, each "
            "with the same number of boxes"
        )


if __name__ == "__main__":
    args = flags(
        "evaluate",
        __doc__,
        predictions=Flag("the .jsonl file with the boxes", kind="file"),
    )
    if not args.predictions:
        stop("give the file to score: --predictions theirs.jsonl")
    data = args.out / "data"
    samples = read_side(args, "test")
    try:
        rows_of = read_predictions(args.predictions, samples)
    except ValueError as e:
        stop(str(e))
    shown = main_row(rows_of)
    results = {
        "n": len(samples),
        "steps": args.steps,
        **analyse(samples, rows_of, args.steps, shown, CONTROL),
        "second_look": second_look.analyse(samples, rows_of, args.steps),
        "ablations": {},
    }
    folder = args.out / Path(args.predictions).stem
    write_results(results, folder)
    write_figures(results, samples, rows_of[shown], data, folder, args.pictures)
    own = {}
    for method, rows in rows_of.items():  # of what else a line says nothing is known
        own[method] = [{key: row[key] for key in ("boxes", "texts")} for row in rows]
    write_page(
        folder / "report.html",
        title=f"{folder.name} · {len(samples)} test samples",
        tables=report(results),
        curves=result_curves(results),
        groups=[group("test", samples, own, args.steps, limit=args.page_samples)],
        data=data,
    )
    print(f"tables and pictures of {args.predictions} in {folder}")
