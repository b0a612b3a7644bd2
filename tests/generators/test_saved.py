"""Every setting survives its configuration and its file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

from discrete_lit.checkpoints import instantiate, load, save

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "norm_groups": 4},
}
TOKENIZERS = {
    "grid": {"class_path": "discrete_lit.tokenizers.TokenGrid", "init_args": {"vocab_size": 16, "token_shape": [2, 2]}},
    "scales": {
        "class_path": "discrete_lit.tokenizers.MultiScaleVQ",
        "init_args": {"network": NETWORK, "codebook_size": 16, "code_dim": 3, "scales": [1, 2]},
    },
}


@pytest.mark.parametrize(
    ("family", "tokenizer", "settings", "switches"),
    [
        ("Autoregressive", "grid", {"order": "random_annealed", "anneal_steps": [3, 9]}, {"target_positions": True}),
        ("Autoregressive", "grid", {"order": [3, 1, 0, 2]}, {}),
        (
            "Masked",
            "grid",
            {
                "bit_groups": 2,
                "unmasked_weight": 1.0,
                "mask_schedule": {"class_path": "discrete_lit.diffusion.TruncatedNormalSchedule"},
                "sampler": {"class_path": "discrete_lit.samplers.MaskBitSampler", "init_args": {"steps": 3}},
            },
            {"token_embedding": "bits"},
        ),
        (
            "Autoregressive",
            "grid",
            {
                "sampler": {
                    "class_path": "discrete_lit.samplers.OpenMAGVIT2Sampler",
                    "init_args": {"parts": [{"guidance_scale": 1.9}, {"temperature": 1.1}]},
                }
            },
            {
                "token_embedding": "parts",
                "place_head": {"class_path": "discrete_lit.backbones.FactorisedHead", "init_args": {"sizes": [2, 8]}},
            },
        ),
        (
            "Autoregressive",
            "grid",
            {
                "order": "random_annealed",
                "sampler": {"class_path": "discrete_lit.samplers.BARSampler", "init_args": {"bit_counts": [1, 3]}},
            },
            {
                "token_embedding": "bits",
                "place_head": {"class_path": "discrete_lit.backbones.MaskedBitHead", "init_args": {"width": 24}},
            },
        ),
        ("NextScale", "scales", {}, {"conditioning": "prefix_adaln", "qk_norm": "unit"}),
    ],
    ids=["annealed", "fixed order", "bit groups", "parts", "bits", "next scale"],
)
def test_there_and_back(
    tmp_path: Path, family: str, tokenizer: str, settings: dict[str, Any], switches: dict[str, Any]
) -> None:
    backbone = {
        "class_path": "discrete_lit.backbones.Transformer",
        "init_args": {"width": 16, "depth": 2, "heads": 2, **switches},
    }
    given = {"tokenizer": TOKENIZERS[tokenizer], "image_size": 8, "num_classes": 2, "backbone": backbone, **settings}
    generator: Any = instantiate({"class_path": f"discrete_lit.generators.{family}", "init_args": given})
    randomise(generator.backbone, 0.3).eval()
    save(generator, tmp_path / "generator.ckpt")
    loaded: Any = load(tmp_path / "generator.ckpt")
    labels = torch.arange(20) % 3
    tokens = generator.sample(labels)
    assert torch.equal(loaded.sample(labels), tokens)
    assert torch.equal(loaded.log_likelihood(tokens, labels).nats, generator.log_likelihood(tokens, labels).nats)
    for name in ("anneal_steps", "unmasked_weight", "annealed"):
        assert getattr(loaded, name, None) == getattr(generator, name, None)
