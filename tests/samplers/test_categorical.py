"""The categorical draw and its filters."""

import pytest
import torch
from helpers.exact_laws import chi_square_p_value

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.samplers import categorical
from discrete_lit.samplers.categorical import draw_categorical, filter_logits

INF = float("inf")


def uniforms(*shape: int) -> torch.Tensor:
    rows = CounterRandom(17, torch.arange(shape[0]))
    return rows.uniform(Purpose.TOKEN, max(1, torch.Size(shape[1:]).numel())).reshape(shape)


def test_follows_its_law() -> None:
    logits = torch.randn(7) * 2
    draws = draw_categorical(logits.expand(60_000, 7), uniforms(60_000))
    assert chi_square_p_value(draws, logits.double().softmax(dim=0)) > 1e-3


def test_zero_probability_is_never_drawn() -> None:
    logits = torch.tensor([-INF, 0.0, -INF, 1.0, -INF])
    edge = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    draws = draw_categorical(logits.expand(20_000, 5), torch.cat((uniforms(19_998), edge)))
    assert set(draws.tolist()) == {1, 3}
    assert draws[-2:].tolist() == [1, 3]


@pytest.mark.parametrize("vocab_size", [1, 3, 1000])
def test_extreme_uniforms_stay_in_range(vocab_size: int) -> None:
    edge = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for _ in range(20):
        draws = draw_categorical(torch.randn(2, vocab_size), edge)
        assert draws.tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("rare", [1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("last", [True, False])
def test_rare_probabilities_are_kept(rare: float, last: bool) -> None:
    """The rare id owns the interval that inversion gives it, to a thousandth of its own width."""
    common = torch.zeros(3)
    own = torch.tensor([rare * 3.0]).log()
    logits = torch.cat((common, own) if last else (own, common)).expand(2, 4)
    width = float(logits[0].double().softmax(dim=0)[3 if last else 0])
    bounds = [1 - width * 1.001, 1 - width * 0.999] if last else [width * 0.999, width * 1.001]
    draws = draw_categorical(logits, torch.tensor(bounds, dtype=torch.float64))
    assert draws.tolist() == ([2, 3] if last else [0, 1])


def test_many_rare_ids_keep_their_joint_mass() -> None:
    """16,000 ids of probability 1e-11 behind one common id: where a float32 cumulative sum would lose them."""
    logits = torch.full((16_001,), 1e-11).log()
    logits[0] = 0.0
    mass = 16_000e-11 / (1 + 16_000e-11)
    within = 1 - mass * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    draws = draw_categorical(logits.expand(1000, -1), within)
    expected = 16_000 - 16 * torch.arange(1000) - 8
    assert (draws - expected).abs().max() <= 1


def test_chunks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(5, 6, 11), uniforms(5, 6)
    whole = draw_categorical(logits, targets)
    assert whole.shape == (5, 6)
    for entries in (1, 23, 40):
        monkeypatch.setattr(categorical, "_ENTRIES_AT_ONCE", entries)
        assert torch.equal(draw_categorical(logits, targets), whole)


def test_rows_are_drawn_separately() -> None:
    logits, targets = torch.randn(40, 9), uniforms(40)
    rows = [draw_categorical(row[None], target[None]) for row, target in zip(logits, targets, strict=True)]
    assert torch.equal(torch.cat(rows), draw_categorical(logits, targets))


def test_no_filter_keeps_the_logits() -> None:
    logits = torch.randn(3, 6)
    for top_k, top_p in [(None, None), (6, None), (9, None), (None, 1.0), (6, 1.0)]:
        assert torch.equal(filter_logits(logits, top_k, top_p), logits)


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept = filter_logits(logits, 2, None).isfinite()
    assert kept.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    kept = filter_logits(logits, 1, None).isfinite()
    assert kept.tolist() == [[False, True, False, False, False], [True, False, False, False, False]]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [True, False, False, False]),
        (0.45, [True, False, False, False]),
        (0.55, [True, False, True, False]),  # the id that crosses p stays
        (0.85, [True, True, True, False]),
        (0.95, [True, True, True, True]),
    ],
)
def test_top_p_keeps_the_id_that_crosses(top_p: float, kept: list[bool]) -> None:
    logits = torch.tensor([[0.5, 0.1875, 0.25, 0.0625]]).log()
    filtered = filter_logits(logits, None, top_p)
    assert filtered.isfinite().tolist() == [kept]
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_p_stops_where_the_mass_is_reached_exactly() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF, -INF]])  # two ids of probability one half
    assert filter_logits(logits, None, 0.5).isfinite().sum() == 1


def test_top_p_measures_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Among the two best, the first holds 4 / 7 of the mass; among all, only 0.4.
    assert filter_logits(logits, 2, 0.5).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, None, 0.5).isfinite().tolist() == [[True, True, False, False]]
