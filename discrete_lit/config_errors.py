"""Explain why a configuration was refused: the full path of each wrong setting, what is accepted there, who gave it.

A parser stops at the first mistake and reports it from the outside in. So the settings are read once more, as they were
given, and followed down along the arguments of each class: jsonargparse says what these are and which values fit.
"""

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser

COMMAND_LINE = "the command line"
# Under this key a class that replaces another keeps the other's arguments: those that it accepts stay in force.
INHERITED = "\0inherited"

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_NULL = ("null", "none", "None", "true", "false")
_MOST_SHOWN = 5
_MOST_LISTED = 12

Problems = list[tuple[str, str]]
"""The dotted paths of wrong settings, each with what is wrong in words that follow it."""


def explain(parser: ArgumentParser, arguments: Sequence[str], error: Exception) -> str:
    """Say in a few lines why a parser refused a command line, one for each wrong setting."""
    given = read_given(arguments)
    problems = _check_settings(_arguments(parser), given.values, "", "this command")
    if not problems:
        return "\n".join(str(error).splitlines()[:_MOST_SHOWN])
    lines = [
        f"{path} {what}{f' (from {source})' if (source := given.source(path)) else ''}"
        for path, what in problems[:_MOST_SHOWN]
    ]
    if len(problems) > _MOST_SHOWN:
        lines.append(f"and {len(problems) - _MOST_SHOWN} more")
    return "\n       ".join(lines)


@dataclass
class GivenSettings:
    """Nested settings as plain data, before any of them is checked; strings of the command line are not parsed."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """From a dotted path to the file, or to `COMMAND_LINE`, that gave it last."""

    def source(self, path: str) -> str | None:
        """Find where the setting at a dotted path, or the nearest of its parents that has a source, was given."""
        while path and path not in self.sources:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.sources.get(path)

    def lay(self, new: Mapping[str, Any], source: str, over: dict[str, Any], path: str = "") -> None:
        """Lay new settings over those at a dotted path.

        They may use jsonargparse's shorthands: dotted names, `init_args` left out, the last item of a list, `name+`.
        """
        literal = any(name in _CLASS_KEYS for name in new)
        # A class goes first, wherever it stands in the file: it sets the arguments of the class before it aside.
        for key in sorted(new, key=lambda key: key != "class_path"):
            first, _, rest = str(key).partition(".")
            value, name, inside, where = {rest: new[key]} if rest else new[key], first.rstrip("+"), over, path
            if "class_path" in over and not literal and name not in _CLASS_KEYS:
                inside, where = over.setdefault("init_args", {}), _join(path, "init_args")
            before, where = inside.get(name), _join(where, name)
            if isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
                value = {"class_path": value}
            if first.endswith("+"):
                added = value if isinstance(value, list) else [value]
                inside[name] = [*before, *added] if isinstance(before, list) else added
            elif isinstance(value, dict) and value:
                if isinstance(before, list) and before:
                    inside, name, before, where = before, -1, before[-1], f"{where}[{len(before) - 1}]"
                inside[name] = {"class_path": before} if isinstance(before, str) else before or {}
                self.lay(value, source, inside[name], where)
                continue
            else:
                if name == "class_path" and before not in (None, value):
                    inside[INHERITED] = {**inside.get(INHERITED, {}), **inside.pop("init_args", {})}
                inside[name] = value
            self.sources[where] = source


def read_given(arguments: Sequence[str]) -> GivenSettings:
    """Collect the settings of a command line, `--config` files included, later ones over earlier ones.

    Raises:
        ValueError: a file that is missing or is not a YAML mapping.
    """
    given, waiting = GivenSettings(), list(arguments)
    while waiting:
        option, equals, text = waiting.pop(0).partition("=")
        name = option.lstrip("-")
        value = text if equals else waiting.pop(0) if waiting and not waiting[0].startswith("--") else None
        if option.startswith("-") and value is not None and name not in ("h", "help", "print_config"):
            given.lay(*(_read(value) if name in ("c", "config") else ({name: value}, COMMAND_LINE)), given.values)
    return given


def _read(config: str) -> tuple[dict[str, Any], str]:
    """Read a configuration file, or a configuration in place of its name, and say what to call it."""
    inline = config.lstrip().startswith("{")
    # A checkpoint's model is given as JSON.
    source = config if not inline else "the checkpoint" if config.startswith('{"') else COMMAND_LINE
    try:
        values = yaml.safe_load(config if inline else Path(config).read_text())
    except OSError as error:
        raise ValueError(f"--config {config}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"{source} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values or {}, source


def _opened(value: Any) -> Any:
    """Read the settings of a file whose name stands in place of them."""
    is_file = isinstance(value, str) and value.endswith((".yaml", ".yml")) and Path(value).is_file()
    return _read(value)[0] if is_file else value


def _arguments(parser: ArgumentParser) -> dict[str, Any]:
    """List the arguments of a parser by name: type and whether it is required; a group's are a dictionary in it."""
    found: dict[str, Any] = {}
    # There is no public list of a parser's arguments (`_actions`), nor a public name for their types (`_typehint`).
    for action in parser._actions:
        if action.default is not SUPPRESS and action.dest != "config":
            *groups, name = action.dest.split(".")
            kind = getattr(action, "_typehint", None) or action.type or Any
            reduce(lambda inside, group: inside.setdefault(group, {}), groups, found)[name] = (kind, action.required)
    return found


