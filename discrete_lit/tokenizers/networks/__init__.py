"""Autoencoder networks around the quantizers. Plain PyTorch."""

from discrete_lit.tokenizers.networks.autoencoder import Autoencoder
from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder
from discrete_lit.tokenizers.networks.titok import ProxyDecoder, TiTokAutoencoder
from discrete_lit.tokenizers.networks.transformer_blocks import TransformerSize
from discrete_lit.tokenizers.networks.vit import ViTAutoencoder

__all__ = ["Autoencoder", "ConvAutoencoder", "ProxyDecoder", "TiTokAutoencoder", "TransformerSize", "ViTAutoencoder"]
