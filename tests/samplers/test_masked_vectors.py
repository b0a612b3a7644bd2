"""MAR's sampler: the exact law of a Gaussian where one place is drawn at a time, batches, known places, guidance."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder, VectorLayout
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.solvers import DDPM, Euler, Solver
from discrete_lit.samplers.masked_vectors import MARSampler

COVARIANCE = torch.tensor(
    [[1.0, 0.8, 0.3, 0.1], [0.8, 1.2, 0.5, 0.2], [0.3, 0.5, 0.9, -0.4], [0.1, 0.2, -0.4, 1.1]], dtype=torch.float64
)


class GaussianNetwork(nn.Module):
    """The exact law of each place given those that are known: hidden states are its mean and deviation."""

    layout = VectorLayout(dim=1, grid=(4,), num_classes=2)

    def __init__(self) -> None:
        super().__init__()
        self.covariance = nn.Parameter(COVARIANCE, requires_grad=False)

    def forward(self, vectors: Tensor, masked: Tensor, condition: Condition, *, known: int) -> Tensor:
        assert bool(((~masked).sum(dim=1) == known).all())
        rows = []
        for values, hidden in zip(vectors[..., 0], masked, strict=True):
            seen = ~hidden
            gain = self.covariance[:, seen] @ torch.linalg.inv(self.covariance[seen][:, seen])
            variance = self.covariance.diagonal() - (gain * self.covariance[:, seen]).sum(dim=1)
            rows.append(torch.stack((gain @ values[seen], variance.clamp(min=0).sqrt()), dim=-1))
        return torch.stack(rows)


class ExactHead(nn.Module):
    """Draws from N(mean, deviation^2), and remembers its guidance."""

    solver: Solver = Euler(1)

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []

    def sample(self, condition: Tensor, start: Tensor, *, guidance_scale: float, **_: Any) -> Tensor:
        self.scales.append(guidance_scale)
        mean, deviation = condition[: len(start)].unbind(dim=-1)
        return (mean + deviation * start[:, 0])[:, None]


def draw(sampler: MARSampler, indices: Tensor, **known: Any) -> tuple[Tensor, list[float]]:
    head = ExactHead()
    labels = torch.zeros(len(indices), dtype=torch.int64)
    output = sampler(GaussianNetwork(), head, labels, CounterRandom(3, indices), **known)  # type: ignore[arg-type]
    return output.tokens[..., 0], head.scales


@pytest.mark.parametrize("order", ["random", "raster"])
def test_one_place_at_a_time_draws_the_exact_law(order: Any) -> None:
    drawn, _ = draw(MARSampler(4, order=order), torch.arange(3000))
    found = drawn.T @ drawn / len(drawn)
    # Four deviations of each entry's estimate: variance (c_ij^2 + c_ii c_jj) / n.
    bound = 4 * ((COVARIANCE**2 + COVARIANCE.diagonal().outer(COVARIANCE.diagonal())) / len(drawn)).sqrt()
    assert bool(((found - COVARIANCE).abs() < bound).all()), found


def test_places_of_one_pass_are_independent_given_those_before() -> None:
    drawn, _ = draw(MARSampler(1), torch.arange(3000))
    found = (drawn.T @ drawn / len(drawn)).fill_diagonal_(0)
    assert found.abs().max() < 0.1


def test_a_draw_belongs_to_its_index_and_known_places_are_kept() -> None:
    sampler = MARSampler(3)
    together, _ = draw(sampler, torch.arange(7))
    alone = torch.cat([draw(sampler, torch.tensor([index]))[0] for index in range(7)])
    torch.testing.assert_close(alone, together)
    known = torch.tensor([[True, False, False, True]] * 2000)
    vectors = torch.tensor([[1.5], [9.0], [9.0], [-0.5]], dtype=torch.float64).expand(2000, -1, -1)
    kept, _ = draw(MARSampler(2), torch.arange(2000), vectors=vectors, known=known)
    assert bool((kept[:, 0] == 1.5).all() and (kept[:, 3] == -0.5).all())
    seen = torch.tensor([0, 3])
    expected = COVARIANCE[:, seen] @ torch.linalg.inv(COVARIANCE[seen][:, seen]) @ vectors[0, seen, 0]
    torch.testing.assert_close(kept.mean(dim=0), expected, rtol=0, atol=0.09)


def test_guidance_grows_with_what_is_known() -> None:
    _, scales = draw(MARSampler(4, guidance_scale=3.0), torch.arange(2))
    # After the passes 1, 2 and 3 of 4 places are known; the last pass counts one place as masked still.
    assert scales == pytest.approx([1 + 2 * share for share in (0.25, 0.5, 0.75, 0.75)])
    _, scales = draw(MARSampler(4, guidance_scale=3.0, guidance_schedule="constant"), torch.arange(2))
    assert scales == [3.0] * 4


def test_costs_and_a_grid_of_ids() -> None:
    torch.manual_seed(0)
    network = MaskedAutoencoder(
        VectorLayout(dim=2, grid=(5,), num_classes=3, grid_vocab=4), width=8, depth=1, heads=1, buffer=1
    )
    head = TokenDiffusionHead(2, 8, width=8, depth=1, solver=DDPM(3))
    labels, random = torch.tensor([0, 3]), CounterRandom(0, torch.arange(2))
    grid = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 3, 3, 3]])
    condition = Condition(labels=labels, grid=grid)
    output = MARSampler(4, guidance_scale=2.0)(network, head, condition, random)
    assert output.tokens.shape == (2, 5, 2)
    assert (output.network_calls, output.sequential_passes) == (8, 4)
    with pytest.raises(ValueError, match="reads a grid of 5 ids"):
        MARSampler(4)(network, head, labels, random)
    with pytest.raises(ValueError, match="steps=6 exceeds the 5 places"):
        MARSampler(6)(network, head, condition, random)
    known = torch.tensor([[True, False, False, False, False], [True, True, False, False, False]])
    with pytest.raises(ValueError, match="as many places in each image"):
        MARSampler(2)(network, head, condition, random, vectors=torch.zeros(2, 5, 2), known=known)
    with pytest.raises(ValueError, match="give vectors too"):
        MARSampler(2)(network, head, condition, random, known=known)
    with pytest.raises(ValueError, match="guidance_schedule must be"):
        MARSampler(2, guidance_schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        MARSampler(0)
