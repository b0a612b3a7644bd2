"""The page of `discrete-lit watch` in a headless Chromium: every control is used, and the console stays empty."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import run

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright (PyPI) drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def address(generator_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "watch.html"
    given = ", ".join(f"{name}: {path}" for name, path in generator_checkpoints.items())
    run("watch", "--output", file, "--checkpoints", f"{{{given}}}")
    return file.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium refuses its sandbox to root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """`open_page(**settings of the context)`; what the page complains about, or asks a network for, fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(**settings: Any) -> Any:
        context = browser.new_context(**{"viewport": DESKTOP, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and complaints.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def clock(page: Any) -> str:
    return page.inner_text("#clock")


def spent(page: Any) -> list[str]:
    return page.locator(".passes").all_inner_texts()


def test_steps_by_buttons_keys_and_slider(open_page: Any) -> None:
    page = open_page()
    assert clock(page) == "pass 0 / 16"
    page.click("#forward")
    page.click("#forward")
    page.click("#back")
    assert (clock(page), spent(page)) == ("pass 1 / 16", ["1"] * 4)
    assert page.locator(".panel").nth(1).locator(".cell.changed").count() == 1
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert clock(page) == "pass 2 / 16"
    page.keyboard.press("Home")
    assert clock(page) == "pass 0 / 16"
    page.locator("#at").fill("16")
    assert clock(page) == "pass 16 / 16"
    assert page.locator(".done", has_text="done").count() == 4
    page.click("#restart")
    assert clock(page) == "pass 0 / 16"
    page.click("#back")
    assert clock(page) == "pass 0 / 16"


def test_play_pause_and_speed(open_page: Any) -> None:
    page = open_page()
    page.select_option("#speed", "16")
    page.focus("#speed")
    page.keyboard.press("Space")  # opens the list, and must not play
    page.keyboard.press("Escape")
    assert page.inner_text("#play") == "Play"
    page.locator("h1").click()
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_function("document.getElementById('clock').textContent !== 'pass 0 / 16'")
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Play"
    stopped = clock(page)
    page.wait_for_timeout(200)
    assert clock(page) == stopped
    page.click("#play")
    page.select_option("#speed", "8")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_function("document.getElementById('play').textContent === 'Play'")  # at the end it stops by itself
    assert clock(page) == "pass 16 / 16"
    page.click("#play")  # and begins again
    assert page.inner_text("#play") == "Pause"
    assert clock(page) != "pass 16 / 16"


def test_rounds_seed_and_confidence(open_page: Any) -> None:
    page = open_page()
    page.select_option("#choice", "4")
    page.locator("#at").fill("4")
    assert spent(page)[:2] == ["4", "4"]
    filled = page.locator(".panel").nth(2).locator(".fill")
    assert filled.count() == 16  # MaskGIT is done after 4 rounds

    def colours() -> list[str]:
        return filled.evaluate_all("cells => cells.map(cell => cell.style.background)")

    first = colours()
    page.select_option("#seed", "1")
    page.locator("#at").fill("4")
    assert colours() != first
    assert set(colours()) <= {"rgb(0, 114, 178)", "rgb(230, 159, 0)", "rgb(0, 158, 115)"}
    page.select_option("#shown", "heat")
    assert len(set(colours())) > 3
    assert page.locator(".panel").nth(2).locator(".mark").count() == 16


def test_checkpoints_show_ids_and_images(open_page: Any) -> None:
    page = open_page()
    page.click("#tab-1")
    assert page.locator("h3").all_inner_texts() == ["Masked", "Autoregressive"]
    assert not page.is_visible("#exact")
    assert page.locator("img:visible").count() == 0
    page.click("#forward")
    assert page.locator("img:visible").count() == 2
    before = page.locator("img").first.get_attribute("src")
    page.locator("#at").fill("16")
    assert page.locator("img").first.get_attribute("src") != before
    assert page.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    assert page.locator(".panel").first.locator(".id").count() == 16
    last = page.locator("img").first.get_attribute("src")
    page.select_option("#choice", "2")
    page.locator("#at").fill("16")
    assert page.locator("img").first.get_attribute("src") != last
    page.focus("#tab-1")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-0", "aria-selected") == "true"
    assert page.is_visible("#exact")


def test_dark_and_light(open_page: Any) -> None:
    def background(page: Any) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    pale, deep = background(light), background(dark)
    assert pale != deep
    for page, name, other in ((light, "Dark", deep), (dark, "Light", pale)):
        assert page.inner_text("#theme") == name
        page.click("#theme")
        assert background(page) == other


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_window(open_page: Any, viewport: dict[str, int]) -> None:
    page = open_page(viewport=viewport)
    for tab in ("#tab-0", "#tab-1"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_without_javascript_a_picture_and_the_numbers(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert not page.is_visible("#player")
    assert page.locator(".still img").count() == 2
    assert page.locator(".still tbody tr").first.inner_text().split()[-2:] == ["16", "16"]
    assert page.is_visible("#exact table")
    assert page.locator("svg.figure polyline").count() == 4
