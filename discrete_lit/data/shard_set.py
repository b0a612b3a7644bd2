"""The shards of a split: their locations, and how many samples each holds.

A split is named by a folder, a file, a pattern of the disk (`shards/*.tar`), a brace pattern
(`train-{000000..000099}.tar`), a URL of any of these but the second, or a list of them. Counts and class names come
from the `manifest.json` beside the shards. Where a local folder has none, its shards are counted; where a URL has none,
the counts must be given. A manifest may come from anywhere: nothing in it is used before it is checked.
"""

import glob
import io
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import braceexpand
import numpy as np

from discrete_lit.core.bounded_reading import MOST_JSON, parse_json
from discrete_lit.core.files import content_sha256
from discrete_lit.data.media import MediaKind
from discrete_lit.data.remote import MissingFile, is_download, is_local, keep, local_path, open_url, without_secrets
from discrete_lit.data.shard_writer import FORMAT, MANIFEST
from discrete_lit.data.tars import BrokenShard, find_labels
from discrete_lit.data.transforms import IMAGE_EXTENSIONS, IMAGES, UNREADABLE_EXTENSIONS

_log = logging.getLogger(__name__)

_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_OTHER_ARCHIVE = re.compile(r"\.(tar\.\w+|zip|zst|lz4|7z|rar|gz|bz2|xz)$", re.IGNORECASE)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d{1,9})?")
# Bounds of what a name or a manifest may claim before anything is read: far above any data set, far below the memory.
_MOST_SHARDS = 300_000
_MOST_SAMPLES = 10_000_000  # Of a shard.
_MOST_CLASSES = 10_000_000
_DEEPEST_BRACES = 20  # Braces in braces: each takes a few calls of the stack.
_LONGEST_SHOWN = 200  # Letters of a name in a message.


@dataclass(frozen=True)
class Shard:
    """A tar file and how many samples it holds."""

    url: str
    count: int

    @property
    def name(self) -> str:
        """The URL as messages say it, without a signature."""
        return without_secrets(self.url)

    @property
    def local(self) -> bool:
        return is_local(self.url)

    def open(self) -> io.BufferedReader:
        """A binary stream of the file; seekable where it is local."""
        return open_url(self.url)

    def keep(self) -> None:
        """Bring the file into this machine's cache of shards meanwhile, where there is one: it is read next."""
        keep(self.url)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split, in the order that numbers its samples."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Name of each label; none where the samples have no labels."""
    kind: MediaKind = IMAGES
    """The files that samples are made of."""

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: int64 `(len(shards),)`."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    def listing_sha256(self) -> str:
        """Hash names and counts of the shards, which tell that a sample's number means the same."""
        return content_sha256(f"{shard.name} {shard.count}\n" for shard in self.shards)


def find_shards(
    location: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    counts: int | Sequence[int] | None = None,
    *,
    num_classes: int | None = None,
    kind: MediaKind = IMAGES,
) -> ShardSet:
    """Find the shards that a user names as a split.

    Args:
        location: folder, file, pattern, URL, or a list of them; `~` is the home folder.
        counts: samples in all shards, spread evenly, or one number a shard, where there is no manifest.
        num_classes: number of classes where there is no manifest. Without it, and where no sample of the counted
            shards has a label, the set is one without labels; labels that are left out so are warned of.
        kind: the files that samples are made of.

    Raises:
        ValueError: there are no shards, one is missing or cut off, or their counts or classes are not known, are not
            possible, or contradict each other.
    """
    if num_classes is not None and not 1 <= num_classes <= _MOST_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; it must be in 1..{_MOST_CLASSES:,}")
    entries = [location] if isinstance(location, str | os.PathLike) else location
    location = [os.fspath(entry) if isinstance(entry, os.PathLike) else entry for entry in entries]
    if not location:
        raise ValueError("the list of shards is empty; name a folder, a file, a pattern or a URL")
    urls = [url for entry in location for url in _expand(entry)]
    _check_urls(urls)
    manifests: dict[str, dict[str, Any] | None] = {}
    if counts is None:
        manifests = {parent: _manifest(parent) for parent in dict.fromkeys(map(_parent, urls))}
    found, labelled = _counts(urls, counts, manifests, kind=kind)
    shards = tuple(Shard(url, count) for url, count in zip(urls, found, strict=True) if count > 0)
    if not shards:
        raise ValueError(f"there are no samples in the shards of {_named(location)}")
    classes = _classes(location, [given for given in manifests.values() if given], num_classes, labelled)
    return ShardSet(shards, classes, kind)


def holds_shards(folder: Path) -> bool:
    """Whether a local folder holds shards, with a manifest or without."""
    return (folder / MANIFEST).is_file() or bool(_shards_in(folder))


