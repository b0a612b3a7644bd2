"""The documentation names what is there: every path, class, recipe and link of README.md and docs/."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import yaml
from helpers.recipe_files import ROOT, header_command, layered, read

METHODS = ROOT / "docs" / "methods.md"
TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (
    "tokenizers",
    "generators",
    "experiments",
    "quickstart",
    "quickstart_colour",
    "quickstart_text",
    "quickstart_audio",
    "quickstart_digits",
    "quickstart_emoji",
    "quickstart_video",
)

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])((?:discrete_lit|lightning_configs|data|tests|benchmarks|docs)/[\w./-]*\w)")
QUOTED = re.compile(r"`([^`]+)`")


class Method(NamedTuple):
    """One row of a table of methods."""

    name: str
    settings: list[str]
    """`key: value` lines that the row's recipes hold."""
    classes: list[str]
    files: list[Path]
    recipes: list[str]
    """Paths from the root of the repository."""


def tables(page: Path, header: list[str]) -> Iterator[list[str]]:
    """The rows of every table with this header."""
    inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells == header)
        if inside and cells != header and not set("".join(cells)) <= set(":-"):
            yield cells


def linked(cell: str, page: Path) -> list[Path]:
    return [(page.parent / target).resolve() for target in LINK.findall(cell)]


@cache
def methods() -> list[Method]:
    found = []
    for name, _, classes, files, recipes in tables(
        METHODS, ["Method", "Paper", "Class or function", "File", "Recipes"]
    ):
        settings = [quoted for quoted in QUOTED.findall(name) if ": " in quoted]
        names = [path.relative_to(ROOT).as_posix() for path in linked(recipes, METHODS)]
        found.append(Method(name, settings, QUOTED.findall(classes), linked(files, METHODS), names))
    return found


def families() -> list[tuple[list[str], list[Path]]]:
    rows = tables(METHODS, ["Repository", "Families", "File"])
    return [(QUOTED.findall(names), linked(files, METHODS)) for _, names, files in rows]


def definitions(file: Path) -> set[str]:
    """The classes and functions that a file defines."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_the_tables_are_found() -> None:
    assert len(methods()) > 100
    assert len(families()) > 5


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_the_row_names_what_its_files_define(method: Method) -> None:
    assert method.classes and method.files
    for file in method.files:
        assert file.is_file(), file
        assert definitions(file) & set(method.classes), f"{file} defines none of {method.classes}"
    for name in method.classes:
        homes = [file for file in method.files if name in definitions(file)]
        assert len(homes) == 1, f"{name} is defined in {homes or 'none of the files'}"
        assert getattr(import_module(module_of(homes[0])), name).__name__ == name


def said(settings: Any) -> Iterator[str]:
    """The names of the classes of nested settings, and every `key: value` line."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "class_path":
                yield value.rpartition(".")[2]
            yield f"{key}: {yaml.safe_dump(value).partition(chr(10))[0]}"
            yield from said(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from said(value)


@pytest.mark.parametrize("method", [row for row in methods() if row.recipes], ids=lambda method: method.name)
def test_the_recipes_of_a_row_use_it(method: Method) -> None:
    for recipe in method.recipes:
        assert (ROOT / recipe).is_file(), recipe
        is_trainer = recipe.startswith("lightning_configs/trainer/")
        settings = read(recipe) if is_trainer else {**read(recipe), **layered(recipe)}
        used = set(said(settings)) | set(header_command(recipe)[:1] if not is_trainer else [])
        missing = [setting for setting in method.settings if setting not in used]
        assert not missing, f"{recipe} does not hold {missing}"
        assert method.settings or used & set(method.classes), f"{recipe} uses none of {method.classes}"


def test_every_recipe_stands_in_a_row() -> None:
    shipped = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / "lightning_configs" / folder).rglob("*.yaml")
    }
    assert shipped - {recipe for method in methods() for recipe in method.recipes} == set()


def test_every_published_family_stands_in_the_table() -> None:
    from discrete_lit.pretrained import FAMILIES

    listed = [name for names, _ in families() for name in names]
    assert sorted(listed) == sorted(FAMILIES)
    for names, files in families():
        assert len(files) == 1 and set(names) <= definitions(files[0])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_of_the_project_exist(page: Path) -> None:
    """Every path under a folder of the project, in the text and in the commands."""
    for path in PATH.findall(LINK.sub("", page.read_text())):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_dotted_names_exist(page: Path) -> None:
    for name in sorted(set(re.findall(r"\bdiscrete_lit(?:\.\w+)+", page.read_text()))):
        found: Any = import_module("discrete_lit")
        path = "discrete_lit"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            if not hasattr(found, part):
                import_module(path)
            found = getattr(found, part)
