"""Tokenizers of ids and of continuous latents, as LightningModules."""

from discrete_lit.tokenizers.characters import Characters
from discrete_lit.tokenizers.chunked_encodec import ChunkedEnCodec
from discrete_lit.tokenizers.dimensionwise import DimensionwiseTokenizer
from discrete_lit.tokenizers.dvae import DVAE
from discrete_lit.tokenizers.encodec import EnCodec
from discrete_lit.tokenizers.hybrid import HybridLatents, HybridTokens, HybridVQ
from discrete_lit.tokenizers.klvae import KLVAE, DiagonalGaussian, GaussianBottleneck
from discrete_lit.tokenizers.perturbed import PerturbedTokenizer
from discrete_lit.tokenizers.pixels import ColourPalette, PixelLevels
from discrete_lit.tokenizers.text_encoder import (
    StaticTextEncoder,
    T5TextEncoder,
    TextEncoder,
    TextIds,
    TransformerTextEncoder,
    text_encoder_from_files,
)
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer
from discrete_lit.tokenizers.titok import ProxyDecoder, TiTok, TiTokAutoencoder
from discrete_lit.tokenizers.tokenizer import (
    ContinuousTokenizer,
    TokenGrid,
    Tokenizer,
    continuous_from_checkpoint,
    freeze,
    from_checkpoint,
)
from discrete_lit.tokenizers.uncoded_latents import CodebookLatents, LatentGrid, RawFrames, RawPixels
from discrete_lit.tokenizers.vqvae import FSQ, LFQ, RQVAE, VQGAN, VQVAE, MultiScaleVQ

__all__ = [
    "DVAE",
    "FSQ",
    "KLVAE",
    "LFQ",
    "RQVAE",
    "VQGAN",
    "VQVAE",
    "Characters",
    "ChunkedEnCodec",
    "CodebookLatents",
    "ColourPalette",
    "ContinuousTokenizer",
    "DiagonalGaussian",
    "DimensionwiseTokenizer",
    "EnCodec",
    "GaussianBottleneck",
    "HybridLatents",
    "HybridTokens",
    "HybridVQ",
    "LatentGrid",
    "MultiScaleVQ",
    "PerturbedTokenizer",
    "PixelLevels",
    "ProxyDecoder",
    "RawFrames",
    "RawPixels",
    "StaticTextEncoder",
    "T5TextEncoder",
    "TextEncoder",
    "TextIds",
    "TextTokenizer",
    "TiTok",
    "TiTokAutoencoder",
    "TokenGrid",
    "Tokenizer",
    "TransformerTextEncoder",
    "continuous_from_checkpoint",
    "freeze",
    "from_checkpoint",
    "text_encoder_from_files",
]
