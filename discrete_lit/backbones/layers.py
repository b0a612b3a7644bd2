"""The layers that every block is built of: a linear layer, LayerNorm and RMSNorm, and the head that makes logits.

Norms and logits are computed in float32 under autocast and in half-precision modules, in float64 in modules of float64.
What a CPU computes in a way of its own stands in `cpu_kernels.py`, the logits' way on tensor cores in
`split_products.py`.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import cpu_kernels, split_products
from discrete_lit.core.modules import at_least_float32, widened

NormKind = Literal["layer", "rms"]


class Linear(nn.Linear):
    """A `torch.nn.Linear` that `discrete_lit.backbones.backbone.packed` replaces, and that may ignore autocast.

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        autocast: false multiplies in float32 or float64, also under autocast; see `full_precision_linear`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, autocast: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.autocast = autocast

    @property
    def product_dtype(self) -> torch.dtype:
        """The precision that the product is computed in."""
        device = self.weight.device.type
        if self.autocast and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype if self.autocast else widened(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self.autocast:
            if cpu_kernels.enabled(self.weight.device) and cpu_kernels.trained_product_pays(input, self.weight):
                return cpu_kernels.trained_linear(input, self.weight, self.bias)
            return super().forward(input)
        output = full_precision_linear(input, self.weight)
        return output if self.bias is None else output + self.bias


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32 or float64.

    Args:
        width: D, of the last dimension.
        kind: `"layer"` or `"rms"`.
        affine: with a learned gain.
        bias: with a learned offset too; by default where a LayerNorm has a gain.
        epsilon: added to the variance or the mean square.
    """

    def __init__(
        self, width: int, kind: NormKind, *, affine: bool = True, bias: bool | None = None, epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.kind = kind
        self.width = width
        self.epsilon = epsilon
        with_bias = affine and (kind == "layer" if bias is None else bias)
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        normed = self._normalise(at_least_float32(x))
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:  # float32 or float64
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), weight, bias, eps=self.epsilon)
        if cpu_kernels.enabled(x.device) and not torch.compiler.is_compiling():
            normed = cpu_kernels.rms_norm(x, weight, epsilon=self.epsilon)
        else:
            normed = F.rms_norm(x, (self.width,), weight, eps=self.epsilon)
        return normed if bias is None else normed + bias


class LogitHead(nn.Module):
    """The last hidden states to logits, in float32 or float64.

    Args:
        width: D.
        outputs: logits of a position: K for each of its ids.
        positions: of the grid; needed where each has a bias of its own.
        transform: with BERT's linear layer, GELU and LayerNorm first; `"gelu_tanh"` is that GELU's approximation.
        bias: a learned offset of the logits: none, one for all positions, or one of each (`"place"`: MaskBit's BERT).
        tied: the weight is the token embedding's.
        epsilon: of the transform's norm.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        positions: int = 1,
        transform: bool | Literal["gelu_tanh"] = False,
        bias: bool | Literal["place"] = False,
        tied: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.transform = None
        if transform:
            gelu = nn.GELU(approximate="tanh" if transform == "gelu_tanh" else "none")
            self.transform = nn.Sequential(nn.Linear(width, width), gelu, Norm(width, "layer", epsilon=epsilon))
        self.project = None if tied else Linear(width, outputs, bias=False, autocast=False)
        shape = (positions, outputs) if bias == "place" else (outputs,)
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self.of_positions = bias == "place"

    def forward(self, hidden: Tensor, tied: Tensor | None = None) -> Tensor:
        """Map `(..., D)` to logits `(..., outputs)`; `tied` is the embedding's weight `(outputs, D)`."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.project is not None:
            logits = self.project(hidden)
        else:
            assert tied is not None
            logits = full_precision_linear(hidden, tied)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)


def full_precision_linear(input: Tensor, weight: Tensor) -> Tensor:
    """Multiply in the precision of the weight, at least float32, also under autocast.

    The product and its operands are not rounded to half precision; under autocast the gradients are products in its
    precision, as those of every other layer. On GPUs whose float32 is slow beside their tensor cores, the product of
    float32 numbers under autocast, and of a layer in half precision, is a `split_product`, exact to
    `2^-15 sum |x| |w|`; the gradients of a layer in half precision are then products in that.

    Args:
        input: `(..., in_features)`.
        weight: `(out_features, in_features)`.

    Returns:
        `(..., out_features)` in the weight's dtype, or float32 where that is narrower.
    """
    device, dtype = input.device.type, widened(weight.dtype)
    autocast = torch.is_autocast_enabled(device)
    split = (autocast or weight.dtype != dtype) and split_products.pays(input, weight)
    if not (autocast or split):
        return F.linear(input.to(dtype), weight.to(dtype))
    gradients = torch.get_autocast_dtype(device) if autocast else weight.dtype
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            return _wide_product(input, weight, split)
        return cast(Tensor, _FullPrecisionLinear.apply(input, weight, gradients, split))


def _wide_product(input: Tensor, weight: Tensor, split: bool) -> Tensor:
    if split:
        return split_products.split_product(input, weight)
    weight = at_least_float32(weight)
    return F.linear(input.to(weight.dtype), weight)


class _FullPrecisionLinear(torch.autograd.Function):
    """The product in float32 or float64, its gradients in another precision."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, gradients: torch.dtype, split: bool) -> Tensor:
        ctx.save_for_backward(input.to(gradients), weight)
        ctx.input_dtype = input.dtype
        return _wide_product(input, weight, split)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        missing = split_products.missing_rows(weight)
        grad = _padded(grad_outputs[0], input.dtype, columns=missing)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ _padded(weight, input.dtype, rows=missing)).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            product = grad.flatten(0, -2).T @ input.flatten(0, -2)
            grad_weight = product[: len(weight)].to(weight.dtype)
        return grad_input, grad_weight, None, None


def _padded(values: Tensor, dtype: torch.dtype, *, rows: int = 0, columns: int = 0) -> Tensor:
    """Convert `(..., n, m)` to a precision, with so many rows and columns of zeros more, in one pass."""
    if rows == columns == 0:
        return values.to(dtype)
    *batch, n, m = values.shape
    padded = values.new_empty(*batch, n + rows, m + columns, dtype=dtype)
    padded[..., n:, :] = 0
    padded[..., m:] = 0
    padded[..., :n, :m] = values
    return padded
