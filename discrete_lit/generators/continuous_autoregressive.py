"""Autoregression over continuous latents with causal attention (Li et al., "Autoregressive Image Generation without
Vector Quantization" (MAR), 2024, section 3.4 and table 1; Fan et al., "Fluid", 2024).

A causal transformer reads the latents one after another, in raster order or in a random one, and a small diffusion
model draws the next latent given what the transformer makes of those before it. `ContinuousMasked` is MAR with
bidirectional attention, which sees the known latents both ways and draws several at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, SequenceLayout, TokenDiffusionHead
from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators.continuous_masked import Patches, at_places, head_losses
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.samplers.vector_by_vector import CausalVectorSampler
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


@loadable
class ContinuousAutoregressive(LatentGenerator):
    """Predict each latent from those before it: p(x | y) is the product over n of p(x_n | x_1 ... x_{n-1}, y).

    The backbone makes a vector z of each place, where it would make logits of ids, and the head's loss at z, the mean
    over all places, is what training minimises.

    Args:
        tokenizer, image_size, num_classes: as of `LatentGenerator`.
        backbone: called with the layout: a causal sequence of vectors, of whose places it predicts `hidden_width`
            numbers each. In random order it needs to be told which place comes next: `target_positions`.
        head: called with D and `hidden_width`.
        hidden_width: of z.
        order: of the places: `"raster"`, or `"random"`, another one for each image, in training and in sampling.
        patch_size: side of the squares of latents that are one place together.
        sampler: how `sample` draws where nothing else is asked for; `CausalVectorSampler()` by default.
        likelihood_samples: evaluations of the network for each `log_likelihood`.
        likelihood_steps: of the head whose bound it is; a path of steps has its own at most.
        training: `check_scale` of `LatentGenerator`; `label_dropout`, `optimizer`, `scheduler`,
            `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range, a grid that the patches do not divide, or a random order with a backbone
            that is not told which place comes next.
    """

    sampler_kind = CausalVectorSampler
    coordinate_name = "position"

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        head: Callable[[int, int], TokenDiffusionHead],
        hidden_width: int = 1024,
        order: Literal["raster", "random"] = "raster",
        patch_size: int = 1,
        sampler: CausalVectorSampler | None = None,
        likelihood_samples: int = 4,
        likelihood_steps: int = 100,
        **training: Any,
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        if order not in ("raster", "random"):
            raise ValueError(f"order must be 'raster' or 'random', got {order!r}")
        if min(hidden_width, likelihood_samples, likelihood_steps) < 1:
            raise ValueError(
                "hidden_width, likelihood_samples and likelihood_steps must be at least 1, got "
                f"{hidden_width}, {likelihood_samples} and {likelihood_steps}"
            )
        self.patches = Patches(self.latent_shape, patch_size)
        self.length, self.dim = self.patches.length, self.patches.dim
        self.order: Literal["raster", "random"] = order
        layout = SequenceLayout(
            hidden_width,
            self.patches.grid,
            num_classes=num_classes,
            attention="causal",
            input_dim=self.dim,
            any_order=order == "random",
        )
        self.backbone = backbone(layout)
        if self.backbone.place_head is not None:
            raise ValueError("a place_head predicts ids; what draws the latents is the head of this generator")
        if order == "random" and getattr(self.backbone, "target_embedding", None) is None:
            raise ValueError(
                "order='random' needs a backbone that is told which place comes next: set "
                "backbone.init_args.target_positions"
            )
        self.null_id = self.backbone.grid_vocab
        self.head = head(self.dim, hidden_width)
        self.sampler = sampler or CausalVectorSampler()
        self.likelihood_samples = likelihood_samples
        self.likelihood_steps = likelihood_steps
        solver = self.sampler.solver or self.head.solver
        solver.times(self.head.denoiser.path)  # refuses what the path does not have

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.head)

    # The loss.

    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        places, z, vectors = self._teacher_forced(data, condition, self._orders(random))
        terms = head_losses(self.head, z, vectors, places, random, length=self.length)
        position = (torch.arange(self.length, device=data.device, dtype=torch.float64) + 0.5) / self.length
        return LatentLosses(terms, position.expand(len(data), -1))

    def _teacher_forced(
        self, data: Tensor, condition: Condition | Tensor, orders: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The place `(B, N)` of each latent in turn, z `(B, N, W)` of those before it, and the latents `(B, N, D)`."""
        vectors = self.patches.cut(data)
        places = torch.arange(self.length, device=data.device).expand(len(data), -1)
        if orders is not None:
            places, vectors = orders, at_places(vectors, orders)
        return places, self.backbone(vectors[:, :-1], plain(as_condition(condition)), order=orders), vectors

    def _orders(self, random: CounterRandom, purpose: Purpose = Purpose.ORDER, step: int = 0) -> Tensor | None:
        """Draw each sample's order of places, `(B, N)` int64; None for raster order."""
        if self.order == "raster":
            return None
        return random.uniform(purpose, self.length, step).argsort(dim=1)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate a lower bound of the log density of latents, in nats: the sum of the head's bounds of all places.

        In random order it is that of the mean of log p over the orders, of which every evaluation draws another.
        """
        self.check_latents(latents)
        random, data = streams_of(latents, seed=self.seed, indices=indices), at_least_float32(latents)
        total = latents.new_zeros(len(latents), dtype=torch.float64)
        for evaluation in range(self.likelihood_samples):
            orders = self._orders(random, Purpose.LIKELIHOOD, evaluation)
            _, z, vectors = self._teacher_forced(data, condition, orders)

            def noise(step: int, evaluation: int = evaluation) -> Tensor:
                numbers = random.normal(
                    Purpose.DIFFUSION_NOISE, self.length * self.dim, evaluation * (self.likelihood_steps + 1) + step
                )
                return numbers.to(data.dtype).view(-1, self.dim)

            nats = self.head.bound(
                z.flatten(0, 1), vectors.flatten(0, 1), solver=DDPM(self.likelihood_steps), noise=noise
            )
            total -= nats.view(len(latents), self.length).sum(dim=1)
        return Likelihood(total / self.likelihood_samples, "bound")

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self, labels: Condition | Tensor, random: CounterRandom, sampler: CausalVectorSampler | None = None
    ) -> SamplerOutput:
        sampler, condition = sampler or cast(CausalVectorSampler, self.sampler), as_condition(labels)
        self.check_draw(condition.labels, sampler.guidance_scale)
        condition = replace(condition, labels=condition.labels.long())
        output = sampler(self.backbone, self.head, condition, random, order=self._orders(random))
        return output.with_tokens(self.patches.join(output.tokens))
