"""Tokenizers whose ids are disturbed on the way from encoder to decoder: how much do wrong ids hurt the image?

A generator draws some ids wrong, and mostly as ids that are near the right ones. The reconstruction distance of a
tokenizer says nothing of that; its distance with some ids replaced by near ones does (pFID: Qiu et al., "Robust Latent
Matters: Boosting Image Generation with Sampling Error Synthesis", 2025), and predicts better how a generator on the
tokenizer will do.
"""

from typing import Any, cast

import torch
from torch import Tensor

from discrete_lit.core.images import ImageSize
from discrete_lit.core.random import CounterRandom, Purpose, indices_of_ids
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer


class PerturbedTokenizer(Tokenizer):
    """Encode by a tokenizer, replace some ids by near ones, decode by the tokenizer.

    Each id is replaced with probability `rate`, by one of the `neighbours` other ids whose codes are nearest to its
    own, all as likely. The paper disturbs images of a batch at several rates; here every image has the same one, which
    a number can then name. The paper's near codes are those of the encoder's vector, the right one among them; here
    they are those of the code, without itself, so that the rate is the fraction of wrong ids.

    Args:
        tokenizer: one around a quantizer, or a decoder of its ids.
        rate: in [0, 1].
        neighbours: in [1, K).
        seed: of the choices, which belong to the ids of an image and to nothing else: neither the batch nor the number
            of ranks changes them.

    Raises:
        ValueError: a setting out of its range, or a tokenizer whose ids have no codes that could be near.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, *, neighbours: int = 10, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of replaced ids must lie in [0, 1], got {rate}")
        quantizer = getattr(tokenizer, "quantizer", None) if isinstance(tokenizer, Tokenizer) else None
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                f"a {type(tokenizer).__name__} has no ids with codes, which could be near one another: give a "
                "tokenizer around a quantizer"
            )
        quantizer.check_near(neighbours)
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.rate = rate
        self.neighbours = neighbours
        self.seed = seed

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of the ids."""
        return cast(Any, self.tokenizer).quantizer

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.tokenizer.token_shape(image_size)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` and perturb their ids: `(B, *token_shape)`."""
        return self.perturb(self.tokenizer.encode(images))

    def perturb(self, tokens: Tensor) -> Tensor:
        """Replace some of the ids `(B, *token_shape)` by near ones."""
        rows = tokens.flatten(1)
        random = CounterRandom(self.seed, indices_of_ids(rows))
        count = rows.shape[1]
        chance, choice = random.uniform(Purpose.ID_PERTURBATION, 2 * count).view(len(rows), 2, count).unbind(1)
        near = self.quantizer.near_ids(tokens, self.neighbours).flatten(1, -2)
        other = near.gather(-1, (choice * self.neighbours).long()[..., None])[..., 0]
        return torch.where(chance < self.rate, other, rows).view_as(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.embed(tokens)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        return self.tokenizer.components(tokens)
