"""From a published name to a checkpoint: download, check, convert, and keep in a cache.

- `model://NAME` is an entry of the list of published models, `catalogue.py`.
- `hf://owner/name` is a folder of the Hugging Face Hub that `discrete_lit.save_pretrained` wrote.

The cache is `DISCRETE_LIT_CACHE`, or `discrete-lit` in `XDG_CACHE_HOME`. Downloads stay in its folders `hub` and `web`
as they were published, and checkpoints in `converted`; each may be removed at any time. A file that you put there
yourself is taken as if it had been downloaded, and checked in the same way.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from discrete_lit import __version__
from discrete_lit.checkpoints import load, save
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import atomic_write_text, content_sha256, file_sha256
from discrete_lit.core.hub_folders import CONFIG, WEIGHTS, check_hub_config
from discrete_lit.core.locks import FolderInUse, FolderLock
from discrete_lit.pretrained.catalogue import HUB, ModelEntry, RemoteFile, find_model, is_plain, published_models
from discrete_lit.pretrained.conversion import find_family
from discrete_lit.pretrained.downloads import Downloaded, NotDownloaded, download
from discrete_lit.pretrained.loading import load_pretrained
from discrete_lit.pretrained.reading import IN_FOLDERS

MODEL = "model://"
"""Begins the address of an entry of the list of published models."""
CACHE_VARIABLE = "DISCRETE_LIT_CACHE"
"""The environment variable of the folder for downloads and converted checkpoints."""
LICENCE_VARIABLE = "DISCRETE_LIT_ACCEPT_LICENCE"
"""The environment variable of the names of models, with commas between them, whose licences you accept."""
_ENDPOINT_VARIABLE, _TOKEN_VARIABLE, _OFFLINE_VARIABLE = "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"
_HUB_ADDRESS = "https://huggingface.co"
_TEXT = "tokenizer.json"
_INDEX = ".index.json"
_PAUSE = 1.0


def cache_folder() -> Path:
    """Return the folder of downloads and converted checkpoints; it need not exist."""
    own, shared = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "discrete-lit"


def is_remote(address: object) -> bool:
    """Whether an address is one that `obtain` reads, and no path."""
    return isinstance(address, str) and address.startswith((MODEL, HUB))


def obtain(address: str, *, accept_licence: bool = False) -> Path:
    """Return a checkpoint that `discrete_lit.load` reads, downloaded and converted where it is not in the cache.

    Args:
        address: `model://NAME` of the list of published models, or `hf://owner/name`, with `@revision` behind it.
        accept_licence: that you accept the licences of this model and of its tokenizer, where they must be accepted.

    Raises:
        ValueError: a name that the list lacks, a licence that is not accepted, a folder of another library, or weights
            that are not those of the family.
        NotDownloaded: a file that cannot be fetched; the message says where to get it and where to put it.
    """
    if address.startswith(MODEL):
        return _convert(find_model(address.removeprefix(MODEL)), accept_licence=accept_licence)
    return _own_folder(address)


def places(entry: ModelEntry) -> list[tuple[str, Path]]:
    """Return the web address of each file of an entry, or Hub folder, and its place in the cache."""
    return [(_address(file.url), _place(file.url, file.name)) for file in entry.files]


def record_of(checkpoint: str | Path) -> dict[str, Any] | None:
    """Read what `obtain` has noted beside a checkpoint that it converted: the entry, its files and their hashes."""
    note = Path(f"{checkpoint}.json")
    return read_json(note) if note.is_file() and note.parent == cache_folder() / "converted" else None


def _convert(entry: ModelEntry, *, accept_licence: bool) -> Path:
    tokenizer = None if entry.tokenizer is None else published_models()[entry.tokenizer]
    for part in (entry, tokenizer):
        if part is not None:
            _check_licence(part, accept_licence)
    described = [part.described() for part in (entry, tokenizer) if part is not None]
    key = content_sha256(json.dumps([__version__, *described], sort_keys=True))[:12]
    folder = cache_folder() / "converted"
    path = folder / f"{entry.name}-{key}.ckpt"
    if path.is_file():
        return path
    with _alone(folder, entry.name):
        if path.is_file():
            return path
        files, checks = _fetch(entry)
        own = None if tokenizer is None else load(_convert(tokenizer, accept_licence=accept_licence))
        paths = {file.name: str(place) for file, place in files}
        weights = files[0][1]
        settings = _with_paths(dict(entry.reference_config or {}), paths) or None
        module = load_pretrained(weights, entry.family, settings, own)
        atomic_write_text(
            Path(f"{path}.json"), json.dumps({"name": entry.name, "source": entry.source, "files": checks}, indent=2)
        )
        save(module, path)
    return path


def _check_licence(entry: ModelEntry, accepted: bool) -> None:
    named = os.environ.get(LICENCE_VARIABLE, "").replace(" ", "").split(",")
    if entry.accept and not accepted and entry.name not in named:
        raise ValueError(
            f"{entry.name} is published under a licence that you must accept, {entry.licence or 'its own'}: "
            f"read it at {entry.source}, then give --accept_licence true, or {LICENCE_VARIABLE}={entry.name} in the "
            "environment"
        )


def _with_paths(settings: Any, paths: Mapping[str, str]) -> Any:
    """Put paths in the place of the names of an entry's files."""
    if isinstance(settings, dict):
        return {name: _with_paths(value, paths) for name, value in settings.items()}
    return paths.get(settings, settings) if isinstance(settings, str) else settings


