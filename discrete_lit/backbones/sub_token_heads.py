"""Heads that predict an id in sub-tokens, from the hidden state that a causal transformer has of its position.

`FactorisedHead` predicts one sub-token after another: "next sub-token prediction" (Luo et al., "Open-MAGVIT2: An
Open-Source Project Toward Democratizing Auto-Regressive Visual Generation", 2024, section 3.2); it is also the depth
transformer of RQ-Transformer (Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022).
`MaskedBitHead` unmasks the bits of an id: "masked bit modeling" (Yu et al., "Autoregressive Image Generation with
Masked Bit Modeling" (BAR), 2026).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, pi
from typing import Literal, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.backbone import SubTokenHead, bits_of_vocabulary
from discrete_lit.backbones.blocks import MLP, Block, BlockSettings, Modulation
from discrete_lit.backbones.embeddings import CodeProjection, SubTokenTables, first_weight
from discrete_lit.backbones.layers import LogitHead, Norm
from discrete_lit.core.modules import never_narrower, widened
from discrete_lit.core.random import CounterRandom, Purpose, random_subset

# CUDA's attention kernels take fewer than 2^16 sequences (pytorch/pytorch#146704).
_MOST_SEQUENCES = 2**16 - 1
# BAR's fraction of masked bits in training is the sigmoid of a normal number of this deviation.
_RATIO_DEVIATION = 0.8
# Of BAR's norms.
_EPSILON = 1e-6


class FactorisedHead(SubTokenHead):
    """A small causal transformer over the sub-tokens of one id, of unequal sizes or equal ones.

    It reads the position's hidden state and an embedding of each sub-token so far; element p predicts sub-token p.
    Sub-tokens of b / g bits each make it an exact autoregressive head over g groups of bits. The depth transformer of
    RQ-Transformer, whose sub-tokens are the D codes of a position, reads in element p the sum of the tokenizer's code
    vectors of sub-tokens 1 to p (Lee et al., CVPR 2022, eq. 9).

    Args:
        block: settings of the trunk's blocks, which its own have too, without modulation.
        vocab_size: K.
        sizes: of the sub-tokens, least significant first; (2^6, 2^12) in Open-MAGVIT2.
        depth: blocks, at least 1.
        heads: attention heads; those of the trunk by default.
        start_rotation: of the hidden state's element: `"none"`, or `"zero"`, which makes its queries and keys 0: those
            after it then attend to it with the logit 0 (Open-MAGVIT2's code, which takes the first two rows of the
            grid's rotary table; the second row turns nothing).
        shared_tables: embed sub-tokens by the tables of the transformer's input, which has `token_embedding="parts"`
            (Open-MAGVIT2), in the place of own ones.
        codes: embed them instead by a linear map of the code vectors that the transformer's input has, which is
            `token_embedding="codes"`: of the vector of the newest sub-token (`"newest"`), or of the sum of those so far
            (`"sum"`: RQ-Transformer).
        positions: a learned vector of each element, added to it (RQ-Transformer).
        shared_logits: one layer of logits for all sub-tokens, which are of one size (RQ-Transformer).

    Raises:
        ValueError: sub-tokens that do not make up the vocabulary, a setting out of its range, or an input that does not
            have the tables or code vectors.
    """

    rotations: Tensor | None

    def __init__(
        self,
        block: BlockSettings,
        vocab_size: int,
        *,
        sizes: Sequence[int],
        depth: int = 2,
        heads: int | None = None,
        start_rotation: Literal["none", "zero"] = "none",
        shared_tables: bool = False,
        codes: Literal["newest", "sum"] | None = None,
        positions: bool = False,
        shared_logits: bool = False,
    ) -> None:
        super().__init__(sizes, vocab_size, width=block.width)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if start_rotation not in ("none", "zero"):
            raise ValueError(f"start_rotation must be 'none' or 'zero', got {start_rotation!r}")
        if codes not in (None, "newest", "sum") or (codes is not None and shared_tables):
            raise ValueError(
                f"codes must be 'newest', 'sum' or null, and null with shared_tables, got codes={codes!r} with "
                f"shared_tables={shared_tables}"
            )
        if shared_logits and len(set(sizes)) > 1:
            raise ValueError(f"shared_logits=true needs sub-tokens of one size, got sizes={list(sizes)}")
        if heads is not None and (heads < 1 or block.width % heads):
            raise ValueError(f"heads={heads} of FactorisedHead must divide the width, {block.width}")
        width, epsilon = block.width, block.norm_epsilon
        own = replace(block, norm_affine=True, modulation=None, condition_width=None, drop_path=0.0)
        if heads is not None:
            own = replace(own, heads=heads, head_dim=width // heads)
        self.shares_tables, self.reads_codes = shared_tables, codes
        self.tables = None
        if not shared_tables and codes is None:
            self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes[:-1])
        self.shared: tuple[nn.Embedding, ...] = ()
        self.codes: tuple[CodeProjection, ...] = ()
        self.code_projection: nn.Linear | None = None
        self.positions = nn.Parameter(torch.zeros(len(sizes), width)) if positions else None
        rotations = None
        if start_rotation == "zero":
            rotations = torch.tensor((1.0, 0.0)).repeat(len(sizes), own.head_dim // 2, 1)
            rotations[0] = 0
        self.register_buffer("rotations", rotations, persistent=False)
        self.blocks = nn.ModuleList(Block(own) for _ in range(depth))
        self.norm = Norm(width, block.norm, bias=block.norm_bias and block.norm == "layer", epsilon=epsilon)
        kinds = sizes[:1] if shared_logits else sizes
        self.heads = nn.ModuleList(LogitHead(width, size, bias=block.bias) for size in kinds)

    def read_input(self, embedding: nn.Module) -> None:
        # In a tuple they are parameters of the transformer's input alone.
        if self.shares_tables:
            if not isinstance(embedding, SubTokenTables):
                raise ValueError("shared_tables=true needs the tables of token_embedding='parts'")
            self.shared = tuple(cast(Sequence[nn.Embedding], embedding.tables))[:-1]
        elif self.reads_codes is not None:
            if not isinstance(embedding, CodeProjection):
                raise ValueError(f"codes={self.reads_codes!r} needs the code vectors of token_embedding='codes'")
            self.codes = (embedding,)
            self.code_projection = nn.Linear(embedding.code_dim, self.width)

    def sub_token_logits(self, hidden: Tensor, known: Tensor) -> Tensor:
        read = self._read(hidden, known)
        return self._logits(read[:, :, -1], known.shape[-1])

    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        values = -self.log_likelihood(hidden, ids)
        return values, torch.ones_like(values)

    def soft_losses(self, hidden: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of each id's sub-tokens with soft labels, summed: `(B, n)` nats.

        Args:
            hidden: `(B, n, D)`.
            ids: `(B, n)` int64 in [0, K), which are read.
            targets: `(B, n, P, size)`, probabilities of each sub-token; all sub-tokens are of one size.
        """
        read = self._read(hidden, self.sub_tokens.split(ids)[..., :-1])
        total = hidden.new_zeros(ids.shape, dtype=widened(hidden.dtype))
        for number in range(len(self.sub_tokens)):
            log_probability = self._logits(read[:, :, number], number).log_softmax(dim=-1)
            total = total - (targets[:, :, number] * log_probability).sum(dim=-1)
        return total

    def log_likelihood(self, hidden: Tensor, ids: Tensor, random: CounterRandom | None = None) -> Tensor:
        sub_tokens = self.sub_tokens.split(ids)
        read = self._read(hidden, sub_tokens[..., :-1])  # (B, n, P, D)
        total = hidden.new_zeros(ids.shape, dtype=widened(hidden.dtype))
        for number in range(len(self.sub_tokens)):
            logits, sub_token = self._logits(read[:, :, number], number), sub_tokens[..., number]
            nats = F.cross_entropy(logits.flatten(0, 1), sub_token.flatten(), reduction="none")
            total = total - nats.view_as(total)
        return total

    def _logits(self, read: Tensor, number: int) -> Tensor:
        """Map what element `number` read, `(B, n, D)`, to logits of its sub-token."""
        return self.heads[number if len(self.heads) > 1 else 0](read)

    def _read(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Map `(B, n, D)` and the first p sub-tokens `(B, n, p)` to `(B, n, p + 1, D)`: element p predicts the next."""
        elements = torch.cat((hidden[:, :, None], self._embedded(known).to(hidden.dtype)), dim=2)
        if self.positions is not None:
            elements = elements + self.positions[: elements.shape[2]].to(hidden.dtype)
        elements = elements.flatten(0, 1)  # (B n, p + 1, D)
        read = [self._run_blocks(sequences) for sequences in elements.split(_MOST_SEQUENCES)]
        return torch.cat(read).unflatten(0, hidden.shape[:2])

    def _embedded(self, known: Tensor) -> Tensor:
        """Embed sub-tokens `(B, n, p)`: `(B, n, p, D)`."""
        if known.shape[-1] == 0:
            return known.new_zeros(*known.shape, self.width, dtype=torch.float32)
        if self.code_projection is not None:
            codes = self.codes[0].codes(known)
            codes = codes.cumsum(dim=-2) if self.reads_codes == "sum" else codes
            return self.code_projection(codes.to(self.code_projection.weight.dtype))
        tables = self.shared if self.tables is None else self.tables
        pairs = zip(tables, known.unbind(dim=-1), strict=False)  # the tables of those that are known
        return torch.stack([table(sub_token) for table, sub_token in pairs], dim=2)

    def _run_blocks(self, elements: Tensor) -> Tensor:
        rotary = None if self.rotations is None else self.rotations[: elements.shape[1]]
        for block in self.blocks:
            elements = block(elements, rotary=rotary, causal=True)
        return self.norm(elements)


class MaskedBitHead(SubTokenHead):
    """An MLP that predicts the masked bits of an id from the others, for 2^b ids.

    Its input is an embedding of each bit (0, 1 or masked), its condition the position's hidden state and the fraction
    of masked bits. In training that fraction is the sigmoid of a normal number of deviation 0.8, and the loss the mean
    cross-entropy of a bit, times b, in which a bit that was not masked counts `unmasked_weight`. In eval mode the
    number of masked bits k is uniform in 1 ... b and the loss `b / k` times the sum of their cross-entropies: an
    unbiased estimate of the bound that is the mean over all orders of unmasking the bits one by one. `log_likelihood`
    is exact for the model that unmasks them in turn, the least significant first.

    Args:
        block: settings of the trunk's blocks; their width is D.
        vocab_size: K = 2^b.
        width: of the MLP; 2048 in BAR.
        depth: its blocks, at least 1; 3 in BAR.
        unmasked_weight: in [0, 1]; 0.1 in BAR's code.
        told_ratio: what the MLP is told of the masked bits in training: the fraction that is masked (`"masked"`), as in
            sampling, or what it was rounded from (`"drawn"`: BAR's code).

    Raises:
        ValueError: a vocabulary that is no power of two, or a setting out of its range.
    """

    def __init__(
        self,
        block: BlockSettings,
        vocab_size: int,
        *,
        width: int = 2048,
        depth: int = 3,
        unmasked_weight: float = 0.1,
        told_ratio: Literal["masked", "drawn"] = "masked",
    ) -> None:
        bits = bits_of_vocabulary(vocab_size, "MaskedBitHead")
        super().__init__((2,) * bits, vocab_size, width=block.width)
        if depth < 1 or width < 1:
            raise ValueError(f"MaskedBitHead's depth and width must be at least 1, got {depth} and {width}")
        if not 0 <= unmasked_weight <= 1:
            raise ValueError(f"unmasked_weight must lie in [0, 1], got {unmasked_weight}")
        if told_ratio not in ("masked", "drawn"):
            raise ValueError(f"told_ratio must be 'masked' or 'drawn', got {told_ratio!r}")
        self.bits = bits
        self.masked_bit = 2
        self.unmasked_weight = unmasked_weight
        self.told_ratio = told_ratio
        each = ceil(width / bits)
        self.hidden_norm = Norm(block.width, "rms", epsilon=_EPSILON)
        self.hidden_projection = nn.Linear(block.width, width)
        self.bit_embedding = nn.Embedding(3, each)
        self.input_projection = nn.Linear(bits * each, width)
        self.input_norm = Norm(width, "rms", epsilon=_EPSILON)
        self.ratio_embedding = RatioEmbedding(width)
        self.blocks = nn.ModuleList(BitBlock(width) for _ in range(depth))
        self.last = ModulatedNorm(width)
        self.output = LogitHead(width, 2 * bits, bias=True)

    def bit_logits(self, hidden: Tensor, bits: Tensor, ratio: Tensor | None = None) -> Tensor:
        """Make logits of every bit.

        Args:
            hidden: `(B, n, D)`.
            bits: `(B, n, b)` int64, the least significant first: 0, 1, or `masked_bit`.
            ratio: `(B, n)`, what the MLP is told of the fraction of masked bits; that fraction by default.

        Returns:
            `(B, n, b, 2)` float32 or float64.
        """
        if ratio is None:
            ratio = (bits == self.masked_bit).double().mean(dim=-1)
        condition = F.silu(self.ratio_embedding(ratio) + self.hidden_projection(self.hidden_norm(hidden)))
        embedded = rearrange(self.bit_embedding(bits), "b n bits d -> b n (bits d)")
        x = self.input_norm(self.input_projection(embedded))
        for block in self.blocks:
            x = block(x, condition)
        return rearrange(self.output(self.last(x, condition)), "b n (bits values) -> b n bits values", values=2)

    def sub_token_logits(self, hidden: Tensor, known: Tensor) -> Tensor:
        number = known.shape[-1]
        bits = F.pad(known, (0, self.bits - number), value=self.masked_bit)
        return self.bit_logits(hidden, bits)[:, :, number]

    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        bits = self.sub_tokens.split(ids)
        masked, ratio = self._masks(ids.shape[1], random)
        told = ratio if self.training and self.told_ratio == "drawn" else None
        logits = self.bit_logits(hidden, bits.masked_fill(masked, self.masked_bit), told)
        nats = F.cross_entropy(logits.flatten(0, 2), bits.flatten(), reduction="none").view_as(masked)
        weights = masked.to(nats.dtype).clamp(min=self.unmasked_weight if self.training else 0.0)
        total = weights.sum(dim=-1)
        values = self.bits * (nats * weights).sum(dim=-1) / total
        return values, total / self.bits if self.training else torch.ones_like(total)

    def _masks(self, positions: int, random: CounterRandom) -> tuple[Tensor, Tensor]:
        """Draw masks `(B, n, b)` bool, one masked bit at least in each id, and the ratios `(B, n)` that gave their
        numbers; a function of the samples alone."""
        if self.training:
            ratio = torch.sigmoid(_RATIO_DEVIATION * random.normal(Purpose.MASK_RATIO, positions)).clamp(
                min=1 / self.bits
            )
            counts = (self.bits * ratio).round()
        else:
            ratio = random.uniform(Purpose.MASK_RATIO, positions)
            counts = (self.bits * ratio).ceil()
        uniforms = random.uniform(Purpose.MASK_ORDER, positions * self.bits)
        uniforms = rearrange(uniforms, "b (n bits) -> b n bits", bits=self.bits)
        return random_subset(uniforms, counts[..., None]), ratio


class BitBlock(nn.Module):
    """A gated MLP, modulated and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, "rms", epsilon=_EPSILON)
        self.mlp = MLP(width, 8 * width // 3, kind="swiglu", bias=True)
        self.modulation = Modulation(width, width, vectors=3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # two of (B, n, width) -> (B, n, width)
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class ModulatedNorm(nn.Module):
    """RMSNorm with a shift and a scale from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, "rms", epsilon=_EPSILON)
        self.modulation = Modulation(width, width, vectors=2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # two of (B, n, width) -> (B, n, width)
        shift, scale = self.modulation(condition)
        return self.norm(x) * (1 + scale) + shift


class RatioEmbedding(nn.Module):
    """Sines and cosines of a ratio in [0, 1] at fixed random frequencies, then two linear layers with SiLU between them
    (Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", 2020)."""

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(waves))
        self.layers = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = never_narrower(fn)(frequencies)
        return self

    def forward(self, ratio: Tensor) -> Tensor:  # (...) -> (..., width)
        angles = 2 * pi * ratio.to(self.frequencies.dtype)[..., None] * self.frequencies
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.layers(waves.to(first_weight(self.layers).dtype))
