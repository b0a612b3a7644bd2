"""What a tokenizer asks of its network."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Autoencoder(nn.Module, ABC):
    """Images to a grid of latents and back; the tokenizer puts its quantizer between the two."""

    in_channels: int
    """C of the images."""

    @abstractmethod
    def grid(self, image_size: int) -> tuple[int, ...]:
        """The latent grid of a square image.

        Raises:
            ValueError: a size that the network cannot divide.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` in [-1, 1] to latents `(B, D, *grid)`.

        Raises:
            ValueError: a side that the network cannot divide.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """`(B, D, *grid)` to `(B, C, H, W)`, about [-1, 1] and not clamped."""
