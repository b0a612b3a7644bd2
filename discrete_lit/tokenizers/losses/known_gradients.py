"""Gradients that are taken in the forward pass, and a loss that hands them on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def take_gradients(
    value: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    **options: bool,
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` inside a forward pass: autocast, which would reach the backward pass too, is off."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.autograd.grad(value, inputs, grad_outputs, **options)  # type: ignore[arg-type]


def with_known_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose gradient with respect to each input is the given one.

    The gradients are not differentiated further.

    Args:
        value: scalar.
        inputs: tensors of any shape that require a gradient.
        gradients: one of each input's shape.
    """
    return _KnownGradients.apply(value.detach(), list(gradients), *inputs)  # type: ignore[no-any-return]


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        return None, None, *(scale * gradient for gradient in ctx.saved_tensors)
