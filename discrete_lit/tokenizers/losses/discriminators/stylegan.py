"""The discriminator of StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality", CVPR 2020)."""

from itertools import pairwise
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.losses.discriminators.discriminator import Discriminator

_LEAST_SIZE = 4


class StyleGANDiscriminator(Discriminator):
    """Residual blocks that halve the image behind a blur down to 4x4, and one logit for an image.

    As in MaskGIT's port of it, layers are ordinary ones instead of equalised.

    Args:
        image_size: of the square images: 4 times a power of 2.
        in_channels: C of the images.
        width: channels at full resolution; they double with every halving.
        max_width: channels at most.
        group_size: images whose deviation is shown to the last layers (minibatch deviation: Karras et al.,
            "Progressive Growing of GANs", ICLR 2018, section 3), at most; 1 leaves it out. Groups are neighbours in
            the batch, so it must divide the batch of a rank for several ranks to be as one.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self, image_size: int, in_channels: int = 3, width: int = 64, max_width: int = 512, group_size: int = 4
    ) -> None:
        super().__init__()
        halvings = max(image_size // _LEAST_SIZE, 1).bit_length() - 1
        if image_size != _LEAST_SIZE * 2**halvings:
            raise ValueError(f"image_size of StyleGANDiscriminator must be 4 times a power of 2, got {image_size}")
        if min(width, max_width, group_size) < 1:
            raise ValueError(
                "width, max_width and group_size of StyleGANDiscriminator must be at least 1, got "
                f"{width}, {max_width} and {group_size}"
            )
        widths = [min(width * 2**level, max_width) for level in range(halvings + 1)]
        self.image_size = image_size
        self.group_size = group_size
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.last = nn.Conv2d(widths[-1] + (group_size > 1), widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * _LEAST_SIZE**2, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1)
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this StyleGANDiscriminator was made for image_size={self.image_size}, got images of "
                f"{tuple(images.shape[-2:])}"
            )
        hidden = self.blocks(_activate(self.stem(images)))
        if self.group_size > 1:
            hidden = torch.cat((hidden, _group_deviation(hidden, self.group_size)), dim=1)
        hidden = _activate(self.last(hidden)).flatten(1)
        return self.logit(_activate(self.hidden(hidden)))


class _Block(nn.Module):
    blur: Tensor

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_width, in_width, 3, padding=1)
        self.second = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_width, out_width, 1, bias=False)
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", torch.outer(binomial, binomial) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, h, w) -> (B, out, h/2, w/2)
        hidden = _activate(self.second(self._halve(_activate(self.first(x)))))
        return (self.shortcut(self._halve(x)) + hidden) / sqrt(2)

    def _halve(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        kernel = cast(Tensor, self.blur).to(x.dtype).expand(width, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=width)


def _activate(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance, as StyleGAN's."""
    return F.leaky_relu(x, 0.2) * sqrt(2)


def _group_deviation(hidden: Tensor, group_size: int) -> Tensor:
    """`(B, C, h, w)` to `(B, 1, h, w)`: the mean deviation over the images of each group, float32."""
    batch, _, height, width = hidden.shape
    group = next(size for size in range(min(group_size, batch), 0, -1) if batch % size == 0)
    groups = hidden.float().reshape(batch // group, group, -1)
    deviation = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=1)  # (groups,)
    spread = deviation.repeat_interleave(group)[:, None, None, None]
    return spread.expand(-1, 1, height, width).to(hidden.dtype)