def _fetch(entry: ModelEntry) -> tuple[list[tuple[RemoteFile, Path]], list[dict[str, Any]]]:
    """Download what is missing of an entry's files; return where each is, and how it was checked."""
    placed: list[tuple[RemoteFile, Path]] = []
    checks: list[dict[str, Any]] = []
    for file in entry.files:
        place = _place(file.url, file.name)
        if file.is_folder:
            texts = (_TEXT,) if find_family(entry.family).reads_text else ()
            checks += _fetch_folder(file.url, place, texts)
        else:
            checks.append(_fetch_file(file, place))
        placed.append((file, place))
    return placed, checks


def _place(url: str, name: str) -> Path:
    """Name the place of a file, or of a Hub folder, in the cache."""
    if url.startswith(HUB):
        return cache_folder() / "hub" / url.removeprefix(HUB).strip("/")
    # Addresses may differ behind the host alone by what is no name of a file.
    return cache_folder() / "web" / urlsplit(url).netloc.rpartition("@")[2] / content_sha256(url)[:12] / name


def _fetch_file(file: RemoteFile, place: Path) -> dict[str, Any]:
    """Download a file where it is not there, check one that is, and say by what it was checked."""
    address = _address(file.url)
    if place.is_file():
        found, size = file_sha256(place), place.stat().st_size
        for known, what in ((file.sha256, "SHA-256"), (file.size, "size")):
            if known is not None and known not in (found, size):
                raise NotDownloaded(
                    f"{place} has {what} {found if what == 'SHA-256' else size}, and the list of models says {known}: "
                    f"it is another file than {address}; remove it to download that"
                )
        checked = Downloaded(sha256=found, size=size, checked_by="size" if file.sha256 is None else "list")
    else:
        checked = _download(address, place, sha256=file.sha256, size=file.size)
    if checked.checked_by == "size":
        sys.stderr.write(
            f"{file.name}: no hash of it is published, so that its size and its form alone are checked; its SHA-256 is "
            f"{checked.sha256}\n"
        )
    return {"url": file.url, "sha256": checked.sha256, "size": checked.size, "checked_by": checked.checked_by}


