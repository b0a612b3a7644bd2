"""What goes wrong between a published name and a picture, as the command line says it: in a line."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.file_server import FileServer, serving
from helpers.tiny_runs import refusal

from discrete_lit.pretrained.catalogue import LISTS_VARIABLE
from discrete_lit.pretrained.obtaining import CACHE_VARIABLE, LICENCE_VARIABLE

CONTENT = bytes(range(256)) * 40
FILE = "/owner/name/resolve/main/last.ckpt"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that stands for the Hub, and a list with models of it: `mine`, `hashed`, and `asks` with a licence."""
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.2")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", LICENCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    one = {"family": "taming_vqgan", "files": [f"hf://{FILE[1:].replace('resolve/main/', '')}"]}
    hashed = {**one, "files": [{"url": one["files"][0], "sha256": "1" * 64}]}
    models = {"mine": one, "hashed": hashed, "asks": {**one, "accept": True, "licence": "CC-BY-NC-4.0"}}
    own = {"published": [{"source": "https://example.org", "models": models}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setenv(LISTS_VARIABLE, str(tmp_path / "own.yaml"))
    with serving({FILE: CONTENT}) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


def broken(server: FileServer, _: pytest.MonkeyPatch) -> None:
    server.break_after, server.breaks, server.ranges = 4000, 100, False


def no_disk(_: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def no_network(_: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def another_library(server: FileServer, _: pytest.MonkeyPatch) -> None:
    server.files["/owner/name/resolve/main/config.json"] = b'{"model_type": "llama"}'


def nothing(*_: Any) -> None: ...


@pytest.mark.parametrize(
    ("model", "wrong", "message"),
    [
        pytest.param("mine", broken, "broke off after 4,000 bytes again and again", id="a broken download"),
        pytest.param("hashed", nothing, "and the list of models says 1111", id="a hash that differs"),
        pytest.param("mine", nothing, "last.ckpt", id="a file that is no checkpoint"),
        pytest.param("mine", no_disk, "has 100 bytes of free space, and last.ckpt takes 10,240 more", id="no disk"),
        pytest.param("mine", no_network, "Without a network: download ", id="no network"),
        pytest.param("asks", nothing, "a licence that you must accept, CC-BY-NC-4.0", id="a licence"),
        pytest.param("mime", nothing, "did you mean 'mine'", id="a name that is nearly right"),
        pytest.param("hf://owner/name", another_library, "is a folder of 'transformers'", id="another library"),
    ],
)
def test_is_said_in_a_line(
    model: str,
    wrong: Callable[[FileServer, pytest.MonkeyPatch], None],
    message: str,
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wrong(server, monkeypatch)
    source = "--ckpt_path" if model.startswith("hf://") else "--model"
    said = refusal(capfd, "sample", source, model, "--num_samples", 1, "--output", tmp_path / "out")
    assert message in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "cache").rglob("converted/*.*"))
