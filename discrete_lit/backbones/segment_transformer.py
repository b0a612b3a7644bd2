"""The decoder over sequences of segments: one transformer reads text and images, ids and vectors, in one sequence.

`SegmentTransformer.forward` is the model: embed each element by its modality, run the blocks, give hidden states. From
a hidden state `logits` predicts the id that follows, over those that may stand there; `predict_vectors` the vectors at
the elements of an island, which see each other; `predict_scales` the ids of the scales of an image (VAR).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import Block, BlockSettings, MLPKind, QueryKeyNorm
from discrete_lit.backbones.cache import RaggedCache, new_buffers
from discrete_lit.backbones.embeddings import TimeEmbedding, made_again, rotary_table
from discrete_lit.backbones.layers import Linear, Norm, NormKind, full_precision_linear
from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import SegmentSequence, coordinates_of, seen_by
from discrete_lit.backbones.segments import Segment, SegmentLayout

# Times lie in [0, 1]; the waves that embed them are made for about a thousand steps.
_TIME_UNITS = 1000.0


class SegmentTransformer(nn.Module):
    """A decoder-only transformer over segments of ids and of vectors (Llama's blocks by default).

    One table embeds the ids of all modalities, and one softmax predicts them (Chameleon, Emu3). A modality may have an
    embedding of its own, a table of short vectors and an aligner, and a head of its own (Janus). Vectors come in
    through an aligner, to which the time of their noise is added, and come out through a linear layer (Transfusion).

    The published models set, beside sizes:

    - Chameleon: `qk_norm="layer_per_head"`; that of 34B also `norm_outputs` and `key_value_heads=8`.
    - Emu3: `rotary_base=1e6`, `key_value_heads=8`.
    - Janus: `own_embeddings={"image": 8}`, `own_heads={"image": width}`, `norm_epsilon=1e-6`.
    - Transfusion: `SegmentLayout.positions="island"` and bidirectional segments of vectors.
    - VAR: segments of vectors in scales, with `codes`; an embedding of the scale is added to the vectors.
    - Show-o, whose transformer is Phi-1.5: `parallel`, `rotary_share=0.5`, `norm="layer"`, `mlp="gelu_tanh"`, `bias`,
      `qk_norm="layer"`.

    Args:
        layout: the sequence; a generator gives it.
        width: D, a multiple of `heads` unless `head_dim` is given.
        depth: blocks.
        heads: attention heads.
        head_dim: width of a head, a multiple of twice the layout's axes.
        key_value_heads: heads of keys and values, each shared by as many heads of queries; `heads` by default.
        mlp_hidden: inner width of the MLP; by default 8/3 x width rounded up to a multiple of 64 if gated, else
            4 x width.
        mlp: kind of the MLP.
        norm: `"rms"` or `"layer"`.
        norm_epsilon: of every norm.
        norm_outputs: a block normalises what its branches give, in the place of what they read (Chameleon-34B).
        parallel: attention and MLP of a block read one norm of the same input (Phi).
        bias: of linear layers, LayerNorms, and the logits.
        qk_norm: of queries and keys, see `QueryKeyNorms`.
        rotary_share: the share of a head's channels that are turned, in (0, 1]: the first ones of each axis.
        rotary_base: the wavelengths of rotary positions are 2 pi rotary_base^(2i / d).
        own_embeddings: width of the table of each modality that does not share the table of all.
        own_heads: inner width of the head of each modality that does not share the softmax over all.
        aligner_layers: linear layers, with GELU between them, from such a table, or from vectors, to D.
        tied: the logits' weight is that of the table of all.
        dropout: on embeddings, attention weights and residual branches, in [0, 1).
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range, or a modality that the layout does not have.
    """

    fsdp_methods = ("logits", "logits_in", "predict_scales", "predict_vectors")
    rotary_table: Tensor

    def __init__(
        self,
        layout: SegmentLayout,
        *,
        width: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        key_value_heads: int | None = None,
        mlp_hidden: int | None = None,
        mlp: MLPKind = "swiglu",
        norm: NormKind = "rms",
        norm_epsilon: float = 1e-5,
        norm_outputs: bool = False,
        parallel: bool = False,
        bias: bool = False,
        qk_norm: QueryKeyNorm | None = None,
        rotary_share: float = 1.0,
        rotary_base: float = 10000.0,
        own_embeddings: Mapping[str, int] | None = None,
        own_heads: Mapping[str, int] | None = None,
        aligner_layers: int = 1,
        tied: bool = False,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(width, depth, heads, aligner_layers) < 1 or (head_dim is None and width % heads):
            raise ValueError(
                "width, depth, heads and aligner_layers must be at least 1, and heads divide the width, got "
                f"{width}, {depth}, {heads} and {aligner_layers}"
            )
        self.layout, self.grammar = layout, SegmentGrammar(layout)
        self.width, self.depth, self.heads = width, depth, heads
        self.key_value_heads = heads if key_value_heads is None else key_value_heads
        self.rotary_base, self.rotary_share = rotary_base, rotary_share
        self.activation_checkpointing = activation_checkpointing
        settings = BlockSettings.of_width(
            width,
            heads,
            head_dim=head_dim,
            mlp_hidden=mlp_hidden,
            gated=mlp in ("swiglu", "geglu"),
            bias=bias,
            norm=norm,
            norm_epsilon=norm_epsilon,
            norm_outputs=norm_outputs,
            parallel=parallel,
            key_value_heads=key_value_heads,
            mlp=mlp,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self.head_dim = settings.head_dim
        self.modalities = {segment.modality: segment for segment in layout.segments}
        of_ids = {name for name, segment in self.modalities.items() if segment.ids}
        _check_modalities("own_embeddings", own_embeddings or {}, of_ids)
        _check_modalities("own_heads", own_heads or {}, of_ids)

        # The input.
        self.shared_ids = self._shared_ids(set(own_embeddings or {}), set(own_heads or {}))
        self.table = nn.Embedding(self.shared_ids, width)
        self.own_embeddings = nn.ModuleDict(
            {
                name: OwnEmbedding(self.modalities[name], table_width, width=width, layers=aligner_layers)
                for name, table_width in (own_embeddings or {}).items()
            }
        )
        vectors = {name: segment.input_dim for name, segment in self.modalities.items() if segment.input_dim}
        self.aligners = nn.ModuleDict(
            {name: aligner(dim, width, layers=aligner_layers) for name, dim in vectors.items()}
        )
        predicted = {
            segment.modality
            for segment in layout.segments
            if segment.input_dim is not None and segment.loss_weight and segment.codes is None
        }
        in_scales = {name: segment for name, segment in self.modalities.items() if segment.codes is not None}
        self.levels = nn.ModuleDict({name: ScaleEmbedding(each.scales, width) for name, each in in_scales.items()})
        self.time_embedding = TimeEmbedding(width) if predicted else None
        self.dropout = nn.Dropout(settings.dropout_at("embeddings"))
        self.register_buffer("rotary_table", self._rotations().float(), persistent=False)

        # The blocks and the output.
        self.blocks = nn.ModuleList(Block(settings) for _ in range(depth))
        self.final_norm = Norm(width, norm, bias=bias and norm == "layer", epsilon=norm_epsilon)
        self.head = None if tied else Linear(width, self.shared_ids, bias=False, autocast=False)
        # A vector of its own, so that the logits of some ids need neither the weights nor the offsets of the others.
        self.head_bias = nn.Parameter(torch.zeros(self.shared_ids)) if bias else None
        self.own_heads = nn.ModuleDict(
            {
                name: OwnHead(len(self.modalities[name].ids), width, hidden=hidden)
                for name, hidden in (own_heads or {}).items()
            }
        )
        # A set with other ids than a modality's codes, as the end of a text, is predicted by the softmax of all.
        self.own_head_of: list[str | None] = []
        for number, ids in self.grammar.sets:
            segment = layout.segments[number]
            own = segment.modality in self.own_heads and set(ids) <= set(segment.ids)
            self.own_head_of.append(segment.modality if own else None)
        self.vector_heads = nn.ModuleDict({name: Linear(width, cast(int, vectors[name])) for name in sorted(predicted)})
        self.scale_heads = nn.ModuleDict(
            {name: Linear(width, cast(int, each.codes), bias=False, autocast=False) for name, each in in_scales.items()}
        )
        self._initialise()

    def _shared_ids(self, embedded: set[str], predicted: set[str]) -> int:
        """Count the ids of the table of all: behind the last that no modality has for itself, both ways, is none."""
        layout, apart = self.layout, embedded & predicted
        found = [0]
        for segment in layout.segments:
            found += segment.structure()
            if segment.modality not in apart:
                found += segment.ids
        return 1 + max(found)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Begin as GPT-2: normal with deviation 0.02, output layers of residual branches less; predicted vectors 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                divisor = (2 * self.depth) ** 0.5 if name.endswith(("attention.out", "mlp.contract")) else 1.0
                nn.init.normal_(module.weight, std=0.02 / divisor)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for head in self.vector_heads.values():
            nn.init.zeros_(cast(Linear, head).weight)

    def _rotations(self) -> Tensor:
        """The rotations of each coordinate along one axis, `(N, head_dim / (2 axes), 2)` float64."""
        axes = self.layout.axes
        if self.head_dim % (2 * axes):
            raise ValueError(
                f"rotary positions over {axes} axes need a head width divisible by {2 * axes}, got {self.head_dim}"
            )
        pairs = self.head_dim // (2 * axes)
        turned = pairs * self.rotary_share
        if not 0 < turned <= pairs or turned != round(turned):
            raise ValueError(
                f"rotary_share={self.rotary_share} must turn a whole number of the {pairs} pairs of channels that each "
                "axis has in a head, at least 1"
            )
        numbers = torch.arange(self.layout.length + 1)[:, None]
        table = rotary_table(numbers, 2 * round(turned), base=self.rotary_base, dtype=torch.float64)
        still = table.new_tensor((1.0, 0.0)).expand(len(table), pairs - table.shape[1], 2)
        return torch.cat((table, still), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.rotary_table = made_again(self._rotations(), like=self.rotary_table)
        return self

    def forward(
        self, sequence: SegmentSequence, cache: RaggedCache | None = None, *, rotary: Tensor | None = None
    ) -> Tensor:
        """Make hidden states `(B, n, D)`, normed, of the elements of a sequence.

        Args:
            sequence: with a cache, one sample a row: the elements that follow those that it holds. They see each other
                as the grammar says, and all that the cache holds.
            cache: of `new_cache`; what the pass writes into it stays where its `advance` follows.
            rotary: with an even cache, of a pass over one element: what `rotary_of` gives of its coordinates, where
                the caller has it from many elements at once.

        Raises:
            ValueError: more elements than the cache has room for.
        """
        hidden = self.dropout(self._embed(sequence))
        mask = None
        if rotary is None:
            coordinates, mask = self._places(sequence, cache)
            rotary = self.rotary_of(coordinates)
        checkpointed = self.activation_checkpointing and self.training
        for number, block in enumerate(self.blocks):
            keys = None if cache is None else cache.layer(number)
            arguments = (hidden, None, rotary, mask, mask is None, keys)
            if checkpointed:
                hidden = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                hidden = block(*arguments)
        return self.final_norm(hidden)

    def rotary_of(self, coordinates: Tensor) -> Tensor:
        """Look up the rotations of coordinates `(B, n, axes)`: `(B, 1, n, head_dim / 2, 2)`."""
        return self.rotary_table[coordinates].flatten(2, 3)[:, None]

    def _places(self, sequence: SegmentSequence, cache: RaggedCache | None) -> tuple[Tensor, Tensor | None]:
        """Find coordinates `(B, n, axes)`, and the mask; None where each element sees all that stands before it."""
        grammar, states = self.grammar, sequence.states
        number = torch.arange(states.shape[1], device=states.device).expand_as(states)
        first = sequence.first() if sequence.packed else None
        origin = None if cache is None else cache.origin
        coordinates, _ = coordinates_of(grammar, states, first=first, origin=origin)
        if cache is not None:
            # Sequences that wait at their end read elements that stand nowhere.
            coordinates = coordinates.clamp(max=self.layout.length)
        reach, even = (0, True) if cache is None else (cache.reach, cache.even)
        if first is None and even and (states.shape[1] == 1 or (self.layout.causal and not reach)):
            return coordinates, None
        last = number if cache is None else cache.filled[:, None] + number
        if not self.layout.causal:
            last = last + grammar.ahead_of[states]
        first = torch.zeros_like(last) if first is None else first
        return coordinates, seen_by(first, last, elements=reach + states.shape[1])

    def _embed(self, sequence: SegmentSequence) -> Tensor:
        ids = sequence.ids
        embedded = self.table(ids if self.shared_ids == self.layout.vocab_size else ids.clamp(max=self.shared_ids - 1))
        for name, own in self.own_embeddings.items():
            inside = self._at_positions(sequence, name)
            embedded = torch.where(inside[..., None], own(sequence.ids, inside).to(embedded.dtype), embedded)
        for segment in self.layout.segments:
            if segment.name not in sequence.vectors:
                continue
            aligned = self.aligners[segment.modality]
            vectors = sequence.vectors[segment.name]
            read = aligned(vectors.to(next(aligned.parameters()).dtype))
            if self.time_embedding is not None and segment.modality in self.vector_heads:
                times = sequence.times
                times = vectors.new_zeros(vectors.shape[:2]) if times is None else times
                read = read + self.time_embedding(_TIME_UNITS * times.flatten()).unflatten(0, times.shape)
            if segment.modality in self.levels:
                read = read + self.levels[segment.modality](self.grammar.place_of[sequence.states])
            inside = self.grammar.is_vector[sequence.states] & (
                self.grammar.segment_of[sequence.states] == self.layout.number(segment.name)
            )
            embedded = torch.where(inside[..., None], read.to(embedded.dtype), embedded)
        return embedded

    def _at_positions(self, sequence: SegmentSequence, modality: str) -> Tensor:
        """`(B, n)` bool: the elements at the positions of a modality's segments."""
        grammar, inside = self.grammar, torch.zeros_like(sequence.ids, dtype=torch.bool)
        for number, segment in enumerate(self.layout.segments):
            if segment.modality == modality:
                inside |= grammar.segment_of[sequence.states] == number
        return inside & (grammar.place_of[sequence.states] >= 0)

    def logits(self, hidden: Tensor, number: int | None = None) -> Tensor:
        """Predict the ids that follow hidden states.

        Args:
            hidden: `(..., D)`, of the elements before those that are predicted.
            number: of a set of the grammar, whose ids may follow; by default all that share one softmax.

        Returns:
            `(..., K)` of the ids of the set, in rising order, or `(..., shared_ids)`; float32 or float64.
        """
        if number is not None and self.own_head_of[number] is not None:
            return cast(OwnHead, self.own_heads[cast(str, self.own_head_of[number])])(hidden)[..., self._codes(number)]
        weight = self.table.weight if self.head is None else self.head.weight
        span = slice(None) if number is None else self.grammar.span_of(number)
        logits = full_precision_linear(hidden, weight[span])
        return logits if self.head_bias is None else logits + self.head_bias[span].to(logits.dtype)

    def logits_in(self, states: Tensor, hidden: Tensor) -> Tensor:
        """Predict the ids that are to stand in states `(M,)`, each by its own head: `(M, D)` to `(M, V)`."""
        everything = F.pad(self.logits(hidden), (0, self.layout.vocab_size - self.shared_ids), value=-torch.inf)
        for number, own in enumerate(self.own_head_of):
            if own is not None:
                of_set = torch.full_like(everything, -torch.inf)
                of_set[:, self.grammar.span_of(number)] = self.logits(hidden, number)
                inside = self.grammar.set_of[states] == number
                everything = torch.where(inside[:, None], of_set, everything)
        return everything

    def _codes(self, number: int) -> slice | Tensor:
        """The codes of a set of ids that have a head of their own, in the order of the ids."""
        segment, ids = self.grammar.sets[number]
        codes = self.layout.segments[segment].ids
        if ids == tuple(codes):
            return slice(None)
        code_of = {id: code for code, id in enumerate(codes)}
        return torch.tensor([code_of[id] for id in ids], device=self.table.weight.device)

    def predict_vectors(self, hidden: Tensor, *, segment: str) -> Tensor:
        """Predict the vectors at the positions of a segment, from their own hidden states: `(..., D)` to `(..., E)`."""
        return cast(Linear, self.vector_heads[self.layout[segment].modality])(hidden)

    def predict_scales(self, hidden: Tensor, *, segment: str) -> Tensor:
        """Predict the ids of the scales of a segment where they stand: `(..., D)` to `(..., K)` float32 or float64.

        Args:
            hidden: states of its positions, and for the first scale of the element in front of them.
            segment: its name.
        """
        return cast(Linear, self.scale_heads[self.layout[segment].modality])(hidden)

    def flops(self, elements: int, seen: int) -> int:
        """Count the floating-point operations of the blocks for some elements of one sequence, two a multiply-add.

        Args:
            elements: that a pass reads.
            seen: those that attention reads, the elements of the pass among them.
        """
        linear = sum(module.weight.numel() for module in self.blocks.modules() if isinstance(module, nn.Linear))
        return 2 * elements * (linear + 2 * seen * self.depth * self.heads * self.head_dim)

    def input_flops(self, elements: int, vectors: bool) -> int:
        """Count the operations in front of the blocks, at each of some elements of one sequence.

        Args:
            elements: that a pass reads.
            vectors: whether vectors are among them, which come in with the time of their noise.
        """
        parts = [self.own_embeddings, *((self.aligners, self.time_embedding) if vectors else ())]
        modules = [module for part in parts if part is not None for module in part.modules()]
        return 2 * elements * sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))

    def new_cache(self, batch: int, length: int) -> RaggedCache:
        """Make room for the keys and values of B sequences of so many elements."""
        weight = self.table.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        buffers = new_buffers(
            layers=self.depth,
            batch=batch,
            heads=self.key_value_heads,
            length=length,
            head_dim=self.head_dim,
            device=weight.device,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
        )
        return RaggedCache(buffers)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks."""
        return self.blocks


class OwnEmbedding(nn.Module):
    """Embed the ids of one modality by a table of short vectors and an aligner (Janus).

    Args:
        segment: of the modality.
        table_width: of the vectors of the table.
        width: D.
        layers: of the aligner.
    """

    code_of: Tensor

    def __init__(self, segment: Segment, table_width: int, *, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(len(segment.ids), table_width)
        self.aligner = aligner(table_width, width, layers=layers)
        code_of = torch.zeros(max(segment.ids) + 1, dtype=torch.int64)
        code_of[list(segment.ids)] = torch.arange(len(segment.ids))
        self.register_buffer("code_of", code_of, persistent=False)

    def forward(self, ids: Tensor, inside: Tensor) -> Tensor:
        """Map ids `(B, n)` to `(B, n, D)`; what stands where `inside` is false is not read."""
        codes = self.code_of[ids.where(inside, 0).clamp(max=len(self.code_of) - 1)]
        return self.aligner(self.table(codes))


class ScaleEmbedding(nn.Module):
    """Embed the scales that the positions of a segment belong to (VAR's level embedding).

    Args:
        scales: positions of each.
        width: D.
    """

    level: Tensor

    def __init__(self, scales: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(len(scales), width)
        level = torch.arange(len(scales)).repeat_interleave(torch.tensor(scales))
        self.register_buffer("level", level, persistent=False)

    def forward(self, places: Tensor) -> Tensor:
        """Map positions `(B, n)` of the segment to `(B, n, D)`; elsewhere, as at -1, what comes means nothing."""
        return self.table(self.level[places.clamp(0, len(self.level) - 1)])


class OwnHead(nn.Module):
    """Predict the codes of one modality by a linear layer, GELU and a linear layer (Janus).

    Args:
        codes: K.
        width: D.
        hidden: inner width.
    """

    def __init__(self, codes: int, width: int, *, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(width, hidden)
        self.output = Linear(hidden, codes, autocast=False)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., K)
        return self.output(F.gelu(self.expand(hidden)))


def aligner(dim: int, width: int, *, layers: int) -> nn.Sequential:
    """Make linear layers from `dim` to `width`, with GELU between them (Janus has two, Chameleon none)."""
    made: list[nn.Module] = [Linear(dim, width)]
    for _ in range(layers - 1):
        made += [nn.GELU(), Linear(width, width)]
    return nn.Sequential(*made)


def _check_modalities(setting: str, given: Mapping[str, int], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown or any(width < 1 for width in given.values()):
        raise ValueError(
            f"{setting}={dict(given)} needs widths of at least 1 of modalities of ids, which are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
