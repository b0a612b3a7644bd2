"""Download a file over HTTP: resumed where a transfer broke off, checked, and named only when it is whole.

What has come stands in `NAME.part`, with the server's tag of the content in `NAME.part.json`; the next try, or the next
command, goes on from there if the server has the same content still. Time-outs are those of `data/remote.py`.
"""

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from discrete_lit.core.files import atomic_write_text, file_sha256, naming, publish
from discrete_lit.core.locks import is_first_process
from discrete_lit.data.remote import Answer, MissingFile, without_secrets
from discrete_lit.data.tars import PermanentFailure

# Transfers that break off one after the other before anything more has come.
_TRIES = 5
_CHUNK = 1 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NotDownloaded(ValueError):
    """A file could not be downloaded; the message says why and what is kept.

    Attributes:
        missing: whether the server has no such file, or none for whoever asks.
    """

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A file that was downloaded, and how it was checked."""

    sha256: str
    size: int
    checked_by: str
    """`list`: its hash was known before. `server`: the server states it. `size`: nothing but the number of bytes."""


@dataclass(frozen=True, kw_only=True)
class _Partial:
    """A file of which a part has come, and what is known of the whole."""

    url: str
    tag: str
    """The server's ETag, which changes with the content; "" without one: the transfer begins anew."""
    size: int | None
    sha256: str | None
    """The hash that the server states."""


class _BrokeOff(Exception):
    """The server ended a transfer early, or fell silent."""


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Downloaded:
    """Download a file, with a progress bar, and check it before it gets its name.

    A transfer that breaks off is resumed as long as each try brings more.

    Args:
        url: `http://` or `https://`.
        path: where the file is to be; its folder is made.
        sha256: its hash; else the one that the Hugging Face Hub states in `X-Linked-ETag`, where it does.
        size: its bytes; else as many as the server says.
        headers: of the request, such as `Authorization`, which is not told to another server.

    Returns:
        Its hash, its size, and by what it was checked.

    Raises:
        NotDownloaded: no server, no such file, another size or hash, a page in place of a file, a full disk, or a
            transfer that breaks off again and again.
        OSError: the folder cannot be written.
    """
    part, note = Path(f"{path}.part"), Path(f"{path}.part.json")
    shown, most, failures = without_secrets(url), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            stated = _receive(url, path, headers=headers or {}, size=size)
            break
        except _BrokeOff as error:
            come = _size_of(part)
            failures, most = (0, come) if come > most else (failures + 1, most)
            if failures >= _TRIES:
                raise NotDownloaded(
                    f"{shown}: the transfer broke off after {come:,} bytes again and again ({error}). They are kept in "
                    f"{part}: the same command goes on from there"
                ) from error
        except PermanentFailure as error:
            if "answers 416" in str(error) and part.exists():  # the part is longer than the file is now
                _remove(part, note)
                continue
            kept = f"; {_size_of(part):,} bytes that came before are kept" if _size_of(part) else ""
            raise NotDownloaded(f"{shown}: {error}{kept}", missing=isinstance(error, MissingFile)) from error
    found, expected = file_sha256(part), sha256 or stated.sha256
    if expected is not None and found != expected:
        _remove(part, note)
        who = "the list of models says" if sha256 is not None else "the server states"
        raise NotDownloaded(
            f"{shown} has SHA-256 {found}, and {who} {expected}: it is another file, or was damaged on its way, and "
            "was removed"
        )
    come = _size_of(part)
    publish(part, path)
    note.unlink(missing_ok=True)
    by = "list" if sha256 is not None else "server" if expected is not None else "size"
    return Downloaded(sha256=found, size=come, checked_by=by)


def _receive(url: str, path: Path, *, headers: Mapping[str, str], size: int | None) -> _Partial:
    """Receive what is missing of a file into its part; return what the server says of the whole."""
    part, note = Path(f"{path}.part"), Path(f"{path}.part.json")
    before = _read_note(note, url)
    start = _size_of(part) if before is not None and before.tag else 0
    if before is not None and start and start == before.size:
        return before
    asked = {**headers, "Range": f"bytes={start}-", "If-Range": before.tag} if before and start else headers
    source = Answer(url, asked)
    with io.BufferedReader(source, _CHUNK) as stream:
        start = start if source.status == 206 else 0
        stated = _stated(url, source, size)
        room = shutil.disk_usage(path.parent).free
        if stated.size is not None and room < stated.size - start:
            raise NotDownloaded(
                f"{path.parent} has {room:,} bytes of free space, and {path.name} takes {stated.size - start:,} more: "
                "free some, or name another folder in DISCRETE_LIT_CACHE"
            )
        atomic_write_text(note, json.dumps(asdict(stated)))
        bar = tqdm(
            desc=path.name,
            total=stated.size,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=not is_first_process(),
        )
        # Unbuffered: whatever the disk has taken is a beginning of the file.
        with naming(part), open(part, "ab" if start else "wb", buffering=0) as file, bar:
            while data := _next(stream):
                _write(file, data, path)
                bar.update(len(data))
    if stated.size is not None and _size_of(part) != stated.size:
        raise _BrokeOff(f"it has {stated.size:,}")
    return stated


def _next(stream: "io.BufferedReader[Any]") -> bytes:
    try:
        return stream.read1(_CHUNK)
    except OSError as error:
        raise _BrokeOff(str(error)) from error


def _write(file: io.FileIO, data: bytes, path: Path) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NotDownloaded(
            f"{path.parent}: {os.strerror(error.errno or 0)}, with {_size_of(Path(file.name)):,} bytes of {path.name}. "
            "They are kept: free some space and give the same command, or name another folder in DISCRETE_LIT_CACHE"
        ) from error


def _stated(url: str, source: Answer, size: int | None) -> _Partial:
    """Read what an answer says of the whole file, and refuse one that is about another."""
    said = source.headers
    whole = said.get("content-range", "").rpartition("/")[2] if source.status == 206 else said.get("content-length", "")
    stated = int(whole) if whole.isdecimal() else None
    shown = without_secrets(url)
    if said.get("content-type", "").startswith("text/html"):
        raise NotDownloaded(f"{shown}: the server sends a web page in place of the file; open the address in a browser")
    if size is not None and stated is not None and stated != size:
        raise NotDownloaded(f"{shown} has {stated:,} bytes, and the list of models says {size:,}: it is another file")
    linked = said.get("x-linked-etag", "").strip('"').lower()
    tag = said.get("etag", "")
    return _Partial(
        url=url,
        tag="" if tag.startswith("W/") else tag,
        size=stated if stated is not None else size,
        sha256=linked if _HASH.fullmatch(linked) else None,
    )


def _read_note(note: Path, url: str) -> _Partial | None:
    """Read what an earlier try has noted of the same address; None where nothing fits."""
    try:
        known = _Partial(**json.loads(note.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return known if known.url == url else None


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
