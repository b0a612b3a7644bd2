"""Next-scale prediction (Tian et al., "Visual Autoregressive Modeling", NeurIPS 2024)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.samplers import NextScaleSampler, Sampler
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer


class NextScale(Generator):
    """p(x | y) as the product over scales s of p(x_s | x_1 ... x_{s-1}, y), the ids of a scale independent (eq. 6).

    What a scale is predicted from are not ids but the code vectors that the scales before add up to, averaged down to
    it: the tokenizer's `MultiScaleResidualQuantizer` makes them, frozen, in training and while sampling.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML. A `MultiScaleVQ` whose first scale
            is 1.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        sampler: `NextScaleSampler()` by default.
        training: of `Generator`: label_dropout, optimizer, scheduler, seed.

    Raises:
        ValueError: a tokenizer without scales, or one whose first scale has several ids.
    """

    coordinate_name = "scale"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        quantizer = _quantizer_of(tokenizer)
        layout = SequenceLayout(
            tokenizer.vocab_size,
            tokenizer.token_shape(image_size),
            num_classes=num_classes,
            attention="block_causal",
            scales=tuple(quantizer.lengths),
            input_dim=quantizer.dim,
        )
        super().__init__(
            tokenizer,
            image_size,
            num_classes,
            layout,
            backbone,
            sampler or NextScaleSampler(),
            **training,
        )

    def scale_quantizer(self) -> MultiScaleResidualQuantizer:
        return _quantizer_of(self.tokenizer)

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        values = self._cross_entropy(tokens, labels)
        lengths = torch.tensor(self.scale_quantizer().lengths, device=tokens.device)
        number = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
        return TokenLosses(values, torch.ones_like(values), ((number + 0.5) / len(lengths)).expand_as(values))

    @torch.no_grad()
    def log_likelihood(self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None) -> Likelihood:
        return Likelihood(-self._cross_entropy(tokens, labels).double().sum(dim=1), "exact")

    def _cross_entropy(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`(B, N)` nats for every id given the scales before its own."""
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            inputs = self.scale_quantizer().teacher_forcing(tokens)  # (B, N - 1, D)
        logits = self.backbone(inputs, labels)  # (B, N, K)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def _quantizer_of(tokenizer: Tokenizer) -> MultiScaleResidualQuantizer:
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, MultiScaleResidualQuantizer):
        raise ValueError(
            f"NextScale predicts the scales of a MultiScaleResidualQuantizer; the tokenizer {type(tokenizer).__name__} "
            f"has {'no quantizer' if quantizer is None else 'a ' + type(quantizer).__name__}: give it a MultiScaleVQ"
        )
    if quantizer.lengths[0] != 1:
        raise ValueError(f"NextScale needs a first scale of one id, the tokenizer's scales are {quantizer.scales}")
    return quantizer
