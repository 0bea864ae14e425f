"""README and docs: what they state about files, commands, flags and headings is so in the code.

Each check takes texts and returns a list of problems, so that one test can show that it finds what
it looks for.
"""

import argparse
import ast
import importlib.util
import re
import shlex

from support.data import sources
from support.report.health import FEWEST_UPDATES, HEALTHY, LAST_UPDATES
from support.running.flags import ROOT, Flag, check_range, make_parser
from support.running.presets import PRESETS, settings_of

import pytest

DOCS = ["README.md", "visrl/README.md", "speed/README.md"]
DOCS += [f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md")]
FOLDERS = ("support", "toy", "visrl", "speed", "tests")  # of code
SOURCES = [f.name for f in ROOT.glob("*.py")]
SOURCES += [str(f.relative_to(ROOT)) for d in FOLDERS for f in (ROOT / d).rglob("*.py")]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*DOCS, *SOURCES]}
CODE = "\n".join(TEXT[name] for name in SOURCES if "test" not in name)

PHASE = {  # a script with rows of PRESETS -> its phase
    "make_data.py": "make_data",
    "sft.py": "sft",
    "grpo.py": "grpo",
    "evaluate.py": "evaluate",
    "support/report/score_predictions.py": "evaluate",
    "support/model/merge.py": None,
    "visrl/make_data.py": "visrl.make_data",
    "visrl/sft.py": "visrl.sft",
    "visrl/make_pairs.py": "visrl.make_pairs",
    "visrl/dpo.py": "visrl.dpo",
    "visrl/evaluate.py": "visrl.evaluate",
}
FOREIGN = {  # flags of other people's programs
    "torchrun": {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"},
    "hf": {"--repo-type", "--local-dir"},
    "ray": {"--head", "--address=FIRST_NODE:6379"},
    "python": {"--help"},
}
YOURS = {"my.jsonl", "all.jsonl", "theirs.jsonl", "photo.jpg", "photos/1.jpg"}  # a reader's files
# Tables 1 and 2 of the paper, as far as they are quoted
PAPERS_NUMBERS = {"0.796", "0.719", "0.487", "0.377", "0.156", "0.140", "0.029"}
# The files of a run -> the words of the code that write them
RUN_FILES = {
    r"(data/)?(train|val|test|student|traces|sft)\.jsonl": (
        "support/data/sources.py",
        'f"{name}.jsonl"',
    ),
    r"(train|val|test)\.jsonl\.skipped": ("support/data/samples.py", '".skipped"'),
    r"data/": ("make_data.py", 'args.out / "data"'),
    r"(data/)?images/": ("support/data/datasets.py", 'f"images/'),
    r"sft/": ("sft.py", 'save_if_due(args, "sft"'),
    r"(base_)?grpo(_single)?/": ("grpo.py", "args.out / name"),
    r"(sft|(base_)?grpo(_single)?|<name>)\.checkpoint": (
        "support/model/checkpoints.py",
        ".checkpoint",
    ),
    r"base\.json|adapter_config\.json|adapter_model\.safetensors": (
        "support/model/checkpoints.py",
        "ADAPTER_FILES",
    ),
    r"log/(\*|sft|grpo|grpo_single|<name>)\.jsonl|log/": (
        "support/model/checkpoints.py",
        "log/{name}.jsonl",
    ),
    r"log/evaluate_(\*|<row>|\w+)\.jsonl": ("evaluate.py", "log/evaluate_{row.log}.jsonl"),
    r"log/\*\.config\.json": ("support/running/files.py", "log/{name}.config.json"),
    r"results\.(md|json)": ("support/report/tables.py", '"results.'),
    r"report\.html": ("support/report/page.py", '"report.html"'),
    r"log/validation/(\w+\.jsonl)?": (
        "support/report/page.py",
        "log/validation/{name}_{update}.jsonl",
    ),
    r"figures/": ("support/report/pictures.py", "figures/{name}.png"),
    r"(figures/)?(corrections|failures|first)\.png": (
        "support/report/pictures.py",
        '("corrections",',
    ),
    r"(figures/)?lead\.png": ("support/report/pictures.py", "figures/lead.png"),
}


# Parts of a Markdown text -------------------------------------------------------------------------
def fenced(text, language="bash"):
    """The contents of its fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text):
    """The text without fenced blocks and HTML comments."""
    return re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.S | re.M)


def in_backticks(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def headings(text):
    """Its headings, without the marks of code."""
    return [h.replace("`", "").strip() for h in re.findall(r"^#+ (.*)$", prose(text), re.M)]


def anchor(heading):
    """What GitHub links a heading by."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def section(text, heading):
    """What stands under a heading, as far as the next one of its kind or above; "" without it."""
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.S | re.M)
    return match[2] if match else ""


