"""The codebook of VQ-VAE and its kin: codes, the search among them, and how they follow the latents.

    EMA codebook       each code is the running mean of the latents that chose it (van den Oord et al., "Neural Discrete
                       Representation Learning", 2017, appendix A.1)
    gradient codebook  codes are a parameter that the quantizer's loss trains
    start              codes from the first training batch: some of its latents, or k-means centres of them
    dead codes         are replaced by latents (RQ-VAE: Lee et al., 2022)

All statistics are those of the latents of all ranks together, and of all micro-batches of an optimizer step, so
splitting a batch over ranks or micro-batches changes nothing; but the first codes come from the first micro-batch.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from math import e
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import all_gather_rows, all_reduce_sum, rank
from discrete_lit.core.modules import RunningStatistics
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes

CodebookUpdate = Literal["ema", "gradient"]
CodebookInit = Literal["data", "kmeans", "uniform", "unit_uniform", "vaex", "normal"]

# k-means: seeds are drawn in at most this many passes over the latents, and moved by so many of Lloyd's iterations.
_SEEDING_ROUNDS = 256
_LLOYD_ITERATIONS = 10


class Codebook(RunningStatistics):
    """Hold K codes of width D, and find, update and revive them.

    A quantizer calls, in this order, for latents `(..., D)` in the precision of the codes, float32 or float64:

        codebook.prepare(latents)           # training: the first codes, on the first batch
        ids = codebook.search(latents)
        e = codebook.lookup(ids)            # losses, the gradient to the latents
        codebook.observe(latents, ids)      # training: running means, revival

    In training `prepare` and `observe` move the buffers below. What they draw at random is a function of `seed` and of
    the number of steps of the running means (`steps`, a buffer): neither the number of ranks nor a resume changes them.
    Latents that are not finite are left out of all statistics. A codebook that several residual depths share is called
    so at each depth: every `observe` is a step of the running means, and the next depth searches the moved codes (as
    RQ-VAE does); its first codes come from the first depth's latents. Where several micro-batches make an optimizer
    step, all their depths search the codes of its start, and the steps of the depths follow one another at its end.

    Args:
        size: K.
        dim: D.
        update: `"ema"` moves codes to the running mean of their latents (appendix A.1); `"gradient"` makes them a
            parameter, trained by the quantizer's loss.
        decay: gamma of appendix A.1, also of the usage that `revive_below` looks at.
        init: first codes from the latents of the first training batch: `"data"` takes some of them, `"kmeans"` their
            cluster centres. `"uniform"` in [-1 / K, 1 / K], where taming, LDM and TiTok begin: far from the latents,
            most codes are never used. `"unit_uniform"` divides these by their length, as LlamaGen does; with
            `normalize` only the length of the stored codes differs, by which a step of the optimizer turns them less.
            `"vaex"` is uniform in [-20 / K, 20 / K], where the single-scale tokenizer of VAR's authors begins.
            `"normal"` with deviation D^-1/2, as SimVQ and ViT-VQGAN begin (they freeze or normalise the codes).
        normalize: latents and codes are compared and looked up on the unit sphere (ViT-VQGAN: Yu et al., 2022). With
            `"ema"` the codes are the directions of the running sums of unit latents, spherical k-means (Dhillon and
            Modha, 2001).
        revive_below: a code whose usage, the running mean of its latents a batch over all ranks, is below this, is
            replaced by a latent of the batch; None keeps dead codes. RQ-VAE takes 1.
        seed: of the random choices of `"kmeans"` and of the revival.

    Raises:
        ValueError: a setting out of its range.
    """

    codes: Tensor
    """`(K, D)`, as stored: `lookup` gives them as they are used."""
    cluster_size: Tensor
    """`(K,)` usage N: the running mean of each code's number of latents in a batch; with `"ema"` or revival only."""
    embedding_sum: Tensor
    """`(K, D)` m: the running mean of the sum of each code's latents in a batch; with `"ema"` only."""
    started: Tensor
    """Bool: the codes have been taken from data, or came with a checkpoint; with `"data"` and `"kmeans"` only."""
    steps: Tensor
    """int64: steps of the running means, which number the random draws of the revival; with revival only."""

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        update: CodebookUpdate = "ema",
        decay: float = 0.99,
        init: CodebookInit = "data",
        normalize: bool = False,
        revive_below: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"the codebook's size and dim must be positive, got {size} and {dim}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if update not in ("ema", "gradient"):
            raise ValueError(f"the codebook's update must be 'ema' or 'gradient', got {update!r}")
        if init not in get_args(CodebookInit):
            raise ValueError(f"the codebook's init must be one of {', '.join(get_args(CodebookInit))}, got {init!r}")
        if revive_below is not None and not revive_below > 0:
            raise ValueError(f"revive_below must be > 0, or None to keep dead codes, got {revive_below}")
        self.size, self.dim = size, dim
        self.update, self.decay, self.normalize = update, decay, normalize
        self.revive_below, self.seed = revive_below, seed
        # Usage of a code that has just begun: not yet dead.
        self.first_usage = max(1.0, revive_below or 0.0)
        codes = torch.empty(size, dim)
        bound = (20 if init == "vaex" else 1) / size
        codes = codes.normal_(std=dim**-0.5) if init == "normal" else codes.uniform_(-bound, bound)
        codes = F.normalize(codes, dim=1) if init == "unit_uniform" else codes
        if update == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("embedding_sum", self._on_sphere(codes) * self.first_usage)
        self.counts_usage = update == "ema" or revive_below is not None
        if self.counts_usage:
            self.register_buffer("cluster_size", torch.full((size,), self.first_usage))
        if revive_below is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.init = init
        self._seen: dict[int, _Seen] = {}
        self._may_start = init in ("data", "kmeans")
        if self._may_start:
            self.register_buffer("started", torch.tensor(False))

    def project(self, latents: Tensor) -> Tensor:
        """Put latents `(..., D)` where codes are compared: on the unit sphere with `normalize`, else unchanged."""
        return self._on_sphere(latents)

    @torch.no_grad()
    def search(self, latents: Tensor) -> Tensor:
        """Find the ids `(...)` of the codes nearest in Euclidean distance to latents `(..., D)`."""
        rows = self.project(rearrange(latents, "... d -> (...) d"))
        return nearest_codes(rows, self._on_sphere(self.codes)).reshape(latents.shape[:-1])

    def lookup(self, ids: Tensor) -> Tensor:
        """Look up the codes `(..., D)` of ids `(...)`, with their gradient where they are a parameter."""
        return self._on_sphere(F.embedding(ids, self.codes))

    def _on_sphere(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    # The start: codes from the first training batch.

    @torch.no_grad()
    def prepare(self, latents: Tensor) -> None:
        """Take the first codes from latents `(..., D)` of all ranks, unless a checkpoint brought codes.

        Does nothing in eval mode, after the first batch, or where no latent is finite.
        """
        if not (self.training and self._may_start):
            return
        if not self.started:
            rows, everyone = gather_finite(self.project(rearrange(latents.detach(), "... d -> (...) d")))
            if len(everyone) == 0:
                return
            if self.init == "data":
                codes = spread_codes(everyone, self.size)
            else:
                codes = kmeans_codes(rows, everyone, size=self.size, normalize=self.normalize, seed=self.seed)
            self.codes.copy_(_from_first_rank(codes))
            if self.update == "ema":
                self.embedding_sum.copy_(self.codes * self.first_usage)
            self.started.fill_(True)
        self._may_start = False  # `started` is read once: reading it on every step would wait for the device

    @torch.no_grad()
    def go_on_from_codes(self, missing: Collection[str]) -> None:
        """Let the buffers that came without values fit the codes that came: these are not drawn again, nor forgotten.

        Usage begins so high that codes are revived which `1 / (1 - decay)` batches left unused, not the first one.

        Args:
            missing: their names.
        """
        if "started" in missing:
            self.started.fill_(True)
        if "cluster_size" in missing:
            self.cluster_size.fill_(self.first_usage * e)
        if "embedding_sum" in missing:
            self.embedding_sum.copy_(self._on_sphere(self.codes) * self.cluster_size[:, None])

    # The update: running means (appendix A.1), revival of dead codes.

    @torch.no_grad()
    def observe(self, latents: Tensor, ids: Tensor, depth: int = 0) -> None:
        """Update the statistics and revive dead codes by latents `(..., D)` and their ids `(...)`; not in eval mode.

        Call it after everything that uses the codes of this batch. While `accumulating`, it is `end_step` that updates.

        Args:
            latents: those that were searched with.
            ids: of their codes.
            depth: of a codebook that several depths share; each depth's latents are a step of the running means.
        """
        if not (self.training and self.counts_usage):
            return
        rows, ids = self.project(rearrange(latents.detach(), "... d -> (...) d")), ids.reshape(-1)
        finite = rows.isfinite().all(dim=1)
        rows = torch.where(finite[:, None], rows, 0.0)
        seen = self._seen.setdefault(depth, _Seen(counts=torch.zeros_like(self.cluster_size)))
        seen.counts.index_add_(0, ids, finite.to(self.cluster_size.dtype))
        if self.update == "ema":
            seen.sums = torch.zeros_like(self.embedding_sum) if seen.sums is None else seen.sums
            seen.sums.index_add_(0, ids, rows)
        if self.revive_below is not None:
            seen.rows.append(rows)
            seen.finite.append(finite)
        if not self.accumulating:
            self.end_step()

    @torch.no_grad()
    def end_step(self) -> None:
        seen, self._seen = self._seen, {}
        for depth in sorted(seen):
            self._step(seen[depth])

    def forget_step(self) -> None:
        self._seen = {}

    def _step(self, seen: "_Seen") -> None:
        # Eq. 6: N <- gamma N + (1 - gamma) n, with n the number of latents of each code in this batch.
        self.cluster_size.lerp_(all_reduce_sum(seen.counts), 1 - self.decay)
        if seen.sums is not None:
            # Eq. 7: m <- gamma m + (1 - gamma) times their sum.
            self.embedding_sum.lerp_(all_reduce_sum(seen.sums), 1 - self.decay)
            self.codes.copy_(self._means())
        if self.revive_below is not None:
            self.steps += 1
            self._revive(torch.cat(seen.rows), torch.cat(seen.finite))

    def _means(self) -> Tensor:
        """Eq. 8: e = m / N."""
        if self.normalize:
            # The direction of m, which a code without latents keeps while m itself decays to nothing.
            length = self.embedding_sum.norm(dim=1, keepdim=True)
            return torch.where(length > 1e-30, self.embedding_sum / length, self.codes)
        # Laplace smoothing of N keeps the codes of empty clusters finite.
        total, smoothing = self.cluster_size.sum(), 1e-5
        size = (self.cluster_size + smoothing) / (total + self.size * smoothing) * total
        return self.embedding_sum / size[:, None]

    def _revive(self, rows: Tensor, finite: Tensor) -> None:
        """Replace dead codes by latents drawn without replacement from the `finite (n,)` rows `(n, D)` of all ranks."""
        assert self.revive_below is not None
        # The host waits for the device here, once a step: with nothing to revive, there is nothing else to do.
        dead = (self.cluster_size < self.revive_below).nonzero()[:, 0]
        if len(dead) == 0:
            return
        rows = rows[finite]
        lengths = all_gather_rows(torch.tensor([len(rows)], device=rows.device))
        order = sort_order(all_gather_rows(sort_keys(rows)))
        random = CounterRandom(self.seed, self.steps[None])
        drawn = order[random.uniform(Purpose.CODE_REVIVAL, len(order))[0].argsort()[: len(dead)]]
        # Each rank fills in the drawn rows that are its own; their sum over ranks has them all.
        position = drawn - lengths[: rank()].sum()
        own = (position >= 0) & (position < len(rows))
        values = rows.new_zeros(len(drawn), self.dim)
        values[own] = rows[position[own]]
        values = all_reduce_sum(values)
        # The least used first, where the batch has fewer latents than there are dead codes.
        dead = dead[self.cluster_size[dead].argsort(stable=True)][: len(drawn)]
        self.codes[dead] = values
        self.cluster_size[dead] = self.first_usage
        if self.update == "ema":
            self.embedding_sum[dead] = values * self.first_usage


@dataclass(kw_only=True)
class _Seen:
    """The latents of this rank since the last step."""

    counts: Tensor
    """`(K,)`: how many chose each code."""
    sums: Tensor | None = None
    """`(K, D)`: the sum of those that chose it; with `"ema"` only."""
    rows: list[Tensor] = field(default_factory=list)
    """`(n, D)` of each batch, zeros where they are not finite; with revival only."""
    finite: list[Tensor] = field(default_factory=list)
    """`(n,)` bool of each batch: which of the rows are finite; with revival only."""


# First codes from latents, the same however these are split over ranks: the latents of all ranks are sorted first.


def gather_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the rows `(n, D)` that are not finite; give back the others, and those of all ranks `(N, D)`, sorted."""
    rows = rows[rows.isfinite().all(dim=1)]
    everyone = all_gather_rows(rows)
    return rows, everyone[sort_order(sort_keys(everyone))]


def sort_keys(rows: Tensor) -> Tensor:
    """Compute `(n, 2)` float64 keys of rows `(n, D)`: the first channel, and a sum of all channels that breaks ties."""
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64).sqrt()
    return torch.stack((rows[:, 0].double(), (rows.double() * weights).sum(dim=1)), dim=1)


def sort_order(keys: Tensor) -> Tensor:
    """Sort keys `(n, 2)` by their first number, ties by their second: `(n,)` indices, whatever order they came in."""
    order = keys[:, 1].argsort(stable=True)
    return order[keys[order, 0].argsort(stable=True)]


def spread_codes(rows: Tensor, size: int) -> Tensor:
    """Take `size` of the sorted rows `(n, D)`, evenly along their first channel; some of them twice if `n < size`."""
    evenly = (torch.arange(size, device=rows.device) * 2 + 1) * len(rows) // (2 * size)
    return rows[evenly]


def kmeans_codes(rows: Tensor, everyone: Tensor, *, size: int, normalize: bool, seed: int) -> Tensor:
    """Find the centres of k-means: seeds far from one another, moved by Lloyd's iterations over all ranks' latents.

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


def _seeds(everyone: Tensor, size: int, seed: int) -> Tensor:
    """Draw rows by their squared distance to the seeds so far: k-means++ (Arthur and Vassilvitskii, 2007).

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


def _from_first_rank(value: Tensor) -> Tensor:
    """Give every rank the first rank's `value`."""
    return all_reduce_sum(value if rank() == 0 else torch.zeros_like(value))
