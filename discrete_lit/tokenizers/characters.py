"""Text: an id is a character."""

from typing import NoReturn

import torch
from torch import Tensor

from discrete_lit.tokenizers.tokenizer import Tokenizer

TEXT8 = " abcdefghijklmnopqrstuvwxyz"
"""The 27 symbols of text8 (Mahoney, "About the Test Data", 2006)."""


class Characters(Tokenizer):
    """Texts of a fixed number of characters, of which each is a token; there are no images.

    `image_size` of a generator around it is the number of characters. `data/text.py` makes the token arrays.

    Args:
        symbols: the characters, each once; id i stands for the i-th. text8's by default.

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

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        if image_size < 1:
            raise ValueError(f"image_size, the number of characters, must be positive, got {image_size}")
        return (image_size,)

    def ids(self, text: str) -> Tensor:
        """`(n,)` int64 of a text.

        Raises:
            ValueError: a character that is no symbol.
        """
        place = {symbol: number for number, symbol in enumerate(self.symbols)}
        unknown = sorted(set(text) - place.keys())
        if unknown:
            raise ValueError(f"the text has characters {unknown[:5]} that are not among the symbols {self.symbols!r}")
        return torch.tensor([place[character] for character in text], dtype=torch.int64)

    def texts(self, tokens: Tensor) -> list[str]:
        self.check_tokens(tokens)
        return ["".join(self.symbols[number] for number in row) for row in tokens.tolist()]

    def encode(self, images: Tensor) -> Tensor:
        self._refuse()

    def decode(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def embed(self, tokens: Tensor) -> Tensor:
        """One-hot vectors `(B, K, N)`."""
        self.check_tokens(tokens)
        return torch.nn.functional.one_hot(tokens, self.vocab_size).movedim(-1, 1).float()

    def coding_state(self) -> dict[str, Tensor]:
        return {"symbols": torch.tensor([ord(symbol) for symbol in self.symbols])}

    def _refuse(self) -> NoReturn:
        raise ValueError("Characters are text, of which there are no images: texts(tokens) gives the text of ids")
