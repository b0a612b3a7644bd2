"""A web server of files, which breaks off, forgets ranges, or says wrong hashes, as a test wants."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class FileServer:
    """What a server has and does; a test may change it while the server runs."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Content by path, such as `/owner/name/resolve/main/config.json`."""
    address: str = ""
    break_after: int | None = None
    """Bytes of an answer after which the connection is closed; None lets all pass."""
    breaks: int = 0
    """Answers that break off so, then no more."""
    ranges: bool = True
    """Whether a part of a file can be asked for."""
    tag: str = '"first"'
    """The ETag."""
    linked: str | None = None
    """The hash of the content that the Hub states on the way to another address."""
    status: int | None = None
    """Answer to everything, such as 403."""
    content_type: str = "application/octet-stream"
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and headers of each request."""


@contextmanager
def serving(files: dict[str, bytes] | None = None) -> Iterator[FileServer]:
    """Serve files on this machine until the block ends."""
    state = FileServer(files=dict(files or {}))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            state.asked.append((self.path, dict(self.headers.items())))
            content = state.files.get(self.path.partition("?")[0].removeprefix("/elsewhere"))
            if state.status is not None or content is None:
                return self.send_error(state.status or 404)
            if state.linked is not None and not self.path.startswith("/elsewhere"):
                self.send_response(302)
                self.send_header("X-Linked-Etag", f'"{state.linked}"')
                self.send_header("Location", f"{state.address.replace('127.0.0.1', 'localhost')}/elsewhere{self.path}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            start = 0
            wanted = self.headers.get("Range", "")
            if wanted and state.ranges and self.headers.get("If-Range", state.tag) == state.tag:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start > len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if state.tag:
                self.send_header("ETag", state.tag)
            self.send_header("Content-Type", state.content_type)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            if state.break_after is not None and state.breaks > 0:
                state.breaks -= 1
                body = body[: state.break_after]
                self.close_connection = True
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
