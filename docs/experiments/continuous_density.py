"""A continuous density is hard: three heads on a mixture in the plane that is known, trained alike; table and figure.

  python docs/experiments/continuous_density.py

A vector x in the plane is given a context c of four: x | c is a mixture of eight normal laws on a ring, turned by c,
with unequal weights. One small network makes a hidden state z of c, and a head predicts x given z, as at a place of a
sequence:

- squared error: the mean of x, drawn as it is, or with the noise that makes the squared error a likelihood;
- cross-entropy over K cells of a square grid, drawn as the centre of a cell, or anywhere in it;
- `TokenDiffusionHead`, MAR's diffusion head, drawn in several numbers of steps: flow matching on straight lines as the
  quickstart's recipes have it, and MAR's 1,000 cosine steps with their learned variance, on which the network predicts
  v or, as MAR's does, the noise.

The energy distance between draws and the truth, 2 E|X - Y| - E|X - X'| - E|Y - Y'|, is 0 for equal laws alone
(Szekely and Rizzo, 2013). Its estimate and the draws of the mixture are checked against closed forms before anything is
trained. Needs matplotlib.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date
from math import pi, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import TokenDiffusionHead
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath, SteppedPath, cosine_betas
from discrete_lit.diffusion.gaussian_losses import LogitNormalTimes
from discrete_lit.diffusion.solvers import DDPM, Euler, Solver

CONTEXTS, PARTS, SPREAD, WIDTH = 4, 8, 0.1, 64
COUNT = 5000  # draws that are measured, of each context
EXTENT = 2.0  # of the grid of cells, from -2 to 2
Draw = Callable[[int, torch.Generator], Tensor]
# What a diffusion head predicts, by its name in the table: the settings of the head, and its solver.
VELOCITY, V, NOISE = "velocity", "v", "noise"
DIFFUSION: dict[str, tuple[Callable[[], dict[str, Any]], type[Solver]]] = {
    VELOCITY: (
        lambda: {"denoiser": GaussianDenoiser(RectifiedPath(), prediction="velocity"), "times": LogitNormalTimes()},
        Euler,
    ),
    V: (
        lambda: {
            "denoiser": GaussianDenoiser(SteppedPath(cosine_betas()), prediction="v", learned_variance=True),
        },
        DDPM,
    ),
    NOISE: (dict, DDPM),  # the head's own settings are MAR's
}


class RingMixture:
    """Eight normal laws on a ring for each context, whose weights are 1 to 8 in an order of its own.

    Their radius makes the variance of a coordinate about 1.
    """

    def __init__(self) -> None:
        turns = torch.arange(PARTS) / PARTS + torch.arange(CONTEXTS)[:, None] / (CONTEXTS * PARTS)
        angles = 2 * pi * turns
        self.centres = sqrt(2 * (1 - SPREAD**2)) * torch.stack((angles.cos(), angles.sin()), dim=-1)  # (C, P, 2)
        weights = torch.arange(1.0, PARTS + 1)
        self.weights = torch.stack([weights.roll(3 * context) for context in range(CONTEXTS)])
        # An order in which neighbours differ.
        self.weights = self.weights[:, [0, 4, 2, 6, 1, 5, 3, 7]] / weights.sum()

    def draw(self, contexts: Tensor, generator: torch.Generator) -> Tensor:
        parts = torch.multinomial(self.weights[contexts], 1, generator=generator)[:, 0]
        noise = torch.randn(len(contexts), 2, generator=generator)
        return self.centres[contexts, parts] + SPREAD * noise

    def moments(self, context: int) -> tuple[Tensor, Tensor]:
        """The mean `(2,)` and the covariance `(2, 2)` of a context."""
        weights, centres = self.weights[context], self.centres[context]
        average = weights @ centres
        spread = torch.einsum("p,pi,pj->ij", weights, centres, centres) + SPREAD**2 * torch.eye(2)
        return average, spread - torch.outer(average, average)

    def near(self, x: Tensor, context: int) -> float:
        """The share of vectors within three deviations of a part."""
        return float((torch.cdist(x, self.centres[context]).min(dim=1).values < 3 * SPREAD).float().mean())


class ContextNetwork(nn.Module):
    """Makes z of a context; the same in front of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(CONTEXTS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, contexts: Tensor) -> Tensor:
        return self.layers(contexts)


