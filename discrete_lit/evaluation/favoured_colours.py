"""A law of 16 colours whose samplers can be followed exactly: what each round of a sampler costs in total variation.

The law: with probability `mixture[z]` a picture is of kind z, and each position then has its favoured colour with
probability `hits[z]`, any other colour alike. So positions depend on each other through z alone, and the number of
positions with their favoured colour, the hits, says all that there is to know about the others: the law of a sampler
that treats positions and the other colours alike is a law of the number of hits, a chain of at most 153 states. Each
function below follows that chain, nothing is drawn; `FavouredColoursBackbone` gives the same conditionals to the
samplers themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor, nn

from discrete_lit.backbones import Backbone, Cache, SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.diffusion import CosineSchedule, LinearSchedule
from discrete_lit.diffusion.parameterization import Denoiser, LeaveOneOutHead
from discrete_lit.diffusion.processes import AbsorbingProcess, UniformProcess
from discrete_lit.samplers.maskgit import masked_counts


@dataclass(frozen=True, kw_only=True)
class FavouredColours:
    """The law of a row of colours, each position with a favourite: a mixture of kinds of pictures.

    Args:
        length: N positions.
        colours: K.
        mixture: probability of each kind of picture.
        hits: for each kind, the probability that a position has its favoured colour.

    Raises:
        ValueError: fewer than two colours, or numbers that are no probabilities.
    """

    length: int = 16
    colours: int = 4
    mixture: tuple[float, ...] = (0.5, 0.5)
    hits: tuple[float, ...] = (0.9, 0.25)

    def __post_init__(self) -> None:
        if self.colours < 2 or self.length < 1:
            raise ValueError(f"a law needs a position and two colours, got {self.length} and {self.colours}")
        if len(self.mixture) != len(self.hits) or abs(sum(self.mixture) - 1) > 1e-9:
            raise ValueError(f"mixture must add up to 1 and have a kind for each of hits, got {self.mixture}")
        if not all(0 <= p <= 1 for p in (*self.mixture, *self.hits)):
            raise ValueError(f"mixture and hits must lie in [0, 1], got {self.mixture} and {self.hits}")

    @property
    def favourites(self) -> list[int]:
        """The favoured colour of each position: diagonals of a square."""
        side = max(1, round(self.length**0.5))
        return [(place % side + place // side) % self.colours for place in range(self.length)]

    def count_law(self) -> Tensor:
        """Return `(N + 1,)` float64: the probability of each number of hits."""
        kinds = [
            p * binomial(self.length, torch.tensor(a, dtype=torch.float64))
            for p, a in zip(self.mixture, self.hits, strict=True)
        ]
        return torch.stack(kinds).sum(dim=0)

    def hit_probability(self, hits: Tensor, misses: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """Predict whether a position has its favoured colour, given others.

        Args:
            hits: how many of the others have theirs.
            misses: how many of them have another colour.
            alpha: the probability that uniform noise has left a colour alone; 1 is no noise.

        Returns:
            The probability, float64, of the shape of the arguments.
        """
        kinds = torch.tensor(self.hits, dtype=torch.float64)
        seen = torch.as_tensor(alpha, dtype=torch.float64)[..., None] * (kinds - 1 / self.colours) + 1 / self.colours
        prior = torch.tensor(self.mixture, dtype=torch.float64)
        weight = prior * seen ** hits.double()[..., None] * (1 - seen) ** misses.double()[..., None]
        return (weight * kinds).sum(dim=-1) / weight.sum(dim=-1)


def binomial(count: int, p: Tensor) -> Tensor:
    """Return the binomial law of `count` trials, `(..., count + 1)` float64, of probabilities `p (...)` float64."""
    k = torch.arange(count + 1, dtype=torch.float64)
    ways = torch.tensor([float(comb(count, i)) for i in range(count + 1)], dtype=torch.float64)
    p = p[..., None]
    return ways * p**k * (1 - p) ** (count - k)


def total_variation(first: Tensor, second: Tensor) -> float:
    """Return half the sum of the absolute differences of two laws, in [0, 1]."""
    return float((first - second).abs().sum() / 2)


# The samplers.


def raster_total_variation(law: FavouredColours, rounds: int) -> float:
    """Follow raster order with N / rounds positions drawn at once, each given those before its round.

    N rounds are autoregression, which is exact. Positions of different rounds are not alike, so the law is one of the
    hits of each round.

    Args:
        law: the truth.
        rounds: a divisor of N.

    Returns:
        The total variation from the truth.

    Raises:
        ValueError: rounds that do not divide N.
    """
    if law.length % rounds:
        raise ValueError(f"rounds={rounds} does not divide the {law.length} positions")
    size = law.length // rounds
    drawn, hits = torch.ones(1, dtype=torch.float64), torch.zeros(1)
    truth = torch.tensor(law.mixture, dtype=torch.float64)[:, None]  # of each kind
    of_kinds = binomial(size, torch.tensor(law.hits, dtype=torch.float64))[:, None, :]
    for number in range(rounds):
        predicted = binomial(size, law.hit_probability(hits, number * size - hits))
        drawn = (drawn[:, None] * predicted).flatten()
        truth = (truth[..., None] * of_kinds).flatten(1)
        hits = (hits[:, None] + torch.arange(size + 1)).flatten()
    return total_variation(drawn, truth.sum(dim=0))


def maskgit_law(law: FavouredColours, steps: int, choice_temperature: float) -> Tensor:
    """Follow MaskGIT: draw all masked positions, keep the most confident, with the cosine's counts.

    The score of a drawn colour is its log-probability plus Gumbel noise of scale tau = `choice_temperature (1 - r)`, so
    the kept ones are drawn one after another without replacement, with weights p^(1 / tau).

    Args:
        law: the truth.
        steps: T, at most N.
        choice_temperature: of the noise, > 0.

    Returns:
        The law of the number of hits `(N + 1,)`.

    Raises:
        ValueError: no noise, where ties are broken by position, and positions are no longer alike.
    """
    if choice_temperature <= 0:
        raise ValueError(f"choice_temperature must be > 0 for ties to be broken alike, got {choice_temperature}")
    states = [1.0]  # of the hits among the positions that are kept; plain numbers are faster than tensors this small
    masked = law.length
    for step, stay in enumerate(masked_counts(CosineSchedule(), steps, law.length)):
        kept, keep = law.length - masked, masked - stay
        tau = choice_temperature * (1 - (step + 1) / steps)
        after = [0.0] * (kept + keep + 1)
        places = torch.arange(kept + 1)
        p = law.hit_probability(places, kept - places)
        drawn = binomial(masked, p).tolist()
        for hits in range(kept + 1):
            other = float((1 - p[hits]) / (law.colours - 1))
            weight = (other / float(p[hits])) ** (1 / tau) if stay else 1.0
            for among in range(masked + 1):  # hits among what is drawn
                for chosen, chance in enumerate(_without_replacement(among, masked - among, keep, weight)):
                    after[hits + chosen] += states[hits] * drawn[hits][among] * chance
        states, masked = after, stay
    return torch.tensor(states, dtype=torch.float64)


def _without_replacement(first: int, second: int, keep: int, weight: float) -> list[float]:
    """List how likely 0, 1, ... of `first` are among `keep` drawn without replacement; `second` weigh `weight` each."""
    taken = [1.0] + [0.0] * keep
    for number in range(keep):
        nexts = [0.0] * (keep + 1)
        for j in range(max(0, number - second), min(first, number) + 1):
            one, other = float(first - j), (second - (number - j)) * weight
            if one > 0:
                nexts[j + 1] += taken[j] * one / (one + other)
            if second > number - j:
                nexts[j] += taken[j] * other / (one + other)
        taken = nexts
    return taken


def unmasking_law(law: FavouredColours, steps: int) -> Tensor:
    """Follow masked diffusion's ancestral sampler: each masked position is unmasked with probability (t - s) / t.

    Args:
        law: the truth.
        steps: T, on the linear schedule's even times.

    Returns:
        The law of the number of hits `(N + 1,)`.
    """
    n = law.length
    pairs = [(hits, misses) for hits in range(n + 1) for misses in range(n + 1 - hits)]
    numbers = {pair: number for number, pair in enumerate(pairs)}
    masked = [n - hits - misses for hits, misses in pairs]
    p = law.hit_probability(*torch.tensor(pairs).unbind(dim=1))
    # Where each state goes when so many of its masked positions are unmasked: the same in all steps.
    goes = torch.zeros(len(pairs), n + 1, len(pairs), dtype=torch.float64)
    for number, (hits, misses) in enumerate(pairs):
        for count in range(masked[number] + 1):
            chances = binomial(count, p[number]).tolist()
            for new_hits, chance in enumerate(chances):
                goes[number, count, numbers[hits + new_hits, misses + count - new_hits]] = chance
    states = torch.zeros(len(pairs), dtype=torch.float64)
    states[numbers[0, 0]] = 1.0
    for step in range(steps):
        unmask = torch.tensor(1 / (steps - step), dtype=torch.float64)
        counts = torch.zeros(len(pairs), n + 1, dtype=torch.float64)
        for left in range(n + 1):
            here = torch.tensor(masked) == left
            counts[here, : left + 1] = binomial(left, unmask)
        states = torch.einsum("s,sc,sct->t", states, counts, goes)
    return torch.stack([states[numbers[hits, n - hits]] for hits in range(n + 1)])


def uniform_law(law: FavouredColours, steps: int) -> Tensor:
    """Follow uniform diffusion's ancestral sampler: every position may change at every step.

    A position at x is next at y with probability proportional to q_s(y) (rho [x = y] + (1 - rho) / K), where rho =
    alpha_t / alpha_s, and q_s is its predicted clean colour with the noise of s (D3PM, eq. 4).

    Args:
        law: the truth.
        steps: T, on the linear schedule's even times.

    Returns:
        The law of the number of hits `(N + 1,)`.
    """
    n, k = law.length, law.colours
    states = binomial(n, torch.tensor(1 / k, dtype=torch.float64))
    for step in range(steps):
        alpha_t, alpha_s = step / steps, (step + 1) / steps
        rho = alpha_t / alpha_s
        stay, move = rho + (1 - rho) / k, (1 - rho) / k
        hits, becomes = torch.arange(n + 1), []
        for own in (1, 0):  # whether the position has its favoured colour now
            r = law.hit_probability((hits - own).clamp(min=0), (n - hits - 1 + own).clamp(min=0), alpha_t)
            favoured = alpha_s * r + (1 - alpha_s) / k
            other = alpha_s * (1 - r) / (k - 1) + (1 - alpha_s) / k
            to_favoured = favoured * (stay if own else move)
            elsewhere = (k - 1) * other * move if own else other * (stay + (k - 2) * move)
            becomes.append(to_favoured / (to_favoured + elsewhere))
        after = torch.zeros_like(states)
        for number in range(n + 1):
            gained = binomial(n - number, becomes[1][number])
            for count, chance in enumerate(binomial(number, becomes[0][number]).tolist()):
                after[count : count + n - number + 1] += states[number] * chance * gained
        states = after
    return states


def total_variations(law: FavouredColours, choice_temperatures: Iterable[float]) -> list[dict]:
    """Compute the total variation of each sampler from the truth against its rounds.

    Args:
        law: the truth.
        choice_temperatures: of MaskGIT, a curve each.

    Returns:
        For each sampler its `name` and `points`, pairs of rounds and total variation.
    """
    truth, n = law.count_law(), law.length
    few = [rounds for rounds in (1, 2, 4, 8, 16) if n % rounds == 0]
    many = [*few, 32, 64]
    curves = [{"name": "Raster order", "points": [[t, raster_total_variation(law, t)] for t in few]}]
    for tau in choice_temperatures:
        points = [[t, total_variation(maskgit_law(law, t, tau), truth)] for t in few]
        curves.append({"name": f"MaskGIT, choice temperature {tau:g}", "points": points})
    for name, follow in (("Diffusion of masks", unmasking_law), ("Uniform diffusion", uniform_law)):
        curves.append({"name": name, "points": [[t, total_variation(follow(law, t), truth)] for t in many]})
    return curves


class FavouredColoursBackbone(Backbone):
    """Give samplers the exact conditionals of `FavouredColours`, as a network's logits.

    Args:
        law: the truth.
        attention: `"causal"` predicts the next position, `"bidirectional"` all that are masked or noisy.
        noise: of a bidirectional one, `"masks"` or `"uniform"`.
    """

    def __init__(self, law: FavouredColours, *, attention: str = "bidirectional", noise: str = "masks") -> None:
        causal = attention == "causal"
        layout = SequenceLayout(
            law.colours,
            (law.length,),
            num_classes=1,
            attention="causal" if causal else "bidirectional",
            mask_token=not causal and noise == "masks",
            timed=noise == "uniform",
            mask_output=False,
        )
        super().__init__(layout)
        self.law = law
        self.register_buffer("favourites", torch.tensor(law.favourites), persistent=False)

    def denoiser(self) -> Denoiser:
        """Say what is predicted: the clean colours of a linear schedule's noise."""
        process = UniformProcess(self.law.colours) if self.layout.timed else AbsorbingProcess(self.law.colours)
        time = "unit_time" if self.layout.timed else "none"
        return Denoiser(process=process, schedule=LinearSchedule(), head=LeaveOneOutHead(), time_input=time)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        assert order is None and predicted is None, "every position is predicted, in raster order"
        if self.layout.attention == "causal":
            return self._next(tokens, cache)
        favourites = self.get_buffer("favourites")
        hit, seen = tokens == favourites, tokens < self.law.colours
        hits = hit.sum(dim=1, keepdim=True) - hit.long()
        misses = seen.sum(dim=1, keepdim=True) - seen.long() - hits
        alpha = 1.0 if time is None else (1 - time.double())[:, None].expand(hits.shape)
        return self._logits(self.law.hit_probability(hits, misses, alpha), favourites)

    def _next(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        kept = None if cache is None else cache.tokens
        first, before = kept is None, tokens[:, :0] if kept is None else kept
        tokens = torch.cat((before, tokens), dim=1)
        if cache is not None:
            cache.tokens = tokens
        read = tokens.shape[1]
        hit = (tokens == self.get_buffer("favourites")[:read]).long()
        hits = torch.cat((hit.new_zeros(len(hit), 1), hit.cumsum(dim=1)), dim=1)  # before each position
        rows = slice(0 if first else before.shape[1] + 1, min(read + 1, self.law.length))
        places = torch.arange(self.law.length)[rows]
        hits = hits[:, rows]
        return self._logits(self.law.hit_probability(hits, places - hits), self.get_buffer("favourites")[rows])

    def _logits(self, p: Tensor, favourites: Tensor) -> Tensor:
        """Log-probabilities `(B, n, K)`, given that of the favoured colour at each position `p (B, n)`."""
        others = ((1 - p) / (self.law.colours - 1))[..., None].expand(*p.shape, self.law.colours)
        return others.scatter(-1, favourites.expand(p.shape)[..., None], p[..., None]).log()

    def fsdp_units(self) -> Iterable[nn.Module]:
        return ()

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        return Cache([], None)

    def flops(self, batch: int, tokens: int, filled: int | None = None, context: int = 0, ahead: int = 0) -> int:
        return 0

    def cache_flops(self, batch: int, context: int = 0) -> int:
        return 0
