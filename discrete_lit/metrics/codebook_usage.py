"""Codebook usage and perplexity: how many of the K ids occur, and how evenly."""

import torch
from torch import Tensor
from torchmetrics import Metric

MOST_COUNTED = 2**24
"""The largest vocabulary whose ids are counted one by one: the counts take 128 MB. Above it, only components are."""


class CodebookUsage(Metric):
    """Measure usage and perplexity of token ids, over all batches and ranks.

    Args:
        vocab_size: K.

    `update` takes int64 ids of any shape in [0, K). `compute` gives two float32 scalars: the fraction of the K ids that
    occur, in [0, 1], and the perplexity exp(entropy in nats), in [1, K].
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        # Unlike `bincount` this does not make the host wait for a GPU: it runs at every step of training.
        ids = tokens.reshape(-1)
        self.counts.index_add_(0, ids, torch.ones_like(ids))

    def compute(self) -> tuple[Tensor, Tensor]:
        frequency = self.counts.double() / self.counts.sum()
        entropy = torch.special.entr(frequency).sum()
        return (self.counts > 0).double().mean().float(), entropy.exp().float()
