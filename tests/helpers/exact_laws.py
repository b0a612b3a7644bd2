"""The exact law of a tiny backbone, by enumerating every sequence: what samplers and likelihoods are held against."""

from itertools import permutations

import torch
from scipy.stats import chi2
from torch import Tensor

from discrete_lit.backbones import Backbone


def all_sequences(vocab_size: int, length: int) -> Tensor:
    """`(K^N, N)` int64; sequence i is the number i in base K, its most significant digit first."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).reshape(-1, length)


def sequence_numbers(sequences: Tensor, vocab_size: int) -> Tensor:
    """The row of `all_sequences` that each row is."""
    powers = vocab_size ** torch.arange(sequences.shape[1]).flip(0)
    return (sequences * powers).sum(dim=1)


@torch.no_grad()
def raster_log_law(backbone: Backbone, label: int) -> Tensor:
    """`(K^N,)` log-probability of every sequence, each factor from its own pass over the prefix alone."""
    layout = backbone.layout
    sequences = all_sequences(layout.vocab_size, layout.length)
    labels = torch.full((len(sequences),), label)
    total = torch.zeros(len(sequences), dtype=torch.float64)
    for place in range(layout.length):
        logits = backbone(sequences[:, :place], labels)[:, -1].double()
        total += logits.log_softmax(dim=-1).gather(1, sequences[:, place : place + 1])[:, 0]
    return total


@torch.no_grad()
def order_log_laws(backbone: Backbone, label: int) -> Tensor:
    """`(N!, K^N)` log-probability of every sequence when a masked model reveals one token at a time, for each order."""
    layout = backbone.layout
    sequences = all_sequences(layout.vocab_size, layout.length)
    labels = torch.full((len(sequences),), label)
    laws = []
    for order in permutations(range(layout.length)):
        total = torch.zeros(len(sequences), dtype=torch.float64)
        visible = torch.full_like(sequences, layout.mask_id)
        for place in order:
            logits = backbone(visible, labels)[:, place].double()
            total += logits.log_softmax(dim=-1).gather(1, sequences[:, place : place + 1])[:, 0]
            visible[:, place] = sequences[:, place]
        laws.append(total)
    return torch.stack(laws)


def chi_square_p_value(numbers: Tensor, law: Tensor) -> float:
    """p-value of draws `(n,)` in [0, len(law)) under `law`; cells expecting fewer than 5 draws are pooled."""
    counts = torch.bincount(numbers, minlength=len(law)).double()
    assert len(counts) == len(law), "a draw outside the law's support"
    assert not (counts[law == 0] > 0).any(), "an impossible outcome was drawn"
    expected = law.double() * len(numbers)
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(chi2.sf(float(statistic), len(expected) - 1))
