"""Opening what lies behind a URL: a web server, a bucket, or the output of a command.

`http://` and `https://` are read in this process, with no helper that could outlive it, and so is `s3://`: botocore
signs the addresses, with the credentials, region and endpoint that AWS's own programs find. `gs://` is read by
`gsutil cat`, `pipe:` by the named command, and other schemes as webdataset opens them. All end in an `OSError` that
says why: a server or a command that stays mute, or sends less than a kilobyte a second, is given up after the seconds
of `DISCRETE_LIT_READ_TIMEOUT`. What may pass, such as an answer 503, is tried again for twice as long; what will not,
such as 404, is not. A transfer that breaks off is taken up at the byte where it broke, of the same version of the file
(RFC 9110, section 14). A thread reads some megabytes ahead; `shard_cache.py` keeps what was read.
"""

import base64
import http.client
import io
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from queue import Empty, Full, Queue, SimpleQueue
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from webdataset.gopen import gopen

from discrete_lit.core.variables import positive_number
from discrete_lit.data.shard_cache import ShardCache, shard_cache
from discrete_lit.data.tars import PermanentFailure

TIMEOUT_VARIABLE = "DISCRETE_LIT_READ_TIMEOUT"
"""The environment variable of the seconds after which a silent server or command is given up."""
_DEFAULT_SECONDS = 15.0
_SLOWEST = 1000  # Bytes a second.
_GRACE = 5.0  # Seconds that a command has to end.
# A block of a tar: so a reader always sees how a file begins.
_LEAST = 512
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])
# Attempts to take up a transfer that broke off, without a new byte in between, and of one file.
_RESUMED_AT_MOST, _RESUMED_IN_ALL = 3, 100
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_BLOCK, _BLOCKS_AHEAD = 2**18, 64


class MissingFile(PermanentFailure):
    """The server says that there is no such file, or none for whoever asks."""


def is_local(url: str) -> bool:
    """Whether `url` is a path or a `file:` URL."""
    return url.startswith("file:") or ("://" not in url and not url.startswith("pipe:"))


def local_path(url: str) -> str:
    """The path of a local file, `~` expanded."""
    return os.path.expanduser(url.removeprefix("file://").removeprefix("file:"))


def without_secrets(url: str) -> str:
    """The URL without what may be a secret: a user's name and password, and the signature behind `?`."""
    if is_local(url) or url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_url(url: str) -> io.BufferedReader:
    """Open a file for reading wherever it is; seekable where it is local.

    Raises:
        OSError: it cannot be opened. Reading raises it for what breaks off or stalls.
    """
    if is_local(url):
        return io.BufferedReader(io.FileIO(local_path(url)), 2**18)
    if url.startswith("pipe:"):
        raw: io.RawIOBase = _Command(url.removeprefix("pipe:"))
    elif url.startswith("gs://"):
        raw = _Command(f"gsutil cat {shlex.quote(url)}")
    elif is_download(url):
        if (keeping := _keeping.pop(url, None)) is not None:
            keeping.join()  # it ends by its own time-outs
        cache = shard_cache()
        download = _Download(url, probe=cache is not None)
        kept = None if cache is None else _kept(cache, download)
        if kept is not None:
            with kept:
                return io.BufferedReader(io.FileIO(os.dup(kept.fileno())), 2**18)
        raw = _ReadAhead(_Download(url) if download.received else download)
    else:
        try:
            raw = _Stream(gopen(url, "rb"))
        # Each scheme has its own library behind it.
        except Exception as error:
            raise PermanentFailure(f"{type(error).__name__}: {error}") from error
    return io.BufferedReader(raw, 2**18)


def is_download(url: str) -> bool:
    """Whether a file is read from a web server, or from one of S3's kind."""
    return url.startswith(("http://", "https://", "s3://"))


def keep(url: str) -> None:
    """Bring a file that will be read next into the cache of this machine, in a thread; nothing without a cache."""
    if is_download(url) and shard_cache() is not None and url not in _keeping:
        _keeping[url] = threading.Thread(target=_keep, args=(url,), daemon=True)
        _keeping[url].start()


