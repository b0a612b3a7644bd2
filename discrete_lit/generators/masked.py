"""MaskGIT: masked token prediction (Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022).

The tokens are ids (MaskGIT; TiTok, Yu et al., 2024; Halton-MaskGIT, Besnier et al., 2025) or groups of their bits
(MaskBit; Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024).
"""

from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.backbones.backbone import bits_of_vocabulary
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, random_subset, streams_of
from discrete_lit.diffusion import CosineSchedule, LinearSchedule, MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser, LeaveOneOutHead
from discrete_lit.diffusion.processes import AbsorbingProcess
from discrete_lit.generators.generator import (
    Generator,
    Likelihood,
    TokenLosses,
    check_permutation,
    cross_entropies,
    subsets_of_all_sizes,
)
from discrete_lit.samplers import MaskGITSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer

MaskCount = Literal["ceil", "round", "bernoulli"]


class Masked(Generator):
    """Predicts masked tokens from the others (section 3.1).

    For t uniform in (0, 1), `ceil(N m(t))` tokens of an image x, chosen uniformly, are replaced by the mask id. The
    loss is the mean of -log p(x_i | the tokens that are left, y) over the masked tokens i (eq. 1).

    With `bit_groups` the tokens of a sequence are groups of bits, each with 2^(b / g) values.

    Arguments that are not listed are those of every `Generator`.

    Args:
        mask_schedule: m of training; the cosine by default, as in the paper.
        mask_count: how many of N tokens are masked: `"ceil"` of N m (MaskGIT), its nearest integer (`"round"`: TiTok's
            generator), one at least; or each with probability m independently of the others (`"bernoulli"`: MaskBit,
            Halton-MaskGIT), one at least unless the others have a weight too. By default `"bernoulli"` with
            `bit_groups`, else `"ceil"`.
        min_mask_ratio: m is at least this in training, in [0, 1); 0.5 is MaskGIT's `min_masking_rate`.
        bit_groups: g, groups that the b bits of an id are split into, of a vocabulary of 2^b; the ids themselves by
            default. The backbone embeds them as `"bits"`, or by a table for each group.
        unmasked_weight: weight in the training loss of the tokens that were not masked, against 1 of those that were.
            0 is MaskGIT's, 0.1 TiTok's; 1 averages over all positions, as Halton-MaskGIT and MaskBit do. Validation
            has 0.
        label_smoothing: of the training loss, in [0, 1); the paper's code uses 0.1.
        likelihood_samples: network evaluations for each `log_likelihood`.
        sampler: `MaskGITSampler()` by default.
        common: `backbone`, `label_dropout`, `gradient_of`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            every generator.

    Raises:
        ValueError: a setting out of its range, or bit groups that the vocabulary does not have.
    """

    coordinate_name = "mask_ratio"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        mask_schedule: MaskSchedule | None = None,
        mask_count: MaskCount | None = None,
        min_mask_ratio: float = 0.0,
        bit_groups: int | None = None,
        unmasked_weight: float = 0.0,
        label_smoothing: float = 0.1,
        likelihood_samples: int = 16,
        sampler: Sampler | None = None,
        **common: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0 <= unmasked_weight <= 1:
            raise ValueError(f"unmasked_weight must lie in [0, 1], got {unmasked_weight}")
        if not 0 <= min_mask_ratio < 1:
            raise ValueError(f"min_mask_ratio must lie in [0, 1), got {min_mask_ratio}")
        if mask_count not in (None, *get_args(MaskCount)):
            raise ValueError(f"mask_count={mask_count!r} is not known, accepted: {', '.join(get_args(MaskCount))}")
        if likelihood_samples < 1:
            raise ValueError(f"likelihood_samples must be at least 1, got {likelihood_samples}")
        groups = None if bit_groups is None else BitGroups(tokenizer.vocab_size, bit_groups)
        layout = SequenceLayout(
            tokenizer.vocab_size if groups is None else groups.unit_size,
            tokenizer.token_shape(image_size),
            num_classes=num_classes,
            attention="bidirectional",
            mask_token=True,
            sub_tokens=1 if groups is None else groups.groups,
        )
        super().__init__(
            tokenizer,
            image_size,
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or MaskGITSampler(),
            **common,
        )
        self.bit_groups = groups
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.mask_count: MaskCount = mask_count or ("ceil" if groups is None else "bernoulli")
        self.min_mask_ratio = min_mask_ratio
        self.unmasked_weight = unmasked_weight
        self.label_smoothing = label_smoothing
        self.likelihood_samples = likelihood_samples

    def to_sequence(self, tokens: Tensor) -> Tensor:
        ids = super().to_sequence(tokens)
        return ids if self.bit_groups is None else self.bit_groups.split(ids)

    def to_grid(self, sequences: Tensor) -> Tensor:
        return super().to_grid(sequences if self.bit_groups is None else self.bit_groups.join(sequences))

    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        masked = self._draw_masks(random)
        smoothing, unmasked_weight = (self.label_smoothing, self.unmasked_weight) if self.training else (0.0, 0.0)
        # Tokens without a weight need no logits. On a device, the host would have to wait for their number.
        alone = self.training and not unmasked_weight and tokens.device.type == "cpu"
        values = self._cross_entropies(tokens, condition, masked, label_smoothing=smoothing, masked_alone=alone)
        weights = masked.to(values.dtype).clamp(min=unmasked_weight)
        return TokenLosses(values, weights, masked.double().mean(dim=1, keepdim=True).expand_as(values))

    def _draw_masks(self, random: CounterRandom) -> Tensor:
        """Draw which tokens are masked, `(B, N)` bool: a function of the samples alone."""
        m = self.mask_schedule.mask_probability(random.uniform(Purpose.MASK_RATIO, 1))  # (B, 1), at t uniform
        if self.training:
            m = m.clamp(min=self.min_mask_ratio)
        uniforms = random.uniform(Purpose.MASK_ORDER, self.length)
        if self.mask_count == "bernoulli":
            if self.training and self.unmasked_weight and self.bit_groups is None:
                return uniforms < m
            # A sequence without a mask would have no loss, and a batch of them a mean over nothing.
            return uniforms <= torch.maximum(m, uniforms.min(dim=1, keepdim=True).values)
        count = self.length * m
        return random_subset(uniforms, (count.ceil() if self.mask_count == "ceil" else count.round()).clamp(min=1))

    def _cross_entropies(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        masked: Tensor,
        *,
        label_smoothing: float = 0.0,
        masked_alone: bool = False,
    ) -> Tensor:
        """Return -log p of every token of a sequence, `(B, N)` nats, given the sequence with masks at `masked`.

        With `masked_alone` those of the others are 0.
        """
        corrupted = tokens.masked_fill(masked, self.backbone.layout.mask_id)
        if masked_alone:
            predicted = masked.flatten().nonzero()[:, 0]
            logits = self.backbone(corrupted, condition, predicted=predicted)[None]  # (1, M, K)
            targets = tokens.flatten()[None, predicted]
            values = cross_entropies(logits, targets, label_smoothing=label_smoothing)[0]
            return values.new_zeros(tokens.numel()).scatter(0, predicted, values).view_as(tokens)
        logits = self.backbone(corrupted, condition)  # (B, N, K)
        return cross_entropies(logits, tokens, label_smoothing=label_smoothing)

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        *,
        indices: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Likelihood:
        """Estimate the any-order bound without bias; with `order`, give the exact value of unmasking along it.

        The mean of log p over all orders of unmasking the tokens, at most log p of their mixture, is
        `-N E_k[(1 / k) sum of the cross-entropies of k masked tokens]` with k uniform in 1 ... N and the tokens chosen
        uniformly (Ou et al., RADD, 2024, eq. 3.8; Uria et al., NADE, 2014). k is stratified over the evaluations.

        Along one order the model that unmasks one token at a time is autoregressive, and log p is the sum of its N
        factors, each of which costs a network evaluation.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            condition: labels `(B,)` int64 in [0, num_classes], or all that the generator is given.
            indices: `(B,)` int64, each image's position in its data set, to which the estimate's random numbers
                belong; 0 to B - 1 by default.
            order: `(N,)` int64, a permutation of the sequence's positions (bit groups one by one).

        Raises:
            ValueError: an order that is no permutation.
        """
        sequences = self.to_sequence(tokens)
        if order is not None:
            return Likelihood(self._log_likelihood_along(sequences, condition, order), "exact")
        random = streams_of(tokens, seed=self.seed, indices=indices)
        total = tokens.new_zeros(len(tokens), dtype=torch.float64)
        for masked, k in subsets_of_all_sizes(random, self.length, self.likelihood_samples):
            values = self._cross_entropies(sequences, condition, masked)
            total -= self.length * (values * masked).double().sum(dim=1) / k[:, 0]
        return Likelihood(total / self.likelihood_samples, "bound")

    def _log_likelihood_along(self, sequences: Tensor, condition: Condition | Tensor, order: Tensor) -> Tensor:
        check_permutation(order.tolist(), self.length)
        masked = torch.ones_like(sequences, dtype=torch.bool)
        total = sequences.new_zeros(len(sequences), dtype=torch.float64)
        for position in order.tolist():
            total -= self._cross_entropies(sequences, condition, masked)[:, position].double()
            masked[:, position] = False
        return total

    def denoiser(self) -> Denoiser:
        """Describe the backbone as a denoiser of the absorbing process, for the samplers of diffusion.

        Where a token is masked, its leave-one-out posterior and its posterior are the same prediction.
        """
        return Denoiser(
            process=AbsorbingProcess(self.backbone.layout.vocab_size),
            schedule=LinearSchedule(),
            head=LeaveOneOutHead(),
            time_input="none",
        )


