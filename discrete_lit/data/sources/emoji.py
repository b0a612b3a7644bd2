"""The Noto colour emoji of the npm package emoji-datasource-google."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from PIL import Image

from discrete_lit.core.files import content_sha256
from discrete_lit.data.captions import one_line_each
from discrete_lit.data.sources.source import Entry, Source

_TEST_FRACTION = 0.1


class Emoji(Source):
    """Google's Noto emoji as 64x64 colour images on white; the class is the emoji's category.

    An emoji and its variations in skin tone, gender or profession begin with the same code point and look alike, so
    the split goes by the first code point: a tenth of those, chosen by a hash, are the test set with all that begins
    with them, and as many as `validation_fraction` says of all are another set, for choices that the test set must not
    decide. Most names of the test set have a word that no training name has. For models that put known words together
    anew, `combinations_fraction` takes names out of the training images whose every word stands in another training
    name: the split `combinations`. Keys are the code points in hexadecimal, `1f469-1f3fd-200d-1f680`.
    Source: https://github.com/iamcal/emoji-data (the files), https://github.com/googlefonts/noto-emoji (the pictures,
    Apache-2.0).

    Args:
        package: the package's folder, which holds `emoji.json` and `img/google/64`.
        split: `train`, `validation`, `test` or `combinations`.
        validation_fraction: of the first code points, at most 0.9; they are taken from the training images.
        combinations_fraction: of the names that training would have, in [0, 1), chosen by a hash; those with a word of
            their own stay in training all the same.
        captions: give each emoji its Unicode name in small letters, "waving hand sign, dark skin tone", and, where it
            is another, its short name.

    Raises:
        ValueError: the folder is not that of the package, or a fraction is out of its range.
    """

    def __init__(
        self,
        package: str | os.PathLike[str],
        split: Literal["train", "validation", "test", "combinations"],
        *,
        validation_fraction: float = 0.0,
        combinations_fraction: float = 0.0,
        captions: bool = False,
    ) -> None:
        if not 0 <= validation_fraction <= 1 - _TEST_FRACTION:
            raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, {1 - _TEST_FRACTION}]")
        if not 0 <= combinations_fraction < 1:
            raise ValueError(f"combinations_fraction is {combinations_fraction}; it must be in [0, 1)")
        root = Path(package)
        table, self._images = root / "emoji.json", root / "img" / "google" / "64"
        if not table.is_file() or not self._images.is_dir():
            raise ValueError(
                f"{root} holds no emoji.json and img/google/64: give the folder of the npm package "
                "emoji-datasource-google (`npm pack emoji-datasource-google`, then `tar xzf` gives package/)"
            )
        version = json.loads((root / "package.json").read_text(encoding="utf-8"))["version"]
        described = json.loads(table.read_text(encoding="utf-8"))
        category_of = _categories(described)
        names = _names(described)
        self._captions = names if captions else {}
        classes = sorted(set(category_of.values()))
        paths = [path for path in sorted(self._images.glob("*.png")) if path.stem in category_of]
        splits = {path.stem: split_of(path.stem, validation_fraction) for path in paths}
        trained = {key: names[key][0] for key, of in splits.items() if of == "train"}
        splits |= dict.fromkeys(combinations_of(trained, combinations_fraction), "combinations")
        entries = [
            Entry(path.stem, "png", classes.index(category_of[path.stem]), path.stat().st_size)
            for path in paths
            if splits[path.stem] == split
        ]
        super().__init__(f"emoji-datasource-google {version} {split}", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        picture = Image.open(self._images / f"{self.entries[index].key}.png").convert("RGBA")
        buffer = io.BytesIO()
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions.get(self.entries[index].key, ())

    def fingerprint(self) -> str:
        if not self._captions:
            return super().fingerprint()
        return content_sha256([super().fingerprint(), *(json.dumps(self.captions(i)) for i in range(len(self)))])


def split_of(key: str, validation_fraction: float = 0.0) -> str:
    """The split of an emoji, given by its code points in hexadecimal and hyphens: `train`, `validation` or `test`."""
    place = int(content_sha256(key.split("-")[0])[:8], 16) / 2**32
    if place < _TEST_FRACTION:
        return "test"
    return "validation" if place < _TEST_FRACTION + validation_fraction else "train"


def words_of(name: str) -> list[str]:
    """The words of a name, in their order: of "man astronaut, dark skin tone" five."""
    return re.findall(r"[\w-]+", name)


def combinations_of(names: Mapping[str, str], fraction: float) -> list[str]:
    """Choose emoji whose names are put together from words of the others' names.

    Args:
        names: of emoji by their keys; all of one name are chosen or not.
        fraction: of the names, in [0, 1), as far as each of their words stands in a name that is not chosen.

    Returns:
        Keys, in the order of `names`.
    """
    wanted = {name: int(content_sha256(name)[:8], 16) / 2**32 for name in set(names.values())}
    left = Counter(word for name in wanted for word in set(words_of(name)))
    chosen = set()
    for name in sorted(wanted, key=lambda each: (wanted[each], each)):
        words = set(words_of(name))
        if wanted[name] < fraction and all(left[word] > 1 for word in words):
            chosen.add(name)
            left.subtract(words)
    return [key for key, name in names.items() if name in chosen]


# Fitzpatrick modifiers, by their names in Unicode's CLDR.
_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def _names(table: list[dict]) -> dict[str, tuple[str, ...]]:
    """The names of each emoji and of its variations in skin tone, by code points."""
    found: dict[str, tuple[str, ...]] = {}
    for emoji in table:
        short = emoji["short_name"].replace("_", " ").replace("-", " ")
        # Flags have the ISO code of their country for a short name, which says less than nothing.
        plain = dict.fromkeys((emoji["name"].lower(), *([] if short.startswith("flag ") else [short])))
        forms = {Path(emoji["image"]).stem: ""}
        for tones, form in emoji.get("skin_variations", {}).items():
            named = " and ".join(dict.fromkeys(_SKIN_TONES[tone] for tone in tones.split("-")))
            forms[Path(form["image"]).stem] = f", {named} skin tone"
        for key, tone in forms.items():
            found[key] = one_line_each([f"{name}{tone}" for name in plain])
    return found


def _categories(table: list[dict]) -> dict[str, str]:
    """The category of each emoji with a picture and of its variations in skin tone, by code points."""
    found: dict[str, str] = {}
    for emoji in table:
        for form in (emoji, *emoji.get("skin_variations", {}).values()):
            if form["has_img_google"]:
                found[Path(form["image"]).stem] = emoji["category"]
    return found
