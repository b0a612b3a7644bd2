"""Next sub-token prediction (Luo et al., "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive
Visual Generation", 2024, section 3.2)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.head import Head
from discrete_lit.backbones.norms import Norm
from discrete_lit.backbones.place_head import PlaceHead
from discrete_lit.processes import CounterRandom

# CUDA's attention kernels take fewer than 2^16 sequences (pytorch/pytorch#146704).
_MOST_SEQUENCES = 2**16 - 1


class FactorisedHead(PlaceHead):
    """A small causal transformer over the parts of one id, of unequal sizes or equal ones.

    It reads the place's hidden state and an embedding of each part so far; element p predicts part p. Parts of b / g
    bits each make it an exact autoregressive head over g groups of bits.

    Args:
        block: settings of the trunk's blocks, which its own have too, without modulation.
        vocab_size: K.
        sizes: of the parts, least significant first; (2^6, 2^12) in Open-MAGVIT2.
        depth: blocks, at least 1.

    Raises:
        ValueError: parts that do not make up the vocabulary, or a depth below 1.
    """

    def __init__(self, block: BlockSettings, vocab_size: int, sizes: Sequence[int], depth: int = 2) -> None:
        super().__init__(sizes, vocab_size, block.width)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        width, epsilon = block.width, block.norm_epsilon
        own = replace(block, norm_affine=True, modulation=None, condition_width=None, drop_path=0.0)
        self.block = own
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes[:-1])
        self.blocks = nn.ModuleList(Block(own) for _ in range(depth))
        offset = block.norm_bias and block.norm == "layer"
        self.norm = Norm(width, block.norm, bias=offset, epsilon=epsilon)
        self.heads = nn.ModuleList(Head(width, 1, size, False, block.bias, False, epsilon) for size in sizes)

    def part_logits(self, hidden: Tensor, known: Tensor) -> Tensor:
        read = self._read(hidden, known)
        return self.heads[known.shape[-1]](read[:, :, -1])

    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        values = -self.log_likelihood(hidden, ids)
        return values, torch.ones_like(values)

    def log_likelihood(self, hidden: Tensor, ids: Tensor) -> Tensor:
        parts = self.parts.split(ids)
        read = self._read(hidden, parts[..., :-1])  # (B, n, P, D)
        total = hidden.new_zeros(ids.shape, dtype=torch.float32)
        for number, head in enumerate(self.heads):
            logits, part = head(read[:, :, number]), parts[..., number]
            nats = F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none")
            total = total - nats.view_as(total)
        return total

    def _read(self, hidden: Tensor, known: Tensor) -> Tensor:
        """`(B, n, D)` and the first p parts `(B, n, p)` to `(B, n, p + 1, D)`: what predicts parts 0 to p."""
        embedded = (
            table(part).to(hidden.dtype) for table, part in zip(self.tables, known.unbind(dim=-1), strict=False)
        )
        elements = torch.stack((hidden, *embedded), dim=2).flatten(0, 1)  # (B n, p + 1, D)
        read = [self._run_blocks(sequences) for sequences in elements.split(_MOST_SEQUENCES)]
        return torch.cat(read).unflatten(0, hidden.shape[:2])

    def _run_blocks(self, elements: Tensor) -> Tensor:
        for block in self.blocks:
            elements = block(elements, causal=True)
        return self.norm(elements)
