"""Why a configuration was refused: the full path of each wrong setting, and what is accepted there.

A parser stops at the first mistake and reports it from the outside in. This walks the given settings along the
signatures instead, down to the settings that are wrong.
"""

import argparse
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import TypeIs

from discrete_lit.given_settings import INHERITED, GivenSettings, read_mapping

_MOST_SHOWN = 5
_MOST_LISTED = 12
_UNION = "Does not validate against any of the Union subtypes"
_NO_SETTINGS = (argparse._HelpAction,)


@dataclass(frozen=True)
class Problem:
    """One wrong setting: its dotted path, and what is wrong in words that follow it."""

    path: str
    what: str


def explain(parser: ArgumentParser, given: GivenSettings, error: Exception) -> str:
    """A few lines that say why `parser` refused what was given, one for each wrong setting."""
    problems = check_settings(parser, given.values, "", "this command")
    if not problems:
        return "\n".join(str(error).splitlines()[:_MOST_SHOWN])
    lines = []
    for problem in problems[:_MOST_SHOWN]:
        source = given.source(problem.path)
        lines.append(f"{problem.path} {problem.what}{f' (from {source})' if source else ''}")
    if len(problems) > _MOST_SHOWN:
        lines.append(f"and {len(problems) - _MOST_SHOWN} more")
    return "\n       ".join(lines)


