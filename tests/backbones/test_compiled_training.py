"""Training steps of the published models' blocks, compiled as on a GPU: one graph, no breaks, the same gradients.

The kernels that a CPU has of its own are switched off, so that the compiler sees what it sees on a GPU.
"""

import pytest
import torch
from helpers.precision_cases import GENERATORS, make_generator, network, on_grid
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from discrete_lit.backbones import cpu_kernels
from discrete_lit.backbones.blocks import Attention
from discrete_lit.backbones.execution import compile_blocks
from discrete_lit.generators import Autoregressive, Generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*lru_cache"),
]
PUBLISHED = [
    "Autoregressive, LlamaGen",
    "Autoregressive, RAR",
    "Autoregressive, BAR",
    "Autoregressive, Open-MAGVIT2",
    "Masked, BERT",
    "Masked, MaskBit",
    "Masked, Halton-MaskGIT",
    "NextScale",
    "DiscreteDiffusion, SEDD",
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SWITCH", "0")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(generator: Generator) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(generator.vocab_size, (4, *generator.token_shape))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = generator.loss(tokens, torch.tensor([0, 1, 1, 0]))
    parameters = list(generator.backbone.blocks.parameters())
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def compiled(generator: Generator) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(generator.backbone, backend=counter, fullgraph=True)
    return counter


def with_dropout(generator: Generator) -> Generator:
    for module in generator.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        if isinstance(module, Attention):
            module.dropout = 0.1
    return generator


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("name", PUBLISHED)
def test_one_graph_and_the_same_gradients(name: str) -> None:
    generator = make_generator(name).train()
    loss, gradients = loss_and_gradients(generator)
    counter = compiled(generator)
    found, of_compiled = loss_and_gradients(generator)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-3)
    for gradient, expected in zip(of_compiled, gradients, strict=True):
        scale = float(expected.abs().max())  # bfloat16 rounds elsewhere
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.05 * scale + 1e-6)


@pytest.mark.parametrize("name", ["Autoregressive, RAR", "NextScale", "Masked, BERT"])
def test_with_dropout_and_activation_checkpointing(name: str) -> None:
    """What is computed again for the backward pass draws the same numbers again: the gradients are those without it."""
    generator = with_dropout(make_generator(name).train())
    counter = compiled(generator)
    loss, gradients = loss_and_gradients(generator)
    generator.backbone.activation_checkpointing = True
    again, of_checkpointed = loss_and_gradients(generator)
    assert counter.frame_count == 1 and torch.equal(again, loss)
    for gradient, expected in zip(of_checkpointed, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_blocks_of_unequal_stochastic_depth_share_their_graph() -> None:
    """The first block has none, so that there are two graphs; beyond eight the compiler would give up."""
    generator = on_grid(Autoregressive, backbone=network(drop_path=0.1)).train()
    blocks = generator.backbone.blocks
    for number in range(10):
        blocks.append(on_grid(Autoregressive, backbone=network(drop_path=0.1 + 0.05 * number)).backbone.blocks[1])
    counter = compiled(generator.train())
    loss_and_gradients(generator)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", GENERATORS)
def test_attention_has_a_mask_where_it_needs_one_alone(name: str, monkeypatch) -> None:
    """With a mask there is no flash kernel: only the sequences of scales have one."""
    calls, attend = [], F.scaled_dot_product_attention

    def recorded(*tensors: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **settings) -> Tensor:
        calls.append((attn_mask is not None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    generator = make_generator(name).train()
    loss_and_gradients(generator)
    expected = {(name == "NextScale", name.startswith("Autoregressive"))}
    if name.endswith("in blocks"):
        # The backbone's, whose blocks see themselves, and the head's, within a block.
        expected = {(True, False), (False, False)}
    assert set(calls) == expected
