"""Our block against `timm`'s of Vision Transformers at the same random weights."""

from functools import partial

import pytest
import torch
from helpers.random_weights import randomise
from torch import nn

from discrete_lit.backbones.blocks import Block, BlockSettings


@pytest.mark.parity
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_block_is_timms(bias: bool, qk_norm: bool) -> None:
    from timm.models.vision_transformer import Block as VisionBlock

    theirs = VisionBlock(
        24, 3, mlp_ratio=2.0, qkv_bias=bias, qk_norm=qk_norm, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    ).eval()
    randomise(theirs, 0.4)
    settings = BlockSettings(
        width=24,
        heads=3,
        head_dim=8,
        mlp_hidden=48,
        attention_bias="all" if bias else "none",
        qk_norm="layer" if qk_norm else None,
    )
    ours = Block(settings).eval()
    renamed = (
        ("attn.qkv.", "attention.query_key_value."),
        ("attn.q_norm.", "attention.norms.query."),
        ("attn.k_norm.", "attention.norms.key."),
        ("attn.proj.", "attention.out."),
        ("norm1.", "attention_norm."),
        ("norm2.", "mlp_norm."),
        ("mlp.fc1.", "mlp.expand."),
        ("mlp.fc2.", "mlp.contract."),
    )
    state = {}
    for name, value in theirs.state_dict().items():
        prefix, own = next(pair for pair in renamed if name.startswith(pair[0]))
        state[own + name.removeprefix(prefix)] = value
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
