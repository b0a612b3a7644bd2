"""MAR's sampler: masked autoregression over vectors (Li et al., "MAR", 2024, section 3.4 and app. B)."""

from functools import partial

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.masked_places import GuidanceOfPasses, MaskedPass, MaskedPlaceSampler, Order
from discrete_lit.samplers.sampler import SamplerOutput


class MARSampler(MaskedPlaceSampler):
    """Draw the vectors of an image in T passes of the network, several places at once, each by its head.

    After pass i, `floor(N m(1 - (i + 1) / T))` places are still masked; which come next is drawn for each image. The
    places of one pass are drawn independently given what was known before it.

    Args:
        steps: T, from 1 to N; MAR has 64, and 256 for its best figures.
        guidance_scale: s of `uncond + s (cond - uncond)` on what the head predicts; 1 is off.
        guidance_schedule: `"known"`: 1 + (s - 1) times the share of places that are known after the pass (MAR's
            "linear"), or `"constant"`.
        order: `"random"`, another one for each image, or `"raster"`.
        solver: of the head; its own by default.
        mask_schedule: m; the cosine by default.

    Raises:
        ValueError: a setting out of its range; in use, more steps than places, or images with different numbers of
            known places.
    """

    def __init__(
        self,
        steps: int = 64,
        *,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceOfPasses = "known",
        order: Order = "random",
        solver: Solver | None = None,
        mask_schedule: MaskSchedule | None = None,
    ) -> None:
        super().__init__(
            steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            order=order,
            mask_schedule=mask_schedule,
        )
        self.solver = solver

    @torch.no_grad()
    def __call__(
        self,
        network: MaskedAutoencoder,
        head: TokenDiffusionHead,
        condition: Condition | Tensor,
        random: CounterRandom,
        *,
        vectors: Tensor | None = None,
        known: Tensor | None = None,
    ) -> SamplerOutput:
        """Draw the vectors of one image for each label.

        Args:
            network: makes the hidden states; in its mode for evaluation.
            head: draws a vector of each.
            condition: labels `(B,)` int64 in [0, num_classes], or all that the network reads; guidance drops all of it.
            random: one stream for each image, which alone decides what is drawn.
            vectors: `(B, N, D)`, of which those at `known` are kept.
            known: `(B, N)` bool, as many in each image.

        Returns:
            The output, with vectors `(B, N, D)` in raster order as its `tokens`.
        """
        layout, condition = network.layout, as_condition(condition)
        dim = layout.dim
        dtype = next(network.parameters()).dtype
        drawn = condition.labels.new_zeros((len(condition), layout.length, dim), dtype=dtype)
        if known is not None:
            if vectors is None:
                raise ValueError("known says which vectors are kept: give vectors too")
            drawn = torch.where(known[..., None], vectors.to(dtype), drawn)
        solver = self.solver or head.solver
        # The numbers of all steps of a pass at once.
        of_passes = random.ahead(solver.steps + 1)
        made: list[tuple[int, int, int]] = []  # evaluations for each image, places known and places drawn of each pass
        with evaluation_mode(network), evaluation_mode(head):
            for turn in self.passes(random, layout.length, known=known):
                z = turn.take(_hidden(network, drawn, condition, turn)).flatten(0, 1)

                def noise(number: int, turn: MaskedPass = turn) -> Tensor:
                    step = turn.step * (solver.steps + 1) + number
                    numbers = of_passes.normal(Purpose.LATENT_NOISE, turn.count * dim, step)
                    return numbers.to(dtype).view(-1, dim)

                new = head.sample(
                    z,
                    noise(0),
                    noise=lambda i, noise=noise: noise(i + 1),
                    guidance_scale=turn.guidance_scale,
                    solver=solver,
                )
                drawn = turn.put(drawn, new.view(-1, turn.count, dim).to(dtype))
                made.append((turn.rows, turn.known, turn.count))
        return SamplerOutput(
            tokens=drawn,
            network_calls=sum(rows for rows, *_ in made),
            sequential_passes=len(made),
            count_flops=partial(
                _flops,
                network,
                head,
                made,
                solver,
                0 if condition.context is None else condition.context.shape[1],
            ),
        )


def _hidden(network: MaskedAutoencoder, drawn: Tensor, condition: Condition, turn: MaskedPass) -> Tensor:
    """The hidden states `(B, N, W)`, or with the null ones behind them `(2 B, N, W)`."""
    masked, layout = turn.masked, network.layout
    if turn.guided:
        condition = condition.with_null(null_label=layout.num_classes, null_id=layout.grid_vocab)
        drawn, masked = drawn.repeat(2, 1, 1), masked.repeat(2, 1)
    return network(drawn, masked, condition, known=turn.known)


def _flops(
    network: MaskedAutoencoder, head: TokenDiffusionHead, made: list[tuple[int, int, int]], solver: Solver, context: int
) -> int:
    """Floating-point operations for an image: of each pass of the network, and of the head at the places it draws."""
    return sum(
        network.flops(evaluations, known, context) + head.flops(evaluations * drawn, solver)
        for evaluations, known, drawn in made
    )
