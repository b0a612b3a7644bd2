"""What a command line and its configuration files say, before any of it is checked.

The parser knows the settings that result, defaults included; this knows which of them were given, and where.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "the command line"
# Under this key a class that replaces another keeps the other's arguments: those that it accepts stay in force.
INHERITED = "\0inherited"

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class _Literal(str):
    """A name beside `class_path` or `init_args` in a file, which so is no shorthand for one inside `init_args`."""


@dataclass
class GivenSettings:
    """Nested settings as plain data; strings of the command line are not parsed."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """From a dotted path to the file, or to `COMMAND_LINE`, that gave it last."""

    def source(self, path: str) -> str | None:
        """Where the setting at a dotted path, or the nearest of its parents that has a source, was given."""
        while path and path not in self.sources:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.sources.get(path)


def read_given(arguments: Sequence[str]) -> GivenSettings:
    """Collect the settings of a command line, `--config` files included, later ones over earlier ones.

    Raises:
        ValueError: a file that is missing or is not a YAML mapping.
    """
    given = GivenSettings()
    for name, value in _options(arguments):
        if name in ("config", "c"):
            text, source = _configuration_text(value)
            merge(given, read_mapping(text, source), source)
        elif value is not None and name.partition("=")[0] not in ("help", "h", "print_config"):
            append = name.endswith("+")
            path = name.rstrip("+").split(".")
            given.sources[place(given.values, path, [value] if append else value, append)] = COMMAND_LINE
    return given


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """Parse the text of a configuration file.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values


def merge(given: GivenSettings, values: dict[str, Any], source: str) -> None:
    """Lay the settings of a file over what was given before."""
    for path, value in _leaves(values):
        append = path[-1].endswith("+")
        path = [*path[:-1], type(path[-1])(path[-1].rstrip("+"))]
        given.sources[place(given.values, path, value, append)] = source


def place(values: dict[str, Any], path: Sequence[str], value: Any, append: bool = False) -> str:
    """Set a nested value, with the shorthands that the parser knows: `init_args` left out, the last item of a list.

    Returns:
        The dotted path that the value has in full.
    """
    name, rest = path[0], path[1:]
    if "class_path" in values and name not in _CLASS_KEYS and not isinstance(name, _Literal):
        return f"init_args.{place(values.setdefault('init_args', {}), path, value, append)}"
    if rest:
        child = values.get(name)
        if isinstance(child, list) and child:
            child[-1] = inside = _as_mapping(child[-1])
            return f"{name}[{len(child) - 1}].{place(inside, rest, value, append)}"
        values[name] = inside = _as_mapping(child)
        return f"{name}.{place(inside, rest, value, append)}"
    before = values.get(name)
    if append:
        values[name] = [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]
    elif name == "class_path" and values.get("class_path", value) != value:
        values[INHERITED] = {**values.get(INHERITED, {}), **values.pop("init_args", {})}
        values[name] = value
    elif isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
        return f"{name}.{place(before, ['class_path'], value)}"
    else:
        values[name] = value
    return name


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"class_path": value}
    return value if isinstance(value, dict) else {}


def _leaves(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    # A class goes before its arguments, wherever it stands in the file: a new class drops the old one's arguments.
    literal = any(name in _CLASS_KEYS for name in values)
    for name in sorted(values, key=lambda name: name != "class_path"):
        names = str(name).split(".")
        path = (*prefix, *(map(_Literal, names) if literal else names))
        if isinstance(values[name], dict) and values[name]:
            yield from _leaves(values[name], path)
        else:
            yield path, values[name]


def _options(arguments: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    """The `--name value` and `--name=value` of a command line; None where no value follows."""
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        position += 1
        if not name.startswith("-"):
            continue
        following = arguments[position] if position < len(arguments) else None
        if equals:
            yield name.lstrip("-"), value
        elif following is None or following.startswith("--"):
            yield name.lstrip("-"), None
        else:
            position += 1
            yield name.lstrip("-"), following


def _configuration_text(value: str | None) -> tuple[str, str]:
    if value is None:
        raise ValueError("--config needs the name of a YAML file")
    if value.lstrip().startswith("{"):
        return value, "the checkpoint" if _is_json(value) else COMMAND_LINE
    try:
        return Path(value).read_text(), value
    except OSError as error:
        raise ValueError(f"--config {value}: {error.strerror or error}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