# Files and names ----------------------------------------------------------------------------------
def is_path(code):
    """Whether code in backticks names a file or a folder."""
    code = re.sub("<(name|row|preset)>", "x", code)
    if not re.fullmatch(r"[\w.*()-]+(/[\w.*()-]+)*/?", code) or re.fullmatch(r"[\d./]+", code):
        return False
    kinds = "py|md|txt|toml|html|jsonl?|png|jpg|checkpoint|safetensors|skipped|parquet|p|tar.gz"
    return "/" in code or bool(re.search(rf"\.({kinds})$", code))


def file_problems(name, text):
    """Files and folders that are neither here, nor written by a run, nor spoken of in the code."""
    problems = []
    for code in filter(is_path, in_backticks(text)):
        here = [ROOT / code, (ROOT / name).parent / code]
        of_run = any(re.fullmatch(pattern, code) for pattern in RUN_FILES)
        of_reader = code in YOURS or re.fullmatch(
            r"runs/(toy|visrl_toy|paper|mine|perturbed|<preset>)/?", code
        )
        known = f'"{code}"' in CODE or re.search(
            rf"\W{re.escape(code)}\W", TEXT["support/data/datasets.py"]
        )
        if not (any(path.exists() for path in here) or of_run or of_reader or known):
            problems.append(f"{name}: {code} is not there")
    return problems


def tree_problems(name, text):
    """Lines of a file tree whose first word is no file."""
    problems = []
    for block in fenced(text, "text"):
        if not block.startswith("README.md "):
            continue
        words = [line.split()[0] for line in block.splitlines() if line and line[0] != " "]
        problems += [f"{name}, tree: {word}" for word in words if not (ROOT / word).exists()]
    return problems


def name_problems(name, text):
    """`module.name` that the module does not define, and `python -m` modules that are not there."""
    problems = []
    for code in in_backticks(text):
        match = re.fullmatch(r"((?:support\.\w+|toy|visrl|speed)\.)?(\w+)\.(\w+)(\(.*\))?", code)
        if not match or any(re.fullmatch(pattern, code) for pattern in RUN_FILES):
            continue
        module = f"{match[1] or ''}{match[2]}".replace(".", "/") + ".py"
        if module not in TEXT:
            continue
        defined = rf"^\s*(def|class) {match[3]}\b|^{match[3]} = |^(from|import) .*\b{match[3]}\b"
        if match[3] != "py" and not re.search(defined, TEXT[module], re.M):
            problems.append(f"{name}: {module} has no {match[3]}")
    return problems


def link_problems(name, text):
    """Links and pictures whose file or heading is not there."""
    problems = []
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists():
            problems.append(f"{name}: link to {target}")
        elif place and place not in map(anchor, headings(file.read_text(encoding="utf-8"))):
            problems.append(f"{name}: link to {target}, which has no such heading")
    return problems


