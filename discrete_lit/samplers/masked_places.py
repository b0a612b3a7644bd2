"""The common part of the samplers of masked places: in which pass of the network each place of an image is drawn.

`MARSampler` draws a vector at each place of a pass, `DimensionwiseSampler` the ids of its channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose, places_of
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.samplers.maskgit import masked_counts

GuidanceOfPasses = Literal["known", "constant"]
Order = Literal["random", "raster"]


@dataclass(frozen=True, kw_only=True)
class MaskedPass:
    """A pass of the network over images in which some places are known, and the places that are drawn after it.

    Attributes:
        step: the number of the pass, from 0.
        known: places that are known before it, in each image.
        masked: `(B, N)` bool, the others.
        places: `(B, n)` int64, those that are drawn, in raster order.
        guidance_scale: s.
    """

    step: int
    known: int
    masked: Tensor
    places: Tensor
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether the network is evaluated for the null condition too."""
        return self.guidance_scale != 1

    @property
    def count(self) -> int:
        """n, the number of places that are drawn in each image."""
        return self.places.shape[1]

    @property
    def rows(self) -> int:
        """Evaluations of the network for each image."""
        return 1 + self.guided

    def take(self, hidden: Tensor) -> Tensor:
        """Take the hidden states of the places, `(rows B, n, W)` of `(rows B, N, W)`."""
        return hidden.gather(1, self.places.repeat(self.rows, 1)[..., None].expand(-1, -1, hidden.shape[-1]))

    def put(self, drawn: Tensor, new: Tensor) -> Tensor:
        """Put what was drawn, `(B, n, D)`, at its places in `(B, N, D)`."""
        return drawn.scatter(1, self.places[..., None].expand_as(new), new)


class MaskedPlaceSampler:
    """Draw the places of an image in T passes of the network, several at once.

    After pass i, `floor(N m(1 - (i + 1) / T))` places are still masked; which come next is drawn for each image. The
    places of one pass are drawn independently given what was known before it.

    Args:
        steps: T, from 1 to N.
        guidance_scale: s; 1 is off.
        guidance_schedule: `"known"`: 1 + (s - 1) times the share of places that are known after the pass (MAR's
            "linear"), or `"constant"`.
        order: `"random"`, another one for each image, or `"raster"`.
        mask_schedule: m; the cosine by default.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        steps: int,
        *,
        guidance_scale: float,
        guidance_schedule: GuidanceOfPasses,
        order: Order,
        mask_schedule: MaskSchedule | None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if order not in ("random", "raster"):
            raise ValueError(f"order must be 'random' or 'raster', got {order!r}")
        check_guidance_schedule(guidance_schedule)
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.guidance_schedule: GuidanceOfPasses = guidance_schedule
        self.order: Order = order
        self.mask_schedule = mask_schedule or CosineSchedule()

    def check_length(self, length: int) -> None:
        """Raise a ValueError where there are more steps than the `length` places of an image."""
        if self.steps > length:
            raise ValueError(
                f"steps={self.steps} exceeds the {length} places of an image: each step draws at least one"
            )

    def passes(self, random: CounterRandom, length: int, *, known: Tensor | None = None) -> Iterator[MaskedPass]:
        """Plan the passes of a draw.

        Args:
            random: one stream for each image, which decides its order.
            length: N.
            known: `(B, N)` bool, the places that are not drawn, as many in each image; none by default.

        Raises:
            ValueError: more steps than places, or images with different numbers of known places.
        """
        self.check_length(length)
        rank, given = self._turns(random, length), 0
        if known is not None:
            counts = known.sum(dim=1)
            given = int(counts.max())
            if bool((counts != given).any()):
                raise ValueError(f"known must have as many places in each image, got {counts.tolist()}")
            rank = torch.where(known, rank - length, rank).argsort(dim=1).argsort(dim=1)
        first = given
        for step, still_masked in enumerate(masked_counts(self.mask_schedule, self.steps, length - given)):
            end = length - still_masked
            if end == first:
                continue  # fewer places than steps: there is nothing left to draw
            # MAR's code counts one place as masked after the last pass too.
            scale = scale_of_known(self.guidance_scale, self.guidance_schedule, 1 - max(still_masked, 1) / length)
            masked = rank >= first
            places = places_of(masked & (rank < end), end - first)
            yield MaskedPass(step=step, known=first, masked=masked, places=places, guidance_scale=scale)
            first = end

    def _turns(self, random: CounterRandom, length: int) -> Tensor:
        """When each place is drawn, `(B, N)` int64."""
        if self.order == "raster":
            return torch.arange(length, device=random.indices.device).expand(len(random.indices), -1)
        return random.uniform(Purpose.ORDER, length).argsort(dim=1).argsort(dim=1)


def check_guidance_schedule(schedule: str) -> None:
    """Raise a ValueError unless the name of a schedule of guidance over passes is known."""
    if schedule not in ("known", "constant"):
        raise ValueError(f"guidance_schedule must be 'known' or 'constant', got {schedule!r}")


def scale_of_known(scale: float, schedule: GuidanceOfPasses, known: float) -> float:
    """Give the guidance scale of a pass, after which this share of the places is known."""
    return scale if schedule == "constant" else 1 + (scale - 1) * known
