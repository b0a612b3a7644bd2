"""LayerNorm and RMSNorm."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            normed = F.rms_norm(x, (self.width,), weight, eps=self.epsilon)
        elif torch.is_grad_enabled():
            normed = cast(Tensor, _RMSNorm.apply(x, weight, self.epsilon))
        else:
            normed = _rms_norm(x, _inverse_root_mean_square(x, self.epsilon), weight)
        return normed if bias is None else normed + bias


class _RMSNorm(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4) for a CPU, where `F.rms_norm` and
    its gradients are many passes over memory (`benchmarks/training_transformer.py` says what that costs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        scale = _inverse_root_mean_square(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return _rms_norm(x, scale, weight)

    @staticmethod
    @once_differentiable
    # Autograd passes the context and the gradients by position; what `once_differentiable` wraps has no names for them.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            rows = (grad * x).flatten(0, -2)
            of_x = of_weight = None
            if weight is not None and ctx.needs_input_grad[1]:
                of_weight = rows.T @ scale.flatten()
            if ctx.needs_input_grad[0]:
                # y = w s x, and the scale s = (mean(x^2) + epsilon)^(-1/2) has the gradient -s^3 x / D.
                of_scale = (rows.sum(dim=1) if weight is None else rows @ weight).view_as(scale)
                of_x = grad * scale if weight is None else (grad * weight).mul_(scale)
                of_x.addcmul_(x, of_scale * scale**3, value=-1 / x.shape[-1])
        return of_x, of_weight, None


def _inverse_root_mean_square(x: Tensor, epsilon: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.mul_(x.shape[-1] ** -0.5).square_().add_(epsilon).rsqrt_()


def _rms_norm(x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    normed = x * scale
    return normed if weight is None else normed.mul_(weight)
