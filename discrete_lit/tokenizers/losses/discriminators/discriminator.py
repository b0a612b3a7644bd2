"""What a discriminator is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Discriminator(nn.Module, ABC):
    """Images `(B, C, H, W)`, about [-1, 1], to logits: high for real ones.

    In two parts: a frozen one, `features`, and a trained one, `judge`. Where nothing is frozen, the images are their
    own features.
    """

    def prepare(self) -> None:
        """Read the weights of what is frozen.

        Raises:
            ValueError: there are none where they should be, or they are another network's.
        """

    def features(self, images: Tensor) -> list[Tensor]:
        """What the frozen part makes of images `(B, C, H, W)`: tensors with the batch first."""
        return [images]

    @abstractmethod
    def judge(self, features: list[Tensor]) -> Tensor:
        """Features to logits `(B, ...)`, as many for an image as the discriminator judges places."""

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, ...)`."""
        return self.judge(self.features(images))
