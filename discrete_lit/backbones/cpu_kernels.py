"""Everything that the backbones compute in a way of their own on a CPU, where PyTorch's way takes longer.

Four kernels: linear layers with packed weights, large products of linear layers in training, RMSNorm with its
gradients, and attention that is never in half precision while gradients are recorded. `enabled` is the one switch of
them all. Without them the layers compute the same up to rounding, by the plain PyTorch that stands in `layers.py` and
`blocks.py`.
"""

import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from discrete_lit.core.modules import at_least_float32

_SWITCH = os.environ.get("DISCRETE_LIT_CPU_KERNELS", "1")
if _SWITCH not in ("0", "1"):
    raise ValueError(f"the environment variable DISCRETE_LIT_CPU_KERNELS must be 0 or 1, got {_SWITCH!r}")

# Below, float32 products read the weight once in any layout.
_FEWEST_FLOAT32_ROWS = 8

# Below, PyTorch's products take as long in training: rows of the input, and both sides of the weight.
_FEWEST_TRAINED_ROWS, _SHORTEST_TRAINED_SIDE = 256, 96


def enabled(device: torch.device) -> bool:
    """Say whether the kernels of this file are used for tensors of a device.

    They are on a CPU, unless the environment variable `DISCRETE_LIT_CPU_KERNELS` was 0 when the program started.
    """
    return device.type == "cpu" and _SWITCH == "1"


# --- Linear layers with packed weights ---
# A product lays an unpacked weight out anew, and under autocast casts it anew, each time; with few rows that takes
# longer than the product.


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a copy of another one's weight, laid out once for the processor.

    It shares parameters, hooks and attributes with the other layer, whose weight must not change meanwhile. The
    packed product has no gradients.

    Args:
        layer: the other one; it stays as it is.
        dtype: precision of the product: float32 or bfloat16.
        rows: of the inputs to come; others work too.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, *, rows: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype).contiguous(), rows)
        self.packed_bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = input if input.dtype == self.packed.dtype else input.to(self.packed.dtype)
        product = packed_linear if torch.compiler.is_compiling() else _packed_product
        return product(rows, self.packed, self.packed_bias)


def packing_pays(weight: Tensor, dtype: torch.dtype, *, rows: int) -> bool:
    """Say whether packing a weight of a CPU saves time, and whether there is a product for it.

    It does for plain parameters (a sharded weight is none), in bfloat16 where the processor multiplies it, and in
    float32 from 8 rows on.
    """
    if type(weight) is not nn.Parameter or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and rows >= _FEWEST_FLOAT32_ROWS


def _packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


@torch.library.custom_op("discrete_lit::packed_linear", mutates_args=())
def packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a packed weight inside compiled modules: of itself, the compiler takes only packed constants.

    Args:
        rows: `(..., in_features)` in the weight's dtype.
        packed: `(out_features, in_features)` in oneDNN's layout.
        bias: `(out_features,)`.

    Returns:
        `(..., out_features)`.
    """
    return _packed_product(rows, packed, bias)


@packed_linear.register_fake
def _shape_of_packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], len(packed))


# --- Large products of linear layers in training ---
# In float32 PyTorch multiplies by another library than in bfloat16, and takes longer; `benchmarks/training_dit.py` says
# how much for a wide network; the quickstart's, 128 wide, gain less.


def trained_product_pays(input: Tensor, weight: Tensor) -> bool:
    """Say whether `trained_linear` saves time: for large float32 products that gradients are recorded of.

    Subclasses of tensors, such as those without data that operations are counted on, take PyTorch's way.
    """
    return (
        torch.is_grad_enabled()
        and type(input) in (Tensor, nn.Parameter)
        and type(weight) is nn.Parameter
        and input.dtype == weight.dtype == torch.float32
        and input.numel() >= _FEWEST_TRAINED_ROWS * input.shape[-1]
        and min(weight.shape) >= _SHORTEST_TRAINED_SIDE
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def trained_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply as `F.linear` does, by oneDNN, with first derivatives.

    Args:
        input: `(..., in_features)` float32.
        weight: `(out_features, in_features)` float32.
        bias: `(out_features,)`.

    Returns:
        `(..., out_features)`.
    """
    return cast(Tensor, _TrainedLinear.apply(input, weight, bias))


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _packed_product(input, weight, bias)

    @staticmethod
    @once_differentiable
    # See `_RMSNorm`.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _packed_product(grad, weight.T, None)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ input.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias


# --- RMSNorm ---
# `F.rms_norm` and its gradients are many passes over memory; `benchmarks/training_transformer.py` says what that costs.


def rms_norm(x: Tensor, weight: Tensor | None, *, epsilon: float) -> Tensor:
    """Normalise by the root mean square (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4).

    Args:
        x: `(..., D)` float32 or float64.
        weight: gains `(D,)`, of the same precision.
        epsilon: added to the mean square.

    Returns:
        `(..., D)`, of the same precision.
    """
    if torch.is_grad_enabled():
        return cast(Tensor, _RMSNorm.apply(x, weight, epsilon))
    return _scaled(x, _inverse_root_mean_square(x, epsilon), weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        scale = _inverse_root_mean_square(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return _scaled(x, scale, weight)

    @staticmethod
    @once_differentiable
    # Autograd passes the context and the gradients by position; what `once_differentiable` wraps has no names for them.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            rows = (grad * x).flatten(0, -2)
            grad_x = grad_weight = None
            if weight is not None and ctx.needs_input_grad[1]:
                grad_weight = rows.T @ scale.flatten()
            if ctx.needs_input_grad[0]:
                # y = w s x, and the scale s = (mean(x^2) + epsilon)^(-1/2) has the gradient -s^3 x / D.
                grad_scale = (rows.sum(dim=1) if weight is None else rows @ weight).view_as(scale)
                grad_x = grad * scale if weight is None else (grad * weight).mul_(scale)
                grad_x.addcmul_(x, grad_scale * scale**3, value=-1 / x.shape[-1])
        return grad_x, grad_weight, None


def _inverse_root_mean_square(x: Tensor, epsilon: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.mul_(x.shape[-1] ** -0.5).square_().add_(epsilon).rsqrt_()


def _scaled(x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    normed = x * scale
    return normed if weight is None else normed.mul_(weight)


# --- Attention ---


def wider_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Attend in float32 at least, also under autocast: the backward pass of bfloat16 attention is far slower.

    (Of torch 2.14.)

    Args:
        query, key, value: `(B, heads, n, head_dim)`.
        settings: of `F.scaled_dot_product_attention`.

    Returns:
        `(B, heads, n, head_dim)` in the precision of the query.
    """
    q, k, v = (at_least_float32(each) for each in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, **settings).to(query.dtype)
