"""The input of the transformer: an embedding of the tokens, of the time, and of where each token stands.

Tokens come as ids (a table, their bits, or a table for each sub-token) or as vectors. Positions are learned vectors,
or rotations of queries and keys along the sequence or along each axis of the grid (RoPE: Su et al., "RoFormer", 2021).
The fixed sines and cosines of Vaswani et al., "Attention Is All You Need", 2017, stand at the end.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.backbone import SequenceLayout, SubTokens, bits_of_vocabulary
from discrete_lit.core.modules import at_least_float32, widened
from discrete_lit.core.synchronisation import on_device

InputKind = Literal["table", "bits", "bits_mlp", "bit_table", "parts", "codes"]
PositionKind = Literal["learned", "sinusoidal", "rope_1d", "rope_2d", "learned_rope_2d", "rope_scales"]


def embed_tokens(
    layout: SequenceLayout,
    width: int,
    *,
    kind: InputKind,
    sub_tokens: SubTokens | None,
    digits: Sequence[int] | None = None,
    code_dim: int | None = None,
) -> "TokenTable | BitProjection | BitMLP | BitTable | SubTokenTables | CodeProjection | VectorProjection":
    """Make the embedding that a layout needs.

    Args:
        layout: the sequence.
        width: D.
        kind: of ids: `"table"`; `"bits"`, `"bits_mlp"` or `"bit_table"`; `"parts"`, a table for each sub-token; or
            `"codes"`, a linear map of the tokenizer's code vectors of the sub-tokens.
        sub_tokens: that a `place_head` predicts an id in; None without one.
        digits: sizes of the digits of an id, each with a table that is added to that of the ids.
        code_dim: width of the code vectors of `"codes"`.

    Raises:
        ValueError: bits of a vocabulary that is no power of two, sub-tokens without a `place_head`, a table of all
            ids beside a `place_head`, or digits that do not make up the vocabulary, or of other than one id.
    """
    if digits is not None and (kind != "table" or layout.input_dim is not None or layout.sub_tokens > 1):
        raise ValueError(
            f"embedded_digits={list(digits)} belong to token_embedding='table' of one id at each position, which this "
            "sequence does not have"
        )
    if (code_dim is not None) != (kind == "codes") or (code_dim is not None and code_dim < 1):
        raise ValueError(
            f"code_dim, the width of the tokenizer's code vectors, is of token_embedding='codes' and needed there, got "
            f"code_dim={code_dim} with token_embedding={kind!r}"
        )
    if layout.input_dim is not None:
        return VectorProjection(layout, width)
    if kind == "bits":
        return BitProjection(layout, width)
    if kind == "bits_mlp":
        return BitMLP(layout, width)
    if kind == "bit_table":
        return BitTable(layout, width)
    if kind == "parts":
        if sub_tokens is None:
            raise ValueError("token_embedding='parts' embeds the sub-tokens that a place_head predicts: give one")
        return SubTokenTables(SubTokens(sub_tokens.sizes, layout.vocab_size), width)
    if code_dim is not None:
        if sub_tokens is None:
            raise ValueError("token_embedding='codes' embeds the sub-tokens that a place_head predicts: give one")
        return CodeProjection(SubTokens(sub_tokens.sizes, layout.vocab_size), width, code_dim=code_dim)
    if sub_tokens is not None:
        raise ValueError(
            f"token_embedding='table' has a row for each of the {layout.vocab_size} ids, which a place_head is there "
            "to avoid: use 'bits', 'bits_mlp', 'bit_table', 'parts' or 'codes'"
        )
    return TokenTable(layout, width, digits=None if digits is None else SubTokens(digits, layout.vocab_size))


class TokenTable(nn.Module):
    """A learned vector for each id, the mask id among them; the sum of one for each of several ids at a position.

    The several ids, of which each has a table of its own, are the groups of bits of MaskBit's BERT. With digits, the
    vector of an id is the sum of its own and one for each of its digits, so that ids whose codes are alike in one
    component share what is learned of it: as a word is embedded with its parts (Bojanowski et al., "Enriching Word
    Vectors with Subword Information", 2017). The mask id has no digits.

    Args:
        layout: the sequence.
        width: D.
        digits: of an id, as FSQ's components are: that of `levels: [8, 6, 5]` has the sizes 8, 6 and 5.
    """

    def __init__(self, layout: SequenceLayout, width: int, *, digits: SubTokens | None = None) -> None:
        super().__init__()
        self.sub_tokens = layout.sub_tokens
        self.rows = layout.vocab_size + int(layout.mask_token)
        self.outputs = layout.outputs
        self.mask_id = layout.mask_id
        self.table = nn.Embedding(self.sub_tokens * self.rows, width)
        self.digits = digits
        self.digit_tables = None
        if digits is not None:
            self.digit_tables = nn.ModuleList(nn.Embedding(size, width) for size in digits.sizes)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n * sub_tokens) -> (B, n, D)
        if self.digits is not None:
            return self.table(tokens) + self._of_digits(tokens)
        if self.sub_tokens == 1:
            return self.table(tokens)
        ids = rearrange(tokens, "b (n sub) -> b n sub", sub=self.sub_tokens)
        return self.table(ids + self.rows * torch.arange(self.sub_tokens, device=tokens.device)).sum(dim=2)

    def _of_digits(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        assert self.digits is not None and self.digit_tables is not None
        digits = self.digits.split(tokens).unbind(dim=-1)
        vectors = [table(digit) for table, digit in zip(self.digit_tables, digits, strict=True)]
        return torch.stack(vectors).sum(dim=0).masked_fill((tokens == self.mask_id)[..., None], 0)

    def logit_weight(self) -> Tensor:
        """The rows of the ids that are predicted, `(sub_tokens * outputs, D)`, to which logits may be tied."""
        if self.digits is not None:
            ids = torch.arange(self.outputs, device=self.table.weight.device)
            return self.table.weight[: self.outputs] + self._of_digits(ids)
        if self.sub_tokens == 1:
            return self.table.weight[: self.outputs]
        return self.table.weight.unflatten(0, (self.sub_tokens, self.rows))[:, : self.outputs].flatten(0, 1)


class BitProjection(nn.Module):
    """A linear map of the bits of a position's ids as -1 and 1, least significant first; 0 for those of a masked id.

    (Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024.)
    """

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.bits = bits_of_vocabulary(layout.vocab_size, "token_embedding='bits'")
        self.project = nn.Linear(layout.sub_tokens * self.bits, width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n * sub_tokens) -> (B, n, D)
        return self.project(_signs(tokens, self.bits, self.layout).to(self.project.weight.dtype))


class BitMLP(nn.Module):
    """A SwiGLU of the bits of a position's ids as -1 and 1, one and a half times as wide as D (BitDance, 2026)."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.bits = bits_of_vocabulary(layout.vocab_size, "token_embedding='bits_mlp'")
        hidden = int(1.5 * width)
        self.expand = nn.Linear(layout.sub_tokens * self.bits, 2 * hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n * sub_tokens) -> (B, n, D)
        signs = _signs(tokens, self.bits, self.layout).to(self.expand.weight.dtype)
        gate, value = self.expand(signs).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


def _signs(tokens: Tensor, bits: int, layout: SequenceLayout) -> Tensor:
    """The bits of ids `(B, n * sub_tokens)` as -1 and 1, least significant first, `(B, n, sub_tokens * bits)`; 0 of the
    mask id."""
    signs = ((tokens[..., None] >> torch.arange(bits, device=tokens.device)) & 1) * 2 - 1
    signs = signs.masked_fill((tokens == layout.mask_id)[..., None], 0)
    return rearrange(signs, "b (n sub) bits -> b n (sub bits)", sub=layout.sub_tokens)


class BitTable(nn.Module):
    """A learned vector of D / bits channels for the values 0 and 1 of any bit, those of a position's ids side by side
    through a linear layer (BAR, 2026). The bits of a mask id have a third vector."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.bits = bits_of_vocabulary(layout.vocab_size, "token_embedding='bit_table'")
        each = -(-width // self.bits)
        self.table = nn.Embedding(2 + int(layout.mask_token), each)
        self.project = nn.Linear(layout.sub_tokens * self.bits * each, width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n * sub_tokens) -> (B, n, D)
        bits = (tokens[..., None] >> torch.arange(self.bits, device=tokens.device)) & 1
        bits = bits.masked_fill((tokens == self.layout.mask_id)[..., None], 2)
        vectors = self.table(bits)
        return self.project(rearrange(vectors, "b (n sub) bits d -> b n (sub bits d)", sub=self.layout.sub_tokens))


class SubTokenTables(nn.Module):
    """The sum of a learned vector for each sub-token of an id (Luo et al., "Open-MAGVIT2", 2024)."""

    def __init__(self, sub_tokens: SubTokens, width: int) -> None:
        super().__init__()
        self.sub_tokens = sub_tokens
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sub_tokens.sizes)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n) -> (B, n, D)
        sub_tokens = self.sub_tokens.split(tokens).unbind(dim=-1)
        vectors = [table(sub_token) for table, sub_token in zip(self.tables, sub_tokens, strict=True)]
        return torch.stack(vectors).sum(dim=0)


class CodeProjection(nn.Module):
    """The sum over the sub-tokens of an id of a linear map, with its bias, of the vector that the tokenizer's codebook
    has for each (Lee et al., "RQ-Transformer", CVPR 2022, section 3.2.1).

    The vectors are the frozen tokenizer's, not trained here; `read_codes` copies them. Until then they are NaN.

    Args:
        sub_tokens: of an id, all of one size: the codes of a position.
        width: D.
        code_dim: E, of a code vector.

    Raises:
        ValueError: sub-tokens of several sizes.
    """

    vectors: Tensor

    def __init__(self, sub_tokens: SubTokens, width: int, *, code_dim: int) -> None:
        super().__init__()
        if len(set(sub_tokens.sizes)) > 1:
            raise ValueError(
                f"token_embedding='codes' needs codes of one codebook size, got sub-tokens of {list(sub_tokens.sizes)}"
            )
        self.sub_tokens = sub_tokens
        self.code_dim = code_dim
        shape = (len(sub_tokens), sub_tokens.sizes[0], code_dim)
        self.register_buffer("vectors", torch.full(shape, torch.nan))
        self.project = nn.Linear(code_dim, width)

    def read_codes(self, vectors: Tensor) -> None:
        """Copy the code vectors of each sub-token, `(P, K, E)`, or of all, `(1, K, E)`.

        Raises:
            ValueError: vectors of another shape.
        """
        expected = tuple(self.vectors.shape)
        if tuple(vectors.shape[1:]) != expected[1:] or len(vectors) not in (1, expected[0]):
            raise ValueError(
                f"the backbone embeds the codes of {expected[0]} codebooks of {expected[1]} vectors of {expected[2]} "
                f"(code_dim), the tokenizer has {tuple(vectors.shape)}"
            )
        self.vectors.copy_(vectors.expand(expected))

    def codes(self, sub_tokens: Tensor) -> Tensor:
        """Look up the vectors `(..., p, E)` of the first p sub-tokens `(..., p)` int64."""
        found = [self.vectors[number][ids] for number, ids in enumerate(sub_tokens.unbind(dim=-1))]
        return torch.stack(found, dim=-2)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n) -> (B, n, D)
        codes = self.codes(self.sub_tokens.split(tokens)).to(self.project.weight.dtype)
        return self.project(codes).sum(dim=-2)


class VectorProjection(nn.Module):
    """A linear map of the vectors that stand for ids, as VAR's input has them."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        assert layout.input_dim is not None
        self.project = nn.Linear(layout.input_dim, width)

    def forward(self, vectors: Tensor) -> Tensor:  # (B, n, input_dim) -> (B, n, D)
        return self.project(vectors.to(self.project.weight.dtype))


class TimeEmbedding(nn.Module):
    """Cosines and sines of a scalar, then two linear layers with SiLU between them (Peebles & Xie, "DiT", 2023).

    Args:
        width: D.
        waves: w, how many frequencies there are.
        base: the frequencies are base^(-i / w), i < w.
        hidden: inner width; D by default.
    """

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 128, *, base: float = 10000.0, hidden: int | None = None) -> None:
        super().__init__()
        self.waves, self.base = waves, base
        self.register_buffer("frequencies", self._make().float(), persistent=False)
        hidden = width if hidden is None else hidden
        self.layers = nn.Sequential(nn.Linear(2 * waves, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def _make(self) -> Tensor:
        return self.base ** -(torch.arange(self.waves, dtype=torch.float64) / self.waves)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.frequencies = made_again(self._make(), like=self.frequencies)
        return self

    def forward(self, time: Tensor) -> Tensor:  # (B,) -> (B, D)
        angles = time.to(self.frequencies.dtype)[:, None] * self.frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.layers(waves.to(first_weight(self.layers).dtype))


class Positions(nn.Module):
    """The positions of a sequence: learned or fixed vectors added to it, or rotations of queries and keys.

    Args:
        layout: the sequence.
        kind: `"learned"`, fixed cosines and sines along the sequence (`"sinusoidal"`: MusicGen; the frequencies are
            10000^(-i / (D / 2 - 1))), or rotary along the sequence (`"rope_1d"`) or along each axis of the grid
            (`"rope_2d"`), or both learned and along each axis (`"learned_rope_2d"`). Of a next-scale sequence along
            each axis of the last scale (`"rope_scales"`), with a learned vector of each scale, and one of what stands
            in front.
        starts: elements before the first position of the grid.
        width: D.
        head_dim: width of a head.
        zero_starts: on a grid, turn the elements before the first position to 0 instead of leaving them alone.
        rotary_base: of the wavelengths of rotary positions.
        rotary_offset: on a grid, how far along each axis its first position lies from what stands before it.
        last_turned: make rotations of the last position too, where a sequence in raster order never reads it.
    """

    table: Tensor | None
    waves: Tensor | None
    level: Tensor

    def __init__(
        self,
        layout: SequenceLayout,
        kind: PositionKind,
        *,
        starts: int,
        width: int,
        head_dim: int,
        zero_starts: bool = False,
        rotary_base: float = 10000.0,
        rotary_offset: float = 0.0,
        last_turned: bool = False,
    ) -> None:
        super().__init__()
        self.starts = starts
        self.rotary_offset = rotary_offset
        self.kind: PositionKind = kind
        self.grid = layout.grid
        self.head_dim = head_dim
        self.zero_starts = zero_starts
        self.rotary_base = rotary_base
        # An order of its own may put any position into the input.
        self.read = layout.positions
        if layout.attention != "bidirectional" and not layout.any_order:
            self.read -= layout.block_size
        self.turned = layout.positions if last_turned else self.read
        learned = kind in ("learned", "learned_rope_2d")
        self.embedding = nn.Parameter(torch.empty(1, starts + self.read, width)) if learned else None
        self.scale_sizes, self.level_embedding, self.start = layout.scale_sizes, None, None
        if kind == "rope_scales":
            if not layout.scale_sizes or starts != 1:
                raise ValueError(
                    "positions='rope_scales' needs a generator that tells the sizes of its scales, and one element in "
                    "front, the first scale's: conditioning='prefix_adaln' or 'prefix' without registers"
                )
            self.level_embedding = nn.Embedding(len(layout.scales), width)
            self.start = nn.Parameter(torch.empty(1, width))
            level = torch.arange(len(layout.scales)).repeat_interleave(torch.tensor(layout.scales))
            self.register_buffer("level", level, persistent=False)
        turns = kind not in ("learned", "sinusoidal")
        self.register_buffer("table", self._make().float() if turns else None, persistent=False)
        self.width = width
        self.register_buffer("waves", self._waves().float() if kind == "sinusoidal" else None, persistent=False)

    def _waves(self) -> Tensor:
        """Compute the fixed vectors of all elements, `(1, starts + read, D)` float64."""
        half = self.width // 2
        if self.width % 2 or half < 2:
            raise ValueError(f"positions='sinusoidal' needs an even width of 4 or more, got {self.width}")
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / (half - 1))
        angles = torch.arange(self.starts + self.read, dtype=torch.float64)[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[None]

    def _make(self) -> Tensor:
        """Compute the rotations `(starts + turned, head_dim / 2, 2)` of rotary positions, float64."""
        if self.kind == "rope_1d":
            coordinates = torch.arange(self.starts + self.turned)[:, None]
            return rotary_table(coordinates, self.head_dim, base=self.rotary_base, dtype=torch.float64)
        if self.kind == "rope_scales":
            coordinates = scale_coordinates(self.scale_sizes)
            return rotary_table(coordinates, self.head_dim, base=self.rotary_base, dtype=torch.float64)
        still = torch.tensor((0.0, 0.0) if self.zero_starts else (1.0, 0.0), dtype=torch.float64)
        on_grid = rotary_table(
            grid_coordinates(self.grid)[: self.turned] + self.rotary_offset,
            self.head_dim,
            base=self.rotary_base,
            dtype=torch.float64,
        )
        return torch.cat((still.expand(self.starts, self.head_dim // 2, 2), on_grid))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.table is not None:
            self.table = made_again(self._make(), like=self.table)
        if self.waves is not None:
            self.waves = made_again(self._waves(), like=self.waves)
        return self

    def add(self, embedded: Tensor, filled: int, order: Tensor | None) -> Tensor:
        """Add learned or fixed positions to `(B, n, D)`, elements that follow `filled` others."""
        if self.level_embedding is not None and self.start is not None:
            embedded = embedded + self.level_embedding(self.level[filled : filled + embedded.shape[1]])
            return embedded if filled else torch.cat((embedded[:, :1] + self.start, embedded[:, 1:]), dim=1)
        vectors = self.embedding if self.waves is None else self.waves.to(embedded.dtype)
        if vectors is None:
            return embedded
        count = embedded.shape[1]
        if order is None:
            return embedded + vectors[:, filled : filled + count]
        return embedded + vectors[0][self._rows(filled, count, order)]

    def rotary(self, filled: int, count: int, order: Tensor | None) -> Tensor | None:
        """Give the rotations of `count` elements that follow `filled` others: `(count, head_dim / 2, 2)`, or with an
        order `(B, 1, count, head_dim / 2, 2)`."""
        if self.table is None:
            return None
        if order is None:
            return self.table[filled : filled + count]
        return self.table[self._rows(filled, count, order)][:, None]

    def of(self, places: Tensor, numbers: tuple[int, ...], *, starts: bool) -> Tensor:
        """Give the rotations of some positions, behind the starts or without them.

        Args:
            places: `(B or 1, N)`, the positions in the sequence's order.
            numbers: which of them.
            starts: whether the starts stand before.

        Returns:
            `(B or 1, 1, count, head_dim / 2, 2)`.
        """
        assert self.table is not None
        rows = places[:, on_device(torch.tensor, numbers, device=places.device)] + self.starts
        if starts:
            rows = torch.cat((torch.arange(self.starts, device=rows.device).expand(len(rows), -1), rows), dim=1)
        return self.table[rows][:, None]

    def _rows(self, filled: int, count: int, order: Tensor) -> Tensor:
        """Find the rows of the tables: `(B, count)`."""
        starts = torch.arange(self.starts, device=order.device).expand(len(order), -1)
        return torch.cat((starts, order + self.starts), dim=1)[:, filled : filled + count]


class PositionInstructions(nn.Module):
    """Elements that say which position comes next (Pang et al., "RandAR", 2024): a vector, turned by its rotation.

    Behind the starts stand the instruction of the first position, its token, the instruction of the second, and so on.
    A pass ends with the instruction of the position that is predicted next, and with those of `ahead` more positions,
    whose tokens are not known, where it is asked for them.

    Args:
        width: D.
        heads: into which the vector is cut to be turned.
        starts: elements before the first instruction.
    """

    def __init__(self, width: int, *, heads: int, starts: int) -> None:
        super().__init__()
        self.heads, self.starts = heads, starts
        self.vector = nn.Parameter(torch.empty(1, width))

    def tokens(self, filled: int, count: int, ahead: int) -> int:
        """Count the tokens among `count` elements that follow `filled` others."""
        return (count - (0 if filled else self.starts) - ahead) // 2

    def numbers(self, filled: int, new: int, ahead: int) -> tuple[int, ...]:
        """List the numbers, in the sequence's order, of the positions that the elements of `new` tokens are about."""
        read = max(filled - self.starts, 0) // 2
        pairs = (number for token in range(read, read + new) for number in (token, token + 1))
        return (*(() if filled else (0,)), *pairs, *(read + new + 1 + number for number in range(ahead)))

    def of(self, hidden: Tensor, filled: int, new: int, ahead: int) -> Tensor:
        """Take the outputs at the instructions of the outputs `(B, count, D)` of a pass."""
        first = 1 if filled else self.starts
        regular = first + 2 * (new - (1 if filled else 0))  # the instruction of the next position
        if not ahead:
            return hidden[:, first : regular + 1 : 2]
        return torch.cat((hidden[:, first : regular + 1 : 2], hidden[:, regular + 1 :]), dim=1)

    def forward(self, embedded: Tensor, filled: int, ahead: int, *, places: Tensor, positions: Positions) -> Tensor:
        """Put the instructions between embedded tokens.

        Args:
            embedded: `(B, n, D)`.
            filled: elements before, the starts among them.
            ahead: instructions at the end whose tokens are not known, beside the first one.
            places: `(B or 1, N)`, the positions in the sequence's order.
            positions: rotary, on a grid.
        """
        new = embedded.shape[1]
        read = max(filled - self.starts, 0) // 2
        first = read + 1 if filled else 0
        instructed = tuple(range(first, read + new + 1 + ahead))
        turned = rotate(self.vector.view(1, self.heads, 1, -1), positions.of(places, instructed, starts=False))
        instructions = turned.transpose(1, 2).flatten(2).expand(len(embedded), -1, -1).to(embedded.dtype)
        # Which of both comes where: tokens have the numbers behind the instructions.
        before = len(instructed)
        pairs = (number for token in range(new) for number in (before + token, token + (0 if filled else 1)))
        turns = (*(() if filled else (0,)), *pairs, *range(before - ahead, before))
        both = torch.cat((instructions, embedded), dim=1)
        return both.index_select(1, on_device(torch.tensor, turns, device=both.device))


def rotary_table(
    coordinates: Tensor, head_dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the angles of positions with one or more coordinates; each turns an equal fraction of the pairs.

    Args:
        coordinates: `(n, axes)`.
        head_dim: a multiple of 2 x axes.
        base: the wavelengths are 2 pi base^(2i / d).
        dtype: of the table; the angles are float64.

    Returns:
        `(n, head_dim / 2, 2)`: cosine and sine of every pair.

    Raises:
        ValueError: a head width that does not divide.
    """
    axes = coordinates.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"rotary positions over {axes} axes need a head width divisible by {2 * axes}, got {head_dim}")
    pairs = head_dim // (2 * axes)
    frequencies = base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = rearrange(coordinates.double()[..., None] * frequencies, "n axes pairs -> n (axes pairs)")
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)


def made_again(table: Tensor, *, like: Tensor) -> Tensor:
    """Give a table, float64, in the place of one that its module has moved: on its device, in its precision.

    Half precision would round the angles of distant positions to other positions, and a float64 made of float32 has no
    more digits than that: so a table is computed anew, and is in float32 at least.
    """
    return table.to(like.device, widened(like.dtype)) if like.device.type != "meta" else like


def first_weight(layers: nn.Sequential) -> Tensor:
    """The weight of the first, linear one of some layers, whose precision is that of their input."""
    return cast(nn.Linear, layers[0]).weight


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of `x (..., heads, n, head_dim)` by `table`.

    Args:
        table: cosine and sine, `(n, head_dim / 2, 2)`, or with a batch and a head dimension before. With four numbers,
            cosine and sine of the first of a pair, then of the second, which are turned by angles of their own (HART).
    """
    # Not by einops: this runs for every token that is drawn.
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    angles = table.to(pairs.dtype)
    if angles.shape[-1] == 4:
        (even, odd), (cosine, sine, other_cosine, other_sine) = pairs.unbind(-1), angles.unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, even * other_sine + odd * other_cosine), dim=-1)
        return turned.flatten(-2).to(x.dtype)
    if torch.compiler.is_compiling():
        # A compiler joins these; it has no code for complex numbers.
        (even, odd), (cosine, sine) = pairs.unbind(-1), angles.unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    else:
        # One pass over memory in place of seven.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(angles))
    return turned.flatten(-2).to(x.dtype)


def grid_coordinates(grid: tuple[int, ...]) -> Tensor:
    """Give the coordinates of every token of a raster-ordered grid: `(N, axes)` int64."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(-1, len(grid))


def scale_coordinates(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Give the row and column of the last scale that each place of all scales is nearest to (Infinity).

    Args:
        sizes: height and width of each scale.

    Returns:
        `(N, 2)` int64: of place i of h, row round(i H / h), halves to the even one; columns likewise.
    """
    last = torch.tensor(sizes[-1], dtype=torch.float32)
    found = [(grid_coordinates(size) * (last / torch.tensor(size, dtype=torch.float32))).round() for size in sizes]
    return torch.cat(found).long()


def sine_cosine_table(
    coordinates: Tensor, width: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute fixed embeddings of positions with one or more coordinates; each fills an equal fraction of the width.

    Args:
        coordinates: `(n, axes)`, integer.
        width: D; a multiple of 2 x axes.
        base: the wavelengths are 2 pi base^(2i / d).
        dtype: of the table; the angles are float64.

    Returns:
        `(n, D)`: for each axis the sines of all wavelengths, then the cosines.

    Raises:
        ValueError: a width that does not divide.
    """
    axes = coordinates.shape[1]
    if width % (2 * axes):
        raise ValueError(f"sine-cosine positions over {axes} axes need a width divisible by {2 * axes}, got {width}")
    waves = width // (2 * axes)
    frequencies = base ** -(torch.arange(waves, dtype=torch.float64) / waves)
    angles = coordinates.double()[..., None] * frequencies  # (n, axes, waves)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)
