"""Against `transformers`' Llama at the same random weights."""

import pytest
import torch

from discrete_lit.backbones import SequenceLayout, Transformer


def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from neighbouring rotary pairs (2i, 2i + 1) to Llama's (i, i + d / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parity
@torch.no_grad()
def test_transformer_is_llama(make_backbone) -> None:
    from transformers import LlamaConfig, LlamaModel

    backbone: Transformer = make_backbone(
        "causal", grid=(3, 4), norm="rms", positions="rope_1d", mlp="swiglu", bias=False, spread=0.2
    )
    assert isinstance(backbone.layout, SequenceLayout)
    hidden = backbone.blocks[0].mlp.contract.in_features
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
        attention_bias=False,
        mlp_bias=False,
    )
    llama = LlamaModel(config).eval()
    weights = {"norm.weight": backbone.final_norm.weight, "embed_tokens.weight": backbone.token_embedding.table.weight}
    for layer, block in enumerate(backbone.blocks):
        query, key, value = block.attention.query_key_value.weight.chunk(3)
        gate, up = block.mlp.expand.weight.chunk(2)
        weights |= {
            f"layers.{layer}.input_layernorm.weight": block.attention_norm.weight,
            f"layers.{layer}.self_attn.q_proj.weight": half_split(query, 2),
            f"layers.{layer}.self_attn.k_proj.weight": half_split(key, 2),
            f"layers.{layer}.self_attn.v_proj.weight": value,
            f"layers.{layer}.self_attn.o_proj.weight": block.attention.out.weight,
            f"layers.{layer}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"layers.{layer}.mlp.gate_proj.weight": gate,
            f"layers.{layer}.mlp.up_proj.weight": up,
            f"layers.{layer}.mlp.down_proj.weight": block.mlp.contract.weight,
        }
    llama.load_state_dict(weights, strict=True)
    tokens, labels = torch.randint(5, (3, 11)), torch.tensor([0, 1, 2])
    start = backbone.class_embedding(labels)[:, None]  # the class is the first element, at rotary position 0
    embedded = torch.cat((start, llama.embed_tokens(tokens)), dim=1)
    expected = backbone.head(llama(inputs_embeds=embedded).last_hidden_state)
    torch.testing.assert_close(backbone(tokens, labels), expected, rtol=0, atol=1e-5)
