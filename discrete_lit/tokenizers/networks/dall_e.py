"""The convolutional autoencoder of DALL-E's dVAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021).

Four groups of residual blocks at 1/1, 1/2, 1/4 and 1/8 of the resolution, without norms (openai/DALL-E):

    block:   x -> shortcut(x) + gain * (ReLU, conv) four times, at a quarter of the width in between
    encoder: 7x7 of the mapped pixels, groups with max-pooling between them, ReLU
    decoder: groups with nearest up-sampling between them, ReLU, 1x1: mean and log scale of each mapped pixel

Pixels x in [0, 1] are mapped to `0.8 x + 0.1`, as the logit-Laplace loss maps them.
"""

from collections import OrderedDict
from itertools import pairwise
from math import sqrt

from torch import Tensor, nn

from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.tokenizers.losses.objective import map_pixels
from discrete_lit.tokenizers.networks.network import Autoencoder

# Of the width of each group against the first one's.
_MULTIPLIERS = (1, 2, 4, 8)


class DALLEAutoencoder(Autoencoder):
    """Encode images to latents of 8 times `channels` at 1/8 of the resolution, and decode codes of any width.

    A `DVAE` has the classifier of the latents and the table of codes: DALL-E's first decoder layer is a 1x1 convolution
    of one-hot ids, which is that table.

    Args:
        code_dim: width of the codes that the decoder takes, 128 in DALL-E; a tokenizer gives it.
        latent_dim: width of the latents, 8 times `channels`; a tokenizer gives it.
        image_channels: C of the images.
        out_channels: of the decoder's outputs; 2C by default, for the logit-Laplace loss.
        channels: width at full resolution; 256 in DALL-E.
        blocks: residual blocks of each group; 2 in DALL-E.

    Raises:
        ValueError: a setting out of its range, or another width of the latents.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int,
        *,
        image_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 256,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4 or blocks < 1:
            raise ValueError(
                f"channels must be a multiple of 4 and blocks at least 1, got channels={channels}, blocks={blocks}"
            )
        widths = [channels * multiplier for multiplier in _MULTIPLIERS]
        if latent_dim != widths[-1]:
            raise ValueError(
                f"a DALLEAutoencoder with channels={channels} has latents of width {widths[-1]}, got "
                f"latent_dim={latent_dim}"
            )
        self.image_channels = image_channels
        out_channels = 2 * image_channels if out_channels is None else out_channels
        self.conv_in = nn.Conv2d(image_channels, channels, 7, padding=3)
        self.encoder = _groups([channels, *widths], blocks, (3, 3, 3, 1), nn.MaxPool2d(2))
        self.decoder = _groups([code_dim, *reversed(widths)], blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2))
        self.conv_out = nn.Conv2d(channels, out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / sqrt(module.weight[0].numel()))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        sides = height_and_width(image_size)
        for side in sides:
            if side < 8 or side % 8:
                raise ValueError(f"image_size={side} is not a multiple of the down-sampling 8")
        return tuple(side // 8 for side in sides)

    def encode(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        self.grid((height, width))
        return self.encoder(self.conv_in(map_pixels(images)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.decoder(latents))


def _groups(widths: list[int], blocks: int, kernels: tuple[int, ...], between: nn.Module) -> nn.Sequential:
    """Groups of residual blocks with a change of resolution between them, and a ReLU at the end."""
    gain = 1 / (len(_MULTIPLIERS) * blocks) ** 2
    layers = OrderedDict[str, nn.Module]()
    for number, (before, width) in enumerate(pairwise(widths), start=1):
        group = OrderedDict[str, nn.Module]()
        for block in range(1, blocks + 1):
            group[f"block_{block}"] = BottleneckBlock(
                before if block == 1 else width, width, kernels=kernels, gain=gain
            )
        layers[f"group_{number}"] = nn.Sequential(group)
        if number < len(_MULTIPLIERS):
            layers[f"resample_{number}"] = between
    layers["activation"] = nn.ReLU()
    return nn.Sequential(layers)


class BottleneckBlock(nn.Module):
    """Add to an image, or a 1x1 convolution of it where the width changes, four convolutions of it times `gain`.

    Args:
        before: channels of the input.
        width: channels of the output; a quarter in between.
        kernels: sizes of the convolutions, each behind a ReLU.
        gain: of the convolutions' sum.
    """

    def __init__(self, before: int, width: int, *, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)
        sizes = [before, *[width // 4] * (len(kernels) - 1), width]
        residual = OrderedDict[str, nn.Module]()
        for place, ((enter, leave), kernel) in enumerate(zip(pairwise(sizes), kernels, strict=True), start=1):
            residual[f"relu_{place}"] = nn.ReLU()
            residual[f"conv_{place}"] = nn.Conv2d(enter, leave, kernel, padding=kernel // 2)
        self.residual = nn.Sequential(residual)

    def forward(self, x: Tensor) -> Tensor:  # (B, before, h, w) -> (B, width, h, w)
        return self.shortcut(x) + self.gain * self.residual(x)
