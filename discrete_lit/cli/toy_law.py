"""A toy on which samplers are exact: a chain of coloured cells, its true conditionals, and the laws of the samplers.

Every cell has a favoured colour, and neighbours like to be alike: `p(x) ∝ prod_i favour(i, x_i) prod_i like(x_i,
x_(i+1))`. Its conditionals given any noisy or partly masked row follow by the forward-backward recursion, so a network
that knows the law perfectly can be written down. What a sampler then draws wrongly is the sampler's own error: it draws
several cells at once as if they were independent (Austin et al., D3PM, 2021; Chang et al., MaskGIT, 2022).
"""

from collections.abc import Iterable
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from discrete_lit.backbones import Backbone, Cache, SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.diffusion.parameterization import Denoiser, PosteriorHead
from discrete_lit.diffusion.processes import AbsorbingProcess, ForwardProcess, UniformProcess
from discrete_lit.samplers import AncestralSampler, MaskGITSampler, RasterSampler, Sampler, SamplingContext
from discrete_lit.samplers.diffusion import finite_noise
from discrete_lit.samplers.diffusion_guidance import Prediction


class ToyLaw:
    """The joint law of a row of cells, p(x) ∝ prod_i favour(i, x_i) prod_i like(x_i, x_(i+1)).

    Args:
        length: N cells; cell i favours the colour (i // 2) mod K.
        colours: K.
        favour: weight of a cell's favoured colour, where the others have 1; > 0.
        alike: weight of two neighbours of one colour, where others have 1; > 0.
    """

    def __init__(self, length: int, colours: int, *, favour: float = 3.0, alike: float = 4.0) -> None:
        self.length, self.colours = length, colours
        self.favoured = torch.arange(length) // 2 % colours
        self.favours = 1 + (favour - 1) * nn.functional.one_hot(self.favoured, colours).double()  # (N, K)
        self.likes = torch.ones(colours, colours, dtype=torch.float64) + (alike - 1) * torch.eye(colours).double()

    def sequences(self) -> Tensor:
        """`(K^N, N)` int64: every row of cells, counted in base K with the first cell most significant."""
        return all_rows(self.colours, self.length)

    def probabilities(self) -> Tensor:
        """`(K^N,)` float64: p of every row of `sequences`."""
        rows = self.sequences()
        weights = self.favours[torch.arange(self.length), rows].prod(dim=1)
        weights = weights * self.likes[rows[:, :-1], rows[:, 1:]].prod(dim=1)
        return weights / weights.sum()

    def posterior(self, likelihood: Tensor) -> Tensor:
        """Return p(x_i | evidence) of every cell, by the forward-backward recursion of a chain.

        Args:
            likelihood: `(B, N, K)` float64, p(the evidence about a cell | its colour), up to a factor.

        Returns:
            `(B, N, K)` float64.
        """
        local = self.favours * likelihood
        forward, backward = [local[:, 0]], [torch.ones_like(local[:, 0])]
        for place in range(1, self.length):
            message = forward[-1] @ self.likes * local[:, place]
            forward.append(message / message.sum(dim=1, keepdim=True))
            message = (backward[-1] * local[:, self.length - place]) @ self.likes
            backward.append(message / message.sum(dim=1, keepdim=True))
        joint = torch.stack(forward, dim=1) * torch.stack(backward[::-1], dim=1)
        return joint / joint.sum(dim=-1, keepdim=True)


def all_rows(states: int, length: int) -> Tensor:
    """`(states^N, N)` int64: every row, counted in base `states`, the first cell most significant."""
    return torch.cartesian_prod(*[torch.arange(states)] * length).reshape(-1, length)


