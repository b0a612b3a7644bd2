"""MAR's sampler: masked autoregression over vectors (Li et al., "MAR", 2024, section 3.4 and app. B)."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose, places_of
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.maskgit import masked_counts
from discrete_lit.samplers.sampler import SamplerOutput


class MARSampler:
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
        guidance_schedule: Literal["known", "constant"] = "known",
        order: Literal["random", "raster"] = "random",
        solver: Solver | None = None,
        mask_schedule: MaskSchedule | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        check_turns(guidance_schedule, order)
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.guidance_schedule: Literal["known", "constant"] = guidance_schedule
        self.order: Literal["random", "raster"] = order
        self.solver = solver
        self.mask_schedule = mask_schedule or CosineSchedule()

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
        batch = len(condition)
        length, dim = layout.length, layout.dim
        if self.steps > length:
            raise ValueError(
                f"steps={self.steps} exceeds the {length} places of an image: each step draws at least one"
            )
        dtype = next(network.parameters()).dtype
        drawn = condition.labels.new_zeros((batch, length, dim), dtype=dtype)
        rank = turns(self.order, random, length)  # when each place is drawn
        given = 0
        if known is not None:
            if vectors is None:
                raise ValueError("known says which vectors are kept: give vectors too")
            counts = known.sum(dim=1)
            given = int(counts.max())
            if bool((counts != given).any()):
                raise ValueError(f"known must have as many places in each image, got {counts.tolist()}")
            drawn = torch.where(known[..., None], vectors.to(dtype), drawn)
            rank = torch.where(known, rank - length, rank).argsort(dim=1).argsort(dim=1)
        solver = self.solver or head.solver
        # The numbers of all steps of a pass at once.
        of_passes = random.ahead(solver.steps + 1)
        unknown = length - given
        still_masked, calls, passes = unknown, 0, 0
        made: list[tuple[int, int, int]] = []  # evaluations for each image, places known and places drawn of each pass
        with evaluation_mode(network), evaluation_mode(head):
            for step, stay_masked in enumerate(masked_counts(self.mask_schedule, self.steps, unknown)):
                if stay_masked == still_masked:
                    continue  # fewer places than steps: there is nothing left to draw
                # MAR's code counts one place as masked after the last pass too.
                scale = scale_of_known(self.guidance_scale, self.guidance_schedule, 1 - max(stay_masked, 1) / length)
                guided = scale != 1
                first, end = length - still_masked, length - stay_masked
                hidden = self._hidden(network, drawn, rank >= first, condition, known=first, guided=guided)
                # The places of this pass, in raster order: those whose turn lies in [first, end).
                here = places_of((rank >= first) & (rank < end), end - first)
                doubled = here.repeat(1 + guided, 1)
                z = hidden.gather(1, doubled[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)

                def noise(number: int, step: int = step, count: int = end - first) -> Tensor:
                    numbers = of_passes.normal(Purpose.LATENT_NOISE, count * dim, step * (solver.steps + 1) + number)
                    return numbers.to(dtype).view(batch * count, dim)

                new = head.sample(
                    z, noise(0), noise=lambda i, noise=noise: noise(i + 1), guidance_scale=scale, solver=solver
                )
                new = new.view(batch, end - first, dim).to(dtype)
                drawn = drawn.scatter(1, here[..., None].expand(-1, -1, dim), new)
                still_masked = stay_masked
                made.append((1 + guided, first, end - first))
                calls, passes = calls + 1 + guided, passes + 1
        return SamplerOutput(
            tokens=drawn,
            network_calls=calls,
            sequential_passes=passes,
            count_flops=partial(
                _flops,
                network,
                head,
                made,
                solver.steps,
                0 if condition.context is None else condition.context.shape[1],
            ),
        )

    def _hidden(
        self,
        network: MaskedAutoencoder,
        drawn: Tensor,
        masked: Tensor,
        condition: Condition,
        *,
        known: int,
        guided: bool,
    ) -> Tensor:
        """The hidden states `(B, N, W)`, or with the null ones behind them `(2 B, N, W)`."""
        if not guided:
            return network(drawn, masked, condition, known=known)
        layout = network.layout
        both = condition.with_null(null_label=layout.num_classes, null_id=layout.grid_vocab)
        return network(drawn.repeat(2, 1, 1), masked.repeat(2, 1), both, known=known)


# What samplers of masked places share, whatever their heads draw.


def check_turns(guidance_schedule: str, order: str) -> None:
    """Raise a ValueError unless a guidance schedule and an order are known."""
    if guidance_schedule not in ("known", "constant") or order not in ("random", "raster"):
        raise ValueError(
            "guidance_schedule must be 'known' or 'constant' and order 'random' or 'raster', got "
            f"{guidance_schedule!r} and {order!r}"
        )


def turns(order: Literal["random", "raster"], random: CounterRandom, length: int) -> Tensor:
    """Say when each place is drawn, `(B, N)` int64: in raster order, or in one of its own for each image."""
    if order == "raster":
        return torch.arange(length, device=random.indices.device).expand(len(random.indices), -1)
    return random.uniform(Purpose.ORDER, length).argsort(dim=1).argsort(dim=1)


def scale_of_known(scale: float, schedule: Literal["known", "constant"], known: float) -> float:
    """Give the guidance scale of a pass, after which this share of the places is known."""
    return scale if schedule == "constant" else 1 + (scale - 1) * known


def _flops(
    network: MaskedAutoencoder, head: TokenDiffusionHead, made: list[tuple[int, int, int]], steps: int, context: int
) -> int:
    """Floating-point operations for an image: of each pass of the network, and of the head at the places it draws."""
    return sum(
        network.flops(evaluations, known, context) + steps * head.flops(evaluations * drawn)
        for evaluations, known, drawn in made
    )
