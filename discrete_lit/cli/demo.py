"""`discrete-lit demo`: a generator's images in a web browser, with its sampler's settings to turn."""

import threading
from typing import Any

import numpy as np
import torch

from discrete_lit.checkpoints import load
from discrete_lit.cli.checkpoint_choice import chosen_checkpoint
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.watched_draws import Watched, decoded_frame
from discrete_lit.generators import Generator
from discrete_lit.pretrained.pipelines import check_draws_images, draw_images
from discrete_lit.samplers.adjustment import adjustable, with_settings

_MOST_FRAMES = 16
# Small images are enlarged, with their pixels to be seen.
_STYLE = (
    "<style>#image img, #steps img {image-rendering: pixelated; width: 100%; object-fit: contain}"
    " #steps .grid-wrap {max-height: none}</style>"
)
_EXTRA = "`demo` needs Gradio: pip install 'discrete-lit[demo]'"


def demo(
    ckpt_path: str | None = None,
    *,
    model: str | None = None,
    accept_licence: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    accelerator: str = "auto",
) -> None:
    """Show a generator in a web browser: a class or a prompt, a seed, the sampler's settings, and the image.

    For generators of ids on a grid it also shows the image at the sampler's steps. The image of a class and a seed is
    sample 0 that `discrete-lit sample` draws with them. It needs the extra `demo`.

    Args:
        ckpt_path: checkpoint of a generator of images, a folder of `save_pretrained`, or `hf://owner/name`.
        model: name of a published model, in place of `ckpt_path`.
        accept_licence: that you accept the licence of `model`.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: to listen at.
        accelerator: Lightning's; `auto` takes a GPU where there is one.

    Raises:
        ValueError: Gradio is not installed, a port that is taken, or no generator of images.
    """
    if not 0 < port < 65536:
        raise ValueError(f"port={port}, accepted: 1 to 65535")
    try:
        import gradio  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(_EXTRA) from error
    path = chosen_checkpoint(ckpt_path, model, accept_licence=accept_licence)
    generator = load(path)
    check_draws_images(generator)
    fabric = make_fabric(accelerator)
    page = build_demo(generator.to(fabric.device), title=model or path)
    try:
        page.launch(server_name=host, server_port=port)
    except OSError as error:
        raise ValueError(f"port={port} cannot be listened at: {error}") from error


def build_demo(generator: Any, *, title: str) -> Any:
    """Build the page of a generator of images, without starting a server.

    Args:
        generator: on the device that it draws on.
        title: of the page.

    Returns:
        The `gradio.Blocks`; its function `draw` is called with a class or a prompt, a seed, and the settings that
        `adjustable` finds in the sampler, and gives the image and the images at the sampler's steps.
    """
    import gradio  # type: ignore[import-not-found]

    settings = adjustable(generator.sampler)
    one_at_a_time = threading.Lock()

    def draw(what: Any, seed: float, *values: float) -> tuple[np.ndarray, list[np.ndarray]]:
        chosen: dict[str, Any] = dict(zip(settings, values, strict=True))
        given: dict[str, Any] = {"prompt": str(what)} if generator.reads_text else {"labels": [int(what)]}
        try:
            with one_at_a_time:
                image = draw_images(generator, **given, seed=int(seed), **chosen)[0]
                return _shown(image), step_images(generator, given.get("labels"), seed=int(seed), **chosen)
        except ValueError as error:
            raise gradio.Error(str(error), duration=None) from error  # it stays until it is closed

    with gradio.Blocks(title=f"discrete-lit: {title}") as page:
        gradio.Markdown(f"## {title}\n{type(generator).__name__}, {type(generator.sampler).__name__}")
        with gradio.Row():
            with gradio.Column():
                what = (
                    gradio.Textbox(label="prompt")
                    if generator.reads_text
                    else gradio.Number(label=f"class, 0 to {generator.num_classes - 1}", value=0, precision=0)
                )
                seed = gradio.Number(label="seed", value=0, precision=0)
                turned = [
                    gradio.Number(label=name, value=value, precision=0 if name == "steps" else None)
                    for name, value in settings.items()
                ]
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column():
                gradio.HTML(_STYLE)
                image = gradio.Image(label="image", format="png", height=384, elem_id="image")
                steps = gradio.Gallery(
                    label="the sampler's steps",
                    columns=4,
                    format="png",
                    height="auto",
                    object_fit="contain",
                    elem_id="steps",
                )
        button.click(draw, [what, seed, *turned], [image, steps], api_name="draw")
    return page


@torch.inference_mode()
def step_images(generator: Any, labels: list[int] | None, *, seed: int, **settings: float) -> list[np.ndarray]:
    """Draw again and decode what stands at the sampler's steps, at most sixteen of them, the last among them.

    Args:
        generator: any; without ids on a grid, or with a prompt, it shows none.
        labels: one class; None with a prompt.
        seed: of the draw.
        **settings: as of `with_settings`.

    Returns:
        Images `(H, W, C)` uint8, transparent where nothing is drawn.
    """
    if labels is None or not isinstance(generator, Generator):
        return []
    try:
        watched = Watched(name="demo", generator=generator)
    except ValueError:  # its tokens are no grid
        return []
    sampler = with_settings(generator.sampler, **settings)
    device = next(generator.parameters()).device
    random = CounterRandom(seed, torch.zeros(1, dtype=torch.int64, device=device))
    output = generator.draw(torch.tensor(labels, device=device), random, sampler, trace=True)
    assert output.trace is not None and output.trace_start is not None
    frames = [output.trace_start, *(step.tokens for step in output.trace)]
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(_MOST_FRAMES, len(frames))).round().astype(int))
    return [_shown(decoded_frame(watched, frames[index])[0]) for index in chosen]


def _shown(image: np.ndarray) -> np.ndarray:
    """Give an image `(H, W, C)` a form that a browser shows: grey becomes RGB, with its opacity where it has one."""
    if image.shape[-1] in (1, 2):
        return np.concatenate([np.repeat(image[..., :1], 3, axis=-1), image[..., 1:]], axis=-1)
    return image
