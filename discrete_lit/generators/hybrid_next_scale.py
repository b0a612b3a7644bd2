"""Next-scale prediction with vectors: HART's hybrid of ids and residuals, and scales of vectors alone.

`HybridNextScale` is HART (Tang et al., "HART: Efficient Visual Generation with Hybrid Autoregressive Transformer",
2024): VAR's scales of ids, and at the last scale also what the ids leave of the latents, drawn by a small diffusion
model for each place given its hidden state and its id. It is published for text; classes are a choice of this project.

`ContinuousNextScale` has VAR's layout and no ids: each scale holds what those before it leave of the latents, averaged
to its size, and the same small model draws its vectors, each by itself or, with attention, those of a scale together.
No paper has it in this form; FlowAR (2024), which draws whole scales, is its nearest kin.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.backbones.scale_transformer import ScaleLayout, ScaleStates, ScaleTransformer
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, places_of, random_subset, streams_of
from discrete_lit.diffusion import MaskSchedule, TruncatedNormalSchedule
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators.continuous_masked import at_places, head_losses
from discrete_lit.generators.generator import Likelihood, cross_entropies
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.metrics.latent_statistics import scale_complaint
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.samplers.scale_by_scale import HybridScaleSampler, ScalePyramid
from discrete_lit.tokenizers.hybrid import HybridLatents
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


@loadable
class HybridNextScale(LatentGenerator):
    """Predict the ids of each scale from those before it, and the residual of the last scale by diffusion (HART).

        p(f | y) >= prod over k of p(r_k | r_1 ... r_{k-1}, y)  x  prod over places of p(residual | hidden state, id)

    The loss is the cross-entropy of the ids plus the head's loss, each a mean over what it predicts. In training a step
    reads some of the last scale's places alone, `ceil(N m(t))` fewer for t uniform in (0, 1), the same for all images
    and ranks; and the head is given ids that the logits draw, with the residual that they leave, since that is what it
    meets in sampling.

    A batch is as of `LatentGenerator`; with a `context` also `"context"`, `(B, T, E)` vectors in front such as a text
    encoder's, and `"context_mask"`, `(B, T)`, which of them are valid; all by default. A `text_encoder` of T ids makes
    them of captions.

    Args:
        tokenizer: `HybridLatents`, frozen here.
        image_size, num_classes: as of `LatentGenerator`; a text-to-image model has one class.
        backbone: called with the layout of the scales.
        head: called with D and the width of the hidden states; HART's clips at 1 behind a scale of 0.6.
        context: T and E of the vectors in front; None for a class alone.
        scales: that the tokenizer must have, where this is to be checked: sides of squares, or `[height, width]` each.
        drop_schedule: m, of the last scale's places that training leaves out; HART's is a normal law cut to [0.5, 1].
        least_kept: places of the last scale that training keeps at least; 32 in HART.
        drawn_ids: give the head drawn ids in training, or the true ones.
        draw_top_k, draw_top_p: filters of that draw; HART has 600 and 0.96.
        sampler: how `sample` draws where nothing else is asked for; `HybridScaleSampler()` by default.
        likelihood_steps: of the head whose bound `log_likelihood` takes; a path of steps has its own at most.
        training: `check_scale` of `LatentGenerator`, which looks at the residuals over the head's `scale`;
            `label_dropout`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: another tokenizer, or a setting out of its range.
    """

    sampler_kind = HybridScaleSampler
    coordinate_name = "scale"
    scale_coordinates: Tensor
    """`(N,)`: the middle of each place's scale on a line from 0 to 1, in which all scales are as long."""

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[ScaleLayout], ScaleTransformer],
        head: Callable[[int, int], TokenDiffusionHead],
        context: tuple[int, int] | None = None,
        scales: list[int | tuple[int, int]] | None = None,
        drop_schedule: MaskSchedule | None = None,
        least_kept: int = 32,
        drawn_ids: bool = True,
        draw_top_k: int | None = 600,
        draw_top_p: float | None = 0.96,
        sampler: HybridScaleSampler | None = None,
        likelihood_steps: int = 100,
        **training: Any,
    ) -> None:
        if not isinstance(tokenizer, HybridLatents):
            raise ValueError(
                f"HybridNextScale predicts ids and residuals of a HybridVQ, which a {type(tokenizer).__name__} does "
                "not give: set tokenizer to HybridLatents around one"
            )
        if least_kept < 1 or likelihood_steps < 1:
            raise ValueError(
                f"least_kept and likelihood_steps must be at least 1, got {least_kept} and {likelihood_steps}"
            )
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        quantizer = tokenizer.quantizer
        if scales is not None and [height_and_width(scale) for scale in scales] != list(quantizer.sizes):
            raise ValueError(
                f"the tokenizer's scales are {list(quantizer.scales)}, this generator models {list(scales)}: its ids "
                "are others"
            )
        layout = ScaleLayout(
            dim=quantizer.dim,
            sizes=tuple(quantizer.sizes),
            num_classes=num_classes,
            vocab_size=quantizer.vocab_size,
            context=None if context is None else (context[0], context[1]),
        )
        self.context = layout.context
        self.lengths = layout.lengths
        self.backbone = backbone(layout)
        self.head = head(layout.dim, self.backbone.width)
        if self.head.drawn_together:
            raise ValueError("the head's heads attend among the places of a scale, of which training keeps a part here")
        self.drop_schedule = self.step_schedule = drop_schedule or TruncatedNormalSchedule(lowest=0.5)
        self.least_kept = least_kept
        self.drawn_ids = drawn_ids
        self.draw_top_k, self.draw_top_p = draw_top_k, draw_top_p
        self.sampler = sampler or HybridScaleSampler()
        self.likelihood_steps = likelihood_steps
        solver = self.sampler.solver or self.head.solver
        solver.times(self.head.denoiser.path)  # refuses what the path does not have
        self.register_buffer("scale_coordinates", _middles(self.lengths), persistent=False)

    @property
    def quantizer(self) -> MultiScaleResidualQuantizer:
        """The tokenizer's quantizer, which makes the input of each scale."""
        return cast(HybridLatents, self.tokenizer).quantizer

    # Batches.

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Condition | Tensor:
        labels = self.labels_of(batch)
        if self.context is None:
            return labels
        if self.text_encoder is not None:
            return Condition(labels=labels, **self.context_of(batch))
        if "context" not in batch:
            raise ValueError(
                f"a batch holds {', '.join(map(str, batch))}: this generator has {self.context[0]} vectors in front, "
                'and needs "context"'
            )
        mask = batch.get("context_mask")
        return Condition(labels=labels, context=batch["context"], context_mask=None if mask is None else mask.bool())

    def check_scale(self, data: Tensor) -> None:
        """Raise a ValueError where the residuals of the first batch have another deviation than about the head's
        `scale`, which its noise takes for granted."""
        if not self._unchecked:
            return
        tokens = self.quantizer.encode(rearrange(data, "b d h w -> b h w d"))
        residual = data - self.quantizer.before_residual(tokens)
        deviation = float(residual.double().square().mean().sqrt())
        if scale_complaint(deviation / self.head.scale) is not None:
            raise ValueError(
                f"the residuals of the first batch have the deviation {deviation:.4g}, and head.init_args.scale is "
                f"{self.head.scale}: they must be about the same. Are the latents of another normalisation than the "
                f"tokenizer's, or is {deviation:.3g} the scale?"
            )
        self._unchecked = False

    # The loss.

    def losses(self, data: Tensor, condition: Condition | Tensor, random: CounterRandom) -> LatentLosses:
        tokens, residual, inputs = self._parts(data)
        places = None
        last = torch.arange(self.lengths[-1], device=data.device).expand(len(data), -1)
        if self.training:
            places = last = self._kept(random)
            inputs, tokens = self._at_kept(inputs, places), self._at_kept(tokens, places)
            residual = at_places(residual, places)
        states = self.backbone(inputs, condition, places=places)
        assert states.logits is not None
        values = cross_entropies(states.logits, tokens)
        terms = self._head_terms(states, tokens, residual, last, random)
        # The mean over all places of a term of some is the mean over those.
        share, before = tokens.shape[1] / last.shape[1], tokens.shape[1] - last.shape[1]
        spread = {name: F.pad(term * share, (before, 0)) for name, term in terms.items()}
        coordinates = self.scale_coordinates[: tokens.shape[1]]
        return LatentLosses({"ids": values, **spread}, coordinates.expand_as(values))

    @torch.no_grad()
    def _parts(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids `(B, N)`, residuals `(B, n, D)` of the last scale, and what the network reads, `(B, N - 1, D)`."""
        with torch.autocast(data.device.type, enabled=False):
            tokens = self.quantizer.encode(rearrange(data, "b d h w -> b h w d"))
            residual = rearrange(data - self.quantizer.before_residual(tokens), "b d h w -> b (h w) d")
            return tokens, residual, self.quantizer.teacher_forcing(tokens)

    def _kept(self, random: CounterRandom) -> Tensor:
        """The places of the last scale that a step of training reads, `(B, m)` in raster order."""
        count = self.lengths[-1]
        kept = min(count, max(self.least_kept, count - ceil(count * self.step_share())))
        chosen = random_subset(random.uniform(Purpose.MASK_ORDER, count), kept)
        return places_of(chosen, kept)

    def _at_kept(self, sequences: Tensor, places: Tensor) -> Tensor:
        """Leave out the places of the last scale that are not kept, of `(B, n)` or `(B, n, D)`."""
        coarse, last = sequences[:, : -self.lengths[-1]], sequences[:, -self.lengths[-1] :]
        return torch.cat((coarse, last.gather(1, places) if last.ndim == 2 else at_places(last, places)), dim=1)

    def _head_terms(
        self, states: ScaleStates, tokens: Tensor, residual: Tensor, places: Tensor, random: CounterRandom
    ) -> dict[str, Tensor]:
        """The terms of the head's loss at places of the last scale, `(B, m)` each."""
        count = places.shape[1]
        ids, hidden = tokens[:, -count:], states.hidden[:, -count:]
        if self.training and self.drawn_ids:
            assert states.logits is not None
            uniforms = random.uniform(Purpose.TOKEN, self.lengths[-1]).gather(1, places)
            drawn = self._drawn(states.logits[:, -count:].detach(), uniforms)
            residual = residual + self._codes(ids) - self._codes(drawn)
            ids = drawn
        z = self.backbone.head_condition(hidden, self._codes(ids))
        return head_losses(self.head, z, residual, places, random, length=self.lengths[-1])

    @torch.no_grad()
    def _drawn(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw ids `(B, m)` as a sampler does, but without looking whether the logits are numbers."""
        weights = filter_logits(logits, self.draw_top_k, self.draw_top_p).softmax(dim=-1)
        cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
        target = uniforms[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)

    def _codes(self, ids: Tensor) -> Tensor:
        return self.quantizer.codebook.lookup(ids)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Give a lower bound of the log density of latents, in nats: the ids' log p, exactly, and the head's bound.

        The density of f is the sum over all ids of p(ids) p(f | ids), of which its own ids are one term; of each
        residual's log density the head gives its variational bound.
        """
        self.check_latents(latents)
        random = streams_of(latents, seed=self.seed, indices=indices)
        tokens, residual, inputs = self._parts(at_least_float32(latents))
        states = self.backbone(inputs, condition)
        assert states.logits is not None
        nats = -cross_entropies(states.logits, tokens).double().sum(dim=1)
        count = self.lengths[-1]
        z = self.backbone.head_condition(states.hidden[:, -count:], self._codes(tokens[:, -count:]))

        def noise(step: int) -> Tensor:
            numbers = random.normal(Purpose.DIFFUSION_NOISE, count * residual.shape[2], step)
            return numbers.to(residual.dtype).view(-1, residual.shape[2])

        bound = self.head.bound(
            z.flatten(0, 1), residual.flatten(0, 1), solver=DDPM(self.likelihood_steps), noise=noise
        )
        return Likelihood(nats - bound.view(len(latents), count).sum(dim=1), "bound")

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.head)

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self, labels: Condition | Tensor, random: CounterRandom, sampler: HybridScaleSampler | None = None
    ) -> SamplerOutput:
        sampler, condition = sampler or cast(HybridScaleSampler, self.sampler), as_condition(labels)
        self.check_draw(condition.labels, sampler.guidance_scale)
        return self.draw_given(plain(replace(condition, labels=condition.labels.long())), random, sampler)

    @torch.no_grad()
    @in_evaluation
    def draw_given(
        self, condition: Condition | Tensor, random: CounterRandom, sampler: HybridScaleSampler | None = None
    ) -> SamplerOutput:
        """Draw latents given labels, or a condition with the vectors in front; arguments as of the sampler."""
        sampler = sampler or cast(HybridScaleSampler, self.sampler)
        drawn = sampler(
            self.backbone, self.head, as_condition(condition), random, pyramid=HybridPyramid(self.quantizer)
        )
        return drawn.as_output()


