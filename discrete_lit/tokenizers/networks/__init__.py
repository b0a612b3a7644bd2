"""Autoencoder networks around the quantizers. Plain PyTorch."""

from discrete_lit.tokenizers.networks.autoencoder import Autoencoder
from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder

__all__ = ["Autoencoder", "ConvAutoencoder"]
