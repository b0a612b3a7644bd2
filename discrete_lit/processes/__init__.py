"""Noise: counter-based randomness, the schedules and processes of corruption, and diffusion losses. Plain PyTorch."""

from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.dense import DenseProcess, GaussianProcess
from discrete_lit.processes.diffusion_schedules import (
    CosineSquaredSchedule,
    D3PMCosineSchedule,
    GeometricSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MDLMCosineSchedule,
    TruncatedSchedule,
)
from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import CavityHead, Head, PosteriorHead, ScoreHead
from discrete_lit.processes.mixture import AbsorbingProcess, HybridProcess, MixtureProcess, UniformProcess
from discrete_lit.processes.noise_level import NoiseLevel
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
    "AbsorbingProcess",
    "ArccosSchedule",
    "CavityHead",
    "CosineSchedule",
    "CosineSquaredSchedule",
    "CounterRandom",
    "D3PMCosineSchedule",
    "Denoiser",
    "DenseProcess",
    "ForwardProcess",
    "GaussianProcess",
    "GeometricSchedule",
    "Head",
    "HybridProcess",
    "LinearSchedule",
    "LogLinearSchedule",
    "LogSinSchedule",
    "MDLMCosineSchedule",
    "MaskSchedule",
    "MixtureProcess",
    "NoiseLevel",
    "PosteriorHead",
    "Purpose",
    "ScoreHead",
    "SquareSchedule",
    "TruncatedNormalSchedule",
    "TruncatedSchedule",
    "UniformProcess",
]
