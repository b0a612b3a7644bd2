"""Which switches of the transformer go together.

The transformer that every generator shares.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.backbone import Backbone, SequenceLayout, SubTokenHead
from discrete_lit.backbones.blocks import (
    AttentionBias,
    Block,
    BlockSettings,
    Condition,
    MLPKind,
    Modulation,
    QueryKeyNorm,
)
from discrete_lit.backbones.cache import Cache, new_buffers
from discrete_lit.backbones.embeddings import (
    InputKind,
    PositionKind,
    Positions,
    TimeEmbedding,
    TokenTable,
    embed_tokens,
)
from discrete_lit.backbones.layers import LogitHead, Norm, NormKind


def check_switches(
    layout: SequenceLayout,
    width: int,
    depth: int,
    heads: int,
    head_dim: int | None,
    norm_first: bool,
    modulated: bool,
    condition_positions: bool,
    shared_modulation: bool,
    condition_width: int | None,
    prefix: bool,
) -> None:
    if head_dim is None and width % heads:
        raise ValueError(f"width={width} is not a multiple of heads={heads}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if modulated and not norm_first:
        raise ValueError("norm_first=false has no modulation: conditioning must be 'prefix'")
    if (condition_positions or shared_modulation) and not modulated:
        raise ValueError("condition_positions and shared_modulation need conditioning='adaln' or 'prefix_adaln'")
    if condition_width is not None and (prefix or condition_positions or shared_modulation):
        raise ValueError("condition_width is of conditioning='adaln' with neither offsets nor a shared modulation")
    if layout.timed and not modulated:
        raise ValueError("a generator that tells the time needs conditioning='adaln' or 'prefix_adaln'")
    if (layout.attention == "block_causal") != bool(layout.scales):
        raise ValueError(f"{layout.attention} attention does not go with scales={layout.scales}")
    if layout.scales and (layout.scales[0] != 1 or sum(layout.scales) != layout.places):
        raise ValueError(f"scales={layout.scales} must begin with 1 and add up to the {layout.places} places")


def check_layout(
    layout: SequenceLayout, depth: int, target_positions: bool, embedding: InputKind, tied: bool, long_skips: bool
) -> None:
    if target_positions and layout.attention != "causal":
        raise ValueError(f"target_positions belong to a causal sequence, this one is {layout.attention}")
    if tied and (layout.input_dim is not None or embedding != "table"):
        raise ValueError("tied=true needs a table of token embeddings")
    if long_skips and depth % 2 == 0:
        raise ValueError(f"long_skips join the two halves around a middle block: depth must be odd, got {depth}")
    if layout.parts > 1 and layout.attention != "bidirectional":
        raise ValueError(
            f"several ids at a place need bidirectional attention, this sequence is {layout.attention}: a place_head "
            "predicts the parts of an id"
        )


def check_sub_token_head(layout: SequenceLayout, head_transform: bool, head_bias: bool | str | None) -> None:
    if layout.attention != "causal":
        raise ValueError(f"a place_head predicts the next id of a causal sequence, this one is {layout.attention}")
    if head_transform or head_bias is not None:
        raise ValueError("head_transform and head_bias belong to logits of all ids: a place_head has its own")


class Transformer(Backbone):
    """One transformer with the switches of the published models.

    The condition is a class embedding: an element in front of the sequence (`conditioning="prefix"`), a modulation of
    every norm (`"adaln"`), in which case a causal sequence begins with a learned vector instead, or both. Where the
    layout is timed, an embedding of the time is added to it.

    Args:
        layout: the sequence; a generator gives it.
        width: D; a multiple of `heads` unless `head_dim` is given.
        depth: blocks.
        heads: attention heads.
        head_dim: width of a head.
        mlp_hidden: inner width of the MLP; by default 4 x width, if gated 8/3 x width rounded up to a multiple of 64.
        mlp: GELU, its approximation by tanh or by a sigmoid (ImageGPT), or SwiGLU.
        norm: `"layer"` or `"rms"`.
        norm_epsilon: of every norm.
        norm_first: pre-norm; false is post-norm, without a norm at the end (BERT, MaskGIT).
        norm_affine: gains of the norms; by default where nothing modulates them.
        norm_bias: offsets of LayerNorms with gains; as `bias` by default.
        final_norm_bias: an offset in the last norm; by default as in the others.
        embedding_norm: LayerNorm of the embedded sequence (BERT).
        positions: learned embeddings added at the input, or rotary ones along the sequence or along each axis of the
            grid; what stands before the first place of the sequence is not rotated on a grid.
        start_rotation: of what stands there: `"none"`, or `"zero"`, which makes its queries and keys 0 (LlamaGen).
        target_positions: learned embeddings of the place that each element predicts (RAR).
        token_embedding: of ids: a table, a linear map of their bits (MaskBit), or the sum of a table for each of the
            parts that `place_head` predicts (Open-MAGVIT2).
        conditioning: `"prefix"`, `"adaln"` or `"prefix_adaln"`.
        condition_width: of the class and time embeddings that modulate; `width` by default.
        condition_positions: learned offsets of the condition along the sequence (RAR).
        shared_modulation: one modulation for all blocks, with an offset of each (VAR's largest).
        registers: learned elements before everything else.
        attention_bias: of queries, keys and values; as `bias` by default.
        qk_norm: of queries and keys, see `discrete_lit.backbones.blocks.QueryKeyNorms`.
        out_bias: of the attention's last projection; as `bias` by default.
        bias: of the other linear layers.
        head_bias: of the logits; as `bias` by default; `"place"` has one of each place.
        head_transform: BERT's linear layer, GELU and LayerNorm before the logits.
        tied: the logits' weight is the token embedding's.
        place_head: of a causal sequence, in the place of logits of all ids, for vocabularies too large for them: a
            `FactorisedHead` or a `MaskedBitHead`. The transformer then ends without a norm.
        long_skips: the second half of the blocks also reads the outputs of the first (U-ViT); an odd `depth`.
        dropout: on embeddings, attention weights and residual branches, in [0, 1).
        drop_path: stochastic depth of the last block, growing linearly from the first.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: settings that do not fit together.
    """

    mask: Tensor | None

    def __init__(
        self,
        layout: SequenceLayout,
        width: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        mlp_hidden: int | None = None,
        mlp: MLPKind = "gelu",
        norm: NormKind = "layer",
        norm_epsilon: float = 1e-6,
        norm_first: bool = True,
        norm_affine: bool | None = None,
        norm_bias: bool | None = None,
        final_norm_bias: bool | None = None,
        embedding_norm: bool = False,
        positions: PositionKind = "learned",
        start_rotation: Literal["none", "zero"] = "none",
        target_positions: bool = False,
        token_embedding: InputKind = "table",
        conditioning: Literal["prefix", "adaln", "prefix_adaln"] = "prefix",
        condition_width: int | None = None,
        condition_positions: bool = False,
        shared_modulation: bool = False,
        registers: int = 0,
        attention_bias: AttentionBias | None = None,
        qk_norm: QueryKeyNorm | None = None,
        out_bias: bool | None = None,
        bias: bool = True,
        head_bias: bool | Literal["place"] | None = None,
        head_transform: bool = False,
        tied: bool = False,
        place_head: Callable[[BlockSettings, int], SubTokenHead] | None = None,
        long_skips: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout)
        self.modulated = modulated = conditioning != "prefix"
        self.causal = layout.attention != "bidirectional"
        self.prefix = conditioning != "adaln"
        check_switches(
            layout,
            width,
            depth,
            heads,
            head_dim,
            norm_first,
            modulated,
            condition_positions,
            shared_modulation,
            condition_width,
            self.prefix,
        )
        check_layout(layout, depth, target_positions, token_embedding, tied, long_skips)
        if place_head is not None:
            check_sub_token_head(layout, head_transform, head_bias)
        if mlp_hidden is None:
            mlp_hidden = -(-8 * width // 3 // 64) * 64 if mlp == "swiglu" else 4 * width
        self.width, self.depth, self.heads = width, depth, heads
        self.head_dim = width // heads if head_dim is None else head_dim
        # What stands before the tokens: registers, and the class or what a first token is predicted from.
        self.starts = registers + int(self.prefix or self.causal)
        # What stands in the sequence at most: a causal backbone never reads the last token.
        self.places = self.starts + layout.places - int(self.causal)

        condition_width = condition_width or width
        affine = not modulated if norm_affine is None else norm_affine
        own: Literal["own", "shared"] = "shared" if shared_modulation else "own"
        norm_bias = bias if norm_bias is None else norm_bias
        settings = BlockSettings(
            width,
            heads,
            self.head_dim,
            mlp_hidden,
            norm,
            norm_epsilon,
            norm_first,
            affine,
            own if modulated else None,
            mlp,
            qk_norm,
            ("all" if bias else "none") if attention_bias is None else attention_bias,
            bias if out_bias is None else out_bias,
            norm_bias,
            bias,
            condition_width,
            dropout,
        )
        made = None if place_head is None else place_head(settings, layout.vocab_size)

        self.token_embedding = embed_tokens(layout, width, token_embedding, None if made is None else made.parts)
        self.class_embedding = nn.Embedding(layout.num_classes + 1, condition_width)
        self.time_embedding = TimeEmbedding(condition_width) if layout.timed else None
        learned = self.starts - int(self.prefix)
        self.start = nn.Parameter(torch.zeros(1, learned, width)) if learned else None
        self.positions = Positions(layout, positions, self.starts, width, self.head_dim, start_rotation == "zero")
        self.target_embedding = nn.Parameter(torch.empty(layout.places, width)) if target_positions else None
        self.embedding_norm = Norm(width, "layer", epsilon=norm_epsilon) if embedding_norm else None
        self.dropout = nn.Dropout(dropout)

        self.condition_positions = nn.Parameter(torch.empty(self.places, width)) if condition_positions else None
        self.shared_modulation = Modulation(width, width, 6) if shared_modulation else None
        self.blocks = nn.ModuleList(
            Block(replace(settings, drop_path=drop_path * layer / max(depth - 1, 1))) for layer in range(depth)
        )
        self.skips = None
        if long_skips:
            self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        self.final_norm = self.final_modulation = self.head = None
        if made is not None:
            self.place_head = made
        else:
            if norm_first:
                offset = norm_bias and norm == "layer" if final_norm_bias is None else final_norm_bias
                self.final_norm = Norm(width, norm, affine, offset, norm_epsilon)
            self.final_modulation = Modulation(condition_width, width, 2) if modulated else None
            head_offset = bias if head_bias is None else head_bias
            outputs = layout.parts * layout.outputs
            self.head = LogitHead(width, layout.places, outputs, head_transform, head_offset, tied, norm_epsilon)
        self.tied = tied
        self.activation_checkpointing = activation_checkpointing
        self.register_buffer("mask", _scale_mask(layout), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02, residual outputs scaled by 1 / sqrt(2 depth)."""
        for name, parameter in self.named_parameters():
            if "modulation" in name or parameter.ndim < 2 or name.endswith(("bias", "log_sharpness", "start")):
                continue
            residual = name.endswith(("out.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.depth) ** 0.5 if residual else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        assert (time is not None) == self.layout.timed, "the time of a timed layout, and of no other"
        filled = 0 if cache is None else cache.filled
        class_vectors = self.class_embedding(labels)
        hidden = self._embed(tokens, class_vectors, filled, order)
        count = hidden.shape[1]
        rotary = self.positions.rotary(filled, count, order)
        mask = None if self.mask is None else self.mask[:count, :count]
        condition = self._condition(class_vectors, time, filled, count)
        hidden = self._run_blocks(hidden, condition, rotary, mask, cache)
        if cache is not None and cache.holds_keys:
            cache.advance(count)
        # Row i of a causal sequence, which predicts token i, is the element before it.
        hidden = hidden[:, max(self.starts - int(self.causal) - filled, 0) :]
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.final_modulation is not None:
            shift, scale = self._final_modulation(condition, cache, hidden.shape[1])
            hidden = hidden * (1 + scale) + shift
        if self.head is None:
            # Sharding (FSDP2) hooks on to what comes back, which must not be a view of something else.
            return hidden.clone()
        tied = None
        if self.tied:
            tied = cast(TokenTable, self.token_embedding).table.weight[: self.layout.outputs]
        logits = self.head(hidden, tied)
        return logits.unflatten(-1, (self.layout.parts, -1)).flatten(1, 2) if self.layout.parts > 1 else logits

    def _embed(self, tokens: Tensor, class_vectors: Tensor, filled: int, order: Tensor | None) -> Tensor:
        """`(B, n, D)` of the tokens that follow `filled` elements, and at the beginning of what stands before them."""
        assert order is None or self.layout.any_order, "the layout has one order"
        embedded = self.token_embedding(tokens)
        if filled == 0 and self.starts:
            parts = [] if self.start is None else [self.start.expand(len(class_vectors), -1, -1)]
            if self.prefix:
                parts.append(class_vectors[:, None])
            embedded = torch.cat((*(part.to(embedded.dtype) for part in parts), embedded), dim=1)
        self._check_count(filled, embedded.shape[1])
        embedded = self.positions.add(embedded, filled, order)
        if self.target_embedding is not None:
            embedded = embedded + self._targets(self.target_embedding, filled, embedded.shape[1], order)
        if self.embedding_norm is not None:
            embedded = self.embedding_norm(embedded)
        return self.dropout(embedded)

    def _check_count(self, filled: int, count: int) -> None:
        if filled + count > self.places:
            raise ValueError(
                f"the sequence has places for {self.places} elements (start included), got {filled + count}: "
                f"a {self.layout.attention} backbone reads at most {self.places - self.starts} tokens"
            )
        ends = list(accumulate(self.layout.scales))
        if ends and filled + count not in ends:
            raise ValueError(
                f"a block-causal backbone reads whole scales, which end at {ends}, got {filled + count} elements"
            )
        if filled and ends and ends.index(filled + count) != ends.index(filled) + 1:
            raise ValueError("a block-causal backbone with a cache reads one scale at a time")

    def _targets(self, table: Tensor, filled: int, count: int, order: Tensor | None) -> Tensor:
        """`(B or 1, count, D)`: the embedding of the place that each element predicts, zeros for those before."""
        before = max(self.starts - 1 - filled, 0)
        first = max(filled - self.starts + 1, 0)
        predicted = slice(first, first + count - before)
        places = (
            torch.arange(len(table), device=table.device)[None, predicted] if order is None else order[:, predicted]
        )
        return nn.functional.pad(table[places], (0, 0, before, 0))

    def _condition(self, class_vectors: Tensor, time: Tensor | None, filled: int, count: int) -> Tensor | None:
        """`(B, 1, D)`, or `(B, count, D)` where the condition changes along the sequence; None for a prefix alone."""
        if not self.modulated:
            return None
        condition = class_vectors[:, None]
        if time is not None and self.time_embedding is not None:
            condition = condition + self.time_embedding(time)[:, None]
        if self.condition_positions is not None:
            condition = condition + self.condition_positions[filled : filled + count]
        return condition

    def _run_blocks(
        self, hidden: Tensor, condition: Tensor | None, rotary: Tensor | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        prepared = [] if cache is None else cache.modulations
        shared: Condition | None = condition
        if condition is not None and self.shared_modulation is not None and not prepared:
            shared = torch.cat(self.shared_modulation(condition), dim=-1)
        causal, kept = self.layout.attention == "causal", []
        for layer, block in enumerate(self.blocks):
            if self.skips is not None and layer > self.depth // 2:
                hidden = self.skips[layer - self.depth // 2 - 1](torch.cat((hidden, kept.pop()), dim=-1))
            arguments: tuple[Any, ...] = (
                hidden,
                prepared[layer] if prepared else shared,
                rotary,
                mask,
                causal,
                None if cache is None else cache.layer(layer),
            )
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                hidden = block(*arguments)
            if self.skips is not None and layer < self.depth // 2:
                kept.append(hidden)
        return hidden

    def _final_modulation(self, condition: Tensor | None, cache: Cache | None, rows: int) -> tuple[Tensor, ...]:
        if cache is not None and cache.modulations:
            return cache.modulations[-1]
        assert condition is not None and self.final_modulation is not None
        return self.final_modulation(condition if condition.shape[1] == 1 else condition[:, -rows:])

    def shards(self) -> Iterable[nn.Module]:
        return self.blocks

    def new_cache(self, labels: Tensor) -> Cache:
        modulations: list[tuple[Tensor, ...]] = []
        if self.modulated and self.condition_positions is None and not self.layout.timed:
            condition = self.class_embedding(labels)[:, None]
            shared = condition
            if self.shared_modulation is not None:
                shared = torch.cat(self.shared_modulation(condition), dim=-1)
            modulations = [cast(Block, block).modulate(shared) for block in self.blocks]
            if self.final_modulation is not None:
                modulations.append(self.final_modulation(condition))
        if not self.causal:
            return Cache(modulations, None)
        weight = self.class_embedding.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        shape = (self.depth, len(labels), self.heads, self.places, self.head_dim)
        return Cache(modulations, new_buffers(*shape, weight.device, dtype))


def _scale_mask(layout: SequenceLayout) -> Tensor | None:
    """`(N, N)` bool: each place sees the scales before its own, and its own."""
    if not layout.scales:
        return None
    counts = torch.tensor(layout.scales)
    scale = torch.arange(len(counts)).repeat_interleave(counts, output_size=sum(layout.scales))
    return scale[:, None] >= scale
