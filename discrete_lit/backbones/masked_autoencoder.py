"""The network of masked autoregression over vectors (Li et al., "MAR", 2024; He et al., "Masked Autoencoders", 2022).

An encoder reads the places that are known and nothing else, a decoder reads all places with a mask vector at the
others, and gives a hidden state z for each, of which a head draws its vector (`token_diffusion.py`). The class fills a
buffer of slots in front of both.

A grid of ids d may be given too (DisCon, 2025; MixAR, 2026): `Fusion` says how. Or vectors that all blocks attend to,
such as the features of a text (Fan et al., "Fluid", 2024).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.backbone import SequenceLayout
from discrete_lit.backbones.blocks import Block, BlockSettings, MLPKind, QueryKeyNorm
from discrete_lit.backbones.condition import Condition, as_condition, check_parts
from discrete_lit.backbones.embeddings import Positions
from discrete_lit.backbones.execution import count_flops
from discrete_lit.backbones.layers import Linear, Norm, NormKind

Fusion = Literal["prefix", "mix", "add", "cross"]


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """The places that a generator of vectors models; it asks for a network by calling `backbone(layout)`.

    Attributes:
        dim: D, of the vector at each place.
        grid: rows and columns of the places, in raster order, or `(N,)` of a sequence without any.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        grid_vocab: ids that may be given beside the label; None for none.
        grid_length: how many of them, where they are not one for each place.
    """

    dim: int
    grid: tuple[int, ...]
    num_classes: int
    grid_vocab: int | None = None
    grid_length: int | None = None

    @property
    def length(self) -> int:
        """N, the number of places."""
        return prod(self.grid)

    @property
    def grid_ids(self) -> int:
        """The number of ids that may be given beside the label."""
        return self.length if self.grid_length is None else self.grid_length


class MaskedAutoencoder(nn.Module):
    """Make a hidden state for every place from the places that are known.

    MAR-B, L and H have widths 768, 1024 and 1280, depths 12, 16 and 20 of the encoder and the decoder each, and 12, 16
    and 16 heads.

    Args:
        layout: the places; a generator gives it.
        width: of the encoder.
        depth: blocks of the encoder.
        heads: of its attention.
        decoder_width, decoder_depth, decoder_heads: of the decoder; as the encoder's by default.
        mlp_ratio: inner width of the MLPs over the width.
        buffer: slots of the class in front of the sequence; 64 in MAR.
        fusion: what a grid of ids does, where the layout has one: stand in front of the sequence, in slots of its own
            (`"prefix"`: DisCon), take the place of the mask vector (`"mix"`: MixAR), be added at every place
            (`"add"`), or be attended to by every block (`"cross"`). `"mix"` and `"add"` need an id for each place.
        context_dim: E, width of the vectors that the condition has for every block to attend to; none by default.
        positions: of the places: learned vectors added in front of encoder and decoder (`"learned"`: MAR), or these and
            rotations of queries and keys along both axes of the grid (`"learned_rope_2d"`).
        class_added: add the class at every place of encoder and decoder too, not in the slots alone.
        mlp, norm, qk_norm: of the blocks, see `BlockSettings`; MAR has the defaults.
        zero_outputs: the last layer of every residual branch is 0 at the start, as in `Transformer`.
        dropout: of attention weights and residual branches; 0.1 in MAR's training.
        position_std: deviation of the learned positions of encoder and decoder at the start. With MAR's 0.02, positions
            are small beside the vectors at first, which a short training does not make up for.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range, or a fusion that the layout cannot hold.
    """

    def __init__(
        self,
        layout: VectorLayout,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        fusion: Fusion = "prefix",
        context_dim: int | None = None,
        positions: Literal["learned", "learned_rope_2d"] = "learned",
        class_added: bool = False,
        mlp: MLPKind = "gelu",
        norm: NormKind = "layer",
        qk_norm: QueryKeyNorm | None = None,
        zero_outputs: bool = False,
        dropout: float = 0.0,
        position_std: float = 0.02,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_fusion(layout, fusion, context_dim)
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1: the class stands in it; got {buffer}")
        if position_std <= 0:
            raise ValueError(f"position_std must be above 0, got {position_std}")
        if positions not in ("learned", "learned_rope_2d"):
            raise ValueError(f"positions must be 'learned' or 'learned_rope_2d', got {positions!r}")
        if positions == "learned_rope_2d" and len(layout.grid) != 2:
            raise ValueError(
                f"positions='learned_rope_2d' needs places on a grid of rows and columns, the layout has {layout.grid}"
            )
        decoder_width = decoder_width or width
        decoder_heads = decoder_heads or heads
        dim, length, grid_vocab = layout.dim, layout.length, layout.grid_vocab
        self.layout = layout
        self._flops: dict[tuple[int, int, int], int] = {}
        self.buffer = buffer
        self.fusion: Fusion = fusion
        self.context_dim = context_dim
        self.hidden_width = decoder_width
        self.activation_checkpointing = activation_checkpointing
        prefix = layout.grid_ids if grid_vocab is not None and fusion == "prefix" else 0
        crossed = grid_vocab is not None and fusion == "cross"
        attended = width if crossed else context_dim
        self.slots = buffer + prefix

        self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        self.input_projection = Linear(dim, width)
        self.encoder_positions = nn.Parameter(torch.empty(self.slots + length, width))
        self.input_norm = Norm(width, "layer")
        blocks = partial(
            _blocks,
            mlp_ratio=mlp_ratio,
            mlp=mlp,
            norm=norm,
            qk_norm=qk_norm,
            dropout=dropout,
            context_dim=attended,
        )
        self.encoder = blocks(width, depth=depth, heads=heads)
        self.encoder_norm = Norm(width, norm)

        self.decoder_projection = Linear(width, decoder_width)
        self.mask_vector = nn.Parameter(torch.empty(decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(self.slots + length, decoder_width))
        self.decoder = blocks(
            decoder_width, depth=depth if decoder_depth is None else decoder_depth, heads=decoder_heads
        )
        self.decoder_norm = Norm(decoder_width, norm)
        self.hidden_positions = nn.Parameter(torch.empty(length, decoder_width))
        # Its last row is that of no grid, for guidance.
        self.grid_embedding = None
        if grid_vocab is not None:
            of_encoder = fusion in ("prefix", "cross")
            self.grid_embedding = nn.Embedding(grid_vocab + 1, width if of_encoder else decoder_width)
        self.context_positions = nn.Parameter(torch.empty(layout.grid_ids, width)) if crossed else None
        self.encoder_rotations = self.decoder_rotations = None
        self.encoder_class_embedding = self.decoder_class_embedding = None
        if positions == "learned_rope_2d":
            self.encoder_rotations = self._rotations(width, heads)
            self.decoder_rotations = self._rotations(decoder_width, decoder_heads)
        if class_added:
            self.encoder_class_embedding = nn.Embedding(layout.num_classes + 1, width)
            self.decoder_class_embedding = nn.Embedding(layout.num_classes + 1, decoder_width)
        self._initialise(position_std, zero_outputs=zero_outputs)

    def _rotations(self, width: int, heads: int) -> Positions:
        """Make the rotations of the places, in front of which the slots stay as they are."""
        layout = self.layout
        grid = SequenceLayout(1, layout.grid, num_classes=layout.num_classes, attention="bidirectional")
        return Positions(grid, "rope_2d", starts=self.slots, width=width, head_dim=width // heads)

    def _initialise(self, position_std: float, *, zero_outputs: bool) -> None:
        """Initialise as MAR: linear layers by Xavier's uniform law, what is learned beside them normal (0.02)."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight") or ".norms." in name:
                continue
            if zero_outputs and name.endswith(("out.weight", "contract.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 and name.endswith("weight") and "embedding" not in name:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                of_position = name in ("encoder_positions", "decoder_positions")
                nn.init.normal_(parameter, std=position_std if of_position else 0.02)

    def forward(
        self,
        vectors: Tensor,
        masked: Tensor,
        condition: Condition | Tensor,
        *,
        known: int,
        uneven: bool = False,
    ) -> Tensor:
        """Make the hidden state of every place.

        Args:
            vectors: `(B, N, D)`; what stands where `masked` is true is not read.
            masked: `(B, N)` bool, the places that are not known.
            condition: the labels `(B,)` int64 in [0, num_classes]; or these with a grid `(B, grid_ids)` int64 of ids in
                [0, grid_vocab], where the layout has one, of which `grid_vocab` stands for none, and vectors, where the
                network attends to some.
            known: how many places are known in each sequence, or at most where it is `uneven`. A number that the host
                knows: nothing waits for a device.
            uneven: whether sequences have different numbers of known places.

        Returns:
            `(B, N, W)`.

        Raises:
            ValueError: a part of the condition is missing, or one is given that the network does not read.
        """
        condition, layout = as_condition(condition), self.layout
        check_parts(condition, places=layout.grid_ids, grid_vocab=layout.grid_vocab, context_dim=self.context_dim)
        # Known places first, in raster order.
        places = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :known]
        encoded = self.encode(vectors, places, condition, masked=masked if uneven else None)
        return self._decode(encoded, places, condition, masked=masked)

    def encode(
        self, vectors: Tensor, places: Tensor, condition: Condition | Tensor, *, masked: Tensor | None = None
    ) -> Tensor:
        """Encode the slots and the vectors at `places (B, n)`: `(B, slots + n, W)`.

        Args:
            vectors, condition: as for `forward`.
            masked: `(B, N)` bool, where some of the places are masked, which nobody then sees.
        """
        condition = as_condition(condition)
        slots = self.class_embedding(condition.labels)[:, None].expand(-1, self.buffer, -1)
        if self.grid_embedding is not None and self.fusion == "prefix" and condition.grid is not None:
            slots = torch.cat((slots, self.grid_embedding(condition.grid)), dim=1)
        seen = self.input_projection(vectors.gather(1, _wide(places, vectors)))
        positions = self.encoder_positions[self.slots :][places]
        if self.encoder_class_embedding is not None:
            positions = positions + self.encoder_class_embedding(condition.labels)[:, None]
        hidden = torch.cat((slots + self.encoder_positions[: self.slots], seen + positions), dim=1)
        rotary = mask = None
        if self.encoder_rotations is not None:
            rotary = self.encoder_rotations.rotary(0, hidden.shape[1], places)
        if masked is not None:
            # Behind the known places of a sequence that has fewer stand masked ones, which nobody sees.
            visible = ~masked.gather(1, places)
            mask = torch.cat((visible.new_ones(len(visible), self.slots), visible), dim=1)[:, None, None]
        hidden = self._run(self.encoder, self.input_norm(hidden), condition, rotary=rotary, mask=mask)
        return self.encoder_norm(hidden)

    def _attended(self, condition: Condition) -> tuple[Tensor | None, Tensor | None]:
        """Give the vectors that the blocks attend to, `(B, M, E)`, and which of them are valid."""
        if self.context_positions is None or self.grid_embedding is None or condition.grid is None:
            return condition.context, condition.context_mask
        # The id of no grid has an embedding of its own: nothing is masked.
        return self.grid_embedding(condition.grid) + self.context_positions, None

    def _decode(self, encoded: Tensor, places: Tensor, condition: Condition, *, masked: Tensor) -> Tensor:
        grid = condition.grid
        embedded = self.decoder_projection(encoded)
        slots, seen = embedded[:, : self.slots], embedded[:, self.slots :]
        blank = self.mask_vector.to(embedded.dtype).expand(len(embedded), self.layout.length, -1)
        if self.grid_embedding is not None and self.fusion == "mix" and grid is not None:
            blank = self.grid_embedding(grid).to(embedded.dtype)
        hidden = torch.where(masked[..., None], blank, blank.scatter(1, _wide(places, blank), seen))
        if self.grid_embedding is not None and self.fusion == "add" and grid is not None:
            hidden = hidden + self.grid_embedding(grid)
        if self.decoder_class_embedding is not None:
            hidden = hidden + self.decoder_class_embedding(condition.labels)[:, None]
        hidden = torch.cat((slots, hidden), dim=1) + self.decoder_positions
        rotary = None
        if self.decoder_rotations is not None:
            rotary = self.decoder_rotations.rotary(0, hidden.shape[1], None)
        hidden = self.decoder_norm(self._run(self.decoder, hidden, condition, rotary=rotary))
        return hidden[:, self.slots :] + self.hidden_positions

    def _run(
        self,
        blocks: nn.ModuleList,
        hidden: Tensor,
        condition: Condition,
        *,
        rotary: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        context, valid = self._attended(condition)
        for block in blocks:
            arguments = (hidden, None, rotary, mask, False, None, context, valid)
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                hidden = block(*arguments)
        return hidden

    def flops(self, batch: int, known: int, context: int = 0) -> int:
        """Count the floating-point operations of a pass over B sequences with `known` places, which are given `context`
        vectors each, once for each shape."""
        key = batch, known, context
        if key not in self._flops:
            self._flops[key] = count_flops(self, lambda network: network.eval()._pass(*key))
        return self._flops[key]

    def _pass(self, batch: int, known: int, context: int) -> Callable[[], Tensor]:
        length, device = self.layout.length, self.mask_vector.device
        vectors = torch.zeros(batch, length, self.layout.dim, device=device, dtype=self.mask_vector.dtype)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        grid = None if self.layout.grid_vocab is None else labels[:, None].expand(-1, self.layout.grid_ids)
        given = None if self.context_dim is None else vectors.new_zeros(batch, context, self.context_dim)
        masked = torch.ones(batch, length, dtype=torch.bool, device=device)
        return partial(self, vectors, masked, Condition(labels=labels, grid=grid, context=given), known=known)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks of encoder and decoder."""
        return (*self.encoder, *self.decoder)


def _check_fusion(layout: VectorLayout, fusion: Fusion, context_dim: int | None) -> None:
    if fusion not in ("prefix", "mix", "add", "cross"):
        raise ValueError(f"fusion must be 'prefix', 'mix', 'add' or 'cross', got {fusion!r}")
    if layout.grid_vocab is None:
        if fusion != "prefix":  # the default
            raise ValueError(f"fusion={fusion!r} says how a grid of ids enters, and this network is given none")
        return
    if fusion == "cross" and context_dim is not None:
        raise ValueError(
            f"fusion='cross' attends to the grid of ids, context_dim={context_dim} to other vectors: a block attends "
            "to one of them"
        )
    if fusion in ("mix", "add") and layout.grid_ids != layout.length:
        raise ValueError(
            f"fusion={fusion!r} needs an id for each of the {layout.length} places, d has {layout.grid_ids} ids, which "
            "do not stand for squares of places: use fusion='prefix' or 'cross'"
        )


def _blocks(width: int, *, depth: int, heads: int, mlp_ratio: float, **settings: Any) -> nn.ModuleList:
    if width % heads:
        raise ValueError(f"a width of {width} is not a multiple of its {heads} heads")
    block = BlockSettings(
        width=width, heads=heads, head_dim=width // heads, mlp_hidden=round(mlp_ratio * width), **settings
    )
    return nn.ModuleList(Block(block) for _ in range(depth))


def _wide(places: Tensor, vectors: Tensor) -> Tensor:  # (B, n) to an index (B, n, D) of vectors (B, N, D)
    return places[..., None].expand(-1, -1, vectors.shape[-1])