_keeping: dict[str, threading.Thread] = {}


def _keep(url: str) -> None:
    cache = shard_cache()
    assert cache is not None
    # Who reads the file meets the error again.
    with suppress(OSError), closing(_Download(url, probe=True)) as download:
        kept = cache.open(download)
        if kept is not None:
            kept.close()


def _kept(cache: ShardCache, download: "_Download") -> BinaryIO | None:
    """The file of a download in the cache; None where the cache does not keep it."""
    try:
        kept = cache.open(download)
    except BaseException:
        download.close()
        raise
    if kept is not None or download.received:
        download.close()
    return kept


def read_timeout() -> float:
    """Seconds after which a silent server or command is given up.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    return positive_number(TIMEOUT_VARIABLE, _DEFAULT_SECONDS)


class _Stream(io.RawIOBase):
    """A source of bytes that fails where it stalls."""

    def __init__(self, source: Any = None) -> None:
        self._source = source
        self._timeout = read_timeout()
        self._waited, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < min(_LEAST, len(view)):
            start = time.monotonic()
            data = self.receive(len(view) - filled)
            # Only waiting counts: the reader may take its time.
            self._waited += time.monotonic() - start
            self._received += len(data)
            if not data:
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
            if self._waited > self._timeout:
                if self._received < self._waited * _SLOWEST:
                    raise TimeoutError(f"{self._received:,} bytes in {self._waited:.0f} s; see {TIMEOUT_VARIABLE}")
                self._waited, self._received = 0.0, 0
        return filled

    def receive(self, most: int) -> bytes:
        return self._source.read(most)

    def close(self) -> None:
        if not self.closed and self._source is not None:
            self._source.close()
        super().close()


class _Download(_Stream):
    """The body of a web server's answer, which is asked for again from the byte where a transfer broke off."""

    def __init__(self, url: str, *, probe: bool = False) -> None:
        super().__init__()
        self._url, self.name = url, without_secrets(url)
        # The first byte tells version and size; of a server without ranges, which sends all, it is the file itself.
        source = self._ask("bytes=0-0" if probe else None)
        self.size = _whole(source.headers.get("Content-Length"))
        if source.status == 206:
            found = _RANGE.fullmatch(source.headers.get("Content-Range", ""))
            self.size = None if found is None else _whole(found[3])
            source.close()
        self._source = None if source.status == 206 else source
        self.version = _version(source)
        self.received = self._resumed = 0

    def receive(self, most: int) -> bytes:
        begin = time.monotonic()
        for attempt in range(_RESUMED_AT_MOST + 1):
            try:
                if self._source is None:
                    self._resume()
                if attempt:
                    time.sleep(attempt * self._timeout / 15)
                    self._resume()
                    self._resumed += 1
                    # What a break took is no slowness of what follows.
                    self._waited -= time.monotonic() - begin
                    begin = time.monotonic()
                assert self._source is not None
                data = self._source.read1(most)
                if not data and self.size is not None and self.received < self.size:
                    raise OSError(f"the server ended the transfer after {self.received:,} of {self.size:,} bytes")
                self.received += len(data)
                return data
            except PermanentFailure:
                raise
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, http.client.HTTPException):
                    error = OSError(f"the server ended the transfer early ({type(error).__name__})")
                # What has no known end, or no known version, may go on in another way than it began.
                if self.size is None:
                    raise error from None
                # Whoever reads the shard once more would wait as often again.
                if attempt == _RESUMED_AT_MOST or self._resumed >= _RESUMED_IN_ALL:
                    raise PermanentFailure(str(error)) from None
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, part: str | None) -> http.client.HTTPResponse:
        """Ask for the file, or for a part of it."""
        address = _address(self._url)
        return _within(
            self._timeout, lambda: _answer(address, self._timeout, asked={} if part is None else {"Range": part})
        )

    def _resume(self) -> None:
        """Go on from the byte where the transfer broke off.

        Raises:
            PermanentFailure: there is another file now.
        """
        if self._source is not None:
            self._source.close()
        self._source = self._ask(f"bytes={self.received}-" if self.received else None)
        headers, version = self._source.headers, _version(self._source)
        if self._source.status == 206:
            found = _RANGE.fullmatch(headers.get("Content-Range", ""))
            start, size = (int(found[1]), _whole(found[3])) if found else (None, None)
            same = start == self.received and size in (None, self.size)
        else:  # the whole file again, by a server that knows no ranges
            same = _whole(headers.get("Content-Length")) == self.size
        if not same or (self.version and version and version != self.version):
            raise PermanentFailure(
                f"the file on the server changed while it was read, after {self.received:,} of {self.size:,} bytes"
            )
        if self._source.status != 206:
            left = self.received
            while left:
                data = self._source.read1(min(left, 2**20))
                if not data:
                    raise OSError(
                        f"the server ended the transfer after {self.received - left:,} of {self.size:,} bytes"
                    )
                left -= len(data)


