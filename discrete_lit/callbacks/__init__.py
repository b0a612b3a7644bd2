"""Callbacks for the trainer: what is watched while training, and how a run survives its job's end."""

from discrete_lit.callbacks.alarm import TrainingAlarm, TrainingStopped
from discrete_lit.callbacks.compile import Compile
from discrete_lit.callbacks.gradient_norm import GradientNorm
from discrete_lit.callbacks.moving_average import ExponentialMovingAverage
from discrete_lit.callbacks.preemption import Preemption
from discrete_lit.callbacks.reconstruction_frechet import ReconstructionFrechet
from discrete_lit.callbacks.reconstruction_grid import ReconstructionGrid
from discrete_lit.callbacks.sample_grid import SampleGrid
from discrete_lit.callbacks.throughput import Throughput

__all__ = [
    "Compile",
    "ExponentialMovingAverage",
    "GradientNorm",
    "Preemption",
    "ReconstructionFrechet",
    "ReconstructionGrid",
    "SampleGrid",
    "Throughput",
    "TrainingAlarm",
    "TrainingStopped",
]
