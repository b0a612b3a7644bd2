"""The categorical draw that every sampler shares, and the filters before it."""

import torch
from torch import Tensor

from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.synchronisation import forbid, host_sees

# Cumulative sums are formed for this many probabilities at once: 256 MB of float64.
_ENTRIES_AT_ONCE = 2**25


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Drop improbable ids, first by top-k, then by top-p: their logits become -inf.

    Args:
        logits: `(..., K)`.
        top_k: keep the k largest (and their ties).
        top_p: keep the smallest set of largest probabilities whose mass reaches p, the id that crosses p included
            (nucleus sampling, Holtzman et al., 2020).

    Returns:
        `(..., K)`.
    """
    candidates, filtered = logits.shape[-1], logits
    if top_k is not None and top_k < candidates:
        smallest_kept = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        dropped = logits < smallest_kept
        filtered = logits.masked_fill(dropped, -torch.inf)
        if top_p is not None and top_p < 1 and dropped.numel():
            if not host_sees(dropped):
                return _nucleus_of_the_largest(logits, filtered, top_k, top_p)
            # What top-k dropped need not be sorted.
            candidates -= int(dropped.sum(dim=-1).min())
    if top_p is not None and top_p < 1:
        ordered, order = filtered.topk(candidates, dim=-1)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        dropped = torch.zeros_like(filtered, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        filtered = filtered.masked_fill(dropped, -torch.inf)
    return filtered


def within_nucleus(log_weights: Tensor, mass: float) -> Tensor:
    """Keep the most probable ids whose probabilities add up to at most `mass`, and the first one in any case.

    It is ReMDM's rule (Wang et al., 2025): the id that crosses the mass, which top-p keeps, is left out.

    Args:
        log_weights: `(..., K)` unnormalised.
        mass: in (0, 1].

    Returns:
        `(..., K)` log-probabilities of what is kept, -inf elsewhere.
    """
    ordered, order = log_weights.sort(dim=-1, descending=True)
    beyond = ordered.softmax(dim=-1).cumsum(dim=-1) > mass
    beyond[..., 0] = False
    dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
    return log_weights.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)


def _nucleus_of_the_largest(logits: Tensor, filtered: Tensor, top_k: int, top_p: float) -> Tensor:
    """Apply top-p after top-k without asking how many ties top-k has kept.

    The k largest are sorted, and the ties with the last of them, if any, come behind in the order of their ids.

    Args:
        logits: `(..., K)`.
        filtered: those that top-k keeps, -inf elsewhere.
        top_k: k.
        top_p: the mass of the nucleus.
    """
    ordered, order = logits.topk(top_k, dim=-1)
    is_tie = (logits == ordered[..., -1:]).scatter(-1, order, False)
    rank = is_tie.cumsum(dim=-1)  # 1 for the first tie
    probability = ordered.softmax(dim=-1)
    # Where there is no tie, as a rule, this divides by 1.
    probability = probability / (1 + rank[..., -1:] * probability[..., -1:])
    mass = probability.cumsum(dim=-1)
    behind = mass[..., -1:] + (rank - 1) * probability[..., -1:]
    dropped = (is_tie & (behind >= top_p)).scatter(-1, order, mass - probability >= top_p)
    return filtered.masked_fill(dropped, -torch.inf)


def draw_categorical(logits: Tensor, uniforms: Tensor, *, where: Tensor | None = None) -> Tensor:
    """Draw one id from each row by inverting the cumulative distribution, which is summed in float64.

    A row needs one uniform number, whatever K. The sum and the uniform number in float64 keep the probability of the
    rarest id, which float32 noise on a 2^-24 grid does not (a Gumbel or exponential race there loses the tails of large
    vocabularies).

    Args:
        logits: `(..., K)`, finite or -inf, at least one finite in each row.
        uniforms: `(...)` float64 in (0, 1).
        where: `(...)` bool, the rows that are needed; of the others the id may mean nothing. All by default.

    Returns:
        `(...)` int64 in [0, K); never an id of probability zero.

    Raises:
        ValueError: logits that are NaN or +inf, or a row without a finite one. While a sampler draws, it is raised at
            the end of the draw.
    """
    return draw_filtered(logits, uniforms, where=where)[0]


def draw_filtered(
    logits: Tensor,
    uniforms: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    where: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one id from each row, of those that the filters keep: `draw_categorical` after `filter_logits`.

    Args:
        logits: `(..., K)`, as in `draw_categorical`.
        uniforms: `(...)` float64 in (0, 1).
        top_k: as in `filter_logits`.
        top_p: as in `filter_logits`.
        where: as in `draw_categorical`.

    Returns:
        Ids `(...)` int64, and the logarithms of their probabilities `(...)` float32 or float64 before the filters.
    """
    rows, targets = logits.reshape(-1, logits.shape[-1]), uniforms.reshape(-1, 1)
    size = max(1, _ENTRIES_AT_ONCE // logits.shape[-1])
    needed = [None] * len(rows.split(size)) if where is None else where.reshape(-1).split(size)
    ids, log_probabilities = [], []
    for part, target, here in zip(rows.split(size), targets.split(size), needed, strict=True):
        probabilities = at_least_float32(part).softmax(dim=-1)
        kept = filter_logits(part, top_k, top_p)
        allowed = probabilities if kept is part else probabilities.masked_fill(kept == -torch.inf, 0.0)
        drawn = _invert(allowed, target, here)
        ids.append(drawn[:, 0])
        log_probabilities.append(probabilities.gather(1, drawn)[:, 0].log())
    return torch.cat(ids).reshape(uniforms.shape), torch.cat(log_probabilities).reshape(uniforms.shape)


def _invert(weights: Tensor, uniforms: Tensor, where: Tensor | None) -> Tensor:
    """Unnormalised probabilities `(n, K)` and `(n, 1)` to ids `(n, 1)`; `where (n,)` says which are needed."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # A softmax is finite or NaN.
    broken = total.sum().isnan() if where is None else (total[:, 0].isnan() & where).any()
    forbid(broken, _broken_logits)
    # The product may round up to the total, behind which no id stands.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # Behind the last id are those of NaN alone.
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)


def _broken_logits() -> str:
    return (
        "the logits are NaN, +inf, or -inf at every id of a row: the backbone's weights or its precision are "
        "broken, nothing can be drawn from them"
    )
