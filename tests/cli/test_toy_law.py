"""The toy's conditionals and laws: against enumeration, and against what the samplers draw from another oracle."""

import pytest
import torch
from helpers.enumerated_steps import OncePerState
from helpers.exact_laws import chi_square_p_value, sequence_numbers

from discrete_lit.cli.toy_law import ToyLaw, diffusion_law, distances, maskgit_law, total_variation
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.diffusion.parameterization import PosteriorHead
from discrete_lit.diffusion.processes import AbsorbingProcess, UniformProcess
from discrete_lit.samplers import AncestralSampler, MaskGITSampler

LAW = ToyLaw(4, 3)
DRAWS = 20_000


def test_the_posterior_is_that_of_enumeration() -> None:
    likelihood = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = LAW.sequences()
    joint = LAW.probabilities() * likelihood[:, torch.arange(4), rows].prod(dim=2)  # (5, 81)
    each = torch.einsum(
        "bs,snk->bnk", joint / joint.sum(dim=1, keepdim=True), torch.nn.functional.one_hot(rows).double()
    )
    torch.testing.assert_close(LAW.posterior(likelihood), each, rtol=0, atol=1e-14)


def test_one_round_draws_every_cell_apart() -> None:
    rows, marginals = LAW.sequences(), LAW.posterior(torch.ones(1, 4, 3, dtype=torch.float64))[0]
    apart = marginals[torch.arange(4), rows].prod(dim=1)
    for law in (maskgit_law(LAW, 1), *(diffusion_law(LAW, kind(3), 1) for kind in (AbsorbingProcess, UniformProcess))):
        torch.testing.assert_close(law, apart, rtol=0, atol=1e-12)


# Another network than the toy's: it sums over all 81 rows, and knows nothing of chains.
@pytest.mark.parametrize(
    ("process", "sampler", "law"),
    [
        *(
            (AbsorbingProcess(3), MaskGITSampler(rounds, choice), lambda r=rounds, c=choice: maskgit_law(LAW, r, c))
            for rounds, choice in ((2, 4.5), (3, 0.5), (4, 4.5))
        ),
        *(
            (kind(3), AncestralSampler(rounds), lambda k=kind, r=rounds: diffusion_law(LAW, k(3), r))
            for kind in (AbsorbingProcess, UniformProcess)
            for rounds in (2, 5)
        ),
    ],
)
@torch.no_grad()
def test_samplers_draw_the_law(process, sampler, law) -> None:
    oracle = OncePerState(
        process, PosteriorHead(), LAW.probabilities().expand(2, -1), length=4, timed=not process.masks
    )
    random = CounterRandom(3, torch.arange(DRAWS))
    labels, denoiser = torch.zeros(DRAWS, dtype=torch.int64), oracle.denoiser(LinearSchedule())
    numbers = sequence_numbers(sampler(oracle, labels, random, denoiser=denoiser).tokens, 3)
    exact = law()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-12)
    assert chi_square_p_value(numbers, exact) > 1e-3
    assert chi_square_p_value(numbers, LAW.probabilities()) < 1e-6, "too few draws to tell it from the truth"


def test_distances_from_the_truth() -> None:
    found = distances(LAW, most_rounds=5)
    assert found["autoregressive"] == [(4, pytest.approx(0, abs=1e-12))]
    assert [rounds for rounds, _ in found["MaskGIT"]] == [1, 2, 3, 4]
    for name in ("masked diffusion", "uniform diffusion"):
        values = [value for _, value in found[name]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1


@pytest.mark.parametrize(("rounds", "choice"), [(0, 4.5), (5, 4.5), (2, 0.0)])
def test_rounds_and_noise_that_maskgit_has_not(rounds: int, choice: float) -> None:
    with pytest.raises(ValueError, match=r"rounds must lie in \[1, 4\]|choice_temperature must be > 0"):
        maskgit_law(LAW, rounds, choice)
