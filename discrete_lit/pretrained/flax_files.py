"""Read what Flax's `to_bytes` wrote: MessagePack, with arrays as extensions. It holds data alone, no code.

Only what such a checkpoint of a network has is read: mappings by text, arrays, numbers, texts and lists of these.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Flax's number of an array's extension.
_ARRAY = 1
# First bytes of a mapping with entries. A pickle begins with 0x80, a zip file with 0x50.
_MAPPINGS = (*range(0x81, 0x90), 0xDE, 0xDF)
# Deeper than any network's names, and far from Python's own limit.
_DEEPEST = 64
_NUMBERS = {
    **{0xCA: ">f", 0xCB: ">d"},
    **{0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
    **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# How the length of a binary, a text, a list, a mapping or an extension is written.
_LENGTHS = {
    **{0xC4: ">B", 0xC5: ">H", 0xC6: ">I"},
    **{0xD9: ">B", 0xDA: ">H", 0xDB: ">I"},
    **{0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"},
    **{0xC7: ">B", 0xC8: ">H", 0xC9: ">I"},
}


def is_flax(file: Path) -> bool:
    """Tell whether a file begins as a MessagePack mapping does."""
    with file.open("rb") as stream:
        first = stream.read(1)
    return bool(first) and first[0] in _MAPPINGS


def read_flax(file: Path) -> dict[str, Any]:
    """Read the nested mappings of a Flax checkpoint, with tensors in the place of arrays.

    Raises:
        ValueError: the file is truncated, or holds what no checkpoint of a network does.
    """
    reader = _Reader(file.read_bytes(), str(file))
    content = reader.value(0)
    if not isinstance(content, dict) or reader.position != len(reader.data):
        raise ValueError(f"{str(file)!r} is no Flax checkpoint: it is not one mapping")
    return content


class _Reader:
    def __init__(self, data: bytes, source: str) -> None:
        self.data, self.source, self.position = data, source, 0

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"{self.source!r} is no Flax checkpoint: it is nested more than {_DEEPEST} times")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:  # small numbers
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code < 0x90 or code in (0xDE, 0xDF):
            return self.mapping(code & 0x0F if code < 0x90 else self.number(_LENGTHS[code]), depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            length = code & 0x0F if code < 0xA0 else self.number(_LENGTHS[code])
            return [self.value(depth + 1) for _ in range(length)]
        if code < 0xC0 or code in (0xD9, 0xDA, 0xDB):
            return self.text(code & 0x1F if code < 0xC0 else self.number(_LENGTHS[code]))
        if code in (0xC4, 0xC5, 0xC6):
            return self.take(self.number(_LENGTHS[code]))
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << (code - 0xD4))
        if code in (0xC7, 0xC8, 0xC9):
            return self.extension(self.number(_LENGTHS[code]))
        raise ValueError(f"{self.source!r} is no Flax checkpoint: it has the byte {code:#x} at {self.position - 1}")

    def take(self, count: int) -> bytes:
        found = self.data[self.position : self.position + count]
        if len(found) < count:
            raise ValueError(f"{self.source!r} is truncated: it ends {count - len(found)} bytes too early")
        self.position += count
        return found

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source!r} is no Flax checkpoint: {error}") from error

    def mapping(self, length: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(length):
            name = self.value(depth + 1)
            if not isinstance(name, str):
                raise ValueError(f"{self.source!r} is no Flax checkpoint: it has a key that is no text")
            found[name] = self.value(depth + 1)
        return found

    def extension(self, length: int) -> torch.Tensor:
        kind, data = self.number(">b"), self.take(length)
        if kind != _ARRAY:
            raise ValueError(f"{self.source!r} holds an extension of the kind {kind}, where arrays alone are read")
        # A list of its shape, its type's name and its bytes, packed in turn.
        inner = _Reader(data, self.source)
        parts = inner.value(0)
        try:
            shape, name, content = parts
            array = np.frombuffer(content, dtype=np.dtype(name)).reshape(shape)
            return torch.from_numpy(array.copy())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.source!r} holds an array that cannot be read: {error}") from error
