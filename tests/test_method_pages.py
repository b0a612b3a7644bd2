"""Pages of methods: what they quote of a recipe stands there, their samplers exist, their equations can be set."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from helpers.recipe_files import ROOT
from test_docs import linked, tables

PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
PARTS = ("Equation", "Recipe", "Published numbers", "In the code")
EQUATION = re.compile(r"\$\$\n(.*?)\n\$\$|(?<![\w$`\\])\$([^$\n]+)\$", flags=re.DOTALL)


def published(page: Path) -> list[tuple[Path, str]]:
    """The recipes of a page's table, each with what the page quotes of it."""
    rows = tables(page, ["Recipe", "The authors' figures, as the recipe quotes them"])
    return [(linked(recipe, page)[0], quoted.replace("\\", "")) for recipe, quoted in rows]


@cache
def comment(recipe: Path) -> str:
    """The comment that a recipe opens with, as one line."""
    found = re.match(r"(?:#.*\n)+", recipe.read_text())
    assert found, recipe
    return " ".join(re.sub(r"^#", "", found[0], flags=re.MULTILINE).split())


def test_every_recipe_of_a_tokenizer_or_generator_stands_on_a_page() -> None:
    shipped = {
        path for folder in ("tokenizers", "generators") for path in (ROOT / "lightning_configs" / folder).glob("*")
    }
    assert shipped - {recipe for page in PAGES for recipe, _ in published(page)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_its_parts(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [part for part in PARTS if part not in headings] == []
    assert EQUATION.search(text) and published(page)
    (snippet,) = re.findall(r'^--8<-- "(.+)"$', text, flags=re.MULTILINE)
    assert (ROOT / snippet).resolve() in {recipe for recipe, _ in published(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_quoted_stands_in_the_recipe(page: Path) -> None:
    for recipe, quoted in published(page):
        assert quoted and quoted in comment(recipe), f"{recipe.name} does not say {quoted!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_samplers_are_there_and_of_the_attention_that_is_said(page: Path) -> None:
    homes = [import_module("discrete_lit.samplers"), import_module("discrete_lit.diffusion.solvers")]
    for name, attention, drawn in tables(page, ["Sampler", "Attention", "Draws"]):
        found = next((getattr(home, name.strip("`")) for home in homes if hasattr(home, name.strip("`"))), None)
        assert found is not None and drawn, name
        assert getattr(found, "attention", "") == attention, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_equations_can_be_set(page: Path) -> None:
    convert = pytest.importorskip("latex2mathml.converter", reason="extra `site`").convert
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for display, inline in EQUATION.findall(text):
        written = convert(display or inline)
        # What the converter does not know it leaves as it is.
        assert "\\" not in written, f"{page.name}: {display or inline}"
