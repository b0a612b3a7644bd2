"""Vectors drawn one after another: the exact law of a Gaussian, the cache against none, batches, guidance, cost."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor, nn

from discrete_lit.backbones import SequenceLayout, TokenDiffusionHead, Transformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.solvers import DDPM, Euler, Solver
from discrete_lit.samplers import CausalVectorSampler

COVARIANCE = torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.2, 0.5], [0.3, 0.5, 0.9]], dtype=torch.float64)


class GaussianBackbone(nn.Module):
    """The exact law of each place given those before it in the order: its mean and deviation."""

    layout = SequenceLayout(2, (3,), num_classes=2, attention="causal", input_dim=1, any_order=True)
    grid_vocab = None

    def __init__(self) -> None:
        super().__init__()
        self.covariance = nn.Parameter(COVARIANCE, requires_grad=False)

    def new_cache(self, condition: Tensor) -> SimpleNamespace:
        return SimpleNamespace(filled=0, read=torch.zeros(len(condition), 0, dtype=torch.float64))

    def forward(self, vectors: Tensor, condition: Tensor, cache: SimpleNamespace, order: Tensor | None) -> Tensor:
        cache.read = torch.cat((cache.read, vectors[..., 0]), dim=1)
        cache.filled = count = cache.read.shape[1]
        order = torch.arange(3).expand(len(vectors), -1) if order is None else order
        rows = []
        for values, places in zip(cache.read, order, strict=True):
            seen, here = places[:count], places[count]
            gain = self.covariance[here, seen] @ torch.linalg.inv(self.covariance[seen][:, seen])
            variance = self.covariance[here, here] - gain @ self.covariance[seen, here]
            rows.append(torch.stack((gain @ values, variance.sqrt())))
        return torch.stack(rows)[:, None]


class MeanAndDeviation(nn.Module):
    """Draws from N(mean, deviation^2), and remembers its guidance."""

    solver: Solver = Euler(1)
    dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []

    def sample(self, condition: Tensor, start: Tensor, *, guidance_scale: float, **_: Any) -> Tensor:
        self.scales.append(guidance_scale)
        mean, deviation = condition[: len(start)].unbind(dim=-1)
        return (mean + deviation * start[:, 0])[:, None]


def draw(sampler: CausalVectorSampler, count: int, order: Tensor | None = None) -> tuple[Tensor, list[float]]:
    head, labels = MeanAndDeviation(), torch.zeros(count, dtype=torch.int64)
    random = CounterRandom(3, torch.arange(count))
    output = sampler(GaussianBackbone(), head, labels, random, order=order)  # type: ignore[arg-type]
    return output.tokens[..., 0], head.scales


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_law_of_a_gaussian_is_drawn_exactly(shuffled: bool) -> None:
    count = 1500
    order = CounterRandom(0, torch.arange(count)).uniform(Purpose.ORDER, 3).argsort(dim=1) if shuffled else None
    drawn, _ = draw(CausalVectorSampler(), count, order)
    found = drawn.T @ drawn / count
    # Four deviations of each entry's estimate: variance (c_ij^2 + c_ii c_jj) / n.
    bound = 4 * ((COVARIANCE**2 + COVARIANCE.diagonal().outer(COVARIANCE.diagonal())) / count).sqrt()
    assert bool(((found - COVARIANCE).abs() < bound).all()), found


def test_guidance_grows_with_what_is_known() -> None:
    _, scales = draw(CausalVectorSampler(guidance_scale=4.0), 2)
    assert scales == pytest.approx([1 + 3 * share for share in (1 / 3, 2 / 3, 2 / 3)])
    assert draw(CausalVectorSampler(guidance_scale=4.0, guidance_schedule="constant"), 2)[1] == [4.0] * 3
    assert draw(CausalVectorSampler(), 2)[1] == [1.0] * 3
    with pytest.raises(ValueError, match="guidance_schedule must be"):
        CausalVectorSampler(guidance_schedule="linear")  # type: ignore[arg-type]


def networks(order: bool) -> tuple[Transformer, TokenDiffusionHead]:
    layout = SequenceLayout(6, (2, 2), num_classes=2, attention="causal", input_dim=3, any_order=order)
    backbone = Transformer(layout, width=8, depth=2, heads=2, context_dim=5, target_positions=order)
    head = TokenDiffusionHead(3, 6, width=8, depth=1, solver=DDPM(3))
    return randomise(backbone, 0.4), randomise(head, 0.2)


def given() -> Condition:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return Condition(labels=torch.tensor([0, 1]), context=torch.randn(2, 3, 5), context_mask=mask)


@pytest.mark.parametrize("order", [None, [[2, 0, 3, 1], [1, 3, 0, 2]]])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@torch.no_grad()
def test_the_cached_draw_is_the_uncached(order: list[list[int]] | None, scale: float) -> None:
    (backbone, head), condition = networks(order is not None), given()
    orders = None if order is None else torch.tensor(order)
    random = CounterRandom(5, torch.tensor([8, 1]))
    sampler = CausalVectorSampler(guidance_scale=scale)
    output = sampler(backbone, head, condition, random, order=orders)

    backbone.eval()
    null, drawn = condition.null(null_label=2, null_id=None), torch.zeros(2, 0, 3)
    for step in range(4):
        z = backbone(drawn, condition, order=orders)[:, -1]
        if scale != 1:
            z = torch.cat((z, backbone(drawn, null, order=orders)[:, -1]))
        noise = [random.normal(Purpose.LATENT_NOISE, 3, step * 4 + number).float() for number in range(4)]
        share = min(step + 1, 3) / 4
        new = head.sample(
            z, noise[0], noise=lambda i, noise=noise: noise[i + 1], guidance_scale=1 + (scale - 1) * share
        )
        drawn = torch.cat((drawn, new[:, None]), dim=1)
    expected = (
        drawn if orders is None else torch.empty_like(drawn).scatter_(1, orders[..., None].expand(-1, -1, 3), drawn)
    )
    torch.testing.assert_close(output.tokens, expected, rtol=1e-4, atol=1e-4)

    calls = 1 if scale == 1 else 2
    assert (output.network_calls, output.sequential_passes) == (4 * calls, 4)
    passes = backbone.flops(calls, 0, 0, 3) + sum(backbone.flops(calls, 1, filled, 3) for filled in (1, 2, 3))
    assert output.flops == backbone.cache_flops(calls, 3) + passes + 4 * head.flops(calls, head.solver) > 0

    alone = sampler(
        backbone, head, condition[1:], CounterRandom(5, torch.tensor([1])), order=None if orders is None else orders[1:]
    )
    torch.testing.assert_close(alone.tokens[0], output.tokens[1], rtol=1e-3, atol=1e-3)
