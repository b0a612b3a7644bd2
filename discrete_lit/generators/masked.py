"""Masked token prediction (Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022)."""

from collections.abc import Callable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.processes import CosineSchedule, CounterRandom, MaskSchedule, Purpose
from discrete_lit.samplers import MaskGITSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class Masked(Generator):
    """Predicts masked tokens from the others (section 3.1).

    For t uniform in (0, 1), `ceil(N m(t))` tokens of an image, chosen uniformly, are replaced by the mask id; the loss
    is the cross-entropy of the masked tokens.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        sampler: `MaskGITSampler()` by default.
        mask_schedule: m of training; the cosine by default, as in the paper.
        label_smoothing: of the training loss, in [0, 1); the paper's code uses 0.1.
        label_dropout: share of training labels replaced by the null label.
        likelihood_samples: network evaluations for each `log_likelihood`.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        seed: of masks, label dropout and the likelihood's masks.
    """

    attention = "bidirectional"
    mask_token = True
    coordinate_name = "mask_ratio"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler | None = None,
        mask_schedule: MaskSchedule | None = None,
        label_smoothing: float = 0.1,
        label_dropout: float = 0.1,
        likelihood_samples: int = 16,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if likelihood_samples < 1:
            raise ValueError(f"likelihood_samples must be at least 1, got {likelihood_samples}")
        sampler = sampler or MaskGITSampler()
        super().__init__(
            tokenizer, image_size, num_classes, backbone, sampler, label_dropout, optimizer, scheduler, seed
        )
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.label_smoothing = label_smoothing
        self.likelihood_samples = likelihood_samples

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        t = random.uniform(Purpose.MASK_RATIO, 1)
        counts = (self.length * self.mask_schedule.mask_probability(t)).ceil().clamp(1, self.length)  # (B, 1)
        masked = self._choose_masked(counts, random.uniform(Purpose.MASK_ORDER, self.length))
        smoothing = self.label_smoothing if self.training else 0.0
        values = self._cross_entropy(tokens, labels, masked, smoothing)
        return TokenLosses(values, masked.to(values.dtype), (counts / self.length).expand_as(values))

    @torch.no_grad()
    def log_likelihood(self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None) -> Likelihood:
        """An unbiased estimate of the any-order bound, for `tokens (B, *token_shape)`.

        The mean of log p over all orders of revealing the tokens, at most log p of their mixture, is
        `-N E_k[(1 / k) sum of the cross-entropies of k masked tokens]` with k uniform in 1 ... N and the tokens chosen
        uniformly (Ou et al., RADD, 2024, eq. 3.8; Uria et al., NADE, 2014). k is stratified over the evaluations.
        """
        tokens = tokens.flatten(1)
        if indices is None:
            indices = torch.arange(len(tokens), device=tokens.device)
        random = CounterRandom(self.seed, indices)
        shift = random.uniform(Purpose.LIKELIHOOD, 1)
        total = tokens.new_zeros(len(tokens), dtype=torch.float64)
        for evaluation in range(self.likelihood_samples):
            share = (shift + evaluation / self.likelihood_samples) % 1
            counts = (share * self.length).floor() + 1  # (B, 1), uniform in 1 ... N
            order = random.uniform(Purpose.LIKELIHOOD, self.length, step=evaluation + 1)
            masked = self._choose_masked(counts, order)
            values = self._cross_entropy(tokens, labels, masked, smoothing=0.0)
            total -= self.length * (values * masked).double().sum(dim=1) / counts[:, 0]
        return Likelihood(total / self.likelihood_samples, "bound")

    def _choose_masked(self, counts: Tensor, order: Tensor) -> Tensor:
        """`(B, N)` bool with `counts (B, 1)` true places in each row, those of the smallest `order (B, N)`."""
        return order.argsort(dim=1).argsort(dim=1) < counts

    def _cross_entropy(self, tokens: Tensor, labels: Tensor, masked: Tensor, smoothing: float) -> Tensor:
        """`(B, N)` nats for every token of the sequence with `masked` replaced by the mask id."""
        corrupted = tokens.masked_fill(masked, self.backbone.layout.mask_id)
        logits = self.backbone(corrupted, labels)  # (B, N, K)
        values = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=smoothing)
        return values.view_as(tokens)
