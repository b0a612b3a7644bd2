"""The spoken prompts of Asterisk, a telephone exchange: sentences, words, letters, digits, in a package of Debian."""

import os
import re
from pathlib import Path
from typing import ClassVar, Literal

from discrete_lit.core.files import content_sha256
from discrete_lit.data.media import AUDIO_FILES, MediaKind
from discrete_lit.data.sources.source import Entry, Source, file_change, key_from_path

_TEST_FRACTION = 0.1
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The ten words of `part="digits"`, in the order of their labels."""
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    *("november", "december"),
)
_ORDINALS = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"},
    "twelve": "twelfth",
}


class SpokenPrompts(Source):
    """The 568 spoken prompts of Asterisk, one speaker, 8 kHz mono WAV; captions are made of the names of the files.

    The class is the folder: `digits`, `letters`, `phonetic`, ..., and `prompts` for what lies in none. Captions say
    what the name says, with numbers, days and months in words: `digits/h-12` is "twelfth". They are what is spoken for
    words, and near it for sentences. A tenth of the prompts, chosen by a hash of the name, are the test set.
    Source: https://www.asterisk.org (Allison Smith; CC-BY-SA-3.0), in the Debian and Ubuntu package
    asterisk-core-sounds-en-wav.

    Args:
        root: the folder of the package's sounds, such as `/usr/share/asterisk/sounds/en_US_f_Allison`.
        split: `train` or `test`.
        part: `all`; or `digits`, the ten words zero to nine, a class each, of which there is one recording each, in
            both splits.

    Raises:
        ValueError: there are no sounds.
    """

    media: ClassVar[MediaKind] = AUDIO_FILES

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        part: Literal["all", "digits"] = "all",
    ) -> None:
        folder = Path(root).expanduser()
        paths = sorted(folder.rglob("*.wav"))
        names = [path.relative_to(folder).with_suffix("") for path in paths]
        if not paths:
            raise ValueError(
                f"{folder} holds no sounds: give the folder sounds of Debian's asterisk-core-sounds-en-wav "
                "(/usr/share/asterisk/sounds/en_US_f_Allison, after `apt-get install asterisk-core-sounds-en-wav`)"
            )
        if part == "digits":
            classes = list(DIGITS)
            of_class = {f"digits/{number}": word for number, word in enumerate(DIGITS)}
            chosen = [(path, name) for path, name in zip(paths, names, strict=True) if name.as_posix() in of_class]
            if len(chosen) < len(DIGITS):
                raise ValueError(f"{folder} holds {len(chosen)} of the ten digits digits/0.wav to digits/9.wav")
        else:
            of_class = {name.as_posix(): name.parts[0] if len(name.parts) > 1 else "prompts" for name in names}
            classes = sorted(set(of_class.values()))
            chosen = [
                (path, name) for path, name in zip(paths, names, strict=True) if _is_test(name) == (split == "test")
            ]
        self._paths = [path for path, _ in chosen]
        self._captions = [prompt_text(name.as_posix()) for _, name in chosen]
        entries = [
            Entry(key_from_path(list(name.parts)), "wav", classes.index(of_class[name.as_posix()]), path.stat().st_size)
            for path, name in chosen
        ]
        super().__init__(f"asterisk-core-sounds-en-wav {part} {split}", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._captions[index],)

    def last_change(self, index: int) -> int:
        return file_change(self._paths[index])

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), *self._captions])


def prompt_text(name: str) -> str:
    """Write the name of a prompt, such as `digits/h-20`, as the words that are spoken: "twentieth".

    Names of sentences give their own words: `agent-loggedoff` is "agent loggedoff".
    """
    folder, _, stem = name.rpartition("/")
    if folder == "digits":
        if found := re.fullmatch(r"(day|mon)-(\d+)", stem):
            names = _DAYS if found[1] == "day" else _MONTHS
            if int(found[2]) < len(names):
                return names[int(found[2])]
        if found := re.fullmatch(r"h-(\w+)", stem):
            return _ordinal(_number(found[1]))
    return " ".join(_number(word) for word in re.split(r"[-_ ]+", stem) if word).lower()


def _number(word: str) -> str:
    """Spell a number below 100; other words stay as they are."""
    if not re.fullmatch(r"\d{1,2}", word):
        return word
    tens, ones = divmod(int(word), 10)
    if tens == 0:
        return DIGITS[ones]
    if tens == 1:
        return _TEENS[ones]
    return _TENS[tens] if ones == 0 else f"{_TENS[tens]} {DIGITS[ones]}"


def _ordinal(word: str) -> str:
    if word in _ORDINALS:
        return _ORDINALS[word]
    return f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th"


def _is_test(name: Path) -> bool:
    return int(content_sha256(name.as_posix())[:8], 16) / 2**32 < _TEST_FRACTION
