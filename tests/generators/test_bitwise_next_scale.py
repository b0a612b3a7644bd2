"""Bitwise next-scale prediction: its exact law given a text, its draws, and training on its own errors."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.random_weights import randomise
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Transformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import BitwiseNextScale
from discrete_lit.samplers import NextScaleSampler
from discrete_lit.tokenizers import VQGAN, TokenGrid
from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.quantizers import MultiScaleBinarySphericalQuantizer

SCALES = (1, (1, 2))  # three places of two bits each
BACKBONE: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "conditioning": "prefix_adaln",
    "positions": "rope_scales",
    "shared_modulation": True,
    "attention_bias": "query_value",
    "qk_norm": "unit",
    "context_dim": 5,
    "context_pool": [3, 4],
    "context_bias": True,
}


def generator(spread: float | None = 0.5, **settings: Any) -> BitwiseNextScale:
    arguments = {
        "tokenizer": TokenGrid(4, (3,)),
        "image_size": 2,
        "num_classes": 1,
        "scales": SCALES,
        "backbone": partial(Transformer, **BACKBONE),
        **settings,
    }
    made = BitwiseNextScale(**arguments)
    return (made if spread is None else randomise(made, spread)).eval()


def texts(count: int, lengths: tuple[int, ...] = (3,), seed: int = 0) -> Condition:
    features = torch.randn(len(lengths), 3, 5, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    repeat = count // len(lengths)
    context, mask = features.repeat(repeat, 1, 1), mask.repeat(repeat, 1)
    return Condition(labels=torch.zeros(count, dtype=torch.int64), context=context, context_mask=mask)


@torch.no_grad()
def exact_law(made: BitwiseNextScale, given: Condition) -> Tensor:
    """`(64,)`, of the bits of all places: those of the first given the text, the others given those of the first."""
    bits = all_sequences(2, 6)
    ids = made.bits.ids_of(bits.view(64, 3, 2))
    read = made.bits.at_scale(1, made.bits.contribution(0, ids[:, :1]))
    logits = made.backbone(read, given)
    assert logits.shape == (64, 6, 2)
    return logits.double().log_softmax(dim=-1).gather(-1, bits[..., None])[..., 0].sum(dim=1)


def test_the_likelihood_is_exact() -> None:
    made = generator()
    ids = made.bits.ids_of(all_sequences(2, 6).view(64, 3, 2))
    found = made.log_likelihood(ids, texts(64))
    assert found.kind == "exact"
    torch.testing.assert_close(found.nats, exact_law(made, texts(64)), rtol=0, atol=1e-5)
    assert float(found.nats.exp().sum()) == pytest.approx(1, abs=1e-6)
    other = made.log_likelihood(ids, texts(64, seed=1)).nats
    assert (found.nats - other).abs().max() > 1e-3  # the text is read
    loss, _ = made.loss(ids, texts(64))
    assert float(loss.detach()) == pytest.approx(-float(found.nats.mean()) / 6, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_draws_follow_the_law(scale: float) -> None:
    made = generator()
    given = texts(6000)
    drawn = made.sample(given, NextScaleSampler(guidance_scale=scale, guidance_schedule="constant"), seed=1)
    assert drawn.shape == (6000, 3) and 0 <= int(drawn.min()) and int(drawn.max()) < 4
    full, nothing = texts(64), texts(64).null(null_label=1, null_id=None)
    bits = all_sequences(2, 6)
    ids = made.bits.ids_of(bits.view(64, 3, 2))
    read = made.bits.at_scale(1, made.bits.contribution(0, ids[:, :1]))
    with torch.no_grad():
        logits = [made.backbone(read, each).double() for each in (full, nothing)]
    law = (logits[1] + scale * (logits[0] - logits[1])).log_softmax(dim=-1)
    law = law.gather(-1, bits[..., None])[..., 0].sum(dim=1).exp()
    assert chi_square_p_value(sequence_numbers(made.to_sequence(drawn), 2), law) > 1e-3


def test_known_ids_stay() -> None:
    made = generator(spread=0.2)
    known = torch.tensor([[2, -1, 3]]).expand(20, -1)
    drawn = made.sample(texts(20), seed=3, known=known)
    assert (drawn[:, [0, 2]] == torch.tensor([2, 3])).all() and len(drawn[:, 1].unique()) > 1
    assert torch.equal(made.to_grid(made.to_sequence(drawn)), drawn)


def test_padding_of_texts_is_not_seen_and_a_dropped_one_is_as_long() -> None:
    made = generator()
    given = texts(2, (3, 1))
    read = torch.randn(2, 2, 2)
    expected = made.backbone(read, given)
    assert given.context is not None
    other = given.context.clone()
    other[1, 1:] += 1
    moved = Condition(labels=given.labels, context=other, context_mask=given.context_mask)
    torch.testing.assert_close(made.backbone(read, moved), expected)
    # Dropped: the first vectors of the table, as many as the text has, so that two texts of one length are one.
    null = made.backbone(read[:1].expand(2, -1, -1), given.null(null_label=1, null_id=None))
    assert (null[0] - null[1]).abs().max() > 1e-4
    table = made.backbone.context_pool.null
    as_text = Condition(labels=given.labels, context=table[None, :3].expand(2, -1, -1), context_mask=given.context_mask)
    torch.testing.assert_close(null, made.backbone(read[:1].expand(2, -1, -1), as_text))
    # No text at all is the table's first vector.
    empty = Condition(labels=given.labels, context=other, context_mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(
        made.backbone(read, empty)[1], made.backbone(read, given.null(null_label=1, null_id=None))[1]
    )


def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return ConvAutoencoder(code_dim, latent_dim, channels=8, multipliers=(1, 2), blocks=1, norm_groups=4)


def test_training_flips_bits_of_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = MultiScaleBinarySphericalQuantizer(2, scales=(1, 2))
    tokenizer = randomise(VQGAN(network, quantizer), 0.5)
    backbone = partial(Transformer, width=16, depth=1, heads=2, conditioning="prefix_adaln", positions="rope_scales")
    made = generator(tokenizer=tokenizer, image_size=4, scales=None, backbone=backbone, flip_strength=0.5)
    assert made.own_quantizer is None and not [name for name in made.state_dict() if name.startswith("bits")]
    monkeypatch.setattr(made, "log_dict", lambda *_, **__: None)
    images, random = torch.rand(64, 3, 4, 4) * 2 - 1, CounterRandom(0, torch.arange(64))
    flips = made._flips(random)
    shares = flips[:, 1:].double().mean(dim=(1, 2))
    assert flips.shape == (64, 5, 2) and 0.2 < float(flips.double().mean()) < 0.3 and float(shares.std()) > 0.1
    # In evaluation nothing is flipped: ids.
    assert torch.equal(made.data_of({"image": images}, random), tokenizer.encode(images))
    made.train()
    latents = made.data_of({"image": images}, random)
    assert latents.shape == (64, 2, 2, 2)
    losses = made.losses_of(latents, torch.zeros(64, dtype=torch.int64), random)
    targets, read = quantizer.self_corrected(latents, flips)
    logits = made.backbone(read, torch.zeros(64, dtype=torch.int64))
    expected = F.cross_entropy(logits.movedim(-1, 1), quantizer.bits_of(targets).flatten(1), reduction="none")
    torch.testing.assert_close(losses.values, expected)
    with pytest.raises(ValueError, match=r"a batch holds tokens, label: set model\.init_args\.flip_strength to 0"):
        made.data_of({"tokens": tokenizer.encode(images), "label": torch.zeros(64)}, random)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": None}, "has no quantizer: give it a VQGAN with one, or a TokenGrid and scales"),
        ({"tokenizer": TokenGrid(6, (3,))}, r"needs 2\^d ids of d bits, the tokenizer has 6"),
        ({"scales": (2, 3), "tokenizer": TokenGrid(4, (13,))}, "needs a first scale of one place"),
        ({"flip_strength": 2.0}, "flip_strength must lie in"),
        ({"backbone": partial(Transformer, **{**BACKBONE, "context_pool": [3, 5]})}, "heads that divide width=16"),
        ({"backbone": partial(Transformer, **{**BACKBONE, "context_dim": None})}, "pools the vectors of a context_dim"),
        ({"num_classes": 2}, "needs num_classes=1"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(spread=None, **settings)


def test_a_text_that_is_too_long_is_refused() -> None:
    made = generator()
    given = Condition(labels=torch.zeros(1, dtype=torch.int64), context=torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match="a text has 4 vectors, and this network reads at most 3"):
        made.log_likelihood(torch.zeros(1, 3, dtype=torch.int64), given)
