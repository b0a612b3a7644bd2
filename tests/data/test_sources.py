"""What holds for every source."""

import pytest

from discrete_lit.data.sources import Entry, Source
from discrete_lit.data.sources.source import key_from_path, path_from_key


class Table(Source):
    def __init__(self, *entries: Entry, classes: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__("table", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        return b"content"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "table holds no image"),
        ([Entry("a", "png", 0, 1), Entry("a", "jpg", 1, 1)], "two images of table have the key 'a'"),
        ([Entry("a", "png", 2, 1)], r"label 2 of 'a' is not in \[0, 2\)"),
        ([Entry("a", "png", -1, 1)], "label -1"),
        ([Entry("a.b", "png", 0, 1)], "cannot be read back"),
        ([Entry("a//b", "png", 0, 1)], "cannot be read back"),
        ([Entry("__a__/b", "png", 0, 1)], "cannot be read back"),
        ([Entry("", "png", 0, 1)], "cannot be read back"),
        ([Entry("a", "PNG", 0, 1)], "extension 'PNG'"),
        ([Entry("a", "tar.gz", 0, 1)], "extension 'tar.gz'"),
        ([Entry("a", "cls", 0, 1)], "extension 'cls'"),
    ],
)
def test_entries_that_shards_cannot_hold_are_refused(entries: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(*entries)


def test_fingerprint_changes_with_everything_that_is_known_of_the_images() -> None:
    entry = Entry("a", "png", 0, 10)
    others = [
        Table(entry, Entry("b", "png", 0, 10)),
        Table(entry._replace(key="b")),
        Table(entry._replace(extension="jpg")),
        Table(entry._replace(label=1)),
        Table(entry._replace(size=11)),
        Table(entry, classes=("a", "c")),
    ]
    fingerprints = {table.fingerprint() for table in [Table(entry), *others]}
    assert len(fingerprints) == 7
    assert Table(entry).fingerprint() in fingerprints


@pytest.mark.parametrize(
    "parts",
    [
        ["a"],
        ["a.b"],
        ["a%2Eb"],
        ["class 1.0", "x y"],
        ["__init__", "x"],
        ["__a__"],
        ["Käse", "写真"],
        ["bad\udcff", "tab\t\n"],
    ],
)
def test_keys_survive_in_a_shard_and_give_the_name_back(parts: list[str]) -> None:
    key = key_from_path(parts)
    assert path_from_key(key) == "/".join(parts)
    assert Table(Entry(key, "png", 0, 1)).entries[0].key == key
