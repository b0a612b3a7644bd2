"""The one transformer that all generators share, with the switches of the published models.

`Transformer.forward` is the model: embed, run the blocks, make logits. The switches are explained at the class, with
the models that use them; which of them go together is checked in `transformer_settings.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.backbone import Backbone, IdHead, SequenceLayout
from discrete_lit.backbones.blocks import (
    DROPOUT_PLACES,
    AttentionBias,
    Block,
    BlockSettings,
    Context,
    ContextAttention,
    DropoutPlace,
    MLPKind,
    Modulating,
    Modulation,
    ModulationActivation,
    NormTables,
    QueryKeyNorm,
    Rotary,
)
from discrete_lit.backbones.cache import Cache, new_buffers
from discrete_lit.backbones.condition import Condition, as_condition, check_parts
from discrete_lit.backbones.context_pool import ContextPool
from discrete_lit.backbones.context_prefix import ContextPrefix
from discrete_lit.backbones.embeddings import (
    InputKind,
    PositionInstructions,
    PositionKind,
    Positions,
    TimeEmbedding,
    TokenTable,
    embed_tokens,
)
from discrete_lit.backbones.initialization import InitializationKind, initialise
from discrete_lit.backbones.layers import LogitHead, Norm, NormKind
from discrete_lit.backbones.transformer_settings import (
    check_blocks,
    check_conditioning,
    check_context_pool,
    check_context_prefix,
    check_layout,
    check_place_head,
    check_sizes,
    check_starts,
    check_tables,
)


class Transformer(Backbone):
    """One transformer with the switches of the published models.

    The condition is a class embedding: an element in front of the sequence (`conditioning="prefix"`), a modulation of
    every norm (`"adaln"`), or both; or a vector that is added to every element (`"added"`), as BERT's segment embedding
    is. A causal sequence without the element in front begins with a learned vector instead. Where the layout is timed,
    an embedding of the time is added to what modulates. Where it has blocks of p positions, p - 1 learned queries
    follow what stands in front, so that the first block has p elements to be predicted from (BitDance).

    Beside the class it may be given a grid of ids, whose embedding is added to the element that predicts the place
    (`grid_vocab`): in a causal sequence an element sees the ids of its own place and those before. And every block may
    attend to vectors, between its attention and its MLP (`context_dim`), all of them at every place.

    By default it is GPT-2's, with the class in front (taming-transformers). The published models set, among others:

    - LlamaGen: `norm="rms"`, `mlp="swiglu"`, `bias=False`, `positions="rope_2d"`, `start_rotation="zero"`; IBQ also has
      `conditioning="prefix_adaln"`; Open-MAGVIT2 `token_embedding="parts"` and a `FactorisedHead` as its `place_head`.
      LlamaGen's text-to-image models also `context_prefix=120` and `context_dim=2048`, the width of T5-XL.
    - RAR: `conditioning="prefix_adaln"`, `target_positions`, `condition_positions`, `registers=1`, `qk_norm="layer"`;
      BAR also has `class_repeats=32`, `token_embedding="bit_table"`, `positions="learned_rope_2d"`,
      `target_positions="all"`, `target_rotations` and a `MaskedBitHead`, with `qk_norm="rms"`, `norm="rms"`,
      `mlp="swiglu"`.
    - RandAR: as LlamaGen, with `position_instructions`.
    - RQ-Transformer: `token_embedding="codes"`, `code_dim=256`, and a `FactorisedHead` with `codes="sum"`, `positions`
      and `shared_logits`.
    - BitDance: `class_slots=64`, `token_embedding="bits_mlp"`, `embedding_norm="rms"`, `rotary_offset=1.5`,
      `hidden_positions` and a `BinaryFlowHead`, with `norm="rms"`, `mlp="swiglu"`, `bias=False`, `positions="rope_2d"`.
    - VAR: `conditioning="prefix_adaln"`, `attention_bias="query_value"`, `qk_norm="unit"`, `mlp="gelu_tanh"`; its
      largest also `shared_modulation`.
    - Infinity: as VAR's largest, with `positions="rope_scales"`, `context_dim=2048`, `context_pool=[512, 16]` and
      `context_bias`.
    - MaskGIT: BERT's `norm_first=False`, `embedding_norm`, `head_transform` and `tied`, with `head_bias="place"` in
      MaskBit's code; MaskBit itself has `token_embedding="bits"` and is not tied; TiTok's generator has the first two,
      and that of its S-128 is a U-ViT: `long_skips`.
    - Halton-MaskGIT: `conditioning="adaln"`, `norm="rms"`, `mlp="swiglu"`, `qk_norm="full_rms"`, `registers=1`, `tied`.
    - SEDD, MDLM: `conditioning="adaln"`, `condition_width=128`, `positions="rope_1d"`, `mlp="gelu_tanh"`, no biases
      in attention and norms.
    - VQ-Diffusion: `conditioning="adaln_tables"`, `time_steps=100`, `mlp="gelu_quick"`, `mlp_on_grid`.
    - MD4's text models: `conditioning="adaln"`, `condition_width=64`, `mlp="glu"`, `modulation_activation="sigmoid"`,
      `time_waves=32`, `time_hidden=256`, `positions="rope_1d"`, `bias=False`.
    - ImageGPT: `norm="rms"`, `mlp="gelu_quick"`.
    - MusicGen: `positions="sinusoidal"`, `conditioning="added"`, `context_dim`, and biases in the norms alone.

    What speeds up short trainings (Primer; Fixup; Jordan et al., "modded-nanogpt", 2024) is `mlp="relu_squared"`,
    `zero_outputs`, `norm="rms"`, `qk_norm="rms"` and `bias=False`.

    Args:
        layout: the sequence; a generator gives it.
        width: D; a multiple of `heads` unless `head_dim` is given.
        depth: blocks.
        heads: attention heads.
        head_dim: width of a head.
        mlp_hidden: inner width of the MLP; by default 4 x width, if gated 8/3 x width rounded up to a multiple of 64.
        mlp: GELU, its approximation by tanh or by a sigmoid (ImageGPT), squared ReLU (Primer), or one gated by SiLU
            (`"swiglu"`), GELU or its approximation (`"geglu"`, `"geglu_tanh"`), or a sigmoid (`"glu"`: MD4).
        mlp_on_grid: its two layers are 3 x 3 convolutions over the grid (VQ-Diffusion).
        norm: `"layer"` or `"rms"`.
        norm_epsilon: of every norm.
        norm_first: pre-norm; false is post-norm, without a norm at the end (BERT, MaskGIT).
        norm_affine: gains of the norms; by default where nothing modulates them.
        norm_bias: offsets of LayerNorms with gains; as `bias` by default.
        final_norm_bias: an offset in the last norm; by default as in the others.
        embedding_norm: a norm of the embedded sequence: a LayerNorm (BERT), or `"rms"`.
        positions: learned embeddings added at the input, or fixed sines and cosines (`"sinusoidal"`: MusicGen), or
            rotary ones along the sequence or along each axis of the grid, or both of the first and the last (BAR); what
            stands before the first position of the sequence is not rotated on a grid. `"rope_scales"` is of a
            next-scale sequence, along the axes of the last scale (Infinity).
        rotary_base: of rotary positions: their wavelengths are 2 pi rotary_base^(2i / d).
        rotary_offset: on a grid, how far along each axis its first position lies from what stands there (BitDance).
        start_rotation: of what stands there: `"none"`, or `"zero"`, which makes its queries and keys 0 (LlamaGen).
        target_positions: learned embeddings of the position that each element predicts (RAR); with `"all"` also of
            the first one, at all that stands before the element that predicts it (BAR).
        target_rotations: with rotary positions on a grid, the second half of the heads turn their queries by the
            position that is predicted, in the place of their own (BAR).
        position_instructions: before each token stands an element that says which position comes next, from which it is
            predicted: one learned vector, turned by the rotation of the position (RandAR). The sequence is twice as
            long; the instruction's queries and keys are turned as the token's.
        token_embedding: of ids: a table, which is one for each where a position has several ids (MaskBit's BERT), a
            linear map of their bits (MaskBit), a SwiGLU of them (`"bits_mlp"`: BitDance), a table of the values of a
            bit and a linear map (`"bit_table"`: BAR), the sum of a table for each of the sub-tokens that `place_head`
            predicts (`"parts"`: Open-MAGVIT2), or of a linear map of the tokenizer's code vector of each (`"codes"`:
            RQ-Transformer).
        embedded_digits: sizes of the digits of an id, least significant first, each with a table that is added to the
            table of ids: for FSQ the tokenizer's `levels`.
        code_dim: width of the tokenizer's code vectors, of `token_embedding="codes"`; 256 in RQ-VAE.
        conditioning: `"prefix"`, `"adaln"`, `"prefix_adaln"` or `"added"`; or `"adaln_tables"`, by tables of each
            block's own, of the time for one norm and of the class for the other (`NormTables`: VQ-Diffusion).
        time_steps: T, rows of the tables of the time.
        class_slots: elements that the class takes in front of the sequence, each with a vector of its own (BitDance).
        class_repeats: elements that it takes there with the same vector (BAR).
        condition_width: of the class and time embeddings that modulate; `width` by default.
        modulation_activation: of these, before the linear layers that make shifts, scales and gates of them.
        time_waves, time_base, time_hidden: of the time embedding, see
            `discrete_lit.backbones.embeddings.TimeEmbedding`.
        grid_vocab: ids of the grid that the condition has beside the class; none by default. One more stands for no
            grid, where the condition is dropped.
        context_dim: E, width of the vectors that the condition has for the blocks to attend to; none by default.
        context_bias: of the queries, keys and values of the attention to them; by default where those of the
            self-attention all have one.
        context_pool: the most of these vectors that a text has, and the heads of an attention that pools them: the
            pooled vector then takes the place of the class (`ContextPool`: Infinity).
        context_prefix: places that these vectors take in front of a causal sequence, in the place of the class, where
            its blocks do not attend to them apart (`ContextPrefix`).
        condition_positions: learned offsets of the condition along the sequence (RAR).
        shared_modulation: one modulation for all blocks, with an offset of each (VAR's largest).
        registers: learned elements before everything else.
        attention_bias: of queries, keys and values; as `bias` by default.
        qk_norm: of queries and keys, see `discrete_lit.backbones.blocks.QueryKeyNorms`.
        out_bias: of the attention's last projection; as `bias` by default.
        bias: of the other linear layers.
        head_bias: of the logits; as `bias` by default; `"place"` has one of each position.
        head_transform: BERT's linear layer, GELU and LayerNorm before the logits; with `"gelu_tanh"` that GELU's
            approximation (MaskGIT's code).
        tied: the logits' weight is the token embedding's.
        initialization: how the weights begin, by the name of a published code: see
            `discrete_lit.backbones.initialization.initialise`.
        initial_gates: of `initialization="var"` and `"ibq"`, how small the gates of the modulations begin.
        zero_outputs: the last layer of every residual branch and the head are 0 at the start (Zhang, Dauphin and Ma,
            "Fixup Initialization", 2019), where GPT-2's are small. Of branches with a gate of 0 it is the head alone.
        visible_start: elements at the beginning of a causal sequence, the class among them, that see each other both
            ways, as far as there are so many (taming's `n_unmasked`). A pass over the whole sequence then shows the
            first of them what they predict, as it did in the training of such models; samplers and likelihoods go on
            from what is known.
        place_head: of a causal sequence, in the place of logits of all ids, for vocabularies too large for them: a
            `FactorisedHead` or a `MaskedBitHead`, for which the transformer ends without a norm, or a `BinaryFlowHead`.
        hidden_positions: learned embeddings of the position that is predicted, added to what a `place_head` reads
            (BitDance).
        long_skips: the second half of the blocks also reads the outputs of the first (U-ViT); an odd `depth`.
        dropout: probability at each of the `dropout_places`, in [0, 1).
        dropout_places: what dropout acts on; by default the embedded sequence (`"embeddings"`), attention weights and
            the outputs of attention and MLP (taming's GPT, BERT). LlamaGen leaves out attention weights, RAR has
            `"mlp_hidden"` for the embeddings, Halton-MaskGIT that for these and the MLP's outputs, SEDD the two outputs
            alone.
        drop_path: stochastic depth of the last block, growing linearly from the first.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: settings that do not fit together.
    """

    mask: Tensor | None

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        width: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        mlp_hidden: int | None = None,
        mlp: MLPKind = "gelu",
        mlp_on_grid: bool = False,
        norm: NormKind = "layer",
        norm_epsilon: float = 1e-6,
        norm_first: bool = True,
        norm_affine: bool | None = None,
        norm_bias: bool | None = None,
        final_norm_bias: bool | None = None,
        embedding_norm: bool | Literal["rms"] = False,
        positions: PositionKind = "learned",
        rotary_base: float = 10000.0,
        rotary_offset: float = 0.0,
        start_rotation: Literal["none", "zero"] = "none",
        target_positions: bool | Literal["all"] = False,
        target_rotations: bool = False,
        position_instructions: bool = False,
        token_embedding: InputKind = "table",
        embedded_digits: Sequence[int] | None = None,
        code_dim: int | None = None,
        conditioning: Literal["prefix", "adaln", "prefix_adaln", "added", "adaln_tables"] = "prefix",
        time_steps: int | None = None,
        class_slots: int = 1,
        class_repeats: int = 1,
        condition_width: int | None = None,
        modulation_activation: ModulationActivation = "silu",
        time_waves: int = 128,
        time_base: float = 10000.0,
        time_hidden: int | None = None,
        grid_vocab: int | None = None,
        context_dim: int | None = None,
        context_prefix: int | None = None,
        context_bias: bool | None = None,
        context_pool: tuple[int, int] | None = None,
        condition_positions: bool = False,
        shared_modulation: bool = False,
        registers: int = 0,
        attention_bias: AttentionBias | None = None,
        qk_norm: QueryKeyNorm | None = None,
        out_bias: bool | None = None,
        bias: bool = True,
        head_bias: bool | Literal["place"] | None = None,
        head_transform: bool | Literal["gelu_tanh"] = False,
        tied: bool = False,
        initialization: InitializationKind = "gpt2",
        initial_gates: float | None = None,
        zero_outputs: bool = False,
        visible_start: int = 0,
        place_head: Callable[[BlockSettings, int], IdHead] | None = None,
        hidden_positions: bool = False,
        long_skips: bool = False,
        dropout: float = 0.0,
        dropout_places: Sequence[DropoutPlace] = DROPOUT_PLACES,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout)
        self.modulated = conditioning in ("adaln", "prefix_adaln")
        self.prefix = conditioning in ("prefix", "prefix_adaln") and context_prefix is None
        self.added = conditioning == "added"
        self.tabled = conditioning == "adaln_tables"
        self.causal = layout.attention != "bidirectional"
        check_sizes(width=width, depth=depth, heads=heads, head_dim=head_dim, long_skips=long_skips)
        check_conditioning(
            layout,
            modulated=self.modulated,
            tabled=self.tabled,
            own_width=conditioning in ("prefix", "prefix_adaln") or self.added,
            norm_first=norm_first,
            offsets=condition_positions,
            shared=shared_modulation,
            condition_width=condition_width,
        )
        check_tables(
            layout,
            tabled=self.tabled,
            time_steps=time_steps,
            norm_first=norm_first,
            condition_width=condition_width,
            on_grid=mlp_on_grid,
            registers=registers,
            in_front=self.prefix,
        )
        if modulation_activation != "silu" and not self.modulated:
            raise ValueError(f"modulation_activation={modulation_activation!r} is of conditioning='adaln'")
        if (time_waves, time_base, time_hidden) != (128, 10000.0, None) and not layout.timed:
            raise ValueError("time_waves, time_base and time_hidden are of a generator that tells the time")
        check_layout(
            layout,
            target_positions=bool(target_positions),
            target_rotations=target_rotations,
            on_grid=positions in ("rope_2d", "learned_rope_2d"),
            tied=tied,
            token_embedding=token_embedding,
        )
        if place_head is not None:
            check_place_head(layout, head_transform=bool(head_transform), head_bias=head_bias)
        check_starts(
            layout,
            visible=visible_start,
            registers=registers,
            class_alone=conditioning == "prefix",
            instructed=position_instructions,
            plain=not (target_positions or target_rotations or condition_positions or hidden_positions)
            and grid_vocab is None
            and positions == "rope_2d",
            class_slots=class_slots,
            class_repeats=class_repeats,
            in_front=self.prefix,
            hidden_positions=hidden_positions,
            place_head=place_head is not None,
        )
        if context_prefix is not None:
            check_context_prefix(
                layout,
                places=context_prefix,
                context_dim=context_dim,
                class_alone=conditioning == "prefix",
                plain=not (registers or visible_start or target_positions or position_instructions)
                and class_slots * class_repeats == 1,
            )
        check_context_pool(
            layout,
            pool=context_pool,
            context_dim=context_dim,
            alone=class_slots * class_repeats == 1 and not context_prefix,
        )
        if rotary_offset and positions != "rope_2d":
            raise ValueError(f"rotary_offset={rotary_offset} is of positions='rope_2d', got {positions!r}")
        self.visible_start = visible_start
        # Positions that are predicted together: the elements that a block of them is predicted from.
        self.block_size = layout.block_size if self.causal else 0
        if grid_vocab is not None and grid_vocab < 1:
            raise ValueError(f"grid_vocab must be at least 1, got {grid_vocab}")
        self.grid_vocab, self.context_dim = grid_vocab, context_dim

        self.width, self.depth, self.heads = width, depth, heads
        self.class_slots, self.class_repeats = class_slots, class_repeats
        # What stands before the tokens: registers, and the class or what a first token is predicted from; in blocks
        # also what the others of the first block are predicted from.
        queries = max(self.block_size - 1, 0)
        in_front = class_slots * class_repeats if self.prefix else int(self.causal)
        self.starts = registers + (context_prefix or in_front) + queries
        # What stands in the sequence at most: a causal backbone never reads the last block.
        self.instructed = position_instructions
        self.elements = self.starts + layout.positions * (1 + self.instructed) - self.block_size
        condition_width = condition_width or width
        affine = not (self.modulated or self.tabled) if norm_affine is None else norm_affine
        own: Literal["own", "shared"] = "shared" if shared_modulation else "own"
        biases = {"attention_bias": attention_bias, "out_bias": out_bias, "norm_bias": norm_bias}
        settings = BlockSettings.of_width(
            width,
            heads,
            head_dim=head_dim,
            mlp_hidden=mlp_hidden,
            gated=mlp in ("swiglu", "glu"),
            bias=bias,
            **{name: value for name, value in biases.items() if value is not None},
            norm=norm,
            norm_epsilon=norm_epsilon,
            norm_first=norm_first,
            norm_affine=affine,
            modulation=own if self.modulated else None,
            modulation_activation=modulation_activation,
            mlp=mlp,
            qk_norm=qk_norm,
            condition_width=condition_width,
            dropout=dropout,
            dropout_places=tuple(dropout_places),
            context_dim=None if context_prefix else width if context_pool else context_dim,
            context_bias=context_bias,
            mlp_grid=layout.grid if mlp_on_grid else None,
        )
        self.head_dim = settings.head_dim
        # The head reads hidden states, which have seen what there is to attend to.
        head = None if place_head is None else place_head(replace(settings, context_dim=None), layout.vocab_size)
        check_blocks(layout, head)

        # The input.
        self.token_embedding = embed_tokens(
            layout,
            width,
            kind=token_embedding,
            sub_tokens=None if head is None else head.sub_tokens,
            digits=embedded_digits,
            code_dim=code_dim,
        )
        self.class_embedding = self.time_embedding = self.norm_tables = None
        self.context_prefix = self.context_pool = None
        if context_pool is not None and context_dim is not None:
            places, pooling = context_pool
            self.context_pool = ContextPool(context_dim, width, places=places, heads=pooling, epsilon=norm_epsilon)
        elif context_prefix is not None and context_dim is not None:
            self.context_prefix = ContextPrefix(context_dim, width, places=context_prefix)
        elif not self.tabled:
            self.class_embedding = nn.Embedding(layout.num_classes + 1, class_slots * condition_width)
            if layout.timed:
                self.time_embedding = TimeEmbedding(condition_width, time_waves, base=time_base, hidden=time_hidden)
        if self.tabled and time_steps is not None:
            self.norm_tables = nn.ModuleList(
                NormTables(width, steps=time_steps, num_classes=layout.num_classes) for _ in range(depth)
            )
        self.grid_embedding = None if grid_vocab is None else nn.Embedding(grid_vocab + 1, width)
        learned = registers + int(self.causal and not self.prefix and context_prefix is None)
        self.start = nn.Parameter(torch.zeros(1, learned, width)) if learned else None
        self.queries = nn.Parameter(torch.empty(1, queries, width)) if queries else None
        self.positions = Positions(
            layout,
            positions,
            starts=self.starts,
            width=width,
            head_dim=self.head_dim,
            zero_starts=start_rotation == "zero",
            rotary_base=rotary_base,
            rotary_offset=rotary_offset,
            last_turned=target_rotations or position_instructions,
        )
        self.target_embedding = nn.Parameter(torch.empty(layout.positions, width)) if target_positions else None
        self.instructions = None
        if position_instructions:
            self.instructions = PositionInstructions(width, heads=heads, starts=self.starts)
        self.target_of_starts, self.target_rotations = target_positions == "all", target_rotations
        self.embedding_norm = None
        if embedding_norm:
            self.embedding_norm = Norm(width, "rms" if embedding_norm == "rms" else "layer", epsilon=norm_epsilon)
        self.dropout = nn.Dropout(settings.dropout_at("embeddings"))

        # The blocks.
        self.condition_positions = nn.Parameter(torch.empty(self.elements, width)) if condition_positions else None
        modulation = partial(Modulation, activation=modulation_activation)
        self.shared_modulation = modulation(width, width, vectors=6) if shared_modulation else None
        self.blocks = nn.ModuleList(
            Block(replace(settings, drop_path=drop_path * layer / max(depth - 1, 1))) for layer in range(depth)
        )
        self.skips = None
        if long_skips:
            self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))

        # The output.
        self.final_norm = self.final_modulation = self.head = None
        if norm_first and (head is None or head.reads_norm):
            offset = settings.norm_bias and norm == "layer" if final_norm_bias is None else final_norm_bias
            # What a head reads is modulated by none: it has gains whatever the blocks have.
            gains = affine or head is not None or self.tabled
            self.final_norm = Norm(width, norm, affine=gains, bias=offset, epsilon=norm_epsilon)
        self.hidden_positions = nn.Parameter(torch.empty(layout.positions, width)) if hidden_positions else None
        if head is not None:
            head.read_input(self.token_embedding)
            self.place_head = head
        else:
            self.final_modulation = modulation(condition_width, width, vectors=2) if self.modulated else None
            self.head = LogitHead(
                width,
                layout.sub_tokens * layout.outputs,
                positions=layout.positions,
                transform=head_transform,
                bias=bias if head_bias is None else head_bias,
                tied=tied,
                epsilon=norm_epsilon,
            )
        self.tied = tied
        self.activation_checkpointing = activation_checkpointing
        mask = _start_mask(self.elements, visible_start) if visible_start else _scale_mask(layout)
        if self.block_size > 1:
            mask = _block_mask(self.elements, before=self.starts - self.block_size, size=self.block_size)
        self.register_buffer("mask", mask, persistent=False)
        initialise(self, initialization, gates=initial_gates, zero_outputs=zero_outputs)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        given = self._checked(condition)
        labels = given.labels
        assert (time is not None) == self.layout.timed, "the time of a timed layout, and of no other"
        if labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"the labels have the shape {tuple(labels.shape)}; one is needed for each of {len(tokens)} sequences"
            )
        new = tokens.shape[1]
        tokens, again = self._with_start(tokens, cache)
        filled = 0 if cache is None else cache.filled
        class_vectors = labels[:, None] if self.class_embedding is None else self.class_embedding(labels)
        if self.context_pool is not None:
            given, class_vectors = self.context_pool(given)
        hidden = self._embed(tokens, class_vectors, filled, order, given, cache)
        modulating = self._modulating(class_vectors, time, filled, hidden.shape[1])
        tabled = list[tuple[Tensor, ...]]()
        if self.norm_tables is not None:
            assert time is not None
            tabled = [tables(time, labels) for tables in self.norm_tables]
        hidden = self._run_blocks(hidden, modulating, order, cache, given, tabled)
        # Row i of a causal sequence, which predicts token i, is the element a block before it.
        if self.instructions is not None:
            hidden = self.instructions.of(hidden, filled, new, 0 if cache is None else cache.ahead)
        else:
            hidden = hidden[:, -new:] if again else hidden[:, max(self.starts - self.block_size - filled, 0) :]
        if self.head is None:
            if self.final_norm is not None:
                hidden = self.final_norm(hidden)
            if self.hidden_positions is not None:
                places = self._places(order, hidden.device)
                predicts = self._predicted(self.hidden_positions, places, filled, hidden.shape[1])
                return hidden + predicts.to(hidden.dtype)
            # Sharding (FSDP2) hooks on to what comes back, which must not be a view of something else.
            return hidden.clone()
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.final_modulation is not None:
            shift, scale = self._final_modulation(modulating, cache, hidden.shape[1])
            hidden = hidden * (1 + scale) + shift
        # A head that is the same for all positions is spared those that nobody asks for.
        early = predicted is not None and self.layout.sub_tokens == 1 and not self.head.of_positions
        if early:
            hidden = hidden.flatten(0, 1)[predicted]
        tied = None
        if self.tied:
            tied = cast(TokenTable, self.token_embedding).logit_weight()
        logits = self.head(hidden, tied)
        if early:
            return logits
        if self.layout.sub_tokens > 1:
            logits = rearrange(logits, "b n (sub k) -> b (n sub) k", sub=self.layout.sub_tokens)
        return logits if predicted is None else logits.flatten(0, 1)[predicted]

    def _checked(self, given: Condition | Tensor) -> Condition:
        """Make a condition of labels, and refuse one of other parts than are read."""
        condition = as_condition(given)
        places = self.layout.positions
        check_parts(condition, places=places, grid_vocab=self.grid_vocab, context_dim=self.context_dim)
        return condition

    def _with_start(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, bool]:
        """Put the tokens of a visible start, which see those that follow them, before these, to compute them again."""
        if cache is None or cache.filled >= self.visible_start:
            return tokens, False
        again = cache.tokens is not None
        if again:
            tokens = torch.cat((cast(Tensor, cache.tokens), tokens), dim=1)
        cache.begin_again(tokens)
        return tokens, again

    def _embed(
        self,
        tokens: Tensor,
        class_vectors: Tensor,
        filled: int,
        order: Tensor | None,
        given: Condition,
        cache: Cache | None,
    ) -> Tensor:
        """Embed the tokens that follow `filled` elements, and at the beginning what stands before them: `(B, n, D)`."""
        assert order is None or self.layout.any_order, "the layout has one order"
        embedded = self.token_embedding(tokens)
        if self.instructions is not None:
            places = self._places(order, embedded.device)
            ahead = 0 if cache is None else cache.ahead
            embedded = self.instructions(embedded, filled, ahead, places=places, positions=self.positions)
        if filled == 0 and self.starts:
            starts = [] if self.start is None else [self.start.expand(len(class_vectors), -1, -1)]
            if self.prefix:
                starts.append(class_vectors.unflatten(1, (self.class_slots, -1)).repeat(1, self.class_repeats, 1))
            if self.context_prefix is not None:
                starts.append(self.context_prefix(given))
            if self.queries is not None:
                starts.append(self.queries.expand(len(class_vectors), -1, -1))
            embedded = torch.cat((*(start.to(embedded.dtype) for start in starts), embedded), dim=1)
        self._check_count(filled, embedded.shape[1])
        if self.added:
            embedded = embedded + class_vectors[:, None]
        embedded = self.positions.add(embedded, filled, order)
        if self.target_embedding is not None:
            places = self._places(order, tokens.device)
            front = self.target_of_starts
            embedded = embedded + self._of_targets(
                self.target_embedding, places, filled, embedded.shape[1], front=front
            )
        grid = given.grid
        if self.grid_embedding is not None and grid is not None:
            ids = grid if order is None else grid.gather(1, order)
            embedded = embedded + self._of_targets(self.grid_embedding.weight, ids, filled, embedded.shape[1])
        if self.embedding_norm is not None:
            embedded = self.embedding_norm(embedded)
        return self.dropout(embedded)

    def _check_count(self, filled: int, count: int) -> None:
        if filled + count > self.elements:
            raise ValueError(
                f"the sequence has positions for {self.elements} elements (start included), got {filled + count}: "
                f"a {self.layout.attention} backbone reads at most {self.elements - self.starts} tokens"
            )
        blocks = self.block_size
        if blocks > 1 and ((filled + count - self.starts) % blocks or (filled and count != blocks)):
            raise ValueError(
                f"this backbone reads whole blocks of {blocks} tokens, one at a time behind the first pass with a "
                f"cache, got {count - (0 if filled else self.starts)} tokens"
            )
        ends = list(accumulate(self.layout.scales))
        if ends and filled + count not in ends:
            raise ValueError(
                f"a block-causal backbone reads whole scales, which end at {ends}, got {filled + count} elements"
            )
        if filled and ends and ends.index(filled + count) != ends.index(filled) + 1:
            raise ValueError("a block-causal backbone with a cache reads one scale at a time")

    def _of_targets(self, table: Tensor, ids: Tensor, filled: int, count: int, *, front: bool = False) -> Tensor:
        """Take the rows of what each element predicts, `ids (B or 1, N)` in the sequence's order: `(B or 1, count, D)`;
        for the elements before the first that of the first if `front`, else zeros."""
        before = max(self.starts - self.block_size - filled, 0)
        targets = self._predicted(table, ids, filled, count - before)
        if front and before:
            return torch.cat((targets[:, :1].expand(-1, before, *targets.shape[2:]), targets), dim=1)
        return nn.functional.pad(targets, (0, 0, before, 0))

    def _predicted(self, table: Tensor, ids: Tensor, filled: int, rows: int) -> Tensor:
        """Embed the ids `(B or 1, N)` of the next `rows` positions that are predicted behind `filled` elements:
        `(B or 1, rows, D)`."""
        first = max(filled - self.starts + self.block_size, 0)
        return table[ids[:, first : first + rows]]

    def _turned_to_targets(self, own: Tensor, order: Tensor | None, filled: int, count: int) -> Tensor:
        """Give the rotations of queries, `(B or 1, heads, count, head_dim / 2, 2)`: the second half of the heads have
        those of the positions that are predicted, in front that of the first."""
        table = cast(Tensor, self.positions.table)
        places = self._places(order, own.device) + self.starts
        targets = self._of_targets(table, places, filled, count, front=True)[:, None]
        first = self.heads // 2
        own = own.expand(len(places), first, -1, -1, -1)
        return torch.cat((own, targets.expand(-1, self.heads - first, -1, -1, -1)), dim=1)

    def _places(self, order: Tensor | None, device: torch.device) -> Tensor:
        """List the positions in the sequence's order, `(B or 1, N)`."""
        return torch.arange(self.layout.positions, device=device)[None] if order is None else order

    def _modulating(self, class_vectors: Tensor, time: Tensor | None, filled: int, count: int) -> Tensor | None:
        """Add up what modulates: `(B, 1, D)`, or `(B, count, D)` where it changes along the sequence; None for a prefix
        alone."""
        if not self.modulated:
            return None
        condition = class_vectors[:, None]
        if time is not None and self.time_embedding is not None:
            condition = condition + self.time_embedding(time)[:, None]
        if self.condition_positions is not None:
            condition = condition + self.condition_positions[filled : filled + count]
        return condition

    def _run_blocks(
        self,
        hidden: Tensor,
        condition: Tensor | None,
        order: Tensor | None,
        cache: Cache | None,
        given: Condition,
        tabled: list[tuple[Tensor, ...]],
    ) -> Tensor:
        filled, count = 0 if cache is None else cache.filled, hidden.shape[1]
        rotary: Rotary | None = None
        if self.instructions is not None:
            ahead = 0 if cache is None else cache.ahead
            numbers = self.instructions.numbers(filled, self.instructions.tokens(filled, count, ahead), ahead)
            rotary = self.positions.of(self._places(order, hidden.device), numbers, starts=filled == 0)
        else:
            rotary = self.positions.rotary(filled, count, order)
        if rotary is not None and self.target_rotations:
            rotary = self._turned_to_targets(cast(Tensor, rotary), order, filled, count), cast(Tensor, rotary)
        # The mask says all of a first pass, and a later one sees everything.
        mask = None if self.mask is None or filled else self.mask[:count, :count]
        causal = self.layout.attention == "causal" and self.block_size == 1
        if self.context_prefix is not None:
            mask = self.context_prefix.mask(given, filled=filled, count=count)
        prepared = tabled or ([] if cache is None else cache.modulations)
        shared: Modulating | None = condition
        if condition is not None and self.shared_modulation is not None and not prepared:
            shared = torch.cat(self.shared_modulation(condition), dim=-1)
        checkpointed, kept = self.activation_checkpointing and self.training, []
        for layer, block in enumerate(self.blocks):
            if self.skips is not None and layer > self.depth // 2:
                hidden = self.skips[layer - self.depth // 2 - 1](torch.cat((hidden, kept.pop()), dim=-1))
            modulation = prepared[layer] if prepared else shared
            context: Context | None = cache.context[layer] if cache is not None and cache.context else given.context
            keys = None if cache is None else cache.layer(layer)
            arguments = (hidden, modulation, rotary, mask, causal, keys, context, given.context_mask)
            if checkpointed:
                hidden = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                hidden = block(*arguments)
            if self.skips is not None and layer < self.depth // 2:
                kept.append(hidden)
        if cache is not None and cache.holds_keys:
            cache.advance(count - cache.ahead)
        return hidden

    def _final_modulation(self, condition: Tensor | None, cache: Cache | None, rows: int) -> tuple[Tensor, ...]:
        if cache is not None and cache.modulations:
            return cache.modulations[-1]
        assert condition is not None and self.final_modulation is not None
        return self.final_modulation(condition if condition.shape[1] == 1 else condition[:, -rows:])

    def fsdp_units(self) -> Iterable[nn.Module]:
        return self.blocks

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        given = self._checked(condition)
        labels, pooled = given.labels, None
        if self.context_pool is not None:
            given, pooled = self.context_pool(given)
        vectors = given.context
        blocks = cast(Sequence[Block], self.blocks)
        context: list[tuple[Tensor, Tensor]] = []
        if vectors is not None and self.context_prefix is None:
            context = [cast(ContextAttention, block.context_attention).keys_and_values(vectors) for block in blocks]
        modulations: list[tuple[Tensor, ...]] = []
        if self.modulated and self.condition_positions is None and not self.layout.timed:
            if pooled is None:
                pooled = cast(nn.Embedding, self.class_embedding)(labels)
            modulating = pooled[:, None]
            shared = modulating
            if self.shared_modulation is not None:
                shared = torch.cat(self.shared_modulation(modulating), dim=-1)
            modulations = [block.modulate(shared) for block in blocks]
            if self.final_modulation is not None:
                modulations.append(self.final_modulation(modulating))
        if not self.causal:
            return Cache(modulations, None, context=context)
        weight = blocks[0].attention.out.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        buffers = new_buffers(
            layers=self.depth,
            batch=len(labels),
            heads=self.heads,
            length=self.elements,
            head_dim=self.head_dim,
            device=weight.device,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
        )
        return Cache(modulations, buffers, context=context)


def _start_mask(elements: int, visible: int) -> Tensor:
    """Mask `(n, n)` bool: each element sees those before it and itself, the first `visible` also one another."""
    mask = torch.ones(elements, elements, dtype=torch.bool).tril()
    mask[:visible, :visible] = True
    return mask


def _block_mask(elements: int, *, before: int, size: int) -> Tensor:
    """Mask `(n, n)` bool: `before` elements see those before them and themselves, then each block also itself."""
    number = torch.arange(elements)
    block = torch.where(number < before, number, before + (number - before).div(size, rounding_mode="floor"))
    return block[:, None] >= block


def _scale_mask(layout: SequenceLayout) -> Tensor | None:
    """Mask `(N, N)` bool: each position sees the scales before its own, and its own."""
    if not layout.scales:
        return None
    counts = torch.tensor(layout.scales)
    scale = torch.arange(len(counts)).repeat_interleave(counts, output_size=sum(layout.scales))
    return scale[:, None] >= scale
