"""Muse's second stage: masked tokens of a large image, given those of a small one (Chang et al., "Muse: Text-To-Image
Generation via Masked Generative Transformers", 2023, section 2.4).

p(x) = sum over d of p(d) p(x | d): a generator draws the tokens d of a small image, and a masked model the tokens x of
a large one given d. Muse's network attends to what self-attention makes of d, and to the text; here each place of the
large grid reads the id of the small one that it lies in, added to its embedding (`Condition.grid`), and attends to the
text.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.given_discrete import GivenDiscrete, spread_over_squares, told_to
from discrete_lit.generators.masked import Masked
from discrete_lit.samplers import Sampler
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import Tokenizer


class SuperResolution(GivenDiscrete, Masked):
    """Predict masked tokens of an image from the others, and from the tokens of the same image at a lower resolution.

    A batch holds images, of which the small ones are made by anti-aliased bicubic interpolation, or beside `"tokens"`
    the ids of the small ones as `"grid": (B, h, w)`.

    Args:
        tokenizer, image_size, num_classes: as of `Masked`.
        discrete: the generator of the small images' tokens, frozen here; `generator_from_checkpoint` in a YAML. The
            backbone's `grid_vocab` is its number of ids.
        settings: further ones of `Masked`. Label dropout drops the small image's tokens too.

    Raises:
        ValueError: a generator of other classes, of texts by another encoder, or of a grid whose sides do not divide
            those of the large one; or a backbone that reads another number of ids.
    """

    # Without a text there are still the tokens of the small image.
    empty_text_is_null = False

    def __init__(
        self, tokenizer: Tokenizer, image_size: ImageSize, *, num_classes: int, discrete: Generator, **settings: Any
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **settings)
        small, large = tuple(discrete.token_shape), tuple(self.token_shape)
        if discrete.num_classes != num_classes:
            raise ValueError(
                f"the generator of the small images knows {discrete.num_classes} classes, num_classes is {num_classes}"
            )
        if len(small) != 2 or len(large) != 2 or any(b % a for a, b in zip(small, large, strict=True)):
            raise ValueError(
                f"the tokens of the small images are a grid {small}, those of the large ones {large}: each of the "
                "small grid must stand for a square of the large one"
            )
        if self.backbone.grid_vocab != discrete.vocab_size:
            raise ValueError(
                f"backbone.init_args.grid_vocab is {self.backbone.grid_vocab or 'not set'}, and the small images have "
                f"{discrete.vocab_size} ids: set it to that"
            )
        self.take_discrete(discrete)

    def aligned(self, tokens: Tensor) -> Tensor:
        """Spread the ids `(B, h, w)` of small images over the places of the large ones, `(B, N)`."""
        if tuple(tokens.shape[1:]) != tuple(self.discrete.token_shape) or tokens.is_floating_point():
            raise ValueError(
                f"the tokens of small images are ids {self.discrete.token_shape} each, got {tokens.dtype} "
                f"{tuple(tokens.shape[1:])}"
            )
        return spread_over_squares(tokens, tuple(self.token_shape))

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Any:
        if "grid" in batch:
            given = torch.as_tensor(batch["grid"])
        elif "image" in batch:
            with torch.no_grad():
                given = self.discrete.tokenizer.encode(self._small(batch["image"]))
        else:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}: SuperResolution needs "image", or "tokens" and the '
                '"grid" of the small image\'s ids'
            )
        return super().condition_of({**batch, "grid": self.aligned(given)}, random)

    def _small(self, images: Tensor) -> Tensor:
        """Shrink images `(B, C, H, W)` to the size of the generator of the small ones."""
        size = height_and_width(self.discrete.image_size)
        return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition | Tensor,
        random: CounterRandom,
        sampler: Sampler | None = None,
        *,
        known: Tensor | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw the tokens of a small image, unless the condition has them as its grid, then those of the large one.

        The small one is drawn by the complement of the seed: both stages ask for numbers of the same purposes.
        """
        given, first = as_condition(condition), None
        if given.grid is None:
            first = self.discrete.draw(told_to(self.discrete, given), CounterRandom(~random.seed, random.indices))
            given = replace(given, grid=self.aligned(first.tokens))
        output = super().draw(plain(given), random, sampler, known=known, trace=trace)
        if first is None:
            return output
        return replace(
            output,
            network_calls=first.network_calls + output.network_calls,
            sequential_passes=first.sequential_passes + output.sequential_passes,
            count_flops=lambda: first.flops + output.flops,
        )
