"""Read published files: their tensors, without executing code in them, and without what training put around them.

Lightning checkpoints of 2020 to 2022 hold objects of Lightning, OmegaConf and NumPy beside the weights. They are read
as empty placeholders: `weights_only=True` stays on, and nothing of those packages is imported or called.
"""

import json
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from discrete_lit.core.bounded_reading import check_nesting
from discrete_lit.core.files import check_published
from discrete_lit.core.trust import printable
from discrete_lit.pretrained.flax_files import is_flax, read_flax

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
# What Hugging Face's writers call the weights in a folder: one file, or the index of several.
IN_FOLDERS = (
    *("model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# The magic number, the protocol, the machine, the content.
_OLD_PICKLES = 4
# Where trainers keep the weights in a file, the averaged ones before the trained ones.
_WRAPPERS = (
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict"),
    *("state_dict", "model", "module", "model_state_dict", "net", "network"),
)
# Parts of names that come from wrapping a module: data-parallel, compiled, sharded, with activation checkpointing.
_OF_A_WRAPPER = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


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


def read_state(path: str | Path, wrappers: Sequence[str] = (), averages: Averages | None = None) -> State:
    """Read the tensors of a published file, without what training put around them.

    A file may keep its weights under a key (`state_dict`, `model`, `ema`, ...), one within another; other keys become
    prefixes of the names, as in `generator.encoder.weight`. Wrapping a
    module (data-parallel, compiled, sharded) adds parts to the names, which are taken off wherever they stand.

    Args:
        path: a safetensors file, or one written by `torch.save`, or by Flax's `to_bytes`; or a folder of Hugging Face
            with such a file, or with the index of several.
        wrappers: keys under which a file of this kind keeps its weights, the preferred one first; then come those that
            any trainer writes. `outer.inner` is a mapping within a mapping.
        averages: where the file may hold EMA weights, which then replace the others.

    Raises:
        ValueError: there is no such file, or a folder lacks it, or one that its index names; it is truncated, has
            pickled code or no tensors; two names differ only by what wrapping added; or its EMA weights do not fit its
            parameters.
    """
    file = weights_file(Path(path))
    if file.name.endswith(".index.json"):
        content: Any = _read_shards(file)
    else:
        content = _read_file(file)
    check_nesting(content, str(path))
    averaged = None if averages is None else _inside(content, averages.key)
    keys = list(dict.fromkeys((*wrappers, *_WRAPPERS)))
    while inner := [found for key in keys if _leads_to_tensors(found := _inside(content, key), keys)]:
        content = inner[0]
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not tensors by their names")
    if not any(isinstance(value, Tensor) for value in content.values()):
        # Under keys that no trainer is known for; a key is then a prefix, of which the layout says where it begins.
        content = dict(_flat(content)) or content
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    others = [printable(name) for name in content if name not in tensors]
    if others or not tensors:
        found = f"it holds {', '.join(others[:5])}" if others else "it is empty"
        raise ValueError(
            f"{str(path)!r} does not hold tensors by their names directly nor under {', '.join(keys)}: {found}"
        )
    if averages is not None and averaged is not None:
        tensors |= _named(averaged, averages, tensors, str(path))
    unwrapped: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in _OF_A_WRAPPER)
        if plain in unwrapped:
            raise ValueError(f"{str(path)!r} has {plain!r} twice, once inside of a wrapper: {name!r}")
        unwrapped[plain] = value
    return State(unwrapped, str(path))


def weights_file(path: Path) -> Path:
    """Find the weights at a path: the file itself, or in a folder the one that has them, or the index of several.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"the folder {str(path)!r} has no weights: none of {', '.join(IN_FOLDERS)} is there")
        return found
    if not path.is_file():
        raise ValueError(f"no weights at {str(path)!r}: give the file of the published checkpoint, or its folder")
    return path


def _read_file(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return read_flax(file) if is_flax(file) else _read_torch(file)


def _read_shards(index: Path) -> dict[str, Any]:
    """Read the tensors of several files, which an index names for each."""
    try:
        files = json.loads(index.read_text())["weight_map"]
        named = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of weights: it needs a weight_map of names to files") from error
    content: dict[str, Any] = {}
    for name in named:
        # The name of a file beside the index, and of no other place.
        shard = index.parent / Path(str(name)).name
        if not shard.is_file():
            raise ValueError(f"{str(index)!r} names {printable(str(name))!r}, which is not beside it")
        content |= _read_file(shard)
    missing = sorted(set(files) - set(content))
    if missing:
        raise ValueError(f"the files of {str(index)!r} lack {printable(missing[0])!r}, which it names: one is older")
    return content


def part_of(state: State, marks: Sequence[str]) -> State | None:
    """Return the tensors whose names are those of a layout behind a common prefix, without it.

    Of a trained part and its average, under two prefixes, the average is taken. What else the file holds is not read,
    which is said in a warning.

    Args:
        state: all tensors.
        marks: names that the layout has.

    Returns:
        None if no prefix leads to them.

    Raises:
        ValueError: several prefixes do.
    """
    ends = (name.removesuffix(marks[0]) for name in state if name.endswith(f".{marks[0]}"))
    prefixes = [prefix for prefix in ends if all(prefix + mark in state for mark in marks)]
    averaged = [prefix for prefix in prefixes if "ema" in prefix]
    chosen = averaged if len(averaged) == 1 else prefixes
    if len(chosen) > 1:
        raise ValueError(f"{state.source!r} has these tensors in several parts, {', '.join(chosen)}: save one alone")
    if not chosen:
        return None
    (prefix,) = chosen
    others = {name.split(".")[0] for name in state if not name.startswith(prefix)}
    if others:
        warnings.warn(
            f"of {state.source!r} the part {prefix}* is read; the others are not: {', '.join(sorted(others))}",
            stacklevel=2,
        )
    return State(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}, state.source
    )


def _leads_to_tensors(content: Any, keys: Sequence[str]) -> bool:
    """Whether there are tensors by their names in a mapping, or in one inside of it."""
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(value, Tensor) for value in content.values()) or any(
        _leads_to_tensors(content.get(key), keys) for key in keys
    )


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of nested mappings by dotted names."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


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
    except Exception as error:  # an unknown type of numbers is a KeyError, a size beyond the memory another
        reason = printable(error, limit=300) or type(error).__name__
        raise ValueError(f"{str(file)!r} is truncated or no safetensors file: {reason}") from error


def _read_torch(file: Path) -> Any:
    try:
        zipped = check_published(file)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} {error}") from error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if zipped else _old_globals(file)
        code = [name for name in unknown if not any(fnmatchcase(name, known) for known in _LEFT_BY_TRAINERS)]
        if code:
            raise ValueError(
                f"{str(file)!r} holds pickled code, which is not executed: it names {printable(', '.join(code[:5]))}. "
                "Save its state dict alone, or as safetensors"
            )
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions of the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken file raises almost anything
        if isinstance(error, ValueError) and str(file) in str(error):
            raise
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{str(file)!r} cannot be read: it is truncated, or holds more than tensors and plain values "
            f"({type(error).__name__}: {printable(reason[0], limit=300) if reason else 'no details'})"
        ) from error


def _old_globals(file: Path) -> list[str]:
    """Return what a file of torch before 1.6 names beside torch's own: pickles one after another, then the numbers."""
    named: dict[str, None] = {}
    with file.open("rb") as stream:
        for _ in range(_OLD_PICKLES):
            try:
                named |= dict.fromkeys(_named_in_pickle(stream))
            except ValueError:
                break  # torch says what is wrong with it
    return [name for name in named if not name.startswith("torch.") and name != "collections.OrderedDict"]


def _named_in_pickle(stream: IO[bytes]) -> Iterator[str]:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)
