"""Samplers draw tokens from a backbone. Plain PyTorch."""

from discrete_lit.samplers.bar import BARSampler
from discrete_lit.samplers.diffusion import (
    AncestralSampler,
    DiffusionSampler,
    EulerSampler,
    FirstHittingSampler,
    TauLeapingSampler,
)
from discrete_lit.samplers.halton import HaltonSampler, RandomOrderSampler
from discrete_lit.samplers.maskgit import (
    ConfidenceSampler,
    HaltonConfidenceSampler,
    MaskBitSampler,
    MaskGITSampler,
    TiTokSampler,
)
from discrete_lit.samplers.predictor_corrector import PredictorCorrectorSampler
from discrete_lit.samplers.raster import OpenMAGVIT2Sampler, RasterSampler, SubTokenSettings
from discrete_lit.samplers.remasking import RemaskingSampler
from discrete_lit.samplers.sampler import ParallelSampler, Sampler, SamplerOutput, SamplingContext, TraceStep
from discrete_lit.samplers.scale_by_scale import NextScaleSampler

__all__ = [
    "AncestralSampler",
    "BARSampler",
    "ConfidenceSampler",
    "DiffusionSampler",
    "EulerSampler",
    "FirstHittingSampler",
    "HaltonConfidenceSampler",
    "HaltonSampler",
    "MaskBitSampler",
    "MaskGITSampler",
    "NextScaleSampler",
    "OpenMAGVIT2Sampler",
    "ParallelSampler",
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
