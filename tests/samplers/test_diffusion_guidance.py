"""The three laws of guidance, against values worked out by hand and against enumeration."""

import pytest
import torch
from helpers.enumerated_steps import HEADS, PROCESSES, OncePerState, enumerated_law, predict, transitions
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import random_law, reference_law

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.diffusion.parameterization import LeaveOneOutHead, ScoreHead
from discrete_lit.diffusion.processes import AbsorbingProcess
from discrete_lit.samplers import AncestralSampler, EulerSampler, RemaskingSampler, SamplingContext, TauLeapingSampler

WITH_LABEL = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
WITHOUT = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LAWS = torch.stack((reference_law(), random_law(seed=1)))


def first_jump(sampler, scale: float, head) -> tuple[float, torch.Tensor]:
    """Of one masked token, in the first of ten steps: the probability of its reveal is 0.1 without guidance."""
    backbone = OncePerState(PROCESSES["absorbing"], head, torch.stack((WITH_LABEL, WITHOUT)), length=1)
    denoiser, labels = backbone.denoiser(LinearSchedule()), torch.zeros(1, dtype=torch.int64)
    context = SamplingContext(backbone, labels, random=CounterRandom(0, labels), denoiser=denoiser)
    interval = sampler.intervals(denoiser.schedule, context)[0]
    jumps = sampler.jumps(predict(backbone, denoiser, torch.tensor([[4]]), interval, scale), interval)
    return float(jumps.probability), jumps.targets[0, 0].softmax(dim=-1)


@pytest.mark.parametrize("head", [LeaveOneOutHead(), ScoreHead()])
@pytest.mark.parametrize(
    ("law", "weak", "strong"),
    [("clean", 0.1, 0.1), ("transition", 0.1353082466, 0.4257537551), ("score", 0.1408333333, 0.6672718943)],
)
def test_a_masked_token_by_hand(law: str, weak: float, strong: float, head) -> None:
    """`p_c^2 p_u^-1` and its Z; u = 0.1 becomes u, u Z / (1 - u + u Z), and u Z."""
    sampler = AncestralSampler(steps=10, guidance_law=law)
    guided = torch.tensor([0.8698224852, 0.0236686391, 0.0355029586, 0.0710059172], dtype=torch.float64)
    probability, where_to = first_jump(sampler, 2.0, head)
    assert probability == pytest.approx(weak, abs=1e-8)
    torch.testing.assert_close(where_to, guided, atol=1e-8, rtol=0)
    probability, where_to = first_jump(sampler, 5.0, head)
    assert probability == pytest.approx(strong, abs=1e-8)
    power = WITH_LABEL**5 / WITHOUT**4
    assert float(power.sum()) == pytest.approx(6.6727189429, abs=1e-9)
    torch.testing.assert_close(where_to, power / power.sum(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("law", ["clean", "transition", "score"])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_scales_one_and_zero_are_the_models_themselves(law: str, scale: float) -> None:
    sampler = AncestralSampler(steps=10, guidance_law=law)
    probability, where_to = first_jump(sampler, scale, LeaveOneOutHead())
    assert probability == pytest.approx(0.1)
    torch.testing.assert_close(where_to, WITH_LABEL if scale == 1 else WITHOUT, atol=1e-12, rtol=0)


def test_rates_grow_by_z() -> None:
    """Samplers that step along rates: dt m' / m = 0.1 too."""
    z = float((WITH_LABEL**2 / WITHOUT).sum())
    assert z == pytest.approx(1.4083333333, abs=1e-9)
    leaping = 1 - torch.exp(torch.tensor(-0.1 * z, dtype=torch.float64))
    for sampler, expected in ((EulerSampler, 0.1 * z), (TauLeapingSampler, float(leaping))):
        assert first_jump(sampler(steps=10, guidance_law="score"), 2.0, LeaveOneOutHead())[0] == pytest.approx(expected)
    probability, _ = first_jump(EulerSampler(steps=10, guidance_law="score"), 20.0, LeaveOneOutHead())
    assert probability == 1.0  # Z is 3e4: more than certain is certain
    remasking = RemaskingSampler(steps=10, guidance_law="score", strategy="rescale", eta=0.5)
    assert first_jump(remasking, 2.0, LeaveOneOutHead())[0] == pytest.approx(0.1 * z)  # nothing to mask yet at t = 1


@pytest.mark.parametrize("process", PROCESSES)
def test_the_transition_law_is_of_all_states(process: str) -> None:
    """`q_c^s q_u^(1 - s)`, normalised, of the transitions of each alone."""
    chain, scale, schedule = PROCESSES[process], 2.5, LinearSchedule()
    backbone = OncePerState(chain, LeaveOneOutHead(), LAWS)
    alone = OncePerState(chain, LeaveOneOutHead(), LAWS[1:].expand(2, -1))
    sampler = AncestralSampler(steps=3, guidance_law="transition")
    steps = zip(
        transitions(sampler, backbone, schedule, scale),
        transitions(sampler, backbone, schedule),
        transitions(sampler, alone, schedule),
        strict=True,
    )
    for guided, given, without in steps:
        power = torch.where(given > 0, given**scale * torch.where(without > 0, without, given) ** (1 - scale), 0.0)
        torch.testing.assert_close(guided, power / power.sum(dim=-1, keepdim=True), atol=1e-9, rtol=0)


@pytest.mark.parametrize("process", ["uniform", "hybrid", "gaussian"])
@pytest.mark.parametrize("head", HEADS)
def test_the_clean_law_is_of_every_heads_clean_ids(process: str, head: str) -> None:
    """Guided posteriors are guided cavities: what they differ by is the same with and without the label."""
    chain, schedule = PROCESSES[process], LinearSchedule()
    steps = [
        transitions(AncestralSampler(steps=3), OncePerState(chain, make(chain), LAWS), schedule, 2.0)
        for make in (HEADS["cavity"], HEADS[head])
    ]
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def test_the_joint_law_is_not_the_tilted_one_but_of_one_token() -> None:
    def tilted(given: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        power = given**2 / without
        return power / power.sum()

    one = OncePerState(AbsorbingProcess(4), LeaveOneOutHead(), torch.stack((WITH_LABEL, WITHOUT)), length=1)
    _, where_to = first_jump(AncestralSampler(steps=10), 2.0, LeaveOneOutHead())
    torch.testing.assert_close(where_to, tilted(*one.laws), atol=1e-9, rtol=0)
    three = OncePerState(AbsorbingProcess(4), LeaveOneOutHead(), LAWS)
    law = enumerated_law(AncestralSampler(steps=64), three, LinearSchedule(), 2.0)
    assert float(law.sum()) == pytest.approx(1) and len(law) == len(all_sequences(4, 3))
    assert float((law - tilted(*LAWS)).abs().sum()) > 0.02
