"""Files of a run: each is written under a temporary name and moved into place, so that it is there
whole or not at all; logs that a stopped run goes on with; one run at a time on a folder."""

import hashlib
import json
import os
import time
import zlib
from pathlib import Path

from support.running.errors import explained, stop, working_on
from support.running.processes import (
    RANK,
    WORLD,
    barrier,
    catch_interrupts,
    gather,
    leave_if_interrupted,
    say_hours,
    share,
)


def writing(path):
    """Around every write, so that a full disk or a forbidden folder ends with a message."""
    remedy = "what was saved is whole; make room, or allow writing; the same command goes on"
    return explained(f"{path} cannot be written", remedy)


def write_bytes(path, save):
    """save(file) writes the content of `path`, in the first process alone."""
    if RANK:
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_text(path, text):
    write_bytes(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_regular(path):
    """Raises OSError where something is neither file nor folder: a FIFO would never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(0, "not a regular file")


def read_lines(path, command):
    """The lines (bytes) of a file that `command` makes; stops with it when the file is not there.
    Lines end at "\\n" alone: a text in them may hold any other line end."""
    path = Path(path)
    try:
        content = path.read_bytes().removesuffix(b"\n")
    except FileNotFoundError:
        stop(f"{path} is missing; first run: {command}")
    except OSError as e:
        stop(f"{path} cannot be read ({e.strerror}); move it away, then run: {command}")
    if not content:
        stop(f"{path} is empty; make it again: {command}")
    return content.split(b"\n")


def parse(text):
    """json.loads, where nesting too deep is a ValueError as all other faults are."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_jsonl(path, command):
    """The rows of a .jsonl file that a phase before makes with `command`."""
    rows = []
    for number, line in enumerate(read_lines(path, command), 1):
        remedy = f"repair or remove the line: {line[:80]!r}"
        with explained(f"{path}, line {number}: not JSON", remedy):
            rows.append(parse(line))
    return rows


class Log:
    """A .jsonl log, a row per event, on the disk at once. rows: of an earlier run that goes on.
    sealed: each line ends with a checksum, by which `sealed_rows` knows it again."""

    def __init__(self, path, rows=(), sealed=False):
        self.path, self.rows, self.sealed = Path(path), list(rows), sealed
        content = "".join(map(self.line, self.rows))
        if not self.path.exists() or self.path.read_bytes() != content.encode():
            write_text(self.path, content)

    def line(self, row):
        text = json.dumps(row, ensure_ascii=False)
        if self.sealed:
            text = f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'
        return text + "\n"

    def write(self, **row):
        """Floats are rounded to six digits after the point."""
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(json.loads(json.dumps(rounded)))  # as a run that goes on would read it
        if not RANK:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(self.line(rounded))


def resumable(path, samples, batch_size, name, work, whole=1):
    """The rows of the log `path`, one for each sample in order; those not yet there are made.

    work: takes a list of (number, sample), this process's share of a batch, and returns their
    rows, each with the "id" of its sample. Of a run that was killed, the whole batches stay whose
    ids are these samples', so that the rest is batched as in a run that never stopped. whole: the
    time of the phase, in that of all these samples; 0: it was told already.
    """
    from tqdm import tqdm

    batch_size = batch_size or 48 * WORLD  # `play` parts what does not fit
    rows = sealed_rows(path, samples)
    if len(rows) < len(samples):
        rows = rows[: len(rows) - len(rows) % batch_size]
    log, done = Log(path, rows, sealed=True), len(rows)
    shown = dict(total=len(samples), initial=done, desc=name, unit="sample")
    with tqdm(**shown, disable=RANK > 0 or done == len(samples)) as bar:
        for i in range(done, len(samples), batch_size):
            catch_interrupts()
            start = time.time()
            batch = list(enumerate(samples[i : i + batch_size], i))
            working_on([sample for _, sample in batch])
            mine = share(batch)
            for row in gather(work(mine) if mine else []):
                log.write(**row)
            bar.update(len(batch))
            batches = (len(samples) - done) / len(batch) * whole
            if i == done + batch_size and batches > 1:  # the first one loads the model
                say_hours(name if whole == 1 else "evaluation", (time.time() - start) * batches)
            leave_if_interrupted()
    barrier()
    return log.rows


def sealed_rows(path, samples):
    """The first rows of a log that are whole, as they were written, and of these samples."""
    rows = []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for sample, line in zip(samples, lines):
        text, _, crc = line.rpartition(b', "crc": ')
        if crc != b"%d}" % zlib.crc32(text + b"}") or parse(text + b"}")["id"] != sample["id"]:
            if any(lines[len(rows) + 1 :]):  # a run that was killed leaves a cut line at the end
                print(f"{path}:{len(rows) + 1}: damaged; made again from here")
            break
        rows.append(parse(text + b"}"))
    return rows


def begin(args, name, *inputs, ignore=(), only=None, log=None, **more):
    """Writes down what `name` is made with, or checks that what has begun is made with the same.

    inputs: files it reads, compared by their hash; ignore: flags that do not change it; only: the
    flags that do (default: all); more: values that are no flags. Exits with the differing values:
    a run is never continued under another configuration. log: goes where --restart changes these.
    """
    config = {**vars(args), **more}
    for key in ("out", "restart", "save_every", "vllm", *ignore):
        config.pop(key, None)
    if only is not None:
        config = {key: value for key, value in config.items() if key in (*only, *more)}
    config["model"] = told_apart(args.model)
    for file in map(Path, inputs):
        digest = hashlib.sha256(file.read_bytes())
        config[f"{file.parent.name}/{file.name}"] = digest.hexdigest()[:12]
    config = json.loads(json.dumps(config))
    path = args.out / f"log/{name}.config.json"
    before = read_config(path)
    # Every process has read it; the first one refuses or writes. When it refuses, torchrun ends
    # the others.
    barrier()
    differing = []
    for key in sorted({*before, *config}):
        if before and before.get(key) != config.get(key):
            differing.append(f"  {key}: {before.get(key)} then, {config.get(key)} now")
    if differing and not args.restart:
        stop(
            f"{name} in {args.out} was made otherwise:\n" + "\n".join(differing) + "\n"
            "give the same values, another --out, or --restart to make it anew"
        )
    if log and args.restart and before != config:
        if not RANK:  # before its configuration: killed in between, no run goes on with the old
            log.unlink(missing_ok=True)
        barrier()
    write_text(path, json.dumps(config, indent=1) + "\n")


def agrees(args, name, *flags):
    """Stops when `name` in --out was made with other values of these flags than args has."""
    before = read_config(args.out / f"log/{name}.config.json")
    now = {**vars(args), "model": told_apart(args.model)}
    for flag in flags:
        if before and before.get(flag) != now[flag]:
            words = f"--{flag.replace('_', '-')} {before.get(flag)}, and now it is {now[flag]}"
            stop(f"{name} in {args.out} was made with {words}; give the same, or another --out")


def read_config(path):
    """What `begin` wrote, a dict; empty when there is none."""
    with explained(f"{path} cannot be read", "remove it, and --restart"):
        return {**parse(path.read_bytes())} if path.exists() else {}


def told_apart(model):
    """The name of a model as `begin` writes it: a folder's with a hash of what is in it, where
    large files count by name and size alone."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if size < 2**26:
            digest.update(file.read_bytes())
    return f"{folder.name} {digest.hexdigest()[:12]}"


def lock(folder):
    """Refuses a second run on one folder. The system drops the lock with the process."""
    if RANK:
        return
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # open until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop(f"another run works in {folder}; wait for it to end, or choose another --out")
