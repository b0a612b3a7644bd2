"""A crafted input, what reads it, and what may come of it: the right result, or one message that names the file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discrete_lit.core.files import Npz

CANARY = "canary"
"""The file that code of an input would make."""
MOST_LINES, MOST_LETTERS = 12, 2000


@dataclass(frozen=True, kw_only=True)
class Case:
    """One crafted input. At least one of `refused` and `right` is given; where both are, either may come."""

    name: str
    craft: Callable[[Path], Any]
    """Writes the input into a folder of its own."""
    read: Callable[[Path], Any]
    """Reads it; the current folder is that folder."""
    refused: str | tuple[str, ...] | None = None
    """A part of the message with which it is refused, the name of the file or of the setting; of several, one."""
    right: Callable[[Any], bool] | None = None
    """Tells whether what was read is right."""
    quick: bool = True
    """Whether it takes little enough time and memory for the fast tests, in their process."""

    def fault_of_message(self, message: str) -> str | None:
        """Say what is wrong with the message of a refusal; None if nothing is."""
        if self.refused is None:
            return f"refused what is right: {message[:300]}"
        names = (self.refused,) if isinstance(self.refused, str) else self.refused
        if not any(name in message for name in names):
            return f"the message does not say {' or '.join(map(repr, names))}: {message[:300]}"
        if message.count("\n") >= MOST_LINES or len(message) > MOST_LETTERS:
            return f"the message has {len(message)} letters in {message.count(chr(10)) + 1} lines: {message[:300]}"
        return None

    def fault_of_result(self, result: Any) -> str | None:
        """Say what is wrong with what was read; None if nothing is."""
        if self.right is None:
            return f"accepted: {str(result)[:200]}"
        return None if self.right(result) else f"silently wrong: {str(result)[:300]}"


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Craft a file of this content."""

    def craft(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)

    return craft


def nothing(folder: Path) -> None:
    """Craft no file: the command line is the input."""


def all_of_npz(path: Path) -> dict[str, Any]:
    """Read every array of an npz."""
    with Npz(path) as file:
        return {name: file.read(name) for name in file.headers}
