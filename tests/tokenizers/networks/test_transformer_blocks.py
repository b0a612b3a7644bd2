"""The stack of transformer blocks against PyTorch's own encoder layers."""

import pytest
import torch
from helpers.random_weights import randomise
from torch import nn

from discrete_lit.tokenizers.networks.vit import TransformerBlocks, TransformerSize, initialise


@torch.no_grad()
def test_equal_to_pytorchs_encoder_layers() -> None:
    """`nn.TransformerEncoderLayer` is an independent pre-norm block around `nn.MultiheadAttention`, with eps 1e-5."""
    blocks = randomise(TransformerBlocks(TransformerSize(width=24, depth=2, heads=3, mlp_hidden=40)), 0.3)
    reference = nn.ModuleList(
        nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        for _ in range(2)
    )
    names = {
        "self_attn.in_proj_": "attention.query_key_value.",
        "self_attn.out_proj.": "attention.out.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
        "linear1.": "mlp.expand.",
        "linear2.": "mlp.contract.",
    }
    own = blocks.state_dict()
    renamed = {}
    for key in reference.state_dict():
        name = key
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[key] = own.pop(f"blocks.{name}")
    assert not own
    reference.load_state_dict(renamed)
    x = torch.randn(2, 7, 24) * 1e-2  # small, so that the norms' epsilon counts
    expected = x
    for layer in reference:
        expected = layer(expected)
    torch.testing.assert_close(blocks(x), expected, rtol=1e-5, atol=1e-5)


def test_sizes() -> None:
    blocks = TransformerBlocks(TransformerSize(width=8, depth=3, heads=2))
    assert len(blocks.blocks) == 3
    assert blocks.blocks[0].mlp.expand.out_features == 32
    with pytest.raises(ValueError, match="width=8 is not a multiple of heads=3"):
        TransformerBlocks(TransformerSize(width=8, depth=1, heads=3))


def test_initial_weights() -> None:
    layers = nn.Sequential(nn.Linear(100, 100), nn.Conv2d(3, 100, 5, bias=False))
    initialise(layers)
    assert not layers[0].bias.any()
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