class BitGroups:
    """Splits ids into g groups of b / g bits each and joins them; group 0 has the least significant bits.

    Args:
        vocab_size: 2^b.
        groups: g, a divisor of b.

    Raises:
        ValueError: a vocabulary that is no power of two, or groups that do not divide its bits.
    """

    def __init__(self, vocab_size: int, groups: int) -> None:
        bits = bits_of_vocabulary(vocab_size, f"bit_groups={groups}")
        if groups < 1 or bits % groups:
            raise ValueError(f"bit_groups must divide the {bits} bits of an id, got {groups}")
        self.groups = groups
        self.bits = bits // groups
        self.unit_size = 2**self.bits

    def split(self, ids: Tensor) -> Tensor:
        """Split `(B, n)` ids in [0, 2^b) into `(B, n g)` groups in [0, 2^(b / g)), those of an id side by side.

        An id of -1, which is not known, becomes g of them.
        """
        groups = (ids[..., None] >> self._shifts(ids)) & (self.unit_size - 1)
        return rearrange(groups.masked_fill(ids[..., None] < 0, -1), "b n g -> b (n g)")

    def join(self, units: Tensor) -> Tensor:
        """Invert `split`: `(B, n g)` to `(B, n)`."""
        groups = rearrange(units, "b (n g) -> b n g", g=self.groups)
        return (groups << self._shifts(units)).sum(dim=-1)

    def _shifts(self, ids: Tensor) -> Tensor:
        return torch.arange(self.groups, device=ids.device) * self.bits
