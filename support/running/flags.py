"""The flags of the scripts: rows of PRESETS, flags of a script's own, and checks of all paths."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support.running.errors import explain_errors, stop
from support.running.files import check_regular, lock
from support.running.presets import settings_of
from support.running.processes import program, start_processes

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = "toy/base"


@dataclass(frozen=True)
class Flag:
    """A flag of one script, no hyperparameter. kind: None (a text), "switch", "files" (one or
    several), or as of `check_path`, which is done before any work."""

    help: str
    default: object = None
    choices: tuple | None = None
    kind: str | None = None


COMMON = {
    "preset": Flag("column of PRESETS (default: toy)", "toy", ("toy", "paper")),
    "out": Flag("folder of the run (default: in runs/)"),
    "restart": Flag("begin this phase again, dropping its checkpoint", kind="switch"),
}


def flags(phase, doc, **extra):
    """Parses the command line -> Namespace: --preset, --out, --restart, each row of PRESETS that
    `settings_of` the phase has, and `extra` (name -> Flag).

    phase: None for a script with no rows of its own. doc: its first paragraph is the help text.
    `out` is a Path, other paths are as they were given. Exits on what cannot be taken, and while
    another run works in --out. From here on running out of memory is explained.
    """
    settings = settings_of(phase)
    parser = make_parser(doc, settings, extra)
    args = parser.parse_args()
    for name, setting in settings.items():
        value = getattr(args, name)
        if value is None:
            setattr(args, name, getattr(setting, args.preset))
        elif type(value) is not str and not setting.low <= value <= setting.high:  # or NaN
            expected = f"expected {setting.low} to {setting.high}"
            parser.error(f"{flag_of(name)} is {value}; {expected}")
    start_processes()
    room = (phase or "").rpartition(".")[0]  # "visrl" of "visrl.sft"
    args.out = args.out or f"runs/{room and room + '_'}{args.preset}"
    check_path("--out", args.out, "new folder")
    args.out = Path(args.out)
    for name, flag in extra.items():
        value = getattr(args, name)
        if flag.kind not in (None, "switch") and value is not None:
            for path in value if flag.kind == "files" else [value]:
                check_path(flag_of(name), path, flag.kind.removesuffix("s"))
    args.model = model_path(args.model)
    print_configuration(args)
    lock(args.out)
    sizes = ("max_pixels", "batch_size", "prompts_at_once", "max_tokens")
    smaller = "a smaller --model"
    if getattr(args, "quantize", "nf4") == "none":
        smaller += ", or --quantize nf4"
    explain_errors(" or ".join(flag_of(name) for name in sizes if name in settings), smaller)
    # Ctrl-C ends at once: nothing has begun that could be lost.
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))
    return args


def model_path(model):
    """The embedded base lies beside the code, wherever a script is started."""
    return str(ROOT / EMBEDDED) if model == EMBEDDED else model


def command(args, script):
    """`script` ("python grpo.py --steps 0") as a command on the same run: with its --preset,
    --model, --out and what all phases take, such as --seed, where they are not the defaults."""
    room = "visrl_" if "-m visrl." in script else ""
    if args.preset != "toy":
        script += f" --preset {args.preset}"
    if args.model != model_path(getattr(settings_of(None)["model"], args.preset)):
        script += f" --model {shlex.quote(args.model)}"
    for name, setting in settings_of(None).items():
        value = getattr(args, name, None)
        is_own = name == "steps" and value == 0  # of one phase alone: the single-step control
        if name != "model" and not is_own and value not in (None, getattr(setting, args.preset)):
            script += f" {flag_of(name)} {value}"
    if args.out != Path(f"runs/{room}{args.preset}"):
        script += f" --out {shlex.quote(str(args.out))}"
    return script


def flag_of(name):
    return "--" + name.replace("_", "-")


def make_parser(doc, settings, extra):
    about = doc.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog=program(), description=about, allow_abbrev=False)
    for name, flag in {**COMMON, **extra}.items():
        options = {"default": flag.default, "choices": flag.choices}
        if flag.kind == "switch":
            options = {"action": "store_true"}
        if flag.kind == "files":
            options = {"nargs": "+"}
        parser.add_argument(flag_of(name), help=flag.help.replace("%", "%%"), **options)
    for name, setting in settings.items():
        values = str(setting.paper) or "none"
        if setting.paper != setting.toy:
            values = f"paper: {setting.paper}, toy: {setting.toy}"
        parser.add_argument(
            flag_of(name),
            type=type(setting.paper),
            choices=setting.choices,
            help=f"{setting.help} ({values})".replace("%", "%%"),
        )
    return parser


def print_configuration(args):
    print(f"{program()} --preset {args.preset} --out {args.out}")
    model = os.path.relpath(args.model) if os.path.isdir(args.model) else args.model
    words = []
    for name, value in {**vars(args), "model": model}.items():
        if name not in COMMON and str(value) not in ("None", "False", ""):
            words.append(f"{name}={value}")
    print("  " + "  ".join(words), flush=True)


def check_path(flag, value, kind):
    """Stops, with one line that names flag, value, reason and remedy, unless the path can be used.

    kind: "file" or "folder", to be read; "new file" or "new folder", to be written, which may be
    there. It is opened or made: permissions alone do not tell of a full disk.
    """
    path = Path(value)
    try:
        check_regular(path)
        if kind == "new folder":
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        elif kind == "new file":
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
            if path.exists():
                path.open("ab").close()
        elif kind == "folder":
            os.listdir(path)
        else:
            path.open("rb").close()
    except OSError as e:
        remedy = f"give a path that can be used as a {kind}"
        stop(f"{flag} {value}: {e.strerror.lower()}; {remedy}")
