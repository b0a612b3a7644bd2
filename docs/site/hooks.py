"""Hooks of the site (MkDocs): pages made of other files, links to them, and equations as MathML.

The pages of `docs/` link to the README, to recipes and to the code, which lie outside. Each of those becomes a page:

- the README is the home page, other Markdown files are `pages/PATH`;
- a recipe is `recipes/PATH.md`, and a module of the package `reference/PATH.md`, written by mkdocstrings;
- any other file is `files/PATH.md`, with its text.

So the site needs no network, and a link that leads nowhere fails the build.
"""

import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from discrete_lit.cli.recipes import first_sentence

ROOT = Path(__file__).parents[2]
HOME = "README.md"
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
# A block of the README that is a file: the name becomes the block's title.
NAMED = re.compile(r"^```(\w+) file=(\S+)$", flags=re.MULTILINE)
FENCE = re.compile(r"^(`{3,}).*?^\1$", flags=re.MULTILINE | re.DOTALL)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)
# Browsers put no space between a function and an argument without brackets, as TeX does.
FUNCTION = re.compile(r"(<mi>(?:log|exp|sin|cos|max|min)</mi>)(?!<mo[^>]*>(?:\(|&#x00028;))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sbatch": "bash", "": "text"}
_origins: dict[str, str] = {}  # from a page to the file that it is made of, both as paths


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the recipes and the reference into the navigation."""
    assert config.nav is not None
    config.nav += [{"Recipes": _tree(recipes())}, {"Reference": _tree(modules())}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside `docs/`."""
    _origins.clear()
    waiting = [HOME, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "data/README.md", *recipes(), *modules()]
    waiting += [
        target
        for file in files.documentation_pages()
        for target in _targets(Path(file.abs_src_path or "").read_text(), f"docs/{file.src_uri}")
    ]
    while waiting:
        origin = waiting.pop()
        page = page_of(origin)
        if origin.startswith("docs/") and page == origin.removeprefix("docs/"):
            continue
        if page in _origins or not (ROOT / origin).is_file():
            continue
        _origins[page] = origin
        files.append(File.generated(config, page, content=_content(origin)))
        if origin.endswith(".md"):
            waiting += _targets((ROOT / origin).read_text(), origin)
    for kind, paths in (("recipes", recipes()), ("reference", modules())):
        for folder in sorted({str(folder) for path in paths for folder in list(Path(path).parents)[:-1]}):
            page = _folder_page(folder, kind)
            if page not in _origins:
                _origins[page] = f"{folder}/{kind}"
                files.append(File.generated(config, page, content=_listing(folder, paths)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead every link to the page of its file."""
    uri = page.file.src_uri
    origin = _origins.get(uri, f"docs/{uri}")
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):  # what looks like a link in code is none
        parts += [_linked(markdown[last : fence.start()], origin, uri), NAMED.sub(r'```\1 title="\2"', fence[0])]
        last = fence.end()
    return "".join([*parts, _linked(markdown[last:], origin, uri)])


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write equations as MathML, which browsers show without a script."""

    def written(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        maths = FUNCTION.sub(r'\1<mspace width="0.167em" />', convert(html.unescape(found[3]), display=display))
        return f'<{found[1]} class="equation">{maths}</{found[1]}>' if display == "block" else f"<span>{maths}</span>"

    return MATHS.sub(written, content)


@cache
def recipes() -> tuple[str, ...]:
    """List the recipes by path."""
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_configs").rglob("*.yaml")))


@cache
def modules() -> tuple[str, ...]:
    """List the modules of the package by path, packages by that of their `__init__.py`."""
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "discrete_lit").rglob("*.py")))


def page_of(origin: str) -> str:
    """Return the page of a file or folder, both by path: that of the repository, that of the site."""
    path = Path(origin)
    if origin == HOME:
        return "index.md"
    if path.parts[:1] == ("lightning_configs",) and path.suffix in ("", ".yaml"):
        inside = path.relative_to("lightning_configs")
        return f"recipes/{inside}.md" if path.suffix else f"recipes/{inside}/index.md".replace("/./", "/")
    if path.parts[:1] == ("discrete_lit",) and path.suffix in ("", ".py"):
        page = path.parent / "index.md" if path.name == "__init__.py" else path.with_suffix(".md")
        return f"reference/{page if path.suffix else path / 'index.md'}"
    if path.parts[:1] == ("docs",) and path.suffix != ".py":
        return origin.removeprefix("docs/")
    return f"pages/{origin}" if path.suffix == ".md" else f"files/{origin}.md"


def _folder_page(folder: str, kind: str) -> str:
    return page_of(folder) if kind == "recipes" else page_of(f"{folder}/__init__.py")


def _tree(paths: tuple[str, ...]) -> list[Any]:
    """Nest the pages of files as their folders are, for the navigation."""
    found: dict[str, Any] = {}
    for path in paths:
        *folders, name = Path(path).parts[1:]
        inside = found
        for folder in folders:
            inside = inside.setdefault(f"{folder}/", {})
        inside[name] = page_of(path)
    top = page_of(paths[0].partition("/")[0])

    def listed(inside: dict[str, Any], index: str) -> list[Any]:
        rows: list[Any] = [index]
        for name, value in sorted(inside.items(), key=lambda item: (isinstance(item[1], str), item[0])):
            folder = f"{index.removesuffix('index.md')}{name}index.md"
            if value != index:
                rows.append(
                    {
                        name.removesuffix(".yaml").removesuffix(".py"): value
                        if isinstance(value, str)
                        else listed(value, folder)
                    }
                )
        return rows

    return listed(found, top)


def _targets(markdown: str, origin: str) -> Iterator[str]:
    """The files that a page links to, by their path in the repository."""
    for target in LINK.findall(FENCE.sub("", markdown)):
        if "://" not in target and not target.startswith("#"):
            yield normpath(f"{Path(origin).parent.as_posix()}/{unquote(target).partition('#')[0]}")


def _linked(markdown: str, origin: str, page: str) -> str:
    def led(found: re.Match[str]) -> str:
        target = found[1]
        if "://" in target or target.startswith("#") or not (ROOT / origin).is_file():
            return target
        path, mark, anchor = target.partition("#")
        goal = page_of(normpath(f"{Path(origin).parent.as_posix()}/{unquote(path)}"))
        return f"{relpath(goal, Path(page).parent.as_posix())}{mark}{anchor}"

    return LINK.sub(led, markdown)


def _content(origin: str) -> str:
    """Write the Markdown of a page that is made of a file."""
    file = ROOT / origin
    if file.suffix == ".md":
        return file.read_text()
    if origin.startswith("discrete_lit/") and file.suffix == ".py":
        name = ".".join(Path(origin.removesuffix("/__init__.py")).with_suffix("").parts)
        return f"# {name}\n\n::: {name}\n"
    text = file.read_text()
    return f"# {origin}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"


def _listing(folder: str, paths: tuple[str, ...]) -> str:
    """Write a page that lists the recipes of a folder, each with the sentence that follows its command."""
    rows = [f"# {folder}", ""]
    for path in paths:
        if path.startswith(f"{folder}/"):
            first = first_sentence(ROOT / path)
            goal = relpath(page_of(path), Path(page_of(folder)).parent.as_posix())
            rows.append(
                f"- [{path.removeprefix(folder).strip('/')}]({goal}): {first}".replace("`", "").replace("$", "")
            )
    return "\n".join([*rows, ""])
