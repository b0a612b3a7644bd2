"""Self-attention, with the projections, norms and biases of the published models.

The transformer block and its parts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.cache import LayerCache
from discrete_lit.backbones.embeddings import rotate
from discrete_lit.backbones.layers import Linear, Norm, NormKind

QueryKeyNorm = Literal["rms", "layer", "full_rms", "unit"]


AttentionBias = Literal["all", "query_value", "none"]


# The learned sharpness of attention over unit vectors stays below 100, as in VAR.
_LARGEST_LOG_SHARPNESS = 4.605170185988092


class QueryKeyNorms(nn.Module):
    """Normalises queries and keys.

    Args:
        heads, head_dim: their shape.
        kind: over the width of a head, RMSNorm (`"rms"`) or LayerNorm (`"layer"`), both with gains; over all heads
            together without gains (`"full_rms"`: Halton-MaskGIT); or both to unit length, queries then multiplied by a
            learned sharpness of each head (`"unit"`: VAR), with which attention has no other scale.
        epsilon: of the norms.
    """

    def __init__(self, heads: int, head_dim: int, kind: QueryKeyNorm, epsilon: float) -> None:
        super().__init__()
        self.kind = kind
        if kind == "unit":
            self.log_sharpness = nn.Parameter(torch.full((heads, 1, 1), 4.0).log())
        elif kind == "full_rms":
            self.norm = Norm(heads * head_dim, "rms", affine=False, epsilon=epsilon)
        else:
            self.query = Norm(head_dim, kind, epsilon=epsilon)
            self.key = Norm(head_dim, kind, epsilon=epsilon)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # two of (B, heads, n, head_dim)
        if self.kind == "unit":
            sharpness = self.log_sharpness.float().clamp(max=_LARGEST_LOG_SHARPNESS).exp()
            unit = F.normalize(query.float(), dim=-1) * sharpness
            return unit.to(query.dtype), F.normalize(key.float(), dim=-1).to(key.dtype)
        if self.kind == "full_rms":
            return self._over_heads(query), self._over_heads(key)
        return self.query(query), self.key(key)

    def _over_heads(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`.

    Args:
        width: D.
        heads: attention heads.
        head_dim: width of each.
        bias: of the projections of queries, keys and values; `"query_value"` leaves the keys without (VAR).
        out_bias: of the last projection.
        qk_norm: see `QueryKeyNorms`; None for no norm.
        dropout: on the attention weights.
        epsilon: of the norms of queries and keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        bias: AttentionBias,
        out_bias: bool,
        qk_norm: QueryKeyNorm | None,
        dropout: float,
        epsilon: float,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = Linear(width, 3 * inner, bias=bias == "all")
        self.query_value_bias = nn.Parameter(torch.zeros(2, inner)) if bias == "query_value" else None
        self.norms = None if qk_norm is None else QueryKeyNorms(heads, head_dim, qk_norm, epsilon)
        self.scale = 1.0 if qk_norm == "unit" else None
        self.out = Linear(inner, width, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: LayerCache | None,
    ) -> Tensor:
        """`(B, n, D)` to the same.

        Args:
            rotary: `(n, head_dim / 2, 2)`, or with a batch and a head dimension before.
            mask: `(n, n)` bool, which places see which; ignored where the cache holds earlier ones.
            causal: each place sees those before it and itself.
            cache: keys and values so far.
        """
        query, key, value = self._project(x).unbind()
        if self.norms is not None:
            query, key = self.norms(query, key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
            new, seen = query.shape[2], key.shape[2]
            if new < seen:
                one_by_one = causal and new > 1
                mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new) if one_by_one else None
                causal = False
        dropout = self.dropout if self.training else 0.0
        causal = causal and mask is None
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
        if query.requires_grad and query.device.type == "cpu":
            # On a CPU the backward pass of bfloat16 attention is far slower than that of float32 (torch 2.14).
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=self.scale)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> Tensor:  # (B, n, D) -> queries, keys and values (3, B, heads, n, head_dim)
        projected = self.query_key_value(x)
        if self.query_value_bias is not None:
            query_bias, value_bias = self.query_value_bias.to(projected.dtype)
            projected = projected + torch.cat((query_bias, torch.zeros_like(query_bias), value_bias))
        return projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


MLPKind = Literal["gelu", "gelu_tanh", "gelu_quick", "swiglu"]


Condition = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class BlockSettings:
    """Switches of a block; `Transformer` explains those that a recipe sets.

    Attributes:
        width, heads, head_dim: D, the attention heads, and the width of each.
        mlp_hidden: inner width of the MLP.
        norm, norm_epsilon: of both norms and of those of queries and keys.
        norm_first: normalise what enters a branch (pre-norm), or what leaves the sum (post-norm).
        norm_affine: gains of the norms.
        modulation: adaLN-Zero with parameters of the block's own, or shared by all blocks but for an offset.
        mlp: kind of the MLP.
        qk_norm: of queries and keys.
        attention_bias: of the projections of queries, keys and values.
        out_bias: of the attention's last projection.
        norm_bias: offsets of LayerNorms with gains.
        bias: of the MLP.
        condition_width: of the condition that a modulation of the block's own reads.
        dropout: on the attention weights and both residual branches.
        drop_path: probability in [0, 1) that training leaves out a residual branch of a sample; those it keeps are
            scaled up (stochastic depth, Huang et al., 2016).
    """

    width: int
    heads: int
    head_dim: int
    mlp_hidden: int
    norm: NormKind = "layer"
    norm_epsilon: float = 1e-6
    norm_first: bool = True
    norm_affine: bool = True
    modulation: Literal["own", "shared"] | None = None
    mlp: MLPKind = "gelu"
    qk_norm: QueryKeyNorm | None = None
    attention_bias: AttentionBias = "all"
    out_bias: bool = True
    norm_bias: bool = True
    bias: bool = True
    condition_width: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0


class MLP(nn.Module):
    """Linear, GELU (exact, by its tanh approximation, or as x sigmoid(1.702 x), ImageGPT's), linear; or SwiGLU, the
    contraction of silu(gate) x value (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, width: int, hidden: int, kind: MLPKind, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.expand = Linear(width, (2 if kind == "swiglu" else 1) * hidden, bias=bias)
        self.contract = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        hidden = self.expand(x)
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            return self.contract(F.silu(gate) * value)
        if self.kind == "gelu_quick":
            return self.contract(hidden * torch.sigmoid(1.702 * hidden))
        return self.contract(F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Modulation(nn.Module):
    """adaLN-Zero (Peebles & Xie, "DiT", 2023): shifts, scales and gates from a condition, all zero at the start."""

    def __init__(self, condition_width: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.project = nn.Linear(condition_width, parts * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, condition: Tensor
    ) -> tuple[Tensor, ...]:  # (B, 1 or n, condition_width) -> parts of (B, 1 or n, D)
        return self.project(F.silu(condition)).chunk(self.parts, dim=-1)


class Block(nn.Module):
    """Attention, then MLP, both residual."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        width, epsilon = settings.width, settings.norm_epsilon
        norm_bias = settings.norm_bias and settings.norm == "layer"
        self.norm_first = settings.norm_first
        self.attention_norm = Norm(width, settings.norm, settings.norm_affine, norm_bias, epsilon)
        self.attention = Attention(
            width,
            settings.heads,
            settings.head_dim,
            settings.attention_bias,
            settings.out_bias,
            settings.qk_norm,
            settings.dropout,
            epsilon,
        )
        self.mlp_norm = Norm(width, settings.norm, settings.norm_affine, norm_bias, epsilon)
        self.mlp = MLP(width, settings.mlp_hidden, settings.mlp, settings.bias)
        self.modulation = None
        if settings.modulation == "own":
            self.modulation = Modulation(settings.condition_width or width, width, 6)
        self.modulation_offset = nn.Parameter(torch.zeros(6, width)) if settings.modulation == "shared" else None
        self.dropout = nn.Sequential(nn.Dropout(settings.dropout), DropPath(settings.drop_path))

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, each `(B, 1 or n, D)`.

        Args:
            condition: `(B, 1 or n, condition_width)`; where the modulation is shared, that, `(B, 1 or n, 6 D)`.
        """
        if self.modulation is not None:
            return self.modulation(condition)
        assert self.modulation_offset is not None
        return (condition + self.modulation_offset.flatten()).chunk(6, dim=-1)

    def _thin(self, branch: Tensor) -> Tensor:
        """A residual branch with what training leaves out."""
        return self.dropout(branch) if self.training else branch

    def forward(
        self,
        x: Tensor,
        condition: Condition | None = None,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`(B, n, D)` to the same; `condition` as for `modulate`, or what it gave; the rest as for `Attention`."""
        if condition is None:
            if not self.norm_first:
                x = self.attention_norm(x + self._thin(self.attention(x, rotary, mask, causal, cache)))
                return self.mlp_norm(x + self._thin(self.mlp(x)))
            x = x + self._thin(self.attention(self.attention_norm(x), rotary, mask, causal, cache))
            return x + self._thin(self.mlp(self.mlp_norm(x)))
        parts = self.modulate(condition) if isinstance(condition, Tensor) else condition
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        hidden = self.attention_norm(x) * (1 + scale1) + shift1
        x = x + self._thin(gate1 * self.attention(hidden, rotary, mask, causal, cache))
        hidden = self.mlp_norm(x) * (1 + scale2) + shift2
        return x + self._thin(gate2 * self.mlp(hidden))
