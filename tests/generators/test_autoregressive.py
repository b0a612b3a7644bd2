"""Next-token prediction: what is predicted from what."""

import torch
from torch.nn import functional as F

from discrete_lit.core.random import CounterRandom


def test_every_token_from_those_before_it(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=5, token_shape=(2, 3), spread=0.4)
    tokens, labels = torch.randint(5, (4, 6)), torch.arange(4) % 2
    losses = generator.token_losses(tokens, labels, CounterRandom(0, torch.arange(4)))
    for position in range(6):
        logits = generator.backbone(tokens[:, :position], labels)[:, -1]
        expected = F.cross_entropy(logits, tokens[:, position], reduction="none")
        torch.testing.assert_close(losses.values[:, position], expected)
    assert (losses.weights == 1).all()
    torch.testing.assert_close(losses.coordinate[0], (torch.arange(6) + 0.5) / 6)


def test_layout(make_generator) -> None:
    autoregressive, masked = make_generator("autoregressive"), make_generator("masked")
    layout = autoregressive.backbone.layout
    assert (layout.attention, layout.mask_token) == ("causal", False)
    layout = masked.backbone.layout
    assert (layout.attention, layout.mask_token, layout.mask_id) == ("bidirectional", True, 4)
