"""Losses of a sequence of segments: the cross-entropy of each id that may vary, and how a batch averages them.

`id_losses` costs the prediction of each id from the element before it, by segment; `masked_losses` that of masked ids
where they stand; `scale_losses` that of the ids of scales. `mean_loss` makes one number of them and of the losses of
vectors, the same on any number of ranks.
"""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.core.distributed import all_reduce_sum, world_size

SoftmaxOver = Literal["allowed", "vocabulary"]
_LEAST_WEIGHT = 1e-9


class SegmentLosses(NamedTuple):
    """The losses of one segment's ids, or vectors, over a batch; three tensors `(M,)`."""

    values: Tensor
    """Nats of each id, or the squared error of each island of vectors."""
    weights: Tensor
    """The weight of each in the mean."""
    log_partition: Tensor | None
    """The logarithm of the sum of exponentials of each id's logits; None of vectors, of masked ids and of those in
    scales, whose mean is one of its own."""


def id_losses(
    network: SegmentTransformer,
    sequence: SegmentSequence,
    hidden: Tensor,
    *,
    softmax_over: SoftmaxOver,
    segments: Collection[str] | None = None,
    silent: Tensor | None = None,
    forbidden: Tensor | None = None,
    owners: list[tuple[str, Tensor]] | None = None,
) -> dict[str, SegmentLosses]:
    """Cost the prediction of each id from the element before it, by segment.

    Args:
        network: that made the hidden states.
        sequence: that it read.
        hidden: `(B, N, D)`.
        softmax_over: the ids that may stand in the place (`"allowed"`), or all (`"vocabulary"`).
        segments: names of those that are predicted; all by default. Of others no logits are computed.
        silent: `(S,)` bool, the samples whose text does not count.
        forbidden: events that may not happen; where they did, as where an image was given, nothing is predicted.
        owners: is filled with the sample that each of a segment's ids belongs to, set by set.
    """
    grammar, layout = network.grammar, network.layout
    targets, states, sample = (each[:, 1:] for each in (sequence.ids, sequence.states, sequence.sample))
    follows = (sample >= 0) & (sample == sequence.sample[:, :-1])
    number = torch.arange(1, sequence.ids.shape[1], device=hidden.device)
    remaining = layout.length - (number - sequence.first()[:, 1:])
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for of_set, (segment_number, ids) in enumerate(grammar.sets):
        segment = layout.segments[segment_number]
        if (len(ids) == 1 and softmax_over == "allowed") or grammar.is_masked(of_set):
            continue
        if len(ids) == 1 and segment.ends_inside:
            continue  # what stands around an island sees it, and is written with it
        if segments is not None and segment.name not in segments:
            continue
        predicted = follows & (grammar.set_of[states] == of_set)
        if silent is not None and segment.modality == "text":
            predicted &= ~silent[sample.clamp(min=0)]
        if forbidden is not None:
            predicted &= ~forbidden[grammar.event_of[targets]]
        rows, columns = predicted.nonzero(as_tuple=True)
        target, owner = targets[rows, columns], sample[rows, columns]
        if softmax_over == "vocabulary" and network.own_head_of[of_set] is None:
            logits, column = network.logits(hidden[rows, columns]), target
        else:
            logits = network.logits(hidden[rows, columns], of_set)
            among = grammar.ids_of(of_set)
            column = torch.searchsorted(among, target)
            if layout.interleaved and grammar.has_choice(of_set):
                possible = grammar.possible_events(states[rows, columns], remaining[rows, columns], forbidden=forbidden)
                logits = logits.masked_fill(~possible[:, grammar.event_of[among]], -torch.inf)
        partition = logits.logsumexp(dim=-1)
        values = partition - logits.gather(1, column[:, None])[:, 0]
        weights = torch.full_like(values, segment.loss_weight)
        parts.setdefault(segment.name, []).append((values, weights, partition))
        if owners is not None:
            owners.append((segment.name, owner))
    joined = {name: [torch.cat(each) for each in zip(*of_segment, strict=True)] for name, of_segment in parts.items()}
    return {name: SegmentLosses(*three) for name, three in joined.items()}


