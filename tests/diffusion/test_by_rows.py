"""Losses of wide logits: value, gradient and memory of working a few rows at a time."""

import pytest
import torch

from discrete_lit.diffusion import (
    AbsorbingProcess,
    DiscretizedGaussianProcess,
    Head,
    HybridProcess,
    LeaveOneOutHead,
    LogLinearSchedule,
    NoiseLevel,
    PosteriorHead,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion import losses as by_rows_module
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiffusionLoss,
    DiscreteFlowMatching,
    DiscreteTimeBound,
    HybridBound,
    MaskedCrossEntropy,
    ScoreEntropy,
)

CASES = {
    "score entropy, masks": (ScoreEntropy(), ScoreHead(), AbsorbingProcess(6)),
    "score entropy, uniform": (ScoreEntropy(), ScoreHead(False, False), UniformProcess(6)),
    "score entropy, hybrid": (ScoreEntropy(), ScoreHead(False), HybridProcess(6)),
    "score entropy, gaussian": (ScoreEntropy(), ScoreHead(False, False), DiscretizedGaussianProcess(6, 0.5)),
    "cross-entropy": (MaskedCrossEntropy(), LeaveOneOutHead(), AbsorbingProcess(6)),
    "continuous, uniform": (ContinuousBound(), LeaveOneOutHead(), UniformProcess(6)),
    "continuous, hybrid": (ContinuousBound(), LeaveOneOutHead(), HybridProcess(6)),
    "continuous, gaussian": (ContinuousBound(), LeaveOneOutHead(), DiscretizedGaussianProcess(6, 0.5)),
    "steps, masks": (DiscreteTimeBound(4), LeaveOneOutHead(), AbsorbingProcess(6)),
    "steps, hybrid": (DiscreteTimeBound(4), LeaveOneOutHead(), HybridProcess(6)),
    "steps and cross-entropy": (HybridBound(4, 0.1), LeaveOneOutHead(), UniformProcess(6)),
    "flow matching": (DiscreteFlowMatching(), PosteriorHead(), HybridProcess(6)),
}


def batch_of(loss: DiffusionLoss, head: Head, process):
    outputs = 6 + int(head.mask_output)
    logits = torch.randn(3, 5, outputs, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(6, (3, 5))
    level = loss.level(LogLinearSchedule(), torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64), 5)
    states = loss.corrupt(process, tokens, level, torch.rand(3, 5, dtype=torch.float64))
    return logits, tokens, states, level


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_differences_and_by_autograd_whatever_the_chunks(name: str, monkeypatch) -> None:
    loss, head, process = CASES[name]
    logits, tokens, states, level = batch_of(loss, head, process)
    arguments = head, tokens, states, process, level
    assert torch.autograd.gradcheck(lambda given: loss(given, *arguments), logits, rtol=1e-5)
    whole = loss(logits, *arguments)
    assert (whole > -1e-9).all()
    weights = torch.rand_like(whole)
    (gradient,) = torch.autograd.grad((whole * weights).sum(), logits)
    monkeypatch.setattr(by_rows_module, "_ENTRIES_AT_ONCE", 12)
    monkeypatch.setattr(by_rows_module, "_MOST_PARTS", 100)
    parts = loss(logits, *arguments)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    (in_parts,) = torch.autograd.grad((parts * weights).sum(), logits)
    torch.testing.assert_close(in_parts, gradient, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(loss(logits, *arguments), whole.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_good_as_its_digits(name: str) -> None:
    loss, head, process = CASES[name]
    logits, tokens, states, level = batch_of(loss, head, process)
    logits = logits.detach().float()
    found = loss(logits, head, tokens, states, process, level)
    expected = loss(logits.double(), head, tokens, states, process, level)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "steps" not in name])
@pytest.mark.parametrize("t", [1e-7, 1 - 1e-7])
def test_finite_at_both_ends_of_time(name: str, t: float) -> None:
    """No 0 log 0 and no infinite odds reach a value or a gradient in float32, however wrong the network."""
    loss, head, process = CASES[name]
    outputs = 6 + int(head.mask_output)
    logits = (torch.randn(2, 5, outputs) * 30).requires_grad_()
    tokens = torch.randint(6, (2, 5))
    level = NoiseLevel.at(LogLinearSchedule(1e-5), torch.full((2, 1), t, dtype=torch.float64))
    for states in (tokens, process.corrupt(tokens, level.alpha * 0, torch.rand(2, 5, dtype=torch.float64))):
        if name == "score entropy, gaussian" and t < 0.5 and not torch.equal(states, tokens):
            continue  # a jump across the range at no noise has odds of 1e30 against it
        scaled = logits if head.kind != "score" else logits / 30
        value = loss(scaled, head, tokens, states, process, level)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_of_the_logits_only_their_gradient_is_kept() -> None:
    """What lives from the forward to the backward pass is one tensor of their size, for the widest of the losses."""
    loss, head, process = CASES["continuous, uniform"]
    logits, tokens, states, level = batch_of(loss, head, process)
    step = loss(logits, head, tokens, states, process, level).grad_fn
    kept = []
    while step is not None:
        kept += [tensor.numel() for tensor in getattr(step, "saved_tensors", ())]
        step = step.next_functions[0][0] if step.next_functions else None
    assert kept == [logits.numel()]


def test_tokens_that_are_not_masked_cost_nothing_and_teach_nothing() -> None:
    loss, head, process = CASES["cross-entropy"]
    logits, tokens, _, level = batch_of(loss, head, process)
    value = loss(logits, head, tokens, tokens, process, level)
    assert torch.equal(value, torch.zeros_like(value))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))
