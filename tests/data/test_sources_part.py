"""Parts of a source: disjoint, in the order of shuffled shards, with the labels of the classes that are kept."""

import json
import tarfile
from pathlib import Path

import pytest

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import Entry, PartOfSource, Source


class Numbers(Source):
    """Twelve entries, of three classes in turn or of none."""

    def __init__(self, labelled: bool = True) -> None:
        entries = [Entry(f"k{n:02d}", "png", n % 3 if labelled else None, n) for n in range(12)]
        super().__init__("numbers", classes=("a", "b", "c") if labelled else (), entries=entries)

    def read(self, index: int) -> bytes:
        return f"content of {index}".encode()

    def last_change(self, index: int) -> int:
        return index


def keys(source: Source) -> list[str]:
    return [entry.key for entry in source.entries]


def test_parts_are_disjoint_and_whole() -> None:
    parts = [
        PartOfSource(Numbers(), stop=1),
        PartOfSource(Numbers(), start=1, stop=3),
        PartOfSource(Numbers(), start=3),
    ]
    assert [len(part) for part in parts] == [3, 6, 3]
    assert sorted(key for part in parts for key in keys(part)) == keys(Numbers())
    for part in parts:
        assert keys(part) == sorted(keys(part))
        for index in range(len(part)):
            number = int(part.entries[index].key[1:])
            assert part[index].data == f"content of {number}".encode() and part.last_change(index) == number
            assert part.entries[index].label == number % 3


def test_the_first_of_a_class_are_the_first_in_its_shards(tmp_path: Path) -> None:
    write_shards(Numbers(), tmp_path, split="test")
    with tarfile.open(tmp_path / "test-000000.tar") as archive:
        order = [name.split(".")[0] for name in archive.getnames() if name.endswith(".png")]
    assert order != sorted(order)
    first = {label: next(key for key in order if int(key[1:]) % 3 == label) for label in range(3)}
    assert keys(PartOfSource(Numbers(), stop=1)) == sorted(first.values())
    assert keys(PartOfSource(Numbers(), stop=1, shuffle_seed=1)) != sorted(first.values())


def test_classes_are_kept_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    part = PartOfSource(Numbers(), classes=["c", "a"])
    assert part.classes == ["c", "a"] and len(part) == 8
    assert {(int(entry.key[1:]) % 3, entry.label) for entry in part.entries} == {(2, 0), (0, 1)}
    manifest = write_shards(part, tmp_path, split="train")
    assert manifest["classes"] == ["c", "a"] and json.loads((tmp_path / "manifest.json").read_text()) == manifest


def test_a_source_without_classes_is_counted_as_a_whole() -> None:
    assert len(PartOfSource(Numbers(labelled=False), start=2, stop=7)) == 5


def test_fingerprint_is_that_of_the_part_and_of_the_whole() -> None:
    class Others(Numbers):
        def fingerprint(self) -> str:
            return "other images"

    prints = {PartOfSource(Numbers(), stop=2).fingerprint(), PartOfSource(Numbers(), stop=3).fingerprint()}
    assert len(prints | {PartOfSource(Others(), stop=2).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "start=-1 and stop=None must be a range"),
        ({"start": 2, "stop": 2}, "start=2 and stop=2 must be a range"),
        ({"classes": ["d"]}, r"classes has 'd', numbers has \['a', 'b', 'c'\]"),
        ({"start": 4}, "images 4: of each class holds no image"),
    ],
)
def test_mistakes(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartOfSource(Numbers(), **settings)
