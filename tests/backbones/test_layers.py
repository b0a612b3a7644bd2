"""Norms against their formulas in float64, with gradients recorded or not; linear layers under autocast."""

import pytest
import torch
from torch import nn

from discrete_lit.backbones import cpu_kernels
from discrete_lit.backbones.layers import Linear, Norm

WIDTH, EPSILON = 24, 1e-3


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("affine", "bias"), [(False, None), (True, None), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_is_its_formula(kind, affine: bool, bias: bool | None, recorded: bool, switch: str, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_SWITCH", switch)
    norm = Norm(WIDTH, kind, affine=affine, bias=bias, epsilon=EPSILON)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (torch.randn(2, 5, WIDTH) * torch.logspace(-4, 2, 5)[:, None] + 0.01).requires_grad_()
    kept = x.detach().clone()
    with torch.set_grad_enabled(recorded):
        found = norm(x)
    exact = x.double()
    if kind == "layer":
        exact = exact - exact.mean(dim=-1, keepdim=True)
    exact = exact / (exact.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
    if norm.weight is not None:
        exact = exact * norm.weight.double()
    if norm.bias is not None:
        exact = exact + norm.bias.double()
    assert (norm.bias is not None) == (affine and (kind == "layer" if bias is None else bias))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)
    if recorded:
        weights = torch.randn_like(x)
        inputs = (x, *norm.parameters())
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
        expected = torch.autograd.grad((exact * weights).sum(), inputs)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_gradients_under_autocast_are_those_of_float32() -> None:
    norm, x = Norm(WIDTH, "rms", epsilon=EPSILON), torch.randn(3, WIDTH, requires_grad=True)
    weights, gain = torch.randn(3, WIDTH), norm.weight
    assert gain is not None
    expected = torch.autograd.grad((norm(x) * weights).sum(), (x, gain))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((norm(x) * weights).sum(), (x, gain))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("learned", ["input", "gain"])
def test_gradient_of_what_is_learned_alone(learned: str) -> None:
    norm, x = Norm(WIDTH, "rms"), torch.randn(3, WIDTH)
    gain = norm.weight
    assert gain is not None
    x.requires_grad_(learned == "input")
    gain.requires_grad_(learned == "gain")
    norm(x).sum().backward()
    assert (x.grad is not None, gain.grad is not None) == (learned == "input", learned == "gain")


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_rounded_values_is_computed_in_float32(kind, recorded: bool) -> None:
    norm, x = Norm(WIDTH, kind, epsilon=EPSILON), torch.randn(3, WIDTH).bfloat16()
    with torch.set_grad_enabled(recorded):
        assert torch.equal(norm(x), norm(x.float()).bfloat16())
        assert torch.equal(norm.bfloat16()(x), norm.float()(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_full_precision_product_and_gradients(autocast: bool) -> None:
    """The output is that of float32 to the last bit, the gradients are as close as autocast's products are."""
    rows = torch.randn(3, 5, 48, requires_grad=True)
    layer = Linear(48, 80, autocast=False)
    weights = torch.randn(3, 5, 80)
    expected = nn.functional.linear(rows, layer.weight, layer.bias)
    (expected * weights).sum().backward()
    exact = [tensor.grad.clone() for tensor in (rows, layer.weight, layer.bias)]
    for tensor in (rows, layer.weight, layer.bias):
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(rows)
    assert output.dtype == torch.float32 and torch.equal(output, expected)
    (output * weights).sum().backward()
    found = [tensor.grad for tensor in (rows, layer.weight, layer.bias)]
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, exact, rtol=1e-2 if autocast else 0, atol=0.1 if autocast else 0)
    assert torch.equal(found[1], exact[1]) is not autocast


def test_full_precision_gradients_only_where_they_are_asked_for() -> None:
    frozen = Linear(8, 4, bias=False, autocast=False).requires_grad_(False)
    rows = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        frozen(rows).sum().backward()
        frozen(rows.detach())
    assert frozen.weight.grad is None and rows.grad is not None
    learned = Linear(8, 4, bias=False, autocast=False)
    with torch.autocast("cpu", torch.bfloat16):
        learned(rows.detach()).sum().backward()
    assert learned.weight.grad.shape == (4, 8)
