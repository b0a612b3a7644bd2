"""The transitions of a sampler of diffusion on the exact oracle, for every sequence of states."""

import pytest
import torch

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.diffusion.dense_processes import DiscretizedGaussianProcess
from discrete_lit.diffusion.parameterization import LeaveOneOutHead, PosteriorHead, ScoreHead
from discrete_lit.diffusion.processes import (
    AbsorbingProcess,
    HybridProcess,
    UniformProcess,
)
from discrete_lit.samplers import SamplingContext
from discrete_lit.samplers.diffusion import finite_noise
from discrete_lit.samplers.diffusion_guidance import Prediction
from helpers.exact_laws import all_sequences, sequence_numbers
from helpers.exact_oracle import LENGTH, VOCAB_SIZE, ExactBackbone

PROCESSES = {
    "absorbing": AbsorbingProcess(VOCAB_SIZE),
    "uniform": UniformProcess(VOCAB_SIZE),
    "hybrid": HybridProcess(VOCAB_SIZE, 0.6),
    "gaussian": DiscretizedGaussianProcess(VOCAB_SIZE, 0.5),
}
HEADS = {
    "posterior": lambda process: PosteriorHead(),
    "cavity": lambda process: LeaveOneOutHead(),
    "score": lambda process: ScoreHead(scale_by_noise=process.masks, mask_output=process.masks),
}


class FiniteNoise(LinearSchedule):
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


def context_of(backbone, rows: int, schedule, seed=0) -> SamplingContext:
    """The context of `rows` sequences of class 0, as a sampler gets it."""
    labels = torch.zeros(rows, dtype=torch.int64)
    return SamplingContext(
        backbone, labels, random=CounterRandom(seed, torch.arange(rows)), denoiser=backbone.denoiser(schedule)
    )


def predict(backbone, denoiser, states, interval, scale=1.0) -> Prediction:
    """As the sampler's, at the exact level, which time in float32 tells a network only nearly."""
    labels, level = [torch.zeros(len(states), dtype=torch.int64)], finite_noise(interval.t)
    if scale != 1:
        labels.append(torch.full_like(labels[0], backbone.layout.null_label))
    alpha = level.alpha.expand(len(states), 1)
    outputs = tuple(denoiser.head(backbone.logits_at(states, label, alpha), states, level) for label in labels)
    return Prediction(denoiser=denoiser, x_t=states, level=level, outputs=outputs, scale=scale)


def transitions(sampler, backbone, schedule, scale=1.0, only=None) -> list[torch.Tensor]:
    """For each step, or one alone, `(S^N, N, S)`: the law of every token after it, from every sequence of states."""
    process, denoiser = backbone.process, backbone.denoiser(schedule)
    states = all_sequences(process.states, LENGTH)
    steps, intervals = [], sampler.intervals(schedule, context_of(backbone, len(states), schedule))
    for interval in intervals if only is None else intervals[only : only + 1]:
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