def _named(location: Sequence[str]) -> str:
    return ", ".join(map(without_secrets, location))


# From what is named to the shards.


def _expand(entry: str) -> list[str]:
    """The shards that one entry of a location names."""
    if not isinstance(entry, str) or not entry.strip():
        raise ValueError(f"the shards are named by {entry!r}; name a folder, a file, a pattern or a URL")
    try:
        urlsplit(entry)
    except ValueError as error:
        raise ValueError(f"the shards are named by {entry[:_LONGEST_SHOWN]!r}, which is no URL: {error}") from error
    if is_local(entry) and os.path.exists(local_path(entry)):
        return _shards_at(entry)  # Its name may hold braces and stars of its own.
    urls: list[str] = []
    for url in _braces(entry):
        if url.startswith("pipe:"):
            urls.append(url)
        elif is_local(url) and glob.has_magic(local_path(url)) and not os.path.exists(local_path(url)):
            matching = sorted(glob.glob(local_path(url), recursive=True))
            found = [shard for path in matching if _is_shard(path) or os.path.isdir(path) for shard in _shards_at(path)]
            _say_left_out(url, (Path(path) for path in matching if not os.path.isdir(path)))
            if not found:
                raise ValueError(f"no shards match {url}; they end with {', '.join(_SHARD_SUFFIXES)}")
            urls += found
        else:
            urls += _shards_at(url)
    return urls


def _braces(entry: str) -> list[str]:
    """Expand a brace pattern, whose strings are counted first: they may be more than fit into the memory."""
    shown = without_secrets(entry)[:_LONGEST_SHOWN]
    if _depth(entry) > _DEEPEST_BRACES:
        raise ValueError(f"the braces of {shown} lie more than {_DEEPEST_BRACES} deep in one another")
    try:
        count = _alternatives(entry)
        urls = list(braceexpand.braceexpand(entry)) if count <= _MOST_SHARDS else []
    except ValueError as error:
        raise ValueError(f"the braces of {shown} are not closed; write \\{{ for a brace itself") from error
    if count > _MOST_SHARDS:
        raise ValueError(f"the braces of {shown} stand for more than {_MOST_SHARDS:,} shards")
    return urls


def _alternatives(pattern: str) -> int:
    """Count the strings that a brace pattern stands for."""
    total, pieces = 1, _outside_braces(pattern, "{}")
    for start, stop in zip(pieces[::2], pieces[1::2], strict=False):
        inside = pattern[start + 1 : stop]
        commas = _outside_braces(inside, ",")
        if found := _RANGE.fullmatch(inside):
            # Longer numbers are too many whatever they are: reading them takes the square of their length.
            first, last, step = (int(number or 1) if len(number or "") < 20 else 10**20 for number in found.groups())
            total *= abs(last - first) // max(1, step) + 1
        elif _LETTERS.fullmatch(inside):
            total *= len(list(braceexpand.braceexpand(f"{{{inside}}}")))
        else:
            parts = zip([-1, *commas], [*commas, len(inside)], strict=True)
            total *= sum(_alternatives(inside[before + 1 : after]) for before, after in parts)
    return total


def _depth(pattern: str) -> int:
    """Count the open braces around the innermost place of a pattern."""
    steps = ({"{": 1, "}": -1}.get(character, 0) for character in re.sub(r"\\.", "", pattern))
    return max(itertools.accumulate(steps), default=0)


def _outside_braces(pattern: str, characters: str) -> list[int]:
    """Positions of characters that are neither inside braces nor escaped; of braces, the outermost."""
    depth, found, escaped = 0, [], False
    for position, character in enumerate(pattern):
        if escaped or character == "\\":
            escaped = not escaped
            continue
        depth -= character == "}"
        if character in characters and depth == 0:
            found.append(position)
        depth += character == "{"
    return found


def _is_shard(url: str) -> bool:
    return _path(url).lower().endswith(_SHARD_SUFFIXES)


def _shards_at(url: str) -> list[str]:
    """The shards that a path or a URL without a pattern names."""
    if is_local(url):
        url = local_path(url)
    if _is_shard(url) and not (is_local(url) and os.path.isdir(url)):
        return [url]
    if is_local(url) and os.path.isfile(url):
        raise ValueError(f"{url} is no shard: they end with {', '.join(_SHARD_SUFFIXES)}")
    # A web server lists no files: without a manifest there are none.
    manifest = _manifest(url, needed=is_download(url))
    files = _shards_in(Path(url)) if is_local(url) else []
    if is_local(url) and os.path.isdir(url):
        _say_left_out(url, Path(url).iterdir())
    if manifest is not None:
        listed = [shard["name"] for shard in manifest["shards"]]
        if extra := sorted({path.name for path in files} - set(listed)):
            _log.warning("left out %d shards of %s that its %s does not list: %s", len(extra), url, MANIFEST, extra[:3])
        return [_beside(url, name) for name in listed]
    if files:
        return list(map(str, files))
    raise _no_shards(url)