def _fetch_folder(url: str, place: Path, beside: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Download a Hub folder: `config.json`, what else is needed, and the weights last, in one file or in several."""
    have = next((name for name in IN_FOLDERS if (place / name).is_file()), None)
    if have is None or any(not (place / name).is_file() for name in beside):
        for name in (CONFIG, *beside):
            _from_folder(url, place, name)
    if have is None:
        have = next((name for name in IN_FOLDERS if _from_folder(url, place, name) is not None), None)
    if have is None:
        raise NotDownloaded(
            f"{_address(url)} has no weights: none of {', '.join(IN_FOLDERS)} is there. {_where_to_put(url, place)}",
            missing=True,
        )
    names = [have]
    if have.endswith(_INDEX):
        listed = read_json(place / have)
        shards = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{place / have} is no index of weights: it needs a weight_map of names to files")
        names = sorted({Path(name).name for name in shards.values()})
    checks = []
    for name in names:
        file = RemoteFile(url=f"{url.rstrip('/')}/{name}", name=name)
        checks.append(_fetch_file(file, place / name))
    return checks


def _from_folder(url: str, place: Path, name: str) -> Path | None:
    """Download a file of a Hub folder; None where the folder has none of this name."""
    path = place / name
    if not path.is_file():
        try:
            _download(_address(f"{url.rstrip('/')}/{name}"), path)
        except NotDownloaded as error:
            if error.missing and "answers 404" in str(error):
                return None
            raise
    return path


def _own_folder(address: str) -> Path:
    """Download a folder of the Hub that discrete-lit wrote."""
    url = address.rstrip("/")
    parts = url.removeprefix(HUB).split("/")
    if len(parts) != 2 or not all(is_plain(part) for part in parts):
        raise ValueError(f"{address!r} is no folder of the Hub; accepted: hf://owner/name or hf://owner/name@revision")
    place = _place(url, "")
    with _alone(place.parent, place.name):
        config = _from_folder(url, place, CONFIG)
        known = [entry.name for entry in published_models().values() if any(url == file.url for file in entry.files)]
        guess = f"; it is {MODEL}{known[0]} of the published models" if known else ""
        if config is None:
            raise ValueError(
                f"{address} has no {CONFIG}: it is no folder that discrete_lit.save_pretrained wrote{guess}"
            )
        check_hub_config(read_json(config), address, guess)
        if not (place / WEIGHTS).is_file():
            _fetch_file(RemoteFile(url=f"{url}/{WEIGHTS}", name=WEIGHTS), place / WEIGHTS)
    return place


def _address(url: str) -> str:
    """Return the web address of a file, or of a folder, on the Hub; another address as it is."""
    if not url.startswith(HUB):
        return url
    endpoint = os.environ.get(_ENDPOINT_VARIABLE, _HUB_ADDRESS).rstrip("/")
    owner, name, *rest = url.removeprefix(HUB).strip("/").split("/")
    name, _, revision = name.partition("@")
    inside = f"/resolve/{revision or 'main'}/{'/'.join(rest)}" if rest else ""
    return f"{endpoint}/{owner}/{name}{inside}"


def _download(address: str, path: Path, **known: Any) -> Downloaded:
    """Download a file; where that fails, say how to do without."""
    endpoint, token = os.environ.get(_ENDPOINT_VARIABLE, _HUB_ADDRESS), os.environ.get(_TOKEN_VARIABLE)
    on_hub = address.startswith(f"{endpoint.rstrip('/')}/")
    if os.environ.get(_OFFLINE_VARIABLE, "0").lower() not in ("", "0", "false", "no"):
        raise NotDownloaded(f"{_OFFLINE_VARIABLE} is set, and {path.name} is not here. {_where_to_put(address, path)}")
    headers = {"Authorization": f"Bearer {token}"} if on_hub and token else None
    try:
        return download(address, path, headers=headers, **known)
    except NotDownloaded as error:
        if error.missing and on_hub and ("answers 401" in str(error) or "answers 403" in str(error)):
            page = address.partition("/resolve/")[0]
            raise NotDownloaded(
                f"{error}. Either there is no such model, or it is given to those alone who accepted its licence on "
                f"{page}: do so, and name your token in {_TOKEN_VARIABLE}",
                missing=True,
            ) from error
        raise NotDownloaded(f"{error}. {_where_to_put(address, path)}", missing=error.missing) from error


def _where_to_put(address: str, path: Path) -> str:
    return f"Without a network: download {_address(address)} elsewhere, and put it at {path}"


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Be the only process that works for a name; wait for one that does."""
    lock, said = FolderLock(folder, name), False
    while True:
        try:
            lock.acquire()
            break
        except FolderInUse as error:
            if not said:
                sys.stderr.write(f"{error}. Waiting for it\n")
                said = True
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        lock.release()
