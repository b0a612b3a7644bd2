"""File names as sample keys, and back."""

import re
from collections.abc import Sequence
from urllib.parse import unquote


def key_from_path(parts: Sequence[str]) -> str:
    """Join path parts (the last one without its extension) to a key that survives in a shard.

    Dots, percent signs and unprintable characters are percent-encoded, for webdataset ends a key at the first dot;
    so is the first character of a leading `__name__`, which webdataset takes for a comment. Distinct paths give
    distinct keys.

    >>> key_from_path(["tabby cat", "img.v2_001"])
    'tabby cat/img%2Ev2_001'
    """
    key = "/".join("".join(map(_encode, part)) for part in parts)
    return f"%5F{key[1:]}" if re.match(r"__[^/]*__(/|$)", key) else key


def path_from_key(key: str) -> str:
    """The path, without its extension, that `key_from_path` made this key from.

    >>> path_from_key('tabby cat/img%2Ev2_001')
    'tabby cat/img.v2_001'
    """
    return unquote(key, errors="surrogateescape")


def _encode(character: str) -> str:
    if character.isprintable() and character not in ".%":
        return character
    # Bytes of a file name that are not UTF-8 reach Python as lone surrogates.
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
