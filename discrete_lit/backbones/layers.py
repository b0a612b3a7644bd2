"""A linear layer whose weight can be laid out for a processor, or that multiplies in full precision under autocast.

LayerNorm and RMSNorm.

From the last hidden states to logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.cpu_kernels import (
    RMSNormFunction,
    inverse_root_mean_square,
    packed_linear,
    packed_product,
    rms_norm,
)

# Below, float32 products read the weight once in any layout.
_FEWEST_FLOAT32_ROWS = 8


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
            product = packed_linear if torch.compiler.is_compiling() else packed_product
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
            normed = cast(Tensor, RMSNormFunction.apply(x, weight, self.epsilon))
        else:
            normed = rms_norm(x, inverse_root_mean_square(x, self.epsilon), weight)
        return normed if bias is None else normed + bias


class LogitHead(nn.Module):
    """Logits in float32.

    Args:
        width: D.
        places: of the grid.
        outputs: K for each part.
        transform: a linear layer, GELU and LayerNorm first, BERT's.
        bias: a learned offset of the logits: none, one for all places, or one of each place (MaskBit's BERT).
        tied: the weight is the token embedding's.
        epsilon: of the transform's norm.
    """

    def __init__(
        self,
        width: int,
        places: int,
        outputs: int,
        transform: bool,
        bias: bool | Literal["place"],
        tied: bool,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.transform = None
        if transform:
            self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), Norm(width, "layer", epsilon=epsilon))
        self.project = None if tied else Linear(width, outputs, bias=False, autocast=False)
        shape = (places, outputs) if bias == "place" else (outputs,)
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, hidden: Tensor, tied: Tensor | None = None) -> Tensor:
        """`(B, n, D)` to `(B, n, outputs)`; `tied` is the embedding's weight `(outputs, D)`."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.project is not None:
            logits = self.project(hidden).float()
        else:
            assert tied is not None
            logits = full_precision_linear(hidden, tied).float()
        return logits if self.bias is None else logits + self.bias.float()