def _arguments_of(called: Any, skip: int = 0) -> dict[str, Any]:
    """List the arguments of a class or function without its first `skip`."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(called) else parser.add_function_arguments
    add(called, skip={skip} if skip else set(), fail_untyped=False, sub_configs=True)
    return _arguments(parser)


def _check_settings(accepted: Mapping[str, Any], values: Mapping[str, Any], path: str, owner: str) -> Problems:
    """Compare the settings at a dotted path with the arguments of `owner`."""
    problems: Problems = []
    for name, value in values.items():
        full, argument = _join(path, name), accepted.get(name)
        if argument is None:
            problems.append((full, f"is not a setting of {owner}{_suggest(name, accepted, path)}"))
        elif not isinstance(argument, dict):
            problems += _check_value(value, argument[0], full)
        elif isinstance(inside := _opened(value), Mapping):
            problems += _check_settings(argument, inside, full, owner)
    for name, argument in accepted.items():
        if name not in values and isinstance(argument, dict):
            problems += _check_settings(argument, {}, _join(path, name), owner)
        elif name not in values and argument[1]:
            problems.append((_join(path, name), f"is required by {owner}: {_describe(argument[0])}"))
    return problems


def _check_value(value: Any, kind: Any, path: str) -> Problems:
    """Compare one value with the type that its setting is annotated with."""
    origin, parts = get_origin(kind), get_args(kind)
    wrong = [(path, f"is {value!r}, accepted: {_describe(kind)}")]
    if origin in (Union, types.UnionType):
        tried = [_check_value(value, part, path) for part in parts]
        # The member that got furthest into the value is the one that was meant; but a string is more likely a number
        # gone wrong than the name of a class.
        deepest = max(tried, key=lambda problems: len(problems[0][0]) if problems else 0)
        word = isinstance(value, str) and {bool, int, float}.intersection(parts)
        return [] if not all(tried) else wrong if word or deepest[0][0] == path else deepest
    if isinstance(value, list) and inspect.isclass(origin) and issubclass(origin, Sequence | set):
        kinds = parts if origin is tuple and parts[-1] is not Ellipsis else [parts[0]] * len(value)
        items = [_check_value(*item, f"{path}[{place}]") for place, item in enumerate(zip(value, kinds, strict=False))]
        return list(chain(*items)) if len(kinds) == len(value) else wrong
    if isinstance(value, Mapping) and inspect.isclass(origin) and issubclass(origin, Mapping):
        return list(chain(*(_check_value(item, parts[1], _join(path, name)) for name, item in value.items())))
    base = parts[-1] if origin is Callable and parts else kind
    if _is_class(base):
        value = {"class_path": value} if isinstance(inside := _opened(value), str) and value not in _NULL else inside
        if is_dataclass(base) and isinstance(value, Mapping) and "class_path" not in value:
            return _check_settings(_arguments_of(base), value, path, base.__name__)
        if isinstance(value, Mapping):
            return _check_class(value, base, path, len(parts[0]) if origin is Callable else 0)
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
        parser.parse_object({"value": value})
    except (ArgumentError, ValueError):
        return wrong
    return []


def _check_class(given: Mapping[str, Any], base: type, path: str, skip: int) -> Problems:
    """Compare `{class_path, init_args}` with a base class; its first `skip` arguments are given by whoever calls it."""
    extra = [name for name in given if name not in (*_CLASS_KEYS, INHERITED)]
    known = _known_classes(base)
    if "class_path" not in given:
        extra = [name for name in extra if get_close_matches(name, _CLASS_KEYS, n=1)]
    if extra:
        return [(_join(path, extra[0]), f"is not accepted{_suggest(extra[0], _CLASS_KEYS, path)}")]
    if "class_path" not in given:
        return [(path, f"needs a class_path{_suggest('', known)}")]
    name = str(given["class_path"])
    # The bare name of a class that was imported is enough.
    module, _, last = next((item for item in known if item.rpartition(".")[2] == name), name).rpartition(".")
    found = why = None
    try:
        found = getattr(import_module(module), last, None) if module else None
        made = found if inspect.isclass(found) or found is None else inspect.signature(found).return_annotation
    except ImportError:
        pass
    if found is None:
        known += [f"{module}.{other}" for other in getattr(sys.modules.get(module), "__all__", ())]
        why = "not there"
    elif not isinstance(made, str) and not (inspect.isclass(made) and issubclass(made, base)):
        why = f"no {base.__name__}"
    elif inspect.isabstract(found):
        why, known = "abstract", _known_classes(found)
    if why:
        return [(_join(path, "class_path"), f"is {name!r}, which is {why}{_suggest(name, known)}")]
    accepted, arguments, inside = _arguments_of(found, skip), given.get("init_args") or {}, _join(path, "init_args")
    if not isinstance(arguments, Mapping):
        return [(inside, f"is {arguments!r}, accepted: the arguments of {name}")]
    kept = {key: value for key, value in given.get(INHERITED, {}).items() if key in accepted}
    kept = {key: value for key, value in kept.items() if not _check_value(value, accepted[key][0], "")}
    return _check_settings(accepted, {**kept, **arguments}, inside, name)


def _known_classes(base: type) -> list[str]:
    """List the class paths that jsonargparse's help knows for a base class: those that were imported."""
    parser = ArgumentParser()
    parser.add_argument("--value", type=base)
    listed = "".join(parser.format_help().split()).partition("knownsubclasses:")[2]
    return listed.partition(")")[0].split(",") if listed else []


