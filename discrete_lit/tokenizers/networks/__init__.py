"""Autoencoder networks around the quantizers. Plain PyTorch.

network.py        the contract
convolutional.py  VQGAN's, and those of MAGVIT-v2, MaskGIT, LlamaGen, VAR and others
vit.py            ViT-VQGAN's
"""

from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder
from discrete_lit.tokenizers.networks.network import Autoencoder
from discrete_lit.tokenizers.networks.vit import TransformerSize, ViTAutoencoder

__all__ = ["Autoencoder", "ConvAutoencoder", "TransformerSize", "ViTAutoencoder"]
