"""Ids of a vocabulary 2^b as g groups of b / g bits (Weber et al., "MaskBit", 2024).

Masked token prediction (Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022), of ids or of
groups of their bits (Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.backbones.backbone import bits_of_vocabulary
from discrete_lit.core.random import CounterRandom, Purpose, random_subset
from discrete_lit.diffusion import CosineSchedule, LinearSchedule, MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser, LeaveOneOutHead
from discrete_lit.diffusion.processes import AbsorbingProcess
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.samplers import MaskGITSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class BitGroups:
    """Splits ids into units of b / g bits each and joins them; group 0 has the least significant bits.

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
        """`(B, n)` in [0, 2^b) to units `(B, n g)` in [0, 2^(b / g)); those of an id stand next to one another.

        An id of -1, which stands for none, becomes g of them.
        """
        units = (ids[..., None] >> self._shifts(ids)) & (self.unit_size - 1)
        return units.masked_fill(ids[..., None] < 0, -1).flatten(1)

    def join(self, units: Tensor) -> Tensor:
        """The inverse of `split`."""
        grouped = units.unflatten(1, (-1, self.groups))
        return (grouped << self._shifts(units)).sum(dim=-1)

    def _shifts(self, ids: Tensor) -> Tensor:
        return torch.arange(self.groups, device=ids.device) * self.bits


