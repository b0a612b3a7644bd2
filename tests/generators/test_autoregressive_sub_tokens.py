"""Autoregressive generators that predict ids by sub-tokens or bits: laws, orders, losses, editing, and checkpoints."""

from itertools import permutations
from typing import Any

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers

from discrete_lit.backbones import FactorisedHead, MaskedBitHead
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import BARSampler, RasterSampler


def parts(*sizes: int) -> dict[str, Any]:
    return {"token_embedding": "parts", "place_head": lambda block, size: FactorisedHead(block, size, sizes=sizes)}


def bits() -> dict[str, Any]:
    return {"token_embedding": "bits", "place_head": lambda block, size: MaskedBitHead(block, size, width=12, depth=1)}


HEADS = {
    "parts": (6, parts(2, 3)),
    "bit groups": (8, {**parts(4, 2), "token_embedding": "bits"}),
    "bits": (8, bits()),
}
ANY_ORDER = {"target_positions": True, "conditioning": "prefix_adaln", "condition_positions": True, "qk_norm": "rms"}


@torch.no_grad()
def law_along(generator: Any, order: tuple[int, ...], label: int) -> torch.Tensor:
    """`(K^N,)` log-probability of every raster sequence: each factor of each part from its own pass over prefixes."""
    backbone, head, size = generator.backbone, generator.backbone.place_head, generator.vocab_size
    sequences = all_sequences(size, generator.length)
    labels = torch.full((len(sequences),), label)
    orders = torch.tensor(order).expand(len(sequences), -1) if backbone.layout.any_order else None
    total = torch.zeros(len(sequences), dtype=torch.float64)
    for position in range(generator.length):
        hidden = backbone(sequences[:, list(order[:position])], labels, order=orders)[:, -1:]
        split = head.sub_tokens.split(sequences[:, order[position], None])  # (K^N, 1, P)
        for part in range(len(head.sub_tokens)):
            logits = head.sub_token_logits(hidden, split[..., :part])[:, 0].double()
            total += logits.log_softmax(dim=-1).gather(1, split[:, :, part])[:, 0]
    return total


@pytest.mark.parametrize("kind", HEADS)
def test_samples_follow_the_likelihood_which_sums_to_one(make_generator, kind: str) -> None:
    size, switches = HEADS[kind]
    generator = make_generator("autoregressive", vocab_size=size, token_shape=(2,), spread=0.3, backbone=switches)
    sequences, labels = all_sequences(size, 2), torch.ones(size**2, dtype=torch.int64)
    likelihood = generator.log_likelihood(sequences, labels)
    assert likelihood.kind == "exact" and likelihood.nats.dtype == torch.float64
    torch.testing.assert_close(likelihood.nats, law_along(generator, (0, 1), 1), rtol=0, atol=1e-4)
    assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-5)
    drawn = generator.sample(torch.ones(20_000, dtype=torch.int64), seed=3)
    numbers = sequence_numbers(drawn, size)
    assert chi_square_p_value(numbers, likelihood.nats.exp()) > 1e-3
    other = generator.log_likelihood(sequences, 0 * labels).nats.exp()
    assert chi_square_p_value(numbers, other) < 1e-6


@pytest.mark.parametrize("kind", ["parts", "bits"])
def test_every_order(make_generator, kind: str) -> None:
    size, switches = HEADS[kind]
    generator = make_generator(
        "autoregressive",
        vocab_size=size,
        token_shape=(3,),
        order="random_annealed",
        spread=0.3,
        backbone={**switches, **ANY_ORDER},
    )
    sequences = all_sequences(size, 3)
    labels = torch.ones(len(sequences), dtype=torch.int64)
    laws = []
    for order in permutations(range(3)):
        likelihood = generator.log_likelihood(sequences, labels, order=torch.tensor(order))
        torch.testing.assert_close(likelihood.nats, law_along(generator, order, 1), rtol=0, atol=1e-4)
        assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-5)
        laws.append(likelihood.nats)
    assert torch.stack(laws).std(dim=0).max() > 1e-2

    known = torch.tensor([-1, size - 1, -1]).expand(300, -1)
    drawn = generator.sample(torch.ones(300, dtype=torch.int64), RasterSampler(order="random"), known=known)
    assert (drawn[:, 1] == size - 1).all() and len(drawn.unique(dim=0)) > 4