def _no_shards(url: str, reason: str = "") -> ValueError:
    return ValueError(
        f"no shards in {without_secrets(url)}: it has no {MANIFEST}{reason} and no files that end with "
        f"{', '.join(_SHARD_SUFFIXES)}. Name a folder of shards, or the shards themselves as in "
        "train-{000000..000099}.tar or, on the disk, train-*.tar"
    )


def _shards_in(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their names, without hidden files and what macOS puts beside each."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_shard(path.name) and not path.name.startswith("."))


def _say_left_out(where: str, paths: Iterable[Path]) -> None:
    """Warn of entries that may hold images and are no shards: others, such as tables, lie beside shards anywhere."""
    left_out: dict[str, list[str]] = {}
    for path in paths:
        extension = path.suffix[1:].lower()
        if path.name.startswith(".") or (_is_shard(path.name) and not path.is_dir()):
            continue
        if path.is_dir():
            if _shards_in(path):
                left_out.setdefault("folders with shards of their own", []).append(path.name)
        elif extension in IMAGE_EXTENSIONS or extension in UNREADABLE_EXTENSIONS:
            left_out.setdefault("images outside the shards", []).append(path.name)
        elif _OTHER_ARCHIVE.search(path.name):
            left_out.setdefault("archives that are not read", []).append(path.name)
    for kind, names in left_out.items():
        _log.warning("left out %d %s in %s, the first is %s", len(names), kind, where, min(names))


def _check_urls(urls: Sequence[str]) -> None:
    if len(urls) > _MOST_SHARDS:
        raise ValueError(f"there are {len(urls):,} shards; at most {_MOST_SHARDS:,} can be read as one set")
    missing = [url for url in urls if is_local(url) and not os.path.isfile(local_path(url))]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(urls)} shards are missing: "
            f"{', '.join(url[:_LONGEST_SHOWN] for url in missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    for url, times in Counter(urls).items():
        if times > 1:
            _log.warning("%s is named %d times: its samples are read as often", without_secrets(url), times)


# The parts of a URL: a presigned one has its signature behind the path.


def _path(url: str) -> str:
    return url if is_local(url) or url.startswith("pipe:") else urlsplit(url).path


