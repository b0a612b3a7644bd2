"""xAR: next-X prediction of latents by flow matching, X a cell of k x k of them (Ren et al., "Beyond Next-Token: Next-X
Prediction for Autoregressive Visual Generation", 2025).

p(x) is a product over cells, each given those before it, and each factor is a flow from noise. "Noisy context
learning": in training the cells before are as noisy as any other, each with a time of its own, so that one pass trains
all factors, and what a drawn cell has wrong is no surprise to the next.

With `cell_size` 1 it is next-token prediction, and with the size of the grid one flow over the whole image.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from discrete_lit.backbones.cell_transformer import CellLayout, CellTransformer
from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser, RectifiedPath, SteppedPath
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, LogitNormalTimes, TrainingTimes, variational_bound
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.latent_diffusion import times_of_a_bound
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.samplers.cell_by_cell import NextCellSampler, read_cell
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


@loadable
class NextCell(LatentGenerator):
    """Predict cells of latents one after another, each by undoing Gaussian noise given those before it (section 3.2).

    The loss is that of flow matching, the mean over all cells; each cell of each image has its own time and noise.

    Args:
        tokenizer, image_size, num_classes: as of `LatentGenerator`.
        backbone: called with the layout of the cells.
        cell_size: of a cell in latents: its side, or `[height, width]`; 8 in xAR, which makes four of 16 x 16.
        denoiser: how the network's output is read, and the path of its noise; the velocity on straight lines by
            default.
        times: how times of training are drawn; with a standard normal logit by default, as in xAR.
        sampler: how `sample` draws where nothing else is asked for; `NextCellSampler()` by default.
        likelihood_steps: of the model whose bound `log_likelihood` is, for each cell.
        training: `check_scale` of `LatentGenerator`; `label_dropout`, `optimizer`, `scheduler`,
            `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: cells that do not divide the grid, or a setting out of its range.
    """

    sampler_kind = NextCellSampler
    coordinate_name = "time"

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[CellLayout], CellTransformer],
        cell_size: ImageSize = 8,
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        sampler: NextCellSampler | None = None,
        likelihood_steps: int = 100,
        **training: Any,
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        channels, height, width = self.latent_shape
        cell = height_and_width(cell_size, "cell_size")
        if height % cell[0] or width % cell[1]:
            raise ValueError(f"cells of {cell[0]} x {cell[1]} latents do not divide the {height} x {width} of an image")
        if likelihood_steps < 1:
            raise ValueError(f"likelihood_steps must be at least 1, got {likelihood_steps}")
        self.denoiser = denoiser or GaussianDenoiser(RectifiedPath(), prediction="velocity")
        if isinstance(self.denoiser.path, SteppedPath):
            raise ValueError("cells are clean at time 0, which a path of steps has no step for: give another path")
        self.objective = DenoisingLoss(self.denoiser, times=times or LogitNormalTimes())
        self.layout = CellLayout(channels=channels, grid=(height, width), cell_size=cell, num_classes=num_classes)
        self.backbone = backbone(self.layout)
        self.sampler = sampler or NextCellSampler()
        self.sampler.solver.times(self.denoiser.path)  # refuses what the path does not have
        self.likelihood_steps = likelihood_steps

    def network_time(self, t: Tensor) -> Tensor:
        """Return times in the units that the network reads: 1,000 t, rounded down, as in xAR's code."""
        return torch.floor(1000 * t.float())

    # The loss.

    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        cells = self.layout.to_cells(data)  # (B, M, P, C)
        t = self.objective.times(random.uniform(Purpose.DIFFUSION_TIME, self.layout.cells).flatten())
        noise = random.normal(Purpose.DIFFUSION_NOISE, data[0].numel()).to(data.dtype).view_as(cells)
        clean, noise = cells.flatten(0, 1), noise.flatten(0, 1)
        x_t = self.denoiser.path.add_noise(clean, noise, t)
        times = t.view(len(data), -1)
        output = self.backbone(x_t.view_as(cells), self.network_time(times), condition.labels)
        terms = self.objective(output.flatten(0, 1), clean, noise, x_t=x_t, t=t)
        return LatentLosses({name: term.view_as(times) for name, term in terms.items()}, times)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate a lower bound of the log density of latents, in nats: the sum of a bound for each cell.

        Each is the variational bound of DDPM (eq. 5) of the cell, given the true ones before it, clean.
        """
        self.check_latents(latents)
        random, labels = streams_of(latents, seed=self.seed, indices=indices), as_condition(condition).labels.long()
        cells = self.layout.to_cells(at_least_float32(latents))
        times, path = times_of_a_bound(self.likelihood_steps), self.denoiser.path
        cache = self.backbone.new_cache(len(latents))
        total = latents.new_zeros(len(latents), dtype=torch.float64)
        for number, cell in enumerate(cells.unbind(dim=1)):

            def denoise(x: Tensor, t: float) -> Estimate:
                time = self.network_time(torch.full((len(x), 1), t, dtype=torch.float64, device=x.device))
                output = at_least_float32(self.backbone(x[:, None], time, labels, cache))[:, 0]
                return self.denoiser(output, x, t)

            def noise(step: int, number: int = number, cell: Tensor = cell) -> Tensor:
                numbers = random.normal(Purpose.LIKELIHOOD, cell[0].numel(), number * len(times) + step)
                return numbers.to(cell.dtype).view_as(cell)

            total -= variational_bound(denoise, cell, path=path, times=times, noise=noise)
            read_cell(self.backbone, cell, labels, cache, network_time=self.network_time)
        return Likelihood(total, "bound")

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(self, labels: Tensor, random: CounterRandom, sampler: NextCellSampler | None = None) -> SamplerOutput:
        sampler = sampler or cast(NextCellSampler, self.sampler)
        self.check_draw(labels, sampler.guidance_scale)
        output = sampler(self.backbone, labels.long(), random, denoiser=self.denoiser, network_time=self.network_time)
        return replace(output, tokens=self.layout.to_grid(output.tokens))
