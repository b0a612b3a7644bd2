"""From a published file to its tensors, without executing code of the file.

Lightning checkpoints of 2020 to 2022 hold objects of Lightning, OmegaConf and NumPy beside the weights. They are read
as empty placeholders: `weights_only=True` stays on, and nothing of those packages is imported or called.

What a published configuration says beside the weights, in the reference's own argument names.
"""

import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What trainers left beside the weights. Anything else in a file is taken for code.
_LEFT_BY_TRAINERS = (
    "pytorch_lightning.*",
    "lightning.*",
    "lightning_fabric.*",
    "omegaconf.*",
    "jsonargparse.*",
    "numpy.*",
    "argparse.Namespace",
    "collections.defaultdict",
    "pathlib.*Path",
    "typing.*",
    "datetime.*",
    "transformers.*",
    "tokenizers.*",
    "_codecs.encode",
    "copyreg._reconstructor",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("object", "int", "float", "str")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bool", "dict", "list", "tuple")),
)


_ZIP_START = b"PK\x03\x04"


class State(dict[str, Tensor]):
    """The tensors of a published file by their published names; a missing one is the user's mistake."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(tensors)
        self.source = source

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"{self.source!r} has no key {key!r}")

    def count(self, template: str) -> int:
        """How many numbers 0, 1, ... at `{}` of a template begin a name."""
        number = 0
        while any(name.startswith(f"{template.format(number)}.") for name in self):
            number += 1
        return number


class Placeholder:
    """Stands for an object that is not read: any arguments, no behaviour."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __new__(cls, *arguments: Any, **named: Any) -> "Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    return {}


def _stand_in(name: str) -> Callable[..., Any]:
    """A placeholder of a class of its own, as classes are keys of Lightning's callback states."""
    if name == "collections.defaultdict":
        return _empty_dict
    if name.endswith(".AttributeDict"):
        return OrderedDict
    return type(name.rpartition(".")[2], (Placeholder,), {})


@dataclass(frozen=True)
class Averages:
    """Averaged weights that a file holds as a list without names, in the order of the model's parameters."""

    place: str
    """Of the list in the file; a dot leads into a mapping."""
    buffers: Sequence[str]
    """Patterns of the names that are no parameters, and so have none in the list."""


def read_state(
    path: str | Path,
    wrappers: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    averages: Averages | None = None,
) -> State:
    """The tensors of a published file.

    Args:
        path: a safetensors file, or one written by `torch.save`.
        wrappers: names under which the file may keep its weights, the one to prefer first; a file that has none of
            them holds its tensors directly. `outer.inner` is a mapping within a mapping.
        prefixes: what training may have put before every name, which is taken off.
        averages: where the file may hold averaged weights, which then stand for the others.

    Raises:
        ValueError: no such file, a truncated one, one with pickled code, one without tensors, or averages that are not
            of its parameters.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no weights at {str(path)!r}: give the file of the published checkpoint")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    averaged = None if averages is None else _inside(content, averages.place)
    for wrapper in wrappers:
        inner = _inside(content, wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not tensors by their names")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    others = [str(name) for name in content if name not in tensors]
    if others or not tensors:
        found = f"it holds {', '.join(others[:5])}" if others else "it is empty"
        where = f" nor under {', '.join(wrappers)}" if wrappers else ""
        raise ValueError(f"{str(path)!r} does not hold tensors by their names directly{where}: {found}")
    if averages is not None and averaged is not None:
        tensors |= _named(averaged, averages, tensors, str(path))
    while found := [prefix for prefix in prefixes if all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(found[0]): value for name, value in tensors.items()}
    return State(tensors, str(path))


def _inside(content: Any, place: str) -> Any:
    """What stands at a place of nested mappings; None where there is no such place."""
    for name in place.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _named(averaged: Any, averages: Averages, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Averaged weights by the names of the parameters, in whose order they stand."""
    parameters = {
        name: value
        for name, value in tensors.items()
        if not any(fnmatchcase(name, pattern) for pattern in averages.buffers)
    }
    own = [tuple(value.shape) for value in parameters.values()]
    found = [tuple(value.shape) for value in averaged]
    if found != own:
        pairs = zip(parameters, own, found, strict=False)
        where = next((f"; the first that differs is at {name!r}" for name, mine, other in pairs if mine != other), "")
        raise ValueError(
            f"{source!r} holds {len(found)} averaged weights at {averages.place} for {len(own)} parameters{where}"
        )
    return dict(zip(parameters, averaged, strict=True))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is truncated or no safetensors file: {error}") from error


def _read_torch(file: Path) -> Any:
    zipped = zipfile.is_zipfile(file)
    with file.open("rb") as stream:
        if not zipped and stream.read(len(_ZIP_START)) == _ZIP_START:
            raise ValueError(f"{str(file)!r} is truncated: copy it again")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if zipped else []
        code = [name for name in unknown if not any(fnmatchcase(name, known) for known in _LEFT_BY_TRAINERS)]
        if code:
            raise ValueError(
                f"{str(file)!r} holds pickled code, which is not executed: it names {', '.join(code[:5])}. "
                "Save its state dict alone, or as safetensors"
            )
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions of the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{str(file)!r} cannot be read: it is truncated, or holds more than tensors and plain values "
            f"({type(error).__name__}: {reason[0] if reason else 'no details'})"
        ) from error


Reference = Mapping[str, Any]


# Where published files keep the arguments of the model: taming and LDM, Lightning's CLI.
_AROUND = ("config", "model", "params", "init_args")


def read_reference(config: Reference | str | Path | None, section: str | None = "vq_model") -> dict[str, Any]:
    """The arguments of a reference model's constructor.

    Args:
        config: the arguments, or a published configuration around them, or the path of its YAML or JSON file.
        section: the part that is asked for, where the configuration has several, as those of 1d-tokenizer and MaskBit;
            None for all of it.

    Raises:
        ValueError: no such file, or one that holds no mapping.
    """
    if config is None:
        return {}
    found = _read_file(Path(config)) if isinstance(config, str | Path) else dict(config)
    while section and (inner := [name for name in (*_AROUND, section) if isinstance(found.get(name), Mapping)]):
        found = dict(found[inner[0]])
    return found


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no reference_config at {str(path)!r}")
    try:
        read = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"reference_config={str(path)!r} is neither YAML nor JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"reference_config={str(path)!r} holds a {type(read).__name__}, not settings")
    return read


def agree(reference: Reference, found: Mapping[str, Any], who: str = "the tensors have") -> None:
    """Refuse a configuration that contradicts the tensors, or what every model of ours in that layout is.

    Args:
        reference: the given arguments.
        found: the same arguments as the shapes of the tensors have them.
        who: has them so, for the message.

    Raises:
        ValueError: an argument that is given with another value.
    """
    for name, value in found.items():
        given = reference.get(name, value)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise ValueError(f"reference_config has {name}={given}, but {who} {value}")
