"""The loss of an image autoencoder, term by term."""

from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.losses.pixels import PixelLoss


class Objective(nn.Module):
    """Compares what a decoder gave with the images.

    Args:
        reconstruction_loss: between pixels.
    """

    def __init__(self, reconstruction_loss: PixelLoss) -> None:
        super().__init__()
        self.pixel_loss = {"l1": F.l1_loss, "l2": F.mse_loss}[reconstruction_loss]

    def forward(self, outputs: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Of outputs and images `(B, C, H, W)`: scalar terms, each already multiplied by its weight."""
        return {"reconstruction": self.pixel_loss(outputs, images)}

    def images(self, outputs: Tensor) -> Tensor:
        """The images `(B, C, H, W)` in [-1, 1] that a decoder's outputs stand for."""
        return outputs.clamp(-1, 1)
