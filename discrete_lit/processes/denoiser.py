"""What there is to know of a network that was trained to undo noise, beside the network itself."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.schedules import MaskSchedule

TimeInput = Literal["none", "time", "total_noise"]
# DiT's and D3PM's sinusoids tell times from 0 to 1000 apart.
_TIME_SCALE = 1000.0


@dataclass(frozen=True)
class Denoiser:
    """Process, schedule and head of a generator's backbone."""

    process: ForwardProcess
    schedule: MaskSchedule
    """Of training; samplers go through its times."""
    head: Head
    time_input: TimeInput
    """What the backbone is told: nothing, 1000 t, or sigma (SEDD, whose schedules keep it finite)."""

    def network_time(self, level: NoiseLevel) -> Tensor | None:
        """`(B,)`, the backbone's `time`; never more noise than the schedule ends with."""
        if self.time_input == "none":
            return None
        if self.time_input == "time":
            return (level.t * _TIME_SCALE)[:, 0].float()
        most = NoiseLevel.at(self.schedule, torch.ones_like(level.t)).sigma
        return torch.minimum(level.sigma, most)[:, 0].float()

    def level_of_masks(self, masked: Tensor) -> NoiseLevel:
        """The level at which so many tokens are masked on average; `masked (B, N)` bool."""
        share = masked.double().mean(dim=1, keepdim=True)
        ends = self.schedule.mask_probability(share.new_tensor([0.0, 1.0]))
        return NoiseLevel.at(self.schedule, self.schedule.inverse(share.clamp(ends[0], ends[1])))
