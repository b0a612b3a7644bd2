"""The site of the documentation builds without a warning, and no page of it asks a network for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.recipe_files import ROOT

CONFIGURATION = ROOT / "docs" / "site" / "mkdocs.yml"
# What a browser fetches by itself; links that a reader follows may lead anywhere.
FETCHED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?([^"\s>]+)|<link\b[^>]*\bhref="?([^"\s>]+)')


def in_navigation() -> set[str]:
    text = CONFIGURATION.read_text()
    # Tags of YAML that MkDocs alone can read stand above the navigation.
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, str):
            found.add(node)
        for inside in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inside)

    walk(yaml.safe_load(text[text.index("\nnav:") :])["nav"])
    return found


def test_every_page_stands_in_the_navigation() -> None:
    """Pages of experiments are reached from their own README."""
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md") if page.parent.name != "experiments"}
    assert pages - in_navigation() == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, or take the one that `make docs` wrote into the folder that the variable names."""
    pytest.importorskip("mkdocs", reason="extra `site`")
    if os.environ.get("DISCRETE_LIT_BUILT_SITE"):
        return Path(os.environ["DISCRETE_LIT_BUILT_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(CONFIGURATION)]
    done = subprocess.run([*command, "--site-dir", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.slow
def test_the_site_holds_every_recipe_and_module(site: Path) -> None:
    for recipe in (ROOT / "lightning_configs").rglob("*.yaml"):
        page = site / "recipes" / recipe.relative_to(ROOT / "lightning_configs").with_suffix(".yaml.html")
        assert page.is_file(), page
    for module in (ROOT / "discrete_lit").rglob("*.py"):
        inside = module.relative_to(ROOT)
        page = inside.parent / "index.html" if module.name == "__init__.py" else inside.with_suffix(".html")
        assert (site / "reference" / page).is_file(), page


@pytest.mark.slow
def test_pages_hold_what_they_take_from_elsewhere(site: Path) -> None:
    page = (site / "methods" / "masked.html").read_text()
    assert "<math" in page and "arithmatex" not in page
    assert "MaskGITSampler" in page and "choice_temperature" in page  # of the recipe
    reference = (site / "reference" / "discrete_lit" / "generators" / "masked.html").read_text()
    assert "Predicts masked tokens from the others" in reference
    assert "my_tokenizer.py" in (site / "index.html").read_text()


@pytest.mark.slow
def test_nothing_is_fetched_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 300
    for page in pages:
        fetched = {source for pair in FETCHED.findall(page.read_text()) for source in pair if source}
        assert not {source for source in fetched if source.startswith(("http", "//"))}, page
        for source in fetched:
            local = source.partition("?")[0].partition("#")[0]
            if not local.startswith("data:") and page.name != "404.html":
                assert (page.parent / local).exists(), f"{page}: {source}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\((?:\"|')?(?:https?:)?//|@import", style.read_text()), style
