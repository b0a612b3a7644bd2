"""Reading tars: their files in order, where each lies, and the samples that webdataset groups them to.

An uncompressed tar on the disk is read at any offset (`TarIndex`); anything else, a pipe or a compressed tar, from its
front. A sample is the files that stand together under one name up to its first dot (webdataset's convention): an image,
and `<key>.cls` where it has a label; where captions are asked for, `<key>.txt` or `<key>.json` too. Nothing else is
ever read: a `.pyd`, `.pickle` or `.pth` entry, which other decoders would unpickle, is passed over, and a name that has
neither image nor label is no sample.

A tar ends with blocks of zeros. Python's reader takes a file that stops short of them, or a damaged header, for the
end as well; here both are errors that name the byte, so that no cut is read as a shorter shard.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, Self, cast

import numpy as np

from discrete_lit.data.captions import LONGEST_FILE
from discrete_lit.data.media import MediaKind
from discrete_lit.data.transforms import IMAGE_BYTES_VARIABLE, IMAGES, image_bytes_limit

# A transfer that breaks is taken up again at the sample where it broke; a local file would only break again.
_REMOTE_ATTEMPTS = 3
_PAUSE = 1.0  # Seconds before the second attempt.
# Entries about the archive itself, by webdataset's convention.
_META = re.compile(r"__[^/]*__(/|$)")
# All the ways in which a tar that is cut off or damaged shows it.
_BROKEN = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
# The longest header that is read into memory: names, times and attributes take a few hundred bytes.
_LONGEST_HEADER = 2**20
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Bytes of a shard that is no file of this machine: a server may send for ever.
_LONGEST_STREAM = 2**36
# Bytes of a `.cls` file.
_LONGEST_LABEL = 2**16
# A compressed tar of some megabytes can hold headers for hours.
_MOST_PASSED_OVER = 1_000_000
# Padding is at most a record; the largest that tape drives ask for is below this.
_LONGEST_PADDING = 2**20
# How compressed files begin, and what opens them.
_COMPRESSED = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
)


class BrokenShard(ValueError):
    """A shard cannot be read: not one sample of it, or not all of it where all are needed."""


class PermanentFailure(OSError):
    """Reading failed in a way that another attempt would not mend."""


class RawSample(NamedTuple):
    """A sample as it lies in its shard; `problem` says why there is no image."""

    key: str
    shard: str
    image: bytes
    label: bytes | None
    """None where it has no `.cls` entry."""
    problem: str | None = None
    captions: bytes | None = None
    """Its caption file; None where it has none, or none was asked for."""


class ShardFile(Protocol):
    """A shard that can be opened, see `shard_set.Shard`."""

    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def local(self) -> bool: ...
    def open(self) -> io.BufferedReader: ...


def read_samples(
    shard: ShardFile, wanted: np.ndarray, *, captions: str | None = None, kind: MediaKind = IMAGES
) -> Iterator[tuple[int, RawSample]]:
    """Read the wanted samples of a shard in order, each with its position; the others are passed over unread.

    A shard that ends or breaks early yields every wanted sample that it lacks as one with a `problem`.

    Args:
        shard: the file.
        wanted: bool `(shard.count,)`.
        captions: the extension of caption files that are read too, such as txt.
        kind: the files that samples are made of.

    Raises:
        BrokenShard: nothing can be read.
        ValueError: the shard holds more samples than was declared, so that some would never be used.
    """
    last = int(np.flatnonzero(wanted)[-1])
    next_position = 0
    error: Exception | None = None
    for attempt in range(1 if shard.local else _REMOTE_ATTEMPTS):
        if attempt:
            time.sleep(attempt * _PAUSE)
        try:
            with _opened(shard) as tar:
                groups = _groups(tar, wanted, captions, kind=kind)
                for position, group in groups:
                    if position == shard.count - 1 and _one_more(groups):
                        raise ValueError(
                            f"{shard.name} holds more samples than the {shard.count} declared by its manifest or "
                            "count; declare the number of each shard"
                        )
                    if position >= next_position and wanted[position]:
                        yield position, group.sample(shard.name)
                    next_position = max(next_position, position + 1)
                    if position == last:
                        return
            error = None
            break
        except PermanentFailure as failure:
            error = failure
            break
        except _BROKEN as broken:
            error = broken
    if next_position == 0:
        raise BrokenShard(f"cannot read {shard.name}: {error or _NO_SAMPLES}") from error
    reason = f"the shard ends after {next_position} of {shard.count} samples" + (f" ({error})" if error else "")
    for position in np.flatnonzero(wanted[next_position:]) + next_position:
        yield int(position), RawSample(f"sample {position}", shard.name, b"", None, reason)


def _one_more(groups: Iterator[Any]) -> bool:
    # Damage behind the last of the declared samples is no damage of theirs.
    with suppress(*_BROKEN):
        return next(groups, None) is not None
    return False


def label_of(sample: RawSample, num_classes: int) -> int | None:
    """The label of a sample, in 0..num_classes-1; None in a set without classes, whatever the sample says.

    Raises:
        ValueError: another label.
    """
    if num_classes == 0:
        return None
    assert sample.label is not None, "a sample without a label has a problem"
    text = sample.label.decode("ascii", "replace").strip()
    # Longer ones are refused before they are read: reading takes the square of their length.
    if not text.isdecimal() or len(text) > 20 or int(text) >= num_classes:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ValueError(
            f"sample {sample.key!r} of {sample.shard} has label {shown!r}; labels must be in 0..{num_classes - 1}"
        )
    return int(text)


_NO_SAMPLES = (
    "there are no samples in it. A sample is <key>.<image extension>, with <key>.cls where it has a label, and a key "
    "ends at the first dot of the name"
)


def count_samples(shard: ShardFile) -> int:
    """Count the samples of a local shard, by its headers alone.

    Raises:
        BrokenShard: it cannot be read to its end.
    """
    return len(find_labels(shard))


def find_labels(shard: ShardFile, *, kind: MediaKind = IMAGES) -> np.ndarray:
    """Tell of each sample of a local shard whether it has a label, by the headers alone: bool `(samples,)`.

    Raises:
        BrokenShard: it cannot be read to its end.
    """
    try:
        with _opened(shard) as tar:
            groups = _groups(tar, np.zeros(0, dtype=bool), kind=kind)
            return np.array([group.label is not None for _, group in groups], dtype=bool)
    except _BROKEN as error:
        raise BrokenShard(f"cannot read {shard.name} to its end: {error}") from error


class Extent(NamedTuple):
    """A file inside an archive."""

    name: str
    """Last part of its path."""
    offset: int
    """First byte of its content, counted from the start of the outermost archive."""
    size: int
    """In bytes."""


class TarIndex:
    """Files of an uncompressed tar, and of the tars inside it, by their offsets: read in any order without unpacking.

    Args:
        path: the archive.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(f"there is no archive {self.path}; give the path of the downloaded .tar file")
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def files(self) -> Iterator[Extent]:
        """Every file of the archive, in the order in which they lie in it; reads the headers only.

        Raises:
            ValueError: the archive is compressed, damaged or cut off.
        """
        with self._opened() as archive:
            for member in tar_files(archive):
                yield _extent(member, 0)

    def files_in_members(self) -> Iterator[tuple[str, list[Extent]]]:
        """The name and the files of every member, each a tar itself; reads the headers only.

        Raises:
            ValueError: the archive or a member is compressed, damaged or cut off, or a member is not a tar.
        """
        with self._opened() as archive:
            for member in tar_files(archive):
                content = archive.extractfile(member)
                assert content is not None
                with content, self._inner(content, member.name) as inner:
                    files = [_extent(file, member.offset_data) for file in tar_files(inner)]
                yield _extent(member, 0).name, files

    def read(self, extent: Extent) -> bytes:
        """Read the content of a file.

        Raises:
            ValueError: the archive ends inside the file.
        """
        data = os.pread(self._descriptor, extent.size, extent.offset)
        if len(data) != extent.size:
            raise ValueError(f"{self.path} ends inside {extent.name}: it is cut off; download it again")
        return data

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path, mode="r:", tarinfo=_Header) as archive:
                yield archive
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.path} cannot be read as an uncompressed tar ({error}). If it is compressed, uncompress it "
                "first; otherwise it is damaged or cut off: compare its size and checksum with the download page"
            ) from error

    @contextmanager
    def _inner(self, content: IO[bytes], name: str) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(fileobj=content, mode="r:", tarinfo=_Header) as archive:
                yield archive
        except tarfile.TarError as error:
            raise ValueError(
                f"member {name} of {self.path} is not a readable tar ({error}): the archive is damaged "
                "or cut off; download it again"
            ) from error


def tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an opened tar in order, without folders and links, in memory that does not grow with them.

    Raises:
        tarfile.ReadError: the tar is damaged, or ends without its end mark.
    """
    return (member for member in _members(tar) if member.isfile())


def read_file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read the content of a file, which must be the one that `tar_files` gave last where the tar is a stream.

    Raises:
        tarfile.ReadError: the tar ends inside the file.
    """
    with _damage_as_read_error(member.offset_data):
        file = tar.extractfile(member)
        assert file is not None
        data = file.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} is cut short")
    return data


class _Header(tarfile.TarInfo):
    """A header that says where Python's own would end the archive in silence, or fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # The end mark, which is an exception of its own.
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(
                "the file ends without the end mark of a tar, two blocks of zeros, and so was cut off. If it is whole "
                "and only lacks the mark, `truncate -s +1024 <file>` appends it"
                if not buf
                else "the file ends inside a header: it was cut off"
            )
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"there is no header of a tar ({error}): the file is damaged") from error
        if header.size < 0 or header.size > 2**62:
            raise tarfile.ReadError(f"{header.name!r} claims {header.size} bytes: the file is damaged")
        if header.type in _LONG_HEADERS and header.size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes; at most {_LONGEST_HEADER:,} are read")
        return header


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an opened tar in order, up to an end mark that is one."""
    while True:
        with _damage_as_read_error(tar.offset):
            member = tar.next()
        if member is None:
            _check_padding(cast(IO[bytes], tar.fileobj), tar.offset)
            return
        # The archive remembers every member that it has seen.
        tar.members.clear()  # type: ignore[attr-defined]
        yield member


