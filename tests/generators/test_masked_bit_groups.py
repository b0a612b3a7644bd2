"""Ids as groups of bits: there and back, their masks, likelihood and samples."""

import pytest
import torch
from helpers.exact_laws import all_sequences, order_log_laws

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.generators.masked import BitGroups

BITS = {"token_embedding": "bits"}


@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (18, 2)])
def test_there_and_back(bits: int, groups: int) -> None:
    split = BitGroups(2**bits, groups)
    ids = torch.randint(2**bits, (5, 7))
    units = split.split(ids)
    assert (
        units.shape == (5, 7 * groups) and 0 <= units.min() and units.max() < split.unit_size == 2 ** (bits // groups)
    )
    assert torch.equal(split.join(units), ids)


def test_low_bits_come_first_and_what_is_not_known_stays_so() -> None:
    units = BitGroups(64, 3).split(torch.tensor([[0b110001, -1]]))
    assert units.tolist() == [[0b01, 0b00, 0b11, -1, -1, -1]]


def make(make_generator, **arguments):
    return make_generator("masked", vocab_size=16, bit_groups=2, backbone=BITS, **{"spread": 0.4, **arguments})


def test_layout(make_generator) -> None:
    generator = make(make_generator, token_shape=(2, 3))
    layout = generator.backbone.layout
    assert (layout.vocab_size, layout.sub_tokens, layout.length, layout.mask_id) == (4, 2, 12, 4)
    assert (generator.vocab_size, generator.token_shape, generator.length) == (16, (2, 3), 12)


def test_samples_are_ids(make_generator) -> None:
    generator = make(make_generator, token_shape=(2, 3))
    known = torch.full((40, 2, 3), -1)
    known[:, 1] = torch.randint(16, (40, 3))
    tokens = generator.sample(torch.arange(40) % 3, known=known)
    assert tokens.shape == (40, 2, 3) and 0 <= tokens.min() and tokens.max() > 3 and tokens.max() < 16
    assert torch.equal(tokens[:, 1], known[:, 1])


def test_every_unit_is_masked_on_its_own(make_generator) -> None:
    """With probability m(t), t uniform: the counts of N units are uniform in 0 ... N, but none is 1."""
    generator = make(make_generator, token_shape=(4,), mask_schedule=LinearSchedule())
    indices = torch.arange(6000)
    masked = masks_of(generator, indices)
    random = CounterRandom(0, indices)
    expected = random.uniform(Purpose.MASK_ORDER, 8) <= random.uniform(Purpose.MASK_RATIO, 1)
    some = expected.any(dim=1)
    assert torch.equal(masked[some], expected[some])
    assert 0 < (~some).sum() and (masked[~some].sum(dim=1) == 1).all()
    first, second = masked[:, 0].double(), masked[:, 1].double()
    assert abs(float((first != second).double().mean()) - 1 / 3) < 0.03  # the halves of an id do not go together
    assert torch.equal(masks_of(generator, indices[[5, 77]]), masked[[5, 77]])


def masks_of(generator, indices: torch.Tensor) -> torch.Tensor:
    tokens = torch.zeros(len(indices), generator.length, dtype=torch.int64)
    labels = torch.zeros(len(indices), dtype=torch.int64)
    losses = generator.token_losses(tokens, labels, CounterRandom(0, indices))
    torch.testing.assert_close(losses.coordinate[:, 0], losses.weights.double().mean(dim=1))
    return losses.weights > 0


def test_likelihood_along_an_order_of_units(make_generator) -> None:
    generator = make_generator("masked", token_shape=(1,), vocab_size=16, bit_groups=2, backbone=BITS, spread=0.5)
    ids, labels = torch.arange(16)[:, None], torch.ones(16, dtype=torch.int64)
    laws = order_log_laws(generator.backbone, 1)  # of the units (low, high), high counting fastest
    numbers = all_sequences(4, 2)
    for order, law in zip(([0, 1], [1, 0]), laws, strict=True):
        nats = generator.log_likelihood(ids, labels, order=torch.tensor(order)).nats
        torch.testing.assert_close(nats[numbers[:, 0] + 4 * numbers[:, 1]], law, rtol=0, atol=1e-5)
        assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_every_parameter_is_trained(make_generator, assert_all_trained) -> None:
    assert_all_trained(make(make_generator, token_shape=(2, 3), unmasked_weight=1.0))


@pytest.mark.parametrize(
    ("vocab_size", "groups", "message"),
    [
        (12, 2, "bit_groups=2 needs a vocabulary that is a power of 2, the tokenizer's is 12"),
        (1, 1, "bit_groups=1 needs a vocabulary that is a power of 2, the tokenizer's is 1"),
        (16, 3, "bit_groups must divide the 4 bits of an id, got 3"),
        (16, 0, "bit_groups must divide the 4 bits of an id, got 0"),
    ],
)
def test_settings_that_do_not_fit(make_generator, vocab_size: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator("masked", vocab_size=vocab_size, bit_groups=groups, backbone=BITS)
