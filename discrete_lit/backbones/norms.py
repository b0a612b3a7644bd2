"""LayerNorm and RMSNorm."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NormKind = Literal["layer", "rms"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32 under autocast.

    Args:
        width: of the last dimension.
        kind: `"layer"` or `"rms"`.
        affine: with a learned gain.
        bias: with a learned offset too; by default where a LayerNorm has a gain.
        epsilon: added to the variance or the mean square.
    """

    def __init__(
        self, width: int, kind: NormKind, affine: bool = True, bias: bool | None = None, epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.kind = kind
        self.width = width
        self.epsilon = epsilon
        with_bias = affine and (kind == "layer" if bias is None else bias)
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if self.kind == "layer":
            return F.layer_norm(x.float(), (self.width,), weight, bias, eps=self.epsilon).to(x.dtype)
        normed = F.rms_norm(x.float(), (self.width,), weight, eps=self.epsilon)
        return (normed if bias is None else normed + bias).to(x.dtype)
