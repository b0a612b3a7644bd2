"""What a feature extractor is: uint8 images to float32 features, the same whatever the precision of training."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module, ABC):
    """A fixed network whose pooled features a Fréchet distance is taken over.

    Subclasses set the attributes below and implement `extract`. Calling the extractor runs `extract` without
    gradients, in float32, with autocast and TF32 off, and always in eval mode: a distance computed inside a bf16
    training run is the same number as one computed alone.
    """

    name: str
    """Names the network and its weights in reports; the distance is called `FD-<name>`."""
    dim: int
    """Width of the features."""
    protocol: str
    """How pixels become the network's input, in words: resize and range."""
    weights_sha256: str
    """SHA-256 of the weight file: two distances are comparable only if it agrees."""

    @property
    def metric_name(self) -> str:
        """What a Fréchet distance over these features is called."""
        return f"FD-{self.name}"

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """uint8 `(B, 3, H, W)` to features `(B, dim)`."""

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `(B, 3, H, W)` in 0..255 to float32 `(B, dim)`.

        Raises:
            ValueError: images that are not uint8 with three channels (use `discrete_lit.images.to_uint8`).
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{type(self).__name__} takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                "discrete_lit.images.to_uint8 makes them from floats in [-1, 1]"
            )
        tf32_off = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), tf32_off:
            features = self.extract(images)
        assert features.shape == (len(images), self.dim), (features.shape, self.dim)
        return features.float()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: `mode` is ignored, so that a module that holds an extractor cannot change it."""
        return super().train(False)
