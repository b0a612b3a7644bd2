"""Samplers draw tokens from a backbone. Plain PyTorch."""

from discrete_lit.samplers.maskgit import MaskGITSampler
from discrete_lit.samplers.raster import RasterSampler
from discrete_lit.samplers.sampler import Sampler, SamplerOutput

__all__ = ["MaskGITSampler", "RasterSampler", "Sampler", "SamplerOutput"]
