"""Opening what lies behind a URL: a web server, a bucket, or the output of a command.

`http://` and `https://` are read in this process, with no helper that could outlive it. `s3://` is read by
`aws s3 cp`, `gs://` by `gsutil cat`, `pipe:` by the named command, and other schemes as webdataset opens them. All end
in an `OSError` that says why: a server or a command that stays mute, or sends less than a kilobyte a second, is given
up after the seconds of `DISCRETE_LIT_READ_TIMEOUT`. What may pass, such as an answer 503, is tried again for twice as
long; what will not, such as 404, is not.
"""

import base64
import http.client
import io
import os
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
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from webdataset.gopen import gopen

from discrete_lit.data.tars import PermanentFailure

TIMEOUT_VARIABLE = "DISCRETE_LIT_READ_TIMEOUT"
"""The environment variable of the seconds after which a silent server or command is given up."""
_DEFAULT_SECONDS = 15.0
_SLOWEST = 1000  # Bytes a second.
_GRACE = 5.0  # Seconds that a command has to end.
# A block of a tar: so a reader always sees how a file begins.
_LEAST = 512
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])


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
    elif url.startswith("s3://"):
        raw = _Command(f"aws s3 cp --only-show-errors {shlex.quote(url)} -")
    elif url.startswith("gs://"):
        raw = _Command(f"gsutil cat {shlex.quote(url)}")
    elif url.startswith(("http://", "https://")):
        raw = Download(url)
    else:
        try:
            raw = _Stream(gopen(url, "rb"))
        # Each scheme has its own library behind it.
        except Exception as error:
            raise PermanentFailure(f"{type(error).__name__}: {error}") from error
    return io.BufferedReader(raw, 2**18)


def read_timeout() -> float:
    """Seconds after which a silent server or command is given up.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    given = os.environ.get(TIMEOUT_VARIABLE, str(_DEFAULT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"the environment variable {TIMEOUT_VARIABLE} is {given!r}; it must be a positive number")
    return seconds


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


class Download(_Stream):
    """The body of a web server's answer, and what the server says of it.

    Args:
        url: `http://` or `https://`.
        headers: of the request; a server that it is led to is not told `Authorization`.

    Attributes:
        status: 200, or 206 for a part.
        headers: those of the answer, by lower-case names; before them those of the answers that led to another address.

    Raises:
        OSError: the server cannot be reached or answers with an error. Reading raises it for what breaks off or stalls.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._source, led = _within(self._timeout, lambda: _answer(url, self._timeout, headers or {}))
        self.status: int = self._source.status
        self.headers = {**led, **{name.lower(): value for name, value in self._source.headers.items()}}
        length = self._source.headers.get("Content-Length", "")
        self._length = int(length) if length.isdecimal() else None
        self._total = 0

    def receive(self, most: int) -> bytes:
        try:
            data = self._source.read1(most)
        except http.client.HTTPException as error:
            raise OSError(f"the server ended the transfer early ({type(error).__name__})") from error
        self._total += len(data)
        if not data and self._length is not None and self._total < self._length:
            raise OSError(f"the server ended the transfer after {self._total:,} of {self._length:,} bytes")
        return data


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

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.headers |= {name.lower(): value for name, value in headers.items()}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _answer(url: str, timeout: float, asked: Mapping[str, str]) -> tuple[http.client.HTTPResponse, Mapping[str, str]]:
    """Send one request, and tell failures that may pass from those that will not."""
    parts = urlsplit(url)
    headers = {"User-Agent": "discrete-lit", **{name: asked[name] for name in asked if name != "Authorization"}}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    try:
        request = urllib.request.Request(quote(plain, safe="%/:=&?~+!$,;'@()*[]"), headers=headers)
        if "Authorization" in asked:
            request.add_unredirected_header("Authorization", asked["Authorization"])
        led = _Led()
        return urllib.request.build_opener(led).open(request, timeout=timeout), led.headers
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        error.close()
        if error.code in _PASSING:
            raise OSError(reason) from error
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
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            process_group=0,
        )
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
