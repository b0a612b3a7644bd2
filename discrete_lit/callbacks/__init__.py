"""Callbacks for the trainer: what is watched while training, and how a run survives its job's end."""

from discrete_lit.callbacks.compile import Compile
from discrete_lit.callbacks.ema import ExponentialMovingAverage
from discrete_lit.callbacks.image_grids import ReconstructionGrid, SampleGrid
from discrete_lit.callbacks.monitors import GradientNorm, ReconstructionFrechet, Throughput
from discrete_lit.callbacks.preemption import Preemption
from discrete_lit.callbacks.training_guard import TrainingGuard, TrainingStopped

__all__ = [
    "Compile",
    "ExponentialMovingAverage",
    "GradientNorm",
    "Preemption",
    "ReconstructionFrechet",
    "ReconstructionGrid",
    "SampleGrid",
    "Throughput",
    "TrainingGuard",
    "TrainingStopped",
]
