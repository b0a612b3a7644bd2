"""Quantizers: latents `(B, ..., D)` of any grid to ids and back. Plain PyTorch."""

from discrete_lit.tokenizers.quantizers.binary_spherical import BinarySphericalQuantizer
from discrete_lit.tokenizers.quantizers.finite_scalar import FiniteScalarQuantizer
from discrete_lit.tokenizers.quantizers.gaussian import DiagonalGaussian, GaussianBottleneck
from discrete_lit.tokenizers.quantizers.lookup_free import LookupFreeQuantizer
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer
from discrete_lit.tokenizers.quantizers.vector import VectorQuantizer

__all__ = [
    "BinarySphericalQuantizer",
    "DiagonalGaussian",
    "FiniteScalarQuantizer",
    "GaussianBottleneck",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "VectorQuantizer",
]
