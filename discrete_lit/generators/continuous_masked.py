"""Masked autoregression over continuous latents (Li et al., "Autoregressive Image Generation without Vector
Quantization" (MAR), 2024).

A network makes a hidden state of every place from the latents that are known (`MaskedAutoencoder`), and a small
diffusion model draws the latent of a place given its hidden state (`TokenDiffusionHead`).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder, VectorLayout
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, places_of, random_subset, streams_of
from discrete_lit.diffusion import MaskSchedule, TruncatedNormalSchedule
from discrete_lit.diffusion.gaussian import SteppedPath
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators.generator import Likelihood, subsets_of_all_sizes
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.samplers.masked_vectors import MARSampler
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


@loadable
class ContinuousMasked(LatentGenerator):
    """Predict masked latents from the others, each by a diffusion model of its own (section 3).

    For t uniform in (0, 1), `ceil(N m(t))` places of an image are masked, chosen uniformly. The loss is the head's, the
    mean over the masked places.

    In training one t is drawn for a step, the same for all images and ranks, as in MAR's code for all images of a
    batch: so all encode as many places. In validation each image has its own.

    Args:
        tokenizer, image_size, num_classes: as of `LatentGenerator`.
        backbone: called with the layout of the places.
        head: called with D and the width of the hidden states.
        patch_size: side of the squares of latents that are one place together; 1 in MAR.
        mask_schedule: m of training; MAR's normal law cut to [0.7, 1] by default.
        sampler: how `sample` draws where nothing else is asked for; `MARSampler()` by default.
        likelihood_samples: evaluations of the network for each `log_likelihood`.
        likelihood_steps: of the head whose bound it is; a path of steps has its own at most.
        training: `check_scale` of `LatentGenerator`; `label_dropout`, `optimizer`, `scheduler`,
            `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range, a grid that the patches do not divide, or a sampler of more steps than
            there are places, or than the path of the head's noise has.
    """

    sampler_kind = MARSampler
    coordinate_name = "mask_ratio"

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[VectorLayout], MaskedAutoencoder],
        head: Callable[[int, int], TokenDiffusionHead],
        patch_size: int = 1,
        mask_schedule: MaskSchedule | None = None,
        sampler: MARSampler | None = None,
        likelihood_samples: int = 4,
        likelihood_steps: int = 100,
        **training: Any,
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        self.patches = Patches(self.latent_shape, patch_size)
        if likelihood_samples < 1 or likelihood_steps < 1:
            raise ValueError(
                f"likelihood_samples and likelihood_steps must be at least 1, got {likelihood_samples} and "
                f"{likelihood_steps}"
            )
        self.grid, self.length, self.dim = self.patches.grid, self.patches.length, self.patches.dim
        self.backbone = backbone(self.layout())
        self.head = head(self.dim, self.backbone.hidden_width)
        self.mask_schedule = self.step_schedule = mask_schedule or TruncatedNormalSchedule()
        self.sampler = sampler or MARSampler(min(64, self.length))
        self.sampler.check_length(self.length)
        self.likelihood_samples = likelihood_samples
        path = self.head.denoiser.path
        self.likelihood_steps = min(likelihood_steps, path.steps) if isinstance(path, SteppedPath) else likelihood_steps
        solver = self.sampler.solver or self.head.solver
        solver.times(self.head.denoiser.path)  # refuses what the path does not have

    def layout(self) -> VectorLayout:
        """The places that the network is asked to read."""
        return VectorLayout(dim=self.dim, num_classes=self.num_classes, grid=tuple(self.grid))

    # The sequence.

    def to_sequence(self, latents: Tensor) -> Tensor:
        """Cut latents `(B, D, H, W)` into the vectors of their places, `(B, N, D p^2)`, channels first."""
        return self.patches.cut(latents)

    def to_grid(self, vectors: Tensor) -> Tensor:
        """Invert `to_sequence`."""
        return self.patches.join(vectors)

    # The loss.

    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        vectors = self.to_sequence(data)
        if self.training:
            masked, count = step_masks(random, self.length, share=self.step_share())
            hidden = self.backbone(vectors, masked, condition, known=self.length - count)
            places = places_of(masked, count)
            weights = None
        else:
            masked = sample_masks(self.mask_schedule, random, self.length)
            hidden = self.backbone(vectors, masked, condition, known=self._most_known(), uneven=True)
            places = torch.arange(self.length, device=data.device).expand(len(data), -1)
            weights = masked.to(hidden.dtype)
        terms = head_losses(
            self.head, at_places(hidden, places), at_places(vectors, places), places, random, length=self.length
        )
        ratio = masked.double().mean(dim=1, keepdim=True).expand(places.shape)
        return LatentLosses(terms, ratio, weights)

    def _most_known(self) -> int:
        """The most places that are known in validation."""
        fewest = float(self.mask_schedule.mask_probability(torch.zeros(1, dtype=torch.float64)))
        return self.length - max(1, int(self.length * fewest))

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate a lower bound of the log density of latents, in nats: that of drawing one place at a time.

        Over all orders of the places, the mean of log p is `N E_k[(1 / k) sum of log p(x_i | the others)]` with k
        masked places, uniform in 1 ... N and chosen uniformly (as of `Masked`); of each log p(x_i | ...) the head gives
        its variational bound.
        """
        self.check_latents(latents)
        random, vectors = (
            streams_of(latents, seed=self.seed, indices=indices),
            self.to_sequence(at_least_float32(latents)),
        )
        total = latents.new_zeros(len(latents), dtype=torch.float64)
        for evaluation, (masked, k) in enumerate(subsets_of_all_sizes(random, self.length, self.likelihood_samples)):
            hidden = self.backbone(vectors, masked, condition, known=self.length - 1, uneven=True)

            def noise(step: int, evaluation: int = evaluation) -> Tensor:
                numbers = random.normal(
                    Purpose.DIFFUSION_NOISE, self.length * self.dim, evaluation * (self.likelihood_steps + 1) + step
                )
                return numbers.to(vectors.dtype).view(-1, self.dim)

            nats = self.head.bound(
                hidden.flatten(0, 1), vectors.flatten(0, 1), solver=DDPM(self.likelihood_steps), noise=noise
            )
            total -= self.length * (nats.view(masked.shape) * masked).sum(dim=1) / k[:, 0]
        return Likelihood(total / self.likelihood_samples, "bound")

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.head)

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self, labels: Condition | Tensor, random: CounterRandom, sampler: MARSampler | None = None
    ) -> SamplerOutput:
        sampler, condition = sampler or cast(MARSampler, self.sampler), as_condition(labels)
        self.check_draw(condition.labels, sampler.guidance_scale)
        return self.draw_given(replace(condition, labels=condition.labels.long()), random, sampler)

    def draw_given(self, condition: Condition | Tensor, random: CounterRandom, sampler: MARSampler) -> SamplerOutput:
        """Draw latents given all that the network reads; arguments as of `MARSampler`."""
        output = sampler(self.backbone, self.head, condition, random)
        return output.with_tokens(self.to_grid(output.tokens))


def step_masks(random: CounterRandom, length: int, *, share: float) -> tuple[Tensor, int]:
    """Draw the masks of a training step, `ceil(N m)` places of each image.

    Args:
        random: one stream for each image, which decides its places.
        length: N.
        share: m, one for all images and ranks.

    Returns:
        `(B, N)` bool, and how many places are masked in each image.
    """
    count = min(max(ceil(length * share), 1), length)
    return random_subset(random.uniform(Purpose.MASK_ORDER, length), count), count


def sample_masks(schedule: MaskSchedule, random: CounterRandom, length: int) -> Tensor:
    """Draw the masks of validation `(B, N)` bool, a function of each sample alone, with an m of its own."""
    m = schedule.mask_probability(random.uniform(Purpose.MASK_RATIO, 1))
    return random_subset(random.uniform(Purpose.MASK_ORDER, length), (length * m).ceil().clamp(1, length))


class Patches:
    """Cut latents into the vectors of their places, and join them again.

    Args:
        latent_shape: `(D, H, W)`.
        patch_size: p, side of the squares that are one place together.

    Attributes:
        grid: places along each axis.
        length: N, places.
        dim: D p^2, of the vector of each.

    Raises:
        ValueError: patches that do not divide the latents.
    """

    def __init__(self, latent_shape: tuple[int, ...], patch_size: int) -> None:
        channels, height, width = latent_shape
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide latents of {height} x {width}")
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.length = self.grid[0] * self.grid[1]
        self.dim = channels * patch_size**2

    def cut(self, latents: Tensor) -> Tensor:
        """Cut `(B, D, H, W)` into `(B, N, D p^2)`, in raster order, channels first."""
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)

    def join(self, vectors: Tensor) -> Tensor:
        """Invert `cut`."""
        height, width, p = *self.grid, self.patch_size
        return rearrange(vectors, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)


def head_losses(
    head: TokenDiffusionHead, hidden: Tensor, vectors: Tensor, places: Tensor, random: CounterRandom, *, length: int
) -> dict[str, Tensor]:
    """Return the terms of a head's loss at some places; each place of a sample has times and noise of its own.

    Args:
        head: draws a vector of a hidden state.
        hidden: `(B, n, W)`, of those places.
        vectors: `(B, n, D)`, what it is to draw there.
        places: `(B, n)` int64 in [0, N).
        random: one stream for each sample.
        length: N.

    Returns:
        Each term by name, `(B, n)`.
    """
    repeats, dim, batch, count = head.repeats, head.dim, *places.shape
    uniforms = random.uniform(Purpose.DIFFUSION_TIME, repeats * length).view(batch, repeats, length)
    noise = random.normal(Purpose.DIFFUSION_NOISE, repeats * length * dim)
    noise = noise.to(vectors.dtype).view(batch, repeats, length, dim)
    of_repeats = places[:, None].expand(-1, repeats, -1)
    uniforms = rearrange(uniforms.gather(2, of_repeats), "b r n -> r (b n)")
    noise = rearrange(noise.gather(2, of_repeats[..., None].expand(-1, -1, -1, dim)), "b r n d -> r (b n) d")
    terms = head.losses(hidden.flatten(0, 1), vectors.flatten(0, 1), uniforms=uniforms, noise=noise)
    return {name: term.view(batch, count) for name, term in terms.items()}


def at_places(vectors: Tensor, places: Tensor) -> Tensor:
    """Take the vectors `(B, n, D)` of `(B, N, D)` at `places (B, n)`."""
    return vectors.gather(1, places[..., None].expand(-1, -1, vectors.shape[-1]))
