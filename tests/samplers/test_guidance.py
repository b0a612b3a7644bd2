"""Classifier-free guidance on log-probabilities, and its schedules."""

from math import cos, pi

import pytest
import torch

from discrete_lit.samplers.guidance import guidance_scales, guide


def test_known_values() -> None:
    """p_c^2 / p_u normalised, for s = 2 (w = 1)."""
    conditional = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    unconditional = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    expected = torch.tensor([0.8698224852, 0.0236686391, 0.0355029586, 0.0710059172])
    torch.testing.assert_close(guide(conditional, unconditional, 2.0).softmax(dim=-1), expected)
    normaliser = guide(conditional, unconditional, 2.0).exp().sum()
    assert float(normaliser) == pytest.approx(1.4083333333, rel=1e-6)


def test_one_is_the_conditional_and_zero_the_unconditional() -> None:
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_formula_on_log_probabilities(scale: float) -> None:
    """Logits are known up to a constant of each row, which changes nothing."""
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    p, q = conditional.double().softmax(dim=-1), unconditional.double().softmax(dim=-1)
    law = q * (p / q) ** scale
    for first, second in ((0.0, 0.0), (7.0, -3.0)):
        guided = guide(conditional + first, unconditional + second, scale).softmax(dim=-1)
        torch.testing.assert_close(guided.double(), law / law.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_linear_schedules() -> None:
    assert guidance_scales("constant", 3.0, 4) == [3.0] * 4
    assert guidance_scales("linear", 3.0, 4) == [1.0, 1.5, 2.0, 2.5]
    assert guidance_scales("scale_linear", 2.5, 10) == pytest.approx([1 + 1.5 * scale / 9 for scale in range(10)])
    assert guidance_scales("scale_linear", 2.5, 1) == [1.0]


def test_cosine_schedules() -> None:
    """RAR-L's at 256 tokens, and MaskBit's 7.1 on top of the conditional."""
    expected = [1 + 14.5 * (1 - cos(pi * (token / 256) ** 2.5)) / 2 for token in range(256)]
    assert guidance_scales("power_cosine", 15.5, 256, power=2.5) == pytest.approx(expected)
    assert guidance_scales("power_cosine", 8.1, 2, power=3.0)[1] == pytest.approx(1 + 7.1 * (1 - cos(pi / 8)) / 2)
    assert guidance_scales("power_cosine", 3.0, 5) == guidance_scales("cosine", 3.0, 5)
    assert guidance_scales("power_cosine", 3.0, 5, power=0.0) == [3.0] * 5
    assert guidance_scales("cosine", 3.0, 4)[0] == 1.0 and guidance_scales("cosine", 3.0, 4)[2] == pytest.approx(2.0)


def test_interval_and_cut_off() -> None:
    assert guidance_scales("constant", 3.0, 5, interval=(1, 3)) == [1.0, 3.0, 3.0, 1.0, 1.0]
    assert guidance_scales("constant", 3.0, 5, interval=(0, 5)) == [3.0] * 5
    assert guidance_scales("linear", 5.0, 4, interval=(0, 2)) == [1.0, 2.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"guidance_interval=\[0, 6\] is longer than the sampling: it has 5 steps"):
        guidance_scales("constant", 3.0, 5, interval=(0, 6))


INF = torch.inf


@pytest.mark.parametrize("scale", [-1.0, 0.25, 0.75, 1.5, 7.0])
def test_impossible_ids(scale: float) -> None:
    """What is impossible given the label stays so; what is impossible without it alone is not guided."""
    conditional = torch.tensor([[1.0, -INF, 0.5, -INF], [-INF, 2.0, -INF, 1.0], [-INF, 2.0, -INF, -INF]])
    unconditional = torch.tensor([[0.5, 1.0, -INF, -INF], [1.0, -INF, 3.0, -INF], [1.0, -INF, 1.0, 1.0]])
    guided = guide(conditional, unconditional, scale)
    expected = torch.where(unconditional == -INF, conditional, unconditional + scale * (conditional - unconditional))
    expected = expected.masked_fill(conditional == -INF, -INF)
    torch.testing.assert_close(guided, expected)
    assert not guided.isnan().any() and (guided > -INF).any(dim=1).all()


def test_rows_without_a_common_id_are_not_guided() -> None:
    everything, nothing = torch.tensor([[1.0, 2.0]]), torch.tensor([[-INF, -INF]])
    assert torch.equal(guide(everything, nothing, 2.0), everything)
    assert torch.equal(guide(everything, nothing, 0.0), nothing)
    assert guide(torch.tensor([torch.nan, 0.0]), torch.zeros(2), 2.0).isnan().any()  # a broken network is no guidance
