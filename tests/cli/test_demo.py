"""`discrete-lit demo`: the page draws what `discrete-lit sample` draws."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import chromium
from PIL import Image

from discrete_lit import load
from discrete_lit.pretrained.pipelines import draw_images


def test_the_steps_end_with_the_image(generator_checkpoints: dict[str, Path]) -> None:
    from discrete_lit.cli.demo import step_images

    for family in ("Masked", "Autoregressive"):
        generator = load(generator_checkpoints[family])
        steps = step_images(generator, [1], seed=3)
        image = draw_images(generator, [1], seed=3)[0]
        assert 2 <= len(steps) <= 16 and np.array_equal(steps[-1][..., :3], image)
        assert (steps[-1][..., 3] == 255).all() and not (steps[0][..., 3] == 255).all()
    assert step_images(generator, None, seed=3) == []  # of a prompt


@pytest.fixture(scope="module")
def page(
    generator_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, "subprocess.Popen[bytes]", Path]]:
    """The address of a demo that is starting, its process, and the file of what it says."""
    pytest.importorskip("gradio", reason="Gradio, the extra `demo`, is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "discrete_lit", "demo", "--ckpt_path", generator_checkpoints["Masked"]]
    quiet = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = tmp_path_factory.mktemp("demo") / "log"
    with open(said, "wb") as log:
        server = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=log, stderr=log, env=quiet)
    yield f"http://127.0.0.1:{port}", server, said
    server.terminate()
    server.wait(30)


@pytest.mark.slow
def test_the_page_answers_over_its_api(page: Any, generator_checkpoints: dict[str, Path]) -> None:
    address = f"{page[0]}/gradio_api/call/draw"
    # A class, a seed, and the settings of a MaskGITSampler: guidance scale, temperature and steps.
    event = post(address, {"data": [2, 7, 1.5, 1.0, 4]}, *page[1:])["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=60) as answer:
        said = answer.read().decode()
    assert "event: complete" in said, said
    image, steps = json.loads(said.partition("event: complete\ndata: ")[2].splitlines()[0])
    with urllib.request.urlopen(image["url"], timeout=60) as answer:
        shown = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    generator = load(generator_checkpoints["Masked"])
    expected = draw_images(generator, [2], seed=7, guidance_scale=1.5, temperature=1.0, steps=4)[0]
    assert np.array_equal(shown, expected) and len(steps) == 5


@pytest.mark.slow
def test_the_page_in_a_browser(page: Any) -> None:
    """An image of 8 pixels is shown large, and a class that is not there is refused in words."""
    post(f"{page[0]}/gradio_api/call/draw", {"data": [0, 0, 1.0, 1.0, 2]}, *page[1:])  # it answers
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(page[0])
        tab.click("button:has-text('Draw')")
        tab.wait_for_selector("#steps img")
        assert tab.locator("#image img").bounding_box()["height"] > 200
        tab.locator("input[type=number]").first.fill("99")
        tab.click("button:has-text('Draw')")
        tab.wait_for_selector("text=label 99 is out of range")
        assert wrong == []


def post(address: str, content: Any, server: "subprocess.Popen[bytes]", log: Path) -> Any:
    """Send JSON to a server that is starting."""
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())