def _check_padding(stream: IO[bytes], end: int) -> None:
    """Read what follows the first block of zeros: to the end of a compressed stream its checksum is compared."""
    padding = 0
    while block := stream.read(2**16):
        if any(block):
            raise tarfile.ReadError(
                f"more follows the end mark at byte {end:,}: the file is damaged there, or several tars were "
                "joined by `cat`. Name them one by one"
            )
        padding += len(block)
        if padding > _LONGEST_PADDING:
            raise tarfile.ReadError(f"after byte {end:,} there are but zeros: the file was not copied to its end")


def _extent(member: tarfile.TarInfo, start: int) -> Extent:
    return Extent(PurePosixPath(member.name).name, start + member.offset_data, member.size)


@contextmanager
def _opened(shard: ShardFile) -> Iterator[tarfile.TarFile]:
    """Open a shard, compressed or not, as its first bytes say."""
    stream = shard.open()
    try:
        magic = stream.peek(16)
        decompress = next((opener for start, opener in _COMPRESSED if start.match(magic)), None)
        if decompress is not None:
            plain = cast(IO[bytes], decompress(stream))
        else:
            # Only a local file can be jumped about in; all else is read from the front.
            plain = stream if shard.local else cast(IO[bytes], _Forward(stream))
        with _damage_as_read_error(0):
            tar = tarfile.open(fileobj=plain, mode="r:", tarinfo=_Header)
        with tar:
            yield tar
    finally:
        # It may be the output of a command, which fails when it is not read to the end.
        with suppress(OSError):
            stream.close()


class _Forward:
    """A stream without an end in sight as a file that is only ever moved on.

    Python's own tar streams read on behind the end of a file for as long as a header claims that there is more.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        self._check(self._position)
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        assert position >= self._position, "a tar is read from its front"
        self._check(position)
        while self._position < position and self.read(min(position - self._position, 2**20)):
            pass
        return self._position

    def _check(self, position: int) -> None:
        if position > _LONGEST_STREAM:
            raise PermanentFailure(f"it claims more than {_LONGEST_STREAM:,} bytes, which no shard of a server has")


@contextmanager
def _damage_as_read_error(start: int) -> Iterator[None]:
    """Turn what a damaged header raises, whose fields reach `int`, `seek` and `decode` as they are, into one error."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, IndexError, KeyError) as error:
        raise tarfile.ReadError(f"at byte {start:,}: {error or type(error).__name__}") from error


