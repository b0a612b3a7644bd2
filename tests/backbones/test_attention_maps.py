"""Attention weights that are computed apart, against the fused attention and against softmax(q k^T) by hand."""

import pytest
import torch
from helpers.random_weights import randomise

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.attention_maps import attention_of_blocks, recorded_weights
from discrete_lit.backbones.blocks import Attention, BlockSettings
from discrete_lit.backbones.execution import compile_blocks

KINDS = {
    "plain": {},
    "rms": {"qk_norm": "rms"},
    "unit": {"qk_norm": "unit"},
    "per head": {"qk_norm": "layer_per_head"},
    "shared heads": {"key_value_heads": 1, "attention_bias": "none"},
    "query and value bias": {"attention_bias": "query_value", "qk_norm": "full_rms"},
}


def attention(**switches) -> Attention:
    return randomise(Attention(BlockSettings(width=12, heads=2, head_dim=6, mlp_hidden=8, **switches)), 0.5).double()


def rotations(count: int, pairs: int = 3) -> torch.Tensor:
    angles = torch.randn(count, pairs, dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", ["all", "causal", "mask", "mask of each"])
def test_weights_mix_the_values_as_the_fused_attention_does(kind, seen) -> None:
    layer, x = attention(**KINDS[kind]), torch.randn(3, 5, 12, dtype=torch.float64)
    mask = None
    if seen.startswith("mask"):
        mask = torch.rand(*((3, 1) if seen == "mask of each" else ()), 5, 5) < 0.5
        mask |= torch.eye(5, dtype=torch.bool)
    rotary = rotations(5)
    rows = torch.tensor([[4, 0, 2], [1, 1, 3], [0, 4, -1]])
    weights = layer.weights(x, rotary, mask, seen == "causal", rows=rows)
    values = layer._project(x)[2].expand(-1, 2, -1, -1)
    # Five values of six channels are independent: one mixture alone gives the output.
    mixed = layer.out((weights @ values).transpose(1, 2).flatten(2))
    whole = layer(x, rotary, mask, seen == "causal", None)
    torch.testing.assert_close(mixed, whole[torch.arange(3)[:, None], rows])


def test_weights_are_the_softmax_of_turned_and_normed_queries_and_keys() -> None:
    layer, x, table = attention(qk_norm="rms"), torch.randn(2, 4, 12, dtype=torch.float64), rotations(4)
    rows = torch.arange(4).expand(2, -1)
    weights = layer.weights(x, table, None, True, rows=rows)
    weight, bias = layer.query_key_value.weight, layer.query_key_value.bias
    for image in range(2):
        for head in range(2):
            vectors = []
            for part, norm in ((0, layer.norms.query), (1, layer.norms.key)):
                span = slice(12 * part + 6 * head, 12 * part + 6 * head + 6)
                plain = x[image] @ weight[span].T + bias[span]
                normed = plain / (plain.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight
                even, odd = normed[:, ::2], normed[:, 1::2]
                cosine, sine = table.unbind(-1)
                turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
                vectors.append(turned.flatten(1))
            scores = vectors[0] @ vectors[1].T / 6**0.5
            scores = scores.where(torch.ones(4, 4).tril().bool(), -torch.inf)
            torch.testing.assert_close(weights[image, head], scores.softmax(dim=-1))


@pytest.mark.parametrize("compiled", [False, True])
def test_recording_leaves_the_network_as_it_is(compiled) -> None:
    layout = SequenceLayout(5, (2, 3), num_classes=2, attention="causal")
    network = randomise(Transformer(layout, width=16, depth=3, heads=2, positions="rope_2d"), 0.3).eval()
    tokens, labels = torch.randint(5, (2, 4)), torch.tensor([0, 1])
    with torch.no_grad():
        expected = network(tokens, labels)
        if compiled:
            compile_blocks(network, backend="eager")
        attentions = {number: each for number, each in attention_of_blocks(network).items() if number}
        rows = torch.tensor([[0, 4], [2, 3]])
        with recorded_weights(attentions, lambda count: rows) as recorded:
            seen = network(tokens, labels)
            network(tokens + 0, labels.flip(0))  # a second pass is not recorded
    assert torch.equal(seen, expected) and set(recorded) == {1, 2}
    for weights in recorded.values():
        assert weights.shape == (2, 2, 2, 5)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 2))
        assert float(weights[0, :, 0, 1:].abs().max()) == 0  # the first element sees itself alone
    assert not any(module._forward_pre_hooks for module in network.modules())
