"""DiT: a transformer over the patches of a noisy latent (Peebles & Xie, "Scalable Diffusion Models with Transformers").

The blocks are those of every generator here, modulated by the time and the class (adaLN-Zero).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import Block, BlockSettings, MLPKind, Modulation, QueryKeyNorm
from discrete_lit.backbones.denoising_network import DenoisingNetwork, LatentLayout, nearest_grid
from discrete_lit.backbones.embeddings import (
    TimeEmbedding,
    grid_coordinates,
    made_again,
    rotary_table,
    sine_cosine_table,
)
from discrete_lit.backbones.layers import Linear, Norm, NormKind


class DiT(DenoisingNetwork):
    """Embed patches, run modulated blocks over them in raster order, and predict each patch.

    By default it is DiT's and SiT's. LightningDiT (Yao et al., "Reconstruction vs. Generation", 2025) has
    `norm="rms"`, `mlp="swiglu"`, `qk_norm="rms"` and `rotary=True`. A context is added to the patches' embeddings, as
    the ids of a grid are in GLM-Image (2026). Vectors stand in front of the patches in one sequence ("in-context
    conditioning" of the paper, section 3.2), without positions of their own.

    Args:
        layout: the latents; a generator gives it.
        width: D; a multiple of `heads` unless `head_dim` is given. S, B, L and XL have 384, 768, 1024 and 1152.
        depth: blocks: 12, 12, 24 and 28.
        heads: attention heads: 6, 12, 16 and 16.
        head_dim: width of a head.
        patch_size: p, the side of a patch; divides both sides of the grid.
        mlp_hidden: inner width of the MLP; by default 4 x width, if gated 8/3 x width rounded up to a multiple of 64.
        mlp, norm, norm_epsilon, qk_norm, bias: of the blocks, see `BlockSettings`.
        positions: added to the patches: fixed sines and cosines of the column, then of the row; learned; or none.
        rotary: also turn queries and keys by row and column (RoPE).
        rotary_base: of rotary positions: their wavelengths are 2 pi rotary_base^(2i / d).
        dropout: on attention weights and residual branches, in [0, 1).
        drop_path: stochastic depth of the last block, growing linearly from the first.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: settings that do not fit together, or a patch size that does not divide the grid.
    """

    position_table: Tensor | None
    rotary_table: Tensor | None

    def __init__(
        self,
        layout: LatentLayout,
        *,
        width: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        patch_size: int = 2,
        mlp_hidden: int | None = None,
        mlp: MLPKind = "gelu_tanh",
        norm: NormKind = "layer",
        norm_epsilon: float = 1e-6,
        qk_norm: QueryKeyNorm | None = None,
        bias: bool = True,
        positions: Literal["fixed", "learned", "none"] = "fixed",
        rotary: bool = False,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout)
        if min(width, depth, heads, patch_size) < 1:
            raise ValueError(
                f"width, depth, heads and patch_size must be at least 1, got {width}, {depth}, {heads}, {patch_size}"
            )
        if head_dim is None and width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}, or head_dim be given")
        if any(side % patch_size for side in layout.grid):
            raise ValueError(f"patch_size={patch_size} must divide both sides of the latents, {layout.grid}")
        self.width, self.patch_size = width, patch_size
        self.grid = (layout.grid[0] // patch_size, layout.grid[1] // patch_size)
        self.rotary_base = rotary_base
        self.activation_checkpointing = activation_checkpointing
        settings = BlockSettings.of_width(
            width,
            heads,
            head_dim=head_dim,
            mlp_hidden=mlp_hidden,
            gated=mlp == "swiglu",
            bias=bias,
            norm=norm,
            norm_epsilon=norm_epsilon,
            norm_affine=False,
            modulation="own",
            mlp=mlp,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self.head_dim = settings.head_dim

        # The input.
        self.patch_embedding = Linear(layout.channels * patch_size**2, width)
        self.time_embedding = TimeEmbedding(width)
        self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        self.context_embedding = None
        if layout.context_channels is not None:
            self.context_embedding = Linear(layout.context_channels, width)
        self.vector_embedding = None if layout.vectors is None else Linear(layout.vectors[1], width)
        self.prefix = 0 if layout.vectors is None else layout.vectors[0]
        length = self.grid[0] * self.grid[1]
        self.position_embedding = nn.Parameter(torch.empty(length, width)) if positions == "learned" else None
        self.register_buffer(
            "position_table", self._positions().float() if positions == "fixed" else None, persistent=False
        )
        self.register_buffer("rotary_table", self._rotations().float() if rotary else None, persistent=False)

        # The blocks and the output.
        self.blocks = nn.ModuleList(
            Block(replace(settings, drop_path=drop_path * layer / max(depth - 1, 1))) for layer in range(depth)
        )
        self.final_norm = Norm(width, norm, affine=False, epsilon=norm_epsilon)
        self.final_modulation = Modulation(width, width, vectors=2)
        self.output = Linear(width, layout.outputs * patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as DiT: Xavier's uniform law, 0.02 for embeddings, and 0 for modulations and the output."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embeddings = [
            self.class_embedding.weight,
            *(cast(nn.Linear, self.time_embedding.layers[i]).weight for i in (0, 2)),
        ]
        for weight in (*embeddings, *([] if self.position_embedding is None else [self.position_embedding])):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def _positions(self) -> Tensor:
        # The column has the first half of the channels.
        return sine_cosine_table(grid_coordinates(self.grid).flip(1), self.width, dtype=torch.float64)

    def _rotations(self) -> Tensor:
        on_grid = rotary_table(grid_coordinates(self.grid), self.head_dim, base=self.rotary_base, dtype=torch.float64)
        still = torch.tensor((1.0, 0.0), dtype=torch.float64)
        return torch.cat((still.expand(self.prefix, self.head_dim // 2, 2), on_grid))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.position_table is not None:
            self.position_table = made_again(self._positions(), like=self.position_table)
        if self.rotary_table is not None:
            self.rotary_table = made_again(self._rotations(), like=self.rotary_table)
        return self

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor,
        context: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        self._check_input(x, time, labels, context, vectors)
        hidden = self._embed(x, context)
        if vectors is not None:
            assert self.vector_embedding is not None
            hidden = torch.cat((self.vector_embedding(vectors.to(hidden.dtype)), hidden), dim=1)
        condition = (self.time_embedding(time) + self.class_embedding(labels))[:, None]
        checkpointed = self.activation_checkpointing and self.training
        for block in self.blocks:
            if checkpointed:
                hidden = cast(Tensor, checkpoint(block, hidden, condition, self.rotary_table, use_reentrant=False))
            else:
                hidden = block(hidden, condition, self.rotary_table)
        hidden = hidden[:, self.prefix :]
        shift, scale = self.final_modulation(condition)
        predicted = self.output(self.final_norm(hidden) * (1 + scale) + shift)
        height, patch = self.grid[0], self.patch_size
        return rearrange(predicted, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)

    def _embed(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The embedded patches `(B, n, D)`, with their positions and the vectors of a context."""
        patch, weight = self.patch_size, self.patch_embedding.weight
        patches = rearrange(x.to(weight.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
        hidden = self.patch_embedding(patches)
        positions = self.position_embedding if self.position_table is None else self.position_table
        if positions is not None:
            hidden = hidden + positions.to(hidden.dtype)
        if context is not None:
            assert self.context_embedding is not None
            vectors = rearrange(nearest_grid(context.to(weight.dtype), self.grid), "b e h w -> b (h w) e")
            hidden = hidden + self.context_embedding(vectors)
        return hidden

    def fsdp_units(self) -> Iterable[nn.Module]:
        return self.blocks
