"""Two spoken digits after one another, of Asterisk's recordings, in an order that a text says."""

import io
import os
import wave
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from discrete_lit.core.audio import write_wav
from discrete_lit.core.files import content_sha256
from discrete_lit.data.media import AUDIO_FILES, MediaKind
from discrete_lit.data.sources.digit_compositions import held_out
from discrete_lit.data.sources.source import Entry, Source
from discrete_lit.data.sources.spoken_prompts import DIGITS, SpokenPrompts

SLOT = 7200
"""Samples at 8 kHz that a word has, 0.9 seconds: each of the ten recordings fits, spoken slowly."""
_TEMPO = 0.06


class SpokenDigits(Source):
    """Clips of 1.8 seconds at 8 kHz that say two digits, "three seven", as a telephone exchange would.

    There is one recording of each digit. A clip takes each at a speed within 6% (pitch and tempo change together), so
    that no two are the same samples, and each begins where its 0.9 seconds begin. A fifth of the 100 pairs are held
    out, (b - a) mod 10 in {3, 7}, as `DigitCompositions` does: `train` has the other pairs, and `test` these alone,
    which no training clip says. The label is the first digit.
    Source: see `SpokenPrompts`.

    Args:
        root: the folder of the package's sounds.
        split: `train` or `test`.
        count: clips; each pair equally often.
        seed: decides the speeds.

    Raises:
        ValueError: no digits in `root`, another split, no clips, or recordings that are not 8 kHz mono of 16 bits.
    """

    media: ClassVar[MediaKind] = AUDIO_FILES

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        count: int = 800,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test") or count < 1:
            raise ValueError(f"split={split!r} and count={count}: accepted are train and test, and at least 1 clip")
        digits = SpokenPrompts(root, "train", part="digits")
        self._words = [
            _samples(digits.read(index), Path(root) / f"{entry.key}.wav") for index, entry in enumerate(digits.entries)
        ]
        self._pairs = [(a, b) for a in range(10) for b in range(10) if held_out(a, b) == (split == "test")]
        self._split, self._seed = split, seed
        entries = [
            Entry(f"{split}-{index:06d}", "wav", self._pairs[index % len(self._pairs)][0], 44 + 4 * SLOT)
            for index in range(count)
        ]
        super().__init__(f"pairs of spoken digits, {split}, seed {seed}", classes=list(DIGITS), entries=entries)

    def read(self, index: int) -> bytes:
        clip = np.zeros((2 * SLOT, 1), dtype=np.int16)
        for place, digit in enumerate(self._pairs[index % len(self._pairs)]):
            drawn = int(content_sha256(f"{self._seed} {self._split} {index} {place}")[:12], 16) / 16**12
            word = at_speed(self._words[digit], 1 + _TEMPO * (2 * drawn - 1))[:SLOT]
            clip[place * SLOT : place * SLOT + len(word), 0] = word.round()
        buffer = io.BytesIO()
        write_wav(buffer, clip, 8000)
        return buffer.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        return (" ".join(DIGITS[digit] for digit in self._pairs[index % len(self._pairs)]),)

    def fingerprint(self) -> str:
        words = [content_sha256(word.tobytes()) for word in self._words]
        return content_sha256([super().fingerprint(), self.description, *words])


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Play samples `(n,)` faster, `(n / speed,)` float64, between samples by a line."""
    places = np.arange(int((len(samples) - 1) / speed) + 1) * speed
    return np.interp(places, np.arange(len(samples)), samples)


def _samples(data: bytes, path: Path) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        found = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if found != (8000, 1, 2):
            raise ValueError(
                f"{path} has {found[0]} samples a second, {found[1]} channels and {found[2]} bytes a sample; 8000, 1 "
                "and 2 are needed, which the files of asterisk-core-sounds-en-wav have"
            )
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
