"""README and docs: commands run as far as their flags, names are there, pages stay short."""

import argparse
import functools
import importlib
import re
import runpy
import shlex
import sys
from unittest import mock

from support.running.flags import ROOT
from support.running.presets import PRESETS

import pytest

PAGES = [ROOT / "README.md", *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("docs/**/*.md")]
PAGES += ROOT.glob(".github/*.md")
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
CODE = [*ROOT.glob("*.py")]
CODE += [f for room in ("support", "toy", "visrl", "speed") for f in (ROOT / room).rglob("*.py")]
PHASES = ("make_data.py", "sft.py", "grpo.py", "grpo.py --steps 0", "evaluate.py")
MAIN = " && \\\npython ".join(["pip install -r requirements.txt", *PHASES]) + "\n"
TEST = "pip install -r requirements.txt pytest pytest-xdist hypothesis "
TEST += "&& python -m pytest -q -n 2 --dist loadfile\n"

# Sections 3.3 and 4.1 of arXiv:2606.13156; of VisRL the values of its authors' code
PAPERS = """
all: model Qwen/Qwen3-VL-4B-Instruct, quantize nf4, steps 2, feedback overlay
make_data: train_samples 2400, val_samples 510, test_samples 505, iou_max 0.85, start student
make_data: teacher vlm, right_boxes drop, max_tokens 160
sft: lr 2e-05, epochs 10, batch_size 4, grad_accum 4, warmup 0.1, lora_rank 64, lora_alpha 128
grpo: steps 2, lr 2e-06, max_tokens 160, group_size 6, temperature_first 1.0, temperature 0.7
grpo: beta 0.04, entropy 0.01, kl paper, grad_accum 8
evaluate: max_tokens 160
visrl.make_data: sft_samples 30647, train_samples 180000, crop box
visrl.sft: lr 0.0001, epochs 3, batch_size 2, grad_accum 8, lora_rank 8, lora_alpha 16
visrl.sft: warmup 0.1, max_pixels 262144
visrl.make_pairs: attempts 3, temperature 2.0, top_p 0.7, top_k 50, iou_max 0.05, win 0.8
visrl.make_pairs: lose 0.2, critic prompted
visrl.dpo: lr 5e-06, beta 0.1, epochs 5, batch_size 3, grad_accum 8, warmup 0.1
"""


def fenced(text):
    return re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)


def in_backticks(text):
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands():
    """The commands of this code, lists of words: of the pages, and of the modules' docstrings."""
    lines = []
    for text in TEXT.values():
        lines += "\n".join(fenced(text)).replace("\\\n", " ").splitlines() + in_backticks(text)
    for file in CODE:  # behind two spaces is an explanation
        lines += re.findall(r"^    (python .*?)(?:  .*)?$", file.read_text("utf-8"), re.M)
    found = set()
    for line in lines:
        for command in re.split(r"&&|;", line.replace("$seed", "0").replace("DIR", "folder")):
            if re.match(r"\s*(python|torchrun) (?!-m (pytest|tests))", command):
                words = shlex.split(command, comments=True)
                starts = [word == "-m" or word.endswith(".py") for word in words]
                found.add(tuple(words[starts.index(True) :]))
    return sorted(found)


@functools.cache
def flags_and_problems():
    """Starts each command, and stops it when its flags are read."""
    flags, problems = {"--help"}, []
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given):
        flags.update(parser._option_string_actions)
        args = parse(parser, *given)
        if not hasattr(args, "preset"):  # no range of values is looked at after this
            raise KeyboardInterrupt
        return args

    for words in commands():
        words = list(words[words[0] == "-m" :])
        run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch("argparse.ArgumentParser.parse_args", parse_args),
            mock.patch("support.running.flags.start_processes", side_effect=KeyboardInterrupt),
        ):
            try:
                run(words[0], run_name="__main__")
            except KeyboardInterrupt:
                continue
            except (SystemExit, ImportError, OSError) as e:
                problems.append(f"{' '.join(words)}: {e}")
    return flags, problems


def test_commands_are_taken():
    assert not flags_and_problems()[1]


@pytest.mark.parametrize("page", TEXT)
def test_what_a_page_names_is_there(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", TEXT[page])
    missing = [link for link in links if not (folder / link).exists()]
    for code in in_backticks(TEXT[page]):
        missing += set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - flags_and_problems()[0]
        path = re.fullmatch(r"(support|toy|visrl|speed|docs|tests|assets)/[\w./]+|\w+\.py", code)
        if path and not (ROOT / code).exists() and not (folder / code).exists():
            missing.append(code)
        name = re.fullmatch(r"(common|make_data|visrl\.\w+)\.(?!py$)(\w+)", code)
        if name and not hasattr(importlib.import_module(name[1]), name[2]):
            missing.append(code)
    assert not missing


def test_the_readme_has_two_commands_and_few_figures():
    text = TEXT["README.md"]
    assert [block for block in fenced(text) if block.startswith("pip install -r")] == [MAIN, TEST]
    assert len(re.findall(r"(?<![\w.])\d\.\d{3}(?!\d)", text)) <= 45


def test_the_pages_are_short():
    assert len(TEXT["README.md"].splitlines()) <= 160
    assert sum(len(text.splitlines()) for text in TEXT.values()) <= 1100
    assert sum(len(text.split()) for text in TEXT.values()) <= 12000
    for page, text in TEXT.items():
        rest = re.sub(r"^```.*?^```|<!-- table.*?<!-- end -->", "", text, flags=re.S | re.M)
        wide = [line for line in rest.splitlines() if len(line) > 100 and line[0] not in "|!"]
        assert not wide or page.startswith("docs/tables/"), page


def test_presets_hold_the_papers_values():
    for line in PAPERS.strip().splitlines():
        phase, rows = line.split(": ", 1)
        for name, value in (row.split() for row in rows.split(", ")):
            assert str(PRESETS[phase][name].paper) == value, (phase, name)