def _beside(folder: str, name: str) -> str:
    """The file of this name in a folder, with the folder's signature."""
    if is_local(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def _parent(url: str) -> str:
    if url.startswith("pipe:"):
        return "pipe:"
    if is_local(url):
        return os.path.dirname(url) or "."
    parts = urlsplit(url)
    return parts._replace(path=parts.path.rpartition("/")[0]).geturl()


def _basename(url: str) -> str:
    return _path(url).rpartition("/")[2]


# Counts and classes.


def _counts(
    urls: list[str],
    given: int | Sequence[int] | None,
    manifests: dict[str, dict[str, Any] | None],
    *,
    kind: MediaKind,
) -> tuple[list[int], bool | None]:
    """Samples of each shard, and whether any has a label, where that was seen."""
    if given is not None:
        numbers = [given] if isinstance(given, int) else list(given)
        if any(isinstance(number, bool) or not 0 <= number <= _MOST_SAMPLES * len(urls) for number in numbers):
            raise ValueError(f"the numbers of samples are {given}; each must be in 0..{_MOST_SAMPLES:,} a shard")
    if isinstance(given, int):
        return [given // len(urls) + (number < given % len(urls)) for number in range(len(urls))], None
    if given is not None:
        if len(given) != len(urls):
            raise ValueError(f"{len(given)} counts were given for {len(urls)} shards")
        return list(given), None
    listed = {
        parent: {shard["name"]: shard["count"] for shard in manifest["shards"]}
        for parent, manifest in manifests.items()
        if manifest is not None
    }
    counts: list[int] = []
    labelled: bool | None = None
    broken: list[str] = []
    for url in urls:
        parent = _parent(url)
        if parent in listed:
            if _basename(url) not in listed[parent]:
                raise ValueError(f"{without_secrets(url)} is not in the {MANIFEST} beside it")
            counts.append(listed[parent][_basename(url)])
            continue
        try:
            found = _counted(url, kind=kind)
        except BrokenShard as error:
            broken.append(str(error))
            continue
        counts.append(len(found))
        labelled = bool(labelled or found.any())
    if broken:
        raise BrokenShard(
            f"{len(broken)} of {len(urls)} shards cannot be counted. Replace them, or name the shards without them:\n  "
            + "\n  ".join(broken[:5])
        )
    return counts, labelled


def _counted(url: str, *, kind: MediaKind) -> np.ndarray:
    if is_local(url):
        return find_labels(Shard(url, 0), kind=kind)
    raise ValueError(
        f"there is no {MANIFEST} beside {without_secrets(url)}: give the number of samples (train_count, "
        "validation_count) and, where they have labels, num_classes"
    )


def _classes(
    location: Sequence[str], manifests: list[dict[str, Any]], num_classes: int | None, labelled: bool | None
) -> tuple[str, ...]:
    if not manifests:
        if num_classes is not None and labelled is False:
            _log.warning(
                "num_classes=%d has no effect: no sample of %s has a label (<key>.cls)", num_classes, _named(location)
            )
            return ()
        if num_classes is None and labelled:
            _log.warning(
                "the labels (<key>.cls) of %s are left out, for nothing says how many classes there are: num_classes "
                "of the data does, or a %s as `discrete-lit shards` writes it",
                _named(location),
                MANIFEST,
            )
        return tuple(str(label) for label in range(num_classes or 0))
    classes = {tuple(manifest["classes"]) for manifest in manifests}
    if len(classes) > 1:
        raise ValueError(f"the manifests of {_named(location)} name different classes")
    found = classes.pop()
    if num_classes is not None and num_classes != len(found):
        raise ValueError(
            f"num_classes is {num_classes}, but the {MANIFEST} of {_named(location)} has {len(found)} classes"
        )
    return found


# The manifest.


def _manifest(folder: str, *, needed: bool = False) -> dict[str, Any] | None:
    """The manifest in a folder, or None where there is none and it is not needed."""
    if folder.startswith("pipe:"):
        return None
    url = _beside(folder, MANIFEST)
    if is_local(url) and not os.path.isfile(url):
        return None
    try:
        with open_url(url) as stream:
            text = stream.read(MOST_JSON + 1)
    except MissingFile as error:
        if needed:  # S3 says 403 also of what is not there, to who may not list the bucket
            raise _no_shards(folder, f" ({error})") from error
        return None
    except OSError as error:
        # The commands behind other URLs tell by their exit status alone that there is no such file.
        if not is_local(url) and not is_download(url):
            _log.info("no %s: %s", without_secrets(url), error)
            return None
        raise ValueError(f"cannot read {without_secrets(url)}: {error}") from error
    return read_manifest(text, without_secrets(url))


def read_manifest(text: bytes, name: str) -> dict[str, Any]:
    """Parse a manifest of shards, and check every part of it that is used.

    Args:
        text: what `manifest.json` holds.
        name: its location, for messages.

    Raises:
        ValueError: it is no such manifest, or what it says is not possible.
    """
    if len(text) > MOST_JSON:
        raise ValueError(f"{name} is longer than {MOST_JSON:,} bytes, so no manifest of shards")
    manifest = parse_json(text, name)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = repr(manifest.get("format")) if isinstance(manifest, dict) else f"a {type(manifest).__name__}"
        raise ValueError(f"{name} has format {found[:100]}; a folder of shards has {FORMAT!r}")

    def refuse(problem: str) -> None:
        raise ValueError(f"{name} cannot be believed: {problem}. Write the shards anew, or delete it")

    classes, shards = manifest.get("classes"), manifest.get("shards")
    if not isinstance(classes, list) or not all(isinstance(label, str) for label in classes):
        refuse("classes is not a list of names")
    elif len(set(classes)) < len(classes):
        refuse(f"{len(classes)} classes have {len(set(classes))} names")
    elif manifest.get("num_classes", len(classes)) != len(classes):
        refuse(f"num_classes is {manifest['num_classes']!r}, and classes names {len(classes)}")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        refuse("shards is not a list of names and counts")
    names = [shard.get("name") for shard in shards or []]
    for shard_name, shard in zip(names, shards or [], strict=True):
        count = shard.get("count")
        # What lies in another folder has no business here, nor has what would not be recognised as a shard.
        if not isinstance(shard_name, str) or not re.fullmatch(r"[^/\\\0]+", shard_name) or not _is_shard(shard_name):
            refuse(f"{shard_name!r} is no name of a shard in its folder")
        if type(count) is not int or not 0 <= count <= _MOST_SAMPLES:
            refuse(f"{shard_name} has {count!r} samples; it must be a whole number up to {_MOST_SAMPLES:,}")
    if len(set(names)) < len(names):
        refuse(f"{Counter(names).most_common(1)[0][0]} is listed more than once")
    total = sum(shard["count"] for shard in shards or [])
    if manifest.get("count", total) != total:
        refuse(f"count is {manifest['count']!r}, and the shards hold {total}")
    return manifest
