"""The manifest of a folder of codes: what it must say, and that it is not believed before it is checked.

Every reader of `encoded_arrays.py` and of its two kinds goes through `read_array_manifest` and `ArrayKind.refused`; the
arrays are compared with the manifest when they are opened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discrete_lit.core.bounded_reading import read_json

MANIFEST = "manifest.json"
"""The name of the manifest of a finished folder."""
UNFINISHED_MANIFEST = "manifest.unfinished.json"
"""Its name while rows are missing."""


@dataclass(frozen=True, kw_only=True)
class ArrayKind:
    """The names of one kind of encoded arrays."""

    format: str
    """The word for it in the manifest."""
    word: str
    """The word for it in messages: a token array, say."""
    content: str
    """The name of its codes: of their file, and in batches."""
    entries: tuple[str, ...]
    """The entries of its manifest beside those that every one has."""

    def refused(self, manifest: Any, path: Path) -> str | None:
        """Say why a manifest is not one of this kind; None where it is."""
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        if not isinstance(manifest, dict) or found != self.format:
            return f"{path} has format {found!r}; a {self.word} has {self.format!r}"
        for name in ("count", *self.entries, "image_size", "num_classes", "classes", "tokenizer"):
            if name not in manifest:
                return f"{path} has no {name!r}: it is not whole, copy the folder again"
        return _incredible(manifest, path)


def _incredible(manifest: dict[str, Any], path: Path) -> str | None:
    """Say which entry of a manifest is nothing that one can be; None where all may be right."""
    for name, (fits, words) in _ENTRIES.items():
        if name in manifest and not fits(manifest[name]):
            return f"{path} cannot be believed: its {name} is {str(manifest[name])[:80]!r}, it must be {words}"
    named, known = len(manifest.get("classes", ())), manifest.get("num_classes", 0)
    if named not in (0, known):
        return f"{path} cannot be believed: num_classes is {known}, and classes names {named}"
    return None


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _sides(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(_whole(side, 1, _LONGEST_SIDE) for side in value)


# What each entry of a manifest may be. The arrays are then compared with it.
_LONGEST_SIDE = 2**31
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda value: _whole(value, 1, 2**62), "a whole number above 0"),
    "token_shape": (_sides, "a list of whole numbers above 0"),
    "latent_shape": (lambda value: _sides(value) and len(value) > 0, "a list of whole numbers above 0"),
    "vocab_size": (lambda value: _whole(value, 1, 2**63), "a whole number above 0"),
    "variants": (lambda value: _whole(value, 1, 2**31), "a whole number above 0"),
    "num_classes": (lambda value: _whole(value, 0, 2**31), "a whole number"),
    "classes": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "image_size": (
        lambda value: _whole(value, 1, _LONGEST_SIDE) or (_sides(value) and 1 <= len(value) <= 3),
        "the side of a square in pixels, [height, width], or of clips [samples] or [frames, height, width]",
    ),
    "tokenizer": (lambda value: isinstance(value, str), "a text"),
}


def read_array_manifest(folder: Path, word: str = "array") -> Any:
    """Read the manifest of a finished folder of codes of any kind.

    Args:
        folder: of the codes.
        word: for messages.

    Raises:
        ValueError: there is none, it is not JSON, or says what cannot be.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED_MANIFEST).is_file():
            raise ValueError(
                f"the {word} in {folder} is incomplete: `discrete-lit tokenize` was interrupted. Run it again."
            )
        raise ValueError(f"{folder} holds no {word} (no {MANIFEST}): make one with `discrete-lit tokenize`")
    manifest = read_json(path)
    if isinstance(manifest, dict) and (reason := _incredible(manifest, path)) is not None:
        raise ValueError(reason)
    return manifest
