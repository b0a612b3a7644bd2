"""A transformer over the vectors of a text, which is trained with the generator that attends to what it makes.

- Yu et al., "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation" (Parti), 2022: the encoder of an
  encoder and a decoder, over the ids of the text.
- Fan et al., "Fluid", 2024: the text aligner, over the vectors of a frozen T5.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import Block, BlockSettings, MLPKind, QueryKeyNorm
from discrete_lit.backbones.embeddings import grid_coordinates, sine_cosine_table
from discrete_lit.backbones.layers import Linear, Norm, NormKind


class TextTransformer(nn.Module):
    """Embed the vectors, or the ids, of a text, and run blocks over them that see the text both ways.

    Args:
        input_dim: E, of the vectors of the text encoder; a generator gives it.
        vocab_size: of its ids, where the encoder makes no vectors; None of vectors. A generator gives it too.
        width: W, of what it makes: the `context_dim` of the backbone.
        depth: blocks.
        heads: attention heads.
        mlp_hidden: inner width of the MLP; 4 x width by default.
        mlp, norm, qk_norm: of the blocks, see `BlockSettings`.
        dropout: on attention weights and residual branches, in [0, 1).
        drop_path: stochastic depth of the last block, growing linearly from the first.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: sizes below 1, or a width that is no multiple of the heads, or odd where ids get positions.
    """

    def __init__(
        self,
        input_dim: int,
        vocab_size: int | None,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int | None = None,
        mlp: MLPKind = "gelu",
        norm: NormKind = "layer",
        qk_norm: QueryKeyNorm | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads or (vocab_size is not None and width % 2):
            raise ValueError(
                f"width, depth and heads must be at least 1, and width a multiple of heads, and even where ids are "
                f"read, got {width}, {depth} and {heads}"
            )
        self.width, self.vocab_size = width, vocab_size
        self.activation_checkpointing = activation_checkpointing
        self.embedding: nn.Module = Linear(input_dim, width)
        if vocab_size is not None:
            self.embedding = nn.Embedding(vocab_size, width)
            nn.init.normal_(cast(nn.Embedding, self.embedding).weight, std=0.02)
        settings = BlockSettings(
            width=width,
            heads=heads,
            head_dim=width // heads,
            mlp_hidden=mlp_hidden or 4 * width,
            mlp=mlp,
            norm=norm,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self.blocks = nn.ModuleList(
            Block(replace(settings, drop_path=drop_path * layer / max(depth - 1, 1))) for layer in range(depth)
        )
        self.norm = Norm(width, norm)

    def forward(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Map the vectors of texts to others.

        Args:
            vectors: `(B, M, E)`; of an encoder of ids these, `(B, M, 1)`, which then get the positions of their words,
                as fixed sines and cosines.
            mask: `(B, M)` bool, which of them are valid; all if None. Nobody sees the others.

        Returns:
            `(B, M, W)`.
        """
        if self.vocab_size is None:
            hidden = self.embedding(vectors.to(next(self.parameters()).dtype))
        else:
            hidden = self.embedding(vectors[..., 0].round().long())
            places = grid_coordinates((vectors.shape[1],))
            positions = sine_cosine_table(places, self.width, dtype=torch.float64)
            hidden = hidden + positions.to(hidden)
        seen = None
        if mask is not None:
            # A text without a word sees itself: what is made of it is read by nobody.
            seen = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, hidden, None, None, seen, use_reentrant=False))
            else:
                hidden = block(hidden, None, None, seen)
        return self.norm(hidden)

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks."""
        return self.blocks
