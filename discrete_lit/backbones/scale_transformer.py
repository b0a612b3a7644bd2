"""The transformer of next-scale prediction over vectors (Tang et al., "HART", 2024; after Tian et al., "VAR", 2024).

Its sequence is the condition, then every scale but the first, each read from vectors that the scales before add up to.
All places of a scale see one another and what stands before. The last element of the condition predicts the first
scale, of one place. It gives hidden states, of which a head draws vectors, and logits where places have ids.

The condition is a class or, in front of the sequence, vectors such as a text encoder's: its `context`. Those that are
not valid are seen too, as in HART, but do not count as positions; a sequence without a valid one is given zeros, which
is the null condition.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import Block, BlockSettings, Modulation
from discrete_lit.backbones.cache import Cache, new_buffers
from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.embeddings import TimeEmbedding, grid_coordinates, made_again
from discrete_lit.backbones.execution import count_flops
from discrete_lit.backbones.layers import Linear, LogitHead, Norm

_ROTARY_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class ScaleLayout:
    """The scales that a generator models; it asks for a network by calling `backbone(layout)`.

    Attributes:
        dim: D, of the vectors that are read.
        sizes: height and width of each scale, from 1 x 1 on.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        vocab_size: K, ids of a place; None where places have none, and no logits are made.
        context: T and E, how many vectors stand in front and how wide they are; None where the class alone does.
    """

    dim: int
    sizes: tuple[tuple[int, int], ...]
    num_classes: int
    vocab_size: int | None = None
    context: tuple[int, int] | None = None

    @property
    def lengths(self) -> list[int]:
        """Places of each scale."""
        return [height * width for height, width in self.sizes]


def context_positions(valid: Tensor) -> Tensor:
    """Count the positions of vectors, of which some are valid `(B, T)`: `(B, T)` int64."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


class ScaleStates(NamedTuple):
    """Hold the states of some places, and the logits of their ids."""

    hidden: Tensor
    """`(B, n, W)`, the blocks' output."""
    logits: Tensor | None
    """`(B, n, K)` float32 or float64, where places have ids."""


class _Start(NamedTuple):
    """The condition as the network reads it."""

    elements: Tensor
    """`(B, T, W)`."""
    pooled: Tensor
    """`(B, 1, W)`, the largest of each channel: what modulates."""
    positions: Tensor
    """`(B, T)` int64."""


