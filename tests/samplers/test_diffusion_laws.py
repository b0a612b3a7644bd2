"""The law of every step-by-step sampler, enumerated from its own transitions, and its draws held against that law."""

from itertools import product

import pytest
import torch
from exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from exact_oracle import LENGTH, VOCAB_SIZE, ExactBackbone, random_law, reference_law

from discrete_lit.processes import CounterRandom, LinearSchedule, SquareSchedule
from discrete_lit.processes.dense import GaussianProcess
from discrete_lit.processes.heads import CavityHead, PosteriorHead, ScoreHead
from discrete_lit.processes.mixture import AbsorbingProcess, HybridProcess, UniformProcess
from discrete_lit.samplers import AncestralSampler, Drawing, EulerSampler, FirstHittingSampler, TauLeapingSampler
from discrete_lit.samplers.prediction import Prediction

PROCESSES = {
    "absorbing": AbsorbingProcess(VOCAB_SIZE),
    "uniform": UniformProcess(VOCAB_SIZE),
    "hybrid": HybridProcess(VOCAB_SIZE, 0.6),
    "gaussian": GaussianProcess(VOCAB_SIZE, 0.5),
}
HEADS = {
    "posterior": lambda process: PosteriorHead(),
    "cavity": lambda process: CavityHead(),
    "score": lambda process: ScoreHead(scale_by_noise=process.masks, mask_output=process.masks),
}
LAWS = torch.stack((reference_law(), random_law(seed=1)))


class Noise99(LinearSchedule):
    """m = 0.99 t: finite noise at t = 1."""

    def mask_probability(self, t):
        return 0.99 * t.double()

    def derivative(self, t):
        return torch.full_like(t, 0.99, dtype=torch.float64)

    def inverse(self, m):
        return m.double() / 0.99


class OncePerState(ExactBackbone):
    """The exact backbone, asked once for all rows that are alike: draws by the hundred thousand have few states."""

    def logits_at(self, tokens: torch.Tensor, labels: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        numbers = sequence_numbers(tokens, self.process.states) * len(self.laws) + labels
        levels, level = alpha[:, 0].unique(return_inverse=True)
        different, place = (numbers * len(levels) + level).unique(return_inverse=True)
        first = torch.empty_like(different).scatter(0, place, torch.arange(len(place)))
        return super().logits_at(tokens[first], labels[first], alpha[first])[place]


def backbone_of(process, head, **settings) -> ExactBackbone:
    return OncePerState(process, head, **settings)


def predict(backbone, denoiser, states, interval, scale=1.0) -> Prediction:
    """As the sampler's, at the exact level, which time in float32 tells a network only nearly."""
    labels = [torch.zeros(len(states), dtype=torch.int64)]
    if scale != 1:
        labels.append(torch.full_like(labels[0], backbone.layout.null_label))
    outputs = tuple(
        denoiser.head(backbone.logits_at(states, label, interval.seen.alpha), states, interval.seen) for label in labels
    )
    return Prediction(denoiser, states, interval.seen, outputs, scale)


def transitions(sampler, backbone, schedule, scale=1.0) -> list[torch.Tensor]:
    """For each step `(S^N, N, S)`: the law of every token after it, from every sequence of states."""
    process, denoiser = backbone.process, backbone.denoiser(schedule)
    states = all_sequences(process.states, LENGTH)
    labels = torch.zeros(len(states), dtype=torch.int64)
    drawing = Drawing(backbone, labels, CounterRandom(0, torch.arange(len(states))), None, None, denoiser, False)
    steps = []
    for interval in sampler.intervals(schedule, drawing):
        jumps = sampler.jumps(predict(backbone, denoiser, states, interval, scale), interval)
        steps.append(jumps.distribution(states, process.states))
    return steps


def joint(step: torch.Tensor) -> torch.Tensor:
    """`(S^N, S^N)` of tokens that move apart."""
    first, second, third = step.unbind(dim=1)
    return torch.einsum("ni,nj,nk->nijk", first, second, third).flatten(1)


def enumerated_law(sampler, backbone, schedule, scale=1.0) -> torch.Tensor:
    """`(K^N,)`: what T steps from the prior lead to."""
    process = backbone.process
    prior = process.prior()
    law = torch.einsum("i,j,k->ijk", prior, prior, prior).flatten()
    for step in transitions(sampler, backbone, schedule, scale):
        law = law @ joint(step)
    grid = law.reshape([process.states] * LENGTH)
    clean = grid[:VOCAB_SIZE, :VOCAB_SIZE, :VOCAB_SIZE].flatten()
    assert float(clean.sum()) == pytest.approx(1, abs=1e-9), "masks are left"
    return clean


@torch.no_grad()
def draw_numbers(sampler, backbone, schedule, count=100_000, seed=5) -> torch.Tensor:
    labels = torch.zeros(count, dtype=torch.int64)
    random = CounterRandom(seed, torch.arange(count))
    return sequence_numbers(sampler(backbone, labels, random, denoiser=backbone.denoiser(schedule)).tokens, VOCAB_SIZE)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("process", "divergences"),
    [
        ("absorbing", [0.1211186343, 0.0429003963, 0.0137099330, 0.0040314574]),
        ("uniform", [0.1211186343, 0.0759639493, 0.0296032343, 0.0090398821]),
    ],
)
def test_divergence_of_the_ancestral_law(process: str, head: str, divergences: list[float]) -> None:
    """Published values at T = 1, 2, 4, 8 with alpha = 1 - i / T."""
    chain = PROCESSES[process]
    backbone, law = backbone_of(chain, HEADS[head](chain)), reference_law()
    for steps, expected in zip((1, 2, 4, 8), divergences, strict=True):
        drawn = enumerated_law(AncestralSampler(steps=steps), backbone, LinearSchedule())
        # Scores begin at alpha = 1e-8: at 0 they would tell nothing.
        tolerance = 1e-7 if head == "score" and process == "uniform" else 2e-10
        assert float((law * (law / drawn).log()).sum()) == pytest.approx(expected, abs=tolerance)


