"""Discrete diffusion: noise schedules, forward processes, parameterizations, reverse steps, losses. Plain PyTorch."""

from discrete_lit.diffusion.dense_processes import (
    DenseProcess,
    DiscretizedGaussianProcess,
)
from discrete_lit.diffusion.gidd import GIDDLoss, GIDDProcess, GIDDSchedule
from discrete_lit.diffusion.mask_and_replace import MaskAndReplaceProcess, MaskAndReplaceSchedule
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser, Head, LeaveOneOutHead, PosteriorHead, ScoreHead
from discrete_lit.diffusion.processes import (
    AbsorbingProcess,
    ForwardProcess,
    HybridProcess,
    MixtureProcess,
    UniformProcess,
)
from discrete_lit.diffusion.schedules import (
    ArccosSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    D3PMCosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    MDLMCosineSchedule,
    PowerSchedule,
    SquareSchedule,
    TruncatedNormalSchedule,
    TruncatedSchedule,
    WarpedSchedule,
)

__all__ = [
    "AbsorbingProcess",
    "ArccosSchedule",
    "CosineSchedule",
    "CosineSquaredSchedule",
    "D3PMCosineSchedule",
    "Denoiser",
    "DenseProcess",
    "DiscretizedGaussianProcess",
    "ForwardProcess",
    "GIDDLoss",
    "GIDDProcess",
    "GIDDSchedule",
    "GeometricSchedule",
    "Head",
    "HybridProcess",
    "LeaveOneOutHead",
    "LinearSchedule",
    "LogLinearSchedule",
    "LogSinSchedule",
    "MDLMCosineSchedule",
    "MaskAndReplaceProcess",
    "MaskAndReplaceSchedule",
    "MaskSchedule",
    "MixtureProcess",
    "NoiseLevel",
    "PosteriorHead",
    "PowerSchedule",
    "ScoreHead",
    "SquareSchedule",
    "TruncatedNormalSchedule",
    "TruncatedSchedule",
    "UniformProcess",
    "WarpedSchedule",
]