class ToyBackbone(Backbone):
    """Logits that are the true conditional log-probabilities of a `ToyLaw`, in float64.

    Args:
        law: of the cells.
        process: the noise that a bidirectional one takes away; None makes it causal, for the raster order.
    """

    def __init__(self, law: ToyLaw, process: ForwardProcess | None = None) -> None:
        super().__init__(
            SequenceLayout(
                law.colours,
                (law.length,),
                num_classes=1,
                attention="causal" if process is None else "bidirectional",
                mask_token=process is not None and process.masks,
                timed=process is not None and not process.masks,
            )
        )
        self.law, self.process = law, process

    def denoiser(self) -> Denoiser | None:
        """Give the sampler of diffusion the process, with noise that grows linearly in time; None where causal."""
        if self.process is None:
            return None
        time_input = "total_noise" if self.layout.timed else "none"
        return Denoiser(process=self.process, schedule=LinearSchedule(), head=PosteriorHead(), time_input=time_input)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        if self.process is not None:
            sigma = torch.zeros(len(tokens)) if time is None else time
            return self.logits_at(tokens, torch.exp(-sigma.double())[:, None])
        if cache is not None:
            tokens = tokens if cache.tokens is None else torch.cat((cache.tokens, tokens), dim=1)
            cache.tokens = tokens
        known = nn.functional.one_hot(tokens, self.law.colours).double()
        rest = known.new_ones(len(tokens), self.law.length - known.shape[1], self.law.colours)
        return self.law.posterior(torch.cat((known, rest), dim=1))[:, [known.shape[1]]].log()

    def logits_at(self, tokens: Tensor, alpha: Tensor) -> Tensor:
        """Return log p(x_0 of each cell | x_t), `(B, N, K)`, of `tokens (B, N)` where `alpha (B, 1)` is left."""
        assert self.process is not None
        if self.process.masks:  # what a mask hides does not depend on how much is hidden
            alpha = torch.full_like(alpha, 0.5)
        likelihood = self.process.likelihood(tokens, alpha)[..., : self.law.colours].double()
        return self.law.posterior(likelihood).log()

    def fsdp_units(self) -> Iterable[nn.Module]:
        return ()

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        return Cache([], None)

    def flops(self, batch: int, tokens: int, filled: int | None = None, context: int = 0, ahead: int = 0) -> int:
        return 0

    def cache_flops(self, batch: int, context: int = 0) -> int:
        return 0


# The law of a sampler, from the chance of every step.


def diffusion_law(law: ToyLaw, process: ForwardProcess, rounds: int) -> Tensor:
    """Compute the exact law `(K^N,)` of what `AncestralSampler` draws in so many rounds with the true network.

    The distribution over all S^N noisy rows is taken through every step; within a step cells move independently.
    """
    sampler, backbone = AncestralSampler(steps=rounds), ToyBackbone(law, process)
    denoiser = backbone.denoiser()
    assert denoiser is not None
    states = all_rows(process.states, law.length)
    labels = torch.zeros(len(states), dtype=torch.int64)
    random = CounterRandom(0, torch.arange(len(states)))
    context = SamplingContext(backbone, labels, random=random, denoiser=denoiser)
    chances = process.prior()[states].prod(dim=1)
    for interval in sampler.intervals(denoiser.schedule, context):
        level = finite_noise(interval.t)
        logits = backbone.logits_at(states, level.alpha.expand(len(states), 1))
        outputs = (denoiser.head(logits, states, level),)
        prediction = Prediction(denoiser=denoiser, x_t=states, level=level, outputs=outputs, scale=1.0)
        after = sampler.jumps(prediction, interval).distribution(states, process.states)  # (S^N, N, S)
        chances = chances @ _independent(after)
    return chances.reshape([process.states] * law.length)[(slice(law.colours),) * law.length].flatten()


def _independent(cells: Tensor) -> Tensor:
    """`(R, S^N)`: the joint law of cells `(R, N, S)` that are drawn apart."""
    joint = cells[:, 0]
    for place in range(1, cells.shape[1]):
        joint = (joint[:, :, None] * cells[:, place, None, :]).flatten(1)
    return joint


