"""Samplers draw tokens from a backbone, one file an algorithm. Plain PyTorch."""

import warnings
from typing import Any

from discrete_lit.samplers.bar import BARSampler
from discrete_lit.samplers.binary_flow import BinaryFlowSampler
from discrete_lit.samplers.cell_by_cell import NextCellSampler
from discrete_lit.samplers.channel_by_channel import DimensionwiseSampler
from discrete_lit.samplers.delayed import DelaySampler
from discrete_lit.samplers.diffusion import AncestralSampler, DiffusionSampler, FirstHittingSampler
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.guided_solver import GuidedSolver
from discrete_lit.samplers.halton import HaltonSampler, RandomOrderSampler
from discrete_lit.samplers.islands import MaskedSteps
from discrete_lit.samplers.masked_vectors import MARSampler
from discrete_lit.samplers.maskgit import (
    HaltonConfidenceSampler,
    MaskBitSampler,
    MaskGITSampler,
    TiTokSampler,
)
from discrete_lit.samplers.parallel_raster import RandARSampler
from discrete_lit.samplers.predictor_corrector import PredictorCorrectorSampler
from discrete_lit.samplers.purity import PuritySampler
from discrete_lit.samplers.raster import OpenMAGVIT2Sampler, RasterSampler, SubTokenSettings
from discrete_lit.samplers.remasking import RemaskingSampler
from discrete_lit.samplers.reverse_rates import EulerSampler, TauLeapingSampler
from discrete_lit.samplers.sampler import EstimateStep, Sampler, SamplerOutput, SamplingContext, TraceStep
from discrete_lit.samplers.scale_by_scale import HybridScaleSampler, NextScaleSampler, ScaleVectors
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.samplers.self_correction import SelfCorrectionSampler
from discrete_lit.samplers.vector_by_vector import CausalVectorSampler

__all__ = [
    "AncestralSampler",
    "BARSampler",
    "BinaryFlowSampler",
    "CausalVectorSampler",
    "DelaySampler",
    "DiffusionSampler",
    "DimensionwiseSampler",
    "DrawSettings",
    "EstimateStep",
    "EulerSampler",
    "FirstHittingSampler",
    "GuidedSolver",
    "HaltonConfidenceSampler",
    "HaltonSampler",
    "HybridScaleSampler",
    "MARSampler",
    "MaskBitSampler",
    "MaskGITSampler",
    "MaskedSteps",
    "NextCellSampler",
    "NextScaleSampler",
    "OpenMAGVIT2Sampler",
    "PredictorCorrectorSampler",
    "PuritySampler",
    "RandARSampler",
    "RandomOrderSampler",
    "RasterSampler",
    "RemaskingSampler",
    "Sampler",
    "SamplerOutput",
    "SamplingContext",
    "ScaleVectors",
    "SegmentSampler",
    "SelfCorrectionSampler",
    "SubTokenSettings",
    "TauLeapingSampler",
    "TiTokSampler",
    "TraceStep",
]

AnySampler = (
    Sampler
    | GuidedSolver
    | MARSampler
    | CausalVectorSampler
    | NextCellSampler
    | DimensionwiseSampler
    | HybridScaleSampler
    | SegmentSampler
)
"""Any class that draws from a generator: of ids the first, of vectors the others."""


def __getattr__(name: str) -> Any:
    if name != "Drawing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.Drawing is now {__name__}.SamplingContext: use the new name", DeprecationWarning, stacklevel=2
    )
    return SamplingContext