class HybridPyramid(ScalePyramid):
    """Add up ids of all scales, and residuals of the last, as a `MultiScaleResidualQuantizer` does.

    Args:
        quantizer: of the ids.
    """

    def __init__(self, quantizer: MultiScaleResidualQuantizer) -> None:
        self.quantizer = quantizer

    def draws_vectors(self, number: int) -> bool:
        return number == len(self.quantizer.sizes) - 1

    def codes(self, ids: Tensor) -> Tensor:
        return self.quantizer.codebook.lookup(ids)

    def add(self, number: int, f_hat: Tensor | None, ids: Tensor | None, vectors: Tensor | None) -> Tensor:
        assert ids is not None
        if vectors is None:
            added = self.quantizer.contribution(number, ids)
        else:
            height, _ = self.quantizer.sizes[number]
            added = self.quantizer.raw_codes(ids) + rearrange(vectors, "b (h w) d -> b d h w", h=height)
        return added if f_hat is None else f_hat + added

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        return self.quantizer.at_scale(number, f_hat)


@loadable
class ContinuousNextScale(LatentGenerator):
    """Predict the vectors of each scale from the scales before it, each place by a small diffusion model.

    Scale k holds what the scales before it leave of the latents, averaged to its size (`VectorPyramid`). The loss is
    the head's, the mean over all places.

    A head with `heads` draws the places of a scale together, by attention among them, as FlowAR does; set the
    backbone's `place_embedding`. Without, they are independent of one another given the scales before. That is wrong of
    latents: of what is left at a scale, the averages over the places of those before are known, and places that are
    drawn by themselves do not keep them.

    Args:
        tokenizer, image_size, num_classes: as of `LatentGenerator`.
        backbone: called with the layout of the scales.
        head: called with D and the width of the hidden states; with `heads` it draws a scale at once.
        scales: in growing order, from 1 to the latents' grid: sides of squares, or `[height, width]` each.
        deviations: of the vectors of each scale, which are divided by it; 1 by default. A first batch that has others
            is refused with those that it has.
        sampler: how `sample` draws where nothing else is asked for; `HybridScaleSampler()` by default.
        training: `check_scale` of `LatentGenerator`, which looks at the vectors of each scale too; `label_dropout`,
            `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: scales that do not end at the latents' grid, or a setting out of its range.
    """

    sampler_kind = HybridScaleSampler
    coordinate_name = "scale"
    scale_coordinates: Tensor
    """`(N,)`, as of `HybridNextScale`."""

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[ScaleLayout], ScaleTransformer],
        head: Callable[[int, int], TokenDiffusionHead],
        scales: list[int | tuple[int, int]],
        deviations: list[float] | None = None,
        sampler: HybridScaleSampler | None = None,
        **training: Any,
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        self.pyramid = VectorPyramid(scales, deviations=deviations)
        channels, *grid = self.latent_shape
        if self.pyramid.sizes[-1] != tuple(grid):
            raise ValueError(
                f"scales={list(scales)} must end at the grid of the latents, {grid[0]} x {grid[1]}, as [height, width] "
                "where it is not square"
            )
        layout = ScaleLayout(dim=channels, sizes=tuple(self.pyramid.sizes), num_classes=num_classes)
        self.lengths = layout.lengths
        self.backbone = backbone(layout)
        self.head = head(channels, self.backbone.width)
        self.sampler = sampler or HybridScaleSampler()
        solver = self.sampler.solver or self.head.solver
        solver.times(self.head.denoiser.path)  # refuses what the path does not have
        self.register_buffer("scale_coordinates", _middles(self.lengths), persistent=False)

    def check_scale(self, data: Tensor) -> None:
        """Raise a ValueError where the first batch has another deviation than about 1, or its vectors of a scale have
        another than about that scale's of `deviations`, which the head's noise takes for granted."""
        if not self._unchecked:
            return
        super().check_scale(data)
        found, given = self.pyramid.deviations(at_least_float32(data)), self.pyramid.scale_deviations
        if any(scale_complaint(own / taken) for own, taken in zip(found, given, strict=True)):
            self._unchecked = True
            taken = ", ".join(f"{value:.3g}" for value in found)
            raise ValueError(
                f"the vectors of the first batch have the deviations [{taken}] at the {len(found)} scales, and "
                f"model.init_args.deviations is {given}: they must be about the same. Are the latents of another "
                f"normalisation than the tokenizer's? If not, set deviations to [{taken}]"
            )

    def losses(self, data: Tensor, condition: Condition | Tensor, random: CounterRandom) -> LatentLosses:
        with torch.no_grad(), torch.autocast(data.device.type, enabled=False):
            vectors, inputs = self.pyramid.split(data)
        hidden = self.backbone(inputs, condition).hidden
        places = torch.arange(vectors.shape[1], device=data.device).expand(len(data), -1)
        z = self.backbone.head_condition(hidden)
        if self.head.drawn_together:
            terms = self._losses_of_scales(z, vectors, random)
        else:
            terms = head_losses(self.head, z, vectors, places, random, length=vectors.shape[1])
        return LatentLosses(terms, self.scale_coordinates.expand(places.shape))

    def _losses_of_scales(self, z: Tensor, vectors: Tensor, random: CounterRandom) -> dict[str, Tensor]:
        """The terms of a head that draws whole scales, `(B, N)` each; a scale of a sample has one time."""
        repeats, (batch, count, dim) = self.head.repeats, vectors.shape
        uniforms = random.uniform(Purpose.DIFFUSION_TIME, repeats * len(self.lengths)).view(batch, repeats, -1)
        noise = random.normal(Purpose.DIFFUSION_NOISE, repeats * count * dim).to(vectors.dtype)
        noise = rearrange(noise, "b (r n d) -> r b n d", r=repeats, n=count).split(self.lengths, dim=2)
        parts = zip(z.split(self.lengths, dim=1), vectors.split(self.lengths, dim=1), strict=True)
        terms: dict[str, list[Tensor]] = {}
        for number, (states, data) in enumerate(parts):
            of_scale = self.head.losses(states, data, uniforms=uniforms[..., number].T, noise=noise[number])
            for name, term in of_scale.items():
                terms.setdefault(name, []).append(term[:, None].expand(-1, self.lengths[number]))
        return {name: torch.cat(of_scales, dim=1) for name, of_scales in terms.items()}

    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Refuse: there is no likelihood, nor a bound.

        The coarse scales are functions of the latents, and the model a density over all scales together, in which they
        would have to be integrated out.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "ContinuousNextScale has no likelihood of latents: its scales hold them several times over, and the coarse "
            "ones would have to be integrated out"
        )

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.head)

    @torch.no_grad()
    @in_evaluation
    def draw(self, labels: Tensor, random: CounterRandom, sampler: HybridScaleSampler | None = None) -> SamplerOutput:
        sampler = sampler or cast(HybridScaleSampler, self.sampler)
        self.check_draw(labels, sampler.guidance_scale)
        drawn = sampler(self.backbone, self.head, labels.long(), random, pyramid=self.pyramid)
        return drawn.as_output()


