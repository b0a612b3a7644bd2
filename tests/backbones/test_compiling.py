"""Blocks compiled in place: the same names, the same values, and one graph for all blocks and all fill marks."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from discrete_lit.backbones.cpu_kernels import PackedLinear, packed_linear
from discrete_lit.backbones.execution import (
    compile_blocks,
    packed,
)
from discrete_lit.backbones.layers import Linear
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler

# Torch's tracer looks at the gradients of what a compiled function is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LABELS = torch.tensor([0, 2])
SWITCHES = {"norm": "rms", "mlp": "swiglu", "positions": "rope_2d", "qk_norm": "rms", "conditioning": "adaln"}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_names_values_and_gradients_stay(make_backbone) -> None:
    backbone, tokens = make_backbone("causal", **SWITCHES), torch.randint(5, (2, 5))
    names, plain = list(backbone.state_dict()), backbone(tokens, LABELS)
    expected = torch.autograd.grad(plain.square().sum(), list(backbone.parameters()), allow_unused=True)
    compile_blocks(backbone, backend="aot_eager")
    compiled = backbone(tokens, LABELS)
    assert list(backbone.state_dict()) == names
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(compiled.square().sum(), list(backbone.parameters()), allow_unused=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sampling_compiles_few_graphs(make_backbone) -> None:
    """Four blocks and a cache of sixteen places: a graph of the first pass, and one or two of the others."""
    backbone = make_backbone("causal", grid=(4, 4))
    backbone.blocks.extend(make_backbone("causal").blocks)
    backbone.depth = 4
    random = CounterRandom(0, torch.arange(2))
    plain = RasterSampler(guidance_scale=2.0)(backbone, LABELS, random).tokens
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(backbone, backend=counter)
    assert torch.equal(RasterSampler(guidance_scale=2.0)(backbone, LABELS, random).tokens, plain)
    assert 1 <= counter.frame_count <= 4


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_compiled_blocks_multiply_by_packed_weights(make_backbone, bias: bool) -> None:
    backbone, tokens = make_backbone("causal", bias=bias), torch.randint(5, (2, 5))
    plain = backbone(tokens, LABELS)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(backbone, backend=counter)
    fast = packed(backbone, rows=16)
    assert not any(isinstance(layer, Linear) for layer in fast.modules())
    for again in (fast, fast, packed(backbone, rows=16)):
        torch.testing.assert_close(again(tokens, LABELS), plain, rtol=0, atol=1e-5)
    of_block = sum(isinstance(layer, PackedLinear) for layer in fast.blocks[0].modules())
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert targets.count(packed_linear._opoverload) == of_block > 0, "one graph for all blocks and packed copies"
    torch.testing.assert_close(backbone(tokens, LABELS), plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_code_that_another_has_compiled_is_not_packed(make_backbone) -> None:
    """Blocks compiled by `torch.nn.Module.compile` run as they are; what stands around them is packed."""
    backbone = make_backbone("causal")
    for block in backbone.blocks:
        block.compile(backend="aot_eager")
    fast = packed(backbone, rows=16)
    assert fast.blocks is backbone.blocks and isinstance(fast.head.project, PackedLinear)
