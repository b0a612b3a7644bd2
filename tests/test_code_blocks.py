"""Blocks of code in the pages: commands parse, YAML is YAML, Python is run by a test or says what it is a part of."""

import ast
import re
import shlex
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import yaml
from helpers.recipe_files import ROOT
from test_docs import PAGES

from discrete_lit.cli.commands import COMMANDS, FUNCTION_COMMANDS, main
from discrete_lit.cli.recipes import find_recipe

BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# Pages whose Python is run as it stands there, with the test that does.
RUN = {"README.md": "tests/test_readme.py", "docs/text_and_image.md": "tests/generators/test_unified.py"}
MARKS = ("# Part of ", "# Needs ")
VARIABLES = {"split": "shards", "guidance": "1.5", "rows": "a: b.npz", "SLURM_ARRAY_TASK_ID": "1"}
# In place of a user's own files of model and data.
STAND_IN = "quickstart/masked.yaml"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[tuple[str, str]]:
    """Every block of a language with its page; what a page takes from another file is not its own."""
    return [
        (named(page), code)
        for page in PAGES
        for found, code in BLOCK.findall(page.read_text())
        if found == language and "--8<--" not in code
    ]


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every `discrete-lit` command of the pages, as words, with its page."""
    found = []
    for page, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            line = re.sub("…[^…]*…", "", line)  # stands for what was said before
            line = re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda name: VARIABLES.get(name[1] or name[2], name[0]), line)
            parts = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            parts.whitespace_split = True
            for joined, words in groupby(parts, key=lambda word: set(word) <= set(";&|")):
                command = list(words)
                # Behind `for … do` and the like.
                if not joined and "discrete-lit" in command:
                    found.append((page, tuple(command[command.index("discrete-lit") + 1 :])))
    return found


def test_there_are_commands() -> None:
    assert len(commands()) > 25
    assert {command[0] for _, command in commands()} > {"fit", "sample", "tokenize", "evaluate", "import"}


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_commands_of_the_pages_parse(
    page: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no recipe stands for a user's own: its command parses with a recipe in place of it."""
    monkeypatch.chdir(ROOT)
    name, *words = command
    if name.startswith("--"):
        main([name])
        return
    assert name in COMMANDS, f"{page}: {name} is no command"
    own = [file for flag, file in pairwise(words) if flag == "--config" and find_recipe(file) is None]
    # Training reads a checkpoint that it is given, and there is none.
    absent = [] if name in FUNCTION_COMMANDS else [word for word in words if word.endswith(".ckpt")]
    for file in (*own, *absent):
        place = words.index(file)
        del words[place - 1 : place + 1]
    files = [] if name in FUNCTION_COMMANDS else ["--config", STAND_IN] if own or "--config" not in words else []
    try:
        main([name, *words, *files, "--print_config"])
    except SystemExit as stopped:
        assert stopped.code in (0, None), f"{page}: {' '.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(("page", "code"), blocks("yaml"), ids=lambda value: value.partition("\n")[0])
def test_yaml_of_the_pages_is_yaml(page: str, code: str) -> None:
    assert isinstance(yaml.safe_load(code), dict), page


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value.partition("\n")[0])
def test_python_of_the_pages_is_run_or_says_what_it_is_part_of(page: str, code: str) -> None:
    tree = ast.parse(code)
    if page in RUN:
        assert Path(page).name in (ROOT / RUN[page]).read_text(), f"{RUN[page]} does not run {page}"
    else:
        assert code.startswith(MARKS), f"{page}: a block of Python that no test runs begins with one of {MARKS}"
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("discrete_lit"):
            for alias in node.names:
                assert hasattr(import_module(str(node.module)), alias.name), f"{page}: {node.module}.{alias.name}"
