"""TokenBridge: masked autoregression over the ids of quantised latents (Wang et al., "Bridging Continuous and Discrete
Tokens for Autoregressive Visual Generation", 2025).

Each number of a latent is rounded to one of B levels of the normal law (`NormalLevels`), after the tokenizer has been
trained. MAR's network reads the rounded latents of the places that are known, and makes a hidden state of every place;
where MAR draws a latent by diffusion, a small autoregressive model draws the ids of its channels (`ChannelHead`).
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones.channel_head import ChannelHead, ChannelLayout
from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder, VectorLayout
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, places_of, streams_of
from discrete_lit.diffusion import MaskSchedule, TruncatedNormalSchedule
from discrete_lit.generators.continuous_masked import at_places, sample_masks, step_masks
from discrete_lit.generators.generator import Likelihood, check_permutation, subsets_of_all_sizes
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.samplers.channel_by_channel import DimensionwiseSampler
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.quantizers.normal_levels import NormalLevels
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


@loadable
class DimensionwiseMasked(LatentGenerator):
    """Predict the ids of masked places from the others, those of a place one channel after another (section 3).

    It is given latents, rounds them itself, and draws rounded latents; so it trains on samples of the tokenizer's
    posterior, as TokenBridge does. For t uniform in (0, 1), `ceil(N m(t))` places of an image are masked, chosen
    uniformly; in training one t is drawn for a step, the same for all images and ranks. The loss is the mean -log p of
    an id of the masked places, in nats.

    Args:
        tokenizer, image_size, num_classes: as of `LatentGenerator`.
        backbone: called with the layout of the places.
        head: called with the layout of the ids of a place.
        levels: B, ids of each number: 64 in TokenBridge.
        low, high, std_range: of the levels, see `NormalLevels`.
        mask_schedule: m of training; MAR's normal law cut to [0.7, 1] by default.
        sampler: how `sample` draws where nothing else is asked for; `DimensionwiseSampler()` by default.
        likelihood_samples: evaluations of the network for each `log_likelihood`.
        training: `check_scale` of `LatentGenerator`; `label_dropout`, `optimizer`, `scheduler`,
            `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a tokenizer of ids, a setting out of its range, or a sampler of more steps than there are places.
    """

    sampler_kind = DimensionwiseSampler
    coordinate_name = "mask_ratio"

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[VectorLayout], MaskedAutoencoder],
        head: Callable[[ChannelLayout], ChannelHead],
        levels: int = 64,
        low: float = -5.0,
        high: float = 5.0,
        std_range: float = 3.0,
        mask_schedule: MaskSchedule | None = None,
        sampler: DimensionwiseSampler | None = None,
        likelihood_samples: int = 4,
        **training: Any,
    ) -> None:
        if not isinstance(tokenizer, ContinuousTokenizer):
            raise ValueError(
                f"{type(self).__name__} rounds the latents of a continuous tokenizer itself, by its own levels; a "
                f"{type(tokenizer).__name__} makes ids: give the tokenizer that it quantises, if it does"
            )
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        if likelihood_samples < 1:
            raise ValueError(f"likelihood_samples must be at least 1, got {likelihood_samples}")
        self.dim, *self.grid = self.latent_shape
        self.length = self.grid[0] * self.grid[1]
        self.quantizer = NormalLevels(levels, low=low, high=high, std_range=std_range)
        self.backbone = backbone(VectorLayout(dim=self.dim, num_classes=num_classes, grid=tuple(self.grid)))
        self.head = head(ChannelLayout(channels=self.dim, levels=levels, condition_width=self.backbone.hidden_width))
        self.mask_schedule = self.step_schedule = mask_schedule or TruncatedNormalSchedule()
        self.sampler = sampler or DimensionwiseSampler(min(64, self.length))
        self.sampler.check_length(self.length)
        self.likelihood_samples = likelihood_samples

    # The sequence.

    def to_ids(self, latents: Tensor) -> Tensor:
        """Round latents `(B, D, H, W)` to the ids of their places, `(B, N, D)` int64 in [0, levels)."""
        return self.quantizer(rearrange(latents, "b d h w -> b (h w) d"))

    def to_latents(self, ids: Tensor) -> Tensor:
        """Look up the latents `(B, D, H, W)` that ids `(B, N, D)` stand for."""
        return rearrange(self.quantizer.lookup(ids), "b (h w) d -> b d h w", h=self.grid[0])

    # The loss.

    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        ids = self.to_ids(data)
        if self.training:
            masked, count = step_masks(random, self.length, share=self.step_share())
            hidden = self.backbone(self.quantizer.lookup(ids), masked, condition, known=self.length - count)
            places = places_of(masked, count)
            values = self.head.losses(at_places(hidden, places).flatten(0, 1), at_places(ids, places).flatten(0, 1))
            values, weights = values.view(places.shape), None
        else:
            masked = sample_masks(self.mask_schedule, random, self.length)
            hidden = self._hidden(ids, masked, condition)
            values = self.head.losses(hidden.flatten(0, 1), ids.flatten(0, 1)).view(masked.shape)
            weights = masked.to(values.dtype)
        ratio = masked.double().mean(dim=1, keepdim=True).expand(values.shape)
        return LatentLosses({"cross_entropy": values}, ratio, weights)

    def _hidden(self, ids: Tensor, masked: Tensor, condition: Condition) -> Tensor:
        """The hidden states of images with different numbers of masked places, one at least in each."""
        return self.backbone(self.quantizer.lookup(ids), masked, condition, known=self.length - 1, uneven=True)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self,
        latents: Tensor,
        condition: Condition | Tensor,
        *,
        indices: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Likelihood:
        """Estimate a lower bound of log p of the ids that latents are rounded to; with `order`, give its exact value.

        It is a probability, not a density, of D ids at each place; no number beside those of other levels. Over all
        orders of the places, the mean of log p is `N E_k[(1 / k) sum of log p(x_i | the others)]` with k masked places,
        uniform in 1 ... N and chosen uniformly (as of `Masked`); each log p(x_i | ...) is exact. Along one order log p
        is the sum of N factors, each of which costs a network evaluation.

        Args:
            latents: `(B, D, H, W)`, scaled.
            condition: labels `(B,)` int64 in [0, num_classes].
            indices: `(B,)` int64, each sample's position in its data set, to which the estimate's random numbers
                belong; 0 to B - 1 by default.
            order: `(N,)` int64, a permutation of the places.

        Raises:
            ValueError: an order that is no permutation.
        """
        self.check_latents(latents)
        ids, given = self.to_ids(latents), as_condition(condition)
        total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        if order is not None:
            check_permutation(order.tolist(), self.length)
            masked = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
            for place in order.tolist():
                total += self.head.log_likelihood(self._hidden(ids, masked, given)[:, place], ids[:, place]).double()
                masked[:, place] = False
            return Likelihood(total, "exact")
        random = streams_of(ids, seed=self.seed, indices=indices)
        for masked, k in subsets_of_all_sizes(random, self.length, self.likelihood_samples):
            nats = self.head.log_likelihood(self._hidden(ids, masked, given).flatten(0, 1), ids.flatten(0, 1))
            total += self.length * (nats.view(masked.shape) * masked).double().sum(dim=1) / k[:, 0]
        return Likelihood(total / self.likelihood_samples, "bound")

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.head)

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(self, labels: Tensor, random: CounterRandom, sampler: DimensionwiseSampler | None = None) -> SamplerOutput:
        sampler = sampler or cast(DimensionwiseSampler, self.sampler)
        self.check_draw(labels, sampler.guidance_scale)
        output = sampler(self.backbone, self.head, labels.long(), random, lookup=self.quantizer.lookup)
        return output.with_tokens(self.to_latents(output.tokens))
