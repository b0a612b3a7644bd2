"""Downloads over HTTP: whole or not at all, resumed, checked, and refused with a word that helps."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.file_server import FileServer, serving

from discrete_lit.pretrained.downloads import NotDownloaded, download

CONTENT = bytes(range(256)) * 40
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "1")
    with serving({"/w.bin": CONTENT}) as state:
        yield state


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_checked_and_alone(server: FileServer, tmp_path: Path) -> None:
    done = download(f"{server.address}/w.bin", tmp_path / "a" / "w.bin")
    assert (tmp_path / "a" / "w.bin").read_bytes() == CONTENT and left(tmp_path / "a") == ["w.bin"]
    assert (done.sha256, done.size, done.checked_by) == (HASH, len(CONTENT), "size")
    assert download(f"{server.address}/w.bin", tmp_path / "b", sha256=HASH, size=len(CONTENT)).checked_by == "list"


def test_a_transfer_that_breaks_off_goes_on_where_it_ended(server: FileServer, tmp_path: Path) -> None:
    server.break_after, server.breaks = 3000, 3
    assert download(f"{server.address}/w.bin", tmp_path / "w.bin").sha256 == HASH
    assert [headers.get("Range") for _, headers in server.asked] == [None, *(f"bytes={3000 * n}-" for n in (1, 2, 3))]
    assert left(tmp_path) == ["w.bin"]


def test_the_next_command_goes_on_where_the_last_one_gave_up(server: FileServer, tmp_path: Path) -> None:
    server.break_after, server.breaks, server.ranges = 4000, 100, False  # from the beginning each time
    with pytest.raises(
        NotDownloaded, match=r"broke off after 4,000 bytes again and again .* are kept in .*w\.bin\.part"
    ):
        download(f"{server.address}/w.bin", tmp_path / "w.bin")
    assert left(tmp_path) == ["w.bin.part", "w.bin.part.json"]
    server.breaks, server.ranges = 0, True
    server.asked.clear()
    assert download(f"{server.address}/w.bin", tmp_path / "w.bin").sha256 == HASH
    assert [headers["Range"] for _, headers in server.asked] == ["bytes=4000-"]


@pytest.mark.parametrize("change", ["another tag", "no tag", "shorter"])
def test_another_content_is_received_anew(change: str, server: FileServer, tmp_path: Path) -> None:
    if change == "no tag":
        server.tag = ""
    server.break_after, server.breaks, server.ranges = 4000, 100, False
    with pytest.raises(NotDownloaded):
        download(f"{server.address}/w.bin", tmp_path / "w.bin")
    server.breaks, server.ranges = 0, True
    other = CONTENT[::-1][: 2000 if change == "shorter" else None]
    server.files["/w.bin"] = other
    if change == "another tag":
        server.tag = '"second"'
    download(f"{server.address}/w.bin", tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == other


def test_the_hash_that_the_server_states_is_compared_and_no_secret_follows_to_another_server(
    server: FileServer, tmp_path: Path
) -> None:
    server.linked = HASH
    headers = {"Authorization": "Bearer secret"}
    assert download(f"{server.address}/w.bin", tmp_path / "w.bin", headers=headers).checked_by == "server"
    assert ["Authorization" in sent for _, sent in server.asked] == [True, False]
    server.linked = "0" * 64
    with pytest.raises(NotDownloaded, match=f"has SHA-256 {HASH}, and the server states 0000.*was removed"):
        download(f"{server.address}/w.bin", tmp_path / "again")
    assert left(tmp_path) == ["w.bin"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sha256": "1" * 64}, f"has SHA-256 {HASH}, and the list of models says 1111"),
        ({"size": 7}, r"has 10,240 bytes, and the list of models says 7: it is another file"),
    ],
)
def test_another_file_than_the_list_says(given: dict, message: str, server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(NotDownloaded, match=message):
        download(f"{server.address}/w.bin", tmp_path / "w.bin", **given)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("status", "missing"), [(404, True), (403, True), (410, True), (400, False)])
def test_an_answer_that_is_no_file(status: int, missing: bool, server: FileServer, tmp_path: Path) -> None:
    server.status = status
    with pytest.raises(NotDownloaded, match=f"the server answers {status}") as raised:
        download(f"{server.address}/w.bin?rlkey=secret", tmp_path / "w.bin")
    assert raised.value.missing == missing and "secret" not in str(raised.value)


def test_a_web_page_in_place_of_a_file(server: FileServer, tmp_path: Path) -> None:
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(NotDownloaded, match="a web page in place of the file"):
        download(f"{server.address}/w.bin", tmp_path / "w.bin")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.05")
    with pytest.raises(NotDownloaded, match=r"http://127.0.0.1:9/w\.bin: .*[Rr]efused"):
        download("http://127.0.0.1:9/w.bin", tmp_path / "w.bin")


def test_no_room_on_the_disk(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NotDownloaded, match=r"has 100 bytes of free space, and w\.bin takes 10,240 more"):
        download(f"{server.address}/w.bin", tmp_path / "w.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a device that is full, is not here")
def test_a_disk_that_fills_up_meanwhile(server: FileServer, tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "w.bin.part")
    with pytest.raises(
        NotDownloaded, match=r"No space left on device, with 0 bytes of w\.bin\. They are kept: free some"
    ):
        download(f"{server.address}/w.bin", tmp_path / "w.bin")