class ScaleTransformer(nn.Module):
    """Make hidden states of scales, and logits of their ids, each scale from the vectors that precede it.

    HART's: RMSNorm, SwiGLU without biases, unit queries and keys, rotary positions, and the condition's largest values
    as adaLN's. A place's rotary position is its row and column in units of the last scale's, behind the condition's
    last. Released code turns the first half of a head's channels by the row and the second by the column, and pairs
    each of the first with one of the second: that is kept, although no rotation.

    Args:
        layout: the scales; a generator gives it.
        width: W.
        depth: blocks.
        heads: attention heads; W / heads is a multiple of 4.
        mlp_hidden: inner width of the MLPs; by default 8/3 W, rounded up to a multiple of 256.
        qk_norm: `"unit"`, or None for queries and keys as they are.
        modulated: adaLN in the blocks; the last norm has it anyway.
        level_embedding: what tells scales apart: a `"table"`, or `"waves"` of their number and an MLP.
        place_embedding: add a learned vector of each place behind the first scale, as VAR does and HART does not. A
            head that draws the places of a scale together needs it: it tells them apart by their hidden states alone.
        context_norm: RMSNorm of the vectors in front before they are embedded.
        norm_epsilon: of every norm.
        dropout: on the attention weights and residual branches.
        drop_path: stochastic depth of the last block, growing linearly from the first.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range.
    """

    coordinates: Tensor
    """`(N - 1, 2)`: rows and columns of the places of all scales but the first."""
    level: Tensor
    """`(T + N - 1,)` int64: the scale of each element, 0 of those of the condition."""
    frequencies: Tensor

    fsdp_methods = ("head_condition",)

    def __init__(
        self,
        layout: ScaleLayout,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int | None = None,
        qk_norm: Literal["unit"] | None = "unit",
        modulated: bool = True,
        level_embedding: Literal["table", "waves"] = "table",
        place_embedding: bool = False,
        context_norm: bool = True,
        norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(f"width={width} must be heads={heads} times a multiple of 4, for rows and columns")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if level_embedding not in ("table", "waves") or qk_norm not in ("unit", None):
            raise ValueError(
                f"level_embedding must be 'table' or 'waves' and qk_norm 'unit' or none, got {level_embedding!r} and "
                f"{qk_norm!r}"
            )
        if len(layout.sizes) < 2 or layout.sizes[0] != (1, 1):
            raise ValueError(f"two scales or more are needed, the first 1 x 1; the scales are {list(layout.sizes)}")
        self.layout = layout
        self.width, self.depth, self.heads = width, depth, heads
        self.head_dim = width // heads
        self.starts = 1 if layout.context is None else layout.context[0]
        self.context_dim = None if layout.context is None else layout.context[1]
        self.ends = [self.starts - 1 + end for end in accumulate(layout.lengths)]
        self.activation_checkpointing = activation_checkpointing
        self._flops: dict[tuple[int, int, int], int] = {}

        self.class_embedding = self.context_norm = self.context_embedding = None
        if layout.context is None:
            self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        else:
            _, context_width = layout.context
            self.context_norm = Norm(context_width, "rms", epsilon=norm_epsilon) if context_norm else None
            self.context_embedding = Linear(context_width, width)
        self.vector_embedding = Linear(layout.dim, width)
        levels = len(layout.sizes)
        self.level_embedding = nn.Embedding(levels, width) if level_embedding == "table" else TimeEmbedding(width)
        self.place_embedding = nn.Embedding(sum(layout.lengths[1:]), width) if place_embedding else None

        settings = BlockSettings(
            width=width,
            heads=heads,
            head_dim=self.head_dim,
            mlp_hidden=mlp_hidden or -(-8 * width // 3 // 256) * 256,
            norm="rms",
            norm_epsilon=norm_epsilon,
            modulation="own" if modulated else None,
            mlp="swiglu",
            qk_norm=qk_norm,
            attention_bias="query_value",
            bias=False,
            dropout=dropout,
        )
        self.modulated = modulated
        self.blocks = nn.ModuleList(
            Block(replace(settings, drop_path=drop_path * layer / max(depth - 1, 1))) for layer in range(depth)
        )
        self.final_norm = self.final_modulation = self.logit_head = None
        if layout.vocab_size is not None:
            self.final_norm = Norm(width, "rms", epsilon=norm_epsilon)
            self.final_modulation = Modulation(width, width, vectors=2)
            self.logit_head = LogitHead(width, layout.vocab_size, bias=True)
        self.head_norm = Norm(width, "rms", epsilon=norm_epsilon)

        self.register_buffer("coordinates", _coordinates(layout.sizes).float(), persistent=False)
        counts = torch.tensor([self.starts, *layout.lengths[1:]])
        self.register_buffer("level", torch.arange(levels).repeat_interleave(counts), persistent=False)
        self.register_buffer("frequencies", _frequencies(self.head_dim).float(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as GPT-2: normal with deviation 0.02, residual outputs scaled by 1 / sqrt(2 depth)."""
        for name, parameter in self.named_parameters():
            if "modulation" in name or parameter.ndim < 2 or name.endswith(("bias", "log_sharpness")):
                continue
            residual = name.endswith(("out.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.depth) ** 0.5 if residual else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.coordinates = made_again(_coordinates(self.layout.sizes), like=self.coordinates)
        self.frequencies = made_again(_frequencies(self.head_dim), like=self.frequencies)
        return self

    def forward(
        self,
        vectors: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        *,
        places: Tensor | None = None,
    ) -> ScaleStates:
        """Make the states of the first scale and of the scales of these vectors, or with a cache of the next scale.

        Args:
            vectors: `(B, n, D)`, those of whole scales from the second on; with a cache, of the one after what it
                holds, and none at all in the first call.
            condition: labels `(B,)` int64 in [0, num_classes], or a condition with a context where the layout has one.
            cache: of `new_cache`; filled as the scales grow.
            places: `(B, m)` int64, where only some of the last scale's places are read: which, in the order of their
                vectors. They see one another and what stands before; with a cache also those of calls before.

        Returns:
            States `(B, 1 + n, ...)`; with a cache that is not empty `(B, n, ...)`.

        Raises:
            ValueError: a condition of another kind or width; vectors of incomplete scales.
        """
        hidden, pooled = self.elements(vectors, condition, cache, places=places)
        hidden = hidden[:, self.starts - 1 :] if hidden.shape[1] > vectors.shape[1] else hidden
        # Sharding (FSDP2) hooks on to what comes back, which must not be a view of something else.
        return ScaleStates(hidden.clone(), self._logits(hidden, pooled, cache))

    def elements(
        self,
        vectors: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        *,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks: hidden states `(B, T + n, W)` of all elements, and what modulates, `(B, 1, W)`.

        Arguments as for `forward`.
        """
        filled = 0 if cache is None else cache.filled
        start = self._start(as_condition(condition))
        count = vectors.shape[1] + (0 if filled else self.starts)
        self._check_count(filled, count, vectors, places)
        embedded = self.vector_embedding(vectors.to(self.vector_embedding.weight.dtype))
        if self.place_embedding is not None:
            embedded = embedded + self.place_embedding(self._numbers(filled, vectors.shape[1], places))
        if not filled:
            embedded = torch.cat((start.elements.to(embedded.dtype), embedded), dim=1)
        embedded = embedded + self._levels(filled, count, places)
        rotary = self._rotary(start.positions, filled=filled, vectors=vectors.shape[1], places=places)
        mask = None
        if not filled and vectors.shape[1]:
            level = self.level[:count]
            mask = level[:, None] >= level
        return self._run_blocks(embedded, start.pooled, rotary, mask, cache), start.pooled

    def head_condition(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        """Make what a head draws vectors given: the norm of the hidden states, with the codes of their ids added.

        Args:
            hidden: `(B, n, W)`.
            codes: `(B, n, D)`, where places have ids.

        Returns:
            `(B, n, W)`.
        """
        if codes is not None:
            hidden = hidden + self.vector_embedding(codes.to(self.vector_embedding.weight.dtype))
        return self.head_norm(hidden)

    # The condition.

    def _start(self, condition: Condition) -> _Start:
        if self.class_embedding is not None:
            if condition.context is not None:
                raise ValueError("this network is given classes and no vectors: its layout has no context")
            elements = self.class_embedding(condition.labels)[:, None]
            return _Start(elements, elements, torch.zeros_like(condition.labels)[:, None])
        assert self.layout.context is not None and self.context_embedding is not None
        length, width = self.layout.context
        context = condition.context
        if context is None:
            raise ValueError(
                f"this network is given {length} vectors of width {width} in front, the context of a condition"
            )
        if context.shape[1:] != (length, width):
            raise ValueError(
                f"the vectors in front are {tuple(context.shape)}, this network reads (B, {length}, {width}): is the "
                "text of another encoder, or padded to another length?"
            )
        valid = condition.valid()
        nothing = ~valid.any(dim=1)[:, None, None]
        vectors = context.to(self.context_embedding.weight.dtype).masked_fill(nothing, 0)
        if self.context_norm is not None:
            vectors = self.context_norm(vectors)
        elements = self.context_embedding(vectors)
        return _Start(elements, elements.amax(dim=1, keepdim=True), context_positions(valid))

    # Where elements stand.

    def _check_count(self, filled: int, count: int, vectors: Tensor, places: Tensor | None) -> None:
        if vectors.ndim != 3 or vectors.shape[2] != self.layout.dim:
            raise ValueError(f"the vectors must be (B, n, {self.layout.dim}), got {tuple(vectors.shape)}")
        before = self.ends[-2]
        if places is not None:
            # What is left of the last scale may come in parts.
            whole = filled >= before if filled else count - places.shape[1] == before
            if not whole or filled + count > self.ends[-1] or places.shape != (len(vectors), places.shape[1]):
                raise ValueError(
                    f"places are of the last scale, behind all {before} elements before it; got {tuple(places.shape)} "
                    f"places, {filled} elements in the cache and {count} new ones"
                )
            return
        if filled + count not in self.ends:
            raise ValueError(
                f"the network reads whole scales, which end at {self.ends} elements, got {filled + count}: are these "
                "vectors of other scales?"
            )
        if filled and self.ends.index(filled + count) != self.ends.index(filled) + 1:
            raise ValueError("with a cache one scale is read at a time")

    def _levels(self, filled: int, count: int, places: Tensor | None) -> Tensor:
        """Embed the scale of each new element, `(count, W)`."""
        first = min(filled, self.ends[-2]) if places is not None and filled else filled
        return self.level_embedding(self.level[first : first + count])

    def _numbers(self, filled: int, vectors: int, places: Tensor | None) -> Tensor:
        """Number the places of the vectors behind the first scale, `(n,)`, or with places `(B, n)`."""
        numbers = torch.arange(len(self.coordinates), device=self.coordinates.device)
        first = max(filled - self.starts, 0)
        if places is None:
            return numbers[first : first + vectors]
        last = len(numbers) - self.layout.lengths[-1]
        coarse = numbers[first:last] if not filled else numbers[:0]
        return torch.cat((coarse.expand(len(places), -1), last + places), dim=1)

    def _rotary(self, positions: Tensor, *, filled: int, vectors: int, places: Tensor | None) -> Tensor:
        """Make the turns of the new elements, `(B, 1, n, head_dim / 2, 4)`, as `rotate` reads them."""
        angles = []
        if not filled:
            of_start = positions[..., None] * self.frequencies
            angles.append(torch.stack((of_start, of_start), dim=-1))
        if vectors:
            first = max(filled - self.starts, 0)
            if places is None:
                coordinates = self.coordinates[first : first + vectors].expand(len(positions), -1, -1)
            else:
                last = self.layout.lengths[-1]
                coarse = self.coordinates[first : len(self.coordinates) - last] if not filled else self.coordinates[:0]
                coordinates = torch.cat(
                    (coarse.expand(len(positions), -1, -1), self.coordinates[-last:][places]), dim=1
                )
            # Half as many waves, twice: each channel of a half has a partner in the other.
            waves = self.frequencies[::2].repeat(2)
            behind = coordinates + positions[:, -1:, None]
            angles.append(behind[..., None, :] * waves[:, None])
        joined = torch.cat(angles, dim=1)  # (B, n, head_dim / 2, 2): of the first and of the second of a pair
        return torch.stack((joined.cos(), joined.sin()), dim=-1).flatten(-2)[:, None]

    # The blocks.

    def _run_blocks(
        self, hidden: Tensor, pooled: Tensor, rotary: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        prepared = [] if cache is None else cache.modulations
        for layer, block in enumerate(self.blocks):
            condition = None if not self.modulated else prepared[layer] if prepared else pooled
            arguments = (hidden, condition, rotary, mask, False, None if cache is None else cache.layer(layer))
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                hidden = block(*arguments)
        if cache is not None:
            cache.advance(rotary.shape[2])
        return hidden

    def _logits(self, hidden: Tensor, pooled: Tensor, cache: Cache | None) -> Tensor | None:
        if self.logit_head is None:
            return None
        assert self.final_norm is not None and self.final_modulation is not None
        prepared = cache is not None and cache.modulations
        shift, scale = cache.modulations[-1] if cache is not None and prepared else self.final_modulation(pooled)
        return self.logit_head(self.final_norm(hidden) * (1 + scale) + shift)

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        """Compute the modulations of a condition, and make room for the keys and values of all scales."""
        condition = as_condition(condition)
        pooled = self._start(condition).pooled
        modulations = [cast(Block, block).modulate(pooled) for block in self.blocks] if self.modulated else []
        if self.final_modulation is not None:
            modulations.append(self.final_modulation(pooled))
        weight = self.vector_embedding.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        buffers = new_buffers(
            layers=self.depth,
            batch=len(condition),
            heads=self.heads,
            length=self.ends[-1],
            head_dim=self.head_dim,
            device=weight.device,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
        )
        return Cache(modulations, buffers)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks."""
        return self.blocks

    def flops(self, batch: int, vectors: int, filled: int) -> int:
        """Count the floating-point operations of a pass on a cache, once for each shape.

        Args:
            batch: sequences B.
            vectors: that each reads.
            filled: elements that the cache holds before.
        """
        key = batch, vectors, filled
        if key not in self._flops:
            self._flops[key] = count_flops(self, lambda network: network.eval()._pass(batch, vectors, filled))
        return self._flops[key]

    def _pass(self, batch: int, vectors: int, filled: int) -> Callable[[], ScaleStates]:
        weight, layout = self.vector_embedding.weight, self.layout
        condition = Condition(labels=torch.zeros(batch, dtype=torch.int64, device=weight.device))
        if layout.context is not None:
            context = torch.zeros(batch, *layout.context, device=weight.device, dtype=weight.dtype)
            mask = torch.ones(batch, layout.context[0], dtype=torch.bool, device=weight.device)
            condition = Condition(labels=condition.labels, context=context, context_mask=mask)
        cache = self.new_cache(condition)
        cache.advance(filled)
        read = torch.zeros(batch, vectors, layout.dim, device=weight.device, dtype=weight.dtype)
        places = None
        if filled >= self.ends[-2] and vectors < layout.lengths[-1]:
            places = condition.labels[:, None].expand(-1, vectors)
        return partial(self, read, condition, cache, places=places)


def _frequencies(head_dim: int) -> Tensor:
    """Angles of one position, `(head_dim / 2,)` float64."""
    return _ROTARY_BASE ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))


def _coordinates(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Rows and columns of the places of all scales but the first, in units of the last scale: `(N - 1, 2)` float64."""
    last = torch.tensor(sizes[-1], dtype=torch.float64)
    scaled = [grid_coordinates(size).double() / torch.tensor(size) * last for size in sizes[1:]]
    return torch.cat([torch.zeros(0, 2, dtype=torch.float64), *scaled])
