"""The discriminator of whole clips with which MAGVIT and MAGVIT-v2 train their tokenizers, for `AdversarialLoss`."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import ceil, prod, sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import check_channels, clip_size
from discrete_lit.tokenizers.losses.discriminators import Discriminator

Pooling = Literal["blur", "average"]
"""How a clip is halved: behind a binomial filter of four positions along each axis, or by the mean of neighbours."""

_activate = partial(F.leaky_relu, negative_slope=0.2)


class ClipStyleGANDiscriminator(Discriminator):
    """Give one logit to a clip by residual blocks of three axes, each of which halves time, height and width.

    The layout is that of MAGVIT's published code (google-research/magvit, `stylegan_discriminator_3d.py`; Yu et al.,
    "MAGVIT: Masked Generative Video Transformer", CVPR 2023, appendix A.2), StyleGAN2's with another axis:

        3x3x3 convolution -> blocks -> 3x3x3 convolution -> linear layer -> logit
        block(x) = (1x1x1(halve(x)) + 3x3x3(halve(3x3x3(x)))) / sqrt(2)

    with leaky ReLUs of slope 0.2 behind every convolution but the shortcuts' and no norms. The halving is MAGVIT-v2's,
    a 3-D blur (Yu et al., "Language Model Beats Diffusion", ICLR 2024, section 3.2), or with `pooling: average` that of
    MAGVIT. `width` is 64 in their base models and 128 in the large ones. Axes of an odd length are rounded up: 17
    frames end as one, behind five blocks.

    An image, of a batch between clips, is shown as a clip that stands still.

    Args:
        image_size: of the clips: `[frames, height, width]`.
        image_channels: C.
        width: channels of the first convolution.
        multipliers: channels of each block as a multiple of `width`.
        pooling: how a block halves the clip.

    Raises:
        ValueError: a setting out of its range; in use, clips of another size.
    """

    sees_clips = True

    def __init__(
        self,
        image_size: tuple[int, int, int],
        *,
        image_channels: int = 3,
        width: int = 64,
        multipliers: Sequence[int] = (2, 4, 4, 4, 4),
        pooling: Pooling = "blur",
    ) -> None:
        super().__init__()
        if width < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError(
                "width and multipliers of ClipStyleGANDiscriminator must be at least 1, got "
                f"width={width}, multipliers={list(multipliers)}"
            )
        if pooling not in ("blur", "average"):
            raise ValueError(f"pooling of ClipStyleGANDiscriminator must be 'blur' or 'average', got {pooling!r}")
        self.image_size = clip_size(image_size)
        self.image_channels = image_channels
        widths = [width, *(width * multiplier for multiplier in multipliers)]
        left = prod(ceil(side / 2 ** len(multipliers)) for side in self.image_size)
        self.stem = nn.Conv3d(image_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_ClipBlock(*pair, pooling=pooling) for pair in pairwise(widths)))
        self.last = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * left, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits `(B, 1)` of clips `(B, C, T, H, W)`, or of images `(B, C, H, W)`."""
        check_channels(images, self.image_channels, "ClipStyleGANDiscriminator")
        if images.ndim == 4:
            images = images[:, :, None].expand(-1, -1, self.image_size[0], -1, -1)
        if images.shape[2:] != self.image_size:
            raise ValueError(
                f"this ClipStyleGANDiscriminator was made for image_size={list(self.image_size)}, got clips of "
                f"{list(images.shape[2:])}"
            )
        hidden = _activate(self.last(self.blocks(_activate(self.stem(images)))))
        return self.logit(_activate(self.hidden(hidden.flatten(1))))


def _initialise(module: nn.Module) -> None:
    """Begin as MAGVIT does: weights uniform by Xavier's rule, biases 0."""
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _ClipBlock(nn.Module):
    def __init__(self, in_width: int, out_width: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.first = nn.Conv3d(in_width, in_width, 3, padding=1)
        self.second = nn.Conv3d(in_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv3d(in_width, out_width, 1, bias=False)
        self.halve = _ClipBlurPool() if pooling == "blur" else _ClipAveragePool()

    def forward(self, x: Tensor) -> Tensor:  # (B, in, t, h, w) -> (B, out, t/2, h/2, w/2), rounded up
        hidden = _activate(self.second(self.halve(_activate(self.first(x)))))
        return (self.shortcut(self.halve(x)) + hidden) / sqrt(2)


class _ClipBlurPool(nn.Module):
    """Halve a clip behind a binomial filter of 4 x 4 x 4, zeros around it."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.einsum("i,j,k->ijk", binomial, binomial, binomial), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, t, h, w) -> (B, c, t/2, h/2, w/2)
        width = x.shape[1]
        padding = [end for side in reversed(x.shape[2:]) for end in (1, 1 + side % 2)]
        kernel = self.kernel.to(x.dtype).expand(width, 1, 4, 4, 4)
        return F.conv3d(F.pad(x, padding), kernel, stride=2, groups=width)


class _ClipAveragePool(nn.Module):
    """Halve a clip by the mean of each two neighbours along each axis, of those that there are."""

    def forward(self, x: Tensor) -> Tensor:  # (B, c, t, h, w) -> (B, c, t/2, h/2, w/2)
        return F.avg_pool3d(x, 2, ceil_mode=True, count_include_pad=False)