def maskgit_law(law: ToyLaw, rounds: int, choice_temperature: float = 4.5) -> Tensor:
    """Compute the exact law `(K^N,)` of what `MaskGITSampler` draws in so many rounds with the true network.

    Every draw of the masked cells is enumerated. Those kept are the k with the largest `log p + tau Gumbel`: a
    Plackett-Luce choice without replacement, of weights `p^(1 / tau)` (Kool et al., 2019).

    Raises:
        ValueError: more rounds than cells, or a choice temperature that is not positive.
    """
    if not 1 <= rounds <= law.length:
        raise ValueError(f"rounds must lie in [1, {law.length}], the number of cells, got {rounds}")
    if choice_temperature <= 0:
        raise ValueError(f"choice_temperature must be > 0: without noise ties decide, got {choice_temperature}")
    sampler = MaskGITSampler(steps=rounds, choice_temperature=choice_temperature)
    backbone, mask, length = ToyBackbone(law, AbsorbingProcess(law.colours)), law.colours, law.length
    chances = {(mask,) * length: 1.0}
    for step, left in enumerate(sampler.masked_counts(length)):
        after: dict[tuple[int, ...], float] = {}
        tau = sampler.noise_scale(step)
        for state, chance in chances.items():
            conditionals = backbone.logits_at(torch.tensor([state]), torch.ones(1, 1).double())[0].exp()
            places = [place for place in range(length) if state[place] == mask]
            for row in all_rows(law.colours, len(places)).tolist():
                scores = [float(conditionals[place, colour]) for place, colour in zip(places, row, strict=True)]
                of_row = chance * float(torch.tensor(scores, dtype=torch.float64).prod())
                for kept in combinations(range(len(places)), len(places) - left):
                    share = 1.0 if left == 0 else chosen([score ** (1 / tau) for score in scores], frozenset(kept))
                    filled = list(state)
                    for index in kept:
                        filled[places[index]] = row[index]
                    after[tuple(filled)] = after.get(tuple(filled), 0.0) + of_row * share
        chances = after
    return torch.tensor([chances.get(tuple(row), 0.0) for row in law.sequences().tolist()], dtype=torch.float64)


def chosen(weights: list[float], kept: frozenset[int]) -> float:
    """Return the probability that draws without replacement, by these weights, take exactly the `kept` first."""
    if not kept:
        return 1.0
    rest = sum(weight for index, weight in enumerate(weights) if index not in kept)
    total = rest + sum(weights[index] for index in kept)
    # The last of the kept to be drawn may be any: the probability is a sum over orders, built up from the front.
    return sum(
        weights[first] / total * chosen([0.0 if i == first else w for i, w in enumerate(weights)], kept - {first})
        for first in kept
    )


def total_variation(first: Tensor, second: Tensor) -> float:
    """Return half the sum of absolute differences of two laws `(n,)`: 0 where they are equal, 1 where disjoint."""
    return float((first - second).abs().sum() / 2)


def toy_samplers(law: ToyLaw, rounds: int) -> dict[str, tuple[ToyBackbone, Sampler]]:
    """Build the four samplers of the toy, each beside the true network that it asks; `rounds` in [1, N]."""
    masks, colours = AbsorbingProcess(law.colours), UniformProcess(law.colours)
    return {
        "autoregressive": (ToyBackbone(law), RasterSampler()),
        "MaskGIT": (ToyBackbone(law, masks), MaskGITSampler(steps=rounds)),
        "masked diffusion": (ToyBackbone(law, masks), AncestralSampler(steps=rounds)),
        "uniform diffusion": (ToyBackbone(law, colours), AncestralSampler(steps=rounds)),
    }


def distances(law: ToyLaw, most_rounds: int = 16) -> dict[str, list[tuple[int, float]]]:
    """Compute for each sampler (rounds, total variation from the truth), exactly; for laws of few cells.

    The autoregressive order takes N rounds and is exact; MaskGIT takes at most N, since each round keeps a cell.
    """
    truth, places = law.probabilities(), range(1, law.length + 1)
    masks, colours = AbsorbingProcess(law.colours), UniformProcess(law.colours)
    laws = {
        "autoregressive": ([law.length], lambda rounds: _raster_law(law)),
        "MaskGIT": (places, partial(maskgit_law, law)),
        "masked diffusion": (range(1, most_rounds + 1), partial(diffusion_law, law, masks)),
        "uniform diffusion": (range(1, most_rounds + 1), partial(diffusion_law, law, colours)),
    }
    return {
        name: [(rounds, total_variation(of_rounds(rounds), truth)) for rounds in each]
        for name, (each, of_rounds) in laws.items()
    }


def _raster_law(law: ToyLaw) -> Tensor:
    """`(K^N,)`: the product of the causal network's conditionals along each row."""
    backbone, rows = ToyBackbone(law), law.sequences()
    total = torch.zeros(len(rows), dtype=torch.float64)
    for place in range(law.length):
        logits = backbone(rows[:, :place], torch.zeros(len(rows), dtype=torch.int64))[:, -1]
        total += logits.gather(1, rows[:, place : place + 1])[:, 0]
    return total.exp()
