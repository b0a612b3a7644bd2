"""NextCell: its loss against a loop over cells, its draws with and without caches, laws known in closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import QUIET, run, write_settings
from torch import Tensor, nn

import discrete_lit
from discrete_lit.backbones import CellLayout, CellTransformer
from discrete_lit.backbones.condition import as_condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath, ScheduledPath
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.generators import NextCell
from discrete_lit.samplers import NextCellSampler
from discrete_lit.tokenizers import LatentGrid, RawPixels


def small_network(layout: CellLayout) -> CellTransformer:
    return CellTransformer(layout, width=16, depth=1, heads=2)


def generator(**settings: Any) -> NextCell:
    torch.manual_seed(0)
    given: dict[str, Any] = {"backbone": small_network, "cell_size": 2, "check_scale": False, **settings}
    made = NextCell(RawPixels(1), 4, num_classes=2, **given)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1])


def sampler(**settings: Any) -> NextCellSampler:
    return NextCellSampler(EulerMaruyama(3), **settings)


# The loss.


@torch.no_grad()
def test_the_loss_is_that_of_a_loop_over_cells() -> None:
    """Each cell is predicted in a pass of its own, from the noisy cells before it and its own."""
    made, (latents, labels) = generator().double().eval(), batch()
    latents, random = latents.double(), CounterRandom(0, torch.arange(5))
    losses = made.losses(latents, as_condition(labels), random)
    assert losses.terms["error"].shape == losses.coordinate.shape == (5, 4)
    noise = random.normal(Purpose.DIFFUSION_NOISE, 16).view(5, 4, 4, 1)
    t = losses.coordinate[..., None, None]
    # Of a normal logit, one for each cell.
    uniforms = random.uniform(Purpose.DIFFUSION_TIME, 4)
    torch.testing.assert_close(losses.coordinate, torch.sigmoid(torch.special.ndtri(uniforms)))
    cells = made.layout.to_cells(latents)
    noisy = (1 - t) * cells + t * noise
    time = torch.floor(1000 * losses.coordinate.float())
    for cell in range(4):
        before = slice(0, cell + 1)
        velocity = made.backbone(noisy[:, before], time[:, before], labels)[:, cell]
        error = (velocity - (noise[:, cell] - cells[:, cell])).square().mean(dim=(1, 2))
        torch.testing.assert_close(losses.terms["error"][:, cell], error)
    total, _ = made.loss(latents, labels, random)
    torch.testing.assert_close(total, losses.terms["error"].mean())


@torch.no_grad()
def test_a_loss_and_a_likelihood_belong_to_their_image() -> None:
    made, (latents, labels) = generator(likelihood_steps=3).eval(), batch()
    indices = torch.tensor([3, 17, 40, 41, 9])
    values = made.validation_losses(latents, labels, CounterRandom(0, indices))[0]
    nats = made.log_likelihood(latents, labels, indices=indices)
    assert nats.kind == "bound"
    for row in range(5):
        one, index = slice(row, row + 1), indices[row : row + 1]
        alone = made.validation_losses(latents[one], labels[one], CounterRandom(0, index))[0]
        torch.testing.assert_close(alone[0], values[row], rtol=1e-4, atol=1e-5)
        alone = made.log_likelihood(latents[one], labels[one], indices=index).nats
        torch.testing.assert_close(alone[0], nats.nats[row], rtol=1e-4, atol=1e-4)


# Sampling.


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_draw_with_caches_is_one_without(scale: float, schedule: Any) -> None:
    made, labels = generator().eval(), torch.tensor([1, 0, 1])
    solver, random = EulerMaruyama(3), CounterRandom(7, torch.arange(3))
    drawn = made.draw(labels, random, NextCellSampler(solver, guidance_scale=scale, guidance_schedule=schedule))
    clean: list[Tensor] = []
    for cell in range(4):
        of_cell = scale if schedule == "constant" else 1 + (scale - 1) * cell / 3

        def noise(purpose: Purpose, step: int, cell: int = cell) -> Tensor:
            return random.normal(purpose, 4, 3 * cell + step).float().view(3, 4, 1)

        def denoise(x: Tensor, t: float, cell: int = cell, of_cell: float = of_cell) -> Any:
            cells = torch.stack([*clean, x], dim=1)
            time = torch.tensor([0.0] * cell + [float(torch.floor(torch.tensor(t) * 1000))]).expand(3, -1)
            conditional = made.backbone(cells, time, labels)[:, cell]
            unconditional = made.backbone(cells, time, torch.full_like(labels, 2))[:, cell]
            return made.denoiser(unconditional + of_cell * (conditional - unconditional), x, t)

        start = noise(Purpose.DIFFUSION_START, 0)
        step_noise = lambda step, noise=noise: noise(Purpose.DIFFUSION_STEP, step)  # noqa: E731
        clean.append(solver(denoise, start, path=RectifiedPath(), noise=step_noise))
    expected = made.layout.to_grid(torch.stack(clean, dim=1))
    torch.testing.assert_close(drawn.tokens, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_a_draw_belongs_to_its_index_and_says_what_it_costs() -> None:
    made = generator(sampler=sampler(guidance_scale=2.0)).eval()
    labels, indices = torch.tensor([0, 1, 1, 0]), torch.tensor([4, 0, 9, 2])
    drawn = made.draw(labels, CounterRandom(0, indices))
    assert drawn.tokens.shape == (4, 1, 4, 4) and drawn.tokens.isfinite().all()
    # Three steps for each of four cells, the first of them not guided; and three clean cells are read.
    assert (drawn.sequential_passes, drawn.network_calls) == (15, 3 + 3 * 6 + 3 * 2)
    network = made.backbone
    passes = [3 * network.flops(1, 0), *(3 * network.flops(2, cell) for cell in (1, 2, 3))]
    assert drawn.flops == sum(passes) + sum(network.flops(2, cell) for cell in (0, 1, 2))
    alone = made.sample(labels[2:3], indices=indices[2:3])
    torch.testing.assert_close(alone[0], drawn.tokens[2], rtol=1e-4, atol=1e-4)
    unguided = made.draw(labels, CounterRandom(0, indices), sampler())
    assert (unguided.sequential_passes, unguided.network_calls) == (15, 15)


class Pair:
    """What the network below knows of the first cell: its clean values, once it was read."""

    def __init__(self, rows: int) -> None:
        self.rows, self.clean = rows, list[Tensor]()
        self.read: Tensor | None = None

    def advance(self, places: int) -> None:
        assert places == 1 and self.read is not None
        self.clean.append(self.read)


class ExactPair(nn.Module):
    """The best velocity for two cells of one number each, normal with means 1 and -1 and the covariance below."""

    MEANS, DEVIATIONS, CORRELATION = (1.0, -1.0), (0.5, 2.0), 0.8

    def __init__(self, layout: CellLayout) -> None:
        super().__init__()
        self.layout = layout
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def new_cache(self, rows: int) -> Pair:
        return Pair(rows)

    def forward(self, cells: Tensor, time: Tensor, labels: Tensor, cache: Pair) -> Tensor:
        x, t = cells[:, 0], float(time[0, 0]) / 1000
        cache.read = x
        if t == 0:
            return torch.zeros_like(cells)
        number, mean, variance = len(cache.clean), *self.law(cache.clean)
        assert number < 2
        # x_t = (1 - t) x + t eps with x normal: the conditional means are linear in x_t.
        spread = (1 - t) ** 2 * variance + t**2
        away = x - (1 - t) * mean
        data, noise = mean + (1 - t) * variance / spread * away, t / spread * away
        return (noise - data)[:, None]

    def law(self, clean: list[Tensor]) -> tuple[Any, float]:
        """The mean and the variance of the next cell given the clean ones before it."""
        if not clean:
            return self.MEANS[0], self.DEVIATIONS[0] ** 2
        slope = self.CORRELATION * self.DEVIATIONS[1] / self.DEVIATIONS[0]
        return self.MEANS[1] + slope * (clean[0] - self.MEANS[0]), self.DEVIATIONS[1] ** 2 * (1 - self.CORRELATION**2)

    def fsdp_units(self) -> tuple[()]:
        return ()


def exact_pair(**settings: Any) -> NextCell:
    made = NextCell(LatentGrid((1, 1, 2)), 2, num_classes=1, backbone=ExactPair, cell_size=1, **settings)  # type: ignore[arg-type]
    # In thousandths the law of small times is not exact.
    made.network_time = lambda t: 1000 * t
    return made.double().eval()


@torch.no_grad()
def test_the_best_denoiser_gives_the_law_of_a_pair_of_cells() -> None:
    made = exact_pair()
    labels = torch.zeros(10_000, dtype=torch.int64)
    random = CounterRandom(3, torch.arange(len(labels)))

    drawn = made.draw(labels, random, NextCellSampler(EulerMaruyama(120, last_step=0.01))).tokens.view(-1, 2)
    mean, covariance = drawn.mean(dim=0), torch.cov(drawn.T)
    first, second = ExactPair.DEVIATIONS
    between = ExactPair.CORRELATION * first * second
    expected = torch.tensor([[first**2, between], [between, second**2]], dtype=torch.float64)
    torch.testing.assert_close(mean, torch.tensor(ExactPair.MEANS, dtype=torch.float64), rtol=0, atol=0.06)
    torch.testing.assert_close(covariance, expected, rtol=0.03, atol=0.01)


@torch.no_grad()
def test_the_bound_is_near_the_density_of_the_pair() -> None:
    first, second = ExactPair.DEVIATIONS
    between = ExactPair.CORRELATION * first * second
    covariance = torch.tensor([[first**2, between], [between, second**2]], dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(torch.tensor(ExactPair.MEANS, dtype=torch.float64), covariance)
    torch.manual_seed(0)
    pairs = law.sample((2000,))
    exact = law.log_prob(pairs)

    def gap(steps: int) -> float:
        likelihood = exact_pair(likelihood_steps=steps).log_likelihood(
            pairs.view(-1, 1, 1, 2), torch.zeros(2000, dtype=torch.int64)
        )
        return float((exact - likelihood.nats).mean())

    few, many = gap(8), gap(200)
    assert -0.02 < many < 0.1 and many < few / 2, (few, many)


# Bad input.


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="cells of 3 x 3 latents do not divide the 4 x 4 of an image"):
        generator(cell_size=3)
    with pytest.raises(ValueError, match="cells of 1 x 3 latents do not divide"):
        generator(cell_size=[1, 3])
    with pytest.raises(ValueError, match=r"cell_size=0: it must be the side"):
        generator(cell_size=0)
    with pytest.raises(ValueError, match="likelihood_steps must be at least 1, got 0"):
        generator(likelihood_steps=0)
    with pytest.raises(ValueError, match="which a path of steps has no step for"):
        generator(denoiser=GaussianDenoiser(ScheduledPath()))
    with pytest.raises(ValueError, match="a learned variance is of the steps of a SteppedPath"):
        generator(denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity", learned_variance=True))
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0 needs a generator that learned the null label"):
        generator(label_dropout=0.0).sample(torch.zeros(1, dtype=torch.int64), sampler(guidance_scale=3.0))


def test_latents_of_another_scale_or_kind_are_refused() -> None:
    made = NextCell(LatentGrid((1, 4, 4)), 4, num_classes=2, backbone=small_network, cell_size=2)
    random, labels = CounterRandom(0, torch.arange(5)), torch.tensor([0, 1, 1, 0, 1])
    latents, _ = batch()
    with pytest.raises(ValueError, match=r"must have about unit deviation.*a factor of 0\.2"):
        made.data_of({"latents": 4.3 * latents, "label": labels}, random)
    assert made.data_of({"latents": latents, "label": labels}, random).shape == (5, 1, 4, 4)
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        made.data_of({"latents": latents.long(), "label": labels}, random)
    with pytest.raises(ValueError, match=r"the latents have the shape \(1, 2, 8\), this generator models"):
        made.loss(latents.view(5, 1, 2, 8), labels)


# Training.


def test_it_trains_from_a_configuration_and_loads_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {
            "class_path": "discrete_lit.generators.NextCell",
            "init_args": {
                "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"scale": 2.0}},
                "image_size": 8,
                "num_classes": 2,
                "cell_size": [4, 2],
                "check_scale": False,
                "backbone": {
                    "class_path": "discrete_lit.backbones.CellTransformer",
                    "init_args": {
                        "width": 16,
                        "depth": 1,
                        "heads": 2,
                        "dropout": 0.1,
                        "activation_checkpointing": True,
                    },
                },
                "sampler": {
                    "class_path": "discrete_lit.samplers.NextCellSampler",
                    "init_args": {
                        "solver": {"class_path": "discrete_lit.diffusion.solvers.Heun", "init_args": {"steps": 2}},
                        "guidance_scale": 2.0,
                    },
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}},
        "trainer": {**QUIET, "max_steps": 2},
    }
    run("fit", "--config", write_settings(tmp_path / "xar.yaml", settings), "--run_dir", tmp_path / "run")
    loaded = discrete_lit.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, NextCell) and loaded.layout.cell_size == (4, 2)
    images = loaded.tokenizer.decode(loaded.sample(torch.tensor([0, 1])))
    assert images.shape == (2, 3, 8, 8)
