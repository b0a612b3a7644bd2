from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.library.custom_op("discrete_lit::packed_linear", mutates_args=())
def packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a packed weight for compiled modules: the compiler takes packed weights that are constants alone.

    Args:
        rows: `(..., in_features)` in the weight's dtype.
        packed: `(out_features, in_features)` in oneDNN's layout.
        bias: `(out_features,)`.

    Returns:
        `(..., out_features)`.
    """
    return packed_product(rows, packed, bias)


@packed_linear.register_fake
def _shape_of_packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], len(packed))


def packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4) for a CPU, where `F.rms_norm` and
    its gradients are many passes over memory (`benchmarks/training_transformer.py` says what that costs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        scale = inverse_root_mean_square(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return rms_norm(x, scale, weight)

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


def inverse_root_mean_square(x: Tensor, epsilon: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.mul_(x.shape[-1] ** -0.5).square_().add_(epsilon).rsqrt_()


def rms_norm(x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    normed = x * scale
    return normed if weight is None else normed.mul_(weight)
