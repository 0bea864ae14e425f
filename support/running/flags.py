"""The flags of the scripts: rows of PRESETS, flags of a script's own, and checks of all paths."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support.running.errors import stop
from support.running.files import lock
from support.running.presets import settings_of
from support.running.processes import RANK, program, start_processes

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = "toy/base"


@dataclass(frozen=True)
class Flag:
    """A flag of one script, no hyperparameter.

    kind: None (a text), "switch", or a path, which is checked before any work: "file", "folder",
    "file or folder", "folders" (several), "new file" and "new folder" (to be written; may be
    there).
    """

    help: str
    default: object = None
    choices: tuple | None = None
    kind: str | None = None


def flags(phase, doc, **extra):
    """Parses the command line -> Namespace: --preset, --out, --restart, --skip-bad, each row of
    PRESETS that `settings_of` the phase has, and `extra` (name -> Flag).

    phase: None for a script with no rows of its own. doc: its first paragraph is the help text.
    `out` is a Path, other paths are as they were given. Prints the resolved configuration. Exits on
    an unknown flag, a value of the wrong type or out of range, a path that is not what it should
    be, and while another run works in --out.
    """
    settings = settings_of(phase)
    parser = make_parser(doc, settings, extra)
    args = parser.parse_args()
    for name, setting in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(setting, args.preset))
        check_range(parser, name, setting, getattr(args, name))
    start_processes()
    room = (phase or "").rpartition(".")[0]  # "visrl" of "visrl.sft"
    args.out = args.out or f"runs/{room and room + '_'}{args.preset}"
    check_path("--out", args.out, "new folder")
    args.out = Path(args.out)
    for name, flag in extra.items():
        value = getattr(args, name)
        if flag.kind == "folders":
            for folder in value:
                check_path(flag_of(name), folder, "folder")
        elif flag.kind not in (None, "switch") and value is not None:
            check_path(flag_of(name), value, flag.kind)
    args.model = model_path(args.model)
    print_configuration(args)
    lock(args.out)
    # Ctrl-C ends at once: nothing has begun that could be lost.
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))
    return args


def model_path(model):
    """The embedded base lies beside the code, wherever a script is started."""
    return str(ROOT / EMBEDDED) if model == EMBEDDED else model


def command(args, script):
    """`script` ("python grpo.py --steps 0") as a command on the same run, with its --preset, its
    --model and its --out where they are not the defaults.
    """
    room = "visrl_" if "-m visrl." in script else ""
    if args.preset != "toy":
        script += f" --preset {args.preset}"
    if args.model != model_path(getattr(settings_of(None)["model"], args.preset)):
        script += f" --model {shlex.quote(args.model)}"
    if args.out != Path(f"runs/{room}{args.preset}"):
        script += f" --out {shlex.quote(str(args.out))}"
    return script


def flag_of(name):
    return "--" + name.replace("_", "-")


def make_parser(doc, settings, extra):
    parser = argparse.ArgumentParser(
        prog=program(), description=doc.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--preset", choices=("toy", "paper"), default="toy", help="column of PRESETS (default: toy)"
    )
    parser.add_argument("--out", help="folder of the run (default: in runs/)")
    parser.add_argument(
        "--restart", action="store_true", help="begin this phase again, dropping its checkpoint"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="go on without samples that do not pass the checks"
    )
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
    for name, flag in extra.items():
        options = {"default": flag.default, "choices": flag.choices}
        if flag.kind == "switch":
            options = {"action": "store_true"}
        elif flag.kind == "folders":
            options = {"default": flag.default or (), "nargs": "+"}
        parser.add_argument(flag_of(name), help=flag.help.replace("%", "%%"), **options)
    return parser


def check_range(parser, name, setting, value):
    if isinstance(setting.paper, str):
        return
    if not setting.low <= value <= setting.high:  # NaN is in no range
        given = f"{flag_of(name)} is {value}"
        parser.error(f"{given}; expected {setting.low} to {setting.high}")


def print_configuration(args):
    values = dict(vars(args))
    for name in ("preset", "out", "restart", "skip_bad"):
        del values[name]
    if os.path.isdir(args.model):
        values["model"] = os.path.relpath(args.model)
    given = []
    for name, value in values.items():
        if value is None or value is False or value in ((), ""):
            continue
        given.append(f"{name}={value}")
    print(f"{program()} --preset {args.preset} --out {args.out}")
    print("  " + "  ".join(given), flush=True)


def check_path(flag, value, kind):
    """Stops, with one line that names flag, value and remedy, unless the path is of this kind."""
    if kind in ("file", "folder", "file or folder"):
        check_existing(flag, value, kind)
    elif not RANK:
        check_writable(flag, value, kind)


def check_existing(flag, value, kind):
    try:
        if os.path.isdir(value):
            if kind == "file":
                stop(f"{flag} {value}: is a folder; give a file")
            os.listdir(value)
        else:
            with open(value, "rb"):
                pass
            if kind == "folder":
                stop(f"{flag} {value}: is a file; give a folder")
    except (FileNotFoundError, NotADirectoryError):
        stop(f"{flag} {value}: no such {kind}; give the path of one that is there")
    except OSError as e:
        allow = f"allow reading it, or give another {kind}"
        stop(f"{flag} {value}: cannot be read ({e.strerror}); {allow}")
    except ValueError as e:  # a null byte
        stop(f"{flag} {value!r}: is no path ({e}); give the path of a {kind} that is there")


def check_writable(flag, value, kind):
    """By writing: permissions alone do not tell of a full disk or one that takes no writes."""
    path = Path(value)
    try:
        if kind == "new folder":
            if path.exists() and not path.is_dir():
                stop(f"{flag} {value}: is a file; give a folder")
            path.mkdir(parents=True, exist_ok=True)
            folder = path
        else:
            if path.is_dir():
                stop(f"{flag} {value}: is a folder; give the path of a file to write")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            folder = path.parent
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                path.stat()  # a loop of links shows here
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        allow = "allow writing there, or give another path"
        stop(f"{flag} {value}: cannot be written ({reason}); {allow}")
