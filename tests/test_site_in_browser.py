"""The site of the documentation in a real browser, and every link of it."""

import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browser import chromium
from test_site import site  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
# A page of every kind; the reference and the recipes are made by the same templates.
PAGES = (
    *("index.html", "methods.html", "models.html", "wishes.html", "evaluation.html", "comparison.html"),
    *("methods/masked.html", "methods/discrete_diffusion.html", "methods/latent_diffusion.html"),
    *("pages/CONTRIBUTING.html", "pages/data/index.html", "experiments/index.html", "recipes/index.html"),
    *("recipes/generators/maskgit_imagenet256.yaml.html", "reference/discrete_lit/generators/masked.html"),
    "experiments/compression_emoji.html",
)


class Links(HTMLParser):
    """The names of a page's places, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {name for name in (given.get("id"), given.get("name")) if name}
        self.targets += [target for target in (given.get("href"), given.get("src")) if target]


def links_of(page: Path) -> Links:
    found = Links()
    found.feed(page.read_text())
    return found


def test_every_link_leads_to_a_place(site: Path) -> None:  # noqa: F811
    """Those of the theme and of the reference too, which MkDocs does not look at."""
    pages = {page.resolve(): links_of(page) for page in site.rglob("*.html") if page.name != "404.html"}
    broken, seen = [], 0
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            goal = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            goal = goal / "index.html" if goal.is_dir() else goal
            anchor = unquote(parts.fragment)
            if not goal.is_file() or (anchor and goal in pages and anchor not in pages[goal].places):
                broken.append(f"{page.relative_to(site.resolve())}: {target}")
    assert seen > 10_000
    assert broken == []


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site, with its own page for what is not there, as hosts of static sites do."""

    def log_message(self, *_: Any) -> None: ...

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        body = (Path(self.directory) / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """`opened(screen, scheme)`: a tab that may log no error and ask no other server for anything."""
    wrong: list[str] = []
    contexts = []

    def make(screen: str, scheme: str = "light") -> Any:
        width, height = SCREENS[screen]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(120_000)
        tab.on("console", lambda said: said.type in ("error", "warning") and wrong.append(f"{tab.url}: {said.text}"))
        tab.on("pageerror", lambda error: wrong.append(f"{tab.url}: {error}"))
        tab.on("request", lambda asked: asked.url.startswith((address, "data:")) or wrong.append(asked.url))
        return tab

    yield make
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_no_page_is_wider_than_the_screen(screen: str, scheme: str, opened: Any, address: str) -> None:
    tab = opened(screen, scheme)
    for page in PAGES:
        answer = tab.goto(f"{address}/{page}")
        assert answer.status == 200, page
        assert tab.locator("article h1").is_visible(), page
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert tab.evaluate(wider) == 0, f"{page} on a {screen}"
        shown = tab.evaluate("[...document.querySelectorAll('article math')].filter(m => m.clientWidth < 1).length")
        assert shown == 0, page
        missing = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert tab.evaluate(missing) == [], page


@pytest.mark.parametrize("screen", SCREENS)
def test_the_search_finds_a_method(screen: str, opened: Any, address: str) -> None:
    tab = opened(screen)
    tab.goto(f"{address}/index.html")
    if screen == "phone":
        tab.click("header label[for=__search]")
    tab.fill("input.md-search__input", "Halton")
    hit = tab.locator(".md-search-result__item a").first
    hit.wait_for()
    goal = hit.evaluate("link => link.href")
    hit.click()
    tab.wait_for_url(goal)
    assert "Halton" in tab.locator("article").inner_text()


def test_a_phone_has_the_navigation_in_a_drawer(opened: Any, address: str) -> None:
    tab = opened("phone")
    tab.goto(f"{address}/index.html")
    tab.click("header label[for=__drawer]")
    tab.click(".md-nav--primary label.md-nav__title[for=__nav_1]")  # from the pages of Home up to the tabs
    tab.click(".md-nav--primary > .md-nav__list > .md-nav__item > a:has-text('Evaluation')")
    tab.wait_for_url("**/evaluation.html")


def test_a_desktop_leads_from_tab_to_page_and_turns_dark(opened: Any, address: str) -> None:
    tab = opened("desktop")
    tab.goto(f"{address}/index.html")
    tab.click(".md-tabs >> text=Methods")
    tab.wait_for_url("**/methods.html")
    tab.click(".md-sidebar--primary >> text=Published models")
    tab.wait_for_url("**/models.html")
    tab.click("form[data-md-component=palette] label:visible")
    tab.wait_for_selector("body[data-md-color-scheme=slate]")


def test_an_address_that_is_not_there_says_so_in_the_sites_own_page(browser: Any, address: str) -> None:
    tab = browser.new_page()
    tab.set_default_timeout(120_000)
    answer = tab.goto(f"{address}/methods/maskgitt.html")
    assert answer.status == 404 and "Not found" in tab.locator("h1").inner_text()
    assert tab.locator(".md-tabs").is_visible()  # with the site's style and navigation
    tab.close()
