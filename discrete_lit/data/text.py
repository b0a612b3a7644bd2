"""Text as token arrays of its characters."""

import ast
import re
from pathlib import Path
from typing import Any

import torch

from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.tokenizers.characters import TEXT8, Characters

# Mahoney's script, which made text8, writes digits as words.
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELLED = str.maketrans({str(digit): f" {word} " for digit, word in enumerate(_DIGITS)})
# text8's 100 million characters are split into 90, 5 and 5.
_SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
_PAGES = ("benchmarks", "data", "docs")
_ROWS_AT_ONCE = 8192


def to_text8(text: str) -> str:
    """Bring a text to the symbols of text8: lower-case letters, digits as words, everything else as single spaces.

    A text that has this form already stays as it is.
    """
    return re.sub("[^a-z]+", " ", text.translate(_SPELLED).lower())


def own_prose(root: Path) -> str:
    """Gather the pages and the docstrings of a checkout of this repository, in the order of their paths."""
    pages = [root / "README.md", *(page for folder in _PAGES for page in sorted((root / folder).rglob("*.md")))]
    docstrings = [
        docstring
        for path in sorted((root / "discrete_lit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node))
    ]
    return "\n".join([*(page.read_text(encoding="utf-8") for page in pages), *docstrings])


def write_text(text: str, output: Path, *, length: int, source: str, symbols: str = TEXT8) -> dict[str, dict[str, Any]]:
    """Write a text's chunks into `output/train`, `validation` and `test`: 90%, 5% and 5% of it in its order.

    Args:
        text: a text of nothing but the symbols.
        output: folder of the three splits.
        length: characters of a chunk; chunks do not overlap, and what is left at the end of a split is left out.
        source: where the text comes from, for the manifests.
        symbols: the vocabulary of `Characters`.

    Returns:
        The manifest of each split.

    Raises:
        ValueError: a length below 1, a split without a single chunk, other characters, a finished array in a folder.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if int(0.05 * len(text)) < length:
        raise ValueError(
            f"the text has {len(text):,} characters: a twentieth of it must fill a chunk of length={length}"
        )
    tokenizer = Characters(symbols)
    manifests: dict[str, dict[str, Any]] = {}
    for split, (first, last) in _SPLITS.items():
        portion = text[round(first * len(text)) : round(last * len(text))]
        count = len(portion) // length
        TokenWriter.create(
            output / split,
            count=count,
            token_shape=tokenizer.token_shape(length),
            vocab_size=tokenizer.vocab_size,
            image_size=length,
            num_classes=1,
            classes=["text"],
            tokenizer=tokenizer.fingerprint(),
            source=f"{source}, {split}",
        )
        writer = TokenWriter(output / split)
        for row in range(0, count, _ROWS_AT_ONCE):
            rows = min(_ROWS_AT_ONCE, count - row)
            ids = tokenizer.ids(portion[row * length : (row + rows) * length]).reshape(rows, length)
            writer.write(torch.arange(row, row + rows), ids, torch.zeros(rows, dtype=torch.int64))
        writer.close()
        manifests[split] = TokenWriter.finalise(output / split)
    return manifests