def reference_problems(name, text):
    """`README, "Heading"`, `docs/x.md` and `docs/x.md, "Heading"` that lead nowhere."""
    problems = []
    flat = re.sub(r"\s*\n[\s#]*", " ", text)  # a reference may go over a line's end
    for file in set(re.findall(r"\bdocs/\w+\.md", flat)):
        if not (ROOT / file).exists():
            problems.append(f"{name}: {file} is not there")
    for file, heading in re.findall(r'(README|docs/\w+\.md), "([^"]+)"', flat):
        target = "README.md" if file == "README" else file
        if heading not in headings(TEXT.get(target, "")):
            problems.append(f'{name}: {target} has no heading "{heading}"')
    return problems


# Commands and flags -------------------------------------------------------------------------------
def own_flags(script):
    """The Flags that a script gives to `flags`, read from its source: name -> Flag."""
    for node in ast.walk(ast.parse(TEXT[script])):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flags":
            call = ast.unparse(ast.Call(ast.Name("dict"), [], node.keywords))
            return eval(call, {"Flag": Flag, "sources": sources})
    raise ValueError(f"{script} does not call flags()")


def parsers():
    """script -> its ArgumentParser, or, of a script with a parser of its own, the set of flags."""
    out = {}
    for script, phase in PHASE.items():
        parser = make_parser("", settings_of(phase), own_flags(script))
        parser.exit_on_error = False
        out[script] = parser
    for script in (
        "speed/benchmark.py",
        "speed/random_checkpoint.py",
        "toy/recipe/train.py",
        "toy/recipe/skills.py",
        "tests/browser.py",
    ):
        out[script] = set(re.findall(r'\badd(?:_argument)?\(\s*"(--[\w-]+)"', TEXT[script]))
    return out


PARSERS = parsers()


def flags_of(parser):
    if isinstance(parser, set):
        return parser
    return {option for action in parser._actions for option in action.option_strings}


ALL_FLAGS = {flag for parser in PARSERS.values() for flag in flags_of(parser)}


def commands(text):
    """The commands in it, as lists of words: in bash blocks, and in backticks."""
    lines = []
    for block in fenced(text):
        lines += block.replace("\\\n", " ").splitlines()
    lines += [code for code in in_backticks(text) if re.match(r"(python|torchrun) ", code)]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def usage(text):
    """The indented commands of a module's docstring, as a bash block; what follows two spaces is
    an explanation."""
    doc = ast.get_docstring(ast.parse(text), clean=False) or ""
    lines = re.findall(r"^    ((?:python|torchrun) .*)$", doc, re.M)
    short = [re.split(r"\s{2,}", line)[0] for line in lines]
    return "```bash\n" + "\n".join(short) + "\n```\n"


def command_problems(name, text):
    """Commands whose script is not there, or does not take these flags and values."""
    problems = []
    for words in commands(text):
        problems += [f"{name}: {problem}" for problem in problems_of(words)]
    return problems


def problems_of(words):
    if words[0] == "pip":
        after = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-r"]
        return [f"no {file}" for file in after if not (ROOT / file).exists()]
    if words[0] not in ("python", "torchrun"):
        given = {word for word in words if word.startswith("--")}
        return [f"{words[0]} {flag}" for flag in given - FOREIGN.get(words[0], set())]
    words = words[1:]
    if "-m" in words:
        words = words[words.index("-m") :]  # torchrun's own flags come before it
        script = words[1].replace(".", "/") + ".py"
        if script not in TEXT:
            there = importlib.util.find_spec(words[1].split(".")[0])
            return [] if there and "." not in words[1] else [f"no module {words[1]}"]
        given = words[2:]
    else:
        number = [i for i, word in enumerate(words) if word.endswith(".py")]
        if not number or words[number[0]] not in TEXT:
            return [f"no script in {words}"]
        script = words[number[0]]
        before = {word for word in words[: number[0]] if word.startswith("--")}
        if before - FOREIGN["torchrun"]:
            return [f"torchrun {before}"]
        given = words[number[0] + 1 :]
    return flag_problems(script, given)


