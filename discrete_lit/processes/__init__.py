"""Noise: counter-based randomness and the schedules of corruption. Plain PyTorch."""

from discrete_lit.processes.random import CounterRandom, Purpose
from discrete_lit.processes.schedules import (
    ArccosSchedule,
    CosineSchedule,
    LinearSchedule,
    MaskSchedule,
    SquareSchedule,
    TruncatedNormalSchedule,
)

__all__ = [
    "ArccosSchedule",
    "CosineSchedule",
    "CounterRandom",
    "LinearSchedule",
    "MaskSchedule",
    "Purpose",
    "SquareSchedule",
    "TruncatedNormalSchedule",
]
