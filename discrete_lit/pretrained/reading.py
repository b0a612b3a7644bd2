"""Read published files: their tensors, without executing code in them, and their configurations.

Lightning checkpoints of 2020 to 2022 hold objects of Lightning, OmegaConf and NumPy beside the weights. They are read
as empty placeholders: `weights_only=True` stays on, and nothing of those packages is imported or called.

A published configuration is kept in the reference's own argument names; `agree` refuses what contradicts the tensors.
"""

import json
import logging
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

from discrete_lit.core.files import check_published
from discrete_lit.core.trust import printable

_log = logging.getLogger(__name__)
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


class State(dict[str, Tensor]):
    """The tensors of a published file by their published names; a missing one is the user's mistake."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(tensors)
        self.source = source

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"{self.source!r} has no key {key!r}")

    def count(self, template: str) -> int:
        """Count the numbers 0, 1, ... that begin a name in the place of `{}` in a template."""
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
    """Return a placeholder class for this name alone: Lightning's callback states have classes as keys."""
    if name == "collections.defaultdict":
        return _empty_dict
    if name.endswith(".AttributeDict"):
        return OrderedDict
    return type(name.rpartition(".")[2], (Placeholder,), {})


@dataclass(frozen=True)
class Averages:
    """Averaged weights that a file holds as a list without names, in the order of the model's parameters."""

    key: str
    """The key of the list in the file; a dot leads into a mapping."""
    buffers: Sequence[str]
    """Patterns of the names that are no parameters, and so are not in the list."""


def read_state(
    path: str | Path,
    wrappers: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    averages: Averages | None = None,
) -> State:
    """Read the tensors of a published file.

    Args:
        path: a safetensors file, or one written by `torch.save`.
        wrappers: keys under which the file may keep its weights, the preferred one first; a file that has none of them
            holds its tensors directly. `outer.inner` is a mapping within a mapping.
        prefixes: prefixes that training may have put before every name; they are taken off.
        averages: where the file may hold EMA weights, which then replace the others.

    Raises:
        ValueError: there is no such file; it is truncated, has pickled code or no tensors; or its EMA weights do not
            fit its parameters.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no weights at {str(path)!r}: give the file of the published checkpoint")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    averaged = None if averages is None else _inside(content, averages.key)
    for wrapper in wrappers:
        inner = _inside(content, wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not tensors by their names")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    others = [printable(name) for name in content if name not in tensors]
    if others or not tensors:
        found = f"it holds {', '.join(others[:5])}" if others else "it is empty"
        where = f" nor under {', '.join(wrappers)}" if wrappers else ""
        raise ValueError(f"{str(path)!r} does not hold tensors by their names directly{where}: {found}")
    if averages is not None and averaged is not None:
        tensors |= _named(averaged, averages, tensors, str(path))
    while found := [prefix for prefix in prefixes if all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(found[0]): value for name, value in tensors.items()}
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        _log.warning("%r has values that are not finite in %s", str(path), printable(", ".join(broken[:5])))
    return State(tensors, str(path))


def _inside(content: Any, key: str) -> Any:
    """Return the value at a dotted key of nested mappings; None if there is no such key."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _named(averaged: Any, averages: Averages, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give EMA weights, which stand in the order of the parameters, the parameters' names."""
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
            f"{source!r} holds {len(found)} averaged weights at {averages.key} for {len(own)} parameters{where}"
        )
    return dict(zip(parameters, averaged, strict=True))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is truncated or no safetensors file: {error}") from error


def _read_torch(file: Path) -> Any:
    try:
        zipped = check_published(file)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} {error}") from error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if zipped else []
        code = [name for name in unknown if not any(fnmatchcase(name, known) for known in _LEFT_BY_TRAINERS)]
        if code:
            raise ValueError(
                f"{str(file)!r} holds pickled code, which is not executed: it names {printable(', '.join(code[:5]))}. "
                "Save its state dict alone, or as safetensors"
            )
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions of the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{str(file)!r} cannot be read: it is truncated, or holds more than tensors and plain values "
            f"({type(error).__name__}: {printable(reason[0], limit=300) if reason else 'no details'})"
        ) from error


Reference = Mapping[str, Any]
# Where published files keep the arguments of the model: taming and LDM, Lightning's CLI.
_AROUND = ("config", "model", "params", "init_args")


def read_reference(config: Reference | str | Path | None, section: str | None = "vq_model") -> dict[str, Any]:
    """Read the arguments of a reference model's constructor.

    Args:
        config: the arguments, a published configuration around them, or the path of its YAML or JSON file.
        section: the part to take of a configuration with several, like those of 1d-tokenizer and MaskBit; None takes
            all of it.

    Raises:
        ValueError: there is no such file, or it holds no mapping.
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
    """Refuse a configuration that contradicts the tensors, or what all models of the family have in common.

    Args:
        reference: the arguments given by the user.
        found: the values that some of these arguments must have.
        who: what demands these values, for the message: "the tensors have".

    Raises:
        ValueError: an argument is given with another value.
    """
    for name, value in found.items():
        given = reference.get(name, value)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise ValueError(f"reference_config has {name}={given}, but {who} {value}")
