"""The oracle itself: the reference values of its law, and its conditionals against brute force over all noisy pairs."""

import pytest
import torch
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import (
    ENTROPY,
    MARGINAL_ENTROPIES,
    ExactBackbone,
    exact_leave_one_out,
    exact_posterior,
    exact_score,
    masked_entropies,
    noisy_law,
    reference_law,
)

from discrete_lit.diffusion.dense_processes import DiscretizedGaussianProcess
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import LeaveOneOutHead, PosteriorHead, ScoreHead
from discrete_lit.diffusion.processes import (
    AbsorbingProcess,
    ForwardProcess,
    HybridProcess,
    UniformProcess,
)

PROCESSES = [AbsorbingProcess(4), UniformProcess(4), HybridProcess(4, 0.6), DiscretizedGaussianProcess(4, 0.5)]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def test_values_of_the_law() -> None:
    law = reference_law()
    assert float((law * 268).sum()) == pytest.approx(268)
    assert float(-(law * law.log()).sum()) == pytest.approx(ENTROPY, abs=5e-11)
    terms = masked_entropies(law)
    assert terms.tolist() == pytest.approx([1.2775804489, 1.3669868864, 1.3828429848], abs=5e-11)
    assert float(terms.sum()) == pytest.approx(ENTROPY, abs=1e-9)
    assert 3 * float(terms[2]) == pytest.approx(MARGINAL_ENTROPIES, abs=1e-9)


@each_process
def test_conditionals_by_brute_force(process: ForwardProcess) -> None:
    """From the table of p(x_0, x_t) of all pairs, made of the matrix exponential alone."""
    law, alpha = reference_law(), 0.6
    clean, states = all_sequences(4, 3), all_sequences(process.states, 3)
    kernel = process.matrix(torch.tensor(alpha, dtype=torch.float64))
    pairs = law[:, None] * torch.stack([kernel[clean[:, n]][:, states[:, n]] for n in range(3)]).prod(dim=0)
    torch.testing.assert_close(pairs.sum(dim=0), noisy_law(law, process, alpha))
    levels = torch.full((len(states), 1), alpha, dtype=torch.float64)
    posterior, leave_one_out = (find(law, states, process, levels) for find in (exact_posterior, exact_leave_one_out))
    scores = exact_score(law, states, process, levels)
    noisy = pairs.sum(dim=0).reshape([process.states] * 3)
    for n in range(3):
        of_id = torch.stack([pairs[clean[:, n] == k].sum(dim=0) for k in range(4)], dim=1)
        torch.testing.assert_close(posterior[:, n], of_id / of_id.sum(dim=1, keepdim=True))
        # Summed over what this token became, the table is of the others alone.
        others = of_id.T.reshape(4, *[process.states] * 3).sum(dim=1 + n, keepdim=True)
        others = others.expand(4, *[process.states] * 3).reshape(4, -1).T
        torch.testing.assert_close(leave_one_out[:, n], others / others.sum(dim=1, keepdim=True))
        moved = noisy.movedim(n, 2)
        rows = [moved[tuple(states[i, m] for m in range(3) if m != n)] for i in range(len(states))]
        torch.testing.assert_close(scores[:, n], torch.stack(rows) / noisy.reshape(-1)[:, None])


@each_process
@pytest.mark.parametrize("name", ["posterior", "leave_one_out", "score", "scaled score"])
def test_logits_are_made_for_the_head(process: ForwardProcess, name: str) -> None:
    head = {
        "posterior": PosteriorHead(),
        "leave_one_out": LeaveOneOutHead(),
        "score": ScoreHead(scale_by_noise=False, mask_output=process.masks),
        "scaled score": ScoreHead(scale_by_noise=True, mask_output=process.masks),
    }[name]
    backbone = ExactBackbone(process, head)
    states = all_sequences(process.states, 3)
    labels = torch.zeros(len(states), dtype=torch.int64)
    alpha = torch.full((len(states), 1), 0.6, dtype=torch.float64)
    level = NoiseLevel(t=torch.zeros_like(alpha), alpha=alpha, noise=1 - alpha, rate=torch.zeros_like(alpha))
    logits = backbone(states, labels, time=-alpha[:, 0].log().float())
    torch.testing.assert_close(logits, backbone.logits_at(states, labels, alpha), rtol=1e-5, atol=1e-5)
    find = {"posterior": exact_posterior, "leave_one_out": exact_leave_one_out, "score": exact_score}[head.kind]
    expected = find(reference_law(), states, process, alpha)
    prediction = head(backbone.logits_at(states, labels, alpha), states, level).exp().double()
    torch.testing.assert_close(prediction, expected, rtol=1e-10, atol=1e-10)
