"""Tokenizers: an autoencoder around a quantizer, as LightningModules."""

from discrete_lit.tokenizers.fsq import FSQ
from discrete_lit.tokenizers.identity import ColourPalette, PixelLevels
from discrete_lit.tokenizers.titok import TiTok
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze, from_checkpoint
from discrete_lit.tokenizers.vqgan import VQGAN
from discrete_lit.tokenizers.vqvae import VQVAE

__all__ = ["FSQ", "VQGAN", "VQVAE", "ColourPalette", "PixelLevels", "TiTok", "Tokenizer", "freeze", "from_checkpoint"]
