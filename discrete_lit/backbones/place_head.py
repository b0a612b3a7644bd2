"""What predicts the id of a place in parts, from the hidden state that a causal transformer has of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from discrete_lit.backbones.id_parts import IdParts
from discrete_lit.processes import CounterRandom


class PlaceHead(nn.Module, ABC):
    """p(id | what comes before its place) as the product over parts of p(part | parts before it, hidden state).

    It takes the place of the softmax over all K ids, which a vocabulary of 2^18 is too large for. The transformer makes
    it by calling `place_head(settings of its blocks, K)`, ends without a norm, and gives hidden states instead of
    logits.

    Args:
        sizes: of the parts P of an id, least significant first; their product is K.
        vocab_size: K.
        width: D, of the hidden states.

    Raises:
        ValueError: parts that do not make up the vocabulary.
    """

    def __init__(self, sizes: Sequence[int], vocab_size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.parts = IdParts(sizes, vocab_size)

    @abstractmethod
    def part_logits(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Logits of the next part.

        Args:
            hidden: `(B, n, D)`.
            known: `(B, n, p)` int64, the first p < P parts of each id.

        Returns:
            `(B, n, size of part p)` float32.
        """

    @abstractmethod
    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        """What training minimises in training mode, and in eval mode -log p of each id, or an estimate of its bound.

        Args:
            hidden: `(B, n, D)`.
            ids: `(B, n)` int64 in [0, K).
            random: one stream for each of the B sequences.

        Returns:
            Nats of each id and the weights of their mean, both `(B, n)` float32.
        """

    def log_likelihood(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """log p of each id in nats, exact: the sum over parts in turn.

        Args:
            hidden: `(B, n, D)`.
            ids: `(B, n)` int64 in [0, K).

        Returns:
            `(B, n)` float32.
        """
        parts = self.parts.split(ids)
        total = hidden.new_zeros(ids.shape, dtype=torch.float32)
        for number in range(len(self.parts)):
            logits = self.part_logits(hidden, parts[..., :number])
            total = total + logits.log_softmax(dim=-1).gather(-1, parts[..., number, None])[..., 0]
        return total