def flag_problems(script, given):
    """What a script would say to these words, without starting it."""
    parser = PARSERS.get(script)
    if parser is None:
        return [f"{script} is started by no command"]
    given = [word for word in given if word not in FOREIGN["python"]]
    if isinstance(parser, set):
        return [f"{script} {w}" for w in given if w.startswith("--") and w not in parser]
    try:
        args, rest = parser.parse_known_args(given)
    except (argparse.ArgumentError, SystemExit) as e:
        return [f"{script} {given}: {e}"]
    for name, setting in settings_of(PHASE[script]).items():
        if getattr(args, name) is not None:
            try:
                check_range(parser, name, setting, getattr(args, name))
            except SystemExit:
                rest.append(name)
    return [f"{script} {word}" for word in rest]


def loose_flag_problems(name, text):
    """Flags in backticks that no script has."""
    problems = []
    for code in in_backticks(text):
        if re.match(r"(pip|hf|torchrun) ", code):
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            if flag not in ALL_FLAGS | {"--help"}:
                problems.append(f"{name}: {flag}")
    return problems


# Numbers ------------------------------------------------------------------------------------------
def packages(text):
    """The packages of requirements.txt as the README names them, behind that file's name."""
    match = re.search(r"requirements\.txt[^\n]{0,60}?\b(torch\b[\w ,`-]*)", text)
    return re.findall(r"[a-z]+", match[1].replace(" and ", " ")) if match else []


def numbers(text):
    """Its numbers with three digits after the point, without signs."""
    return set(re.findall(r"(?<![\w.])\d\.\d{3}(?!\d)", text))


def number_problems(readme, results):
    """Numbers of the README's results that docs/results.md, where they come from, does not have;
    of a line that begins with the name of a row, that such rows do not have."""
    shown = section(readme, "What came out")
    shown += "".join(fenced(section(readme, "Two commands"), "text"))
    problems = []
    for line in shown.splitlines():
        name = re.split(r" \||  ", line.removeprefix("| "))[0]
        rows = [row for row in results.splitlines() if row.startswith(f"| {name} |")]
        lacking = numbers(line) - numbers("\n".join(rows) or results) - PAPERS_NUMBERS
        problems += [f"README.md, {name}: {n} is not in docs/results.md" for n in sorted(lacking)]
    return problems


def reading_problems(results):
    """Numbers of the reading in docs/results.md that no table there has."""
    generated = "".join(re.findall(r"<!-- generated:.*?<!-- end -->", results, re.S))
    reading = section(results, "What they say") + section(results, "How far it goes")
    reading = re.sub(r"<!-- generated:.*?<!-- end -->", "", reading, flags=re.S)
    return sorted(numbers(reading) - numbers(generated) - PAPERS_NUMBERS)


def width_problems(name, text):
    """Lines of prose over 100 columns. Tables, blocks and what a run has printed may be wider."""
    generated = r"<!-- generated:.*?<!-- end -->|^```.*?^```"
    rest = re.sub(generated, lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)
    problems = []
    for number, line in enumerate(rest.splitlines(), 1):
        if len(line) > 100 and not line.startswith("|"):
            problems.append(f"{name}, line {number}: {len(line)} columns")
    return problems


def healthy_problems(text):
    """Metrics whose healthy range is not as in support/report/health.py."""
    problems = []
    for metric, (low, high, _) in HEALTHY.items():
        row = re.search(rf"^\| .*`{metric}`.*$", section(text, "Logs"), re.M)
        if not row or f"| {low} to {high}" not in row[0]:
            problems.append(f"{metric}: {low} to {high}")
    return problems


# The tests ----------------------------------------------------------------------------------------
CHECKS = [
    file_problems,
    tree_problems,
    name_problems,
    link_problems,
    reference_problems,
    command_problems,
    loose_flag_problems,
    width_problems,
]


