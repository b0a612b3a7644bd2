"""VAR: next-scale prediction (Tian et al., "Visual Autoregressive Modeling", NeurIPS 2024)."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, cross_entropies
from discrete_lit.samplers import NextScaleSampler, Sampler
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer


class NextScale(Generator):
    """Predicts each scale r_k from those before it: p(r_1 ... r_K | y) = prod over k of p(r_k | r_1 ... r_{k-1}, y).

    (Eq. 6; the ids of a scale are independent given the scales before.) A scale is predicted not from ids but from the
    code vectors that the scales before add up to, averaged down to its size. The tokenizer's
    `MultiScaleResidualQuantizer` makes them, frozen, in training and while sampling. The loss is the cross-entropy of
    every id, and so -log p, exactly.

    Arguments that are not listed are those of every `Generator`.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML. A `MultiScaleVQ` whose first scale
            is 1; of images that are not square, one whose scales are pairs of height and width.
        sampler: `NextScaleSampler()` by default.
        common: `backbone`, `label_dropout`, `gradient_of`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            every generator.

    Raises:
        ValueError: a tokenizer without scales, or one whose first scale has several ids.
    """

    coordinate_name = "scale"
    scale_coordinates: Tensor
    """`(N,)`: the middle of each id's scale on a line from 0 to 1, in which all scales are as long."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        sampler: Sampler | None = None,
        **common: Any,
    ) -> None:
        quantizer = scale_quantizer_of(tokenizer)
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
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or NextScaleSampler(),
            **common,
        )
        lengths = torch.tensor(quantizer.lengths)
        middles = (torch.arange(len(lengths)) + 0.5) / len(lengths)
        self.register_buffer("scale_coordinates", middles.repeat_interleave(lengths), persistent=False)

    def scale_quantizer(self) -> MultiScaleResidualQuantizer:
        return scale_quantizer_of(self.tokenizer)

    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        values = self._cross_entropies(tokens, condition)
        return TokenLosses(values, torch.ones_like(values), self.scale_coordinates.expand_as(values))

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, tokens: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        return Likelihood(-self._cross_entropies(tokens, condition).double().sum(dim=1), "exact")

    def _cross_entropies(self, tokens: Tensor, condition: Condition | Tensor) -> Tensor:
        """Return -log p of every id given the scales before its own, `(B, N)` nats."""
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            vectors = self.scale_quantizer().teacher_forcing(tokens)  # (B, N - 1, D)
        return cross_entropies(self.backbone(vectors, condition), tokens)


def scale_quantizer_of(tokenizer: object, *, reader: str = "NextScale") -> MultiScaleResidualQuantizer:
    """Give the quantizer of a tokenizer of scales, the first of one id.

    Args:
        tokenizer: any.
        reader: what predicts its scales, for messages.

    Raises:
        ValueError: a tokenizer without scales, or one whose first scale has several ids.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, MultiScaleResidualQuantizer):
        raise ValueError(
            f"{reader} predicts the scales of a MultiScaleResidualQuantizer; the tokenizer {type(tokenizer).__name__} "
            f"has {'no quantizer' if quantizer is None else 'a ' + type(quantizer).__name__}: give it a MultiScaleVQ"
        )
    if quantizer.lengths[0] != 1:
        raise ValueError(f"{reader} needs a first scale of one id, the tokenizer's scales are {quantizer.scales}")
    return quantizer
