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
        normed = self._normalise(x.float())
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:  # float32
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), weight, bias, eps=self.epsilon)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            normed = F.rms_norm(x, (self.width,), weight, eps=self.epsilon)
        else:
            # On a CPU `F.rms_norm` takes up to twice as long as its steps in place, which no gradient may pass.
            root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(self.width**-0.5)
            normed = x / root_mean_square.square_().add_(self.epsilon).sqrt_()
            normed = normed if weight is None else normed.mul_(weight)
        return normed if bias is None else normed + bias
