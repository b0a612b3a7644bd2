"""The network of aMUSEd (Patil et al., "aMUSEd: An Open MUSE Reproduction", 2024): convolutions around a transformer.

ConvNeXt blocks with attention to a text stand before and behind a transformer over the grid of masked ids; the first
may halve the grid, the last doubles it again. It is the U-ViT of simple diffusion (Hoogeboom et al., 2023) with one
level, without positions: the convolutions tell where an id stands.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.backbone import Backbone, SequenceLayout
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.condition import Condition, as_condition, check_parts
from discrete_lit.backbones.layers import Linear, Norm, NormKind
from discrete_lit.core.synchronisation import on_device

_WAVES_BASE = 10000.0


class UViT(Backbone):
    """Predict masked ids of a grid given a text, by convolutions and a transformer (aMUSEd; diffusers' `UVit2DModel`).

    The condition's `context` is the pooled text first, then the text's vectors: `(B, 1 + M, E)`. Of an encoder such as
    BERT the first vector, that of [CLS], is the pooled one.
    Labels are not read. Where none is valid, a learned vector stands in the place of each; released models have the
    vectors of the empty text instead, which `Condition.negative` gives.

    aMUSEd-256 is the default but for `layout`; aMUSEd-512 has `downsampled=True`.

    Args:
        layout: bidirectional, over a grid of two dimensions; a generator gives it.
        width: D, of the transformer; a multiple of `heads`.
        depth: its blocks.
        heads: its attention heads.
        mlp_hidden: inner width of its gated MLP (GEGLU).
        context_dim: E, of the pooled text and of the text's vectors.
        embedding_width: of the table of ids, and before the logits.
        conv_width: channels of the convolutions, a multiple of `conv_heads`.
        conv_blocks: ConvNeXt blocks on either side, each with attention to the text behind it.
        conv_heads: heads of that attention.
        downsampled: whether the transformer reads a grid of half the sides.
        micro_conditions: numbers that every sample is given (SDXL): height and width of the picture, of what was cut
            off, and a score of its looks.
        micro_waves: cosines, and as many sines, that embed each.
        bias: of linear layers and convolutions.
        norm_epsilon: of every norm but those of the attention between the convolutions, which have 1e-6.
        activation_checkpointing: keep no activations of the blocks for the backward pass, but compute them again.

    Raises:
        ValueError: a setting out of its range, or another layout.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        width: int = 1024,
        depth: int = 22,
        heads: int = 16,
        mlp_hidden: int = 2816,
        context_dim: int = 768,
        embedding_width: int = 768,
        conv_width: int = 768,
        conv_blocks: int = 3,
        conv_heads: int = 12,
        downsampled: bool = False,
        micro_conditions: tuple[float, ...] = (256, 256, 0, 0, 6),
        micro_waves: int = 128,
        bias: bool = False,
        norm_epsilon: float = 1e-6,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout)
        if layout.attention != "bidirectional" or len(layout.grid) != 2 or layout.sub_tokens > 1 or layout.timed:
            raise ValueError(
                "UViT predicts masked ids of a grid of two dimensions, one at each place, and is told no time; the "
                f"generator's are {layout.attention}, {layout.grid}, {layout.sub_tokens} at each place"
            )
        if min(width, depth, heads, conv_blocks, conv_heads) < 1 or width % heads or conv_width % conv_heads:
            raise ValueError(
                f"heads must divide the width, and there be at least 1 of everything: {width=}, {depth=}, {heads=}, "
                f"{conv_width=}, {conv_blocks=}, {conv_heads=}"
            )
        if downsampled and any(side % 2 for side in layout.grid):
            raise ValueError(f"downsampled halves both sides of the grid, {layout.grid}")
        self.context_dim, self.downsampled = context_dim, downsampled
        self.micro_conditions, self.micro_waves = micro_conditions, micro_waves
        self.activation_checkpointing = activation_checkpointing
        switches: dict[str, Any] = {"bias": bias, "epsilon": norm_epsilon}

        # The text.
        self.no_text = nn.Parameter(torch.zeros(2, context_dim))  # pooled, and in the place of each vector
        self.text_embedding = Linear(context_dim, width, bias=bias)
        self.text_norm = Norm(width, "rms", epsilon=norm_epsilon)
        pooled = context_dim + 2 * micro_waves * len(micro_conditions)
        self.pooled_embedding = nn.Sequential(
            Linear(pooled, width, bias=bias), nn.SiLU(), Linear(width, width, bias=bias)
        )

        # From ids to the transformer, and back.
        self.table = nn.Embedding(layout.vocab_size + int(layout.mask_token), embedding_width)
        self.table_norm = Norm(embedding_width, "rms", epsilon=norm_epsilon)
        self.table_out = Linear(embedding_width, conv_width, bias=bias)
        resized: dict[str, Any] = {"kernel_size": 2, "stride": 2, "bias": bias}
        self.halving_norm = Norm(conv_width, "rms", epsilon=norm_epsilon) if downsampled else None
        self.halving = nn.Conv2d(conv_width, conv_width, **resized) if downsampled else None
        self.before = ConvStage(conv_width, conv_blocks, heads=conv_heads, given=width, **switches)
        self.inner_norm = Norm(conv_width, "rms", epsilon=norm_epsilon)
        self.inner = Linear(conv_width, width, bias=bias)
        self.blocks = nn.ModuleList(TextBlock(width, heads, mlp_hidden=mlp_hidden, **switches) for _ in range(depth))
        self.outer_norm = Norm(width, "rms", epsilon=norm_epsilon)
        self.outer = Linear(width, conv_width, bias=bias)
        self.behind = ConvStage(conv_width, conv_blocks, heads=conv_heads, given=width, **switches)
        self.doubling_norm = Norm(conv_width, "rms", epsilon=norm_epsilon) if downsampled else None
        self.doubling = nn.ConvTranspose2d(conv_width, conv_width, **resized) if downsampled else None
        self.head_in = Linear(conv_width, embedding_width, bias=bias)
        self.head_norm = Norm(embedding_width, "rms", epsilon=norm_epsilon)
        self.head = Linear(embedding_width, layout.outputs, bias=bias, autocast=False)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise normally with deviation 0.02; modulations begin as nothing, and logits at 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                if name.endswith("modulation") or name == "head":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.no_text, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        assert order is None and time is None, "the layout has one order, and no time"
        given = as_condition(condition)
        check_parts(given, places=self.layout.positions, grid_vocab=None, context_dim=self.context_dim)
        if tokens.shape[1] != self.layout.positions:
            raise ValueError(f"the grid {self.layout.grid} has {self.layout.positions} ids, got {tokens.shape[1]}")
        text, pooled, mask = self._text(given)
        height, width = self.layout.grid
        hidden = self.table_out(self.table_norm(self.table(tokens)))
        hidden = rearrange(hidden, "b (h w) c -> b c h w", h=height, w=width)
        if self.halving is not None:
            hidden = self.halving(_over_channels(cast(Norm, self.halving_norm), hidden))
        hidden = self.before(hidden, text, pooled, mask)
        height, width = hidden.shape[2:]
        hidden = self.inner(self.inner_norm(rearrange(hidden, "b c h w -> b (h w) c")))
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                hidden = cast(Tensor, checkpoint(block, hidden, text, pooled, mask, use_reentrant=False))
            else:
                hidden = block(hidden, text, pooled, mask)
        hidden = self.outer(self.outer_norm(hidden))
        hidden = self.behind(rearrange(hidden, "b (h w) c -> b c h w", h=height, w=width), text, pooled, mask)
        if self.doubling is not None:
            hidden = self.doubling(_over_channels(cast(Norm, self.doubling_norm), hidden))
        hidden = self.head_norm(self.head_in(rearrange(hidden, "b c h w -> b (h w) c")))
        return self.head(hidden if predicted is None else hidden.flatten(0, 1)[predicted])

    def _text(self, given: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed the text's vectors `(B, M, D)` and the pooled one `(B, D)`; and which are seen, None for all."""
        assert given.context is not None
        vectors = given.context.to(self.no_text.dtype)
        if vectors.shape[1] < 2:
            raise ValueError("UViT is given the pooled text, then the text's vectors: a context of two vectors or more")
        mask = None
        if given.context_mask is not None:
            nothing = ~given.context_mask.any(dim=1)[:, None]
            places = torch.arange(vectors.shape[1], device=vectors.device).clamp(max=1)
            vectors = torch.where(nothing[..., None], self.no_text[places], vectors)
            mask = (given.context_mask | nothing)[:, None, None, 1:]
        micro = on_device(_waves_of, tuple(self.micro_conditions), self.micro_waves, device=vectors.device).to(vectors)
        pooled = self.pooled_embedding(torch.cat((vectors[:, 0], micro.expand(len(vectors), -1)), dim=1))
        return self.text_norm(self.text_embedding(vectors[:, 1:])), pooled, mask

    def fsdp_units(self) -> Iterable[nn.Module]:
        return (self.before, *self.blocks, self.behind)

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        return Cache([], None)


class ConvStage(nn.Module):
    """Run ConvNeXt blocks, and behind each two attentions to the text.

    Args:
        width: channels.
        blocks: of either kind.
        heads: of the attentions.
        given: width of what the text gives.
        bias, epsilon: as of `UViT`.
    """

    def __init__(self, width: int, blocks: int, *, heads: int, given: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        settings = {"bias": bias, "epsilon": epsilon}
        self.convolutions = nn.ModuleList(ConvNeXtBlock(width, given=given, **settings) for _ in range(blocks))
        self.attentions = nn.ModuleList(TwoAttentions(width, heads, given=given, bias=bias) for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor, pooled: Tensor, mask: Tensor | None) -> Tensor:  # (B, C, H, W)
        height, width = x.shape[2:]
        for convolution, attention in zip(self.convolutions, self.attentions, strict=True):
            x = convolution(x, pooled)
            rows = attention(rearrange(x, "b c h w -> b (h w) c"), text, mask)
            x = rearrange(rows, "b (h w) c -> b c h w", h=height, w=width)
        return x


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt-V2 block (Woo et al., 2023) with RMSNorm and a 3x3 convolution, scaled and shifted by the pooled text.

    Args:
        width: channels; the MLP has four times as many.
        given: width of the pooled text.
        bias, epsilon: as of `UViT`.
    """

    def __init__(self, width: int, *, given: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=bias)
        self.norm = Norm(width, "rms", epsilon=epsilon)
        self.expand = Linear(width, 4 * width, bias=bias)
        self.response_gain = nn.Parameter(torch.zeros(4 * width))
        self.response_offset = nn.Parameter(torch.zeros(4 * width))
        self.contract = Linear(4 * width, width, bias=bias)
        self.modulation = Linear(given, 2 * width, bias=bias)

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:  # (B, C, H, W)
        hidden = F.gelu(self.expand(self.norm(rearrange(self.depthwise(x), "b c h w -> b h w c"))))
        # Global response normalisation: a channel's norm over the picture, beside the mean of all channels'.
        response = torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True)
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        hidden = hidden + self.response_gain * (hidden * response) + self.response_offset
        x = x + rearrange(self.contract(hidden), "b h w c -> b c h w")
        scale, shift = self.modulation(F.silu(pooled))[..., None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class TwoAttentions(nn.Module):
    """Attend to the text twice, in residual branches without an MLP.

    Args:
        width: channels.
        heads: of both.
        given: width of the text's vectors, which are mapped to the channels where that is another.
        bias: as of `UViT`.
    """

    def __init__(self, width: int, heads: int, *, given: int, bias: bool) -> None:
        super().__init__()
        self.text_in = Linear(given, width, bias=bias) if given != width else None
        self.norms = nn.ModuleList(Norm(width, "rms", epsilon=1e-6) for _ in range(2))
        self.attentions = nn.ModuleList(PlainAttention(width, heads, bias=bias) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # (B, N, C)
        text = text if self.text_in is None else self.text_in(F.silu(text))
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), text, mask)
        return x


class TextBlock(nn.Module):
    """Attend to the grid, to the text, then GEGLU; each branch reads a norm that the pooled text scales and shifts.

    The norms in front of attention are RMSNorms, that in front of the MLP is a LayerNorm, as in the released code.

    Args:
        width: D.
        heads: of both attentions.
        mlp_hidden: inner width of the MLP.
        bias, epsilon: as of `UViT`.
    """

    def __init__(self, width: int, heads: int, *, mlp_hidden: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        kinds: tuple[NormKind, ...] = ("rms", "rms", "layer")
        self.norms = nn.ModuleList(PooledNorm(width, kind, bias=bias, epsilon=epsilon) for kind in kinds)
        self.attention = PlainAttention(width, heads, bias=bias)
        self.text_attention = PlainAttention(width, heads, bias=bias)
        self.expand = Linear(width, 2 * mlp_hidden, bias=bias)
        self.contract = Linear(mlp_hidden, width, bias=bias)

    def forward(self, x: Tensor, text: Tensor, pooled: Tensor, mask: Tensor | None) -> Tensor:  # (B, N, D)
        attended = self.norms[0](x, pooled)
        x = x + self.attention(attended, attended)
        x = x + self.text_attention(self.norms[1](x, pooled), text, mask)
        values, gates = self.expand(self.norms[2](x, pooled)).chunk(2, dim=-1)
        return x + self.contract(values * F.gelu(gates))


class PooledNorm(nn.Module):
    """A norm with gains, then `(1 + scale) x + shift`, which the pooled text gives."""

    def __init__(self, width: int, kind: NormKind, *, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.norm = Norm(width, kind, bias=bias and kind == "layer", epsilon=epsilon)
        self.modulation = Linear(width, 2 * width, bias=bias)

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(pooled))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class PlainAttention(nn.Module):
    """Multi-head attention from one sequence to another, without norms or positions."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=bias)
        self.key_value = Linear(width, 2 * width, bias=bias)
        self.out = Linear(width, width, bias=bias)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.key_value(seen), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))


def _waves_of(numbers: tuple[float, ...], waves: int) -> Tensor:
    """Embed numbers by cosines, then sines, each: `(2 waves n,)` float64."""
    frequencies = _WAVES_BASE ** -(torch.arange(waves, dtype=torch.float64) / waves)
    angles = torch.tensor(numbers, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).flatten()


def _over_channels(norm: Norm, x: Tensor) -> Tensor:  # (B, C, H, W)
    return rearrange(norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
