"""What a discriminator is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Discriminator(nn.Module, ABC):
    """Tells images from reconstructions."""

    def prepare(self) -> None:
        """Read the weights of what is frozen, if anything is.

        Raises:
            ValueError: there are none where they should be, or they are another network's.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, about [-1, 1], to logits `(B, ...)`, one or several of each: high for real ones."""
