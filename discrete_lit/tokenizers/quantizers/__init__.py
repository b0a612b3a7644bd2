"""Quantizers: latents `(B, ..., D)` of any grid to ids and back. Plain PyTorch."""

from discrete_lit.tokenizers.quantizers.codebook import Codebook
from discrete_lit.tokenizers.quantizers.finite_scalar import FiniteScalarQuantizer
from discrete_lit.tokenizers.quantizers.gumbel import GumbelQuantizer
from discrete_lit.tokenizers.quantizers.index_backpropagation import IndexBackpropagationQuantizer
from discrete_lit.tokenizers.quantizers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer
from discrete_lit.tokenizers.quantizers.residual import ResidualQuantizer
from discrete_lit.tokenizers.quantizers.vector import SimVectorQuantizer, VectorQuantizer

__all__ = [
    "BinarySphericalQuantizer",
    "Codebook",
    "FiniteScalarQuantizer",
    "GumbelQuantizer",
    "IndexBackpropagationQuantizer",
    "LookupFreeQuantizer",
    "MultiScaleResidualQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
]
