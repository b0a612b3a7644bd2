"""Against `transformers`' ImageGPT at the same random weights: ids of colours, a start token and no class;
its logits, its loss and its greedy image."""

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.backbones import Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler


def weights_of(backbone: Transformer) -> dict[str, torch.Tensor]:
    """Ours under its names. Its start token is the id behind the colours, ours the one class; its linear layers are
    stored the other way round, and its norms, named after LayerNorm, subtract no mean."""
    parameters = dict(backbone.named_parameters())
    start = parameters["class_embedding.weight"][:1]
    weights = {
        "transformer.wte.weight": torch.cat((parameters["token_embedding.table.weight"], start)),
        "transformer.wpe.weight": parameters["positions.embedding"][0],
        "transformer.ln_f.weight": parameters["final_norm.weight"],
        "lm_head.weight": parameters["head.project.weight"],
    }
    layers = (
        ("attention.query_key_value", "attn.c_attn"),
        ("attention.out", "attn.c_proj"),
        ("mlp.expand", "mlp.c_fc"),
        ("mlp.contract", "mlp.c_proj"),
    )
    for number in range(len(backbone.blocks)):
        for ours, theirs in layers:
            weights[f"transformer.h.{number}.{theirs}.weight"] = parameters[f"blocks.{number}.{ours}.weight"].T
            weights[f"transformer.h.{number}.{theirs}.bias"] = parameters[f"blocks.{number}.{ours}.bias"]
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            weights[f"transformer.h.{number}.{theirs}.weight"] = parameters[f"blocks.{number}.{ours}.weight"]
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.mark.parity
@torch.no_grad()
def test_transformer_is_imagegpt(make_backbone) -> None:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    backbone = make_backbone(
        "causal",
        vocab_size=11,
        grid=(3, 4),
        num_classes=1,
        spread=0.4,
        norm="rms",
        norm_epsilon=1e-5,
        mlp="gelu_quick",
        head_bias=False,
    )
    config = ImageGPTConfig(
        vocab_size=12, n_positions=12, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager", use_cache=False
    )
    imagegpt = ImageGPTForCausalImageModeling(config).eval()
    imagegpt.load_state_dict(weights_of(backbone), strict=True)
    tokens = torch.randint(11, (3, 11))
    start = torch.full((3, 1), 11)
    expected = imagegpt(torch.cat((start, tokens), dim=1)).logits
    logits = backbone(tokens, torch.zeros(3, dtype=torch.int64))
    assert logits.shape == expected.shape == (3, 12, 11)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    # Its loss leaves out nothing but the start, and its greedy choice is the next of ours.
    loss = imagegpt(torch.cat((start, tokens), dim=1), labels=torch.cat((start, tokens), dim=1)).loss
    torch.testing.assert_close(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.flatten()), loss)
    labels = torch.zeros(3, dtype=torch.int64)
    drawn = RasterSampler(top_k=1)(backbone, labels, CounterRandom(0, torch.arange(3))).tokens
    greedy = start
    for _ in range(12):
        greedy = torch.cat((greedy, imagegpt(greedy).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(drawn, greedy[:, 1:])
