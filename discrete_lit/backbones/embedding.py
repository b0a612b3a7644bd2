"""What stands at each place of the input."""

from typing import Literal

import torch
from torch import Tensor, nn

from discrete_lit.backbones.backbone import SequenceLayout
from discrete_lit.backbones.id_parts import IdParts, bits_of_vocabulary

InputKind = Literal["table", "bits", "parts"]


class TokenTable(nn.Module):
    """A learned vector for each id, the mask id among them."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(layout.vocab_size + int(layout.mask_token), width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n) -> (B, n, D)
        return self.table(tokens)


class BitProjection(nn.Module):
    """A linear map of the bits of a place's ids as -1 and 1, least significant first; 0 for those of a masked id.

    (Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024.)
    """

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.bits = bits_of_vocabulary(layout.vocab_size, "token_embedding='bits'")
        self.project = nn.Linear(layout.parts * self.bits, width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n * parts) -> (B, n, D)
        shifts = torch.arange(self.bits, device=tokens.device)
        signs = ((tokens[..., None] >> shifts) & 1) * 2 - 1
        signs = signs.masked_fill((tokens == self.layout.mask_id)[..., None], 0)
        return self.project(signs.unflatten(1, (-1, self.layout.parts)).flatten(2).to(self.project.weight.dtype))


class PartTables(nn.Module):
    """The sum of a learned vector for each part of an id (Luo et al., "Open-MAGVIT2", 2024)."""

    def __init__(self, parts: IdParts, width: int) -> None:
        super().__init__()
        self.parts = parts
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in parts.sizes)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n) -> (B, n, D)
        parts = self.parts.split(tokens).unbind(dim=-1)
        vectors = [table(part) for table, part in zip(self.tables, parts, strict=True)]
        return torch.stack(vectors).sum(dim=0)


class VectorProjection(nn.Module):
    """A linear map of the vectors that stand for ids."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        super().__init__()
        assert layout.input_dim is not None
        self.project = nn.Linear(layout.input_dim, width)

    def forward(self, vectors: Tensor) -> Tensor:  # (B, n, input_dim) -> (B, n, D)
        return self.project(vectors)


class TimeEmbedding(nn.Module):
    """Cosines and sines of a scalar, then two linear layers with SiLU between them (Peebles & Xie, "DiT", 2023)."""

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 128) -> None:
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(waves, dtype=torch.float64) / waves)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:  # (B,) -> (B, D)
        angles = time.float()[:, None] * self.frequencies
        return self.layers(torch.cat((angles.cos(), angles.sin()), dim=-1))


def embed_tokens(
    layout: SequenceLayout, width: int, kind: InputKind, parts: IdParts | None
) -> TokenTable | BitProjection | PartTables | VectorProjection:
    """The embedding that a layout needs.

    Args:
        layout: the sequence.
        width: D.
        kind: of ids.
        parts: that a place head predicts an id in; None without one.

    Raises:
        ValueError: bits of a vocabulary that is no power of two, parts without a place head, a table for several ids at
            a place, or one of all ids beside a place head.
    """
    if layout.input_dim is not None:
        return VectorProjection(layout, width)
    if kind == "bits":
        return BitProjection(layout, width)
    if kind == "parts":
        if parts is None:
            raise ValueError("token_embedding='parts' embeds the parts that a place_head predicts: give one")
        return PartTables(IdParts(parts.sizes, layout.vocab_size), width)
    if parts is not None:
        raise ValueError(
            f"token_embedding='table' has a row for each of the {layout.vocab_size} ids, which a place_head is there "
            "to avoid: use 'bits' or 'parts'"
        )
    if layout.parts > 1:
        raise ValueError(f"token_embedding='table' has one id at a place, this sequence has {layout.parts}: use 'bits'")
    return TokenTable(layout, width)