@pytest.mark.parametrize("name", DOCS)
@pytest.mark.parametrize("check", CHECKS)
def test_what_the_docs_state(check, name):
    problems = check(name, TEXT[name])
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "tests/test_docs.py"])
def test_what_the_code_refers_to(name):
    problems = reference_problems(name, TEXT[name])
    problems += command_problems(name, usage(TEXT[name]))
    assert not problems, "\n".join(problems)


def test_files_of_a_run_are_written_by_the_code():
    for file, words in RUN_FILES.values():
        assert words in TEXT[file], (file, words)


def test_the_readme_names_what_stands_beside_it():
    """The tutorial's files, which stand alone at the top, and the folders."""
    tutorial = {"common.py", "make_data.py", "sft.py", "grpo.py", "evaluate.py", "test_common.py"}
    assert {f.name for f in ROOT.glob("*.py")} == tutorial
    for name in (*tutorial, "requirements.txt", "docs/", *(f"{folder}/" for folder in FOLDERS)):
        assert name in TEXT["README.md"], name


def test_the_readme_names_the_packages():
    needed = re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert packages(TEXT["README.md"]) == needed


def test_the_readme_has_the_main_commands():
    """`.ci/run` takes the test command from there, too."""
    lines = [line for block in fenced(TEXT["README.md"]) for line in block.splitlines()]
    test = "pip install -r requirements.txt pytest pytest-xdist hypothesis "
    test += "&& python -m pytest -q -n 2 --dist loadfile"
    assert test in lines
    text = TEXT["README.md"].replace("\\\n", " ")
    phases = r"python make_data\.py.+?sft\.py.+?grpo\.py.+?grpo\.py --steps 0.+?evaluate\.py"
    assert any(re.search(phases, block, re.S) for block in fenced(text))


def test_the_readmes_numbers_are_those_of_the_results():
    problems = number_problems(TEXT["README.md"], TEXT["docs/results.md"])
    assert not problems, "\n".join(problems)


def test_the_reading_is_of_the_tables():
    assert reading_problems(TEXT["docs/results.md"]) == []


def test_healthy_ranges_are_those_of_the_code():
    assert healthy_problems(TEXT["docs/words.md"]) == []
    assert (LAST_UPDATES, FEWEST_UPDATES) == (10, 5)
    words = section(TEXT["docs/words.md"], "Logs")
    assert "the last 10 updates, from the fifth on" in " ".join(words.split())


MESSAGES = [
    "is finished; --restart begins again",
    "going on after update ",
    "was made otherwise:",
    " was made with --",
    "another run works in ",
    "is missing; first run: ",
    "cannot be written (",
    ": no such ",
    " problems in ",
    " is damaged",
    "was trained on another base model",
    "not a multiple of the ",
    ": loss ",
    "out of memory with the samples ",
    "(healthy: ",
]


def test_the_messages_are_those_of_the_code():
    rows = section(TEXT["docs/running.md"], "Messages")
    quoted = " ".join(re.findall(r"^\| (.*?) \|", rows, re.M))
    assert quoted.count("`") // 2 == len(MESSAGES) + 1  # of one row, two
    for message in MESSAGES:
        assert message in quoted and message in CODE, message


