"""The transformer block: attention, then an MLP, with the norms, biases and modulations of the published models.

`BlockSettings` has the switches; `Block`, `Attention`, `ContextAttention`, `MLP`, `GridMLP` and `Modulation`
(adaLN-Zero) read them. `NormTables` modulate in another way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import cpu_kernels
from discrete_lit.backbones.cache import LayerCache, RaggedLayerCache
from discrete_lit.backbones.embeddings import rotate
from discrete_lit.backbones.layers import Linear, Norm, NormKind
from discrete_lit.core.modules import FullPrecision, at_least_float32

QueryKeyNorm = Literal["rms", "layer", "layer_per_head", "full_rms", "unit"]
AttentionBias = Literal["all", "query_value", "none"]
MLPKind = Literal["gelu", "gelu_tanh", "gelu_quick", "relu_squared", "swiglu", "geglu", "geglu_tanh", "glu"]
ModulationActivation = Literal["silu", "sigmoid", "gelu_tanh"]
DropoutPlace = Literal["embeddings", "attention_weights", "attention_output", "mlp_hidden", "mlp_output"]
Modulating = Tensor | tuple[Tensor, ...]
Context = Tensor | tuple[Tensor, Tensor]
Rotary = Tensor | tuple[Tensor, Tensor]

DROPOUT_PLACES: tuple[DropoutPlace, ...] = ("embeddings", "attention_weights", "attention_output", "mlp_output")
"""Where dropout acts unless a model says otherwise."""

_gelu_tanh = partial(F.gelu, approximate="tanh")
# What multiplies the values of a gated MLP.
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "glu": torch.sigmoid,
}
_ACTIVATIONS: dict[ModulationActivation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu_tanh": _gelu_tanh,
}
# The learned sharpness of attention over unit vectors stays below 100, as in VAR.
_LARGEST_LOG_SHARPNESS = 4.605170185988092


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """The switches of a block; `Transformer` says which published model sets which.

    Attributes:
        width, heads, head_dim: D, the attention heads, and the width of each.
        mlp_hidden: inner width of the MLP.
        norm, norm_epsilon: of both norms and of those of queries and keys.
        norm_first: normalise what enters a branch (pre-norm), or what leaves the sum (post-norm).
        norm_outputs: in the place of both, normalise what leaves a branch, before it is added (Swin Transformer V2;
            Chameleon-34B).
        parallel: attention and MLP read one norm of the same input, and both are added to it (Wang and Komatsuzaki,
            "GPT-J", 2021; Phi).
        key_value_heads: heads of keys and values, each of which as many heads of queries share (Ainslie et al., "GQA",
            2023); a divisor of `heads`, which it is by default.
        norm_affine: gains of the norms.
        modulation: adaLN-Zero with parameters of the block's own, or shared by all blocks but for an offset.
        modulation_activation: what stands before its linear layer.
        mlp: kind of the MLP.
        qk_norm: of queries and keys, see `QueryKeyNorms`; None for no norm.
        attention_bias: of the projections of queries, keys and values; `"query_value"` leaves the keys without (VAR).
        out_bias: of the attention's last projection.
        norm_bias: offsets of LayerNorms with gains.
        bias: of the MLP.
        condition_width: of the condition that a modulation of the block's own reads.
        dropout: probability at each of the places, in [0, 1).
        dropout_places: what dropout acts on; the embeddings are the transformer's.
        drop_path: probability in [0, 1) that training leaves out a residual branch of a sample; those it keeps are
            scaled up (stochastic depth, Huang et al., 2016).
        context_dim: E, of vectors that the block attends to between attention and MLP; None where it attends to none.
        context_bias: of the projections of queries, keys and values of that attention; by default where those of the
            self-attention all have one.
        mlp_grid: sides of the grid over which the layers of the MLP are 3 x 3 convolutions; None for linear layers.
    """

    width: int
    heads: int
    head_dim: int
    mlp_hidden: int
    norm: NormKind = "layer"
    norm_epsilon: float = 1e-6
    norm_first: bool = True
    norm_outputs: bool = False
    parallel: bool = False
    key_value_heads: int | None = None
    norm_affine: bool = True
    modulation: Literal["own", "shared"] | None = None
    modulation_activation: ModulationActivation = "silu"
    mlp: MLPKind = "gelu"
    qk_norm: QueryKeyNorm | None = None
    attention_bias: AttentionBias = "all"
    out_bias: bool = True
    norm_bias: bool = True
    bias: bool = True
    condition_width: int | None = None
    dropout: float = 0.0
    dropout_places: tuple[DropoutPlace, ...] = DROPOUT_PLACES
    drop_path: float = 0.0
    context_dim: int | None = None
    context_bias: bool | None = None
    mlp_grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon must be > 0, got {self.norm_epsilon}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        unknown = [place for place in self.dropout_places if place not in get_args(DropoutPlace)]
        if unknown:
            accepted = ", ".join(get_args(DropoutPlace))
            raise ValueError(f"dropout_places has {', '.join(map(repr, unknown))}, accepted: {accepted}")
        if self.context_dim is not None and self.context_dim < 1:
            raise ValueError(f"context_dim must be at least 1, got {self.context_dim}")
        shared = self.key_value_heads
        if shared is not None and (shared < 1 or self.heads % shared):
            raise ValueError(f"key_value_heads={shared} must divide the {self.heads} heads")
        if self.shared_heads != self.heads and (self.qk_norm in ("full_rms", "unit") or self.attention_bias != "none"):
            raise ValueError(
                f"key_value_heads={shared} goes with norms over a head alone and attention without biases, got "
                f"qk_norm={self.qk_norm!r} and attention_bias={self.attention_bias!r}"
            )
        if self.norm_outputs and (not self.norm_first or self.modulation or self.context_dim is not None):
            raise ValueError("norm_outputs goes with neither norm_first=false, nor a modulation, nor a context")
        alone = self.norm_first and not (self.norm_outputs or self.modulation) and self.context_dim is None
        if self.parallel and not alone:
            raise ValueError(
                "parallel goes with neither norm_outputs, norm_first=false, a modulation, nor a context: attention and "
                "MLP read one norm"
            )

    @property
    def shared_heads(self) -> int:
        """The heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @classmethod
    def of_width(
        cls,
        width: int,
        heads: int,
        *,
        head_dim: int | None,
        mlp_hidden: int | None,
        gated: bool,
        bias: bool,
        **switches: Any,
    ) -> Self:
        """Fill in what follows from the width, and give every layer a bias or none.

        Args:
            width, heads: as above.
            head_dim: `width / heads` by default.
            mlp_hidden: by default 4 widths, or 8/3 of one in whole multiples of 64 where the MLP has a gate, whose
                matrix is one more.
            gated: whether it has.
            bias: of all layers; `switches` may say otherwise of some.
            switches: the others.
        """
        if mlp_hidden is None:
            mlp_hidden = -(-8 * width // 3 // 64) * 64 if gated else 4 * width
        biases = {"attention_bias": "all" if bias else "none", "out_bias": bias, "norm_bias": bias, "bias": bias}
        return cls(
            width=width,
            heads=heads,
            head_dim=width // heads if head_dim is None else head_dim,
            mlp_hidden=mlp_hidden,
            **(biases | switches),
        )

    def dropout_at(self, place: DropoutPlace) -> float:
        """Give the probability of dropout at a place."""
        return self.dropout if place in self.dropout_places else 0.0


class Block(nn.Module):
    """Attention, then an MLP, both residual; between them attention to a context, where there is one."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        width = settings.width
        self.norm_first, self.norm_outputs = settings.norm_first, settings.norm_outputs
        self.parallel = settings.parallel
        self.attention_norm = _block_norm(settings)
        self.attention = Attention(settings)
        self.context_norm = self.context_attention = None
        if settings.context_dim is not None:
            # Nothing modulates it, so that its norm has gains of its own (PixArt's branch is not modulated either).
            self.context_norm = _block_norm(settings, affine=True)
            self.context_attention = ContextAttention(settings)
        # Both branches of a parallel block read the attention's norm.
        self.mlp_norm = nn.Identity() if settings.parallel else _block_norm(settings)
        inner: dict[str, Any] = {
            "kind": settings.mlp,
            "bias": settings.bias,
            "dropout": settings.dropout_at("mlp_hidden"),
        }
        if settings.mlp_grid is None:
            self.mlp = MLP(width, settings.mlp_hidden, **inner)
        else:
            self.mlp = GridMLP(width, settings.mlp_hidden, grid=settings.mlp_grid, **inner)
        self.modulation = None
        if settings.modulation == "own":
            self.modulation = Modulation(
                settings.condition_width or width, width, vectors=6, activation=settings.modulation_activation
            )
        self.modulation_offset = nn.Parameter(torch.zeros(6, width)) if settings.modulation == "shared" else None
        outputs: tuple[DropoutPlace, ...] = ("attention_output", "mlp_output")
        self.dropout, self.mlp_dropout = (
            nn.Sequential(nn.Dropout(settings.dropout_at(place)), StochasticDepth(settings.drop_path))
            for place in outputs
        )

    def forward(
        self,
        x: Tensor,
        condition: Modulating | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | RaggedLayerCache | None = None,
        context: Context | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Map `(B, n, D)` to the same.

        Args:
            condition: as for `modulate`, or what it gave.
            rotary, mask, causal, cache: as for `Attention`.
            context, context_mask: as for `ContextAttention`, of a block that attends to a context.
        """
        if condition is None:
            if self.parallel:
                normed = self.attention_norm(x)
                attended = self._drop(self.attention(normed, rotary, mask, causal, cache))
                return x + attended + self._drop_mlp(self.mlp(normed))
            if self.norm_outputs:
                x = x + self._drop(self.attention_norm(self.attention(x, rotary, mask, causal, cache)))
                return x + self._drop_mlp(self.mlp_norm(self.mlp(x)))
            if not self.norm_first:
                x = self.attention_norm(x + self._drop(self.attention(x, rotary, mask, causal, cache)))
                x = self._attend(x, context, context_mask)
                return self.mlp_norm(x + self._drop_mlp(self.mlp(x)))
            x = x + self._drop(self.attention(self.attention_norm(x), rotary, mask, causal, cache))
            x = self._attend(x, context, context_mask)
            return x + self._drop_mlp(self.mlp(self.mlp_norm(x)))
        vectors = self.modulate(condition) if isinstance(condition, Tensor) else condition
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        hidden = self.attention_norm(x) * (1 + scale1) + shift1
        x = x + self._drop(gate1 * self.attention(hidden, rotary, mask, causal, cache))
        x = self._attend(x, context, context_mask)
        hidden = self.mlp_norm(x) * (1 + scale2) + shift2
        return x + self._drop_mlp(gate2 * self.mlp(hidden))

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Make shift, scale and gate of the attention, then of the MLP, each `(B, 1 or n, D)`.

        Args:
            condition: `(B, 1 or n, condition_width)`; where the modulation is shared, that, `(B, 1 or n, 6 D)`.
        """
        if self.modulation is not None:
            return self.modulation(condition)
        assert self.modulation_offset is not None
        return (condition + self.modulation_offset.flatten()).chunk(6, dim=-1)

    def _attend(self, x: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        """Attend to the context, where the block has one."""
        if self.context_attention is None or self.context_norm is None:
            return x
        assert context is not None, "a block with a context_dim is given a context"
        if not self.norm_first:
            return self.context_norm(x + self._drop(self.context_attention(x, context, mask)))
        return x + self._drop(self.context_attention(self.context_norm(x), context, mask))

    def _drop(self, branch: Tensor) -> Tensor:
        """Leave out what training leaves out of a branch of attention."""
        return self.dropout(branch) if self.training else branch

    def _drop_mlp(self, branch: Tensor) -> Tensor:
        return self.mlp_dropout(branch) if self.training else branch


def _block_norm(settings: BlockSettings, *, affine: bool | None = None) -> Norm:
    return Norm(
        settings.width,
        settings.norm,
        affine=settings.norm_affine if affine is None else affine,
        bias=settings.norm_bias and settings.norm == "layer",
        epsilon=settings.norm_epsilon,
    )


class StochasticDepth(FullPrecision):
    """Leaves the residual branches of some samples out, and scales up the others (Huang et al., 2016).

    timm's `DropPath` has its probability as a number, which compiled code contains: the blocks, whose probabilities
    differ, would be compiled one by one, and from the ninth on not at all.

    Args:
        probability: that a sample's branch is left out in training, in [0, 1).
    """

    kept: Tensor
    """Scalar: the probability that it is not."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.active = probability > 0
        self.register_buffer("kept", torch.tensor(1.0 - probability), persistent=False)

    def forward(self, branch: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        if not (self.active and self.training):
            return branch
        uniforms = torch.rand(len(branch), *(1,) * (branch.ndim - 1), dtype=self.kept.dtype, device=branch.device)
        return branch * ((uniforms < self.kept) / self.kept).to(branch.dtype)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`, by the settings of its block."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        heads, head_dim, qk_norm = settings.heads, settings.head_dim, settings.qk_norm
        inner = heads * head_dim
        self.heads, self.shared_heads = heads, settings.shared_heads
        self.dropout = settings.dropout_at("attention_weights")
        rows = inner + 2 * self.shared_heads * head_dim
        self.query_key_value = Linear(settings.width, rows, bias=settings.attention_bias == "all")
        self.query_value_bias = None
        if settings.attention_bias == "query_value":
            self.query_value_bias = nn.Parameter(torch.zeros(2, inner))
        self.norms = None
        if qk_norm is not None:
            self.norms = QueryKeyNorms(
                heads, head_dim, shared_heads=self.shared_heads, kind=qk_norm, epsilon=settings.norm_epsilon
            )
        self.scale = 1.0 if qk_norm == "unit" else None
        self.out = Linear(inner, settings.width, bias=settings.out_bias)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        causal: bool,
        cache: LayerCache | RaggedLayerCache | None,
    ) -> Tensor:
        """Map `(B, n, D)` to the same.

        Args:
            rotary: `(n, head_dim / 2, 2)`, or with a batch and a head dimension before; one of queries and one of
                keys where they differ.
            mask: `(n, seen)` bool, or with a batch dimension and one of heads before, which positions see which, those
                of the cache among them; it goes before `causal`.
            causal: each position sees those before it and itself.
            cache: keys and values so far; without a mask, all that it holds is seen.
        """
        query, key, value = self._queries_keys_values(x, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
            new, seen = query.shape[2], key.shape[2]
            if new < seen and mask is None:
                if causal and new > 1:
                    mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
                causal = False
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
        if self.shared_heads != self.heads:
            key, value = (each.repeat_interleave(self.heads // self.shared_heads, dim=1) for each in (key, value))
        wider = query.requires_grad and cpu_kernels.enabled(query.device)
        attend = cpu_kernels.wider_attention if wider else F.scaled_dot_product_attention
        mixed = attend(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and mask is None,
            scale=self.scale,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # the heads side by side again

    def weights(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, causal: bool, *, rows: Tensor) -> Tensor:
        """Give the weights of the values in a pass without a cache, softmax(q k^T / sqrt(head_dim)), of some rows.

        `forward` does not make them: its fused kernels never hold a whole row. Dropout is left out.

        Args:
            x, rotary, mask, causal: as of `forward`.
            rows: `(B, Q)` int64, the elements whose queries are asked for.

        Returns:
            `(B, heads, Q, n)`, float32 or better, 0 where an element is not seen.
        """
        query, key, _ = self._queries_keys_values(x, rotary)
        if self.shared_heads != self.heads:
            key = key.repeat_interleave(self.heads // self.shared_heads, dim=1)
        query, key = at_least_float32(query), at_least_float32(key)
        batch, count = torch.arange(len(x), device=x.device)[:, None], x.shape[1]
        if mask is None:
            seen = torch.ones(count, count, dtype=torch.bool, device=x.device)
            mask = seen.tril() if causal else seen
        mask = mask.expand(len(x), mask.shape[-3] if mask.ndim == 4 else 1, -1, -1)
        asked = query.transpose(1, 2)[batch, rows].transpose(1, 2)  # (B, heads, Q, head_dim)
        allowed = mask.transpose(1, 2)[batch, rows].transpose(1, 2)  # (B, heads or 1, Q, n)
        scale = asked.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = asked @ key.transpose(2, 3) * scale
        return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)

    def _queries_keys_values(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Make what the attention reads of `(B, n, D)`, normed and turned: `(B, heads, n, head_dim)` each."""
        query, key, value = self._project(x)
        if self.norms is not None:
            query, key = self.norms(query, key)
        if rotary is not None:
            of_query, of_key = (rotary, rotary) if isinstance(rotary, Tensor) else rotary
            query, key = rotate(query, of_query), rotate(key, of_key)
        return query, key, value

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map `(B, n, D)` to queries, keys and values, `(B, heads, n, head_dim)` each; the last two may have fewer."""
        projected = self.query_key_value(x)
        if self.query_value_bias is not None:
            query_bias, value_bias = self.query_value_bias.to(projected.dtype)
            projected = projected + torch.cat((query_bias, torch.zeros_like(query_bias), value_bias))
        if self.shared_heads != self.heads:
            counts = self.heads, self.shared_heads, self.shared_heads
            by_head = projected.unflatten(-1, (sum(counts), -1))
            return tuple(part.transpose(1, 2) for part in by_head.split(counts, dim=2))
        # Not by einops: this runs for every token that is drawn. Taken apart before heads and positions change places,
        # the three gradients are put together once, in the layout that the linear layer's products read.
        return tuple(part.transpose(1, 2) for part in projected.unflatten(-1, (3, self.heads, -1)).unbind(2))


class ContextAttention(nn.Module):
    """Multi-head attention from a sequence to vectors that it is given, its context.

    Where none of a sequence's vectors is valid it attends to a learned one in their place, `null`: that is what it is
    given where the condition was dropped, and what the null half of guidance reads. Elsewhere nobody sees that vector,
    so that the attention is the ordinary one over the valid vectors. `qk_norm` of the block is of its self-attention.

    Args:
        settings: of the block; `context_dim` is the width E of the vectors.
    """

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        assert settings.context_dim is not None
        inner, bias = settings.heads * settings.head_dim, settings.context_bias
        bias = settings.attention_bias == "all" if bias is None else bias
        self.heads = settings.heads
        self.dropout = settings.dropout_at("attention_weights")
        self.query = Linear(settings.width, inner, bias=bias)
        self.key_value = Linear(settings.context_dim, 2 * inner, bias=bias)
        self.null = nn.Parameter(torch.zeros(1, settings.context_dim))
        self.out = Linear(inner, settings.width, bias=settings.out_bias)

    def forward(self, x: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """Map `(B, n, D)` to the same.

        Args:
            context: `(B, M, E)`, or the keys and values that `keys_and_values` made of it.
            mask: `(B, M)` bool, which of the vectors are valid; all if None.
        """
        key, value = self.keys_and_values(context) if isinstance(context, Tensor) else context
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
        if mask is None:
            if key.shape[2] > 1:
                key, value = key[:, :, :-1], value[:, :, :-1]
        else:
            mask = torch.cat((mask, ~mask.any(dim=1, keepdim=True)), dim=1)[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of `(B, M, E)`, those of the null vector behind them: `(B, heads, M + 1, head_dim)`."""
        rows = torch.cat((context.to(self.null.dtype), self.null.expand(len(context), 1, -1)), dim=1)
        key, value = self.key_value(rows).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return key, value


class QueryKeyNorms(nn.Module):
    """Normalise queries and keys.

    Args:
        heads, head_dim: their shape.
        shared_heads: heads of keys; `heads` by default.
        kind: over the width of a head, RMSNorm (`"rms"`) or LayerNorm (`"layer"`), both with gains that all heads
            share, or LayerNorm with gains and offsets of each head (`"layer_per_head"`: Chameleon); over all heads
            together without gains (`"full_rms"`: Halton-MaskGIT); or both to unit length, queries then multiplied by a
            learned sharpness of each head (`"unit"`: VAR), with which attention has no other scale.
        epsilon: of the norms.
    """

    def __init__(
        self, heads: int, head_dim: int, *, shared_heads: int | None = None, kind: QueryKeyNorm, epsilon: float
    ) -> None:
        super().__init__()
        self.kind = kind
        self.counts = heads * head_dim, (shared_heads or heads) * head_dim
        if kind == "unit":
            self.log_sharpness = nn.Parameter(torch.full((heads, 1, 1), 4.0).log())
        elif kind == "full_rms":
            self.norm = Norm(heads * head_dim, "rms", affine=False, epsilon=epsilon)
        elif kind == "layer_per_head":
            self.norm = Norm(head_dim, "layer", affine=False, epsilon=epsilon)
            # Of the queries of all heads, then of the keys; vectors, as the gains of other norms are.
            self.gains = nn.Parameter(torch.ones(sum(self.counts)))
            self.offsets = nn.Parameter(torch.zeros(sum(self.counts)))
        else:
            self.query = Norm(head_dim, kind, epsilon=epsilon)
            self.key = Norm(head_dim, kind, epsilon=epsilon)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # two of (B, heads, n, head_dim)
        if self.kind == "unit":
            sharpness = at_least_float32(self.log_sharpness).clamp(max=_LARGEST_LOG_SHARPNESS).exp()
            unit = F.normalize(at_least_float32(query), dim=-1) * sharpness
            return unit.to(query.dtype), F.normalize(at_least_float32(key), dim=-1).to(key.dtype)
        if self.kind == "full_rms":
            return self._over_heads(query), self._over_heads(key)
        if self.kind == "layer_per_head":
            return self._of_heads(query, 0), self._of_heads(key, 1)
        return self.query(query), self.key(key)

    def _of_heads(self, x: Tensor, number: int) -> Tensor:
        normed = self.norm(at_least_float32(x))
        shape = (x.shape[1], 1, x.shape[3])
        gains, offsets = (
            each.split(self.counts)[number].view(shape).to(normed.dtype) for each in (self.gains, self.offsets)
        )
        return torch.addcmul(offsets, normed, gains).to(x.dtype)

    def _over_heads(self, x: Tensor) -> Tensor:
        normed = self.norm(rearrange(x, "b heads n d -> b n (heads d)"))
        return rearrange(normed, "b n (heads d) -> b heads n d", heads=x.shape[1])


class MLP(nn.Module):
    """Linear, GELU or squared ReLU, linear; or SwiGLU, GEGLU, or GLU.

    Args:
        width: D.
        hidden: inner width.
        kind: GELU exact (`"gelu"`), by its tanh approximation (`"gelu_tanh"`), or as x sigmoid(1.702 x)
            (`"gelu_quick"`: ImageGPT); `"relu_squared"` is max(0, x)^2 (So et al., "Primer: Searching for Efficient
            Transformers for Language Modeling", 2021); `"swiglu"` is the contraction of silu(gate) x value, `"geglu"`
            that of gelu(gate) x value, with `"geglu_tanh"` its approximation, and `"glu"` that of sigmoid(gate) x value
            (Shazeer, "GLU Variants Improve Transformer", 2020).
        bias: of both linear layers.
        dropout: on the hidden units, in [0, 1).
    """

    def __init__(self, width: int, hidden: int, *, kind: MLPKind, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        self.dropout = dropout
        self.expand = Linear(width, (2 if kind in _GATES else 1) * hidden, bias=bias)
        self.contract = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        hidden = self._activated(self.expand(x))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return self.contract(hidden)

    def _activated(self, hidden: Tensor) -> Tensor:
        if self.kind in _GATES:
            gate, value = hidden.chunk(2, dim=-1)
            return _GATES[self.kind](gate) * value
        if self.kind == "relu_squared":
            return F.relu(hidden).square()
        if self.kind == "gelu_quick":
            return hidden * torch.sigmoid(1.702 * hidden)
        return F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")


class GridMLP(MLP):
    """An MLP whose layers are 3 x 3 convolutions over the grid of the sequence, 0 beyond its edge (VQ-Diffusion).

    Args:
        width, hidden, settings: as of `MLP`.
        grid: (h, w), whose raster order the sequence is.

    Raises:
        ValueError: a gated kind, or a grid of other than two axes.
    """

    def __init__(self, width: int, hidden: int, *, grid: tuple[int, ...], **settings: Any) -> None:
        if settings["kind"] in ("swiglu", "geglu") or len(grid) != 2:
            raise ValueError(
                f"an MLP of convolutions needs a grid of two axes and a kind without a gate, got {settings['kind']!r} "
                f"on a grid of {grid}"
            )
        super().__init__(width, hidden, **settings)
        self.grid = grid
        self.expand = nn.Conv2d(width, hidden, 3, padding=1, bias=settings["bias"])
        self.contract = nn.Conv2d(hidden, width, 3, padding=1, bias=settings["bias"])

    def forward(self, x: Tensor) -> Tensor:  # (B, h w, D) -> (B, h w, D)
        on_grid = x.transpose(1, 2).unflatten(-1, self.grid)
        return super().forward(on_grid).flatten(2).transpose(1, 2)


class NormTables(nn.Module):
    """The modulations of a block's norms from tables of its own, without gates: that before the attention by the step
    that the time lies in, that before the MLP by the class (VQ-Diffusion).

    Args:
        width: D.
        steps: T; step i ends at the time (i + 1) / T, i from 0.
        num_classes: labels lie in [0, num_classes], the null label included.
    """

    def __init__(self, width: int, *, steps: int, num_classes: int) -> None:
        super().__init__()
        self.step_table = nn.Embedding(steps, width)
        self.class_table = nn.Embedding(num_classes + 1, width)
        self.step_projection = nn.Linear(width, 2 * width)
        self.class_projection = nn.Linear(width, 2 * width)

    def forward(self, time: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Make what `Block.modulate` makes, each `(B or 1, 1, D)`, of times `(B or 1,)`, 1000 t, and labels `(B,)`."""
        steps = self.step_table.num_embeddings
        # The end of a step, which rounding may have put behind itself, belongs to it.
        step = ((time.double() * steps / 1000 - 1e-6).ceil().long() - 1).clamp(0, steps - 1)
        scale1, shift1 = self._project(self.step_projection, self.step_table(step))
        scale2, shift2 = self._project(self.class_projection, self.class_table(labels))
        gate = torch.ones_like(shift1[:1, :, :1])
        return shift1, scale1, gate, shift2, scale2, gate

    @staticmethod
    def _project(layer: nn.Linear, vectors: Tensor) -> tuple[Tensor, ...]:
        return layer(F.silu(vectors))[:, None].chunk(2, dim=-1)


class Modulation(nn.Module):
    """adaLN-Zero (Peebles & Xie, "DiT", 2023): shifts, scales and gates from a condition, all zero at the start.

    Args:
        condition_width: of the condition.
        width: D, of each vector.
        vectors: how many it makes.
        activation: of the condition, before the linear layer; MD4's is that of its MLP.
    """

    def __init__(
        self, condition_width: int, width: int, *, vectors: int, activation: ModulationActivation = "silu"
    ) -> None:
        super().__init__()
        self.vectors = vectors
        self.activation: ModulationActivation = activation
        self.project = nn.Linear(condition_width, vectors * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Make `vectors` of `(B, 1 or n, D)` of a condition `(B, 1 or n, condition_width)`."""
        return self.project(_ACTIVATIONS[self.activation](condition)).chunk(self.vectors, dim=-1)
