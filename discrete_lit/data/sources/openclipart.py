"""The Open Clip Art Library: drawings in the public domain, in Debian's openclipart-png."""

import io
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from discrete_lit.core.files import content_sha256
from discrete_lit.data.sources.source import Entry, Source, file_change, key_from_path

_TEST_FRACTION = 0.1
# A number at the end of a name, and what is empty there: `cello_mo_01`, `cone_`.
_NUMBER = re.compile(r"(\d+[a-z]?)?")
_BETWEEN_WORDS = re.compile(r"[\s_.,()-]+")


class OpenClipart(Source):
    """The drawings of the Open Clip Art Library on white; the class is the topmost folder.

    Captions are made of the names of file and folders, "ice cream cone" and "ice cream cone, food, desserts". The name
    of the author, which ends most names of files, cut off anywhere, is left out by what the picture says of its author.
    A tenth of the drawings, by a hash of caption and author, are the test set, so that the numbered variations of one
    drawing are in one split. Left out are links, by which the package shows a drawing in several folders, and pictures
    of more pixels than Pillow opens without a warning, 89 million.
    Source: https://openclipart.org (public domain), in the Debian and Ubuntu package openclipart-png.

    Args:
        root: the folder of the package, `/usr/share/openclipart/png`.
        split: `train` or `test`.
        longest_side: of the pictures in pixels; larger ones are shrunk.
        leave_out: folders, such as `shapes/stars`: a fifth of the library are stars that a program drew.

    Raises:
        ValueError: there are no drawings, another split, a side below 1, or a folder to leave out that is not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        longest_side: int = 256,
        leave_out: Sequence[str] = (),
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: accepted are train, test")
        if longest_side < 1:
            raise ValueError(f"longest_side={longest_side} must be at least 1 pixel")
        folder = Path(root).expanduser()
        missing = [name for name in leave_out if not (folder / name).is_dir()]
        paths = sorted(path for path in folder.rglob("*.png") if path.is_file() and not path.is_symlink())
        if not paths:
            raise ValueError(
                f"{folder} holds no drawings: give the folder png of Debian's openclipart-png "
                "(/usr/share/openclipart/png, after `apt-get install openclipart-png`)"
            )
        if missing:
            raise ValueError(f"leave_out={list(leave_out)}: {folder} has no folder {missing[0]!r}")
        without = [folder / name for name in leave_out]
        self.longest_side = longest_side
        self._paths: list[Path] = []
        self._captions: list[tuple[str, ...]] = []
        names: list[Path] = []
        for path in paths:
            name = path.relative_to(folder)
            if any(path.is_relative_to(one) for one in without) or len(name.parts) < 2:
                continue
            author = _author(path)
            if author is None:
                continue
            title = " ".join(words_of(path.stem, author))
            if (_fraction(f"{title} by {author}") < _TEST_FRACTION) == (split == "test"):
                self._paths.append(path)
                self._captions.append((title, ", ".join([title, *(_spaced(part) for part in name.parts[:-1])])))
                names.append(name)
        classes = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
        entries = [
            Entry(
                key_from_path([*name.parts[:-1], name.stem]), "png", classes.index(name.parts[0]), path.stat().st_size
            )
            for path, name in zip(self._paths, names, strict=True)
        ]
        left_out = f" without {', '.join(leave_out)}" if leave_out else ""
        description = f"openclipart-png {split}, at most {longest_side} pixels wide and high{left_out}"
        super().__init__(description, classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        picture = Image.open(self._paths[index]).convert("RGBA")
        picture.thumbnail((self.longest_side, self.longest_side), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", picture.size, "white")
        buffer = io.BytesIO()
        Image.alpha_composite(white, picture).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def last_change(self, index: int) -> int:
        return file_change(self._paths[index])

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), json.dumps(self._captions)])


def words_of(name: str, author: str) -> list[str]:
    """Split the name of a file into words, without the author, of whom it may have a beginning, and the number.

    `cello_mo_01` of the author "mo" gives cello, `puntine_architetto_franc_01` of "Architetto Francesco" puntine. A
    name of nothing else stays as it is.
    """
    parts = name.split("_")
    while len(parts) > 1 and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    letters = _letters(author)
    for first in range(1, len(parts)):
        end = _letters("".join(parts[first:]))
        if end and letters.startswith(end):
            parts = parts[:first]
            break
    found = [word for part in parts for word in _BETWEEN_WORDS.split(part.lower()) if word]
    return found or [name.lower()]


def _author(path: Path) -> str | None:
    """The author as the picture names them, "" where it names nobody; None of a picture that is too large to open."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # What stands in front of the pixels, which `text` would read.
            with Image.open(path) as picture:
                texts = picture.info
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    except (OSError, ValueError):  # its reading says so later
        return ""
    return str(texts.get("Author", "")).partition("(")[0]


def _letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _spaced(folder: str) -> str:
    return " ".join(word for word in _BETWEEN_WORDS.split(folder.lower()) if word)


def _fraction(text: str) -> float:
    """A number in [0, 1) by the hash of a text."""
    return int(content_sha256(text)[:8], 16) / 2**32