def mlp(outputs: int) -> nn.Sequential:
    """A head that is no diffusion model."""
    hidden = 3 * WIDTH
    return nn.Sequential(
        nn.Linear(WIDTH, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )


def cells_of(x: Tensor, side: int) -> Tensor:
    """The number of the cell of each vector `(M, 2)` in a grid of side x side."""
    places = ((x + EXTENT) * side / (2 * EXTENT)).floor().clamp(0, side - 1).long()
    return places[:, 0] * side + places[:, 1]


def centres_of(cells: Tensor, side: int) -> Tensor:
    places = torch.stack((cells // side, cells % side), dim=-1)
    return (places + 0.5) * (2 * EXTENT / side) - EXTENT


def fit(head: nn.Module, loss: Callable[[Tensor, Tensor, torch.Generator], Tensor], batches: int, seed: int) -> Tensor:
    """Train a head and its network of contexts; the hidden state of each context after that, and the last loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mixture, network = RingMixture(), ContextNetwork()
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, batches)
    for _ in range(batches):
        contexts = torch.randint(CONTEXTS, (512,), generator=generator)
        value = loss(network(contexts), mixture.draw(contexts, generator), generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
    return network(torch.arange(CONTEXTS)).detach()


def squared_error(batches: int, seed: int) -> dict[str, Draw]:
    torch.manual_seed(seed)
    head = mlp(2)
    errors: list[float] = []

    def loss(z: Tensor, x: Tensor, _: torch.Generator) -> Tensor:
        value = F.mse_loss(head(z), x)
        errors.append(value.item())
        return value

    means = head(fit(head, loss, batches, seed)).detach()
    deviation = sqrt(mean(errors[-len(errors) // 4 :]))

    def noisy(context: int, generator: torch.Generator, *, count: int) -> Tensor:
        return means[context] + deviation * torch.randn(count, 2, generator=generator)

    return {
        "squared error, its mean": lambda context, generator: means[context].expand(COUNT, 2),
        "squared error, with its noise": lambda context, generator: noisy(context, generator, count=COUNT),
    }


def cross_entropy(side: int, batches: int, seed: int) -> dict[str, Draw]:
    torch.manual_seed(seed)
    head = mlp(side**2)
    states = fit(head, lambda z, x, _: F.cross_entropy(head(z), cells_of(x, side)), batches, seed)
    laws = head(states).softmax(dim=-1).detach()

    def draw(context: int, generator: torch.Generator) -> Tensor:
        return centres_of(torch.multinomial(laws[context], COUNT, replacement=True, generator=generator), side)

    def draw_within(context: int, generator: torch.Generator) -> Tensor:
        cell = 2 * EXTENT / side
        return draw(context, generator) + cell * (torch.rand(COUNT, 2, generator=generator) - 0.5)

    return {f"cross-entropy, K = {side**2:,}": draw, f"anywhere in its cell, K = {side**2:,}": draw_within}


def diffusion(predicts: str, steps: list[int], batches: int, seed: int) -> dict[str, Draw]:
    torch.manual_seed(seed)
    settings, solver_type = DIFFUSION[predicts]
    head = TokenDiffusionHead(2, WIDTH, width=WIDTH, depth=3, repeats=1, **settings())

    def loss(z: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        uniforms = torch.rand(1, len(x), dtype=torch.float64, generator=generator)
        noise = torch.randn(1, *x.shape, generator=generator)
        terms = head.losses(z, x, uniforms=uniforms, noise=noise)
        return torch.stack([term.mean() for term in terms.values()]).sum()

    states = fit(head, loss, batches, seed)
    head.eval()

    def drawer(solver: Solver) -> Draw:
        def draw(context: int, generator: torch.Generator) -> Tensor:
            def noise(step: int) -> Tensor:
                return torch.randn(COUNT, 2, generator=generator)

            return head.sample(states[context].expand(COUNT, -1), noise(0), noise=noise, solver=solver)

        return draw

    return {f"diffusion of the {predicts}, {count} steps": drawer(solver_type(count)) for count in steps}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, estimated without bias: it may fall below 0."""
    between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # exact for near vectors too
    means = [distances.mean(dtype=torch.float64) for distances in (between, torch.pdist(x), torch.pdist(y))]
    return float(2 * means[0] - means[1] - means[2])


def check_closed_forms() -> None:
    """Check the estimate between two normal laws, and the moments of the mixture, against their closed forms.

    |X - Y| of X from N(0, 1) and Y from N(0, s^2) in the plane has a Rayleigh law with the mean
    sqrt(pi (1 + s^2) / 2).
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, COUNT, 2, generator=generator)
    s = 1.5
    expected = 2 * sqrt(pi * (1 + s**2) / 2) - sqrt(pi) * (1 + s)
    assert abs(energy_distance(x, s * y) - expected) < 0.01, "energy distance of two normal laws"
    mixture = RingMixture()
    for context in range(CONTEXTS):
        drawn = mixture.draw(torch.full((200_000,), context), generator)
        average, covariance = mixture.moments(context)
        torch.testing.assert_close(drawn.mean(dim=0), average, atol=0.01, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.01, rtol=0)


def measured(draw: Draw, seed: int) -> tuple[float, float]:
    """Energy distance and share of draws near a part, means over the contexts."""
    mixture, distances, near = RingMixture(), [], []
    for context in range(CONTEXTS):
        generator = torch.Generator().manual_seed(1000 * seed + context)
        truth = mixture.draw(torch.full((COUNT,), context), generator)
        drawn = draw(context, generator)
        distances.append(energy_distance(drawn, truth))
        near.append(mixture.near(drawn, context))
    return mean(distances), mean(near)


def controls(sides: list[int]) -> dict[str, Draw]:
    """What no head can beat: other draws of the truth, and of the truth in cells."""
    mixture = RingMixture()

    def truth(context: int, generator: torch.Generator) -> Tensor:
        return mixture.draw(torch.full((COUNT,), context), generator)

    def rounded(side: int) -> Draw:
        return lambda context, generator: centres_of(cells_of(truth(context, generator), side), side)

    return {"the truth": truth, **{f"the truth in K = {side**2:,} cells": rounded(side) for side in sides}}


def draw_figure(seed: int, made: dict[str, Draw], found: dict[str, list[float]], path: Path) -> None:
    from matplotlib import pyplot

    quantised = [name for name in made if name.startswith("cross-entropy")]
    diffused = [name for name in made if name.startswith(f"diffusion of the {VELOCITY}")]
    shown = ["the truth", "squared error, with its noise", quantised[len(quantised) // 2], diffused[-1]]
    figure, axes = pyplot.subplots(1, 6, figsize=(17, 3), constrained_layout=True)
    for axis, name in zip(axes[:4], shown, strict=True):
        x = made[name](0, torch.Generator().manual_seed(seed))[:1500]
        axis.scatter(*x.T, s=1)
        axis.set(title=name, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
        axis.title.set_fontsize("small")
    lines = {
        "K": {
            "cross-entropy": "cross-entropy, K = ",
            "anywhere in its cell": "anywhere in its cell, K = ",
            "the truth in cells": "the truth in K = ",
        },
        "steps": {f"diffusion of the {predicts}": f"diffusion of the {predicts}, " for predicts in DIFFUSION},
    }
    for axis, (label, kinds) in zip(axes[4:], lines.items(), strict=True):
        for kind, start in kinds.items():
            points = {
                int(name.removeprefix(start).split(" ")[0].replace(",", "")): mean(values)
                for name, values in found.items()
                if name.startswith(start)
            }
            axis.plot(list(points), list(points.values()), marker="o", label=kind)
        axis.axhline(mean(found["squared error, with its noise"]), color="grey", linestyle="--", label="squared error")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel=label, ylabel="energy distance")
        axis.set_yscale("symlog", linthresh=1e-3)  # linear where the estimate cannot tell it from 0
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=1500, help="of 512 vectors")
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 16, 64], help="of the grids of cells")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 100], help="of the diffusion heads")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    check_closed_forms()
    begun = time.process_time()
    found: dict[str, list[float]] = {}
    near: dict[str, list[float]] = {}
    made: dict[str, Draw] = {}
    for seed in given.seeds:
        made = {**controls(given.sides), **squared_error(given.batches, seed)}
        for side in given.sides:
            made |= cross_entropy(side, given.batches, seed)
        for predicts in DIFFUSION:
            made |= diffusion(predicts, given.steps, given.batches, seed)
        for name, draw in made.items():
            distance, share = measured(draw, seed)
            found.setdefault(name, []).append(distance)
            near.setdefault(name, []).append(share)
    draw_figure(given.seeds[-1], made, found, given.page.with_suffix(".png"))
    minutes = (time.process_time() - begun) / 60

    def spread(values: list[float], form: str) -> str:
        return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")

    options = " ".join(f"--{name} {' '.join(map(str, getattr(given, name)))}" for name in ("seeds", "sides", "steps"))
    command = f"python docs/experiments/continuous_density.py {options} --batches {given.batches}"
    machine = (
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s) on a CPU, {minutes:.1f} minutes of processor"
    )
    lines = [
        "# A squared error, cells or diffusion on a known density",
        "",
        f"`{command}`, {date.today().isoformat()}, {machine}. Mean over the seeds, ± standard deviation; {COUNT:,} "
        "draws for each of the four contexts.",
        "",
        "| draws of | energy distance to the truth | within 3 deviations of a part |",
        "|:--|--:|--:|",
        *(f"| {name} | {spread(found[name], '.4f')} | {100 * mean(near[name]):.1f}% |" for name in found),
        "",
        f"![]({given.page.with_suffix('.png').name})",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print(f"Wrote {given.page} and {given.page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
