"""The convolutional autoencoder, in one, two or three dimensions."""

from discrete_lit.tokenizers.networks.convolutional.autoencoder import ConvAutoencoder

__all__ = ["ConvAutoencoder"]
