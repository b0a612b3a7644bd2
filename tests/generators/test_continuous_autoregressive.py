"""ContinuousAutoregressive: what a place sees, losses, its bound on an exact law, draws, bad input."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor

from discrete_lit.backbones import (
    FactorisedHead,
    SequenceLayout,
    TokenDiffusionHead,
    Transformer,
)
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM, Euler
from discrete_lit.generators import ContinuousAutoregressive
from discrete_lit.samplers import CausalVectorSampler
from discrete_lit.tokenizers import RawPixels


def generator(switches: dict[str, Any] | None = None, head: Any = None, **settings: Any) -> ContinuousAutoregressive:
    torch.manual_seed(0)

    def network(layout: SequenceLayout) -> Transformer:
        return Transformer(layout, width=16, depth=2, heads=2, **(switches or {}))

    def small_head(dim: int, width: int) -> TokenDiffusionHead:
        return TokenDiffusionHead(dim, width, width=16, depth=1, repeats=2, solver=DDPM(3))

    given: dict[str, Any] = {"num_classes": 2, "hidden_width": 8, "patch_size": 2, "check_scale": False, **settings}
    made = ContinuousAutoregressive(RawPixels(1), 4, backbone=network, head=head or small_head, **given)
    randomise(made.backbone, 0.3)
    # A head is 0 at the start, whatever it is given.
    if head is None:
        randomise(made.head, 0.2)
    return made


RANDOM: dict[str, Any] = {"switches": {"target_positions": True}, "order": "random"}
LATENTS, LABELS = torch.linspace(-1, 1, 80).sin().view(5, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1])


@torch.no_grad()
def test_a_place_sees_those_before_it_in_the_order() -> None:
    made = generator().eval()
    places, z, vectors = made._teacher_forced(LATENTS, LABELS, None)
    assert z.shape == (5, 4, 8) and places[0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(made.patches.join(vectors), LATENTS)
    other = LATENTS.clone()
    other[:, :, 2:, :2] += 1  # the third place
    changed = (made._teacher_forced(other, LABELS, None)[1] - z).abs().amax(dim=(0, 2))
    assert changed.gt(1e-4).tolist() == [False, False, False, True]

    made = generator(**RANDOM).eval()
    orders = torch.tensor([[2, 0, 3, 1]] * 5)
    places, z, vectors = made._teacher_forced(LATENTS, LABELS, orders)
    assert torch.equal(places, orders) and torch.equal(vectors[:, 0], made.patches.cut(LATENTS)[:, 2])
    changed = (made._teacher_forced(other, LABELS, orders)[1] - z).abs().amax(dim=(0, 2))
    assert changed.gt(1e-4).tolist() == [False, True, True, True]
    # It is told which place comes next.
    last = made._teacher_forced(LATENTS, LABELS, torch.tensor([[2, 0, 1, 3]] * 5))[1]
    assert (last[:, 2] - z[:, 2]).abs().max() > 1e-3 and torch.allclose(last[:, :2], z[:, :2], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, RANDOM], ids=["raster", "random"])
@torch.no_grad()
def test_a_loss_belongs_to_its_image(settings: dict[str, Any]) -> None:
    made, indices = generator(**settings).eval(), torch.tensor([3, 17, 40, 41, 9])
    values, weights, position = made.validation_losses(LATENTS, LABELS, CounterRandom(0, indices))
    assert values.shape == (5, 4) and bool((weights == 1).all())
    assert position[0].tolist() == [0.125, 0.375, 0.625, 0.875]
    for row in range(5):
        of_row = slice(row, row + 1)
        alone = made.validation_losses(LATENTS[of_row], LABELS[of_row], CounterRandom(0, indices[of_row]))
        torch.testing.assert_close(alone[0][0], values[row], rtol=1e-4, atol=1e-4)
    if settings:
        orders = made._orders(CounterRandom(0, torch.arange(50)))
        assert orders is not None and len({tuple(order) for order in orders.tolist()}) > 10


class StandardNormal(TokenDiffusionHead):
    """A head that knows that every place is standard normal, whatever its hidden state."""

    def __init__(self, dim: int, width: int) -> None:
        denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
        super().__init__(dim, width, width=8, depth=1, denoiser=denoiser, solver=Euler(2))

        class Exact(torch.nn.Module):
            def condition_projection(self, condition: Tensor) -> Tensor:
                return condition

            def denoise(self, x: Tensor, time: Tensor, projected: Tensor) -> Tensor:
                t = (time / 1000).to(x.dtype)[:, None]
                # Of standard normal data, E[eps - x | x_t] = (2 t - 1) x_t / (t^2 + (1 - t)^2).
                return (2 * t - 1) * x / (t**2 + (1 - t) ** 2)

        self.network = Exact()


@pytest.mark.parametrize("settings", [{}, RANDOM], ids=["raster", "random"])
@torch.no_grad()
def test_the_bound_approaches_the_exact_density(settings: dict[str, Any]) -> None:
    latents = CounterRandom(9, torch.arange(200)).normal(Purpose.LATENT_NOISE, 16).float().view(200, 1, 4, 4)
    labels = torch.zeros(200, dtype=torch.int64)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(latents).flatten(1).sum(dim=1).double()

    def gap(steps: int) -> float:
        made = generator(head=StandardNormal, likelihood_samples=2, likelihood_steps=steps, **settings).eval()
        likelihood = made.log_likelihood(latents, labels)
        assert likelihood.kind == "bound"
        return (exact - likelihood.nats).mean().item()

    few, many = gap(6), gap(100)
    assert -0.1 < many < 0.3, many  # of 22.7 nats
    assert many < few / 2, (few, many)


@pytest.mark.parametrize("settings", [{}, RANDOM], ids=["raster", "random"])
@torch.no_grad()
def test_a_draw_belongs_to_its_index(settings: dict[str, Any]) -> None:
    made = generator(sampler=CausalVectorSampler(guidance_scale=2.0), **settings).eval()
    labels, indices = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 900])
    together = made.sample(labels, seed=3, indices=indices)
    assert together.shape == (3, 1, 4, 4)
    for row in range(3):
        alone = made.sample(labels[row : row + 1], seed=3, indices=indices[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    output = made.draw(labels, CounterRandom(3, indices))
    torch.testing.assert_close(output.tokens, together)
    assert (output.network_calls, output.sequential_passes) == (8, 4) and output.flops > 0
    assert not torch.allclose(made.sample(labels, seed=4, indices=indices), together)


def test_vectors_to_attend_to_are_read_and_dropped_with_the_class() -> None:
    made = generator({"context_dim": 3, "grid_vocab": 2})
    batch = {
        "latents": LATENTS,
        "label": LABELS,
        "grid": torch.randint(2, (5, 2, 2)),
        "context": torch.randn(5, 4, 3),
        "index": torch.arange(5),
    }
    random = made.random_of(batch, 0)
    condition = made.condition_of(batch, random)
    assert isinstance(condition, Condition)
    other = made.condition_of({**batch, "context": batch["context"].flip(0), "label": 1 - LABELS}, random)
    everything = torch.ones(5, dtype=torch.bool)
    dropped = [made.loss(LATENTS, given, random, dropped=everything)[0] for given in (condition, other)]
    torch.testing.assert_close(dropped[0], dropped[1])
    kept, moved = (made.loss(LATENTS, given, random)[0] for given in (condition, other))
    assert (kept - moved).abs() > 1e-4
    kept.backward()
    assert all(value.grad is not None for value in made.head.parameters())
    drawn = made.sample(condition, CausalVectorSampler(guidance_scale=2.0))
    assert not torch.allclose(drawn, made.sample(other, CausalVectorSampler(guidance_scale=2.0)))


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="order must be 'raster' or 'random', got 'spiral'"):
        generator(order="spiral")
    with pytest.raises(ValueError, match=r"set backbone\.init_args\.target_positions"):
        generator(order="random")
    with pytest.raises(ValueError, match="hidden_width, likelihood_samples and likelihood_steps must be at least 1"):
        generator(hidden_width=0)
    with pytest.raises(ValueError, match="patch_size=3 does not divide latents of 4 x 4"):
        generator(patch_size=3)
    with pytest.raises(ValueError, match="what draws the latents is the head of this generator"):
        generator({"place_head": lambda settings, vocab: FactorisedHead(settings, vocab, sizes=(2, 4))})
    with pytest.raises(ValueError, match="needs a generator that learned the null label"):
        generator(label_dropout=0.0).sample(LABELS, CausalVectorSampler(guidance_scale=3.0))
    with pytest.raises(ValueError, match="exceeds the 1000 steps"):
        generator(sampler=CausalVectorSampler(solver=DDPM(2000)))
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        generator().loss(torch.zeros(5, 4, 4, dtype=torch.int64), LABELS)
