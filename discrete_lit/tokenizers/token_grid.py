"""The shape of a tokenizer without the tokenizer: for generators whose files hold no other."""

from typing import NoReturn

import torch
from torch import Tensor

from discrete_lit.tokenizers.tokenizer import Tokenizer


class TokenGrid(Tokenizer):
    """Knows how many ids there are and on what grid; codes nothing.

    A generator around it models and samples ids; images need the tokenizer that its tokens are of.

    Args:
        vocab_size: K.
        token_shape: of the grid, whatever the image size.

    Raises:
        ValueError: no ids or an empty grid; in use, whenever images or code vectors are asked for.
    """

    makes_images = False

    def __init__(self, vocab_size: int, token_shape: tuple[int, ...]) -> None:
        super().__init__()
        if vocab_size < 1 or not token_shape or min(token_shape) < 1:
            raise ValueError(f"vocab_size and token_shape must be positive, got {vocab_size} and {token_shape}")
        self.vocab_size = vocab_size
        self.grid = tuple(token_shape)

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        return self.grid

    def encode(self, images: Tensor) -> Tensor:
        self._refuse()

    def decode(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def embed(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def coding_state(self) -> dict[str, Tensor]:
        """What little tells one from another."""
        return {"grid": torch.tensor((self.vocab_size, *self.grid))}

    def _refuse(self) -> NoReturn:
        shape = " x ".join(map(str, self.grid))
        raise ValueError(
            f"this generator was loaded without its tokenizer, which codes images as {shape} ids below "
            f"{self.vocab_size}: give it the tokenizer that its tokens are of to go from or to images"
        )
