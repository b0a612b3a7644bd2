"""Weights cast to autocast's precision once: its outputs bit for bit, without a cast at each pass."""

import copy
from typing import Any

import pytest
import torch
from helpers.sampler_cases import CASES, SWITCHES, build_backbone
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from discrete_lit.backbones import cpu_kernels, execution
from discrete_lit.backbones.execution import (
    CastLinear,
    cast_once,
    compile_blocks,
    packed,
)
from discrete_lit.backbones.layers import Linear

LABELS = torch.tensor([0, 2])
SWITCHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaln": {"conditioning": "adaln", "norm": "rms", "mlp": "swiglu", "qk_norm": "full_rms", "tied": True},
    "bert": {"norm_first": False, "embedding_norm": True, "head_transform": True, "head_bias": "place"},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_SWITCH", "0")
    monkeypatch.setattr(execution, "casting_pays", lambda device: True)


def autocast(**settings: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, **settings)


class Casts(TorchDispatchMode):
    """Lists the sizes of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SWITCHED)
@torch.no_grad()
def test_outputs_are_those_of_autocast(make_backbone, name: str) -> None:
    backbone = make_backbone("bidirectional", **SWITCHED[name])
    tokens = torch.randint(5, (2, backbone.layout.length))
    with autocast():
        expected, fast = backbone(tokens, LABELS), cast_once(backbone)
        assert torch.equal(fast(tokens, LABELS), expected)
        assert torch.equal(fast(tokens, LABELS, fast.new_cache(LABELS)), expected)
    weights = {layer.weight.shape for layer in backbone.modules() if isinstance(layer, nn.Linear)}
    with autocast(cache_enabled=False), Casts() as casts:
        fast(tokens, LABELS)
    assert not weights & set(casts.shapes)
    with autocast(cache_enabled=False), Casts() as casts:
        backbone(tokens, LABELS)
    assert weights & set(casts.shapes)


@pytest.mark.parametrize("name", ["raster", "parts", "bits", "next_scale"])
@torch.no_grad()
def test_every_linear_layer_but_the_full_precision_ones(name: str) -> None:
    _, layout, _ = CASES[name]
    backbone = build_backbone(layout, **SWITCHES.get(name, {}))
    with autocast():
        fast = cast_once(backbone)
    before = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    after = [layer for layer in fast.modules() if isinstance(layer, nn.Linear)]
    assert len(before) == len(after) > 0
    for layer, other in zip(before, after, strict=True):
        full = isinstance(layer, Linear) and not layer.autocast
        assert other is layer if full else isinstance(other, CastLinear) and other.weight is layer.weight
    assert any(layer is other for layer, other in zip(before, after, strict=True)), "a head in full precision"
    assert fast.cache_flops(2) == backbone.cache_flops(2) and not any(
        isinstance(x, CastLinear) for x in backbone.modules()
    )


@torch.no_grad()
def test_the_cache_holds_what_attention_reads(make_backbone) -> None:
    """Keys and values are in autocast's precision: nothing as long as the cache is cast at a step."""
    backbone = make_backbone("causal", positions="rope_2d", qk_norm="rms")
    tokens = torch.randint(5, (2, backbone.layout.length))
    with autocast(cache_enabled=False):
        fast = cast_once(backbone)
        cache = fast.new_cache(LABELS)
        assert cache.layer(0).keys.dtype == torch.bfloat16
        fast(tokens[:, :0], LABELS, cache)
        for position in range(3):
            with Casts() as casts:
                fast(tokens[:, position : position + 1], LABELS, cache)
            # (B, heads, n, head_dim) of the new position alone.
            assert all(shape[2] == 1 for shape in casts.shapes if len(shape) == 4)


@torch.no_grad()
def test_compiled_blocks(make_backbone) -> None:
    """One graph for all blocks, and for the casts of every draw: to compile anew would break a recording."""
    backbone, tokens = make_backbone("bidirectional"), torch.randint(5, (2, 6))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(backbone, backend=counter)
    with autocast(cache_enabled=False):
        expected = make_plain(backbone)(tokens, LABELS)
        for _ in range(3):
            fast = cast_once(backbone)
            assert isinstance(fast.blocks[0].mlp.expand, CastLinear)
            assert torch.equal(fast(tokens, LABELS), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def make_plain(backbone: nn.Module) -> nn.Module:
    """The same without compiled code."""
    plain = copy.copy(backbone)
    plain._modules = {**backbone._modules, "blocks": nn.ModuleList(copy.copy(block) for block in backbone.blocks)}
    for block in plain.blocks:
        block._compiled_call_impl = None
    return plain


def test_where_nothing_is_cast(make_backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone("causal")
    with autocast():
        assert cast_once(backbone) is backbone, "gradients are recorded"
    with torch.no_grad():
        assert cast_once(backbone) is backbone, "no autocast"
        with autocast():
            assert cast_once(backbone) is not backbone
            assert packed(backbone, rows=8) is not backbone
            assert cast_once(backbone.double()) is backbone, "autocast leaves float64 alone"
            assert cast_once(backbone.bfloat16()) is backbone, "nothing to cast"
        backbone.float()
        monkeypatch.undo()
        with autocast():
            assert cast_once(backbone) is backbone, "a CPU has a way of its own"
