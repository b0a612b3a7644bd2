"""First codes from the latents of the first training batch, the same however the batch is split over ranks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.distributed import all_gather_rows, all_reduce_sum, rank
from discrete_lit.processes.random import CounterRandom, Purpose
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes

# Seeds are drawn in at most this many passes over the latents, Lloyd's iterations in this many.
_SEEDING_ROUNDS = 256
_LLOYD_ITERATIONS = 10


def sort_keys(rows: Tensor) -> Tensor:
    """`(n, 2)` float64 of rows `(n, D)`: the first channel, and one number of all channels that breaks its ties."""
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64).sqrt()
    return torch.stack((rows[:, 0].double(), (rows.double() * weights).sum(dim=1)), dim=1)


def sort_order(keys: Tensor) -> Tensor:
    """The order of keys `(n, 2)` by their first, then by their second number: it forgets the order they came in."""
    order = keys[:, 1].argsort(stable=True)
    return order[keys[order, 0].argsort(stable=True)]


def spread_codes(rows: Tensor, size: int) -> Tensor:
    """`size` of the sorted rows `(n, D)`, evenly along their first channel, some of them twice where `n < size`."""
    places = (torch.arange(size, device=rows.device) * 2 + 1) * len(rows) // (2 * size)
    return rows[places]


def kmeans_codes(rows: Tensor, everyone: Tensor, size: int, normalize: bool, seed: int) -> Tensor:
    """Centres of k-means: seeds far from one another, then Lloyd's iterations over the latents of all ranks.

    Args:
        rows: `(n, D)` latents of this rank.
        everyone: `(N, D)` sorted latents of all ranks.
        size: K.
        normalize: centres stay on the unit sphere (spherical k-means: Dhillon and Modha, 2001).
        seed: of the random choice of the seeds.

    Returns:
        `(K, D)`. A centre that loses all its rows stays where it is.
    """
    if len(everyone) <= size:
        return spread_codes(everyone, size)
    centres = _seeds(everyone, size, seed)
    for _ in range(_LLOYD_ITERATIONS):
        ids = nearest_codes(rows, centres)
        counts = all_reduce_sum(rows.new_zeros(size).index_add_(0, ids, rows.new_ones(len(rows))))
        sums = all_reduce_sum(torch.zeros_like(centres).index_add_(0, ids, rows))
        means = sums / counts.clamp_min(1)[:, None]
        if normalize:
            means = F.normalize(means, dim=1)
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres


def from_first_rank(value: Tensor) -> Tensor:
    """The first rank's `value` on every rank."""
    return all_reduce_sum(value if rank() == 0 else torch.zeros_like(value))


def gather_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The finite ones of rows `(n, D)`, and the sorted ones of all ranks `(N, D)`."""
    rows = rows[rows.isfinite().all(dim=1)]
    everyone = all_gather_rows(rows)
    return rows, everyone[sort_order(sort_keys(everyone))]


def _seeds(everyone: Tensor, size: int, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): rows drawn by their squared distance to the seeds so far.

    A large codebook draws several seeds at once, by the exponential race of Efraimidis and Spirakis (2006).
    """
    random = CounterRandom(seed, torch.zeros(1, dtype=torch.int64, device=everyone.device))
    weights = torch.ones(len(everyone), device=everyone.device, dtype=torch.float64)
    chosen: list[Tensor] = []
    rounds = min(size, _SEEDING_ROUNDS)
    for step in range(rounds):
        count = size * (step + 1) // rounds - size * step // rounds
        arrivals = -random.uniform(Purpose.CODE_START, len(everyone), step)[0].log() / weights
        seeds = everyone[arrivals.topk(count, largest=False).indices]
        chosen.append(seeds)
        distances = (everyone - seeds[nearest_codes(everyone, seeds)]).square().sum(dim=1).double()
        weights = distances if step == 0 else torch.minimum(weights, distances)
    return torch.cat(chosen)
