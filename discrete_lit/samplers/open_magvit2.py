"""Open-MAGVIT2's sampler (Luo et al., "Open-MAGVIT2", 2024): each part of an id with settings of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from discrete_lit.backbones import PlaceHead
from discrete_lit.samplers.guidance import GuidanceSchedule
from discrete_lit.samplers.raster import RasterSampler
from discrete_lit.samplers.sampler import Sampler


@dataclass(frozen=True)
class PartSettings:
    """How one part of an id is drawn; the settings are those of `Sampler`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0


class OpenMAGVIT2Sampler(RasterSampler):
    """Place after place, the parts of an id in turn.

    Args:
        parts: settings of each part, least significant first; published for (2^6, 2^12) with guidance scales 1.9 and
            2.0 for 343M parameters, 1.9 and 1.9 for 804M, 1.75 and 1.85 for 1.5B, and temperatures 1.0 and 1.0, of the
            larger two 1.1 and 1.0.
        order: of the places, as in `RasterSampler`.
        guidance_schedule, guidance_power, guidance_interval: of all parts, as in `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a generator without as many parts of an id.
    """

    def __init__(
        self,
        parts: Sequence[PartSettings],
        order: Literal["raster", "random"] | Sequence[int] = "raster",
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> None:
        if not parts:
            raise ValueError("parts must have settings for each part of an id, got none")
        over_places: dict[str, Any] = {
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "guidance_interval": guidance_interval,
        }
        super().__init__(order, **over_places)
        self.part_samplers = [
            RasterSampler(
                temperature=part.temperature,
                top_k=part.top_k,
                top_p=part.top_p,
                guidance_scale=part.guidance_scale,
                **over_places,
            )
            for part in parts
        ]

    def part_scales(self, steps: int, head: PlaceHead | None) -> list[list[float]]:
        found = 1 if head is None else len(head.parts)
        if found != len(self.part_samplers):
            raise ValueError(
                f"parts has settings for {len(self.part_samplers)} parts of an id, this generator predicts {found}"
            )
        return [sampler.scales(steps) for sampler in self.part_samplers]

    def part_sampler(self, number: int) -> Sampler:
        return self.part_samplers[number]
