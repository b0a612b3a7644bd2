"""Samplers draw tokens from a backbone, one file an algorithm. Plain PyTorch."""

import warnings
from typing import Any

from discrete_lit.samplers.bar import BARSampler
from discrete_lit.samplers.diffusion import (
    AncestralSampler,
    DiffusionSampler,
    EulerSampler,
    FirstHittingSampler,
    TauLeapingSampler,
)
from discrete_lit.samplers.guided_solver import GuidedSolver
from discrete_lit.samplers.halton import HaltonSampler, RandomOrderSampler
from discrete_lit.samplers.masked_vectors import MARSampler
from discrete_lit.samplers.maskgit import (
    HaltonConfidenceSampler,
    MaskBitSampler,
    MaskGITSampler,
    TiTokSampler,
)
from discrete_lit.samplers.predictor_corrector import PredictorCorrectorSampler
from discrete_lit.samplers.raster import OpenMAGVIT2Sampler, RasterSampler, SubTokenSettings
from discrete_lit.samplers.remasking import RemaskingSampler
from discrete_lit.samplers.sampler import Sampler, SamplerOutput, SamplingContext, TraceStep
from discrete_lit.samplers.scale_by_scale import NextScaleSampler
from discrete_lit.samplers.vector_by_vector import CausalVectorSampler

__all__ = [
    "AncestralSampler",
    "BARSampler",
    "CausalVectorSampler",
    "DiffusionSampler",
    "EulerSampler",
    "FirstHittingSampler",
    "GuidedSolver",
    "HaltonConfidenceSampler",
    "HaltonSampler",
    "MARSampler",
    "MaskBitSampler",
    "MaskGITSampler",
    "NextScaleSampler",
    "OpenMAGVIT2Sampler",
    "PredictorCorrectorSampler",
    "RandomOrderSampler",
    "RasterSampler",
    "RemaskingSampler",
    "Sampler",
    "SamplerOutput",
    "SamplingContext",
    "SubTokenSettings",
    "TauLeapingSampler",
    "TiTokSampler",
    "TraceStep",
]


def __getattr__(name: str) -> Any:
    if name != "Drawing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.Drawing is now {__name__}.SamplingContext: use the new name", DeprecationWarning, stacklevel=2
    )
    return SamplingContext
