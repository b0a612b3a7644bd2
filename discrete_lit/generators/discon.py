"""DisCon: continuous latents given discrete tokens (Zheng et al., "Rethinking Discrete Tokens: Treating Them as
Conditions for Continuous Autoregressive Image Synthesis", ICCV 2025).

p(x) = sum over d of p(d) p(x | d): a generator of discrete tokens draws d, and a masked model of continuous latents
draws x given d and the class. The paper's code was not released. From the paper are both parts, all discrete tokens in
front of the known latents, and groups of latents that are drawn together. From MixAR (2025) are mask vectors that
become the embeddings of d, and training on d that a generator drew. The rest are choices of this project: embeddings
that are added or attended to, the share of d that is replaced at random, and guidance that drops d together with the
class.
"""

from dataclasses import replace
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.masked_autoencoder import VectorLayout
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.core.synchronisation import host_sees
from discrete_lit.generators.continuous_masked import ContinuousMasked
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.given_discrete import GivenDiscrete, spread_over_squares, told_to
from discrete_lit.samplers.masked_vectors import MARSampler
from discrete_lit.samplers.sampler import Sampler, SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer

Exposure = Literal["none", "replace", "mixture"]


@loadable
class DisCon(GivenDiscrete, ContinuousMasked):
    """Predict masked latents from the others, the class, and a grid of discrete tokens d of the same image.

    A batch holds images, which both tokenizers encode, or `"latents"` and `"tokens"`. A text is read by a backbone
    with a `context_dim`; a generator of d that reads texts must have the same `text_encoder`.

    Args:
        tokenizer, image_size, num_classes, backbone, head: as of `ContinuousMasked`; the backbone's `fusion` says how d
            enters.
        discrete: the generator that draws d, frozen here; its tokenizer makes d of images in training.
        exposure: on which d it is trained, so that drawn d are no surprise: the true one (`"none"`), the true one with
            ids replaced by random ones (`"replace"`), or for some images d that the generator drew for their class
            (`"mixture"`).
        exposure_probability: of a replaced id, or of an image with a drawn d.
        exposure_sampler: how d is drawn in training; the generator's own by default, whose cost every step then has.
        settings: further ones of `ContinuousMasked`.

    Raises:
        ValueError: a setting out of its range; a generator of d of other images or classes; or a `fusion` that d does
            not allow: `"mix"` and `"add"` need a grid of d whose sides divide those of the places.
    """

    # Without a text there is still d.
    empty_text_is_null = False

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        discrete: Generator,
        exposure: Exposure = "none",
        exposure_probability: float = 0.1,
        exposure_sampler: Sampler | None = None,
        **settings: Any,
    ) -> None:
        if exposure not in ("none", "replace", "mixture") or not 0 <= exposure_probability <= 1:
            raise ValueError(
                "exposure must be 'none', 'replace' or 'mixture' and exposure_probability in [0, 1], got "
                f"{exposure!r} and {exposure_probability}"
            )
        if exposure_sampler is not None and exposure != "mixture":
            raise ValueError(f"exposure_sampler draws for exposure='mixture', got exposure={exposure!r}")
        if discrete.num_classes != num_classes:
            raise ValueError(f"the generator of d knows {discrete.num_classes} classes, num_classes is {num_classes}")
        if discrete.image_size != normal_size(image_size):
            raise ValueError(
                f"the generator of d models images of {discrete.image_size} pixels, image_size is {image_size}: both "
                "tokenizers encode the same images"
            )
        channels = [getattr(coder, "image_channels", None) for coder in (tokenizer, discrete.tokenizer)]
        if None not in channels and channels[0] != channels[1]:
            raise ValueError(
                f"the tokenizer of latents takes images of {channels[0]} channels, that of d {channels[1]}: both "
                "encode the same images"
            )
        self.null_id, self.discrete_shape = discrete.vocab_size, tuple(discrete.token_shape)
        super().__init__(tokenizer, image_size, num_classes=num_classes, **settings)
        self.take_discrete(discrete)
        self.exposure: Exposure = exposure
        self.exposure_probability = exposure_probability
        self.exposure_sampler = exposure_sampler

    def layout(self) -> VectorLayout:
        return VectorLayout(
            dim=self.dim,
            num_classes=self.num_classes,
            grid=tuple(self.grid),
            grid_vocab=self.null_id,
            grid_length=None if self._stand_for_squares() else prod(self.discrete_shape),
        )

    def _stand_for_squares(self) -> bool:
        """Whether each id of d stands for a square of places: its grid divides theirs."""
        shape = self.discrete_shape
        return len(shape) == 2 and not any(side % rows for side, rows in zip(self.grid, shape, strict=True))

    def aligned(self, tokens: Tensor) -> Tensor:
        """Spread ids `(B, h, w)` over the places, `(B, N)`, each over the square of places that it stands for; ids of
        another shape than that stay in their own order, `(B, ids)`."""
        if tuple(tokens.shape[1:]) != self.discrete.token_shape or tokens.is_floating_point():
            raise ValueError(
                f"d must be ids of the shape {self.discrete.token_shape} for each image, got {tokens.dtype} "
                f"{tuple(tokens.shape[1:])}: is it of another tokenizer?"
            )
        ids = self.discrete.vocab_size
        # On a device their values are not looked at: it would wait for all that was queued before.
        if host_sees(tokens) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < ids:
            raise ValueError(
                f"d has ids in [{int(tokens.min())}, {int(tokens.max())}], its generator has those in [0, {ids}): is "
                "it of another tokenizer?"
            )
        if not self._stand_for_squares():
            return tokens.flatten(1)
        return spread_over_squares(tokens, tuple(self.grid))

    # Batches.

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Condition:
        labels = self.labels_of(batch)
        if "tokens" in batch:
            tokens = batch["tokens"]
        elif "image" in batch:
            with torch.no_grad():
                tokens = self.discrete.tokenizer.encode(batch["image"])
        else:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}: DisCon needs "image", or "latents" and "tokens" of '
                "the same images"
            )
        condition = Condition(labels=labels, grid=self.aligned(tokens), **self.context_of(batch))
        return self._exposed(condition, random) if self.training else condition

    def _exposed(self, condition: Condition, random: CounterRandom) -> Condition:
        """Give what training sees in the place of the true d `(B, ids)`; a function of the samples alone."""
        grid = condition.grid
        if grid is None or self.exposure == "none" or self.exposure_probability == 0:
            return condition
        if self.exposure == "replace":
            count = grid.shape[1]
            numbers = random.uniform(Purpose.EXPOSURE, 2 * count).view(len(grid), 2, count)
            others = (numbers[:, 1] * self.discrete.vocab_size).long()
            return replace(condition, grid=torch.where(numbers[:, 0] < self.exposure_probability, others, grid))
        chosen = random.uniform(Purpose.EXPOSURE, 1) < self.exposure_probability
        with torch.no_grad():
            drawn = self.discrete.draw(told_to(self.discrete, condition), random, self.exposure_sampler).tokens
        return replace(condition, grid=torch.where(chosen, self.aligned(drawn), grid))

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self,
        labels: Condition | Tensor,
        random: CounterRandom,
        sampler: MARSampler | None = None,
        *,
        tokens: Tensor | None = None,
    ) -> SamplerOutput:
        """Draw d, then latents given it.

        Args:
            labels: `(B,)` int64 in [0, num_classes], or these with a grid of d as `aligned` makes it.
            random: one stream for each sample, for both.
            sampler: of the latents; this generator's own by default. d is drawn by its own generator's.
            tokens: d `(B, h, w)`, drawn if None: that of real images, or of others, to see what d decides.

        Returns:
            The sampler's output, with latents as its `tokens`; the network calls are those of both generators.

        Raises:
            ValueError: as of `LatentGenerator.draw`, or d of another shape.
        """
        sampler = sampler or cast(MARSampler, self.sampler)
        condition, first = as_condition(labels), None
        self.check_draw(condition.labels, sampler.guidance_scale)
        grid = condition.grid
        if tokens is not None:
            grid = self.aligned(tokens)
        elif grid is None:
            first = self.discrete.draw(told_to(self.discrete, condition), random)
            grid = self.aligned(first.tokens)
        output = self.draw_given(replace(condition, labels=condition.labels.long(), grid=grid), random, sampler)
        if first is None:
            return output
        return SamplerOutput(
            tokens=output.tokens,
            network_calls=first.network_calls + output.network_calls,
            sequential_passes=first.sequential_passes + output.sequential_passes,
            count_flops=lambda: first.flops + output.flops,
        )
