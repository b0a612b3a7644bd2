"""Autoregression over the codes of several books, delayed against one another (MusicGen).

Copet et al., "Simple and Controllable Music Generation", NeurIPS 2023. The pattern stands in
`discrete_lit.backbones.delay_pattern`. RQ-Transformer, which predicts the codes of a frame in turn by a second small
transformer, is `Autoregressive(stacked_codes=True)` on the same codes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.delay_pattern import DelayPattern
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, streams_of
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, cross_entropies
from discrete_lit.samplers.delayed import DelaySampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class DelayedAutoregressive(Generator):
    """Predicts the codes of all books at a position of the delay pattern from the positions before it.

    The tokens are `(B, T, K)`, codes of K books for each of T frames, as `EnCodec` makes them. At a position the codes
    are independent given what came before, which the delays make a small loss: p(x | y) is the product over positions
    s and books k of p(x[s - d_k, k] | positions before s, y). The loss is the mean cross-entropy of a code; the
    likelihood is exact, of this model.

    With a class, texts (`text_encoder`) or both as condition; a prefix of frames is continued by `sample(known=...)`.

    Arguments that are not listed are those of every `Generator`.

    Args:
        delays: d_k of each book; 0, 1, ..., K - 1 by default. All 0 predicts the codes of a frame together.
        sampler: a `DelaySampler()` by default.

    Raises:
        ValueError: tokens of another shape, or other delays than one of each book.
    """

    coordinate_name = "position"
    sampler_kind = DelaySampler

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        delays: Sequence[int] | None = None,
        sampler: DelaySampler | None = None,
        **common: Any,
    ) -> None:
        shape = tokenizer.token_shape(image_size)
        if len(shape) != 2:
            raise ValueError(
                f"DelayedAutoregressive models codes (frames, books), as EnCodec's are; this tokenizer's tokens are "
                f"{shape}"
            )
        frames, books = shape
        delays = tuple(range(books)) if delays is None else tuple(delays)
        if len(delays) != books:
            raise ValueError(f"delays={list(delays)} must have one number for each of the {books} books")
        pattern = DelayPattern(frames, delays)
        layout = SequenceLayout(
            tokenizer.vocab_size,
            (pattern.positions,),
            num_classes=num_classes,
            attention="causal",
            mask_token=True,
            sub_tokens=books,
            delays=delays,
        )
        super().__init__(
            tokenizer,
            image_size,
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or DelaySampler(),
            **common,
        )
        if not isinstance(self.sampler, DelaySampler):
            raise ValueError(f"DelayedAutoregressive needs a DelaySampler, got a {type(self.sampler).__name__}")
        self.pattern = pattern
        self.books = books

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Lay out codes `(B, T, K)` by the delay pattern, `(B, positions * K)`: -1 where no code stands."""
        return self.pattern.lay_out(tokens).flatten(1)

    def to_grid(self, sequences: Tensor) -> Tensor:
        return self.pattern.codes(sequences.unflatten(1, (-1, self.books)))

    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        read = tokens.masked_fill(tokens < 0, self.backbone.layout.mask_id)[:, : -self.books]
        logits = self.backbone(read, condition)  # (B, positions * K, vocabulary)
        values = cross_entropies(logits, tokens.clamp(min=0))
        weights = (tokens >= 0).to(values.dtype)
        position = (torch.arange(self.length, device=tokens.device, dtype=torch.float32) + 0.5) / self.length
        return TokenLosses(values, weights, position.expand_as(values))

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, tokens: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Give log p(tokens | condition) in nats, exact: the sum over positions and books."""
        random = streams_of(tokens, seed=self.seed, indices=indices)
        losses = self.token_losses(self.to_sequence(tokens), condition, random)
        return Likelihood(-(losses.values.double() * losses.weights).sum(dim=1), "exact")
