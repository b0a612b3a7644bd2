"""Generators of the latents of a continuous tokenizer: what `LatentDiffusion` and `ContinuousMasked` have in common.

A family says what it costs to predict a sample's latents, `losses`, and how they are drawn, `draw`. Here are its
batches, the checks of latents and labels, the mean loss, and `sample`.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.training import ClassConditionalTraining
from discrete_lit.metrics.latent_statistics import check_latent_scale
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, Tokenizer, freeze
from discrete_lit.tokenizers.uncoded_latents import RawPixels


class LatentLosses(NamedTuple):
    """The loss of what is predicted of a batch of latents: of each sample, or of each place of it."""

    terms: dict[str, Tensor]
    """The terms of each prediction by name, of one shape `(B,)` or `(B, n)`; the loss is their sum."""
    coordinate: Tensor
    """Where each prediction stands from 0 to 1: the time of its noise, or the fraction of its image that was masked."""
    weights: Tensor | None = None
    """The weight of each prediction in the mean; 1 if None."""


class LatentGenerator(ClassConditionalTraining):
    """Models the latents of a frozen continuous tokenizer, given a class.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`, which the tokenizer encodes, with the noise of its posterior
    drawn anew in every epoch, or `{"latents": (B, D, *grid), "label": (B,)}`, scaled as the tokenizer scales them.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.continuous_from_checkpoint` in a YAML, or `RawPixels`.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        num_classes: labels lie in [0, num_classes); `num_classes` itself is the null label.
        check_scale: refuse a first batch of latents whose deviation is not about 1; pixels are not looked at.
        training: `label_dropout`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            `ClassConditionalTraining`.

    Raises:
        ValueError: no classes, a tokenizer of ids, or latents that are no grid of two axes.
    """

    content = "latents"
    null_id: int | None = None
    """The id that stands for none in a grid of ids; None for a family that is given no grid."""
    sampler: Any
    sampler_kind: type
    """The class of the samplers that draw from this generator."""

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        check_scale: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if isinstance(tokenizer, Tokenizer) and not isinstance(tokenizer, ContinuousTokenizer):
            raise ValueError(
                f"{type(self).__name__} models latents, tokenizer is a {type(tokenizer).__name__}, which makes ids: "
                "give a ContinuousTokenizer such as KLVAE, or take a generator of tokens"
            )
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; one class makes a model of no classes"
            )
        self.tokenizer = freeze(tokenizer)
        self.image_size = normal_size(image_size)
        self.num_classes = num_classes
        self.reads_labels = num_classes > 1 or self.text_encoder is None
        self.latent_shape = tuple(tokenizer.latent_shape(image_size))
        if len(self.latent_shape) != 3:
            raise ValueError(
                f"{type(self).__name__} models a grid (D, H, W), the tokenizer's latents are {self.latent_shape}"
            )
        # Pixels are no latents: their deviation is what it is.
        self._unchecked = check_scale and not isinstance(tokenizer, RawPixels)

    # Batches.

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        if "latents" in batch:
            latents = batch["latents"]
        elif (coded := self.tokenizer.modality) in batch:
            with torch.no_grad():
                latents = self.tokenizer.encode(batch[coded], random)
        else:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}: {type(self).__name__} needs "{coded}" or "latents"; '
                "ids are for the generators of tokens"
            )
        self.check_latents(latents)
        data = self.modelled(at_least_float32(latents), batch)
        self.check_scale(data)
        return data

    def modelled(self, latents: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return what the network models of a batch's latents `(B, D, H, W)`: these, unless a kind says otherwise."""
        return latents

    def check_scale(self, data: Tensor) -> None:
        """Raise a ValueError where what is modelled has another deviation than about 1 in the first batch."""
        if self._unchecked:
            check_latent_scale(data)
            self._unchecked = False

    def check_latents(self, latents: Tensor) -> None:
        """Refuse what is no batch of this generator's latents.

        Raises:
            ValueError: ids, or latents of another shape.
        """
        if not latents.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} models latents, floating-point numbers, {self.latent_shape} each, got "
                f"{latents.dtype} {tuple(latents.shape)}: are these the ids of a discrete tokenizer?"
            )
        shape = tuple(latents.shape[1:])
        if shape != self.latent_shape:
            channels, *grid = self.latent_shape
            moments = shape in ((2 * channels, *grid), (2, channels, *grid))
            raise ValueError(
                f"the latents have the shape {shape}, this generator models {self.latent_shape}: "
                + (
                    "are these means and variances? A batch holds samples of them, as LatentArrays draws"
                    if moments
                    else f"model.init_args.image_size is {self.image_size}"
                )
            )

    # The loss.

    step_schedule: MaskSchedule | None = None
    """The law of m, the share of places that a training step masks or leaves out; None where it reads them all."""
    fixed_share: float | None = None
    """m of every training step; by default each draws its own."""

    def step_share(self) -> float:
        """Return m of this training step: one for all samples and ranks, a number that the host knows."""
        assert self.step_schedule is not None
        if self.fixed_share is not None:
            return self.fixed_share
        of_step = CounterRandom(self.seed, torch.tensor([self.global_step]))
        return float(self.step_schedule.mask_probability(of_step.uniform(Purpose.MASK_RATIO, 1)))

    def mean_step_share(self) -> float | None:
        """Return the mean of m over training steps; None for a family without it."""
        if self.step_schedule is None:
            return None
        even = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        return float(self.step_schedule.mask_probability(even).mean())

    @abstractmethod
    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        """Cost the prediction of latents, in training mode for training, and in eval mode for validation.

        Args:
            data: `(B, D, H, W)`, scaled latents, float32 or float64.
            condition: labels in [0, num_classes], with what else the family is given.
            random: one stream for each sample; it alone decides times, masks and noise.
        """

    def loss(
        self,
        data: Tensor,
        /,
        condition: Condition | Tensor,
        random: CounterRandom | None = None,
        *,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Average the loss of latents over a batch, over all ranks together.

        Args:
            data: `(B, D, H, W)`, scaled latents.
            condition: labels `(B,)`, integers in [0, num_classes), or these with what else the family is given.
            random: decides times and noise; by default row i of the batch is sample i of this generator's seed.
            dropped: bool `(B,)`, the samples whose condition the null one stands for; none by default.

        Returns:
            The training loss, a scalar, and its terms, by name, where there are several.

        Raises:
            ValueError: a label that is no class; the null label is one that was `dropped`.
        """
        if random is None:
            random = streams_of(data, seed=self.seed)
        self.check_latents(data)
        condition = as_condition(condition)
        self.check_labels(condition.labels, count=len(data))
        condition = replace(condition, labels=condition.labels.long())
        if dropped is not None:
            condition = condition.dropped(dropped, null_label=self.num_classes, null_id=self.null_id)
        losses = self.losses(at_least_float32(data), condition, random)
        first = next(iter(losses.terms.values()))
        weights = torch.ones_like(first) if losses.weights is None else losses.weights
        weight = all_reduce_sum(weights.sum().detach()) / world_size()
        self.loss_weight = weight
        means = {name: (term * weights).sum() / weight for name, term in losses.terms.items()}
        return torch.stack(list(means.values())).sum(), means if len(means) > 1 else {}

    def validation_losses(
        self, data: Tensor, condition: Condition | Tensor, random: CounterRandom
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses = self.losses(data, as_condition(condition), random)
        values = torch.stack(list(losses.terms.values())).sum(dim=0)
        weights = torch.ones_like(values) if losses.weights is None else losses.weights
        return values, weights, losses.coordinate

    # The likelihood.

    @abstractmethod
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate the log density of latents, in nats, and say which kind of number it is.

        The density is of the scaled latents, in their own units: it says nothing of images, nor of the likelihood of
        ids, and may be above 0.

        Args:
            latents: `(B, D, H, W)`, scaled.
            condition: labels `(B,)` int64 in [0, num_classes], or all that the family is given.
            indices: `(B,)` int64, each sample's position in its data set, to which its random numbers belong; 0 to
                B - 1 by default.
        """

    # Sampling.

    @torch.no_grad()
    def sample(
        self,
        labels: Condition | Tensor,
        sampler: Any = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Draw the latents of one image for each label.

        Args:
            labels: `(B,)` int64 in [0, num_classes], of which `num_classes` is the null label; or these with what else
                the family draws from.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.

        Returns:
            `(B, D, H, W)` scaled latents, float32 or float64; `tokenizer.decode` makes images of them.

        Raises:
            ValueError: the reasons of `draw`.
        """
        random = streams_of(as_condition(labels).labels.reshape(-1), seed=seed, indices=indices)
        return self.draw(labels, random, sampler).tokens

    @abstractmethod
    def draw(self, labels: Any, random: CounterRandom, sampler: Any = None) -> SamplerOutput:
        """Draw as `sample` does, and report what it cost.

        Args:
            labels: `(B,)` int64 in [0, num_classes], or these with what else the family draws from.
            random: one stream for each sample.
            sampler: this generator's own by default.

        Returns:
            The sampler's output, with latents as its `tokens`.

        Raises:
            ValueError: guidance was asked for and the null label was never learned, or labels of another kind.
        """