def test_a_fixed_order(make_generator) -> None:
    size, switches = HEADS["parts"]
    generator = make_generator(
        "autoregressive", vocab_size=size, token_shape=(3,), order=(2, 0, 1), spread=0.4, backbone=switches
    )
    sequences, labels = all_sequences(size, 3), torch.ones(size**3, dtype=torch.int64)
    nats = generator.log_likelihood(sequences, labels).nats
    torch.testing.assert_close(nats, law_along(generator, (2, 0, 1), 1), rtol=0, atol=1e-4)
    drawn = generator.sample(torch.ones(10_000, dtype=torch.int64), seed=5)
    assert chi_square_p_value(sequence_numbers(drawn, size), nats.exp()) > 1e-3


@pytest.mark.parametrize("kind", ["parts", "bits"])
def test_a_given_prefix_is_conditioned_on(make_generator, kind: str) -> None:
    size, switches = HEADS[kind]
    generator = make_generator("autoregressive", vocab_size=size, token_shape=(2,), spread=0.3, backbone=switches)
    known = torch.tensor([size - 2, -1]).expand(8000, -1)
    drawn = generator.sample(torch.zeros(8000, dtype=torch.int64), known=known)
    law = generator.log_likelihood(all_sequences(size, 2), torch.zeros(size**2, dtype=torch.int64)).nats.exp()
    law = law * (all_sequences(size, 2)[:, 0] == size - 2)
    assert chi_square_p_value(sequence_numbers(drawn, size), law / law.sum()) > 1e-3
    with pytest.raises(ValueError, match="known must be the first tokens"):
        generator.sample(torch.tensor([0]), known=torch.tensor([[-1, 1]]))


@torch.no_grad()
def test_loss_of_parts_is_their_likelihood(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=6, token_shape=(2, 2), spread=0.4, backbone=parts(2, 3))
    tokens, labels = torch.randint(6, (7, 2, 2)), torch.arange(7) % 3
    nats = generator.log_likelihood(tokens, labels).nats
    dropped = labels == generator.num_classes
    loss, _ = generator.loss(tokens, labels.masked_fill(dropped, 0), dropped=dropped)
    assert float(loss) == pytest.approx(-float(nats.mean()) / 4, rel=1e-5)


def test_masks_of_bits_belong_to_the_sample(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=8, token_shape=(2, 2), spread=0.3, backbone=bits()).train()
    tokens, labels, indices = torch.randint(8, (9, 4)), torch.arange(9) % 3, torch.arange(9) + 50
    whole = generator.token_losses(tokens, labels, CounterRandom(0, indices))
    rows = torch.tensor([6, 1])
    some = generator.token_losses(tokens[rows], labels[rows], CounterRandom(0, indices[rows]))
    torch.testing.assert_close(some.values, whole.values[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some.weights, whole.weights[rows])
    assert whole.values.shape == whole.weights.shape == whole.coordinate.shape == (9, 4)
    assert len(whole.weights.unique()) > 1


@pytest.mark.parametrize("kind", HEADS)
def test_every_parameter_is_trained(make_generator, assert_all_trained, kind: str) -> None:
    size, switches = HEADS[kind]
    assert_all_trained(
        make_generator("autoregressive", vocab_size=size, spread=0.3, backbone=switches, token_shape=(2, 2))
    )


def test_a_tokenizer_of_another_vocabulary(make_generator) -> None:
    with pytest.raises(ValueError, match=r"sizes=\[2, 3\], which multiply to 6"):
        make_generator("autoregressive", vocab_size=8, backbone=parts(2, 3))
    with pytest.raises(
        ValueError, match="MaskedBitHead needs a vocabulary that is a power of 2, the tokenizer's is 12"
    ):
        make_generator("autoregressive", vocab_size=12, backbone=bits())


def test_masked_generators_have_bit_groups_instead(make_generator) -> None:
    with pytest.raises(ValueError, match="a place_head predicts the next id of a causal sequence"):
        make_generator("masked", vocab_size=8, backbone=bits())


def test_a_sampler_of_bits_for_a_generator_of_parts(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=8, backbone=parts(2, 4))
    with pytest.raises(
        ValueError, match="BARSampler draws the bits of a generator with a MaskedBitHead, this one has a F"
    ):
        generator.sample(torch.tensor([0]), BARSampler())
