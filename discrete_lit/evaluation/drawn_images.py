"""Images that a generator draws to be measured: the same ones for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.distributed import rank, world_size
from discrete_lit.core.images import to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.prompts import Prompts
from discrete_lit.generators import Generator, LatentGenerator
from discrete_lit.samplers.sampler import SamplerOutput


def own_numbers(count: int, batch_size: int, *, together: bool = False) -> Iterator[tuple[Tensor, bool]]:
    """Give the numbers of this rank's samples, batch by batch, int64 `(B,)`, and whether they count.

    The batches are the same for any number of ranks, and each is one rank's.

    Args:
        count: samples of all ranks.
        batch_size: of a batch.
        together: every rank takes part in every pass, as sharded weights need it: one that has nothing left draws what
            does not count.
    """
    batches = -(-count // batch_size)
    first, last = (batches * number // world_size() for number in (rank(), rank() + 1))
    rounds = -(-batches // world_size()) if together else last - first
    for number in range(first, first + rounds):
        counted = number < last
        start = number * batch_size if counted else 0
        yield torch.arange(start, min(start + batch_size, count)), counted


def draw_images(
    generator: Generator | LatentGenerator,
    numbers: Tensor,
    *,
    seed: int,
    sampler: Any = None,
    prompts: Prompts | None = None,
    negative: str | None = None,
) -> tuple[Tensor, SamplerOutput]:
    """Draw the samples of some numbers, whose labels, and prompts, are these modulo how many there are.

    Args:
        generator: in eval mode.
        numbers: `(B,)` int64 on the generator's device.
        seed: with the number it alone decides a sample.
        sampler: the generator's own by default.
        prompts: of a generator that reads text.
        negative: what guidance leads away from, in place of no text.

    Returns:
        uint8 images `(B, C, H, W)`, and what the draw cost.

    Raises:
        ValueError: no prompts for a generator that reads text.
    """
    labels: Any = numbers % generator.num_classes
    if generator.text_encoder is not None:
        if prompts is None:
            raise ValueError(
                f"images are drawn here by class, and this {type(generator).__name__} draws what a text says: draw "
                "them by `discrete-lit sample --prompt_file`, and measure those"
            )
        texts = prompts.of(numbers.tolist())
        away = None if negative is None else [negative] * len(texts)
        classes = labels if generator.num_classes > 1 else None
        labels = generator.condition_of_texts(texts, labels=classes, negative=away)
    drawn = generator.draw(labels, CounterRandom(seed, numbers), sampler)
    return to_uint8(generator.tokenizer.decode(drawn.tokens)), drawn
