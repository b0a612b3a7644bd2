"""Autoregressive sampling of vectors on a key-value cache: one place after another, each drawn by a diffusion head."""

from functools import partial

import torch
from torch import Tensor

from discrete_lit.backbones.backbone import Backbone
from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.backbones.execution import packed
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.masked_places import GuidanceOfPasses, check_guidance_schedule, scale_of_known
from discrete_lit.samplers.sampler import SamplerOutput


class CausalVectorSampler:
    """Draw the vectors of an image one by one, each given those before it: N passes over one place each.

    With guidance the batch is doubled, the rows of the null condition last; both read every vector that is drawn.

    Args:
        guidance_scale: s of `uncond + s (cond - uncond)` on what the head predicts; 1 is off.
        guidance_schedule: `"known"`: 1 + (s - 1) times the share of places that are known after the pass (MAR's
            "linear"), or `"constant"`.
        solver: of the head; its own by default.

    Raises:
        ValueError: a schedule of another name.
    """

    def __init__(
        self,
        *,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceOfPasses = "known",
        solver: Solver | None = None,
    ) -> None:
        check_guidance_schedule(guidance_schedule)
        self.guidance_scale = guidance_scale
        self.guidance_schedule: GuidanceOfPasses = guidance_schedule
        self.solver = solver

    @torch.no_grad()
    def __call__(
        self,
        backbone: Backbone,
        head: TokenDiffusionHead,
        condition: Condition | Tensor,
        random: CounterRandom,
        *,
        order: Tensor | None = None,
    ) -> SamplerOutput:
        """Draw the vectors of one image for each label.

        Args:
            backbone: causal, over vectors; makes what the head reads.
            head: draws a vector of each output.
            condition: labels `(B,)` int64 in [0, num_classes], or all that the backbone reads; guidance drops it.
            random: one stream for each image, which alone decides what is drawn.
            order: `(B, N)` int64, the place of each vector in turn; raster order by default.

        Returns:
            The output, with vectors `(B, N, D)` in raster order as its `tokens`.
        """
        layout, given = backbone.layout, as_condition(condition)
        batch, length, dim = len(given), layout.length, head.dim
        dtype, solver = next(backbone.parameters()).dtype, self.solver or head.solver
        guided = self.guidance_scale != 1
        if guided:
            given = given.with_null(null_label=layout.null_label, null_id=backbone.grid_vocab)
        condition, rows = plain(given), 1 + guided
        orders = None if order is None else order.repeat(rows, 1)
        numbers = random.ahead(solver.steps + 1)
        drawn: list[Tensor] = []
        made: list[tuple[int, int]] = []  # vectors that a pass reads, and elements that the cache held before it
        newest = given.labels.new_zeros((batch, 0, dim), dtype=dtype)
        with evaluation_mode(backbone), evaluation_mode(head):
            network = packed(backbone, rows=len(given))
            cache = network.new_cache(condition)
            for step in range(length):
                # MAR counts one place as masked after the last pass too.
                known = min(step + 1, length - 1) / length
                made.append((newest.shape[1], cache.filled))
                z = network(newest.repeat(rows, 1, 1), condition, cache, orders)[:, -1]

                def noise(number: int, step: int = step) -> Tensor:
                    return numbers.normal(Purpose.LATENT_NOISE, dim, step * (solver.steps + 1) + number).to(dtype)

                new = head.sample(
                    z,
                    noise(0),
                    noise=lambda i, noise=noise: noise(i + 1),
                    guidance_scale=scale_of_known(self.guidance_scale, self.guidance_schedule, known),
                    solver=solver,
                )
                newest = new.to(dtype)[:, None]
                drawn.append(newest)
        vectors = torch.cat(drawn, dim=1)
        if order is not None:
            vectors = vectors.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, dim))
        attended = 0 if given.context is None else given.context.shape[1]
        return SamplerOutput(
            tokens=vectors,
            network_calls=rows * length,
            sequential_passes=length,
            count_flops=partial(_flops, backbone, head, rows, made, solver, attended),
        )


def _flops(
    backbone: Backbone, head: TokenDiffusionHead, rows: int, made: list[tuple[int, int]], solver: Solver, attended: int
) -> int:
    """Floating-point operations for an image: of each pass of the backbone, and of the head's steps after it."""
    passes = sum(backbone.flops(rows, read, filled, attended) for read, filled in made)
    return backbone.cache_flops(rows, attended) + passes + len(made) * head.flops(rows, solver)
