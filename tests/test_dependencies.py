"""What is imported is declared in pyproject.toml: by the package itself, or by the extra that a folder is for."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A user's extras: the package imports them where they are needed, and says which to install.
FOLDERS = {
    "discrete_lit": ["audio", "demo", "imagenet", "offline", "s3", "text", "video"],
    "data": [],
    "benchmarks": ["bench"],
    "docs": ["docs", "site"],
    "tests": ["dev"],
}
# The benchmark of a GPU checks the cases that tests have, and tests run it.
BESIDE = {"benchmarks": "tests", "tests": "benchmarks"}


def normal(distribution: str) -> str:
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(requirements: list[str]) -> set[str]:
    """The distributions of requirement lines; extras of this project stand for what they hold."""
    names = set()
    for line in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()
        if name == PROJECT["name"]:
            for extra in extras.split(","):
                names |= declared(PROJECT["optional-dependencies"][extra])
        names.add(normal(name))
    return names


def imported(folder: Path) -> dict[str, str]:
    """The top-level modules that the Python files of a folder import, each with one of the files."""
    found = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            found |= {module.partition(".")[0]: str(file.relative_to(ROOT)) for module in modules}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_declared(folder: str) -> None:
    allowed = declared(PROJECT["dependencies"])
    for extra in FOLDERS[folder]:
        allowed |= declared(PROJECT["optional-dependencies"][extra])
    own = {"discrete_lit"}
    if folder != "discrete_lit":  # the others are folders of scripts, which import one another by their names
        own |= {"data", *(path.stem for path in (ROOT / folder).rglob("*"))}
    if folder in BESIDE:
        own |= {path.stem for path in (ROOT / BESIDE[folder]).rglob("*")}
    distributions = packages_distributions()
    undeclared = {
        module: file
        for module, file in imported(ROOT / folder).items()
        if module not in own | sys.stdlib_module_names
        and not allowed.intersection(map(normal, distributions.get(module, [module])))
    }
    assert not undeclared, "declare them in pyproject.toml, or import them no longer"
