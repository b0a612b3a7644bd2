"""Tokenizers, and the autoencoder of continuous latents, as LightningModules."""

from discrete_lit.tokenizers.characters import Characters
from discrete_lit.tokenizers.dvae import DVAE
from discrete_lit.tokenizers.fsq import FSQ
from discrete_lit.tokenizers.identity import ColourPalette, PixelLevels
from discrete_lit.tokenizers.klvae import KLVAE
from discrete_lit.tokenizers.lfq import LFQ
from discrete_lit.tokenizers.multi_scale_vq import MultiScaleVQ
from discrete_lit.tokenizers.rqvae import RQVAE
from discrete_lit.tokenizers.titok import TiTok
from discrete_lit.tokenizers.token_grid import TokenGrid
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze, from_checkpoint
from discrete_lit.tokenizers.vqgan import VQGAN
from discrete_lit.tokenizers.vqvae import VQVAE

__all__ = [
    "DVAE",
    "FSQ",
    "KLVAE",
    "LFQ",
    "RQVAE",
    "VQGAN",
    "VQVAE",
    "Characters",
    "ColourPalette",
    "MultiScaleVQ",
    "PixelLevels",
    "TiTok",
    "TokenGrid",
    "Tokenizer",
    "freeze",
    "from_checkpoint",
]
