"""Quantizers: latents `(B, ..., D)` of any grid to ids and back. Plain PyTorch."""

from discrete_lit.tokenizers.quantizers.finite_scalar import FiniteScalarQuantizer
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer
from discrete_lit.tokenizers.quantizers.vector import VectorQuantizer

__all__ = ["FiniteScalarQuantizer", "Quantized", "Quantizer", "VectorQuantizer"]