def island_columns(network: SegmentTransformer, sequence: SegmentSequence, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Find the islands of a segment of fixed size in the rows of a sequence.

    Returns:
        Of each of M islands: its row `(M, 1)` and its columns `(M, P)`, and the sample that it belongs to `(M,)`.
    """
    grammar, segment = network.grammar, network.layout[name]
    mine = grammar.segment_of[sequence.states] == network.layout.number(name)
    rows, first = (mine & (grammar.place_of[sequence.states] == 0)).nonzero(as_tuple=True)
    columns = first[:, None] + torch.arange(segment.positions, device=first.device)
    return rows[:, None], columns, sequence.sample[rows, first]


def masked_losses(
    network: SegmentTransformer,
    sequence: SegmentSequence,
    hidden: Tensor,
    *,
    name: str,
    ids: Tensor,
    masked: Tensor,
    softmax_over: SoftmaxOver = "allowed",
) -> SegmentLosses:
    """Cost the prediction of masked ids at their own positions (Show-o, eq. 4; MaskGIT's loss).

    Args:
        network: that made the hidden states.
        sequence: that it read, with masks.
        hidden: `(B, N, D)`.
        name: of the segment.
        ids: `(S, P)` int64, what stands behind the masks.
        masked: `(S, P)` bool.
        softmax_over: as of `id_losses`.
    """
    rows, columns, owner = island_columns(network, sequence, name)
    number = network.grammar.masked_set(name)
    where = masked[owner]
    target = ids[owner][where]
    if softmax_over == "vocabulary" and network.own_head_of[number] is None:
        logits = network.logits(hidden[rows, columns][where])
    else:
        logits = network.logits(hidden[rows, columns][where], number)
        target = torch.searchsorted(network.grammar.ids_of(number), target)
    values = logits.logsumexp(dim=-1) - logits.gather(1, target[:, None])[:, 0]
    return SegmentLosses(values, torch.ones_like(values), None)


def scale_losses(
    network: SegmentTransformer, sequence: SegmentSequence, hidden: Tensor, *, name: str, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Cost the prediction of the ids of scales, each scale given those before it (VAR, eq. 6).

    Args:
        network: that made the hidden states.
        sequence: that it read.
        hidden: `(B, N, D)`.
        name: of the segment.
        ids: `(S, P + 1)` int64 in [0, codes), of all scales of each sample, the one id of the first in front.

    Returns:
        Nats of each id of M islands, `(M, P + 1)`, and the sample of each island, `(M,)`.
    """
    rows, columns, owner = island_columns(network, sequence, name)
    columns = torch.cat((columns[:, :1] - 1, columns), dim=1)
    logits = network.predict_scales(hidden[rows, columns], segment=name)
    return logits.logsumexp(dim=-1) - logits.gather(2, ids[owner][..., None])[..., 0], owner


def without_prior(losses: Mapping[str, SegmentLosses]) -> tuple[Tensor, Tensor, Tensor]:
    """Give the losses of all segments as validation takes them: values, weights, and a prior term of 0, each `(L,)`."""
    values = torch.cat([each.values for each in losses.values()])
    return values, torch.cat([each.weights for each in losses.values()]), torch.zeros_like(values)


def mean_loss(
    losses: Mapping[str, SegmentLosses], *, island_weight: float, z_loss: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Average the losses of a batch, over all ranks together.

    Args:
        losses: by segment.
        island_weight: of the mean error of vectors, of masked ids, or of those in scales, which is added to the mean
            over the ids of all other segments (Transfusion, eq. 4; Show-o, eq. 5).
        z_loss: weight of the mean squared logarithm of the softmax's denominator.

    Returns:
        The loss, a scalar; its terms `loss_of/<segment>`, and `z_loss` where it has a weight; and the weight of all
        ids, summed over ranks, divided by their number.
    """
    terms: dict[str, Tensor] = {}
    ids = {name: each for name, each in losses.items() if each.log_partition is not None}
    weight = all_reduce_sum(torch.stack([each.weights.sum() for each in ids.values()]).sum()) / world_size()
    # Where all captions are dropped beside latents, no id is predicted.
    divisor = weight.clamp(min=_LEAST_WEIGHT)
    total = divisor.new_zeros((), dtype=torch.float32)
    for name, each in losses.items():
        # The mean of a segment without a weight in the loss is logged as it is.
        ones = torch.ones_like(each.weights)
        count = (all_reduce_sum(ones.sum()) / world_size()).clamp(min=_LEAST_WEIGHT)
        terms[f"loss_of/{name}"] = each.values.detach().sum() / count
        summed = (each.values * each.weights).sum()
        total = total + (summed / divisor if name in ids else island_weight * summed / count)
    if z_loss:
        squares = [
            (each.log_partition**2 * each.weights).sum() for each in ids.values() if each.log_partition is not None
        ]
        terms["z_loss"] = torch.stack(squares).sum() / divisor
        total = total + z_loss * terms["z_loss"]
    return total, terms, weight
