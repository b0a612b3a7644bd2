"""The transformer block and its parts."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.backbone import KeyValueCache
from discrete_lit.backbones.positions import rotate

NormKind = Literal["layer", "rms"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32 under autocast."""

    def __init__(
        self, width: int, kind: NormKind, affine: bool = True, bias: bool = True, epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.kind = kind
        self.width = width
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        weight = None if self.weight is None else self.weight.float()
        with torch.autocast(x.device.type, enabled=False):
            if self.kind == "rms":
                return F.rms_norm(x.float(), (self.width,), weight, eps=self.epsilon).to(x.dtype)
            bias = None if self.bias is None else self.bias.float()
            return F.layer_norm(x.float(), (self.width,), weight, bias, eps=self.epsilon).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`.

    Args:
        width: D; a multiple of `heads`.
        heads: attention heads.
        bias: of the projections.
        qk_norm: RMSNorm of queries and keys over the head width.
        dropout: on the attention weights.
    """

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.query_norm = Norm(width // heads, "rms") if qk_norm else nn.Identity()
        self.key_norm = Norm(width // heads, "rms") if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, rotary: Tensor | None, causal: bool, layer: int, cache: KeyValueCache | None
    ) -> Tensor:  # (B, n, D) -> (B, n, D)
        projected = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, heads, d)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, n, d)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mask = None
        if cache is not None:
            key, value = cache.append(layer, key, value)
            new, seen = query.shape[2], key.shape[2]
            if 1 < new < seen:
                mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
            causal = new == seen
        dropout = self.dropout if self.training else 0.0
        causal = causal and mask is None
        key, value = key.to(query.dtype), value.to(query.dtype)
        if query.requires_grad and query.device.type == "cpu":
            # On a CPU the backward pass of bfloat16 attention is far slower than that of float32 (torch 2.14).
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden, bias=bias)
        self.contract = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        return self.contract(F.gelu(self.expand(x)))


class GatedMLP(nn.Module):
    """SwiGLU: the contraction of silu(gate) x value (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden, bias=bias)
        self.contract = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


class Modulation(nn.Module):
    """adaLN-Zero (Peebles & Xie, "DiT", 2023): shifts, scales and gates from a condition, all zero at the start."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.project = nn.Linear(width, parts * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:  # (B, D) -> parts x (B, 1, D)
        return self.project(F.silu(condition))[:, None].chunk(self.parts, dim=-1)


class Block(nn.Module):
    """A pre-norm residual block: attention, then MLP.

    Args:
        width, heads: D and the attention heads.
        mlp_hidden: inner width of the MLP.
        norm: kind of both norms.
        modulated: adaLN-Zero conditioning in place of the norms' own gains.
        gated_mlp, qk_norm, bias: switches of the parts.
        dropout: on the attention weights and both residual branches.
        norm_epsilon: of both norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_hidden: int,
        norm: NormKind,
        modulated: bool,
        gated_mlp: bool,
        qk_norm: bool,
        bias: bool,
        dropout: float,
        norm_epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attention_norm = Norm(width, norm, not modulated, bias, norm_epsilon)
        self.attention = Attention(width, heads, bias, qk_norm, dropout)
        self.mlp_norm = Norm(width, norm, not modulated, bias, norm_epsilon)
        self.mlp = (GatedMLP if gated_mlp else PlainMLP)(width, mlp_hidden, bias)
        self.modulation = Modulation(width, 6) if modulated else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # (B, n, D)
        condition: Tensor | None,  # (B, D), adaLN only
        rotary: Tensor | None,  # (n, head_dim / 2, 2)
        causal: bool,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:  # (B, n, D)
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotary, causal, layer, cache))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        assert condition is not None
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        hidden = self.attention_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.dropout(self.attention(hidden, rotary, causal, layer, cache))
        hidden = self.mlp_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(hidden))
