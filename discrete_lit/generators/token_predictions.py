"""A generator's predictions of the ids of given images, one by one: their costs, entropies and attention weights.

`predictions_of` runs one evaluation of the training objective in eval mode, reads the logits that the backbone makes in
it, and lays everything out on the grid of the ids. `attention_of` runs the same evaluation once more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.attention_maps import attention_of_blocks, recorded_weights
from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.noise_level import spread_times
from discrete_lit.diffusion.parameterization import leave_one_out_from_score
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.generators.discrete_diffusion import DiscreteDiffusion
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.next_scale import NextScale
from discrete_lit.generators.unified import Unified


@dataclass(frozen=True, kw_only=True)
class TokenPredictions:
    """The predictions of the P positions of B images, in raster order; of next-scale models scale after scale."""

    nats: Tensor
    """-log p of the true id, `(B, P)` float32 or better, summed over the bit groups of an id; of ids that a head
    predicts in sub-tokens, what its loss gives."""
    entropy: Tensor | None
    """Entropy of the predicted distribution in nats, `(B, P)`; None where a head of sub-tokens has none to show."""
    predicted: Tensor
    """`(B, P)` bool: whether the model predicts the position, rather than read it."""
    coordinate: Tensor
    """The coordinate of the loss in [0, 1], as `TokenLosses.coordinate`, `(B, P)`."""


def predicts_ids(module: Any) -> bool:
    """Say whether a module is a generator of ids, which `predictions_of` can read."""
    if isinstance(module, Unified):
        return module.patches is None
    return isinstance(module, Generator)


def map_shapes(module: Generator | Unified) -> tuple[tuple[int, int], ...]:
    """Give height and width of the map that the P positions make; of next-scale models those of each scale.

    Positions on one axis make one row. Those on three have the third beside one another along the width.
    """
    if isinstance(module, NextScale):
        scales = module.scale_quantizer().scales
        return tuple((scale, scale) if isinstance(scale, int) else (scale[0], scale[1]) for scale in scales)
    grid = tuple(module.image.shape) if isinstance(module, Unified) else module.backbone.layout.grid
    if len(grid) == 1:
        return ((1, grid[0]),)
    return ((grid[0], prod(grid[1:])),)


def largest_nats(module: Generator | Unified) -> float:
    """Give the nats of a guess among all ids alike, log K."""
    return torch.tensor(float(module.tokenizer.vocab_size)).log().item()


@torch.no_grad()
def predictions_of(
    module: Generator | Unified, data: Tensor, condition: Any, random: CounterRandom
) -> TokenPredictions:
    """Evaluate the objective on images once, and give what was predicted of each of their ids.

    Args:
        module: in eval mode.
        data: ids `(B, *token_shape)`, as `data_of` gives them.
        condition: as `condition_of` gives it.
        random: one stream for each image; it alone decides masks and noise.
    """
    if isinstance(module, Unified):
        return _of_segments(module, data, condition, random)
    with _seen(module.backbone) as passes:
        losses = module.losses_of(data, condition, random)
    layout, (inputs, outputs) = module.backbone.layout, passes[0]
    values, entropy = losses.values, None
    if module.backbone.place_head is None:
        laws = _log_laws(module, at_least_float32(outputs), inputs[0], random)
        values = -laws.gather(-1, module.to_sequence(data)[..., None])[..., 0]
        entropy = _entropies(laws)
    predicted, denoiser = losses.weights > 0, module.denoiser()
    if denoiser is not None and is_absorbing(denoiser.process):
        predicted = inputs[0] == layout.mask_id
    values = torch.where(predicted, values, 0)
    entropy = None if entropy is None else _on_grid(module, torch.where(predicted, entropy, 0)).sum(dim=-1)
    return TokenPredictions(
        nats=_on_grid(module, values).sum(dim=-1),
        entropy=entropy,
        predicted=_on_grid(module, predicted).any(dim=-1),
        coordinate=_on_grid(module, losses.coordinate)[..., 0],
    )


@torch.no_grad()
def attention_of(
    module: Generator | Unified,
    data: Tensor,
    condition: Any,
    random: CounterRandom,
    *,
    layers: Sequence[int],
    queries: Sequence[int],
) -> dict[int, Tensor]:
    """Evaluate the objective once, and give the attention weights behind the predictions of some positions.

    A query is the element that a position is predicted from: its own in a bidirectional backbone, the one before in a
    causal one. What is attended to beside the positions, such as the class or a caption, is left out: a row adds up to
    at most 1.

    Args:
        module, data, condition, random: as of `predictions_of`.
        layers: numbers of blocks, which `attention_layers` lists.
        queries: positions in raster order.

    Returns:
        Weights `(B, heads, Q, P)` by layer.
    """
    positions = sum(height * width for height, width in map_shapes(module))
    asked = torch.tensor(queries, device=data.device)
    attentions = {layer: each for layer, each in attention_layers(module).items() if layer in layers}
    if isinstance(module, Unified):
        with _seen(module.backbone) as passes:
            module.segment_losses(data, condition, random)
        columns = _image_columns(module, passes[0][0][0])
        rows = columns[:, asked] - int(module.image.mask_id is None)  # the element before, or its own
        with recorded_weights(attentions, lambda count: rows) as recorded:
            module.segment_losses(data, condition, random)
        at = columns[:, None, None]
        return {layer: weights.gather(3, at.expand(*weights.shape[:3], -1)) for layer, weights in recorded.items()}
    order = _sequence_of_raster(module, data.device)  # where each position stands in the sequence
    layout = module.backbone.layout
    own = layout.positions
    # Logits are made of the last elements, as many as there are positions; a causal sequence reads ids behind them.
    reads_before = layout.attention == "causal"
    with recorded_weights(attentions, lambda count: (count - own + order[asked]).expand(len(data), -1)) as recorded:
        module.losses_of(data, condition, random)
    maps = {}
    for layer, weights in recorded.items():
        of_positions = weights[..., -own:]
        if reads_before:
            # The element that holds the id of place i is that which place i + block is predicted from.
            block = layout.block_size
            of_positions = torch.nn.functional.pad(of_positions[..., block:], (0, block))
        maps[layer] = of_positions[..., order[:positions]]
    return maps


def attention_layers(module: Generator | Unified) -> dict[int, Any]:
    """List the self-attention of each block whose rows are known to be those of the positions, by number.

    They are those of a `Transformer` without elements between the ids (RandAR's instructions), and of `Unified`.
    """
    backbone = module.backbone
    if isinstance(module, Unified) or (isinstance(backbone, Transformer) and backbone.instructions is None):
        return attention_of_blocks(backbone)
    return {}


# How one evaluation is read.


@contextmanager
def _seen(backbone: Any) -> Iterator[list[tuple[tuple[Any, ...], Tensor]]]:
    """Collect the arguments and the output of every pass of a network."""
    passes: list[tuple[tuple[Any, ...], Tensor]] = []
    handle = backbone.register_forward_hook(lambda module, given, output: passes.append((given, output)))
    try:
        # Compiled code of the blocks is for the shapes of training: another one would be compiled beside it.
        with torch.compiler.set_stance("force_eager"):
            yield passes
    finally:
        handle.remove()


def _log_laws(module: Generator, logits: Tensor, states: Tensor, random: CounterRandom) -> Tensor:
    """Give the log-probabilities `(B, N, K)` of the clean ids that a backbone's output stands for."""
    denoiser = module.denoiser()
    if not isinstance(module, DiscreteDiffusion) or denoiser is None or denoiser.head.kind != "score":
        return logits[..., : module.backbone.layout.vocab_size].log_softmax(dim=-1)
    level = module.objective.level(denoiser.schedule, spread_times(random), module.length)
    scores = denoiser.head(logits, states, level)
    return leave_one_out_from_score(scores, states, denoiser.process, level)


def _entropies(laws: Tensor) -> Tensor:
    """Give the entropy in nats of each row of log-probabilities; an id of probability 0 adds nothing."""
    return -(laws.exp() * laws.clamp(min=torch.finfo(laws.dtype).min)).sum(dim=-1)


def _sequence_of_raster(module: Generator, device: torch.device) -> Tensor:
    """Say where each position of the grid stands in the sequence, `(P,)`."""
    fixed = getattr(module, "fixed_order", None)
    layout: SequenceLayout = module.backbone.layout
    return torch.arange(layout.positions, device=device) if fixed is None else fixed.argsort()


def _on_grid(module: Generator, values: Tensor) -> Tensor:
    """Bring `(B, N)` of a sequence to `(B, P, sub-tokens)` in raster order."""
    sub = module.backbone.layout.sub_tokens
    by_position = rearrange(values, "b (p sub) -> b p sub", sub=sub)
    return by_position[:, _sequence_of_raster(module, values.device)]


def _of_segments(module: Unified, data: Tensor, captions: Any, random: CounterRandom) -> TokenPredictions:
    with _seen(module.backbone) as passes:
        module.segment_losses(data, captions, random)
    (sequence, *_), hidden = passes[0]
    network, grammar = module.backbone, module.grammar
    columns = _image_columns(module, sequence)
    rows = torch.arange(len(data), device=data.device)[:, None]
    masks = module.image.mask_id
    if masks is None:
        number = int(grammar.set_of[sequence.states[0, columns[0, 0]]])
        predicted = torch.ones_like(columns, dtype=torch.bool)
        laws = network.logits(hidden[rows, columns - 1], number).log_softmax(dim=-1)
    else:
        number = grammar.masked_set(module.image.name)
        predicted = sequence.ids[rows, columns] == masks
        laws = network.logits(hidden[rows, columns], number).log_softmax(dim=-1)
    among = grammar.ids_of(number)
    target = torch.searchsorted(among, module.codes[data.flatten(1)])
    nats = -laws.gather(-1, target[..., None])[..., 0]
    places = (torch.arange(columns.shape[1], device=data.device) + 0.5) / columns.shape[1]
    return TokenPredictions(
        nats=torch.where(predicted, nats, 0),
        entropy=torch.where(predicted, _entropies(laws), 0),
        predicted=predicted,
        coordinate=places.expand_as(nats),
    )


def _image_columns(module: Unified, sequence: SegmentSequence) -> Tensor:
    """Find the columns of the positions of the image in each row of an unpacked sequence, `(B, P)`."""
    grammar = module.grammar
    mine = grammar.segment_of[sequence.states] == module.layout.number(module.image.name)
    columns = (mine & (grammar.place_of[sequence.states] >= 0)).nonzero()[:, 1]
    return columns.view(len(sequence.ids), module.image.positions)
