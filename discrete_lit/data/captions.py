"""Captions of images and clips: where they stand beside an image, and which of several a batch takes.

A caption file has the name of its image, in a shard and in a folder alike: `<key>.txt` holds a caption on each line,
and `<key>.json`, as img2dataset writes it, one or a list of them in a field.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from discrete_lit.data.media import UndecodableSample

DEFAULT_FIELD = "caption"
LONGEST_FILE = 2**20
"""Bytes of a caption file that are read at most."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The place of the captions of images, and what is done without one.

    Args:
        kind: `txt`, a caption on each line, or `json`.
        field: of the JSON, which holds a text or a list of texts; `caption` where none is given.
        missing: `error` takes an image without a caption for a bad sample, which is logged, counted, and ends the run
            past `max_bad_fraction`; `empty` gives it the caption "".

    Raises:
        ValueError: another kind, something else to do, or a field of a text file.
    """

    kind: Literal["txt", "json"] = "txt"
    field: str | None = None
    missing: Literal["error", "empty"] = "error"

    def __post_init__(self) -> None:
        if self.kind not in ("txt", "json"):
            raise ValueError(f"captions.kind is {self.kind!r}; it must be 'txt' or 'json'")
        if self.missing not in ("error", "empty"):
            raise ValueError(f"captions.missing is {self.missing!r}; it must be 'error' or 'empty'")
        if self.field is not None and self.kind == "txt":
            raise ValueError(f"captions.field={self.field!r} is of JSON: set captions.kind to json too")

    def read(self, content: bytes | None) -> tuple[str, ...]:
        """Read the captions, one at least, of a caption file; None where there is no file.

        Raises:
            UndecodableSample: there is no caption, or the file is broken.
        """
        captions: tuple[str, ...] = ()
        if content is not None:
            try:
                captions = self._parsed(content)
            except (ValueError, RecursionError) as error:  # not UTF-8, or no JSON
                raise UndecodableSample(f"its .{self.kind} cannot be read: {error}") from error
        if captions:
            return captions
        if self.missing == "empty":
            return ("",)
        where = f"no .{self.kind}" if content is None else f"no caption in its .{self.kind}"
        raise UndecodableSample(f"it has {where}{self._hint(content)}; captions.missing: empty takes it without a text")

    def _parsed(self, content: bytes) -> tuple[str, ...]:
        text = content.decode("utf-8-sig")
        if self.kind == "txt":
            return one_line_each(text.splitlines())
        fields = json.loads(text)
        value = fields.get(self.field or DEFAULT_FIELD) if isinstance(fields, dict) else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(caption, str) for caption in values):
            raise ValueError(f"its field {self.field or DEFAULT_FIELD!r} is no text and no list of texts")
        return one_line_each(values)

    def _hint(self, content: bytes | None) -> str:
        if content is None or self.kind == "txt":
            return ""
        fields = json.loads(content.decode("utf-8-sig"))
        found = ", ".join(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        return f", whose field {self.field or DEFAULT_FIELD!r} is missing or empty; it holds {found[:100]}"


def one_line_each(captions: Sequence[str]) -> tuple[str, ...]:
    """Bring captions to one line each, and leave out empty ones."""
    lines = (" ".join(caption.split()) for caption in captions)
    return tuple(line for line in lines if line)


def drawn(captions: Sequence[str], uniform: float) -> str:
    """Take one of several captions, by a number in [0, 1)."""
    return captions[int(uniform * len(captions))]


def caption_batch(captions: Sequence[Sequence[str]], chosen: Sequence[str] | None) -> dict[str, Any]:
    """Make the entries of a batch: `"caption"`, one text of each sample.

    In evaluation, where none is `chosen`, it is the first, and `"captions"` are all.
    """
    if chosen is not None:
        return {"caption": list(chosen)}
    return {"caption": [each[0] for each in captions], "captions": [list(each) for each in captions]}
