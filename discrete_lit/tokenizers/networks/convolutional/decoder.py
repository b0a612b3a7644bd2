"""Codes to images."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks.convolutional.encoder import Level, middle
from discrete_lit.tokenizers.networks.convolutional.layers import AdaptiveNorm, Layers
from discrete_lit.tokenizers.networks.convolutional.resampling import Upsampling, upsample


class Decoder(nn.Module):
    """Residual blocks at each resolution, one doubling between two resolutions; `levels` runs from the lowest up."""

    def __init__(
        self,
        layers: Layers,
        code_dim: int,
        code_kernel: int | None,
        z_channels: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Collection[int],
        middle_blocks: int,
        middle_attention: bool,
        upsampling: Upsampling,
        adaptive_norm: bool,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.from_codes = nn.Identity()
        if code_kernel is not None:
            self.from_codes = layers.convolution(code_dim, z_channels, code_kernel)
        current = widths[-1]
        self.conv_in = layers.convolution(z_channels, current, 3)
        self.middle = middle(layers, current, middle_blocks, middle_attention)
        self.levels = nn.ModuleList()
        self.adaptive_norms = nn.ModuleList()
        for level in reversed(range(len(widths))):
            if adaptive_norm:
                self.adaptive_norms.append(AdaptiveNorm(layers, current, z_channels))
            double = upsample(upsampling, layers, widths[level]) if level > 0 else None
            self.levels.append(Level(layers, current, widths[level], blocks, level in attention_levels, double))
            current = widths[level]
        self.norm_out = layers.norm(current)
        self.conv_out = layers.convolution(current, out_channels, 3)

    def forward(self, codes: Tensor) -> Tensor:  # (B, code_dim, *grid) -> (B, out_channels, *size)
        z = self.from_codes(codes)
        x = self.middle(self.conv_in(z))
        for place, level in enumerate(self.levels):
            if self.adaptive_norms:
                x = self.adaptive_norms[place](x, z)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
