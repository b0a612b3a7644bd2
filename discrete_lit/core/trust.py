"""Decide what a checkpoint may build, before anything that it names is imported or called.

A checkpoint's configuration is data that may come from anybody. Its class paths may name the parts of a model that
`discrete_lit` defines, PyTorch's optimizers and learning-rate schedules, and the classes of modules that the user
named: by `--trust` of the command, by `trusting` or the `trust` of `discrete_lit.load` in Python, or under `model` of
their own configuration. Everything else is refused: functions, callables of any kind, classes without a package, other
packages.

There are two locks. `check_config` reads the whole configuration as plain data and decides. `only_trusted_imports` then
holds jsonargparse, which imports what a string names wherever a setting wants a class or a callable, to the same list.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import _common as jsonargparse_common
from yaml import YAMLError

from discrete_lit.core.bounded_reading import read_text
from discrete_lit.core.configuration import current_names, plain_yaml

# Where the parts of a model are defined. The rest of the package reads data, runs commands or unpickles known files.
_MODEL_PACKAGES = (
    "discrete_lit.backbones",
    "discrete_lit.diffusion",
    "discrete_lit.evaluation.classifier",
    "discrete_lit.generators",
    "discrete_lit.optimization",
    "discrete_lit.samplers",
    "discrete_lit.tokenizers",
)
_OPTIMIZERS = "torch.optim"
# The functions that a configuration may name, by where they are defined.
_FUNCTIONS = (
    "discrete_lit.generators.generator.generator_from_checkpoint",
    "discrete_lit.tokenizers.tokenizer.continuous_from_checkpoint",
    "discrete_lit.tokenizers.tokenizer.from_checkpoint",
)
# They do nothing without a function, which no data can give.
_NEED_A_FUNCTION = ("LambdaLR", "MultiplicativeLR")
_PLAIN = (type(None), bool, int, float, str)
# A generator with a tokenizer of its own has about 300 values, 10 deep.
_MOST_VALUES, _DEEPEST = 100_000, 40
_LONGEST, _MOST_MODULES = 120, 5
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


class NotTrusted(ValueError):
    """A checkpoint names classes of modules that the user has not trusted."""


class NotBuildable(ValueError):
    """A checkpoint names something that no checkpoint may build, whatever the user trusts."""


@contextmanager
def trusting(*modules: str) -> Iterator[None]:
    """Trust modules inside the block: a checkpoint may name the classes that they and their submodules define.

    Args:
        modules: full names, such as `my_tokenizer` or `my_package.models`.

    Raises:
        ValueError: not the name of a module, or one of Python's own modules, which hold no part of a model.

    Example:

        with trusting("my_tokenizer"):
            tokenizer = discrete_lit.tokenizers.from_checkpoint("runs/mine/checkpoints/last.ckpt")
    """
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"trust={printable(name)!r} is not the name of a module, such as my_package.models")
        if _is_standard(name):
            raise ValueError(f"trust={name!r} is a module of Python itself, which holds no part of a model")
    token = _trusted.set((*_trusted.get(), *modules))
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def importable_from_here(names: Iterable[str]) -> Iterator[None]:
    """Find the modules that the user named in the current folder too, inside the block.

    A console script's path has no current folder. It is put last, and only where a module of one of these names lies
    there that is found nowhere else; what a checkpoint names is decided by name, so it cannot reach a file there.

    Args:
        names: full names of modules or of classes in them.
    """
    folder = Path.cwd()
    parts = [name.split(".") for name in names]
    # A name that was imported already is found; asking for its spec may fail where it has none, as `__main__`.
    missing = {top for top, *_ in parts if top.isidentifier() and top not in sys.modules and find_spec(top) is None}
    # A folder that only has the name, such as one of data, is no package.
    here = any(
        folder.joinpath(*name[:depth]).with_suffix(".py").is_file() or any(folder.joinpath(*name[:depth]).glob("*.py"))
        for name in parts
        if name[0] in missing
        for depth in range(1, len(name) + 1)
    )
    if here:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if here and str(folder) in sys.path:
            sys.path.reverse()
            sys.path.remove(str(folder))
            sys.path.reverse()


def named_by_user(values: Any) -> list[str]:
    """List the import paths, such as of classes, in settings that the user gave: plain data of any depth.

    Settings that stand as a text, or as the name of a YAML file, in the place of others are read too.
    """
    found, waiting, seen = [], [values], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # an alias of YAML stands for one object
            waiting += value.values() if isinstance(value, Mapping) else value
        elif isinstance(value, str):
            is_file = value.endswith((".yaml", ".yml"))
            if _IMPORT_PATH.fullmatch(value) and not is_file:
                found.append(value)
            elif is_file or value.lstrip().startswith(("{", "[")):
                with suppress(OSError, ValueError, YAMLError):
                    read = plain_yaml(read_text(value) if is_file else value)
                    waiting += [read] if isinstance(read, Mapping | list) else []
    return found


def modules_of(names: Iterable[str]) -> list[str]:
    """List the modules that class paths of the user's own model lie in, which are trusted, except Python's and torch's.

    A name such as `torch.float32` or `torch.nn.GELU` must not open all of torch to a checkpoint.
    """
    return [name.rpartition(".")[0] for name in names if not _is_standard(name) and not name.startswith("torch.")]


def check_config(config: Any, source: str) -> dict[str, Any]:
    """Decide whether everything that a checkpoint's configuration names may be built, and return it in today's names.

    Nothing is called, and only modules of `discrete_lit` and of those that the user trusts are imported.

    Args:
        config: `{"class_path": ..., "init_args": ...}` as a checkpoint holds it.
        source: what it comes from, for messages: the checkpoint's path.

    Raises:
        ValueError: it is not plain data, or names something that no checkpoint may build.
        NotTrusted: it names a class of a module that the user has not trusted; the message says where, and what to add.
    """
    check_plain(config, source)
    config = current_names(config)
    unknown: dict[str, str] = {}
    for path, key, value in _walk(config):
        if key == "class_path":
            if _may_be_the_users(value):
                unknown[value] = path
            else:
                _check_class(value, path, source)
        elif key == "dict_kwargs" and value:
            raise ValueError(f"{source!r} gives {printable(path)}, which a checkpoint may not: use init_args")
        elif isinstance(value, str) and "class_path" in value:
            raise ValueError(f"{source!r} hides a class path in a string, at {printable(path)}")
        elif isinstance(value, str) and _IMPORT_PATH.fullmatch(value) and _is_allowed(value):
            # It is the name of a file, unless there is such an object.
            if _find(value) is not None:
                _check_class(value, path, source)
    if unknown:
        raise NotTrusted(_untrusted(list(unknown), next(iter(unknown.values())), source))
    return config


def check_plain(config: Any, source: str) -> None:
    """Refuse what is not plain data, and what is too large or too deep to be a configuration; values may be shared.

    Raises:
        ValueError: which of these it is.
    """
    waiting, count = [(config, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            limits = f"more than {_MOST_VALUES:,} values or {_DEEPEST} levels"
            raise ValueError(f"{source!r} has a configuration of {limits}: it describes no model")
        if isinstance(value, Mapping):
            strange = [key for key in value if not isinstance(key, str | int)]
            if strange:
                raise ValueError(f"{source!r} has a {type(strange[0]).__name__} for a key in its configuration")
            waiting += [(inside, depth + 1) for inside in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(inside, depth + 1) for inside in value]
        elif not isinstance(value, _PLAIN):
            raise ValueError(f"{source!r} has a {type(value).__name__} in its configuration, which is not plain data")


@contextmanager
def only_trusted_imports() -> Iterator[None]:
    """Let jsonargparse import nothing inside the block, for any value, but what `check_config` allows.

    It has such a policy, but one that can only grow, for the whole process; here the earlier one is put back.
    """
    settings = jsonargparse_common.parsing_settings
    before = {name: settings[name] for name in ("import_path_verdicts", "import_paths_enforced")}
    allowed = dict.fromkeys((*_MODEL_PACKAGES, _OPTIMIZERS, *_trusted.get()), True)
    settings.update(import_path_verdicts={"*": False, **allowed}, import_paths_enforced=True)
    try:
        yield
    finally:
        settings.update(before)


def refusal(error: BaseException, source: str) -> ValueError | None:
    """Make the error that says what to do about an import that `only_trusted_imports` denied; None for other errors."""
    denied = re.search(r"Importing '([\w.]+)' is not allowed", str(error))
    if denied is None:
        return None
    kind = NotTrusted if _may_be_the_users(denied[1]) else NotBuildable
    return kind(_untrusted([denied[1]], "", source))


def printable(text: Any, limit: int = _LONGEST) -> str:
    """Return text of a file in one line that is safe for a terminal: cut to `limit`, control characters escaped."""
    words = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text)[: limit + 1])
    return words if len(words) <= limit else f"{words[:limit]}..."


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield each value of plain data: its dotted path, the last part of its key, itself."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, inside in items:
        where = f"{path}.{key}" if path and isinstance(key, str) else str(key) if not path else f"{path}[{key}]"
        yield where, str(key).rpartition(".")[2], inside
        if isinstance(inside, Mapping | list | tuple):
            yield from _walk(inside, where)


def _check_class(name: Any, path: str, source: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{source!r}: {printable(path)} is a {type(name).__name__}, not the path of a class")
    where = f"{printable(path)} is {printable(name)!r}"
    if not _IMPORT_PATH.fullmatch(name):
        raise ValueError(f"{source!r}: {where}, which is not a full class path, such as discrete_lit.tokenizers.FSQ")
    if not _is_allowed(name):
        raise ValueError(_untrusted([name], path, source))
    found = _find(name)
    if found is None:
        raise ValueError(f"{source!r}: {where}, which is not there")
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if defined in _FUNCTIONS:
        return
    if not inspect.isclass(found):
        raise ValueError(f"{source!r}: {where}, which is no class: a checkpoint may not name a function")
    if found.__name__ in _NEED_A_FUNCTION and _inside(defined, (_OPTIMIZERS,)):
        raise ValueError(
            f"{source!r}: {where}, which needs a function, and a checkpoint may not name one: give the model in a "
            "configuration of your own"
        )
    if not _is_allowed(defined):
        raise ValueError(_untrusted([defined], path, source))


def _untrusted(names: list[str], path: str, source: str) -> str:
    """Say that a checkpoint names what it may not, the first of `names` at `path`, and how to allow what may be."""
    where = f"{printable(path)} is " if path else "its configuration names "
    said = f"{source!r}: {where}{printable(names[0])!r}, which a checkpoint may not build"
    if not _may_be_the_users(names[0]):
        return f"{said}: it is no part of a model"
    modules = sorted({printable(name.rpartition(".")[0]) for name in names})[:_MOST_MODULES]
    options = " ".join(f"--trust {module}" for module in modules)
    return (
        f"{said} unless you trust the code of {' and '.join(modules)}: add `{options}` to the command, or "
        f"`trust={modules}` to discrete_lit.load"
    )


def _may_be_the_users(name: Any) -> bool:
    """Tell whether an import path, which is not allowed yet, may be a class of the user's own, by its name alone."""
    if not isinstance(name, str) or not _IMPORT_PATH.fullmatch(name) or _is_allowed(name):
        return False
    return not _is_standard(name) and not name.startswith("discrete_lit.")


def _is_allowed(name: str) -> bool:
    return _inside(name, (*_MODEL_PACKAGES, _OPTIMIZERS, *_trusted.get()))


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)


def _is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _find(name: str) -> Any:
    """Find what an allowed import path names directly in its module; None where there is no such module or name."""
    module, _, last = name.rpartition(".")
    if any(part.startswith("__") for part in name.split(".")):
        return None  # `__main__` would run
    try:
        return getattr(importlib.import_module(module), last, None)
    except ModuleNotFoundError as error:
        # Only the module itself may be missing; what it imports is another mistake.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{module} cannot be imported: {error}") from error
        return None
