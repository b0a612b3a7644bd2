"""Characters: the tokenizer of text whose ids are its characters, as in text8 (Mahoney, 2006).

It has no images; `data/text.py` makes token arrays of texts by it, and samples are turned back by `texts`.
"""

from typing import NoReturn

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize
from discrete_lit.tokenizers.tokenizer import Tokenizer

TEXT8 = " abcdefghijklmnopqrstuvwxyz"
"""The 27 symbols of text8 (Mahoney, "About the Test Data", 2006)."""


class Characters(Tokenizer):
    """Make a token of each character of a text of fixed length.

    `image_size` of a generator around it is the number of characters.

    Args:
        symbols: the characters, each once; id i stands for the i-th, counted from 0. text8's by default.

    Raises:
        ValueError: a symbol twice, or fewer than two; in use, whenever images are asked for.
    """

    makes_images = False

    def __init__(self, symbols: str = TEXT8) -> None:
        super().__init__()
        if len(symbols) < 2 or len(set(symbols)) < len(symbols):
            raise ValueError(f"symbols must be at least two characters, each once, got {symbols!r}")
        self.symbols = symbols
        self.vocab_size = len(symbols)

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size, the number of characters, must be positive and one number, got {image_size}")
        return (image_size,)

    def ids(self, text: str) -> Tensor:
        """Turn a text of n characters into ids `(n,)`, int64.

        Raises:
            ValueError: a character that is no symbol.
        """
        number_of = {symbol: number for number, symbol in enumerate(self.symbols)}
        unknown = sorted(set(text) - number_of.keys())
        if unknown:
            raise ValueError(f"the text has characters {unknown[:5]} that are not among the symbols {self.symbols!r}")
        return torch.tensor([number_of[character] for character in text], dtype=torch.int64)

    def texts(self, tokens: Tensor) -> list[str]:
        """Turn ids `(B, N)` into B texts.

        Raises:
            ValueError: an id outside [0, K).
        """
        self.check_tokens(tokens)
        return ["".join(self.symbols[number] for number in row) for row in tokens.tolist()]

    def encode(self, images: Tensor) -> Tensor:
        self._refuse()

    def decode(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def embed(self, tokens: Tensor) -> Tensor:
        """Make one-hot vectors `(B, K, N)` of ids `(B, N)`."""
        self.check_tokens(tokens)
        return rearrange(F.one_hot(tokens, self.vocab_size), "b n k -> b k n").float()

    def coding_state(self) -> dict[str, Tensor]:
        return {"symbols": torch.tensor([ord(symbol) for symbol in self.symbols])}

    def _refuse(self) -> NoReturn:
        raise ValueError("Characters are text, of which there are no images: texts(tokens) gives the text of ids")
