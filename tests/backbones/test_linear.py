"""Packed weights change how a product is computed, not what it is."""

import pytest
import torch
from torch import nn

from discrete_lit.backbones.layers import Linear, packed_weights

ROWS = 16


@pytest.fixture
def layers() -> nn.Sequential:
    return nn.Sequential(Linear(48, 80), nn.GELU(), Linear(80, 32, bias=False), Linear(32, 16, autocast=False))


def packed_ones(layers: nn.Module) -> list[bool]:
    return [layer.packed is not None for layer in layers.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("rows", [1, ROWS, 100])
@torch.no_grad()
def test_packed_products_are_the_plain_ones(layers: nn.Sequential, rows: int) -> None:
    x = torch.randn(rows, 3, 48)
    plain = layers(x)
    with packed_weights(layers, ROWS):
        assert all(packed_ones(layers))
        torch.testing.assert_close(layers(x), plain, rtol=0, atol=1e-5)
        assert all(not name.count("packed") for name in layers.state_dict())
    assert not any(packed_ones(layers))


@torch.no_grad()
def test_packed_in_the_precision_of_autocast(layers: nn.Sequential) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor multiplies no bfloat16 matrices")
    x = torch.randn(2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layers[:3](x), layers(x)
        with packed_weights(layers, 2):  # two rows do not pay in float32
            assert packed_ones(layers) == [True, True, False]
            packed = layers[:3](x), layers(x)
    assert [part.dtype for part in packed] == [torch.bfloat16, torch.float32] == [part.dtype for part in plain]
    torch.testing.assert_close(packed, plain, rtol=0, atol=2e-2)
    assert (packed[0] - layers[:3](x)).abs().max() > 1e-4, "bfloat16 was asked for"


def test_nothing_is_packed_while_gradients_are_recorded(layers: nn.Sequential) -> None:
    with packed_weights(layers, ROWS):
        assert not any(packed_ones(layers))


@torch.no_grad()
def test_nothing_stays_packed_after_an_error(layers: nn.Sequential) -> None:
    with pytest.raises(RuntimeError, match="stop"), packed_weights(layers, ROWS):
        raise RuntimeError("stop")
    assert not any(packed_ones(layers))


@torch.no_grad()
def test_packed_copies_are_of_the_weights_at_the_time(layers: nn.Sequential) -> None:
    x = torch.randn(ROWS, 48)
    for _ in range(2):
        with packed_weights(layers, ROWS):
            result = layers(x)
        torch.testing.assert_close(result, layers(x), rtol=0, atol=1e-5)
        layers[0].weight.mul_(2)


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
