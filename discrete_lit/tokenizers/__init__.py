"""Tokenizers: an autoencoder around a quantizer, as LightningModules."""

from discrete_lit.tokenizers.fsq import FSQ
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze, from_checkpoint
from discrete_lit.tokenizers.vqgan import VQGAN
from discrete_lit.tokenizers.vqvae import VQVAE

__all__ = ["FSQ", "VQGAN", "VQVAE", "Tokenizer", "freeze", "from_checkpoint"]