def test_distance_of_the_ancestral_law() -> None:
    backbone = backbone_of(PROCESSES["absorbing"], CavityHead())
    for steps, expected in zip((1, 2, 4, 8), (0.1984933943, 0.1095566801, 0.0574585563, 0.0294592445), strict=True):
        drawn = enumerated_law(AncestralSampler(steps=steps), backbone, LinearSchedule())
        assert float((drawn - reference_law()).abs().sum() / 2) == pytest.approx(expected, abs=2e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_analytic_and_ancestral_transitions_are_the_same(process: str) -> None:
    """Steps made of scores and steps made of clean ids, for every head."""
    chain, schedule = PROCESSES[process], Noise99()
    reference = transitions(AncestralSampler(steps=4), backbone_of(chain, CavityHead()), schedule)
    for head, law in product(HEADS.values(), ("clean", "score", "transition")):
        other = transitions(AncestralSampler(steps=4, guidance_law=law), backbone_of(chain, head(chain)), schedule)
        for number, (one, two) in enumerate(zip(reference, other, strict=True)):
            reachable = ~one.isnan()
            torch.testing.assert_close(one[reachable], two[reachable], atol=1e-9, rtol=0, msg=f"{law} step {number}")


@pytest.mark.parametrize("law", ["clean", "score"])
@pytest.mark.parametrize("sampler", [AncestralSampler, EulerSampler, TauLeapingSampler])
@pytest.mark.parametrize("process", PROCESSES)
def test_draws_follow_the_enumerated_law(process: str, sampler: type[AncestralSampler], law: str) -> None:
    chain, schedule = PROCESSES[process], Noise99() if process == "gaussian" else SquareSchedule()
    if sampler is TauLeapingSampler and process == "gaussian":
        pytest.skip("its jumps add up: their own test")
    head = ScoreHead(process == "absorbing", chain.masks) if law == "score" else CavityHead()
    made = sampler(steps=4, guidance_law=law)
    backbone = backbone_of(chain, head)
    expected = enumerated_law(made, backbone, schedule)
    numbers = draw_numbers(made, backbone, schedule)
    assert chi_square_p_value(numbers, expected) > 1e-4
    assert chi_square_p_value(numbers, reference_law()) < 1e-6  # it is the T-step law, not the model's


@pytest.mark.parametrize("head", HEADS)
def test_first_hitting_follows_the_model(head: str) -> None:
    chain = PROCESSES["absorbing"]
    backbone = backbone_of(chain, HEADS[head](chain), timed=False)
    assert chi_square_p_value(draw_numbers(FirstHittingSampler(), backbone, SquareSchedule()), reference_law()) > 1e-4