def test_presets_hold_the_papers_values():
    """Sections 3.3 and 4.1 of arXiv:2606.13156; of VisRL those of its authors' code."""
    values = {
        "all": dict(model="Qwen/Qwen3-VL-4B-Instruct", quantize="nf4", steps=2, feedback="overlay"),
        "make_data": dict(
            train_samples=2400,
            val_samples=510,
            test_samples=505,
            iou_max=0.85,
            start="student",
            teacher="vlm",
            max_tokens=160,
        ),
        "sft": dict(
            lr=2e-5,
            epochs=10,
            batch_size=4,
            grad_accum=4,
            warmup=0.1,
            lora_rank=64,
            lora_alpha=128,
        ),
        "grpo": dict(
            steps=2,
            lr=2e-6,
            max_tokens=160,
            group_size=6,
            temperature_first=1.0,
            temperature=0.7,
            beta=0.04,
            entropy=0.01,
            kl="paper",
            grad_accum=8,
        ),
        "evaluate": dict(max_tokens=160),
        "visrl.make_data": dict(sft_samples=30647, train_samples=180000, crop="box"),
        "visrl.sft": dict(
            lr=1e-4,
            epochs=3,
            batch_size=2,
            grad_accum=8,
            lora_rank=8,
            lora_alpha=16,
            max_pixels=262144,
        ),
        "visrl.make_pairs": dict(
            attempts=3, temperature=2.0, iou_max=0.05, win=0.8, lose=0.2, critic="prompted"
        ),
        "visrl.dpo": dict(
            lr=5e-6, beta=0.1, epochs=5, batch_size=3, grad_accum=8, warmup=0.1, condition="own"
        ),
    }
    for phase, rows in values.items():
        for name, value in rows.items():
            assert PRESETS[phase][name].paper == value, (phase, name)


BAD = [  # a text that is not so -> the check that finds it
    (file_problems, "See `support/nothing.py`."),
    (file_problems, "It writes `log/other.csv` and `somewhere/`."),
    (tree_problems, "```text\nREADME.md   this page\nnothing.py  a phase\n```\n"),
    (name_problems, "The loop is `common.roll`."),
    (link_problems, "[more](docs/nothing.md)"),
    (link_problems, "[more](docs/words.md#nothing)"),
    (link_problems, "![a picture](assets/nothing.png)"),
    (reference_problems, 'See README, "Nothing\nof the kind".'),
    (reference_problems, "See docs/nothing.md."),
    (reference_problems, 'See docs/words.md, "Nothing".'),
    (command_problems, "```bash\npython nothing.py\n```\n"),
    (command_problems, "```bash\npython sft.py --group-size 3\n```\n"),
    (command_problems, "```bash\npython sft.py && python grpo.py --steps 50\n```\n"),
    (command_problems, "```bash\npython make_data.py --start \\\n    nowhere\n```\n"),
    (command_problems, "```bash\npython -m support.nothing\n```\n"),
    (command_problems, "```bash\npython -m speed.benchmark --nothing\n```\n"),
    (command_problems, "```bash\ntorchrun --nothing 2 sft.py\n```\n"),
    (command_problems, "```bash\npip install -r nothing.txt\n```\n"),
    (command_problems, "Run `python grpo.py --reward six`."),
    (command_problems, usage('"""Doc.\n\n    python sft.py --nothing    why\n"""')),
    (loose_flag_problems, "With `--nothing` it ends."),
    (width_problems, "word " * 21),
]


@pytest.mark.parametrize("check, text", BAD)
def test_each_check_finds_what_it_looks_for(check, text):
    assert check("README.md", text)


def test_wrong_numbers_and_packages_are_found():
    readme = "## What came out\n\n| SFT | 0.725 |\n\nOr 0.111.\n\n## More\n\n0.222\n"
    other = "| GRPO | 0.725 |\n\n0.111\n"
    assert number_problems(readme, "| SFT | -0.725 [0.1, 0.2] |\n" + other) == []
    problem = "README.md, SFT: 0.725 is not in docs/results.md"
    assert number_problems(readme, "| SFT | 0.724 |\n" + other) == [problem]
    generated = "<!-- generated: results.md -->\n| SFT | 0.724 |\n<!-- end -->\n"
    assert reading_problems("## What they say\n\nIt is 0.725.\n\n" + generated) == ["0.725"]
    assert packages("`requirements.txt`: torch, numpy and tqdm.") == ["torch", "numpy", "tqdm"]
    assert healthy_problems("## Logs\n\n| `kl` | x | 0 to 0.6 |\n")