class Answer(_Stream):
    """One answer of a web server, for whoever keeps what has come and asks again by itself.

    Args:
        url: `http://` or `https://`.
        headers: of the request; a server that it is led to is not told `Authorization`.

    Attributes:
        status: 200, or 206 for a part.
        headers: those of the answer, by lower-case names, and those of the answers that led to its address.

    Raises:
        OSError: the server cannot be reached or answers with an error. Reading raises it for what breaks off or stalls.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__()
        led: dict[str, str] = {}
        self._source = _within(self._timeout, lambda: _answer(url, self._timeout, asked=headers, led=led))
        self.status: int = self._source.status
        self.headers = {**led, **{name.lower(): value for name, value in self._source.headers.items()}}
        self._left = _whole(self._source.headers.get("Content-Length"))

    def receive(self, most: int) -> bytes:
        try:
            data = self._source.read1(most)
        except http.client.HTTPException as error:
            raise OSError(f"the server ended the transfer early ({type(error).__name__})") from error
        if self._left is not None:
            self._left -= len(data)
            if not data and self._left:
                raise OSError(f"the server ended the transfer {self._left:,} bytes before its end")
        return data


class _ReadAhead(io.RawIOBase):
    """A stream that a thread reads some megabytes ahead, so that the network works while images are decoded."""

    def __init__(self, source: io.RawIOBase) -> None:
        self._source = source
        self._blocks: Queue[bytes | Exception] = Queue(_BLOCKS_AHEAD)
        self._block = memoryview(b"")
        self._ended = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and not self._ended:
            # The source ends by its own time-out.
            block = self._blocks.get()
            if isinstance(block, Exception):
                self._ended = True
                raise block
            self._block, self._ended = memoryview(block), not block
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block))
        view[:count], self._block = self._block[:count], self._block[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            # The thread notices it behind the block that it reads, and closes the source.
            self._closing.set()
            with suppress(Empty):
                while True:
                    self._blocks.get_nowait()
        super().close()

    def _read(self) -> None:
        with self._source:
            while not self._closing.is_set():
                try:
                    block: bytes | Exception = self._source.read(_BLOCK) or b""
                # The reader raises it.
                except Exception as error:
                    block = error
                while not self._closing.is_set():
                    with suppress(Full):
                        self._blocks.put(block, timeout=0.2)
                        break
                if not block or isinstance(block, Exception):
                    return


def _version(answer: http.client.HTTPResponse) -> str:
    """Tell versions of a file apart, by the marks of the server; empty where it gives none."""
    # A server's own compression would make these another file's.
    marks = [answer.headers.get(name) or "" for name in ("ETag", "Last-Modified", "Content-Encoding")]
    return "\n".join(marks) if any(marks[:2]) else ""


def _whole(text: str | None) -> int | None:
    """A number of bytes in a header; None where there is none."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None


