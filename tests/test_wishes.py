"""The table of wishes: every test that it names is there, and every command of it is one."""

import ast
import re

import pytest
from helpers.recipe_files import ROOT
from test_docs import tables

PAGE = ROOT / "docs" / "wishes.md"
WISHES = list(tables(PAGE, ["", "Wish", "Asked for in", "Met", "By", "Shown by"]))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_there_are_fifteen() -> None:
    assert [int(row[0]) for row in WISHES] == list(range(1, 16))
    assert {row[3] for row in WISHES} <= {"yes", "in part", "not met"}


@pytest.mark.parametrize("row", WISHES, ids=lambda row: row[1])
def test_what_shows_a_wish_is_there(row: list[str]) -> None:
    named = TEST.findall(row[5])
    # A wish that is not met has nothing to show; each of the others names its tests, and no name goes unchecked.
    assert bool(named) == (row[3] != "not met")
    assert len(named) == row[5].count("`tests/")
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"
