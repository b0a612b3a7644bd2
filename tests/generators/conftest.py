"""A tiny next-scale generator, and the check that training reaches every parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise


@pytest.fixture
def make_next_scale() -> Callable[..., Any]:
    """`make_next_scale(vocab_size=3, spread=None, **arguments)`: scales 1 and 2, hence five ids, in eval mode.

    Its tokenizer is a `MultiScaleVQ` with random weights.
    """

    def make(vocab_size: int = 3, spread: float | None = None, **arguments: Any) -> Any:
        from discrete_lit.backbones import SequenceLayout, Transformer
        from discrete_lit.generators import NextScale
        from discrete_lit.tokenizers import MultiScaleVQ
        from discrete_lit.tokenizers.networks import ConvAutoencoder

        def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
            return ConvAutoencoder(code_dim, latent_dim, channels=8, multipliers=(1, 1, 2), blocks=1, norm_groups=4)

        def build(layout: SequenceLayout) -> Transformer:
            return Transformer(layout, width=16, depth=2, heads=2, conditioning="prefix_adaln")

        tokenizer = randomise(MultiScaleVQ(network, vocab_size, code_dim=3, scales=(1, 2)), 0.5)
        generator = NextScale(tokenizer, **{"image_size": 8, "num_classes": 2, "backbone": build, **arguments})
        if spread is not None:
            randomise(generator.backbone, spread)
        return generator.eval()

    return make


@pytest.fixture
def assert_all_trained() -> Callable[[Any], None]:
    """The training loss has a gradient for every parameter of the backbone, in every element that can be used."""

    def check(generator: Any) -> None:
        generator.train()
        tokens = torch.randint(generator.vocab_size, (16, *generator.token_shape))
        labels = torch.arange(16) % (generator.num_classes + 1)
        dropped = labels == generator.num_classes
        generator.loss(tokens, labels.masked_fill(dropped, 0), dropped=dropped)[0].backward()
        still = [
            name
            for name, value in generator.backbone.named_parameters()
            if value.grad is None or not value.grad.abs().sum() > 0
        ]
        assert not still

    return check