@dataclass(kw_only=True)
class _Group:
    """The entries of a sample."""

    key: str
    kind: MediaKind = IMAGES
    images: list[bytes] = field(default_factory=list)
    label: bytes | None = None
    captions: bytes | None = None
    problem: str | None = None

    def sample(self, shard: str) -> RawSample:
        problem = self.problem
        if problem is None and len(self.images) != 1:
            name = self.kind.name
            problem = f"it has {len(self.images)} {name}s" if self.images else f"it has no {name}"
        image = self.images[0] if self.images else b""
        return RawSample(self.key, shard, image, self.label, problem, self.captions)


def _groups(
    tar: tarfile.TarFile, wanted: np.ndarray, captions: str | None = None, *, kind: MediaKind
) -> Iterator[tuple[int, _Group]]:
    """Position and entries of each sample; the content is read of the wanted ones alone."""
    position, limit, passed_over = -1, image_bytes_limit(), 0
    group: _Group | None = None
    # A caption file may stand before its image, and alone it is no sample: json comes before png.
    ahead = _Group(key="", kind=kind)
    try:
        for member in _members(tar):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            extension = extension.lower()
            passed_over += 1
            if passed_over > _MOST_PASSED_OVER:
                raise tarfile.ReadError(f"{_MOST_PASSED_OVER:,} entries in a row belong to no sample: this is no shard")
            if member.isdir() or not stem or not dot or _META.match(member.name):
                continue
            key = folder + slash + stem
            if extension == captions:
                of_group = group is not None and key == group.key
                target = group if group is not None and of_group else _Group(key=key, kind=kind)
                if (place := position + (not of_group)) < len(wanted) and wanted[place]:
                    problem = _problem(member, extension, LONGEST_FILE, kind=kind)
                    target.problem = target.problem or problem
                    target.captions = read_file(tar, member) if problem is None else None
                ahead = ahead if of_group else target
                continue
            if not (extension == "cls" or extension in kind.unreadable or extension in kind.extensions):
                continue
            passed_over = 0
            if group is None or key != group.key:
                if group is not None:
                    yield position, group
                position, group = position + 1, ahead if ahead.key == key else _Group(key=key, kind=kind)
            problem = _problem(member, extension, _LONGEST_LABEL if extension == "cls" else limit, kind=kind)
            group.problem = group.problem or problem
            # Of several images, which make a broken sample, the first is read: all may be more than memory holds.
            another = extension != "cls" and bool(group.images)
            read = problem is None and not another and position < len(wanted) and wanted[position]
            content = read_file(tar, member) if read else b""
            if extension == "cls":
                group.label = content
            else:
                group.images.append(content)
    except _BROKEN:
        # What is known to be whole is not lost with what follows it.
        whole = group is not None and group.images and group.label is not None
        if group is not None and whole and (captions is None or group.captions is not None):
            yield position, group
        raise
    if group is not None:
        yield position, group


def _problem(member: tarfile.TarInfo, extension: str, limit: int, *, kind: MediaKind) -> str | None:
    """Why an entry cannot be read, by its header."""
    if extension in kind.unreadable:
        return f"its {kind.name} is a .{extension}, which {kind.reader} does not read here: convert it"
    if not member.isreg():
        return f"its .{extension} is no file but a {_kind(member)}"
    if member.size > limit:
        kinds = {LONGEST_FILE: f"{LONGEST_FILE:,} of captions", _LONGEST_LABEL: f"{_LONGEST_LABEL:,} of a label"}
        allowed = kinds.get(limit, f"{IMAGE_BYTES_VARIABLE} allows")
        return f"its .{extension} claims {member.size:,} bytes, more than {allowed}"
    return None


def _kind(member: tarfile.TarInfo) -> str:
    return "link" if member.issym() or member.islnk() else "device"
