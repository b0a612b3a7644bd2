"""Autoencoder networks around the quantizers. Plain PyTorch."""

from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder
from discrete_lit.tokenizers.networks.network import Autoencoder
from discrete_lit.tokenizers.networks.vit import TransformerSize, ViTAutoencoder

__all__ = ["Autoencoder", "ConvAutoencoder", "TransformerSize", "ViTAutoencoder"]
