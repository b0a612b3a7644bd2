"""The exact laws of the toy of `discrete-lit watch`, held against enumeration and against the samplers themselves."""

from itertools import permutations, product

import pytest
import torch
from helpers.enumerated_steps import transitions
from helpers.exact_laws import all_sequences, chi_square_p_value
from helpers.exact_oracle import ExactBackbone

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import CosineSchedule, LinearSchedule
from discrete_lit.diffusion.parameterization import LeaveOneOutHead
from discrete_lit.diffusion.processes import AbsorbingProcess, UniformProcess
from discrete_lit.evaluation.favoured_colours import (
    FavouredColours,
    FavouredColoursBackbone,
    maskgit_law,
    raster_total_variation,
    total_variation,
    uniform_law,
    unmasking_law,
)
from discrete_lit.samplers import AncestralSampler, MaskGITSampler, RasterSampler
from discrete_lit.samplers.maskgit import masked_counts

SMALL = FavouredColours(length=3, colours=4, mixture=(0.3, 0.7), hits=(0.8, 0.35))
SEQUENCES = all_sequences(4, 3)
HITS = (SEQUENCES == torch.tensor(SMALL.favourites)).sum(dim=1)


def law_of_sequences() -> torch.Tensor:
    """`(64,)`: from the definition, position by position."""
    total = torch.zeros(64, dtype=torch.float64)
    for weight, hit in zip(SMALL.mixture, SMALL.hits, strict=True):
        of_place = torch.where(SEQUENCES == torch.tensor(SMALL.favourites), hit, (1 - hit) / 3).double()
        total += weight * of_place.prod(dim=1)
    return total


def by_hits(law: torch.Tensor) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.float64).index_add(0, HITS, law)


def conditionals(law: torch.Tensor, known: dict[int, int], place: int) -> list[float]:
    """p(each colour at a place | known places), by summing over all sequences."""
    fits = torch.ones(64, dtype=torch.bool)
    for where, colour in known.items():
        fits &= SEQUENCES[:, where] == colour
    weights = [float(law[fits & (SEQUENCES[:, place] == colour)].sum()) for colour in range(4)]
    return [weight / sum(weights) for weight in weights]


def enumerated_maskgit(law: torch.Tensor, steps: int, temperature: float) -> torch.Tensor:
    """Every draw and every order of confidence, sequence by sequence."""
    states = {(): 1.0}  # the known places and their colours
    masked = 3
    for step, stay in enumerate(masked_counts(CosineSchedule(), steps, 3)):
        tau, after = temperature * (1 - (step + 1) / steps), {}
        for state, chance in states.items():
            known = dict(state)
            places = [place for place in range(3) if place not in known]
            laws = {place: conditionals(law, known, place) for place in places}
            for colours in product(range(4), repeat=masked):
                drawn = dict(zip(places, colours, strict=True))
                p = chance
                for place in places:
                    p *= laws[place][drawn[place]]
                weights = {place: laws[place][drawn[place]] ** (1 / tau) if stay else 1.0 for place in places}
                for order in permutations(places):
                    q, left = p, sum(weights.values())
                    for place in order:  # Plackett and Luce: Gumbel noise orders places like this
                        q *= weights[place] / left
                        left -= weights[place]
                    kept = known | {place: drawn[place] for place in order[: masked - stay]}
                    key = tuple(sorted(kept.items()))
                    after[key] = after.get(key, 0.0) + q
        states, masked = after, stay
    numbers = [sum(dict(key)[place] * 4 ** (2 - place) for place in range(3)) for key in states]
    values = torch.tensor(list(states.values()), dtype=torch.float64)
    return torch.zeros(64, dtype=torch.float64).index_add(0, torch.tensor(numbers), values)


def test_the_truth_is_the_definition() -> None:
    law = law_of_sequences()
    torch.testing.assert_close(by_hits(law), SMALL.count_law())
    for known in ({}, {0: 0}, {0: 3, 2: 2}):
        hits = sum(SMALL.favourites[place] == colour for place, colour in known.items())
        predicted = SMALL.hit_probability(torch.tensor(hits), torch.tensor(len(known) - hits))
        assert float(predicted) == pytest.approx(conditionals(law, known, 1)[SMALL.favourites[1]])


