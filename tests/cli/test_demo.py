"""`discrete-lit demo`: the page draws what `discrete-lit sample` draws."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def test_the_page_answers_over_its_api(generator_checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("gradio", reason="the extra `demo`")
    client: Any = pytest.importorskip("gradio_client")
    from discrete_lit.cli.demo import build_demo

    generator = load(generator_checkpoints["Masked"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_demo(generator, title="tiny")
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        image, steps = client.Client(f"http://127.0.0.1:{port}", verbose=False).predict(
            2, 7, 1.5, 1.0, 4, api_name="/draw"
        )
        expected = draw_images(generator, [2], seed=7, guidance_scale=1.5, temperature=1.0, steps=4)[0]
        assert np.array_equal(np.asarray(Image.open(image).convert("RGB")), expected)
        assert len(steps) == 5
    finally:
        page.close()
