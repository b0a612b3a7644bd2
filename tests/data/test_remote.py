"""Files of a real HTTP server that drops, stalls, cuts, redirects and changes; and the cache of a machine."""

import fcntl
import hashlib
import hmac
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qsl, quote

import pytest

from discrete_lit.data import remote, shard_cache
from discrete_lit.data.remote import open_url
from discrete_lit.data.tars import PermanentFailure

CONTENT = b"".join(hashlib.sha256(str(number).encode()).digest() for number in range(10_000))


class Server(ThreadingHTTPServer):
    """Serves one content under every path, with ranges; the requests take the entries of `trouble` one after another.

    `drop`: the connection ends after a third of what was asked for; `stall`: it says no more there; `plain`: the range
    is overlooked; a number: that status; `to /x`: a redirect; `""`: nothing. `then` is the content after the first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.content, self.version = CONTENT, '"v1"'
        self.then: tuple[bytes, str] | None = None
        self.trouble: list[str] = []
        self.ranges: list[str | None] = []
        self.sent = 0
        self.counting = Lock()
        self.ended = Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/shard.tar"

    def count(self, more: int) -> None:
        """Add to the bytes that were sent; every request has a thread of its own."""
        with self.counting:
            self.sent += more


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers["Range"])
        kind = server.trouble.pop(0) if server.trouble else ""
        if kind.isdecimal():
            self.send_error(int(kind))
            return
        if kind.startswith("to "):
            self.send_response(302)
            self.send_header("Location", kind[3:])
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        ranged = asked is not None and kind != "plain"
        start = int(asked[1]) if asked is not None and ranged else 0
        stop = int(asked[2]) + 1 if asked is not None and ranged and asked[2] else len(server.content)
        if start >= len(server.content):
            self.send_error(416)
            return
        whole = server.content[start:stop]
        body = whole[: len(whole) // 3] if kind in ("drop", "stall") else whole
        # Before the header: a probe reads no further, and may look at once.
        server.count(len(body))
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(whole)))
        self.send_header("ETag", server.version)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(server.content)}")
        try:
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # whoever asked has seen enough
            server.count(-len(body))
            return
        if server.then is not None:
            server.content, server.version = server.then
        if kind == "stall":
            server.ended.wait(20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.5")
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def read(url: str) -> bytes:
    with open_url(url) as stream:
        return stream.read()


def test_a_transfer_goes_on_at_the_byte_where_it_broke(server: Server) -> None:
    server.trouble = ["drop", "drop", "503", "stall", "plain", ""]
    assert read(server.url) == CONTENT
    third = len(CONTENT) // 3
    second = third + (len(CONTENT) - third) // 3
    fourth = second + (len(CONTENT) - second) // 3
    assert server.ranges == [None, f"bytes={third}-", *[f"bytes={second}-"] * 2, f"bytes={fourth}-"]


@pytest.mark.parametrize("trouble", [["to /other"], ["503", "429", ""], ["to /a", "to /b", "drop"]])
def test_what_passes_is_waited_for_and_redirects_are_followed(server: Server, trouble: list[str]) -> None:
    server.trouble = trouble
    assert read(server.url) == CONTENT


@pytest.mark.parametrize(
    ("content", "version", "message"),
    [
        (CONTENT[::-1], '"v2"', "changed while it was read, after 106,666 of 320,000 bytes"),
        (CONTENT + b"more", '"v1"', "changed while it was read"),
        (CONTENT[:1000], '"v1"', r"changed while it was read, .* it has no bytes=106666- .*416"),
    ],
)
def test_two_versions_of_a_file_are_never_mixed(server: Server, content: bytes, version: str, message: str) -> None:
    server.trouble, server.then = ["drop"], (content, version)
    with open_url(server.url) as stream, pytest.raises(PermanentFailure, match=message):
        stream.read()


@pytest.mark.parametrize(("kind", "message"), [("drop", "after [0-9,]+ of 320,000 bytes"), ("stall", "timed out")])
def test_a_server_that_never_gets_on_is_given_up(server: Server, kind: str, message: str) -> None:
    server.content = CONTENT[:3]  # a third is a byte, of what is left nothing
    server.trouble = [kind] * 100
    with pytest.raises(OSError, match=message.replace("320,000", "3")):
        read(server.url)
    assert len(server.ranges) == 1 + 3


def test_it_is_read_ahead_and_no_further(server: Server) -> None:
    server.content = CONTENT * 200  # 64 MB
    with open_url(server.url) as stream:
        assert stream.read(100) == CONTENT[:100]
        blocks = stream.raw._blocks  # type: ignore[attr-defined]
        latest = time.monotonic() + 60
        while not blocks.full() and time.monotonic() < latest:
            time.sleep(0.02)
        held = sum(map(len, list(blocks.queue)))
    assert 10**6 < held <= 2**24


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISCRETE_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISCRETE_LIT_CACHE_GIGABYTES", "0.001")  # three files
    return tmp_path / "cache"


def test_a_file_is_sent_once_and_again_when_it_changes(server: Server, cache: Path) -> None:
    server.trouble = ["drop"]
    assert read(server.url) == read(server.url) == read(f"{server.url}?X-Amz-Signature=other") == CONTENT
    assert server.sent < 2 * len(CONTENT) and len(list(cache.iterdir())) == 1
    with open_url(server.url) as stream:
        stream.seek(1000)
        assert stream.read(5) == CONTENT[1000:1005]
    server.content, server.version = CONTENT[::-1], '"v2"'
    assert read(server.url) == CONTENT[::-1]


def test_what_was_not_used_for_the_longest_time_goes_first(server: Server, cache: Path) -> None:
    def sent(name: str) -> bool:
        before = server.sent
        assert read(f"{server.url}/{name}") == CONTENT
        time.sleep(0.02)
        return server.sent - before >= len(CONTENT)

    assert [sent(name) for name in "abcab"] == [True, True, True, False, False]
    assert sent("d")  # in the place of c
    assert [sent(name) for name in "abd"] == [False] * 3 and sent("c")
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 10**6
    # One that is read while it goes is read to its end.
    with open_url(f"{server.url}/b") as stream:
        assert [sent(name) for name in "efg"] == [True] * 3
        assert stream.read() == CONTENT


def test_a_file_that_another_process_fetches_is_not_waited_for(server: Server, cache: Path) -> None:
    assert read(server.url) == CONTENT
    (kept,) = cache.iterdir()
    partial = kept.rename(kept.with_suffix(".partial"))
    with partial.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read(server.url) == CONTENT and not kept.exists()
    # Its writer has died: another one begins anew.
    partial.write_bytes(b"half")
    assert read(server.url) == CONTENT and kept.read_bytes() == CONTENT
    other = cache / "0123.partial"
    other.write_bytes(b"half")
    assert read(f"{server.url}/next") == CONTENT and not other.exists()


def reads_right(url: str) -> None:
    assert all(read(f"{url}/{name}") == CONTENT for name in "ab" * 5)


def test_processes_share_it(server: Server, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=reads_right, args=(server.url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3 and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("refused", ["large", "no version", "disk"])
def test_what_cannot_be_kept_is_read_all_the_same(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    if refused == "large":
        server.content = CONTENT * 4
    elif refused == "no version":
        server.version = ""
    else:
        cache.parent.joinpath("cache").write_text("a file, not a folder")
    assert read(server.url) == server.content
    assert not cache.is_dir() or not list(cache.iterdir())
    assert (f"is not kept in {cache}" in caplog.text) == (refused == "disk")


def test_a_disk_that_gets_full_is_no_broken_shard(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert read(server.url) == CONTENT
    assert "No space left on device" in caplog.text and not list(cache.iterdir())


def test_the_next_file_is_fetched_meanwhile(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "30")  # what a busy machine asks for again would be counted twice
    remote.keep(server.url)
    remote._keeping[server.url].join(timeout=60)  # all that is sent is not yet all that is kept
    assert server.sent == 1 + len(CONTENT)
    assert read(server.url) == CONTENT and server.sent == 1 + len(CONTENT) + 1
    remote.keep(f"{server.url}/other")
    server.trouble = ["404"] * 2
    with pytest.raises(OSError, match="404"):
        read(f"{server.url}/other")


def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCRETE_LIT_CACHE", "somewhere")
    for size in ("0", "many", "inf"):
        monkeypatch.setenv("DISCRETE_LIT_CACHE_GIGABYTES", size)
        with pytest.raises(ValueError, match="DISCRETE_LIT_CACHE_GIGABYTES is"):
            shard_cache.shard_cache()


SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


def signature(path: str, query: dict[str, str], host: str) -> str:
    """Sign a request as a bucket's server checks it (AWS, "Authenticating Requests: Using Query Parameters")."""
    fields = {name: value for name, value in query.items() if name != "X-Amz-Signature"}
    canonical = "&".join(f"{quote(name, safe='-_.~')}={quote(fields[name], safe='-_.~')}" for name in sorted(fields))
    request = f"GET\n{path}\n{canonical}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
    scope = fields["X-Amz-Credential"].split("/", 1)[1]
    text = f"AWS4-HMAC-SHA256\n{fields['X-Amz-Date']}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


