"""ChannelHead: its law by enumeration, its order, draws on a cache, and the start of published models."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones import ChannelHead, ChannelLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.samplers.categorical import draw_categorical


def head(channels: int = 2, levels: int = 3, **settings: Any) -> ChannelHead:
    torch.manual_seed(0)
    layout = ChannelLayout(channels=channels, levels=levels, condition_width=5)
    made = ChannelHead(layout, **{"width": 8, "depth": 2, "heads": 2, **settings}).eval()
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return made


def hidden(rows: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 5)


def all_ids(channels: int, levels: int) -> Tensor:
    return torch.tensor(list(product(range(levels), repeat=channels)))


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_the_probabilities_of_all_ids_sum_to_one(shifted: bool) -> None:
    made, ids = head(order=[1, 0], shifted_start=shifted).double(), all_ids(2, 3)
    for z in hidden().double():
        law = made.log_likelihood(z.expand(len(ids), -1), ids).exp()
        assert law.dtype == torch.float64 and law.min() > 0 and law.std() > 0.01
        torch.testing.assert_close(law.sum(), torch.ones((), dtype=torch.float64))


@torch.no_grad()
def test_the_loss_is_of_the_same_law_but_for_a_shifted_start() -> None:
    ids, z = all_ids(3, 2), hidden(8)
    plain, shifted = head(3, 2), head(3, 2, shifted_start=True)
    torch.testing.assert_close(plain.losses(z, ids), -plain.log_likelihood(z, ids) / 3)
    torch.testing.assert_close(shifted.losses(z, ids), plain.losses(z, ids))
    assert not torch.isclose(shifted.log_likelihood(z, ids), plain.log_likelihood(z, ids)).any()


@torch.no_grad()
def test_channels_are_predicted_in_the_order() -> None:
    """The logits of a step depend on the channels before it in the order, and on no other."""
    order = [2, 0, 3, 1]
    made, z = head(4, 3, order=order), hidden(1)
    ids = torch.tensor([[0, 1, 2, 0]])
    logits = made.all_logits(z, ids)
    for step, channel in enumerate(order):
        changed = ids.clone()
        changed[0, channel] = (ids[0, channel] + 1) % 3
        other = made.all_logits(z, changed)
        torch.testing.assert_close(other[:, : step + 1], logits[:, : step + 1], rtol=0, atol=0)
        assert not torch.isclose(other[:, step + 1 :], logits[:, step + 1 :]).any()


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_draws_on_a_cache_follow_the_law(shifted: bool) -> None:
    made, rows = head(order=[1, 0], shifted_start=shifted), 20_000
    z, ids = hidden(1).expand(rows, -1), all_ids(2, 3)
    uniforms = CounterRandom(0, torch.arange(rows)).uniform(Purpose.TOKEN, 2)
    seen: list[Tensor] = []

    def choose(logits: Tensor, numbers: Tensor) -> Tensor:
        seen.append(logits[:50])
        return draw_categorical(logits, numbers)

    drawn = made.sample(z, uniforms, choose)
    # What each step saw is what a pass over the drawn ids gives.
    torch.testing.assert_close(torch.stack(seen, dim=1), made.all_logits(z[:50], drawn[:50], drawn=True))
    law = made.log_likelihood(z[: len(ids)], ids).exp()
    frequencies = (drawn[:, 0] * 3 + drawn[:, 1]).bincount(minlength=9) / rows
    torch.testing.assert_close(frequencies, law, rtol=0, atol=0.015)


@torch.no_grad()
def test_more_rows_than_attention_takes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made, z, ids = head(), hidden(7), all_ids(2, 3)[:7]
    uniforms = torch.full((7, 2), 0.5, dtype=torch.float64)
    whole = made.losses(z, ids), made.sample(z, uniforms, draw_categorical)
    monkeypatch.setattr("discrete_lit.backbones.channel_head._MOST_ROWS", 3)
    parts = made.losses(z, ids), made.sample(z, uniforms, draw_categorical)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_operations_are_those_of_one_pass_over_the_sequence() -> None:
    """On a cache, nothing is computed twice: the draw of 4 ids costs less than 4 passes of growing length."""
    made = head(4, 3)
    blocks = 2 * 4 * 2 * (3 * 64 + 64 + 2 * 4 * 64 + 6 * 64)
    attention = 2 * sum(2 * 2 * seen * 8 for seen in range(1, 5))
    ends = 4 * 2 * (2 * 64 + 3 * 8) + 2 * 5 * 8
    assert made.flops(1) == blocks + attention + ends
    assert made.flops(6) == 6 * made.flops(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": [0, 0]}, r"each of the 2 channels of the tokenizer's latents once, got \[0, 0\]"),
        ({"order": [8, 1, 10]}, "is it that of another tokenizer"),
        ({"depth": 0}, "depth must be at least 1 and heads divide width=8, got 0 and 2"),
        ({"heads": 3}, "heads divide width=8, got 2 and 3"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(**settings)
