"""Shards in the bucket of a real server of S3's kind, which checks signatures: `pip install nanio`, a small one.

`pip install 'moto[server]'` is another, which takes every secret. A test skips the server that is not installed; one in
a folder of its own (`pip install --target FOLDER`) is found by `PYTHONPATH`.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from discrete_lit.data import ImageShards, remote
from discrete_lit.data.tars import BrokenShard, PermanentFailure

KEY, SECRET, BUCKET = "a-user", "a secret of forty letters, so to speak.", "images"
COMMANDS = {
    "nanio": ["-m", "nanio", "serve", "--host", "127.0.0.1", "--data-dir", "{folder}", "--port", "{port}"],
    "moto": ["-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"],
}


@dataclass
class Bucket:
    """A bucket, and the way to it: through a relay of this test, which cuts what comes back."""

    server: str
    client: Any
    cuts: list[int]
    """Bytes after which the next connections end; no more entries, no more ends."""

    def put(self, folder: Path) -> None:
        for file in folder.iterdir():
            self.client.put_object(Bucket=BUCKET, Key=f"a set/{file.name}", Body=file.read_bytes())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def relay(listener: socket.socket, port: int, cuts: list[int]) -> None:
    """Hand every connection on to a port, and end it after as many bytes of answers as `cuts` says."""

    def pass_on(begin: socket.socket, end: socket.socket, most: int | None) -> None:
        with suppress(OSError):
            while (data := begin.recv(65536)) and (most is None or most > 0):
                end.sendall(data if most is None else data[:most])
                most = None if most is None else most - len(data)
        for each in (begin, end):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def join(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            most = cuts.pop(0) if cuts else None
            asking = Thread(target=pass_on, args=(client, server, None), daemon=True)
            asking.start()
            pass_on(server, client, most)
            asking.join()

    with suppress(OSError):  # of the listener, which the test closes
        while True:
            Thread(target=join, args=(listener.accept()[0],), daemon=True).start()


@pytest.fixture(scope="module", params=list(COMMANDS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A server with one user: its name and its port."""
    pytest.importorskip("botocore")
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    port, folder = free_port(), tmp_path_factory.mktemp("buckets")
    words = [word.format(folder=folder, port=port) for word in COMMANDS[request.param]]
    environment = {**os.environ, "NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET}
    process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=5)[1][-3000:]
            time.sleep(0.1)
        yield request.param, port
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def bucket(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    import botocore.session

    remote._s3_client.cache_clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    cuts: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))
    Thread(target=relay, args=(listener, server[1], cuts), daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{listener.getsockname()[1]}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client: Any = botocore.session.get_session().create_client("s3")
    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket=BUCKET)
    yield Bucket(server[0], client, cuts)
    client.close()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    remote._s3_client.cache_clear()


@pytest.fixture
def shards(bucket: Bucket, make_shards: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of three shards, which the bucket has too."""
    folder = make_shards(tmp_path / "shards", [4, 3, 4])
    bucket.put(folder)
    return folder


def rows(where: str, workers: int = 0) -> list[tuple[str, bytes]]:
    data = ImageShards(train=where, image_size=8, batch_size=2, num_workers=workers, shuffle_window=4)
    return [
        (key, image.numpy().tobytes())
        for batch in data.evaluation_loader("train", 0, 1)
        for key, image in zip(batch["key"], batch["image"], strict=True)
    ]


def test_a_set_in_a_bucket_is_that_on_the_disk(shards: Path) -> None:
    assert rows(f"s3://{BUCKET}/a set") == rows(str(shards))
    assert len(rows(f"s3://{BUCKET}/a set", workers=2)) == 11


def test_a_transfer_goes_on_where_the_connection_ended(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "5")
    monkeypatch.setenv("DISCRETE_LIT_CACHE", str(tmp_path / "cache"))
    content = os.urandom(3_000_000)
    bucket.client.put_object(Bucket=BUCKET, Key="large.tar", Body=content)
    # The question for the version; a part; no answer at all; the rest.
    bucket.cuts[:] = [10_000, 1_000_000, 0, 700_000]
    with remote.open_url(f"s3://{BUCKET}/large.tar") as file:
        assert file.read() == content
    assert bucket.cuts == [] and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_is_not_there_is_named(shards: Path) -> None:
    with pytest.raises(PermanentFailure, match="the server answers 404"):
        remote.open_url(f"s3://{BUCKET}/a set/no.tar").read()
    with pytest.raises(BrokenShard, match=rf"s3://{BUCKET}/a set/no\.tar: the server answers 404"):
        data = ImageShards(
            train=f"s3://{BUCKET}/a set/no.tar", train_count=4, num_classes=3, image_size=8, batch_size=2
        )
        list(data.evaluation_loader("train", 0, 1))


@pytest.mark.parametrize("change", [{"AWS_SECRET_ACCESS_KEY": "another"}, {"AWS_ACCESS_KEY_ID": "nobody"}])
def test_who_may_not_read_is_told_so(
    bucket: Bucket, shards: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    if bucket.server == "moto":
        pytest.skip("moto takes every secret")
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"the server answers 403") as error:
        rows(f"s3://{BUCKET}/a set")
    assert SECRET not in str(error.value) and "Signature" not in str(error.value)
