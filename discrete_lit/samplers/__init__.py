"""Samplers draw tokens from a backbone. Plain PyTorch."""

from discrete_lit.samplers.ancestral import AncestralSampler
from discrete_lit.samplers.bar import BARSampler
from discrete_lit.samplers.confidence import ConfidenceSampler
from discrete_lit.samplers.diffusion import DiffusionSampler
from discrete_lit.samplers.drawing import Drawing, SamplerOutput, TraceStep
from discrete_lit.samplers.euler import EulerSampler, TauLeapingSampler
from discrete_lit.samplers.first_hitting import FirstHittingSampler
from discrete_lit.samplers.halton import HaltonSampler
from discrete_lit.samplers.halton_confidence import HaltonConfidenceSampler
from discrete_lit.samplers.maskbit import MaskBitSampler
from discrete_lit.samplers.maskgit import MaskGITSampler
from discrete_lit.samplers.next_scale import NextScaleSampler
from discrete_lit.samplers.open_magvit2 import OpenMAGVIT2Sampler, PartSettings
from discrete_lit.samplers.ordered import RandomOrderSampler
from discrete_lit.samplers.parallel import ParallelSampler
from discrete_lit.samplers.predictor_corrector import PredictorCorrectorSampler
from discrete_lit.samplers.raster import RasterSampler
from discrete_lit.samplers.remasking import RemaskingSampler
from discrete_lit.samplers.sampler import Sampler
from discrete_lit.samplers.titok import TiTokSampler

__all__ = [
    "AncestralSampler",
    "BARSampler",
    "ConfidenceSampler",
    "DiffusionSampler",
    "Drawing",
    "EulerSampler",
    "FirstHittingSampler",
    "HaltonConfidenceSampler",
    "HaltonSampler",
    "MaskBitSampler",
    "MaskGITSampler",
    "NextScaleSampler",
    "OpenMAGVIT2Sampler",
    "ParallelSampler",
    "PartSettings",
    "PredictorCorrectorSampler",
    "RandomOrderSampler",
    "RasterSampler",
    "RemaskingSampler",
    "Sampler",
    "SamplerOutput",
    "TauLeapingSampler",
    "TiTokSampler",
    "TraceStep",
]