def _suggest(given: str, choices: Iterable[str], path: str = "") -> str:
    """Name the choice that is nearest to what was given, else all of them; of a class path, the last part counts."""
    by_name = {choice.rpartition(".")[2].casefold(): choice for choice in sorted(choices)}
    nearest = get_close_matches(given.rpartition(".")[2].casefold(), by_name, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {_join(path, by_name[nearest[0]])}?"
    more = f" and {len(by_name) - _MOST_LISTED} more" if len(by_name) > _MOST_LISTED else ""
    return f"; accepted: {', '.join(sorted(choices)[:_MOST_LISTED])}{more}"


def _describe(kind: Any) -> str:
    """Say a type in the words of a YAML file."""
    origin, parts = get_origin(kind), get_args(kind)
    name = "null" if kind in (None, types.NoneType) else getattr(origin or kind, "__name__", str(kind))
    words = [_describe(part) for part in parts if part is not Ellipsis and origin is not Literal]
    if origin in (Union, types.UnionType, Literal):
        return " or ".join(dict.fromkeys(words or map(repr, parts)))
    if words:
        return words[-1] if origin is Callable else f"{name} of {', '.join(words)}"
    return f"a class_path of {name}" if _is_class(kind) else name


def _is_class(kind: Any) -> TypeGuard[type]:
    """Tell whether values of this type are given as `{class_path, init_args}`."""
    simple = ("builtins", "datetime", "pathlib", "os", "jsonargparse.typing")
    return inspect.isclass(kind) and get_origin(kind) is None and kind.__module__ not in simple


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
