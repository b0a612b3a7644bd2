"""How much of a codebook is in use."""

import torch
from torch import Tensor
from torchmetrics import Metric

MOST_COUNTED = 2**24
"""The largest vocabulary whose ids are counted one by one: the counts take 128 MB. Above it, only parts are."""


class CodebookUsage(Metric):
    """Usage and perplexity of token ids, over all batches and ranks.

    Args:
        vocab_size: K.

    `update` takes int64 ids of any shape in [0, K); `compute` gives the share of ids that occur, in [0, 1], and
    exp(entropy in nats), in [1, K].
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        self.counts += torch.bincount(tokens.reshape(-1), minlength=self.vocab_size)

    def compute(self) -> tuple[Tensor, Tensor]:
        return usage_and_perplexity(self.counts)


def usage_and_perplexity(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The share of ids that occur, and exp of the entropy in nats, float32 scalars, of int64 counts `(K,)`."""
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum()
    return (counts > 0).double().mean().float(), entropy.exp().float()
