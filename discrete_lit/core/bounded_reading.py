"""Read small files that may come from anywhere, each within a bound: text, JSON, arrays of numbers, nested data.

A size is known before anything is read: from the file system, or from an array's own header. Whatever is wrong with a
file is a ValueError that names it. Pipes and devices, which may have no end, are no files.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from discrete_lit.core.files import read_npy_header

MOST_SETTINGS = 2**22
"""Bytes of a file of settings or of prompts."""
MOST_JSON = 2**25
"""Bytes of a manifest or a record: about 300,000 shards. As Python objects they may take sixty times as much memory."""
# A training checkpoint has some 10,000 values, 10 deep.
_MOST_VALUES, _DEEPEST = 10_000_000, 100


def read_text(path: str | os.PathLike[str], *, most: int = MOST_SETTINGS) -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe, a device or a folder, is longer, cannot be read, or is not UTF-8.
    """
    return _decoded(_read(Path(path), most), os.fspath(path))


def read_json(path: str | os.PathLike[str], *, most: int = MOST_JSON) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what `read_text` raises, or it is not JSON.
    """
    return parse_json(_read(Path(path), most), os.fspath(path))


def parse_json(content: bytes | str, name: str) -> Any:
    """Parse JSON.

    Args:
        content: text, or text in UTF-8.
        name: its location, for messages.

    Raises:
        ValueError: it is not JSON, or gives a key twice, of which Python's reader would keep the last.
    """
    try:
        text = _decoded(content, name) if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def open_array(path: str | os.PathLike[str], *, mapped: bool = False) -> np.ndarray:
    """Open an .npy file whose header claims exactly the bytes that there are; nothing is unpickled.

    Args:
        path: the file.
        mapped: map it into the memory, to be read only, instead of reading it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no whole array of numbers or texts.
    """
    file = Path(path)
    _check_regular(file)
    try:
        with file.open("rb") as opened:
            header = read_npy_header(opened)
            if header.dtype.hasobject:
                raise ValueError("it holds Python objects, which are not read")
            there = os.fstat(opened.fileno()).st_size - opened.tell()
            if header.size != there:
                raise ValueError(f"{header.dtype} {header.shape} takes {header.size:,} bytes, there are {there:,}")
            if mapped and header.size:
                return np.lib.format.open_memmap(file, mode="r")
            opened.seek(0)
            return np.lib.format.read_array(opened, allow_pickle=False)
    # A broken header raises almost anything: SyntaxError, TypeError, OverflowError, MemoryError, ...
    except Exception as error:
        raise ValueError(f"{file} is not a whole .npy file: {error or type(error).__name__}") from error


def check_nesting(value: Any, name: str) -> None:
    """Refuse mappings and lists that take for ever to walk through: in a pickle they may share or hold themselves.

    Args:
        value: mappings and lists within one another; other values count as one each.
        name: where it comes from, for messages.

    Raises:
        ValueError: it contains itself, is too deep, or has too many values when each shared part is counted as often as
            it is used.
    """
    if _values(value, (), {}, name) > _MOST_VALUES:
        raise ValueError(
            f"{name!r} has more than {_MOST_VALUES:,} values, shared ones counted as often as they are used"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it gives {key!r} twice in one place")
    return found


def _values(value: Any, above: tuple[int, ...], counted: dict[int, int], name: str) -> int:
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) in above:
        raise ValueError(f"{name!r} holds a {type(value).__name__} that contains itself")
    if len(above) > _DEEPEST:
        raise ValueError(f"{name!r} is nested deeper than {_DEEPEST} levels")
    if id(value) not in counted:
        within = (*above, id(value))
        parts = value.values() if isinstance(value, Mapping) else value
        counted[id(value)] = 1 + sum(_values(part, within, counted, name) for part in parts)
    return counted[id(value)]


def _read(path: Path, most: int) -> bytes:
    _check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise ValueError(f"{path} has more than the {most:,} bytes that are read of such a file")
    return content


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(2, os.strerror(2), os.fspath(path))
    if not path.is_file():
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device")


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
