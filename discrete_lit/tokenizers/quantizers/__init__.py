"""Quantizers: latents `(B, *grid, D)` to ids and code vectors. Plain PyTorch; each algorithm stands in one file.

    quantizer.py            the contract
    vector.py               VQ-VAE, with EMA or gradient codebook (VQGAN, ViT-VQGAN, LlamaGen, TiTok); SimVQ
    residual.py             RQ-VAE
    multi_scale.py          VAR
    lookup_free.py          LFQ (MAGVIT-v2, MaskBit); BSQ
    finite_scalar.py        FSQ
    gumbel.py               Gumbel-softmax (DALL-E's dVAE)
    index_backpropagation.py  IBQ
    normal_levels.py        levels of the normal law for single numbers (TokenBridge); nothing is trained

and what they share:

    codebook.py             the EMA codebook, its start from data or k-means, the revival of dead codes
    nearest.py              the exact search for the nearest code
    gradient_estimators.py  straight-through estimator, rotation trick
    entropy.py              the entropy terms of LFQ, BSQ, IBQ and MaskGIT's VQ
"""

from discrete_lit.tokenizers.quantizers.codebook import Codebook
from discrete_lit.tokenizers.quantizers.finite_scalar import FiniteScalarQuantizer
from discrete_lit.tokenizers.quantizers.gumbel import GumbelQuantizer
from discrete_lit.tokenizers.quantizers.index_backpropagation import IndexBackpropagationQuantizer
from discrete_lit.tokenizers.quantizers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleQuantizer, MultiScaleResidualQuantizer
from discrete_lit.tokenizers.quantizers.multi_scale_bits import MultiScaleBinarySphericalQuantizer
from discrete_lit.tokenizers.quantizers.normal_levels import NormalLevels
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
    "MultiScaleBinarySphericalQuantizer",
    "MultiScaleQuantizer",
    "MultiScaleResidualQuantizer",
    "NormalLevels",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
]
