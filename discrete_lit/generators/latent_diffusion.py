"""Diffusion or flow matching over whole latents, given a class: LDM, DiT and SiT, and on pixels ADM.

- Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022: a U-Net.
- Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023: a transformer, DDPM.
- Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", 2024.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.backbones import DenoisingNetwork, LatentLayout
from discrete_lit.checkpoints import loadable
from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser, PredictionKind, ScheduledPath, SteppedPath
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, TrainingTimes, variational_bound
from discrete_lit.diffusion.solvers import DDPM, Euler
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.training import ClassConditionalTraining
from discrete_lit.metrics.latent_statistics import check_latent_scale
from discrete_lit.samplers.guided_solver import GuidedNetwork, GuidedSolver
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer
from discrete_lit.tokenizers.uncoded_latents import RawPixels

# How near the times of a likelihood come to 0 and to 1, where the noise or the data are nothing.
_NEAREST = 1e-3


@loadable
class LatentDiffusion(ClassConditionalTraining):
    """Model the latents of a frozen continuous tokenizer, given a class, by undoing Gaussian noise.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`, which the tokenizer encodes, with the noise of its posterior
    drawn anew in every epoch, or `{"latents": (B, D, *grid), "label": (B,)}`, scaled as the tokenizer scales them.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.continuous_from_checkpoint` in a YAML, or `RawPixels`.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        num_classes: labels lie in [0, num_classes); `num_classes` itself is the null label.
        backbone: called with the layout of the latents: `DiT` or `UNet`.
        denoiser: how the network's output is read, and the path of its noise; DiT's by default: the noise with a
            learned variance, on 1,000 linear steps.
        times: how times of training are drawn; uniformly by default.
        error_of: what the squared error is of, see `DenoisingLoss`.
        time_input: what the network reads where the path is in continuous time: `"noise"`, time_scale x t, or `"data"`,
            time_scale x (1 - t), as networks whose authors count time from noise to data. On a path of steps it is the
            step's number.
        time_scale: 1 for SiT, 1,000 for most others.
        sampler: how `sample` draws where nothing else is asked for; by default 250 steps of DDPM, or of Euler in
            continuous time, without guidance.
        likelihood_steps: of the model whose bound `log_likelihood` is; a path of steps has its own at most.
        check_scale: refuse a first batch of latents whose deviation is not about 1; pixels are not looked at.
        training: `label_dropout`, `optimizer`, `scheduler` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range; latents that are no grid of two axes.
    """

    coordinate_name = "time"
    tokenizer: ContinuousTokenizer
    backbone: DenoisingNetwork

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[LatentLayout], DenoisingNetwork],
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        error_of: PredictionKind | None = None,
        time_input: Literal["noise", "data"] = "noise",
        time_scale: float = 1000.0,
        sampler: GuidedSolver | None = None,
        likelihood_steps: int = 250,
        check_scale: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; one class makes a model of no classes"
            )
        if time_scale <= 0 or likelihood_steps < 1:
            raise ValueError(
                f"time_scale must be above 0 and likelihood_steps at least 1, got {time_scale} and {likelihood_steps}"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.image_size = normal_size(image_size)
        self.num_classes = num_classes
        self.latent_shape = tuple(tokenizer.latent_shape(image_size))
        if len(self.latent_shape) != 3:
            raise ValueError(
                f"LatentDiffusion models a grid (D, H, W), the tokenizer's latents are {self.latent_shape}"
            )
        self.denoiser = denoiser or GaussianDenoiser(ScheduledPath(), learned_variance=True)
        self.objective = DenoisingLoss(self.denoiser, times=times, error_of=error_of)
        channels, height, width = self.latent_shape
        layout = LatentLayout(
            channels=channels,
            grid=(height, width),
            outputs=2 * channels if self.denoiser.learned_variance else channels,
            num_classes=num_classes,
        )
        self.backbone = backbone(layout)
        self.time_input: Literal["noise", "data"] = time_input
        self.time_scale = time_scale
        path = self.denoiser.path
        if sampler is None:
            stepped = isinstance(path, SteppedPath)
            variance: Literal["learned", "smallest"] = "learned" if self.denoiser.learned_variance else "smallest"
            sampler = GuidedSolver(DDPM(min(250, path.steps), variance=variance) if stepped else Euler(250))
        self.sampler = sampler
        self.sampler.solver.times(path)  # refuses what the path does not have
        self.likelihood_steps = min(likelihood_steps, path.steps) if isinstance(path, SteppedPath) else likelihood_steps
        # Pixels are no latents: their deviation is what it is.
        self._unchecked = check_scale and not isinstance(tokenizer, RawPixels)

    # Batches.

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        if "latents" in batch:
            latents = batch["latents"]
        elif "image" in batch:
            with torch.no_grad():
                latents = self.tokenizer.encode(batch["image"], random)
        else:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}: LatentDiffusion needs "image" or "latents"; ids are '
                "for the generators of tokens"
            )
        self._check_latents(latents)
        self.check_scale(latents)
        return at_least_float32(latents)

    def check_scale(self, latents: Tensor) -> None:
        """Raise a ValueError where the first batch of latents has another deviation than about 1."""
        if self._unchecked:
            check_latent_scale(latents)
            self._unchecked = False

    def _check_latents(self, latents: Tensor) -> None:
        if not latents.is_floating_point():
            raise ValueError(
                f"LatentDiffusion models latents, floating-point numbers, {self.latent_shape} each, got "
                f"{latents.dtype} {tuple(latents.shape)}: are these the ids of a discrete tokenizer?"
            )
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the latents have the shape {tuple(latents.shape[1:])}, this generator models {self.latent_shape}: "
                f"model.init_args.image_size is {self.image_size}"
            )

    # The loss.

    def loss(
        self, data: Tensor, /, labels: Tensor, random: CounterRandom | None = None, *, dropped: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Average the loss of latents over a batch, over all ranks together.

        Args:
            data: `(B, D, H, W)`, scaled latents.
            labels: `(B,)` integers in [0, num_classes).
            random: decides time and noise; by default row i of the batch is sample i of this generator's seed.
            dropped: bool `(B,)`, the labels that the null label stands for; none by default.

        Returns:
            The training loss, a scalar, and its terms, by name, where there are several.

        Raises:
            ValueError: a label that is no class; the null label is one that was `dropped`.
        """
        if random is None:
            random = CounterRandom(self.seed, torch.arange(len(data), device=data.device))
        self._check_latents(data)
        self.check_labels(labels, count=len(data))
        labels = labels.long()
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.num_classes)
        terms, _ = self.losses(data, labels, random)
        count = all_reduce_sum(torch.tensor(float(len(data)), device=data.device)) / world_size()
        self.loss_weight = count
        means = {name: term.sum() / count for name, term in terms.items()}
        return torch.stack(list(means.values())).sum(), means if len(means) > 1 else {}

    def losses(self, data: Tensor, labels: Tensor, random: CounterRandom) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of each sample's loss, `(B,)` each, and its time `(B,)`.

        Args:
            data: `(B, D, H, W)`.
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each sample; it alone decides time and noise.
        """
        data = at_least_float32(data)
        t = self.objective.times(random.uniform(Purpose.DIFFUSION_TIME, 1)[:, 0])
        noise = random.normal(Purpose.DIFFUSION_NOISE, data[0].numel()).to(data.dtype).view_as(data)
        x_t = self.denoiser.path.add_noise(data, noise, t)
        output = self.backbone(x_t, self.network_time(t), labels)
        return self.objective(output, data, noise, x_t=x_t, t=t), t

    def validation_losses(self, data: Tensor, labels: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor, Tensor]:
        terms, t = self.losses(data, labels, random)
        values = torch.stack(list(terms.values())).sum(dim=0)
        return values, torch.ones_like(values), t

    def network_time(self, t: Tensor) -> Tensor:
        """Return times `(B,)` in the units that the network reads, float32."""
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return path.network_time(t).round().float()
        return (self.time_scale * (t if self.time_input == "noise" else 1 - t)).float()

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(self, latents: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Likelihood:
        """Estimate a lower bound of the log density of latents, in nats: the variational bound of DDPM (eq. 5).

        The density is of the scaled latents, in their own units: it says nothing of images, nor of the likelihood of
        ids, and may be above 0.

        Args:
            latents: `(B, D, H, W)`, scaled.
            labels: `(B,)` int64 in [0, num_classes].
            indices: `(B,)` int64, each sample's position in its data set, to which its random numbers belong; 0 to
                B - 1 by default.
        """
        self._check_latents(latents)
        if indices is None:
            indices = torch.arange(len(latents), device=latents.device)
        random, data = CounterRandom(self.seed, indices), at_least_float32(latents)
        path, guide = self.denoiser.path, self._network(labels)

        def denoise(x: Tensor, t: float) -> Estimate:
            return guide(x, t, 1.0)

        bound = variational_bound(
            denoise,
            data,
            path=path,
            times=self._likelihood_times(),
            noise=lambda step: random.normal(Purpose.LIKELIHOOD, data[0].numel(), step).to(data.dtype).view_as(data),
            variance="learned" if self.denoiser.learned_variance else "smallest",
        )
        return Likelihood(-bound, "bound")

    def _likelihood_times(self) -> list[float]:
        """List falling times above 0: steps of a path of steps; else such that the noise falls evenly in its logarithm.

        Even times would leave a gap near 0, where the ratio of noise to data halves in a step however many there are.
        """
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return DDPM(self.likelihood_steps).times(path)[:-1]
        end = torch.logit(torch.tensor(1 - _NEAREST, dtype=torch.float64)).item()
        return torch.sigmoid(torch.linspace(end, -end, self.likelihood_steps, dtype=torch.float64)).tolist()

    # Sampling.

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        sampler: GuidedSolver | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Draw the latents of one image for each label.

        Args:
            labels: `(B,)` int64 in [0, num_classes]; `num_classes` is the null label.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.

        Returns:
            `(B, D, H, W)` scaled latents, float32 or float64; `tokenizer.decode` makes images of them.

        Raises:
            ValueError: the reasons of `draw`.
        """
        if indices is None:
            indices = torch.arange(labels.numel(), device=labels.device)
        return self.draw(labels, CounterRandom(seed, indices), sampler).tokens

    @torch.no_grad()
    @in_evaluation
    def draw(self, labels: Tensor, random: CounterRandom, sampler: GuidedSolver | None = None) -> SamplerOutput:
        """Draw as `sample` does, and report what it cost.

        Args:
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each sample.
            sampler: this generator's own by default.

        Returns:
            The sampler's output, with latents as its `tokens`.

        Raises:
            ValueError: guidance was asked for and the null label was never learned; labels of another kind; or the
                solver does not go with the path.
        """
        sampler = sampler or self.sampler
        if sampler.guidance_scale != 1 and self.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={sampler.guidance_scale} needs a generator that learned the null label; this one was "
                "trained with label_dropout=0"
            )
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"the labels are {labels.dtype} {tuple(labels.shape)}; they must be whole numbers in "
                f"0..{self.num_classes}, one for each sample"
            )
        return sampler(self.backbone, labels.long(), random, denoiser=self.denoiser, network_time=self.network_time)

    def _network(self, labels: Tensor) -> GuidedNetwork:
        return GuidedNetwork(self.backbone, labels, denoiser=self.denoiser, network_time=self.network_time)
