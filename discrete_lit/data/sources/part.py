"""A part of another source: some of its classes, and some of the images of each."""

from collections import Counter
from collections.abc import Sequence

from discrete_lit.core.files import content_sha256
from discrete_lit.data.sources.source import Entry, Source, shuffled


class PartOfSource(Source):
    """Take of each class of another source the images `start` to `stop`, as disjoint splits are made of one set.

    Images are counted in the order in which `write_shards` shuffles the whole source: the first 100 of each class are
    those that come first in its shards, which an evaluation of 100 a class takes.

    Args:
        source: the whole.
        start: images of each class that are left out; of a source without classes, of all.
        stop: where the part ends, before this image of each class; None takes all the others.
        classes: names of the classes that are kept, whose labels become 0, 1, ... in this order; all by default.
        shuffle_seed: of the order.

    Raises:
        ValueError: an unknown class, a part without images, or one that ends before it begins.
    """

    def __init__(
        self,
        source: Source,
        *,
        start: int = 0,
        stop: int | None = None,
        classes: Sequence[str] | None = None,
        shuffle_seed: int = 0,
    ) -> None:
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"start={start} and stop={stop} must be a range of at least one image, from 0 on")
        kept = list(source.classes if classes is None else classes)
        if unknown := [name for name in kept if name not in source.classes]:
            raise ValueError(f"classes has {unknown[0]!r}, {source.description} has {source.classes}")
        label_of = {source.classes.index(name): label for label, name in enumerate(kept)}
        seen: Counter[int | None] = Counter()
        chosen = []
        for index in shuffled(source, shuffle_seed):
            label = source.entries[index].label
            if label is None or label in label_of:
                if seen[label] >= start and (stop is None or seen[label] < stop):
                    chosen.append(index)
                seen[label] += 1
        # In the order of the source, which is that of the disk.
        self._source, self._indices = source, sorted(chosen)
        entries = [self._entry(index, label_of) for index in self._indices]
        range_text = f"{start}:{'' if stop is None else stop}"
        super().__init__(f"{source.description}, images {range_text} of each class", classes=kept, entries=entries)

    def _entry(self, index: int, label_of: dict[int, int]) -> Entry:
        entry = self._source.entries[index]
        return entry if entry.label is None else entry._replace(label=label_of[entry.label])

    def read(self, index: int) -> bytes:
        return self._source.read(self._indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._indices[index])

    def last_change(self, index: int) -> int:
        return self._source.last_change(self._indices[index])

    def fingerprint(self) -> str:
        # That of the whole knows more of the images than their entries say.
        return content_sha256(self._source.fingerprint() + super().fingerprint())
