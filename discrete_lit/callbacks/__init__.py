"""Callbacks for the trainer: what is watched while training, and how a run survives its job's end."""

import warnings
from typing import Any

from discrete_lit.callbacks.audio_examples import AudioExamples
from discrete_lit.callbacks.collective_timeout import CollectiveTimeout
from discrete_lit.callbacks.ema import ExponentialMovingAverage
from discrete_lit.callbacks.hang_detector import HangDetector
from discrete_lit.callbacks.image_distance import ImageDistance
from discrete_lit.callbacks.image_grids import ReconstructionGrid, SampleGrid
from discrete_lit.callbacks.monitors import GradientNorm
from discrete_lit.callbacks.preemption import Preemption
from discrete_lit.callbacks.throughput import Compile, Throughput
from discrete_lit.callbacks.token_telemetry import TokenTelemetry
from discrete_lit.callbacks.training_guard import TrainingGuard, TrainingStopped

__all__ = [
    "AudioExamples",
    "CollectiveTimeout",
    "Compile",
    "ExponentialMovingAverage",
    "GradientNorm",
    "HangDetector",
    "ImageDistance",
    "Preemption",
    "ReconstructionGrid",
    "SampleGrid",
    "Throughput",
    "TokenTelemetry",
    "TrainingGuard",
    "TrainingStopped",
]


def __getattr__(name: str) -> Any:
    if name == "TrainingAlarm":
        warnings.warn(
            "discrete_lit.callbacks.TrainingAlarm is now called TrainingGuard", DeprecationWarning, stacklevel=2
        )
        return TrainingGuard
    raise AttributeError(f"module 'discrete_lit.callbacks' has no attribute {name!r}")