class Masked(Generator):
    """Predicts masked tokens from the others (section 3.1).

    For t uniform in (0, 1), `ceil(N m(t))` tokens of an image, chosen uniformly, are replaced by the mask id; the loss
    is the cross-entropy of the masked tokens. With `bit_groups` the tokens of a sequence are groups of bits, each with
    2^(b / g) values, and each is masked with probability m(t) independently of the others, but one at least.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        sampler: `MaskGITSampler()` by default.
        mask_schedule: m of training; the cosine by default, as in the paper.
        bit_groups: g, groups that the b bits of an id are split into, of a vocabulary of 2^b; the ids themselves by
            default. The backbone's `token_embedding` must be `"bits"` where g is above 1.
        unmasked_weight: of the tokens that were not masked in the training loss, against 1 of those that were: 0 is
            MaskGIT's, 0.1 TiTok's; 1 averages over all positions, as Halton-MaskGIT and MaskBit do. Validation has 0.
        label_smoothing: of the training loss, in [0, 1); the paper's code uses 0.1.
        likelihood_samples: network evaluations for each `log_likelihood`.
        training: of `Generator`: label_dropout, optimizer, scheduler, seed.

    Raises:
        ValueError: a setting out of its range, or bit groups that the vocabulary does not have.
    """

    coordinate_name = "mask_ratio"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler | None = None,
        mask_schedule: MaskSchedule | None = None,
        bit_groups: int | None = None,
        unmasked_weight: float = 0.0,
        label_smoothing: float = 0.1,
        likelihood_samples: int = 16,
        **training: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0 <= unmasked_weight <= 1:
            raise ValueError(f"unmasked_weight must lie in [0, 1], got {unmasked_weight}")
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
            num_classes,
            layout,
            backbone,
            sampler or MaskGITSampler(),
            **training,
        )
        self.bit_groups = groups
        self.unmasked_weight = unmasked_weight
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.label_smoothing = label_smoothing
        self.likelihood_samples = likelihood_samples

    def to_sequence(self, tokens: Tensor) -> Tensor:
        ids = super().to_sequence(tokens)
        return ids if self.bit_groups is None else self.bit_groups.split(ids)

    def to_grid(self, sequences: Tensor) -> Tensor:
        return super().to_grid(sequences if self.bit_groups is None else self.bit_groups.join(sequences))

    def denoiser(self) -> Denoiser:
        """Of the absorbing process: where a token is masked, what is predicted is cavity and posterior alike."""
        layout = self.backbone.layout
        return Denoiser(AbsorbingProcess(layout.vocab_size), LinearSchedule(), LeaveOneOutHead(), "none")

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        masked = self._training_masks(random)
        smoothing, unmasked_weight = (self.label_smoothing, self.unmasked_weight) if self.training else (0.0, 0.0)
        values = self._cross_entropy(tokens, labels, masked, smoothing)
        weights = masked.to(values.dtype).clamp(min=unmasked_weight)
        return TokenLosses(values, weights, masked.double().mean(dim=1, keepdim=True).expand_as(values))

    @torch.no_grad()
    def log_likelihood(
        self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None, order: Tensor | None = None
    ) -> Likelihood:
        """An unbiased estimate of the any-order bound; with `order`, the exact value of revealing along it.

        The mean of log p over all orders of revealing the tokens, at most log p of their mixture, is
        `-N E_k[(1 / k) sum of the cross-entropies of k masked tokens]` with k uniform in 1 ... N and the tokens chosen
        uniformly (Ou et al., RADD, 2024, eq. 3.8; Uria et al., NADE, 2014). k is stratified over the evaluations.
        Along one order the model that reveals one token at a time is autoregressive, and log p the sum of its N
        factors, each of which costs a network evaluation.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            labels: `(B,)` int64 in [0, num_classes].
            indices: `(B,)` int64, each image's place in its data set, to which the estimate's random numbers belong; 0
                to B - 1 by default.
            order: `(N,)` int64, a permutation of the sequence's places (bit groups one by one).

        Raises:
            ValueError: an order that is no permutation.
        """
        sequences = self.to_sequence(tokens)
        if order is not None:
            return Likelihood(self._log_likelihood_along(sequences, labels, order), "exact")
        if indices is None:
            indices = torch.arange(len(tokens), device=tokens.device)
        random = CounterRandom(self.seed, indices)
        shift = random.uniform(Purpose.LIKELIHOOD, 1)
        total = tokens.new_zeros(len(tokens), dtype=torch.float64)
        for evaluation in range(self.likelihood_samples):
            share = (shift + evaluation / self.likelihood_samples) % 1
            counts = (share * self.length).floor() + 1  # (B, 1), uniform in 1 ... N
            uniforms = random.uniform(Purpose.LIKELIHOOD, self.length, step=evaluation + 1)
            masked = random_subset(uniforms, counts)
            values = self._cross_entropy(sequences, labels, masked, smoothing=0.0)
            total -= self.length * (values * masked).double().sum(dim=1) / counts[:, 0]
        return Likelihood(total / self.likelihood_samples, "bound")

    def _log_likelihood_along(self, sequences: Tensor, labels: Tensor, order: Tensor) -> Tensor:
        if sorted(order.tolist()) != list(range(self.length)):
            raise ValueError(f"order must have each of the {self.length} places 0 to {self.length - 1} once")
        masked = torch.ones_like(sequences, dtype=torch.bool)
        total = sequences.new_zeros(len(sequences), dtype=torch.float64)
        for place in order.tolist():
            total -= self._cross_entropy(sequences, labels, masked, smoothing=0.0)[:, place].double()
            masked[:, place] = False
        return total

    def _training_masks(self, random: CounterRandom) -> Tensor:
        """`(B, N)` bool, a function of the samples alone."""
        probability = self.mask_schedule.mask_probability(random.uniform(Purpose.MASK_RATIO, 1))  # (B, 1)
        uniforms = random.uniform(Purpose.MASK_ORDER, self.length)
        if self.bit_groups is not None:
            # A sequence without a mask would have no loss, and a batch of them a mean over nothing.
            return uniforms <= torch.maximum(probability, uniforms.min(dim=1, keepdim=True).values)
        counts = (self.length * probability).ceil().clamp(1, self.length)
        return random_subset(uniforms, counts)

    def _cross_entropy(self, tokens: Tensor, labels: Tensor, masked: Tensor, smoothing: float) -> Tensor:
        """`(B, N)` nats for every token of the sequence with `masked` replaced by the mask id."""
        corrupted = tokens.masked_fill(masked, self.backbone.layout.mask_id)
        logits = self.backbone(corrupted, labels)  # (B, N, K)
        values = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=smoothing)
        return values.view_as(tokens)
