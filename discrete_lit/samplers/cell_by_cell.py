"""xAR's sampler: one cell after another, each by a solver of Gaussian noise (Ren et al., "xAR", 2025, section 3.3)."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.cell_transformer import CellTransformer
from discrete_lit.core.modules import at_least_float32, evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser
from discrete_lit.diffusion.solvers import EulerMaruyama, Solver
from discrete_lit.samplers.sampler import SamplerOutput

_SCHEDULES = ("linear", "constant")


class NextCellSampler:
    """Draw the cells of an image in turn, each from noise, given the clean cells before it.

    A drawn cell is read once more, at time 0, and leaves its keys and values to those behind it.

    Args:
        solver: how the noise of a cell is undone; 40 steps of Euler and Maruyama by default, as of xAR-B.
        guidance_scale: s of `uncond + s (cond - uncond)` on what the network predicts; 1 is off.
        guidance_schedule: `"linear"`: of cell m from 0 to M - 1, 1 + (s - 1) m / (M - 1), so that the first is not
            guided (xAR); or `"constant"`. A single cell has s.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        *,
        guidance_scale: float = 1.0,
        guidance_schedule: Literal["linear", "constant"] = "linear",
    ) -> None:
        if guidance_schedule not in _SCHEDULES or guidance_scale < 0:
            raise ValueError(
                f"guidance_schedule must be one of {', '.join(_SCHEDULES)} and guidance_scale at least 0, got "
                f"{guidance_schedule!r} and {guidance_scale}"
            )
        self.solver = solver or EulerMaruyama(40)
        self.guidance_scale = guidance_scale
        self.guidance_schedule: Literal["linear", "constant"] = guidance_schedule

    def scale(self, number: int, cells: int) -> float:
        """Give the guidance scale of a cell among so many."""
        if self.guidance_schedule == "constant" or cells == 1:
            return self.guidance_scale
        return 1 + (self.guidance_scale - 1) * number / (cells - 1)

    @torch.no_grad()
    def __call__(
        self,
        network: CellTransformer,
        labels: Tensor,
        random: CounterRandom,
        *,
        denoiser: GaussianDenoiser,
        network_time: Callable[[Tensor], Tensor],
    ) -> SamplerOutput:
        """Draw the cells of one image for each label.

        Args:
            network: sampled in eval mode, and left in its own.
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each image: the first noise of each cell, and the fresh noise of each step.
            denoiser: how the network's output is read, and the path of its noise.
            network_time: from times `(B, 1)` float64 to the units that the network reads.

        Returns:
            The output, with cells `(B, M, P, C)` float32 or float64 as its `tokens`.
        """
        layout, batch = network.layout, len(labels)
        scales = [self.scale(number, layout.cells) for number in range(layout.cells)]
        # The null rows read every cell from the first on, also where that is not guided: later ones attend to it.
        doubled = any(scale != 1 for scale in scales)
        rows = torch.cat((labels, torch.full_like(labels, layout.num_classes))) if doubled else labels
        like = at_least_float32(torch.empty((), device=labels.device, dtype=next(network.parameters()).dtype))
        shape = (batch, layout.places, layout.channels)
        made: Counter[tuple[int, int]] = Counter()  # how often so many evaluations for an image, behind so many cells

        def draw_cell(number: int, scale: float, cache: Cache) -> Tensor:
            guided = scale != 1
            count = batch * (1 + guided)

            def noise(purpose: Purpose, step: int) -> Tensor:
                numbers = random.normal(purpose, shape[1] * shape[2], number * self.solver.steps + step)
                return numbers.to(like).view(shape)

            def denoise(x: Tensor, t: float) -> Estimate:
                time = network_time(torch.full((count, 1), t, dtype=torch.float64, device=x.device))
                cell = x.repeat(1 + guided, 1, 1)[:, None]
                output = at_least_float32(network(cell, time, rows[:count], cache))[:, 0]
                made[1 + guided, number] += 1
                if guided:
                    conditional, unconditional = output.chunk(2)
                    output = denoiser.guide(conditional, unconditional, scale)
                return denoiser(output, x, t)

            start = noise(Purpose.DIFFUSION_START, 0)
            return self.solver(
                denoise, start, path=denoiser.path, noise=lambda step: noise(Purpose.DIFFUSION_STEP, step)
            )

        drawn: list[Tensor] = []
        with evaluation_mode(network):
            cache = network.new_cache(len(rows))
            for number, scale in enumerate(scales):
                here = cache if scale != 1 or not doubled else cache.first_rows(batch)
                drawn.append(draw_cell(number, scale, here))
                if number + 1 < layout.cells:
                    read_cell(network, drawn[-1].repeat(1 + doubled, 1, 1), rows, cache, network_time=network_time)
                    made[1 + doubled, number] += 1
        return SamplerOutput(
            tokens=torch.stack(drawn, dim=1),
            network_calls=sum(evaluations * times for (evaluations, _), times in made.items()),
            sequential_passes=sum(made.values()),
            count_flops=lambda: sum(times * network.flops(*of_pass) for of_pass, times in made.items()),
        )


def read_cell(
    network: CellTransformer,
    cell: Tensor,
    labels: Tensor,
    cache: Cache,
    *,
    network_time: Callable[[Tensor], Tensor],
) -> None:
    """Leave the keys and values of a clean cell `(B, P, C)` in the cache, for those behind it."""
    time = torch.zeros(len(cell), 1, dtype=torch.float64, device=cell.device)
    network(cell[:, None], network_time(time), labels, cache)
    cache.advance(network.layout.places)
