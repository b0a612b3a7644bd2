"""Heads and their conversions: from any true prediction to any other, for every noisy sequence."""

from collections.abc import Callable

import pytest
import torch
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import exact_leave_one_out, exact_posterior, exact_score, reference_law

from discrete_lit.diffusion import (
    AbsorbingProcess,
    Denoiser,
    DiscretizedGaussianProcess,
    ForwardProcess,
    HybridProcess,
    LeaveOneOutHead,
    LinearSchedule,
    NoiseLevel,
    PosteriorHead,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion.parameterization import (
    leave_one_out_from_posterior,
    leave_one_out_from_score,
    posterior_from_leave_one_out,
    score_from_leave_one_out,
)

PROCESSES: dict[str, Callable[[], ForwardProcess]] = {
    "absorbing": lambda: AbsorbingProcess(4),
    "uniform": lambda: UniformProcess(4),
    "hybrid": lambda: HybridProcess(4, 0.6),
    "gaussian": lambda: DiscretizedGaussianProcess(4, 0.5),
}


@pytest.mark.parametrize("alpha", [0.05, 0.6, 0.97])
@pytest.mark.parametrize("name", PROCESSES)
def test_every_meaning_from_every_other(name: str, alpha: float) -> None:
    process = PROCESSES[name]()
    states = all_sequences(process.states, 3)
    alphas = torch.full((len(states), 1), alpha, dtype=torch.float64)
    level = NoiseLevel(t=alphas, alpha=alphas, noise=1 - alphas, rate=alphas)
    posterior, leave_one_out, score = (
        find(reference_law(), states, process, alphas) for find in (exact_posterior, exact_leave_one_out, exact_score)
    )
    # A token that masks alone have left says nothing of what its neighbours make of it.
    told = (states == 4) if name == "absorbing" else torch.ones_like(states, dtype=torch.bool)
    close = {"rtol": 1e-9, "atol": 1e-12}
    found = posterior_from_leave_one_out(leave_one_out.log(), states, process, level).exp()
    torch.testing.assert_close(found, posterior, **close)
    found = leave_one_out_from_posterior(posterior.log(), states, process, level).exp()
    torch.testing.assert_close(found[told], leave_one_out[told], **close)
    found = score_from_leave_one_out(leave_one_out.log(), states, process, level).exp()
    torch.testing.assert_close(found, score, **close)
    found = leave_one_out_from_score(score.log(), states, process, level).exp()
    torch.testing.assert_close(found[told], leave_one_out[told], rtol=1e-7, atol=1e-9)


def test_posterior_and_leave_one_out_agree_where_a_token_is_masked_alone() -> None:
    process = HybridProcess(4, 0.6)
    states = all_sequences(5, 3)
    alpha = torch.full((125, 1), 0.6, dtype=torch.float64)
    posterior, leave_one_out = (
        find(reference_law(), states, process, alpha) for find in (exact_posterior, exact_leave_one_out)
    )
    masked = states == 4
    torch.testing.assert_close(posterior[masked], leave_one_out[masked])
    assert ((posterior[~masked] - leave_one_out[~masked]).abs().sum(dim=-1) > 1e-2).all()


def test_heads_normalise_half_precision_in_float32() -> None:
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    level = NoiseLevel(t=half, alpha=half, noise=half, rate=half)
    logits, states = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 4]])
    for head in (PosteriorHead(), LeaveOneOutHead()):
        found = head(logits.bfloat16(), states, level)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, logits.bfloat16().float().log_softmax(dim=-1))
    scores = ScoreHead()(logits.bfloat16(), states, level)
    assert scores.dtype == torch.float32 and ScoreHead()(logits.double(), states, level).dtype == torch.float64
    assert (scores.gather(-1, states[..., None]) == 0).all()


@pytest.mark.parametrize("alpha", [1e-9, 0.3, 1 - 1e-9])
def test_scores_are_scaled_by_the_odds(alpha: float) -> None:
    """SEDD's `log(exp(sigma) - 1) + log K` comes off; no digit is lost at either end of time."""
    alphas = torch.tensor([[alpha]], dtype=torch.float64)
    level = NoiseLevel(t=alphas, alpha=alphas, noise=1 - alphas, rate=alphas)
    logits = torch.randn(1, 2, 6, dtype=torch.float64)
    states = torch.full((1, 2), 5)
    plain, scaled = (ScoreHead(scale_by_noise=scale)(logits, states, level)[..., :5] for scale in (False, True))
    expected = torch.log(torch.expm1(-alphas.log())) + torch.log(torch.tensor(5.0))
    torch.testing.assert_close(plain - scaled, expected.expand(1, 2)[..., None].expand(-1, -1, 5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "gaussian"])
def test_scores_without_masks_are_not_scaled_by_the_odds(name: str) -> None:
    process, parts = PROCESSES[name](), {"schedule": LinearSchedule(), "time_input": "none"}
    with pytest.raises(ValueError, match=f"must be False for {type(process).__name__}, got True: only the scores of"):
        Denoiser(process=process, head=ScoreHead(mask_output=False), **parts)
    Denoiser(process=process, head=ScoreHead(scale_by_noise=False, mask_output=False), **parts)
    Denoiser(process=HybridProcess(4), head=ScoreHead(), **parts)
