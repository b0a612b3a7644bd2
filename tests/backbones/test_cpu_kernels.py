"""Packed weights change how a product is computed, not what it is; and the switch of all CPU kernels."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import cpu_kernels
from discrete_lit.backbones.blocks import Attention, BlockSettings
from discrete_lit.backbones.cpu_kernels import PackedLinear
from discrete_lit.backbones.execution import (
    count_flops,
    packed,
)
from discrete_lit.backbones.layers import Linear

ROWS = 16


@pytest.fixture
def layers() -> nn.Sequential:
    return nn.Sequential(Linear(48, 80), nn.GELU(), Linear(80, 32, bias=False), Linear(32, 16, autocast=False))


def packed_ones(layers: nn.Module) -> list[bool]:
    return [isinstance(layer, PackedLinear) for layer in layers.modules() if isinstance(layer, Linear | PackedLinear)]


@pytest.mark.parametrize("rows", [1, ROWS, 100])
@torch.no_grad()
def test_packed_products_are_the_plain_ones(layers: nn.Sequential, rows: int) -> None:
    x = torch.randn(rows, 3, 48)
    plain = layers(x)
    fast = packed(layers, rows=ROWS)
    assert packed_ones(fast) == [True] * 3
    torch.testing.assert_close(fast(x), plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_packed_module_shares_everything_else(layers: nn.Sequential) -> None:
    """Parameters, hooks, modules without weights to pack, and those that stand in two places; the original stays."""
    model = nn.ModuleDict({"first": layers, "again": layers, "other": nn.Sequential(nn.Linear(3, 3)), "none": None})
    called: list[nn.Module] = []
    for module in (layers, layers[0]):
        module.register_forward_hook(lambda module, *_: called.append(module))
    before = [dict(vars(module)) for module in model.modules()]
    fast = packed(model, rows=ROWS)
    assert [dict(vars(module)) for module in model.modules()] == before and not any(packed_ones(model))
    assert type(fast) is nn.ModuleDict and fast["first"] is fast["again"] and fast["other"] is model["other"]
    assert fast["none"] is None
    mine, theirs = model.state_dict(keep_vars=True), fast.state_dict(keep_vars=True)
    assert list(mine) == list(theirs) and all(mine[name] is theirs[name] for name in mine)
    fast["first"](torch.randn(ROWS, 48))
    assert called == [fast["first"][0], fast["first"]]
    assert packed(fast, rows=ROWS) is fast


@torch.no_grad()
def test_packed_in_the_precision_of_autocast(layers: nn.Sequential) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor multiplies no bfloat16 matrices")
    x = torch.randn(2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layers[:3](x), layers(x)
        fast = packed(layers, rows=2)  # two rows do not pay in float32
        assert packed_ones(fast) == [True, True, False]
        found = fast[:3](x), fast(x)
    assert [values.dtype for values in found] == [torch.bfloat16, torch.float32] == [values.dtype for values in plain]
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-2)
    assert (found[0] - layers[:3](x)).abs().max() > 1e-4, "bfloat16 was asked for"


def test_what_is_not_packed(layers: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed(layers, rows=ROWS) is layers, "gradients are recorded"
    with torch.no_grad():
        assert packed(layers, rows=2) is layers, "too few rows in float32"
        assert packed(layers.to("meta"), rows=ROWS) is layers, "another device"
        layers.to_empty(device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, "_SWITCH", "0")
            assert packed(layers, rows=ROWS) is layers, "switched off"
        # A sharded weight is no plain parameter.
        layers[0].weight = type("Sharded", (nn.Parameter,), {})(layers[0].weight)
        assert packed_ones(packed(layers, rows=ROWS)) == [False, True, True]


@torch.no_grad()
def test_packed_copies_are_of_the_weights_at_the_time(layers: nn.Sequential) -> None:
    x = torch.randn(ROWS, 48)
    for _ in range(2):
        torch.testing.assert_close(packed(layers, rows=ROWS)(x), layers(x), rtol=0, atol=1e-5)
        layers[0].weight.mul_(2)


@torch.no_grad()
def test_a_packed_backbone_counts_as_the_other_and_does_not_outlive_its_use(make_backbone) -> None:
    backbone, tokens, labels = make_backbone("causal"), torch.randint(5, (2, 5)), torch.tensor([0, 2])
    expected = backbone.flops(2, 5), backbone.cache_flops(2)
    fast = packed(backbone, rows=ROWS)
    assert any(packed_ones(fast)) and not any(packed_ones(backbone))
    assert (fast.flops(2, 5), fast.cache_flops(2)) == expected
    assert fast.flops.__self__ is backbone, "what counts later keeps no packed weights"
    torch.testing.assert_close(fast(tokens, labels), backbone(tokens, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 128, 96), (256, 512), (300, 96)])
def test_large_products_of_training_have_the_plain_values_and_gradients(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, made = Linear(shape[-1], 640, bias=bias), []
    product = cpu_kernels.trained_linear
    monkeypatch.setattr(cpu_kernels, "trained_linear", lambda *given: made.append(1) or product(*given))
    x = torch.randn(shape, requires_grad=True)
    # A gradient that is not laid out in rows, and a layer whose input needs none.
    towards = torch.randn(640, *shape[:-1]).movedim(0, -1)
    of = (x, *layer.parameters())
    found = layer(x)
    gradients = torch.autograd.grad(found, of, towards)
    plain = F.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad(plain, of, towards)
    assert made == [1]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-3)
    (alone,) = torch.autograd.grad(layer(x.detach()), layer.weight, towards)
    torch.testing.assert_close(alone, expected[1], rtol=1e-4, atol=1e-3)


def test_which_products_of_training_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("a product that does not pay, or that this way has not")

    monkeypatch.setattr(cpu_kernels, "trained_linear", refused)
    layer, x = Linear(96, 96), torch.randn(256, 96)
    layer(x[:255]), Linear(96, 95)(x), Linear(95, 96)(x[:, 1:])  # too small
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert Linear(96, 96).double()(x.double()).dtype == torch.float64
    assert count_flops(layer, lambda copy: lambda: copy(x).sum().backward(), gradients=True) == 2 * 2 * 256 * 96**2
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "_SWITCH", "0")
        layer(x)
    with pytest.raises(AssertionError, match="does not pay"):
        layer(x)


@pytest.mark.parametrize("switch", ["0", "1"])
def test_attention_of_recorded_gradients_is_in_float32(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_SWITCH", switch)
    dtypes = []

    def noting(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, *arguments: Tensor, **settings: object) -> Tensor:
            dtypes.append(query.dtype)
            return attend(query, *arguments, **settings)

        return run

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting(F.scaled_dot_product_attention))
    attention = Attention(BlockSettings(width=16, heads=2, head_dim=8, mlp_hidden=32))
    x = torch.randn(2, 5, 16)
    expected = attention(x, None, None, True, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x, None, None, True, None)
        with torch.no_grad():
            attention(x, None, None, True, None)
    assert dtypes == [torch.float32, torch.float32 if switch == "1" else torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("value", "printed"), [("0", "False"), ("1", "True"), (None, "True"), ("no", None)])
def test_the_switch_is_read_from_the_environment(value: str | None, printed: str | None) -> None:
    environment = {name: own for name, own in os.environ.items() if name != "DISCRETE_LIT_CPU_KERNELS"}
    if value is not None:
        environment["DISCRETE_LIT_CPU_KERNELS"] = value
    program = "import torch; from discrete_lit.backbones import cpu_kernels as k; print(k.enabled(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if printed is None:
        assert "ValueError" in run.stderr and "DISCRETE_LIT_CPU_KERNELS must be 0 or 1, got 'no'" in run.stderr
    else:
        assert run.stdout.strip() == printed, run.stderr
