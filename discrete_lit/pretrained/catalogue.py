"""The list of published models: names, addresses, families, tokenizers and licences.

`published.yaml` beside this file holds it; the environment variable `DISCRETE_LIT_MODELS` names lists of your own in
the same form, whose entries stand before it. Nothing here is downloaded: `obtaining.py` does that.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from discrete_lit.core.bounded_reading import read_text
from discrete_lit.core.configuration import plain_yaml

LISTS_VARIABLE = "DISCRETE_LIT_MODELS"
"""The environment variable of the files of your own lists, with the system's separator of paths between them."""
HUB = "hf://"
"""Begins the address of a file, or of a folder, on the Hugging Face Hub: `hf://owner/name/file`."""
_LIST = Path(__file__).with_name("published.yaml")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_HASH = re.compile(r"[0-9a-f]{64}")
_SCHEMES = (HUB, "https://", "http://")
_OF_A_SOURCE = ("source", "licence", "accept", "models")
_OF_A_LIST = ("published", "by_hand")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A published file: its address, and what is known of its content."""

    url: str
    """`https://…`, `http://…`, or `hf://owner/name/path`; a Hub folder where it names no file or ends with `/`."""
    name: str
    """The file's name on this machine; "" for a Hub folder."""
    sha256: str | None = None
    """SHA-256 of its bytes; None where nobody published it."""
    size: int | None = None
    """Bytes; None where they are not known."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of the Hub, with `config.json` and weights."""
        return not self.name


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A published model, as the list has it."""

    name: str
    family: str
    files: tuple[RemoteFile, ...]
    """The weights first."""
    source: str
    """The address of whoever published it."""
    reference_config: Mapping[str, Any] | None = None
    """Settings that the weights do not tell, by the reference's names; the name of a file stands for its path."""
    tokenizer: str | None = None
    """The entry of a generator's tokenizer; None where the file holds it, or where there is none."""
    licence: str | None = None
    """None where the publisher states none: see `source`."""
    accept: bool = False
    """Whether the licence must be accepted before a download."""
    image_size: int | None = None
    """Side in pixels; None for text and sound."""
    published: str = ""
    """The number that the publisher reports, such as `FID 1.95`."""

    def described(self) -> dict[str, Any]:
        """Describe the entry as plain data, for JSON and for the name of a converted checkpoint."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        files = [{item.name: getattr(file, item.name) for item in fields(file)} for file in self.files]
        return {**plain, "files": files, "reference_config": dict(self.reference_config or {}) or None}


def published_models() -> dict[str, ModelEntry]:
    """Read the list, and those of the user: entries by name, the user's first.

    Raises:
        ValueError: a list that is not there, is no YAML, or has an entry that is no model; a name that two lists of the
            user have, or a tokenizer that none has.
    """
    own = [Path(path).expanduser() for path in os.environ.get(LISTS_VARIABLE, "").split(os.pathsep) if path]
    entries: dict[str, ModelEntry] = {}
    for file in own:
        found = _read(file)
        twice = sorted(set(found) & set(entries))
        if twice:
            raise ValueError(f"{LISTS_VARIABLE}: {file} has {twice[0]}, which another list of yours has too")
        entries |= found
    entries |= {name: entry for name, entry in _read(_LIST).items() if name not in entries}
    for entry in entries.values():
        if entry.tokenizer is not None and entry.tokenizer not in entries:
            raise ValueError(f"the list has {entry.name} with tokenizer={entry.tokenizer!r}, which it has no entry for")
    return entries


def by_hand() -> dict[str, str]:
    """Read the families of which no file can be fetched by its address alone, with the reason."""
    return dict(_content(_LIST).get("by_hand") or {})


def find_model(name: str) -> ModelEntry:
    """Return the entry of this name.

    Raises:
        ValueError: there is none; the message says which are near.
    """
    entries = published_models()
    if name in entries:
        return entries[name]
    near = get_close_matches(name.lower(), entries, n=3)
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"model={name!r} is not in the list of published models: {guess}`discrete-lit models` shows all "
        f"{len(entries)}; {LISTS_VARIABLE} adds lists of your own"
    )


def matching(word: str | None, entries: Iterable[ModelEntry]) -> list[ModelEntry]:
    """Return the entries that have a word in their name, family, source or licence, whatever its case."""
    word = (word or "").lower()
    return [
        entry
        for entry in entries
        if any(word in (text or "").lower() for text in (entry.name, entry.family, entry.source, entry.licence))
    ]


def _content(file: Path) -> dict[str, Any]:
    try:
        content = plain_yaml(read_text(file))
    except FileNotFoundError:
        raise ValueError(f"{LISTS_VARIABLE}: there is no file {str(file)!r}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the list {str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content or not set(content) <= set(_OF_A_LIST):
        raise ValueError(f"the list {str(file)!r} needs `published:` with a list of sources, and has nothing else")
    return content


def _read(file: Path) -> dict[str, ModelEntry]:
    entries: dict[str, ModelEntry] = {}
    for group in _content(file).get("published") or []:
        if not isinstance(group, dict) or not isinstance(group.get("models"), dict) or "source" not in group:
            raise ValueError(f"the list {str(file)!r} has a source without `source:` or `models:`")
        _only(group, _OF_A_SOURCE, f"{file}: {group['source']}")
        shared = {key: group[key] for key in ("source", "licence", "accept") if key in group}
        for name, given in group["models"].items():
            if name in entries:
                raise ValueError(f"{file} has {name} twice")
            entries[name] = _entry(str(name), given, shared, where=f"{file}: {name}")
    return entries


def _entry(name: str, given: Any, shared: Mapping[str, Any], *, where: str) -> ModelEntry:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where} is no name of a model: small letters, digits, `_`, `.` and `-` are accepted")
    if not isinstance(given, dict) or not isinstance(given.get("family"), str) or not given.get("files"):
        raise ValueError(f"{where} needs `family:` and `files:`")
    known = {item.name for item in fields(ModelEntry)} - {"name"}
    _only(given, known, where)
    settings = {**shared, **given}
    kinds = {"reference_config": dict, "tokenizer": str, "licence": str, "accept": bool, "image_size": int}
    for key, kind in {**kinds, "published": str, "source": str}.items():
        if settings.get(key) is not None and type(settings[key]) is not kind:
            raise ValueError(f"{where} has {key}={settings[key]!r}, where a {kind.__name__} is needed")
    if not isinstance(given["files"], list):
        raise ValueError(f"{where} needs a list as `files:`")
    files = tuple(_file(file, where) for file in given["files"])
    return ModelEntry(name=name, **{**settings, "files": files})


def _file(given: Any, where: str) -> RemoteFile:
    given = {"url": given} if isinstance(given, str) else given
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        raise ValueError(f"{where} has a file without an address")
    _only(given, [item.name for item in fields(RemoteFile)], where)
    url, size, sha256 = given["url"], given.get("size"), given.get("sha256")
    if not url.startswith(_SCHEMES):
        raise ValueError(f"{where} has the address {url!r}, which must begin with one of {', '.join(_SCHEMES)}")
    if sha256 is not None and not (isinstance(sha256, str) and _HASH.fullmatch(sha256)):
        raise ValueError(f"{where} has sha256={sha256!r}, where 64 hexadecimal digits are needed")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{where} has size={size!r}, where a number of bytes is needed")
    if url.startswith(HUB):
        parts = url.removeprefix(HUB).split("/")
        if len(parts) < 2 or not all(parts[:2]) or not all(is_plain(part) for part in parts if part):
            raise ValueError(f"{where} has the address {url!r}; accepted: hf://owner/name or hf://owner/name/file")
        name = given.get("name") or (parts[-1] if len(parts) > 2 else "")
    else:
        name = given.get("name") or unquote(urlsplit(url).path.rpartition("/")[2])
        if not name:
            raise ValueError(f"{where} has the address {url!r}, which ends with no file's name: give `name:`")
    if not isinstance(name, str) or (name and not is_plain(name)):
        raise ValueError(f"{where} has name={name!r}, which is no file's name")
    return RemoteFile(url=url, name=name, sha256=sha256, size=size)


def is_plain(part: str) -> bool:
    """Tell whether a part of an address can be the name of a file or folder here."""
    return re.fullmatch(r"[\w.@+=-]+", part) is not None and part not in (".", "..")


def _only(given: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    unknown = [str(key) for key in given if key not in set(known)]
    if unknown:
        raise ValueError(f"{where} has {unknown[0]}, which is not read; accepted: {', '.join(sorted(known))}")
