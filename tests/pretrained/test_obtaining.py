"""From a published name to a checkpoint and to pictures, against a web server of this machine."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.file_server import FileServer, serving
from helpers.golden import Case
from helpers.golden_cases import cases_of
from safetensors.torch import save as to_safetensors

import discrete_lit
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.catalogue import LISTS_VARIABLE
from discrete_lit.pretrained.downloads import NotDownloaded
from discrete_lit.pretrained.obtaining import CACHE_VARIABLE, LICENCE_VARIABLE, cache_folder, obtain, record_of


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that stands for the Hub and for all others; the cache is empty."""
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "1")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", LICENCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


@pytest.fixture
def listed(
    server: FileServer, tmp_path: Path, taming_state: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """`listed(**settings)`: a list with `vq`, a taming VQGAN on the Hub, with these settings; its file is served."""
    server.files["/owner/name/resolve/main/last.ckpt"] = torch_bytes({"state_dict": taming_state()})

    def write(models: dict[str, Any] | None = None, **settings: Any) -> None:
        own = {"vq": {"family": "taming_vqgan", "files": ["hf://owner/name/last.ckpt"], **settings}, **(models or {})}
        content = {"published": [{"source": "https://example.org", "models": own}]}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
        monkeypatch.setenv(LISTS_VARIABLE, str(tmp_path / "own.yaml"))

    return write


def test_a_name_becomes_a_module_and_nothing_is_fetched_twice(
    listed: Callable[..., None], server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    listed()
    first = discrete_lit.load("model://vq")
    served = server.files["/owner/name/resolve/main/last.ckpt"]
    found = hashlib.sha256(served).hexdigest()
    assert f"no hash of it is published, so that its size and its form alone are checked; its SHA-256 is {found}" in (
        capsys.readouterr().err
    )
    assert (cache_folder() / "hub/owner/name/last.ckpt").read_bytes() == served
    record = record_of(obtain("model://vq"))
    assert record is not None and record["files"] == [
        {"url": "hf://owner/name/last.ckpt", "sha256": found, "size": len(served), "checked_by": "size"}
    ]
    server.files.clear()
    assert discrete_lit.load("model://vq").fingerprint() == first.fingerprint() and len(server.asked) == 1
    # Without the converted checkpoint the download is taken; without both there is nothing.
    for file in (cache_folder() / "converted").iterdir():
        file.unlink()
    assert discrete_lit.load("model://vq").fingerprint() == first.fingerprint() and len(server.asked) == 1


def test_a_known_hash_is_checked_also_of_a_file_that_somebody_put_there(
    listed: Callable[..., None], server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    served = server.files["/owner/name/resolve/main/last.ckpt"]
    file = {"url": "hf://owner/name/last.ckpt", "sha256": hashlib.sha256(served).hexdigest()}
    listed(files=[file])
    place = cache_folder() / "hub/owner/name/last.ckpt"
    place.parent.mkdir(parents=True)
    place.write_bytes(served[:-1])
    with pytest.raises(
        NotDownloaded, match=r"has SHA-256 .* and the list of models says .* remove it to download that"
    ):
        obtain("model://vq")
    place.write_bytes(served)
    assert obtain("model://vq").is_file() and not server.asked and "no hash" not in capsys.readouterr().err


def test_weights_that_are_none_leave_no_checkpoint(listed: Callable[..., None], server: FileServer) -> None:
    listed()
    server.files["/owner/name/resolve/main/last.ckpt"] = torch_bytes({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is no taming_vqgan checkpoint"):
        obtain("model://vq")
    assert not list((cache_folder() / "converted").glob("*"))


def test_without_a_network_it_says_what_to_download_and_where_to_put_it(
    listed: Callable[..., None], server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed()
    place = cache_folder() / "hub/owner/name/last.ckpt"
    address = f"{server.address}/owner/name/resolve/main/last.ckpt"
    told = f"Without a network: download {address} elsewhere, and put it at {place}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotDownloaded, match=f"HF_HUB_OFFLINE is set, and last.ckpt is not here. {told}"):
        obtain("model://vq")
    assert not server.asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.status = 404
    with pytest.raises(NotDownloaded, match=f"the server answers 404 Not Found. {told}"):
        obtain("model://vq")


def test_a_model_that_is_given_to_some_alone(
    listed: Callable[..., None], server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed()
    server.status = 401
    with pytest.raises(
        NotDownloaded, match=r"accepted its licence on .*/owner/name: do so, and name your token in HF_TOKEN"
    ):
        obtain("model://vq")
    server.status = None
    monkeypatch.setenv("HF_TOKEN", "token")
    obtain("model://vq")
    assert server.asked[-1][1]["Authorization"] == "Bearer token"


def test_a_licence_must_be_accepted_before_anything_is_fetched(
    listed: Callable[..., None], server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(accept=True, licence="CC-BY-NC-4.0")
    told = r"vq is published under a licence that you must accept, CC-BY-NC-4\.0: read it at https://example\.org, then"
    with pytest.raises(ValueError, match=told):
        obtain("model://vq")
    monkeypatch.setenv(LICENCE_VARIABLE, "other")
    with pytest.raises(ValueError, match=told):
        obtain("model://vq")
    assert not server.asked
    monkeypatch.setenv(LICENCE_VARIABLE, "other, vq")
    assert obtain("model://vq") == obtain("model://vq", accept_licence=True)


def test_a_file_in_the_settings_is_given_as_its_place(
    listed: Callable[..., None], server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/owner/name/resolve/main/stats.pt"] = b"statistics"
    files = ["hf://owner/name/last.ckpt", "hf://owner/name/stats.pt"]
    listed(files=files, reference_config={"ckpt_path": "stats.pt", "n_embed": 16})
    given: list[Any] = []
    monkeypatch.setattr(
        "discrete_lit.pretrained.obtaining.load_pretrained",
        lambda weights, family, settings, tokenizer: (
            given.append(settings),
            load_pretrained(weights, family, settings, tokenizer),
        )[1],
    )
    obtain("model://vq")
    assert given == [{"ckpt_path": str(cache_folder() / "hub/owner/name/stats.pt"), "n_embed": 16}]
    assert (cache_folder() / "hub/owner/name/stats.pt").read_bytes() == b"statistics"


def test_a_folder_of_the_hub_in_one_file_or_in_several(
    listed: Callable[..., None], server: FileServer, taming_state: Callable[..., Any]
) -> None:
    state = taming_state()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    inside = {"model.safetensors.index.json": json.dumps(index).encode()}
    inside |= {file: to_safetensors({name: state[name] for name in own}) for file, own in halves.items()}
    server.files |= {f"/owner/several/resolve/main/{name}": content for name, content in inside.items()}
    server.files["/owner/one/resolve/main/model.safetensors"] = to_safetensors(state)
    server.files["/owner/one/resolve/main/config.json"] = b'{"n_embed": 16}'
    own = {name: {"family": "taming_vqgan", "files": [f"hf://owner/{name}"]} for name in ("one", "several", "none")}
    listed(own)
    first, second = discrete_lit.load("model://one"), discrete_lit.load("model://several")
    assert first.fingerprint() == second.fingerprint()
    assert (cache_folder() / "hub/owner/one/config.json").is_file()
    with pytest.raises(NotDownloaded, match="/owner/none has no weights: none of model"):
        obtain("model://none")


def test_an_own_folder_on_the_hub(
    server: FileServer, tmp_path: Path, taming_state: Callable[..., Any], listed: Callable[..., None]
) -> None:
    listed()
    module = discrete_lit.load("model://vq")
    discrete_lit.save_pretrained(module, tmp_path / "folder", licence="mit")
    for revision in ("main", "v2"):
        for file in (tmp_path / "folder").iterdir():
            server.files[f"/me/mine/resolve/{revision}/{file.name}"] = file.read_bytes()
    for address in ("hf://me/mine", "hf://me/mine@v2", str(tmp_path / "folder")):
        assert discrete_lit.load(address).fingerprint() == module.fingerprint()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "is a folder of 'transformers'"),
        ({"_diffusers_version": "0.1", "_class_name": "UNet"}, "is a folder of 'diffusers'"),
        ({"library_name": "other"}, "is a folder of 'other'"),
        ([1], "is a folder of 'another library'"),
        (None, "has no config.json"),
    ],
)
def test_a_folder_of_another_library(config: Any, message: str, server: FileServer) -> None:
    if config is not None:
        server.files["/me/mine/resolve/main/config.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match=f"hf://me/mine.*{message}"):
        discrete_lit.load("hf://me/mine")
    assert not any("safetensors" in path for path, _ in server.asked)


def test_a_folder_of_a_published_model_is_told_by_its_name(listed: Callable[..., None], server: FileServer) -> None:
    server.files["/owner/one/resolve/main/config.json"] = b'{"n_embed": 16}'
    listed({"known": {"family": "taming_vqgan", "files": ["hf://owner/one"]}})
    with pytest.raises(ValueError, match="it is model://known of the published models"):
        discrete_lit.load("hf://owner/one")


@pytest.mark.parametrize("address", ["hf://me", "hf://me/mine/file", "hf://../x", "hf://me/"])
def test_an_address_that_is_no_folder(address: str, server: FileServer) -> None:
    with pytest.raises(ValueError, match="is no folder of the Hub; accepted: hf://owner/name"):
        obtain(address)


@pytest.mark.parametrize("case", cases_of(["rar"])[:1])
def test_from_a_name_to_pictures(
    case: Case, server: FileServer, listed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sample --model NAME`, with the tiny weights of the reference's code in the place of the published ones."""
    from discrete_lit.cli.commands import main

    tokenizer = Case(case.file.parents[1] / "maskgit_vqgan" / "a.safetensors")
    server.files["/owner/name/resolve/main/rar.bin"] = torch_bytes(dict(case.state))
    server.files["/owner/name/resolve/main/vq.bin"] = torch_bytes(dict(tokenizer.state))
    listed(
        {
            "tiny_vq": {"family": "maskgit_vqgan", "files": ["hf://owner/name/vq.bin"]},
            "tiny_rar": {
                "family": "rar",
                "files": ["hf://owner/name/rar.bin"],
                "reference_config": case.arguments,
                "tokenizer": "tiny_vq",
            },
        }
    )
    arguments = ["--num_samples", "2", "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    main(["sample", "--model", "tiny_rar", *arguments])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["model"]["name"] == "tiny_rar" and run["generator"] == "Autoregressive"
    assert (tmp_path / "out" / "grid.png").is_file()
    with pytest.raises(SystemExit):
        main(["sample", "--model", "tiny-rar", *arguments])
    assert "did you mean 'tiny_rar'" in capsys.readouterr().err