def build(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """Instantiate the classes of parsed settings; what a constructor raises comes out as it was raised."""
    try:
        return parser.instantiate(settings)
    except ValueError as error:
        original: BaseException = error
        # The parser tries every member of a union and reports that none of them could be built.
        while str(original).startswith(_UNION) and original.__cause__ is not None:
            original = original.__cause__
        if original is error:
            raise
        raise original from None


def check_settings(parser: ArgumentParser, values: Mapping[str, Any], path: str, owner: str) -> list[Problem]:
    """Compare the settings at a dotted path with the arguments of a parser, which are those of `owner`."""
    accepted = {action.dest: action for action in parser._actions if not _is_switch(action)}
    problems = _check_group(accepted, values, path, "", owner)
    for name, action in accepted.items():
        if action.required and not _holds(values, name):
            problems.append(Problem(_join(path, name), f"is required by {owner}: {_describe(_type(action))}"))
    return problems


def _check_group(
    accepted: dict[str, argparse.Action], values: Mapping[str, Any], path: str, group: str, owner: str
) -> list[Problem]:
    problems = []
    for name, value in values.items():
        full, dest = _join(path, name), _join(group, name)
        inside = [known for known in accepted if known.startswith(f"{dest}.")]
        if inside and isinstance(value, str) and Path(value).is_file():
            value = read_mapping(Path(value).read_text(), value)
        if inside and isinstance(value, Mapping):
            problems += _check_group(accepted, value, full, dest, owner)
        elif dest in accepted:
            problems += check_value(value, _type(accepted[dest]), full)
        elif not inside:
            start = f"{group}." if group else ""
            names = {known[len(start) :].split(".")[0] for known in accepted if known.startswith(start)}
            problems.append(Problem(full, f"is not a setting of {owner}{_suggest(name, names, path)}"))
    return problems


def check_value(value: Any, kind: Any, path: str) -> list[Problem]:
    """Compare one value with the type that its setting is annotated with."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _check_union(value, parts, path)
    if isinstance(value, str) and Path(value).suffix in (".yaml", ".yml") and Path(value).is_file():
        value = read_mapping(Path(value).read_text(), value)
    if origin is Callable and _is_class(parts[-1]) and _names_class(value):
        skip = len(parts[0]) if isinstance(parts[0], list) else 0
        return _check_class(value, parts[-1], path, skip)
    if isinstance(value, list) and isinstance(origin, type) and issubclass(origin, Sequence | set) and parts:
        if origin is tuple and parts[-1] is not Ellipsis:
            return _collect(_each(value, parts, path)) if len(parts) == len(value) else _check_leaf(value, kind, path)
        return _collect(_each(value, [parts[0]] * len(value), path))
    if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping) and len(parts) == 2:
        return _collect(check_value(item, parts[1], _join(path, str(name))) for name, item in value.items())
    if _is_class(kind) and is_dataclass(kind) and isinstance(value, Mapping) and "class_path" not in value:
        return check_settings(_parser_of(kind, 0), value, path, class_name(kind))
    if _is_class(kind) and _names_class(value):
        return _check_class(value, kind, path, 0)
    return _check_leaf(value, kind, path)


def _check_union(value: Any, kinds: Sequence[Any], path: str) -> list[Problem]:
    """No problem if one member accepts the value, else those of the member that got furthest into it."""
    simple = {bool, int, float}.intersection(kinds)
    deepest: list[Problem] = []
    for kind in kinds:
        problems = check_value(value, kind, path)
        if not problems:
            return []
        if simple and isinstance(value, str):
            continue  # more likely a number gone wrong than the name of a class
        if problems[0].path != path and len(problems[0].path) > (len(deepest[0].path) if deepest else 0):
            deepest = problems
    return deepest or [_wrong_value(value, Union[tuple(kinds)], path)]  # noqa: UP007


def _check_leaf(value: Any, kind: Any, path: str) -> list[Problem]:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
        parser.parse_object({"value": value})
    except (argparse.ArgumentError, ValueError):
        return [_wrong_value(value, kind, path)]
    return []


def _wrong_value(value: Any, kind: Any, path: str) -> Problem:
    return Problem(path, f"is {value!r}, accepted: {_describe(kind)}")


def _check_class(value: Any, base: type, path: str, skip: int) -> list[Problem]:
    """Compare `{class_path, init_args}` with a base class; its first `skip` arguments are given by whoever calls it."""
    specification: dict[str, Any] = {"class_path": value} if isinstance(value, str) else dict(value)
    inherited: dict[str, Any] = specification.pop(INHERITED, {})
    if "class_path" not in specification:
        names = ("class_path", "init_args")
        close = [name for name in specification if get_close_matches(name, names, n=1)]
        if close:
            return [Problem(_join(path, close[0]), f"is not accepted{_suggest(close[0], names, path)}")]
        return [Problem(path, f"needs a class_path: {_listing(class_name(known) for known in _subclasses(base))}")]
    extra = sorted(set(specification) - {"class_path", "init_args", "dict_kwargs"})
    if extra:
        names = ("class_path", "init_args")
        return [Problem(_join(path, extra[0]), f"is not accepted beside class_path{_suggest(extra[0], names, path)}")]
    given = specification["class_path"]
    found = resolve_class(given, base)
    if found is None:
        return [Problem(_join(path, "class_path"), f"is {given!r}, which is not there{_suggest_class(given, base)}")]
    if not _makes(found, base):
        known = _suggest_class(given, base)
        return [Problem(_join(path, "class_path"), f"is {given!r}, which is no {base.__name__}{known}")]
    if inspect.isabstract(found):
        return [Problem(_join(path, "class_path"), f"is {given!r}, which is abstract{_suggest_class(given, found)}")]
    parser, inside, owner = _parser_of(found, skip), _join(path, "init_args"), class_name(found)
    arguments: Any = specification.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        return [Problem(inside, f"is {arguments!r}, accepted: the arguments of {owner}")]
    accepted = {action.dest: action for action in parser._actions}
    kept = {
        name: item
        for name, item in inherited.items()
        if name in accepted and not check_value(item, _type(accepted[name]), "")
    }
    return check_settings(parser, {**kept, **arguments}, inside, owner)


def resolve_class(name: str, base: type) -> Any:
    """The class or function of a `class_path`, or None; the bare name of an imported subclass is enough."""
    module_name, _, last = name.rpartition(".")
    if not module_name:
        return next((known for known in _subclasses(base, abstract=True) if known.__name__ == name), None)
    try:
        return getattr(import_module(module_name), last, None)
    except ImportError:
        return None


def class_name(found: Any) -> str:
    """The shortest path that a class or function can be imported from."""
    parts = found.__module__.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if getattr(sys.modules.get(package), found.__name__, None) is found:
            return f"{package}.{found.__name__}"
    return f"{found.__module__}.{found.__qualname__}"


def _parser_of(found: Any, skip: int) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    skipped: set[str | int] = {skip} if skip else set()
    if inspect.isclass(found):
        parser.add_class_arguments(found, skip=skipped, fail_untyped=False, sub_configs=True)
    else:
        parser.add_function_arguments(found, skip=skipped, fail_untyped=False, sub_configs=True)
    return parser


def _makes(found: Any, base: type) -> bool:
    if inspect.isclass(found):
        return issubclass(found, base)
    result = inspect.signature(found).return_annotation if callable(found) else None
    return isinstance(result, str) or (inspect.isclass(result) and issubclass(result, base))


def _subclasses(base: type, abstract: bool = False) -> list[type]:
    """The class and all its public subclasses that were imported, without abstract ones."""
    found, waiting = [], [base]
    while waiting:
        current = waiting.pop()
        waiting += current.__subclasses__()
        public = "<locals>" not in current.__qualname__ and "._" not in f"{current.__module__}.{current.__name__}"
        if current not in found and public and (abstract or not inspect.isabstract(current)):
            found.append(current)
    return found


def _suggest_class(given: str, base: type) -> str:
    choices = {class_name(known) for known in _subclasses(base) if known is not base}
    module = sys.modules.get(given.rpartition(".")[0])
    for name in getattr(module, "__all__", ()):
        candidate = getattr(module, name)
        if callable(candidate) and _makes(candidate, base):
            choices.add(class_name(candidate))
    by_name: dict[str, str] = {}
    for choice in sorted(choices):
        by_name.setdefault(choice.rpartition(".")[2].casefold(), choice)
    nearest = get_close_matches(given.rpartition(".")[2].casefold(), by_name, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {by_name[nearest[0]]}?"
    return f"; known: {_listing(choices)}" if choices else ""


def _suggest(name: str, names: Iterable[str], path: str) -> str:
    nearest = get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {_join(path, nearest[0])}?"
    return f"; accepted: {_listing(names)}"


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _describe(kind: Any) -> str:
    """A type in the words of a YAML file."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is None or kind is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, parts)))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Callable:
        return f"a class_path of {_describe(parts[-1])}"
    if parts:
        name = getattr(origin, "__name__", str(origin))
        return f"{name} of {', '.join(_describe(part) for part in parts if part is not Ellipsis)}"
    if _is_class(kind):
        name = kind.__name__
        return f"the settings of {name}" if is_dataclass(kind) else f"a class_path of {name}"
    return getattr(kind, "__name__", str(kind))


def _is_class(kind: Any) -> TypeIs[type]:
    """Whether values of this type are given as `{class_path, init_args}`."""
    simple = kind.__module__ in ("builtins", "datetime", "pathlib", "os", "jsonargparse.typing") if kind else True
    return inspect.isclass(kind) and not simple and get_origin(kind) is None


def _names_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, str) and value not in ("null", "none", "None", "true", "false")


def _is_switch(action: argparse.Action) -> bool:
    return (
        isinstance(action, _NO_SETTINGS)
        or action.dest in ("config", argparse.SUPPRESS)
        or (action.dest.endswith(".help") or action.dest == "print_config")
    )


def _type(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", None) or action.type or Any


def _holds(values: Mapping[str, Any], dotted: str) -> bool:
    current: Any = values
    for name in dotted.split("."):
        if not isinstance(current, Mapping) or name not in current:
            return False
        current = current[name]
    return True


def _each(values: Sequence[Any], kinds: Sequence[Any], path: str) -> Iterable[list[Problem]]:
    return (
        check_value(item, kind, f"{path}[{place}]")
        for place, (item, kind) in enumerate(zip(values, kinds, strict=True))
    )


def _collect(found: Iterable[list[Problem]]) -> list[Problem]:
    return [problem for problems in found for problem in problems]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
