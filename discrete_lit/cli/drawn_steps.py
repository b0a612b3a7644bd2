"""The steps of a draw as plain data, for a page: the grid after each pass, what changed, how sure, what was spent."""

import base64
import io
from math import prod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from discrete_lit.core.images import displayable, height_and_width, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Generator, NextScale
from discrete_lit.samplers.sampler import SamplerOutput

Size = tuple[int, int]
# Of each draw; a longer one has a picture every few passes. In pixels, a larger one is made smaller.
MOST_PICTURES, LARGEST_PICTURE = 64, 128


def grid_of(generator: Generator) -> Size:
    """Return the (height, width) of a generator's grid; of one that draws scale by scale, that of the last scale.

    Raises:
        ValueError: a tokenizer that makes no images, a generator that reads texts, or a grid with several ids at each
            position.
    """
    kind = type(generator).__name__
    if not generator.tokenizer.makes_images:
        raise ValueError(f"this {kind} draws text: its tokens have no picture, and the page shows images")
    if generator.text_encoder is not None:
        raise ValueError(f"this {kind} draws what a text says, and the page lets one choose a class: give another")
    if isinstance(generator, NextScale):
        height, width = generator.scale_quantizer().sizes[-1]
        return height, width
    shape = generator.token_shape
    if len(shape) > 2:
        raise ValueError(f"this {kind} has token grids {tuple(shape)}: the page shows one id at each position")
    height, width = (1, *shape)[-2:]
    return height, width


@torch.no_grad()
def draw_steps(generator: Generator, labels: list[int], seed: int) -> list[list[dict[str, Any]]]:
    """Draw one image of each label by the generator's own sampler, and return the frames of each.

    Image i is the one that `discrete-lit sample` draws as its i-th with these labels and this seed.

    Args:
        generator: in eval mode.
        labels: each in [0, num_classes).
        seed: of the draw.

    Raises:
        ValueError: a sampler whose sequence has another number of tokens than the grid.
    """
    random = CounterRandom(seed, torch.arange(len(labels)))
    output = generator.draw(torch.tensor(labels), random, trace=True)
    assert output.trace is not None
    found, positions = output.trace[0].tokens.shape[1], prod(generator.token_shape)
    if found != positions:
        raise ValueError(
            f"{type(generator.sampler).__name__} draws {found} tokens for {positions} positions: the page shows one "
            "token at each position"
        )
    if isinstance(generator, NextScale):
        quantizer = generator.scale_quantizer()
        sizes = [(height, width) for height, width in quantizer.sizes]
        draws = frames_of_scales(output, sizes)
        # After each scale, what the scales so far add up to.
        pictures = torch.stack(
            [
                generator.tokenizer.to_images(generator.tokenizer.outputs(f_hat.movedim(1, -1)))  # type: ignore[operator]
                for f_hat in quantizer.cumulative(output.tokens)
            ]
        )
        for row, frames in enumerate(draws):
            for number, frame in enumerate(frames[1:]):
                frame["picture"] = as_png(pictures[number, row])
        return draws
    draws = frames_of(output, grid_of(generator), generator.vocab_size, generator)
    for row, frames in enumerate(draws):
        _add_pictures(generator, frames, [step.tokens[row] for step in output.trace])
    return draws


def frames_of(
    output: SamplerOutput, size: Size, vocab_size: int, generator: Generator | None = None
) -> list[list[dict[str, Any]]]:
    """Turn a trace into frames, one before the first pass and one after each, for each sequence of the batch.

    A cell keeps the confidence of the step that last changed it.

    Args:
        output: with its trace.
        size: height and width of the grid.
        vocab_size: K; greater ids are masks.
        generator: puts sequences into the order of the grid; they are in raster order without it.
    """
    assert output.trace is not None

    def in_grid(values: Tensor) -> Tensor:
        return values if generator is None else generator.to_grid(values).flatten(1)

    steps = [(in_grid(step.tokens), in_grid(step.changed), in_grid(step.confidence), step) for step in output.trace]
    draws = []
    for row in range(len(output.tokens)):
        frames = [_frame(size, [None] * prod(size), changed=[], confidence=[None] * prod(size))]
        sure = torch.full((prod(size),), torch.nan, dtype=torch.float64)
        for tokens, changed, confidence, step in steps:
            drawn = tokens[row] < vocab_size
            fresh = changed[row] & drawn
            sure = torch.where(fresh, confidence[row], sure).masked_fill(~drawn, torch.nan)
            frames.append(
                _frame(
                    size,
                    _numbers(tokens[row], drawn),
                    changed=changed[row].nonzero()[:, 0].tolist(),
                    confidence=_numbers(sure, ~sure.isnan()),
                    calls=step.network_calls,
                    passes=step.sequential_passes,
                )
            )
        draws.append(frames)
    return draws