def _address(url: str) -> str:
    """The address by which a web server gives a file: of `s3://` one that is signed, for an hour.

    Raises:
        PermanentFailure: botocore is not installed, or finds no region, bucket or credentials.
    """
    if not url.startswith("s3://"):
        return url
    parts = urlsplit(url)
    try:
        client = _s3_client(os.getpid())
        given = {"Bucket": parts.netloc, "Key": parts.path.removeprefix("/")}
        return client.generate_presigned_url("get_object", Params=given, ExpiresIn=3600)
    except ImportError as error:
        raise PermanentFailure(
            "s3:// needs botocore: pip install 'discrete-lit[s3]'. Without it, `pipe:aws s3 cp s3://... -` works"
        ) from error
    except Exception as error:  # botocore's many kinds
        raise PermanentFailure(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    """Make S3's client, one in each process; without credentials one for public buckets."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = botocore.session.get_session()
    signature: Any = "s3v4" if session.get_credentials() is not None else UNSIGNED
    return session.create_client("s3", config=Config(signature_version=signature))


def _within(timeout: float, ask: Callable[[], Any]) -> Any:
    """Ask a server until it answers, for about twice the timeout and once at least.

    Each time in a thread that is left to itself when it is late: a server may also send its header byte by byte.
    """
    give_up = time.monotonic() + 2 * timeout
    pause = timeout / 15
    while True:
        answers: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_answer_into, args=(answers, ask), daemon=True).start()
        try:
            answer = answers.get(timeout=timeout)
        except Empty:
            answer = TimeoutError(f"no answer within {timeout:g} s; see {TIMEOUT_VARIABLE}")
        if not isinstance(answer, Exception):
            return answer
        if isinstance(answer, PermanentFailure) or time.monotonic() + pause > give_up:
            raise PermanentFailure(str(answer)) if type(answer) is not MissingFile else answer
        time.sleep(pause)
        pause *= 2


def _answer_into(answers: SimpleQueue[Any], ask: Callable[[], Any]) -> None:
    try:
        answers.put(ask())
    # It is raised again where the answer is waited for.
    except Exception as error:
        answers.put(error)


class _Led(urllib.request.HTTPRedirectHandler):
    """Follow a server to another address, and keep what it said on the way."""

    def __init__(self, said: dict[str, str]) -> None:
        self._said = said

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self._said |= {name.lower(): value for name, value in headers.items()}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _answer(
    url: str, timeout: float, *, asked: Mapping[str, str] | None = None, led: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """Send one request for a file, or the part that `Range` asks for, and tell failures that may pass from others."""
    parts = urlsplit(url)
    headers = {"User-Agent": "discrete-lit", **(asked or {})}
    part, secret = headers.get("Range"), headers.pop("Authorization", None)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    try:
        request = urllib.request.Request(quote(plain, safe="%/:=&?~+!$,;'@()*[]"), headers=headers)
        if secret is not None:
            request.add_unredirected_header("Authorization", secret)
        return urllib.request.build_opener(_Led({} if led is None else led)).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        error.close()
        if error.code in _PASSING:
            raise OSError(reason) from error
        if error.code == 416 and part is not None:
            reason = f"the file on the server changed while it was read, or is empty: it has no {part} ({reason})"
        kind = MissingFile if error.code in (401, 403, 404, 410) else PermanentFailure
        raise kind(reason) from error
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
    except http.client.HTTPException as error:
        raise OSError(f"the server's answer is not HTTP ({type(error).__name__}: {error})") from error


class _Command(_Stream):
    """The output of a shell command, which fails where the command does."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self._command = command
        # What it says of an error; a pipe that nobody empties would stop it.
        self._errors = tempfile.TemporaryFile()
        # A group of its own, so that what the shell started ends with it.
        # A worker of a loader does not end by SIGTERM, which the command would inherit.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        try:
            self._process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._process.stdout is not None
        self._source = self._process.stdout

    def receive(self, most: int) -> bytes:
        if not select.select([self._source], [], [], self._timeout)[0]:
            raise TimeoutError(f"`{self._command}` gave nothing for {self._timeout:g} s; see {TIMEOUT_VARIABLE}")
        data = os.read(self._source.fileno(), most)
        if not data and (status := self._process.wait()):
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"`{self._command}` ended with status {status}" + (f": {said[-1]}" if said else ""))
        return data

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal_number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
        self._errors.close()
