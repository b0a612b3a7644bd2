"""The network of masked autoregression over vectors (Li et al., "MAR", 2024; He et al., "Masked Autoencoders", 2022).

An encoder reads the places that are known and nothing else, a decoder reads all places with a mask vector at the
others, and gives a hidden state z for each, of which a head draws its vector (`token_diffusion.py`). The class fills a
buffer of slots in front of both.

A grid of ids d, aligned with the places, may be given too (DisCon, 2025; MixAR, 2026): `Fusion` says how.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.backbone import count_flops
from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.layers import Linear, Norm

Fusion = Literal["prefix", "mix", "add"]


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """The places that a generator of vectors models; it asks for a network by calling `backbone(layout)`.

    Attributes:
        dim: D, of the vector at each place.
        length: N, places.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        grid_vocab: ids that may be given for every place beside the label; None for none.
    """

    dim: int
    length: int
    num_classes: int
    grid_vocab: int | None = None


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
            (`"prefix"`: DisCon), take the place of the mask vector (`"mix"`: MixAR), or be added at every place
            (`"add"`).
        dropout: of attention weights and residual branches; 0.1 in MAR's training.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range.
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
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if fusion not in ("prefix", "mix", "add"):
            raise ValueError(f"fusion must be 'prefix', 'mix' or 'add', got {fusion!r}")
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1: the class stands in it; got {buffer}")
        decoder_width = decoder_width or width
        dim, length, grid_vocab = layout.dim, layout.length, layout.grid_vocab
        self.layout = layout
        self._flops: dict[tuple[int, int], int] = {}
        self.buffer = buffer
        self.fusion: Fusion = fusion
        self.hidden_width = decoder_width
        self.activation_checkpointing = activation_checkpointing
        prefix = length if grid_vocab is not None and fusion == "prefix" else 0
        self.slots = buffer + prefix

        self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        self.input_projection = Linear(dim, width)
        self.encoder_positions = nn.Parameter(torch.empty(self.slots + length, width))
        self.input_norm = Norm(width, "layer")
        self.encoder = _blocks(width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.encoder_norm = Norm(width, "layer")

        self.decoder_projection = Linear(width, decoder_width)
        self.mask_vector = nn.Parameter(torch.empty(decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(self.slots + length, decoder_width))
        self.decoder = _blocks(
            decoder_width,
            depth=depth if decoder_depth is None else decoder_depth,
            heads=decoder_heads or heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        self.decoder_norm = Norm(decoder_width, "layer")
        self.hidden_positions = nn.Parameter(torch.empty(length, decoder_width))
        # Its last row is that of no grid, for guidance.
        self.grid_embedding = None
        if grid_vocab is not None:
            self.grid_embedding = nn.Embedding(grid_vocab + 1, width if fusion == "prefix" else decoder_width)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as MAR: linear layers by Xavier's uniform law, what is learned beside them normal (0.02)."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            if parameter.ndim == 2 and name.endswith("weight") and "embedding" not in name:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

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
            condition: the labels `(B,)` int64 in [0, num_classes], or these with a grid `(B, N)` int64 of ids in
                [0, grid_vocab], where the layout has one; `grid_vocab` stands for none.
            known: how many places are known in each sequence, or at most where it is `uneven`. A number that the host
                knows: nothing waits for a device.
            uneven: whether sequences have different numbers of known places.
            grid: d, `(B, N)` int64 in [0, grid_vocab]; `grid_vocab` stands for none.

        Returns:
            `(B, N, W)`.

        Raises:
            ValueError: a grid is missing, or one is given that the network does not read.
        """
        condition = as_condition(condition)
        self._check_grid(condition.grid)
        # Known places first, in raster order.
        places = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :known]
        encoded = self.encode(vectors, places, condition, masked=masked if uneven else None)
        return self._decode(encoded, places, masked=masked, grid=condition.grid)

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
        hidden = torch.cat((slots + self.encoder_positions[: self.slots], seen + positions), dim=1)
        mask = None
        if masked is not None:
            # Behind the known places of a sequence that has fewer stand masked ones, which nobody sees.
            visible = ~masked.gather(1, places)
            mask = torch.cat((visible.new_ones(len(visible), self.slots), visible), dim=1)[:, None, None]
        return self.encoder_norm(self._run(self.encoder, self.input_norm(hidden), mask))

    def _check_grid(self, grid: Tensor | None) -> None:
        vocab, length = self.layout.grid_vocab, self.layout.length
        if vocab is None and grid is not None:
            raise ValueError("this network reads no grid of ids beside the label: its layout has no grid_vocab")
        if vocab is not None and (grid is None or grid.shape[1:] != (length,) or grid.is_floating_point()):
            given = "none" if grid is None else f"{grid.dtype} {tuple(grid.shape)}"
            raise ValueError(f"this network reads a grid of {length} ids in [0, {vocab}] for each image, got {given}")

    def _decode(self, encoded: Tensor, places: Tensor, *, masked: Tensor, grid: Tensor | None) -> Tensor:
        embedded = self.decoder_projection(encoded)
        slots, seen = embedded[:, : self.slots], embedded[:, self.slots :]
        blank = self.mask_vector.to(embedded.dtype).expand(len(embedded), self.layout.length, -1)
        if self.grid_embedding is not None and self.fusion == "mix" and grid is not None:
            blank = self.grid_embedding(grid).to(embedded.dtype)
        hidden = torch.where(masked[..., None], blank, blank.scatter(1, _wide(places, blank), seen))
        if self.grid_embedding is not None and self.fusion == "add" and grid is not None:
            hidden = hidden + self.grid_embedding(grid)
        hidden = torch.cat((slots, hidden), dim=1) + self.decoder_positions
        hidden = self.decoder_norm(self._run(self.decoder, hidden, None))
        return hidden[:, self.slots :] + self.hidden_positions

    def _run(self, blocks: nn.ModuleList, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for block in blocks:
            if self.activation_checkpointing and self.training:
                hidden = checkpoint(block, hidden, None, None, mask, use_reentrant=False)
            else:
                hidden = block(hidden, None, None, mask)
        return hidden

    def flops(self, batch: int, known: int) -> int:
        """Count the floating-point operations of a pass over B sequences with `known` places, once for each shape."""
        if (batch, known) not in self._flops:
            self._flops[batch, known] = count_flops(self, lambda network: network.eval()._pass(batch, known))
        return self._flops[batch, known]

    def _pass(self, batch: int, known: int) -> Callable[[], Tensor]:
        length, device = self.layout.length, self.mask_vector.device
        vectors = torch.zeros(batch, length, self.layout.dim, device=device, dtype=self.mask_vector.dtype)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        grid = None if self.layout.grid_vocab is None else labels[:, None].expand(-1, length)
        masked = torch.ones(batch, length, dtype=torch.bool, device=device)
        return partial(self, vectors, masked, Condition(labels=labels, grid=grid), known=known)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks of encoder and decoder."""
        return (*self.encoder, *self.decoder)


def _blocks(width: int, *, depth: int, heads: int, mlp_ratio: float, dropout: float) -> nn.ModuleList:
    if width % heads:
        raise ValueError(f"a width of {width} is not a multiple of its {heads} heads")
    settings = BlockSettings(
        width=width, heads=heads, head_dim=width // heads, mlp_hidden=round(mlp_ratio * width), dropout=dropout
    )
    return nn.ModuleList(Block(settings) for _ in range(depth))


def _wide(places: Tensor, vectors: Tensor) -> Tensor:  # (B, n) to an index (B, n, D) of vectors (B, N, D)
    return places[..., None].expand(-1, -1, vectors.shape[-1])