@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (2, 0.5), (3, 0.5), (3, 4.5)])
def test_maskgit_is_its_enumeration(steps: int, temperature: float) -> None:
    law = law_of_sequences()
    drawn = enumerated_maskgit(law, steps, temperature)
    followed = maskgit_law(SMALL, steps, temperature)
    torch.testing.assert_close(followed, by_hits(drawn))
    # The number of hits tells all: the distance of counts is that of sequences.
    assert total_variation(followed, SMALL.count_law()) == pytest.approx(total_variation(drawn, law))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("process", "follow"), [(AbsorbingProcess, unmasking_law), (UniformProcess, uniform_law)])
def test_diffusion_is_the_product_of_its_steps(process, follow, steps: int) -> None:
    """The oracle's backbone has its conditionals from sums over all sequences, noisy ones too."""
    law, noise = law_of_sequences(), process(4)
    backbone = ExactBackbone(noise, LeaveOneOutHead(), law.expand(2, -1))
    states = all_sequences(noise.states, 3)
    if noise.masks:
        now = (states == 4).all(dim=1).double()
    else:
        now = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for step in transitions(AncestralSampler(steps=steps), backbone, LinearSchedule()):
        joint = torch.ones(len(states), len(states), dtype=torch.float64)
        for place in range(3):
            joint *= step[:, place, states[:, place]]
        now = now @ joint
    clean = now[(states < 4).all(dim=1)]
    assert float(clean.sum()) == pytest.approx(1)
    torch.testing.assert_close(follow(SMALL, steps), by_hits(clean), rtol=1e-6, atol=1e-6)
    distance = total_variation(follow(SMALL, steps), SMALL.count_law())
    assert distance == pytest.approx(total_variation(clean, law), abs=1e-6)


def test_raster_order_is_exact_one_by_one_and_not_otherwise() -> None:
    law = law_of_sequences()
    together = torch.ones(64, dtype=torch.float64)
    for place in range(3):
        together *= torch.tensor(conditionals(law, {}, place))[SEQUENCES[:, place]]
    assert raster_total_variation(SMALL, 1) == pytest.approx(total_variation(together, law))
    assert raster_total_variation(SMALL, 3) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="rounds=2 does not divide the 3 positions"):
        raster_total_variation(SMALL, 2)


CASES = {
    "raster": (lambda law: FavouredColoursBackbone(law, attention="causal"), RasterSampler(), None),
    "maskgit": (
        FavouredColoursBackbone,
        MaskGITSampler(steps=4, choice_temperature=0.5),
        lambda law: maskgit_law(law, 4, 0.5),
    ),
    "masks": (FavouredColoursBackbone, AncestralSampler(steps=4), lambda law: unmasking_law(law, 4)),
    "uniform": (
        lambda law: FavouredColoursBackbone(law, noise="uniform"),
        AncestralSampler(steps=4),
        lambda law: uniform_law(law, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_samplers_themselves_have_these_laws(name: str) -> None:
    law = FavouredColours()
    build, sampler, follow = CASES[name]
    backbone, count = build(law), 4000
    denoiser = None if name == "raster" else backbone.denoiser()
    random = CounterRandom(0, torch.arange(count))
    drawn = sampler(backbone, torch.zeros(count, dtype=torch.int64), random, denoiser=denoiser).tokens
    hits = (drawn == torch.tensor(law.favourites)).sum(dim=1)
    assert chi_square_p_value(hits, law.count_law() if follow is None else follow(law)) > 1e-3


def test_confidence_has_a_cost_that_more_rounds_do_not_cure() -> None:
    law = FavouredColours()
    truth = law.count_law()
    distances = [total_variation(maskgit_law(law, steps, 0.5), truth) for steps in (2, 4, 8, 16)]
    assert distances == sorted(distances) and distances[-1] > 0.7
    assert total_variation(unmasking_law(law, 16), truth) < 0.06


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"colours": 1}, "two colours"),
        ({"mixture": (0.5, 0.4)}, "mixture must add up to 1"),
        ({"hits": (1.2, 0.1)}, r"must lie in \[0, 1\]"),
    ],
)
def test_laws_that_are_none(arguments, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FavouredColours(**arguments)


def test_ties_need_noise() -> None:
    with pytest.raises(ValueError, match="choice_temperature must be > 0"):
        maskgit_law(SMALL, 2, 0.0)
