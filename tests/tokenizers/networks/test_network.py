"""First weights: layers pass on what they are given at its size, and weights that are computed of others change too."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from discrete_lit.tokenizers.networks.network import LayerInitialization, initialise_layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 32), (200, 64)),
    "convolution": (lambda: nn.Conv1d(64, 32, 5), (8, 64, 104)),
    "strided": (lambda: nn.Conv2d(64, 32, 4, stride=2), (4, 64, 30, 30)),
    "transposed": (lambda: nn.ConvTranspose1d(64, 32, 8, stride=4), (8, 64, 100)),
    "transposed, kernel of its stride": (lambda: nn.ConvTranspose2d(64, 32, 2, stride=2), (4, 64, 12, 12)),
    "volume": (lambda: nn.Conv3d(64, 32, (1, 3, 3)), (2, 64, 4, 14, 14)),
}


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "weight_norm"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_layer_of_lecun_keeps_the_size_of_what_it_is_given(kind: str, normed: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = weight_norm(make()) if normed else make()
    initialise_layers(layer, "lecun")
    with torch.no_grad():
        out = layer(torch.randn(shape))
    # Away from the edges, where a transposed convolution has fewer taps.
    inside = out[(slice(None), slice(None), *[slice(8, -8)] * (out.ndim - 2))] if "transposed" in kind else out
    assert float(inside.square().mean()) == pytest.approx(
        1, rel=5 * (2 / (32 * 64)) ** 0.5
    )  # five standard errors of the smallest
    assert not layer.bias.any()  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["vaex", "lecun"])
def test_weights_that_are_computed_of_others_begin_anew(kind: LayerInitialization) -> None:
    torch.manual_seed(0)
    layer = weight_norm(nn.Conv1d(8, 8, 3))
    before, names = layer.weight.detach().clone(), list(dict(layer.named_parameters()))
    initialise_layers(layer, kind)
    assert not torch.equal(layer.weight, before) and list(dict(layer.named_parameters())) == names
    assert is_parametrized(layer, "weight")
    layer(torch.randn(2, 8, 10)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
