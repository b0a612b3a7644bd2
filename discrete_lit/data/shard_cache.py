"""A folder of this machine that keeps shards of servers, so that each is sent once and not in every epoch.

`DISCRETE_LIT_CACHE` names the folder, best on the fastest disk of the node (`$SLURM_TMPDIR`), and
`DISCRETE_LIT_CACHE_GIGABYTES` says how large it may become. All processes of the node share it. A file has the name of
its URL and of the version that the server says it has (ETag, time and size), so one that has changed is sent anew. It
is written under another name and renamed when it is whole. What was not read for the longest time goes first; a process
that still reads it keeps it until it is done. Who finds that another process is just fetching a shard does not wait for
it, but reads from the server.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from discrete_lit.core.files import content_sha256
from discrete_lit.core.variables import positive_number

_log = logging.getLogger(__name__)

FOLDER_VARIABLE = "DISCRETE_LIT_CACHE"
"""The environment variable of the folder; without it nothing is kept."""
SIZE_VARIABLE = "DISCRETE_LIT_CACHE_GIGABYTES"
"""The environment variable of the size of the folder in 10^9 bytes."""
_DEFAULT_GIGABYTES = 50.0
_PARTIAL = ".partial"
_BLOCK = 2**20


class Download(Protocol):
    """A file that a server has begun to send."""

    name: str
    """Its URL, without a signature."""
    version: str
    """The marks of the server that tell versions of the file apart; empty where it gives none."""
    size: int | None
    """In bytes; None where the server does not say it."""

    def read(self, size: int = -1, /) -> bytes | None: ...
    def close(self) -> None: ...


class ShardCache:
    """Files of servers, kept in a folder up to a size.

    Args:
        folder: on a disk of this machine; made where it is not there.
        most_bytes: of all files together.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def open(self, download: Download) -> BinaryIO | None:
        """Open the kept file of a download, fetching it first where it is not there; None where it is not to be kept.

        It is not kept where the server does not say its version and size, where it is larger than the folder may be,
        where another process is fetching it, and where the disk is full.

        Raises:
            OSError: the transfer broke off.
        """
        if not download.version or download.size is None or download.size > self.most_bytes:
            return None
        path = self.folder / content_sha256(f"{download.name}\n{download.version}\n{download.size}")[:40]
        try:
            with suppress(FileNotFoundError), _disk_errors():
                file = path.open("rb")
                os.utime(path)  # used now
                return file
            return self._fetch(download, path)
        except _NotKept as error:
            _log.warning("%s is not kept in %s: %s", download.name, self.folder, error)
        return None

    def _fetch(self, download: Download, path: Path) -> BinaryIO | None:
        assert download.size is not None
        with _disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + _PARTIAL)
            file = partial.open("a+b")
        try:
            if not _locked(file, partial):
                file.close()
                return None
            with _disk_errors():
                file.truncate(0)
                self._make_room(download.size)
            received = 0
            while block := download.read(_BLOCK):
                received += len(block)
                with _disk_errors():
                    file.write(block)
            if received != download.size:
                raise OSError(f"the server sent {received:,} of {download.size:,} bytes")
            with _disk_errors():
                file.flush()
                os.rename(partial, path)
            file.seek(0)
            return file
        except BaseException:
            if not file.closed:
                partial.unlink(missing_ok=True)  # before the lock ends with the file
                file.close()
            raise

    def _make_room(self, needed: int) -> None:
        """Remove files, those first that were not used for the longest time, until `needed` more bytes may be there."""
        with open(f"{self.folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found: list[tuple[float, int, Path]] = []
            total = needed
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == _PARTIAL and _remove_abandoned(path):
                        continue
                    total += status.st_size
                    if path.suffix != _PARTIAL:
                        found.append((status.st_mtime, status.st_size, path))
            for _, size, path in sorted(found):
                if total <= self.most_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size


class _NotKept(Exception):
    """The disk of the cache refuses."""


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Tell errors of the disk from those of the server."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _NotKept(str(error)) from error


def _locked(file: BinaryIO, path: Path) -> bool:
    """Lock a file, unless somebody has; the lock ends with the process at the latest."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    # Who had it may have given it its name, or removed it, in between.
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(partial: Path) -> bool:
    """Remove a file whose writer has died; tell whether it was one."""
    with partial.open("rb") as file:
        abandoned = _locked(file, partial)
        if abandoned:
            partial.unlink()
    return abandoned


def shard_cache() -> ShardCache | None:
    """The cache that the environment asks for; None where it asks for none.

    Raises:
        ValueError: the size is no positive number.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    return ShardCache(Path(folder).expanduser(), int(positive_number(SIZE_VARIABLE, _DEFAULT_GIGABYTES) * 10**9))
