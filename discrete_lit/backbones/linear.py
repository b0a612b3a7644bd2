"""A linear layer whose weight can be laid out for a processor, or that multiplies in full precision under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below, float32 products read the weight once in any layout.
_FEWEST_FLOAT32_ROWS = 8


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
    return _product(rows, packed, bias)


@packed_linear.register_fake
def _shape_of_packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], len(packed))


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class Linear(nn.Linear):
    """`torch.nn.Linear`, with the same parameters; it multiplies by the packed weight while `packed_weights` is on.

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        autocast: false multiplies in the weight's own precision, also under autocast; see `full_precision_linear`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, autocast: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.autocast = autocast
        self.packed: Tensor | None = None
        self.packed_bias: Tensor | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """What the product is computed in."""
        device = self.weight.device.type
        if self.autocast and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def pack(self, rows: int) -> None:
        """Keep a copy of the weight in oneDNN's layout.

        Args:
            rows: of the inputs to come; others work too.
        """
        dtype = self.product_dtype
        weight = self.weight.detach().to(dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.packed_bias = None if self.bias is None else self.bias.detach().to(dtype)

    def unpack(self) -> None:
        """Drop the copy."""
        self.packed = self.packed_bias = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None:
            rows = input if input.dtype == self.packed.dtype else input.to(self.packed.dtype)
            product = packed_linear if torch.compiler.is_compiling() else _product
            return product(rows, self.packed, self.packed_bias)
        if self.autocast:
            return super().forward(input)
        output = full_precision_linear(input, self.weight)
        return output if self.bias is None else output + self.bias


def full_precision_linear(input: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` in the precision of the weight, also under autocast.

    What it gives is not rounded to autocast's precision, and nor are its operands; the gradients are products in that
    precision, as those of every other layer.

    Args:
        input: `(..., in_features)`.
        weight: `(out_features, in_features)`.

    Returns:
        `(..., out_features)` in the weight's dtype.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return F.linear(input.to(weight.dtype), weight)
    gradients = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            return F.linear(input.to(weight.dtype), weight)
        return cast(Tensor, _FullPrecisionLinear.apply(input.to(weight.dtype), weight, gradients))


class _FullPrecisionLinear(torch.autograd.Function):
    """The product in its operands' precision, its gradients in another."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, gradients: torch.dtype) -> Tensor:
        ctx.save_for_backward(input.to(gradients), weight)
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        of_output = grad_outputs[0].to(input.dtype)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = (of_output @ weight.to(input.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (of_output.flatten(0, -2).T @ input.flatten(0, -2)).to(weight.dtype)
        return of_input, of_weight, None


@contextmanager
def packed_weights(module: nn.Module, rows: int) -> Iterator[None]:
    """While it is open, the `Linear` layers inside multiply by packed copies of their weights, made once.

    On a processor an unpacked weight is laid out anew, and under autocast cast anew, by each product; with few rows
    that takes longer than the product. Nothing is packed on other devices, where it does not pay, for sharded weights,
    and while gradients are recorded: the packed product has none. The copies take as much memory as the weights.

    Args:
        module: any; weights must not change meanwhile.
        rows: of the inputs to most products.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Linear)]
    try:
        for layer in layers:
            if not torch.is_grad_enabled() and _pays(layer, rows):
                layer.pack(rows)
        yield
    finally:
        for layer in layers:
            layer.unpack()


def _pays(layer: Linear, rows: int) -> bool:
    # A sharded weight is no plain parameter.
    if layer.weight.device.type != "cpu" or type(layer.weight) is not nn.Parameter:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if layer.product_dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return layer.product_dtype == torch.float32 and rows >= _FEWEST_FLOAT32_ROWS
