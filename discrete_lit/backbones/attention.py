"""Self-attention, with the projections, norms and biases of the published models."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.cache import LayerCache
from discrete_lit.backbones.linear import Linear
from discrete_lit.backbones.norms import Norm
from discrete_lit.backbones.positions import rotate

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
