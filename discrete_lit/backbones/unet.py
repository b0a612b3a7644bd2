"""The U-Net of latent diffusion (Rombach et al., 2022) and, with other switches, of ADM (Dhariwal & Nichol, 2021).

Residual blocks that read the time, at halved resolutions on the way down and doubled ones on the way up, where each
block also reads what the way down has left at its resolution; attention at some of them.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from discrete_lit.backbones.blocks import MLP, Attention, BlockSettings
from discrete_lit.backbones.denoising_network import DenoisingNetwork, LatentLayout, TextInFront, nearest_grid
from discrete_lit.backbones.embeddings import TimeEmbedding
from discrete_lit.backbones.layers import Linear, Norm
from discrete_lit.core.modules import at_least_float32

_Layer = TypeVar("_Layer", nn.Conv2d, Linear)


class UNet(DenoisingNetwork):
    """Halve the resolution level by level, and come back by way of what was left at each.

    By default it is LDM's of ImageNet (`cin256-v2`): spatial transformers, which read the class as a vector to attend
    to. ADM's has `attention_kind="self"`, `class_input="time"` and `modulation="scale_shift"`. A context grid is
    stacked on to the input's channels, as in LDM's super-resolution; vectors, and those of a text as in LDM's
    text-to-image, are attended to beside the class.

    Args:
        layout: the latents; a generator gives it.
        channels: at the full resolution.
        multipliers: of the channels at each level, from the full resolution down.
        blocks: residual blocks of each level on the way down; on the way up there is one more.
        attention: the rates of down-sampling that have attention, such as `[2, 4, 8]`; the middle always has it.
        attention_kind: `"transformer"`, self-attention, attention to the class and a gated MLP (LDM); or `"self"`,
            self-attention alone (ADM).
        heads: attention heads; one of `heads` and `head_dim` is given.
        head_dim: width of a head.
        transformer_depth: layers of each spatial transformer.
        class_input: the label as a vector that transformers attend to (`"context"`), or added to the time (`"time"`).
        class_width: of that vector, and of what other vectors and those of a text are mapped to.
        context_dim: E, width of the vectors of a text; none by default.
        modulation: how a residual block reads the time: as an offset (`"add"`), or as gain and offset of its second
            norm (`"scale_shift"`).
        norm_groups: groups of every GroupNorm; must divide every width.
        dropout: in residual blocks, in [0, 1).
        activation_checkpointing: keep no activations of the stages for the backward pass, but compute them again.

    Raises:
        ValueError: settings that do not fit together, or a grid that the levels cannot halve.
    """

    def __init__(
        self,
        layout: LatentLayout,
        *,
        channels: int,
        multipliers: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (2, 4, 8),
        attention_kind: Literal["transformer", "self"] = "transformer",
        heads: int | None = None,
        head_dim: int | None = None,
        transformer_depth: int = 1,
        class_input: Literal["context", "time"] = "context",
        class_width: int = 512,
        context_dim: int | None = None,
        modulation: Literal["add", "scale_shift"] = "add",
        norm_groups: int = 32,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout, context_dim=context_dim)
        levels = len(multipliers)
        if not levels or min(channels, blocks, transformer_depth, *multipliers) < 1:
            raise ValueError(
                f"channels, blocks, transformer_depth and each of one or more multipliers must be at least 1, got "
                f"{channels}, {blocks}, {transformer_depth} and {list(multipliers)}"
            )
        if (heads is None) == (head_dim is None):
            raise ValueError(f"one of heads and head_dim must be given, got {heads} and {head_dim}")
        if any(side % 2 ** (levels - 1) for side in layout.grid):
            raise ValueError(
                f"{levels} levels halve the latents {levels - 1} times, which {layout.grid} does not allow"
            )
        unknown = [rate for rate in attention if rate not in [2**level for level in range(levels)]]
        if unknown:
            raise ValueError(
                f"attention={list(attention)} holds rates of down-sampling; {levels} levels have "
                f"{', '.join(str(2**level) for level in range(levels))}"
            )
        if class_input == "context" and attention_kind == "self":
            raise ValueError("class_input='context' needs attention_kind='transformer', which attends to it")
        if layout.vectors is not None and attention_kind == "self":
            raise ValueError("vectors to attend to, as rows of tokens are, need attention_kind='transformer'")
        if context_dim is not None and attention_kind == "self":
            raise ValueError("a text to attend to, of width context_dim, needs attention_kind='transformer'")
        if channels % 2:
            raise ValueError(f"channels={channels} must be even: half are cosines of the time, half are sines")
        self.class_input: Literal["context", "time"] = class_input
        self.activation_checkpointing = activation_checkpointing
        time_width = 4 * channels
        self.time_embedding = TimeEmbedding(time_width, waves=channels // 2)
        self.class_embedding = nn.Embedding(
            layout.num_classes + 1, class_width if class_input == "context" else time_width
        )
        self.vector_embedding = None if layout.vectors is None else Linear(layout.vectors[1], class_width)
        self.text_in_front = None if context_dim is None else TextInFront(context_dim, class_width)
        attends_to = class_input == "context" or layout.vectors is not None or context_dim is not None
        context_width = class_width if attends_to else None

        def attend(width: int) -> nn.Module:
            if width % (heads or head_dim or 1):
                raise ValueError(f"heads={heads}, head_dim={head_dim} must divide {width} channels")
            count = heads or width // cast(int, head_dim)
            if attention_kind == "self":
                return UNetAttention(width, heads=count, groups=norm_groups)
            return SpatialTransformer(
                width, heads=count, depth=transformer_depth, context_width=context_width, groups=norm_groups
            )

        def stage(inputs: int, width: int, *, attends: bool) -> "UNetStage":
            block = UNetResidual(
                inputs, width, time_width=time_width, modulation=modulation, groups=norm_groups, dropout=dropout
            )
            return UNetStage(block=block, attention=attend(width) if attends else None)

        self.conv_in = nn.Conv2d(layout.channels + (layout.context_channels or 0), channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        left, width = [channels], channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(width, multiplier * channels, attends=2**level in attention))
                width = multiplier * channels
                left.append(width)
            if level + 1 < levels:
                self.down.append(UNetStage(resample=nn.Conv2d(width, width, 3, stride=2, padding=1)))
                left.append(width)
        self.middle = nn.ModuleList((stage(width, width, attends=True), stage(width, width, attends=False)))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                last = level > 0 and number == blocks
                step = stage(width + left.pop(), multiplier * channels, attends=2**level in attention)
                width = multiplier * channels
                step.resample = nn.Conv2d(width, width, 3, padding=1) if last else None
                self.up.append(step)
        self.norm_out = WideGroupNorm(norm_groups, width)
        self.conv_out = _zero(nn.Conv2d(width, layout.outputs, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor,
        context: Tensor | None = None,
        vectors: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        self._check_input(x, time, labels, context, vectors, text, text_mask)
        hidden = x.to(self.conv_in.weight.dtype)
        if context is not None:
            hidden = torch.cat((hidden, nearest_grid(context, self.layout.grid).to(hidden.dtype)), dim=1)
        times, classes = self.time_embedding(time), self.class_embedding(labels)
        if vectors is not None:
            assert self.vector_embedding is not None
            vectors = self.vector_embedding(vectors.to(hidden.dtype))
        if self.class_input == "time":
            times = times + classes
        else:
            vectors = classes[:, None] if vectors is None else torch.cat((classes[:, None], vectors), dim=1)
        seen = None
        if self.text_in_front is not None and text is not None:
            words, seen = self.text_in_front(text, text_mask)
            if vectors is not None:
                seen = torch.cat((seen, seen.new_ones(vectors.shape[:2])), dim=1)
            vectors = words if vectors is None else torch.cat((words, vectors), dim=1)
        times = F.silu(times)
        hidden = self.conv_in(hidden)
        left = [hidden]
        for stage in self.down:
            hidden = self._run(stage, hidden, times, vectors, seen)
            if stage.resample is not None:
                hidden = cast(nn.Module, stage.resample)(hidden)
            left.append(hidden)
        for stage in self.middle:
            hidden = self._run(stage, hidden, times, vectors, seen)
        for stage in self.up:
            hidden = self._run(stage, torch.cat((hidden, left.pop()), dim=1), times, vectors, seen)
            if stage.resample is not None:
                doubled = F.interpolate(hidden, scale_factor=2, mode="nearest")
                hidden = cast(nn.Module, stage.resample)(doubled)
        return self.conv_out(F.silu(self.norm_out(hidden)))

    def _run(
        self, stage: nn.Module, hidden: Tensor, times: Tensor, vectors: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        if self.activation_checkpointing and self.training:
            return cast(Tensor, checkpoint(stage, hidden, times, vectors, seen, use_reentrant=False))
        return stage(hidden, times, vectors, seen)

    def fsdp_units(self) -> Iterable[nn.Module]:
        return [*self.down, *self.middle, *self.up]


class UNetStage(nn.Module):
    """Hold one step of the way down, of the middle or of the way up: a residual block, attention, a convolution.

    The convolution halves the resolution, or comes after its doubling.
    """

    def __init__(
        self,
        *,
        block: nn.Module | None = None,
        attention: nn.Module | None = None,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attention, self.resample = block, attention, resample

    def forward(self, x: Tensor, times: Tensor, vectors: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Run the block and the attention on `(B, C, H, W)`, given `(B, time_width)` and vectors `(B, n, E)`, of which
        those that are `seen (B, n)` count, all if None."""
        if self.block is not None:
            x = self.block(x, times)
        return x if self.attention is None else self.attention(x, vectors, seen)