def frames_of_scales(output: SamplerOutput, sizes: list[Size]) -> list[list[dict[str, Any]]]:
    """Turn the trace of a sampler of scales into frames; each shows the scale that its pass drew, at its own size."""
    assert output.trace is not None
    starts = np.cumsum([0, *map(prod, sizes)]).tolist()
    draws = []
    for row in range(len(output.tokens)):
        frames = [_frame(sizes[-1], [None] * prod(sizes[-1]), changed=[], confidence=[None] * prod(sizes[-1]))]
        for number, (size, step) in enumerate(zip(sizes, output.trace, strict=True)):
            here = slice(starts[number], starts[number + 1])
            sure = step.confidence[row, here]
            frames.append(
                _frame(
                    size,
                    step.tokens[row, here].tolist(),
                    changed=list(range(prod(size))),
                    confidence=_numbers(sure, ~sure.isnan()),
                    calls=step.network_calls,
                    passes=step.sequential_passes,
                )
            )
        draws.append(frames)
    return draws


def _frame(
    size: Size, ids: list[Any], *, changed: list[int], confidence: list[Any], calls: int = 0, passes: int = 0
) -> dict[str, Any]:
    return {
        "size": list(size),
        "ids": ids,
        "changed": changed,
        "confidence": confidence,
        "calls": calls,
        "passes": passes,
        "picture": None,
    }


def _numbers(values: Tensor, where: Tensor) -> list[Any]:
    """Plain numbers of a row, to three decimals, and None where there is none."""
    pairs = zip(values.tolist(), where.tolist(), strict=True)
    return [(round(value, 3) if isinstance(value, float) else value) if known else None for value, known in pairs]


def _add_pictures(generator: Generator, frames: list[dict[str, Any]], sequences: list[Tensor]) -> None:
    """Put the decoded image into the frames; it is grey where no token is drawn yet."""
    every = -(-len(sequences) // MOST_PICTURES)
    shown = [number for number in range(len(sequences)) if (len(sequences) - 1 - number) % every == 0]
    sequence = torch.stack([sequences[number] for number in shown])
    drawn = sequence < generator.vocab_size
    images = generator.tokenizer.decode(generator.to_grid(sequence.masked_fill(~drawn, 0)))
    if len(generator.token_shape) == 2:  # the ids of a 1D tokenizer have no place in the image
        cells = generator.to_grid(drawn).float()[:, None]
        images = torch.where(torch.nn.functional.interpolate(cells, size=images.shape[-2:]) > 0, images, 0.0)
    for number, image in zip(shown, images, strict=True):
        frames[number + 1]["picture"] = as_png(image)


def as_png(image: Tensor) -> str:
    """Return a float image `(C, H, W)` in [-1, 1] as the `data:` URI of a PNG."""
    pixels = displayable(to_uint8(image)[None])[0].movedim(0, -1).cpu().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(picture.size) > LARGEST_PICTURE:
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def same_grid(generators: dict[str, Generator]) -> None:
    """Check that all generators fill the same grid of images of the same size, and have as many classes.

    Raises:
        ValueError: two that differ; it names both.
    """
    first: tuple[str, tuple[Any, ...]] | None = None
    for name, generator in generators.items():
        grid, pixels = grid_of(generator), height_and_width(generator.image_size)
        of_this = (grid, pixels, generator.num_classes)
        if first is None:
            first = name, of_this
        elif of_this != first[1]:
            described = [
                f"{who} has {each[0][0]} x {each[0][1]} tokens of {each[1][0]} x {each[1][1]} pixels, {each[2]} classes"
                for who, each in (first, (name, of_this))
            ]
            raise ValueError(f"checkpoints must fill one grid: {'; '.join(described)}. Write a page for each")
