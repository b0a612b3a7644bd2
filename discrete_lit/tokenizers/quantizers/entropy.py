"""The entropy terms that keep a vocabulary in use, exactly.

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2024 (MAGVIT-v2), eq. 5-6: a latent
z chooses code k with probability p(k | z), a softmax of affinities, and

    L_entropy = E_z H(p(. | z)) - H(E_z p(. | z))

lowers the per-sample entropy, so that the choice is clear, and raises the batch entropy, so that every code is chosen.
Both are in nats. The batch is that of all ranks together: probabilities are averaged before the logarithm. With
`across_ranks=False` it is each rank's own, as in Open-MAGVIT2, IBQ and MaskBit: the batch entropy is then smaller, and
pushes harder where a rank has few latents for the codes. Its entropy needs all probabilities at once, so accumulated
micro-batches are refused, or each has its own (`accumulation="by_micro_batch"`).
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.core.distributed import all_reduce_sum, world_size


def softmax_entropies(logits: Tensor, *, log_offset: float = 0.0, across_ranks: bool = True) -> tuple[Tensor, Tensor]:
    """The per-sample and the batch entropy of a vocabulary whose probabilities are the softmax of logits.

    Args:
        logits: `(n, K)`, affinities divided by the temperature.
        log_offset: as for `entropy_of_mean`.
        across_ranks: as for `entropy_of_mean`.

    Returns:
        Per-sample and batch entropy, scalars in [0, log K].
    """
    log_probabilities = logits.log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    per_sample = -(probabilities * log_probabilities).sum(dim=1).mean()
    batch = entropy_of_mean(probabilities.mean(dim=0), log_offset=log_offset, across_ranks=across_ranks)
    return mean_over_ranks(per_sample), batch


def bits_entropy(log_odds: Tensor) -> Tensor:
    """The per-sample entropy of independent bits: the sum over bits of the entropies of single ones, exactly.

    Args:
        log_odds: `(n, bits)`, log p / (1 - p) of each bit.

    Returns:
        Scalar in [0, bits * log 2].
    """
    size = log_odds.abs()  # H(p) is even in the log odds
    per_bit = torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)
    return mean_over_ranks(per_bit.sum(dim=1).mean())


def joint_bits_entropy(log_odds: Tensor, *, log_offset: float = 0.0, across_ranks: bool = True) -> Tensor:
    """The batch entropy of the `2^bits` codes that independent bits form, exactly, summed over groups of bits.

    The batch mean of product distributions does not factorise over bits, but one matrix product gives all of it: with
    `P` and `Q` `(n, 2^(bits / 2))` the products over the first and the second half of the bits, it is `P^T Q / n`.

    Args:
        log_odds: `(n, groups, bits)`, log p / (1 - p) of each bit of each group.
        log_offset: as for `entropy_of_mean`.
        across_ranks: as for `entropy_of_mean`.

    Returns:
        Scalar in [0, groups * bits * log 2].
    """
    bits = log_odds.shape[2]
    by_group = rearrange(log_odds, "n g b -> g n b")
    first, second = (_products(half) for half in by_group.split((bits // 2, bits - bits // 2), dim=2))
    joint = rearrange(first, "g n i -> g i n") @ second / len(log_odds)  # (g, 2^(b / 2), 2^(b / 2))
    return entropy_of_mean(joint, log_offset=log_offset, across_ranks=across_ranks)


def _products(log_odds: Tensor) -> Tensor:
    """The probabilities `(..., 2^m)` of all codes of m independent bits with log odds `(..., m)`."""
    products = log_odds.new_ones(*log_odds.shape[:-1], 1)
    for bit in log_odds[..., None].unbind(dim=-2):
        products = torch.cat((products * torch.sigmoid(-bit), products * torch.sigmoid(bit)), dim=-1)
    return products


def entropy_of_mean(probabilities: Tensor, *, log_offset: float = 0.0, across_ranks: bool = True) -> Tensor:
    """`-sum p log(p + log_offset)`, a scalar, of this rank's mean probabilities, averaged over all ranks.

    Open-MAGVIT2 and IBQ train with an offset of 1e-5, which is above the mean probability of 2^18 codes.

    Args:
        probabilities: `(..., K)`, the mean over the latents of this rank.
        log_offset: added inside the logarithm.
        across_ranks: average the probabilities over ranks; if not, the entropies of the ranks.
    """
    mean = mean_over_ranks(probabilities) if across_ranks else probabilities
    # The smallest normal number keeps the gradient of codes without any probability finite.
    entropy = -(mean * (mean + log_offset).clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return entropy if across_ranks else mean_over_ranks(entropy)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks, every rank counting alike, with the gradient of one process on the joined batch.

    The gradient reaches this rank's value as if it were the mean: DDP's mean of gradients brings the division.
    """
    return value if world_size() == 1 else _MeanOverRanks.apply(value)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value) / world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
