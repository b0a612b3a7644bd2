"""Write tensors as Flax's `to_bytes` does: MessagePack, with arrays as extensions."""

import struct
from pathlib import Path
from typing import Any

from torch import Tensor


def write_flax(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of dotted names as nested mappings."""
    nested: dict[str, Any] = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    file.write_bytes(packed(nested))


def packed(value: Any) -> bytes:
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else struct.pack(">BH", 0xDE, len(value))
        return head + b"".join(packed(name) + packed(inner) for name, inner in value.items())
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else struct.pack(">BB", 0xD9, len(text))) + text
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, int):
        return bytes([value]) if value < 128 else struct.pack(">BI", 0xCE, value)
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(packed(inner) for inner in value)
    array = value.numpy()
    inner = packed([list(array.shape), array.dtype.name, array.tobytes()])
    return struct.pack(">BIb", 0xC9, len(inner), 1) + inner