class WideGroupNorm(nn.GroupNorm):
    """A GroupNorm that is computed in float32, or float64, whatever precision its module is in."""

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        wide = at_least_float32(input)
        normed = F.group_norm(wide, self.num_groups, self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps)
        return normed.to(input.dtype)


class UNetResidual(nn.Module):
    """Add to its input norm, SiLU and 3-wide convolution, twice, with the time between the two."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        time_width: int,
        modulation: Literal["add", "scale_shift"],
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        for width in (inputs, outputs):
            if width % groups:
                raise ValueError(f"norm_groups={groups} must divide every width, {width} among them")
        self.scale_shift = modulation == "scale_shift"
        self.norm1 = WideGroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = Linear(time_width, 2 * outputs if self.scale_shift else outputs)
        self.norm2 = WideGroupNorm(groups, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # (B, inputs, H, W), (B, time_width) -> (B, outputs, H, W)
        hidden = self.conv1(F.silu(self.norm1(x)))
        vectors = self.time(times)[..., None, None]
        if self.scale_shift:
            scale, shift = vectors.chunk(2, dim=1)
            hidden = torch.addcmul(shift, self.norm2(hidden), 1 + scale)
        else:
            hidden = self.norm2(hidden + vectors)
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class UNetAttention(nn.Module):
    """Add to its input norm and self-attention over all places (ADM)."""

    def __init__(self, width: int, *, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = WideGroupNorm(groups, width)
        self.attention = Attention(_attention_settings(width, heads, biased=True))
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, x: Tensor, vectors: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Map `(B, C, H, W)` to the same; there are no vectors to attend to."""
        places = rearrange(self.norm(x), "b c h w -> b (h w) c")
        mixed = self.attention(places, None, None, False, None)
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class SpatialTransformer(nn.Module):
    """Add to its input a small transformer over all places, which attends to vectors too (LDM)."""

    def __init__(self, width: int, *, heads: int, depth: int, context_width: int | None, groups: int) -> None:
        super().__init__()
        self.norm = WideGroupNorm(groups, width, eps=1e-6)
        self.project_in = Linear(width, width)
        self.layers = nn.ModuleList(CrossLayer(width, heads=heads, context_width=context_width) for _ in range(depth))
        self.project_out = _zero(Linear(width, width))

    def forward(self, x: Tensor, vectors: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Map `(B, C, H, W)`, given vectors `(B, n, E)` of which some are `seen (B, n)`, to the same."""
        places = self.project_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for layer in self.layers:
            places = layer(places, vectors, seen)
        return x + rearrange(self.project_out(places), "b (h w) c -> b c h w", h=x.shape[2])


class CrossLayer(nn.Module):
    """Self-attention, attention to vectors or else to itself once more, and a gated MLP, all residual."""

    def __init__(self, width: int, *, heads: int, context_width: int | None) -> None:
        super().__init__()
        self.attention_norm, self.cross_norm, self.mlp_norm = (Norm(width, "layer", epsilon=1e-5) for _ in range(3))
        self.attention = Attention(_attention_settings(width, heads, biased=False))
        self.cross_attention = CrossAttention(width, heads=heads, context_width=context_width or width)
        self.mlp = MLP(width, 4 * width, kind="geglu", bias=True)

    def forward(self, x: Tensor, vectors: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Map `(B, N, D)`, given vectors `(B, n, E)` of which some are `seen (B, n)`, to the same."""
        x = x + self.attention(self.attention_norm(x), None, None, False, None)
        queries = self.cross_norm(x)
        x = x + self.cross_attention(queries, queries if vectors is None else vectors, seen)
        return x + self.mlp(self.mlp_norm(x))


class CrossAttention(nn.Module):
    """Attention from places to vectors of another width.

    Args:
        width: D, of the places.
        heads: attention heads.
        context_width: E, of the vectors.
    """

    def __init__(self, width: int, *, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(context_width, 2 * width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, vectors: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map `(B, N, D)` and vectors `(B, n, E)`, of which those `seen (B, n)` count, to `(B, N, D)`; all if None."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(vectors).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _attention_settings(width: int, heads: int, *, biased: bool) -> BlockSettings:
    return BlockSettings(
        width=width,
        heads=heads,
        head_dim=width // heads,
        mlp_hidden=width,
        attention_bias="all" if biased else "none",
    )


def _zero(layer: _Layer) -> _Layer:
    """Begin a residual branch at 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
