"""The discriminator of patches (Isola et al., "Image-to-Image Translation", CVPR 2017, section 3.2.2)."""

from math import gcd
from typing import Literal

from torch import Tensor, nn

from discrete_lit.tokenizers.losses.discriminators.discriminator import Discriminator
from discrete_lit.tokenizers.losses.discriminators.synchronized_norm import SynchronizedBatchNorm

_NORM_GROUPS = 32


class PatchGAN(Discriminator):
    """4x4 convolutions that judge every patch; with three layers a patch is 70x70 pixels.

    Convolutions, their order and their initialisation are those of taming's `NLayerDiscriminator`, and with
    `norm="sync"` the names of the weights too.

    Args:
        in_channels: C of the images.
        width: channels of the first layer; they double up to eight times that.
        layers: convolutions of stride 2.
        norm: `"group"` treats every image alone; `"sync"` is batch normalisation over all ranks, the paper's, with
            which reals and reconstructions are normalised apart.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 64, layers: int = 3, norm: Literal["group", "sync"] = "group"
    ) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"width and layers of PatchGAN must be at least 1, got width={width}, layers={layers}")
        if norm not in ("group", "sync"):
            raise ValueError(f"norm of PatchGAN must be 'group' or 'sync', got {norm!r}")
        self.smallest = 3 * 2**layers
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        made: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            # The norm brings a bias of its own.
            made.append(nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False))
            made += [_norm(norm, widths[layer]), nn.LeakyReLU(0.2)]
        made.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*made)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1, h, w)
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this PatchGAN judges images of at least {self.smallest}x{self.smallest} pixels, got "
                f"{tuple(images.shape[-2:])}; give it fewer layers"
            )
        return self.main(images)


def _norm(kind: str, width: int) -> nn.Module:
    return SynchronizedBatchNorm(width) if kind == "sync" else nn.GroupNorm(gcd(width, _NORM_GROUPS), width)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, SynchronizedBatchNorm | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
