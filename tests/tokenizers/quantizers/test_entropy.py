"""Entropy terms against sums over every code in float64."""

from math import log

import pytest
import torch
from torch import Tensor

from discrete_lit.tokenizers.quantizers.entropy import bits_entropy, joint_bits_entropy, softmax_entropies


def entropies_over_every_code(log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample and batch entropy of the codes of bits `(n, bits)`, by the probability of each code."""
    bits = log_odds.shape[1]
    codes = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
    probabilities = torch.where(codes == 1, log_odds.sigmoid()[:, None], (-log_odds).sigmoid()[:, None]).prod(dim=2)
    assert probabilities.shape == (len(log_odds), 2**bits)
    mean = probabilities.mean(dim=0)
    return torch.special.entr(probabilities).sum(dim=1).mean(), torch.special.entr(mean).sum()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_bits_are_exact(bits: int) -> None:
    log_odds = torch.randn(30, bits, dtype=torch.float64, requires_grad=True)
    per_sample, batch = entropies_over_every_code(log_odds)
    mine = bits_entropy(log_odds), joint_bits_entropy(log_odds[:, None])
    for value, expected in zip(mine, (per_sample, batch), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(entropy, log_odds, retain_graph=True)[0] for entropy in (value, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_batch_entropy_is_not_the_sum_over_bits() -> None:
    """Two codes that differ in every bit: one bit of entropy together, one in each bit by itself."""
    log_odds = torch.tensor([[50.0] * 6, [-50.0] * 6])
    assert float(joint_bits_entropy(log_odds[:, None])) == pytest.approx(log(2))
    assert float(joint_bits_entropy(log_odds[:, :, None])) == pytest.approx(6 * log(2))


def test_groups_add_up() -> None:
    log_odds = torch.randn(20, 3, 4)
    by_group = [joint_bits_entropy(group[:, None]) for group in log_odds.unbind(dim=1)]
    torch.testing.assert_close(joint_bits_entropy(log_odds), torch.stack(by_group).sum())


def test_eighteen_bits_over_every_code() -> None:
    log_odds = torch.randn(12, 18, dtype=torch.float64) * 3
    mean = torch.zeros(1, dtype=torch.float64)
    for row in log_odds:
        outcomes = torch.ones(1, dtype=torch.float64)
        for odds in row:
            outcomes = torch.cat((outcomes * odds.sigmoid(), outcomes * (-odds).sigmoid()))
        mean = mean + outcomes / len(log_odds)
    assert len(mean) == 2**18
    expected = torch.special.entr(mean).sum()
    torch.testing.assert_close(joint_bits_entropy(log_odds[:, None]), expected, rtol=1e-12, atol=0)
    single = joint_bits_entropy(log_odds.float()[:, None])
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=0)


def test_softmax_is_exact() -> None:
    logits = (torch.randn(40, 17, dtype=torch.float64) * 2).requires_grad_()
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    expected = (
        torch.special.entr(probabilities).sum(dim=1).mean(),
        torch.special.entr(probabilities.mean(dim=0)).sum(),
    )
    for value, wanted in zip(softmax_entropies(logits), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(entropy, logits, retain_graph=True)[0] for entropy in (value, wanted))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_bits_are_a_softmax_over_their_codes() -> None:
    latents, temperature = torch.randn(25, 5, dtype=torch.float64), 0.7
    codes = (((torch.arange(32)[:, None] >> torch.arange(5)) & 1) * 2 - 1).double()
    per_sample, batch = softmax_entropies(2 * latents @ codes.T / temperature)
    log_odds = 4 * latents / temperature
    torch.testing.assert_close(bits_entropy(log_odds), per_sample, rtol=1e-12, atol=0)
    torch.testing.assert_close(joint_bits_entropy(log_odds[:, None]), batch, rtol=1e-12, atol=0)


def test_offset_inside_the_logarithm() -> None:
    logits = torch.randn(10, 6, dtype=torch.float64)
    mean = logits.softmax(dim=1).mean(dim=0)
    expected = -(mean * (mean + 0.01).log()).sum()
    torch.testing.assert_close(softmax_entropies(logits, log_offset=0.01)[1], expected)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_gradients_of_certain_and_undecided_bits_are_finite(size: float) -> None:
    """Codes without any probability, as a temperature of 0.01 makes them, and latents of exactly 0."""
    log_odds = torch.full((3, 1, 8), size, requires_grad=True)
    logits = (torch.eye(4) * size).requires_grad_()
    total = bits_entropy(log_odds[:, 0]) + joint_bits_entropy(log_odds) + torch.stack(softmax_entropies(logits)).sum()
    total.backward()
    assert log_odds.grad is not None and log_odds.grad.isfinite().all()
    assert logits.grad is not None and logits.grad.isfinite().all()
