"""The shards of a split: their locations, and how many samples each holds.

A split is named by a folder, a file, a brace pattern (`train-{000000..000099}.tar`), a URL of any of these, or a
list of them. Counts and class names come from the `manifest.json` beside the shards. Where a local folder has none,
its shards are counted; where a URL has none, the counts must be given.
"""

import io
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import braceexpand
import numpy as np
from webdataset.gopen import gopen

from discrete_lit.data.shard_writer import FORMAT, MANIFEST
from discrete_lit.data.tars import count_samples

_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Shard:
    """A tar file and how many samples it holds."""

    url: str
    count: int

    @property
    def local(self) -> bool:
        return is_local(self.url)

    def open(self) -> IO[bytes]:
        """A binary stream of the file; seekable where it is local."""
        return open_url(self.url)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split, in the order that numbers its samples."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: int64 `(len(shards),)`."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)


def find_shards(
    location: str | Sequence[str], counts: int | Sequence[int] | None = None, *, num_classes: int | None = None
) -> ShardSet:
    """Find the shards that a user names as a split.

    Args:
        location: folder, file, brace pattern, URL, or a list of them.
        counts: samples in all shards, spread evenly, or one number a shard, where there is no manifest.
        num_classes: number of classes where there is no manifest.

    Raises:
        ValueError: there are no shards, one is missing, or their counts or classes are not known or contradict each
            other.
    """
    urls: list[str] = []
    for entry in [location] if isinstance(location, str) else location:
        urls += _expand(entry)
    missing = [url for url in urls if is_local(url) and not os.path.isfile(_local_path(url))]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(urls)} shards are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    manifests = {} if counts is not None else {parent: _manifest(parent) for parent in map(_parent, urls)}
    shards = tuple(
        Shard(url, count) for url, count in zip(urls, _counts(urls, counts, manifests), strict=True) if count > 0
    )
    if not shards:
        raise ValueError(f"there are no samples in the shards of {location}")
    return ShardSet(shards, _classes(location, [found for found in manifests.values() if found], num_classes))


def is_local(url: str) -> bool:
    """Whether `url` is a path or a `file:` URL."""
    return url.startswith("file:") or ("://" not in url and not url.startswith("pipe:"))


def open_url(url: str) -> IO[bytes]:
    """Open a file for reading wherever it is.

    Local paths are opened directly, `s3://` by `aws s3 cp`, all else by webdataset's `gopen`: `http(s)://` by curl with
    retries, `gs://` by gsutil, `pipe:` by the named command.
    """
    if is_local(url):
        return open(_local_path(url), "rb", buffering=2**18)
    if url.startswith("s3://"):
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    return cast(IO[bytes], gopen(url, "rb"))


def _expand(entry: str) -> list[str]:
    """The shards that one entry of a location names."""
    if entry.startswith("pipe:"):
        return list(braceexpand.braceexpand(entry))
    urls: list[str] = []
    for url in braceexpand.braceexpand(entry):
        if url.endswith(_SHARD_SUFFIXES):
            urls.append(url)
            continue
        folder = url.rstrip("/")
        manifest = _manifest(folder)
        if manifest is not None:
            urls += [f"{folder}/{shard['name']}" for shard in manifest["shards"]]
        elif is_local(url) and (files := sorted(map(str, Path(_local_path(url)).glob("*.tar")))):
            urls += files
        else:
            raise ValueError(
                f"no shards in {url}: it has no {MANIFEST} and no .tar files. Name a folder of shards, or the shards "
                "themselves as in train-{000000..000099}.tar"
            )
    return urls


def _counts(
    urls: list[str], given: int | Sequence[int] | None, manifests: dict[str, dict[str, Any] | None]
) -> list[int]:
    if isinstance(given, int):
        return [given // len(urls) + (number < given % len(urls)) for number in range(len(urls))]
    if given is not None:
        if len(given) != len(urls):
            raise ValueError(f"{len(given)} counts were given for {len(urls)} shards")
        return list(given)
    listed = {
        parent: {shard["name"]: int(shard["count"]) for shard in manifest["shards"]}
        for parent, manifest in manifests.items()
        if manifest is not None
    }
    return [_count(url, listed) for url in urls]


def _count(url: str, listed: dict[str, dict[str, int]]) -> int:
    parent, name = _parent(url), url.rpartition("/")[2]
    if parent in listed:
        if name not in listed[parent]:
            raise ValueError(f"{url} is not in the {MANIFEST} beside it")
        return listed[parent][name]
    if is_local(url):
        return count_samples(Shard(url, 0))
    raise ValueError(
        f"there is no {MANIFEST} beside {url}: give the number of samples (train_count, "
        "validation_count) and num_classes"
    )


def _classes(
    location: str | Sequence[str], manifests: list[dict[str, Any]], num_classes: int | None
) -> tuple[str, ...]:
    if not manifests:
        if num_classes is None:
            raise ValueError(f"the shards of {location} have no {MANIFEST} that tells the classes: give num_classes")
        return tuple(str(label) for label in range(num_classes))
    classes = {tuple(manifest["classes"]) for manifest in manifests}
    if len(classes) > 1:
        raise ValueError(f"the manifests of {location} name different classes")
    found = classes.pop()
    if num_classes is not None and num_classes != len(found):
        raise ValueError(f"num_classes is {num_classes}, but the {MANIFEST} of {location} has {len(found)} classes")
    return found


def _manifest(folder: str) -> dict[str, Any] | None:
    """The manifest in a folder, or None where there is none."""
    if folder.startswith("pipe:"):
        return None
    url = f"{folder}/{MANIFEST}"
    if is_local(url):
        path = Path(_local_path(url))
        if not path.is_file():
            return None
        text = path.read_bytes()
    else:
        text = _fetch(url)
        if text is None:
            return None
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{url} is not JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{url} has format {manifest.get('format')!r}; a folder of shards has {FORMAT!r}")
    return manifest


def _fetch(url: str) -> bytes | None:
    stream = open_url(url)
    content = io.BytesIO()
    # The commands behind a URL tell by their exit status that there is no such file.
    with suppress(OSError):
        while block := stream.read(2**20):
            content.write(block)
        stream.close()
        return content.getvalue()
    return None


def _parent(url: str) -> str:
    return "pipe:" if url.startswith("pipe:") else url.rpartition("/")[0] or "."


def _local_path(url: str) -> str:
    return url.removeprefix("file://").removeprefix("file:")
