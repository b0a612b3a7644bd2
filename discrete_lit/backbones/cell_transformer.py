"""The network of xAR (Ren et al., "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation", 2025).

A grid of latents is cut into cells, squares of k x k places as a rule, which stand one after another, row by row, and
their places row by row inside. Each place sees its own cell and those before it. A cell has a time of its own, which
says how noisy it is: in training all are noisy, in sampling those before are clean.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.cache import Cache, new_buffers
from discrete_lit.backbones.embeddings import TimeEmbedding, grid_coordinates, made_again, rotary_table
from discrete_lit.backbones.execution import count_flops
from discrete_lit.backbones.layers import Linear, Norm


@dataclass(frozen=True, kw_only=True)
class CellLayout:
    """The cells that a generator models; it asks for a network by calling `backbone(layout)`.

    Attributes:
        channels: C, of the latent at each place.
        grid: (H, W), places.
        cell_size: height and width of a cell, (k, k) in xAR, which divide those of the grid.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
    """

    channels: int
    grid: tuple[int, int]
    cell_size: tuple[int, int]
    num_classes: int

    @property
    def places(self) -> int:
        """P, places of a cell."""
        return self.cell_size[0] * self.cell_size[1]

    @property
    def cells(self) -> int:
        """M, cells of an image."""
        return self.grid[0] * self.grid[1] // self.places

    def to_cells(self, latents: Tensor) -> Tensor:
        """Cut latents `(B, C, H, W)` into cells `(B, M, P, C)`."""
        height, width = self.cell_size
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q) c", p=height, q=width)

    def to_grid(self, cells: Tensor) -> Tensor:
        """Invert `to_cells`."""
        height, width = self.cell_size
        return rearrange(cells, "b (h w) (p q) c -> b c (h p) (w q)", h=self.grid[0] // height, p=height, q=width)


class CellTransformer(nn.Module):
    """Predict each cell from what is left of it in the noise, and from the cells before it.

    Two stacks of blocks, each with learned positions of its own, modulated by the class and by the time of the cell;
    queries and keys are turned by row and column. xAR-B, L and H have widths 768, 1024 and 1280, 8, 16 and 20 blocks in
    each stack, and 12, 16 and 16 heads.

    Args:
        layout: the cells; a generator gives it.
        width: D, a multiple of 4 x heads.
        depth: blocks of the first stack.
        heads: attention heads.
        decoder_depth: blocks of the second stack; as many by default.
        mlp_hidden: inner width of the gated MLPs; 8/3 x width, rounded down, by default.
        rotary_base: the wavelengths of rotary positions are 2 pi rotary_base^(2i / d).
        dropout: of attention weights and residual branches; 0.1 in xAR's training.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range.
    """

    rotary_table: Tensor
    visible: Tensor

    def __init__(
        self,
        layout: CellLayout,
        *,
        width: int = 768,
        depth: int = 8,
        heads: int = 12,
        decoder_depth: int | None = None,
        mlp_hidden: int | None = None,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        decoder_depth = depth if decoder_depth is None else decoder_depth
        if min(width, depth, heads, decoder_depth) < 1 or width % (4 * heads):
            raise ValueError(
                "width, depth, heads and decoder_depth must be at least 1, and width a multiple of 4 x heads, got "
                f"{width}, {depth}, {heads} and {decoder_depth}"
            )
        self.layout = layout
        self.width, self.heads, self.rotary_base = width, heads, rotary_base
        self.activation_checkpointing = activation_checkpointing
        self._flops: dict[tuple[int, int], int] = {}
        length = layout.cells * layout.places
        settings = BlockSettings(
            width=width,
            heads=heads,
            head_dim=width // heads,
            mlp_hidden=mlp_hidden or 8 * width // 3,
            norm="rms",
            norm_affine=False,
            modulation="own",
            mlp="geglu",
            dropout=dropout,
        )

        self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        self.time_embedding = TimeEmbedding(width)
        self.input_projection = Linear(layout.channels, width)
        self.encoder_positions = nn.Parameter(torch.empty(length, width))
        self.input_norm = Norm(width, "rms")
        self.encoder = nn.ModuleList(CellBlock(settings, places=layout.places) for _ in range(depth))
        self.encoder_norm = Norm(width, "rms")
        self.decoder_projection = Linear(width, width)
        self.decoder_positions = nn.Parameter(torch.empty(length, width))
        self.decoder = nn.ModuleList(CellBlock(settings, places=layout.places) for _ in range(decoder_depth))
        self.decoder_norm = Norm(width, "rms")
        self.output = Linear(width, layout.channels)
        self.register_buffer("rotary_table", self._rotations().float(), persistent=False)
        cell = torch.arange(length) // layout.places
        self.register_buffer("visible", cell[:, None] >= cell, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as xAR: linear layers by Xavier's uniform law, modulations too; embeddings normal (0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_embedding.weight, self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table, std=0.02)

    def _rotations(self) -> Tensor:
        """The rotations of the places in the order of the cells, `(N, head_dim / 2, 2)` float64."""
        layout = self.layout
        coordinates = grid_coordinates(layout.grid).T.reshape(1, 2, *layout.grid)
        in_cells = layout.to_cells(coordinates).flatten(0, 2)
        return rotary_table(in_cells, self.width // self.heads, base=self.rotary_base, dtype=torch.float64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.rotary_table = made_again(self._rotations(), like=self.rotary_table)
        return self

    def forward(self, cells: Tensor, time: Tensor, labels: Tensor, cache: Cache | None = None) -> Tensor:
        """Predict the first m cells, or with a cache the one behind those that it holds.

        Args:
            cells: `(B, m, P, C)`, noisy.
            time: `(B, m)` float, how noisy each is, in the units that the generator chose.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            cache: of `new_cache`. The keys and values of a cell are written behind those that it holds, and stay where
                `cache.advance(P)` follows; else the next pass writes over them.

        Returns:
            `(B, m, P, C)`.
        """
        layout, weight = self.layout, self.input_projection.weight
        count, first = cells.shape[1], 0 if cache is None else cache.filled
        assert cells.shape[2:] == (layout.places, layout.channels) and time.shape == cells.shape[:2]
        assert cache is None or count == 1, "a cache is for one cell at a time"
        here = slice(first, first + count * layout.places)
        times = self.time_embedding(time.flatten()).unflatten(0, time.shape)
        condition = self.class_embedding(labels)[:, None] + times
        rotary, mask = self.rotary_table[here], self.visible[here, here] if count > 1 else None

        hidden = self.input_projection(cells.flatten(1, 2).to(weight.dtype)) + self.encoder_positions[here]
        hidden = self._run(self.encoder, self.input_norm(hidden), condition, rotary, mask, cache, 0)
        hidden = self.decoder_projection(self.encoder_norm(hidden)) + self.decoder_positions[here]
        hidden = self._run(self.decoder, hidden, condition, rotary, mask, cache, len(self.encoder))
        return self.output(self.decoder_norm(hidden)).unflatten(1, (count, layout.places))

    def _run(
        self,
        blocks: nn.ModuleList,
        hidden: Tensor,
        condition: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        first: int,
    ) -> Tensor:
        for number, block in enumerate(blocks, first):
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, hidden, condition, rotary, mask, use_reentrant=False))
            else:
                layer = None if cache is None else cache.layer(number)
                hidden = block(hidden, condition, rotary, mask, False, layer)
        return hidden

    def new_cache(self, batch: int) -> Cache:
        """Make room for the keys and values of all cells of B sequences."""
        weight = self.input_projection.weight
        buffers = new_buffers(
            layers=len(self.encoder) + len(self.decoder),
            batch=batch,
            heads=self.heads,
            length=self.layout.cells * self.layout.places,
            head_dim=self.width // self.heads,
            device=weight.device,
            dtype=weight.dtype,
        )
        return Cache([], buffers)

    def flops(self, batch: int, known: int) -> int:
        """Count the floating-point operations of a pass over a cell of B sequences behind `known` others."""
        if (batch, known) not in self._flops:
            self._flops[batch, known] = count_flops(self, lambda network: network.eval()._pass(batch, known))
        return self._flops[batch, known]

    def _pass(self, batch: int, known: int) -> Callable[[], Tensor]:
        layout, weight = self.layout, self.input_projection.weight
        cell = torch.zeros(batch, 1, layout.places, layout.channels, device=weight.device, dtype=weight.dtype)
        zeros, cache = torch.zeros(batch, 1, device=weight.device), self.new_cache(batch)
        cache.advance(known * layout.places)
        return partial(self, cell, zeros, zeros[:, 0].long(), cache)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks of both stacks."""
        return (*self.encoder, *self.decoder)


class CellBlock(Block):
    """A block whose condition is that of a cell: its modulation is computed once for all places of the cell.

    Args:
        settings: of `Block`, with a modulation of its own.
        places: P of a cell.
    """

    def __init__(self, settings: BlockSettings, *, places: int) -> None:
        super().__init__(settings)
        self.places = places

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Make the six vectors of a condition `(B, m, D)`: for one cell `(B, 1, D)` each, else `(B, m P, D)`."""
        vectors = super().modulate(condition)
        if condition.shape[1] == 1:
            return vectors
        return tuple(vector[:, :, None].expand(-1, -1, self.places, -1).flatten(1, 2) for vector in vectors)