class VectorPyramid(ScalePyramid):
    """Split latents into vectors of growing scales, each what those before it leave, and add them up again.

    VAR's algorithms 1 and 2 without a codebook: scale k is the rest averaged over areas, and comes back by bicubic
    interpolation. The last scale has all that is left, so that nothing is lost.

    Args:
        scales: in growing order, sides of squares or `(height, width)` each.
        deviations: what the vectors of each scale are divided by; 1 by default.

    Raises:
        ValueError: scales that shrink, or deviations that are not one for each scale, above 0.
    """

    def __init__(self, scales: Sequence[int | tuple[int, int]], *, deviations: Sequence[float] | None = None) -> None:
        rule = f"scales must be positive and grow, got {list(scales)}"
        self.sizes = [height_and_width(scale, f"{rule}: a scale") for scale in scales]
        grow = all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if len(self.sizes) < 2 or not grow:
            raise ValueError(f"{rule}; two or more, of which neither height nor width may shrink")
        self.scale_deviations = (
            [1.0] * len(self.sizes) if deviations is None else [float(value) for value in deviations]
        )
        if len(self.scale_deviations) != len(self.sizes) or min(self.scale_deviations) <= 0:
            raise ValueError(f"deviations must be above 0, one for each of {len(self.sizes)} scales, got {deviations}")

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Split latents `(B, D, H, W)`.

        Returns:
            The vectors of all scales, `(B, N, D)`, and what a network reads for all but the first, `(B, N - 1, D)`.
        """
        f_hat, vectors, inputs = None, [], []
        for number in range(len(self.sizes)):
            if f_hat is not None:
                inputs.append(self.at_scale(number, f_hat))
            rest = latents if f_hat is None else latents - f_hat
            vectors.append(self.at_scale(number, rest) / self.scale_deviations[number])
            f_hat = self.add(number, f_hat, None, vectors[-1])
        return torch.cat(vectors, dim=1), torch.cat(inputs, dim=1)

    def join(self, vectors: Tensor) -> Tensor:
        """Add up the vectors of all scales, `(B, N, D)`: latents `(B, D, H, W)`."""
        f_hat = None
        for number, part in enumerate(vectors.split([height * width for height, width in self.sizes], dim=1)):
            f_hat = self.add(number, f_hat, None, part)
        assert f_hat is not None
        return f_hat

    def deviations(self, latents: Tensor) -> list[float]:
        """Measure the deviation, about zero, of the vectors of each scale of latents `(B, D, H, W)`."""
        vectors, _ = VectorPyramid(self.sizes).split(latents)
        parts = vectors.double().split([height * width for height, width in self.sizes], dim=1)
        return [float(part.square().mean().sqrt()) for part in parts]

    def draws_vectors(self, number: int) -> bool:
        return True

    def codes(self, ids: Tensor) -> Tensor:
        raise AssertionError("scales of vectors have no ids")

    def add(self, number: int, f_hat: Tensor | None, ids: Tensor | None, vectors: Tensor | None) -> Tensor:
        assert vectors is not None
        height, _ = self.sizes[number]
        added = rearrange(vectors * self.scale_deviations[number], "b (h w) d -> b d h w", h=height)
        if number < len(self.sizes) - 1:
            added = F.interpolate(added, size=self.sizes[-1], mode="bicubic")
        return added if f_hat is None else f_hat + added

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        averaged = f_hat
        if number < len(self.sizes) - 1:
            averaged = F.interpolate(f_hat, size=self.sizes[number], mode="area")
        return rearrange(averaged, "b d h w -> b (h w) d")


def _middles(lengths: list[int]) -> Tensor:
    """The middle of each place's scale, `(N,)`, on a line from 0 to 1 in which all scales are as long."""
    counts = torch.tensor(lengths)
    return ((torch.arange(len(counts)) + 0.5) / len(counts)).repeat_interleave(counts)
