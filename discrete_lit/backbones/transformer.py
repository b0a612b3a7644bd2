"""The transformer that every generator shares."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from discrete_lit.backbones.backbone import Backbone, KeyValueCache, SequenceLayout
from discrete_lit.backbones.blocks import Block, Modulation, Norm, NormKind
from discrete_lit.backbones.positions import grid_coordinates, rotary_table

PositionKind = Literal["learned", "rope_1d", "rope_2d"]


class Transformer(Backbone):
    """A pre-norm transformer with the switches of the published models.

    The condition is a class embedding: the first element of the sequence (`conditioning="prefix"`), or a modulation of
    every norm (`"adaln"`), in which case a causal sequence starts with a learned vector instead.

    Args:
        layout: the sequence; a generator gives it.
        width: D; a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        mlp_hidden: inner width of the MLP; by default 4 x width, if gated 8/3 x width rounded up to a multiple of 64.
        norm: `"layer"` or `"rms"`.
        positions: learned embeddings added at the input, or rotary ones along the sequence or along each axis of the
            grid; a prefix stands before the first place of the sequence and is not rotated on a grid.
        conditioning: `"prefix"` or `"adaln"`.
        gated_mlp: SwiGLU in place of GELU.
        qk_norm: RMSNorm of queries and keys.
        bias: of the linear layers and the norms.
        dropout: on embeddings, attention weights and residual branches, in [0, 1).

    Raises:
        ValueError: a width that the heads do not divide.
    """

    rotary: Tensor | None

    def __init__(
        self,
        layout: SequenceLayout,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int | None = None,
        norm: NormKind = "layer",
        positions: PositionKind = "learned",
        conditioning: Literal["prefix", "adaln"] = "prefix",
        gated_mlp: bool = False,
        qk_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(layout)
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if mlp_hidden is None:
            mlp_hidden = -(-8 * width // 3 // 64) * 64 if gated_mlp else 4 * width
        self.width, self.depth, self.heads = width, depth, heads
        self.causal = layout.attention == "causal"
        self.prefix = conditioning == "prefix"
        # What stands before the tokens: the class as a prefix, or what a causal first token is predicted from.
        self.starts = int(self.prefix or self.causal)
        # What stands in the sequence at most: a causal backbone never reads the last token.
        self.places = self.starts + layout.length - int(self.causal)

        self.token_embedding = nn.Embedding(layout.vocab_size + int(layout.mask_token), width)
        self.class_embedding = nn.Embedding(layout.num_classes + 1, width)
        self.start = None if self.prefix or not self.causal else nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = None
        if positions == "learned":
            self.position_embedding = nn.Parameter(torch.empty(1, self.places, width))
            self.register_buffer("rotary", None, persistent=False)
        else:
            table = self._rotary(layout, positions == "rope_2d", width // heads)
            self.register_buffer("rotary", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        modulated = conditioning == "adaln"
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_hidden, norm, modulated, gated_mlp, qk_norm, bias, dropout) for _ in range(depth)
        )
        self.final_modulation = Modulation(width, 2) if modulated else None
        self.final_norm = Norm(width, norm, affine=not modulated, bias=bias)
        self.head = nn.Linear(width, layout.vocab_size, bias=bias)
        self._initialise()

    def _rotary(self, layout: SequenceLayout, axial: bool, head_dim: int) -> Tensor:
        """`(places, head_dim / 2, 2)`."""
        if not axial:
            return rotary_table(torch.arange(self.places)[:, None], head_dim)
        coordinates = grid_coordinates(layout.grid)[: self.places - self.starts]
        start = torch.tensor((1.0, 0.0)).expand(self.starts, head_dim // 2, 2)  # no rotation
        return torch.cat((start, rotary_table(coordinates, head_dim)))

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02, residual outputs scaled by 1 / sqrt(2 depth)."""
        for name, parameter in self.named_parameters():
            if "modulation" in name or parameter.ndim < 2:
                continue
            residual = name.endswith(("out.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.depth) ** 0.5 if residual else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, labels: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        assert cache is None or self.causal, "only a causal backbone has a cache"
        filled = cache.filled if cache is not None else 0
        embedded = self.token_embedding(tokens)
        condition = self.class_embedding(labels)
        if self.starts and filled == 0:
            start = condition[:, None] if self.start is None else self.start.expand(len(labels), -1, -1)
            embedded = torch.cat((start, embedded), dim=1)
        count = embedded.shape[1]
        if filled + count > self.places:
            raise ValueError(
                f"the sequence has places for {self.places} elements (start included), got {filled + count}: "
                f"a {self.layout.attention} backbone reads at most {self.places - self.starts} tokens"
            )
        if self.position_embedding is not None:
            embedded = embedded + self.position_embedding[:, filled : filled + count]
        rotary = self.rotary[filled : filled + count] if self.rotary is not None else None
        hidden = self.dropout(embedded)
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, condition, rotary, self.causal, layer, cache)
        if cache is not None:
            cache.advance(count)
        if not self.causal and self.starts:
            hidden = hidden[:, self.starts :]
        hidden = self.final_norm(hidden)
        if self.final_modulation is not None:
            shift, scale = self.final_modulation(condition)
            hidden = hidden * (1 + scale) + shift
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).float()

    def shards(self) -> Iterable[nn.Module]:
        return self.blocks

    def new_cache(self, batch: int) -> KeyValueCache:
        weight = self.head.weight
        head_dim = self.width // self.heads
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return KeyValueCache(self.depth, batch, self.heads, self.places, head_dim, weight.device, dtype)
