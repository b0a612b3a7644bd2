"""Philox4x32-10 against Random123's known answers, and the streams that are made of it."""

from math import inf

import pytest
import torch
from scipy.stats import kstest

from discrete_lit.core import random as random_module
from discrete_lit.core.random import CounterRandom, Purpose, philox4x32

# `kat_vectors` of Random123 (Salmon et al., 2011): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(expected)


def test_philox_broadcasts_its_counters() -> None:
    counter = (torch.arange(3)[None], torch.tensor(7), torch.arange(2)[:, None], torch.tensor(0))
    together = torch.stack(philox4x32(counter, (1, 2)))
    assert together.shape == (4, 2, 3)
    alone = philox4x32((torch.tensor(2), torch.tensor(7), torch.tensor(1), torch.tensor(0)), (1, 2))
    assert together[:, 1, 2].tolist() == [int(word) for word in alone]


def test_draws_do_not_depend_on_the_batch() -> None:
    indices = torch.tensor([5, 0, 2**33 + 1, 7])
    whole = CounterRandom(3, indices).uniform(Purpose.TOKEN, 9, step=4)
    for rows in ([0], [3, 1], [2, 2]):
        assert torch.equal(CounterRandom(3, indices[rows]).uniform(Purpose.TOKEN, 9, step=4), whole[rows])


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    random = CounterRandom(3, torch.arange(4))
    assert torch.equal(random.uniform(Purpose.TOKEN, 7), random.uniform(Purpose.TOKEN, 12)[:, :7])
    assert random.uniform(Purpose.TOKEN, 0).shape == (4, 0)


def test_uniforms_are_uniform_and_all_different() -> None:
    draws = CounterRandom(11, torch.arange(400)).uniform(Purpose.TOKEN, 500)
    assert draws.dtype == torch.float64
    assert draws.unique().numel() == draws.numel()
    assert kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    for across in (draws[:, 0], draws[0]):
        assert kstest(across.numpy(), "uniform").pvalue > 1e-3


def test_uniforms_are_midpoints_of_cells_of_52_bits() -> None:
    draws = CounterRandom(11, torch.arange(100)).uniform(Purpose.TOKEN, 100)
    draws = draws[draws >= 2.0**-12]
    scaled = draws * 2.0**53
    assert torch.equal(scaled, scaled.round())
    assert (scaled.long() % 2 == 1).all()
    low_bits = (scaled.long() >> 1) & 1  # the last of the 52 random bits
    assert 0.45 < low_bits.double().mean() < 0.55


def test_small_uniforms_have_64_bits() -> None:
    """What happens with a probability of 1e-11 needs more than the 45,000 values that 52 bits have below it."""
    draws = CounterRandom(11, torch.arange(2000)).uniform(Purpose.TOKEN, 2000).flatten()
    small = draws[draws < 2.0**-12]
    scaled = small * 2.0**65
    assert len(small) > 800 and torch.equal(scaled, scaled.round()) and (scaled.long() % 2 == 1).all()
    last = (scaled.long()[:, None] >> torch.arange(1, 13)) & 1  # the twelve bits that larger numbers lack
    assert (last.double().mean(dim=0) - 0.5).abs().max() < 4 * 0.5 / len(small) ** 0.5
    assert kstest((small * 2.0**12).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(lambda r: r.uniform(Purpose.CONFIDENCE, 100), id="purpose"),
        pytest.param(lambda r: r.uniform(Purpose.TOKEN, 100, step=1), id="step"),
        pytest.param(lambda r: CounterRandom(1, r.indices + 300).uniform(Purpose.TOKEN, 100), id="sample"),
        pytest.param(lambda r: CounterRandom(1, r.indices + 2**32).uniform(Purpose.TOKEN, 100), id="high index"),
        pytest.param(lambda r: CounterRandom(2, r.indices).uniform(Purpose.TOKEN, 100), id="seed"),
        pytest.param(lambda r: CounterRandom(1 + 2**32, r.indices).uniform(Purpose.TOKEN, 100), id="high seed"),
        pytest.param(lambda r: CounterRandom(-1, r.indices).uniform(Purpose.TOKEN, 100), id="negative seed"),
        pytest.param(lambda r: r.uniform(Purpose.TOKEN, 100).roll(1, dims=1), id="place"),
    ],
)
def test_streams_are_independent(others) -> None:
    random = CounterRandom(1, torch.arange(300))
    pair = torch.stack((random.uniform(Purpose.TOKEN, 100).flatten(), others(random).flatten()))
    correlation = torch.corrcoef(pair)[0, 1]
    assert abs(correlation) < 4 / pair.shape[1] ** 0.5
    quadrant = ((pair[0] < 0.5) & (pair[1] < 0.5)).double().mean()
    assert abs(quadrant - 0.25) < 4 * (0.25 * 0.75 / pair.shape[1]) ** 0.5
    assert not (pair[0] == pair[1]).any()


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_extreme_words_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    def constant(counter, key):
        return tuple(torch.full(torch.broadcast_shapes(*(part.shape for part in counter)), word) for _ in range(4))

    monkeypatch.setattr(random_module, "philox4x32", constant)
    random = CounterRandom(0, torch.arange(2))
    draws = random.uniform(Purpose.TOKEN, 4)
    assert ((draws > 0) & (draws < 1)).all()
    assert random.gumbel(Purpose.TOKEN, 4).abs().max() < inf
    assert random.normal(Purpose.TOKEN, 4).abs().max() < inf


@pytest.mark.parametrize(("law", "name"), [("gumbel", "gumbel_r"), ("normal", "norm")])
def test_draws_have_their_law(law: str, name: str) -> None:
    draws = getattr(CounterRandom(5, torch.arange(100)), law)(Purpose.CONFIDENCE, 300)
    assert kstest(draws.flatten().numpy(), name).pvalue > 1e-3


@pytest.mark.parametrize("indices", [torch.arange(3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)])
def test_other_indices_are_refused(indices: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="1-D int64"):
        CounterRandom(0, indices)
