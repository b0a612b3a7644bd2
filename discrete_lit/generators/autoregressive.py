"""Next-token prediction in raster order (Esser et al., "Taming Transformers", 2021; Sun et al., "LlamaGen", 2024)."""

from collections.abc import Callable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.processes import CounterRandom
from discrete_lit.samplers import RasterSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class Autoregressive(Generator):
    """p(x | y) as the product over the raster order of p(x_n | x_1 ... x_{n-1}, y).

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        sampler: `RasterSampler()` by default.
        label_dropout: share of training labels replaced by the null label.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        seed: of label dropout.
    """

    attention = "causal"
    mask_token = False
    coordinate_name = "position"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler | None = None,
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        sampler = sampler or RasterSampler()
        super().__init__(
            tokenizer, image_size, num_classes, backbone, sampler, label_dropout, optimizer, scheduler, seed
        )

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        values = self._cross_entropy(tokens, labels)
        place = (torch.arange(self.length, device=tokens.device) + 0.5) / self.length
        return TokenLosses(values, torch.ones_like(values), place.expand_as(values))

    @torch.no_grad()
    def log_likelihood(self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None) -> Likelihood:
        return Likelihood(-self._cross_entropy(tokens.flatten(1), labels).double().sum(dim=1), "exact")

    def _cross_entropy(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`(B, N)` nats for every token given those before it."""
        logits = self.backbone(tokens[:, :-1], labels)  # (B, N, K)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
