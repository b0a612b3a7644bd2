"""The stamps of Tux Paint, in Debian's tuxpaint-stamps-default: pictures with a caption in up to 80 languages, and the
captions spoken in a dozen of them."""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image

from discrete_lit.core.files import content_sha256
from discrete_lit.data.captions import one_line_each
from discrete_lit.data.media import AUDIO_FILES, MediaKind
from discrete_lit.data.sources.source import Entry, Source, file_change, key_from_path

_TEST_FRACTION = 0.1
_LANGUAGE = re.compile(r"([A-Za-z_@.-]+)\.utf8=(.*)")
# `fox_desc_fr.ogg`; of English without a language.
_SPOKEN = re.compile(r"(.+?)_desc(?:_([A-Za-z]{2,3}(?:_[A-Za-z]+)?))?\.(?:ogg|wav)")
# Turned copies of other stamps.
_COPIES = ("_mirror", "_flip", "_mirror_flip")


class TuxpaintStamps(Source):
    """Tux Paint's stamps, most of them cut out of photographs, on white; the class is the topmost folder.

    A tenth of the stamps, chosen by a hash of the name, are the test set. Captions are those of the file beside each
    stamp, one a language: "A red fox."
    Source: https://tuxpaint.org (GPL-2), in the Debian and Ubuntu package tuxpaint-stamps-default.

    Args:
        root: the folder of the package, `/usr/share/tuxpaint/stamps`.
        split: `train` or `test`.
        languages: codes as in the files, `en` for the first line; a stamp has the captions that are there.

    Raises:
        ValueError: there are no stamps, no language, or one that no stamp has.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        languages: Sequence[str] = ("en",),
    ) -> None:
        folder = Path(root).expanduser()
        paths = sorted(path for path in folder.rglob("*.png") if not path.stem.endswith(_COPIES))
        if not paths:
            raise ValueError(
                f"{folder} holds no stamps: give the folder stamps of Debian's tuxpaint-stamps-default "
                "(/usr/share/tuxpaint/stamps, after `apt-get install tuxpaint-stamps-default`)"
            )
        names = [path.relative_to(folder) for path in paths]
        classes = sorted({name.parts[0] for name in names})
        chosen = [(path, name) for path, name in zip(paths, names, strict=True) if _is_test(name) == (split == "test")]
        captions = [_captions(path.with_suffix(".txt")) for path, _ in chosen]
        unknown = [code for code in languages if not any(code in texts for texts in captions)]
        if unknown or not languages:
            known = sorted({code for texts in captions for code in texts})
            raise ValueError(f"languages={list(languages)}: accepted are some of {', '.join(known)}")
        self._paths = [path for path, _ in chosen]
        self._captions = [one_line_each([texts[code] for code in languages if code in texts]) for texts in captions]
        entries = [
            Entry(
                key_from_path([*name.parts[:-1], name.stem]), "png", classes.index(name.parts[0]), path.stat().st_size
            )
            for path, name in chosen
        ]
        description = f"tuxpaint-stamps-default {split}, captions in {', '.join(languages)}"
        super().__init__(description, classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        picture = Image.open(self._paths[index]).convert("RGBA")
        buffer = io.BytesIO()
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def last_change(self, index: int) -> int:
        return file_change(self._paths[index])

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), json.dumps(self._captions)])


def _is_test(name: Path) -> bool:
    return int(content_sha256(name.with_suffix("").as_posix())[:8], 16) / 2**32 < _TEST_FRACTION


def _captions(file: Path) -> dict[str, str]:
    """The captions of a stamp by their languages: English on the first line, then `code.utf8=text`."""
    if not file.is_file():
        return {}
    first, *others = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    found = {"en": first} if first.strip() else {}
    for line in others:
        if match := _LANGUAGE.fullmatch(line.strip()):
            found[match[1]] = match[2]
    return found


class TuxpaintSpeech(Source):
    """The spoken captions of Tux Paint's stamps, `.ogg` and `.wav`; the class is the language.

    A clip is what `<stamp>_desc_<language>.ogg` says, of English `<stamp>_desc.ogg`, and its caption the text of that
    language in the stamp's own file, by which it was read. There are 650 to 930 each in be, bg, ca, el, es, fr, ro
    and ru, fewer in others. All languages of a stamp are in one split, that of its picture in `TuxpaintStamps`.
    Source: see `TuxpaintStamps`. The speakers are the project's volunteers, most languages of one voice.

    Args:
        root: the folder of the package, `/usr/share/tuxpaint/stamps`.
        split: `train` or `test`.
        languages: codes as in the files, in the order of their labels; recordings without a text are left out.

    Raises:
        ValueError: there are no recordings, no language, one twice, or one that no recording has.
    """

    media: ClassVar[MediaKind] = AUDIO_FILES

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        languages: Sequence[str] = ("es", "fr", "ru"),
    ) -> None:
        folder = Path(root).expanduser()
        found = [
            (path, match[1], match[2] or "en")
            for path in sorted([*folder.rglob("*_desc*.ogg"), *folder.rglob("*_desc*.wav")])
            if (match := _SPOKEN.fullmatch(path.name)) is not None
        ]
        if not found:
            raise ValueError(
                f"{folder} holds no spoken captions: give the folder stamps of Debian's tuxpaint-stamps-default "
                "(/usr/share/tuxpaint/stamps, after `apt-get install tuxpaint-stamps-default`)"
            )
        known = sorted({language for _, _, language in found})
        if not languages or len(set(languages)) < len(languages) or not set(languages) <= set(known):
            raise ValueError(f"languages={list(languages)}: accepted are some of {', '.join(known)}, each once")
        self._paths, self._captions, entries = list[Path](), list[tuple[str, ...]](), list[Entry]()
        for path, stamp, language in found:
            name = path.with_name(f"{stamp}.png").relative_to(folder)
            if language not in languages or _is_test(name) != (split == "test"):
                continue
            text = _captions(path.with_name(f"{stamp}.txt")).get(language)
            if text is None:
                continue
            self._paths.append(path)
            self._captions.append(one_line_each([text])[:1])
            key = key_from_path([*name.parts[:-1], f"{stamp}_{language}"])
            entries.append(Entry(key, path.suffix[1:], list(languages).index(language), path.stat().st_size))
        description = f"spoken captions of tuxpaint-stamps-default, {split}, in {', '.join(languages)}"
        super().__init__(description, classes=list(languages), entries=entries)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def last_change(self, index: int) -> int:
        return file_change(self._paths[index])

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), json.dumps(self._captions)])