class Bucket(Handler):
    """A server of S3's kind, by paths: it refuses what is not signed with `SECRET`."""

    def do_GET(self) -> None:
        path, _, text = self.path.partition("?")
        query = dict(parse_qsl(text))
        signed = query.get("X-Amz-Signature") == signature(path, query, self.headers["Host"]) if query else False
        if not signed or int(query["X-Amz-Expires"]) < 600:
            self.send_error(403)
        elif path != "/images/a%20folder/shard.tar":
            self.send_error(404)
        else:
            super().do_GET()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a shard in a bucket of the server."""
    pytest.importorskip("botocore")
    server.RequestHandlerClass = Bucket
    remote._s3_client.cache_clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL_S3": server.url.rpartition("/")[0],
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return "s3://images/a folder/shard.tar"


def test_a_bucket_is_read_with_signed_addresses(server: Server, bucket: str, cache: Path) -> None:
    server.trouble = ["drop", "503"]
    assert read(bucket) == read(bucket) == CONTENT
    assert server.sent < 2 * len(CONTENT) and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "the server answers 403"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "the server answers 403"),
        ({"AWS_ENDPOINT_URL_S3": "nowhere"}, "nowhere"),
    ],
)
def test_a_bucket_that_refuses_says_so(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PermanentFailure, match=message) as error:
        read(bucket)
    assert SECRET not in str(error.value) and "Signature" not in str(error.value)


def test_a_bucket_without_botocore_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    remote._s3_client.cache_clear()
    for name in ("botocore", "botocore.session"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PermanentFailure, match=r"pip install 'discrete-lit\[s3\]'"):
        read("s3://images/shard.tar")
