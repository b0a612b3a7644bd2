"""Next-token prediction: what is predicted from what."""

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Autoregressive
from discrete_lit.samplers import RasterSampler
from discrete_lit.tokenizers import TokenGrid


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


def with_visible_start(visible: int, order: tuple[int, ...] | None = None) -> Autoregressive:
    """Of 6 positions with 5 ids, whose first elements see each other."""
    torch.manual_seed(0)
    generator = Autoregressive(
        TokenGrid(5, (2, 3)),
        6,
        num_classes=2,
        backbone=lambda layout: Transformer(layout, width=16, depth=2, heads=2, visible_start=visible),
        order=order or "raster",
    )
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return generator.eval()


@pytest.mark.parametrize("order", [None, (5, 0, 3, 1, 2, 4)])
@pytest.mark.parametrize("visible", [1, 3, 7])
@torch.no_grad()
def test_a_visible_start_is_sampled_and_scored_from_what_is_known(visible: int, order: tuple[int, ...] | None) -> None:
    """taming samples by whole passes over what was drawn so far: a cache gives the same, and so does the likelihood."""
    generator, labels = with_visible_start(visible, order), torch.tensor([0, 1, 1])
    backbone = generator.sampled_backbone()
    random = CounterRandom(3, torch.arange(3))
    drawn = generator.draw(labels, random, RasterSampler(), trace=True)
    sequence, total = generator.to_sequence(drawn.tokens), torch.zeros(3, dtype=torch.float64)
    cache = backbone.new_cache(labels)
    for position in range(6):
        whole = backbone(sequence[:, :position], labels)[:, -1]
        cached = backbone(sequence[:, max(position - 1, 0) : position], labels, cache)[:, -1]
        torch.testing.assert_close(cached, whole)
        log_probability = whole.log_softmax(dim=-1).gather(1, sequence[:, position, None])[:, 0].double()
        confidence = drawn.trace[position].confidence[:, position]
        torch.testing.assert_close(confidence, log_probability, rtol=1e-5, atol=1e-5)
        total += log_probability
    torch.testing.assert_close(generator.log_likelihood(drawn.tokens, labels).nats, total, rtol=1e-5, atol=1e-5)
    changed = sequence.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 5
    rows = [backbone(tokens[:, :-1], labels)[:, 0] for tokens in (sequence, changed)]
    assert torch.equal(*rows) == (visible < 3)


def test_a_visible_start_needs_a_causal_sequence() -> None:
    layout = SequenceLayout(5, (2, 3), num_classes=2, attention="bidirectional", mask_token=True)
    with pytest.raises(ValueError, match="visible_start=3 needs a causal sequence"):
        Transformer(layout, width=16, depth=1, heads=2, visible_start=3)
