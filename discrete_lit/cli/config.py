"""Explain why a configuration was refused: the full path of each wrong setting, what is accepted there, who gave it.

A parser stops at the first mistake and reports it from the outside in. So the settings are read once more, as they were
given, and followed down along the arguments of each class: jsonargparse says what these are and which values fit.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser

from discrete_lit.cli.recipes import locate_configuration, where_recipes_are
from discrete_lit.core.bounded_reading import read_text
from discrete_lit.core.configuration import read_settings

COMMAND_LINE = "the command line"
TRUST_HELP = (
    "--trust MODULE, which may be repeated, lets a checkpoint name the classes of a module of your own; the modules of "
    "the classes under `model` in your configuration are trusted anyway. A module in the current folder is found."
)
# Under this key a class that replaces another keeps the other's arguments: those that it accepts stay in force.
INHERITED = "\0inherited"
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_MOST_SHOWN, _MOST_LISTED = 5, 12
# The command that the comment at the top of a recipe holds, over several lines where each but the last ends with a \\.
_FIRST_COMMENT = re.compile(r"# (discrete-lit (?:.*\\\n#)*.*)")
_DATA_FILE = "lightning_configs/data/imagenet256.yaml"
Settings = Mapping[str, Any]
Problems = list[tuple[str, str]]  # dotted paths of wrong settings, each with what is wrong in words that follow it


def explain(parser: ArgumentParser, arguments: Sequence[str], error: Exception) -> str:
    """Say in a few lines why a parser refused a command line, one for each wrong setting."""
    given = read_given(arguments)
    problems = _check_settings(_arguments(parser), given.values, "", "this command", {})
    sources = [f" (from {source})" if (source := given.source(path)) else "" for path, _ in problems]
    lines = [f"{path} {what}{source}" for (path, what), source in zip(problems, sources, strict=True)]
    missing = _of_data("data") if re.search(r"required:.*\bdata\b", str(error)) else ""
    lines = lines or f"{error}{missing}".splitlines()
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    advice = _how_to_run(arguments) if any(re.search("required|needs a class_path", line) for line in lines) else []
    return "\n       ".join(lines[:_MOST_SHOWN] + more + advice)


def _how_to_run(arguments: Sequence[str]) -> list[str]:
    """Quote the command that a given file begins with where it names files that were not given, the longest of them."""
    given = [option.value for option in _options(arguments) if option.is_file and option.value]
    advice: dict[str, str] = {}
    for name in given:
        if Path(name).is_file() and (found := _FIRST_COMMENT.match(read_text(name))):
            command = " ".join(found.group(1).replace("\\\n#", "").split())
            if {Path(file).name for file in re.findall(r"--config (\S+)", command)} - {
                Path(file).name for file in given
            }:
                advice[name] = command
    longest = max(advice, key=lambda name: len(advice[name]), default="")
    return [f"{longest} says how it is run: {advice[longest]}"] if longest else []


@dataclass
class GivenSettings:
    """Nested settings as plain data, before any of them is checked; strings of the command line are not parsed."""

    values: dict[str, Any] = field(default_factory=dict)
    # From a dotted path to the file, or to `COMMAND_LINE`, that gave it last.
    sources: dict[str, str] = field(default_factory=dict)

    def source(self, path: str) -> str | None:
        """Find where the setting at a dotted path, or the nearest of its parents that has a source, was given."""
        while path and path not in self.sources:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.sources.get(path)

    def lay(self, new: Settings, source: str, over: dict[str, Any], path: str = "") -> None:
        """Lay settings, which may be in jsonargparse's shorthand, over those given before at a dotted path."""
        literal = any(name in _CLASS_KEYS for name in new)
        # A class goes first, wherever it stands in the file: it sets the arguments of the class before it aside.
        for key in sorted(new, key=lambda key: key != "class_path"):
            first, _, rest = str(key).partition(".")
            value, name, inside, where = {rest: new[key]} if rest else new[key], first.rstrip("+"), over, path
            if "class_path" in over and not literal and name not in _CLASS_KEYS:
                inside, where = over.setdefault("init_args", {}), _join(path, "init_args")
            before, where = inside.get(name), _join(where, name)
            items = before if isinstance(before, list) else []
            if name == first and isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
                value = {"class_path": value}
            if first.endswith("+"):
                value = [*items, *(value if isinstance(value, list) else [value])]
            elif isinstance(value, dict) and value:
                child = items[-1] if items else before
                child = {"class_path": child} if isinstance(child, str) else child if isinstance(child, dict) else {}
                inside[name] = [*items[:-1], child] if items else child
                self.lay(value, source, child, f"{where}[{len(items) - 1}]" if items else where)
                continue
            elif name == "class_path" and before not in (None, value):
                inside[INHERITED] = {**inside.get(INHERITED, {}), **inside.pop("init_args", {})}
            inside[name] = value
            self.sources[where] = source


def files_first(arguments: Sequence[str]) -> list[str]:
    """Order a command line so that what it says wins over the files that it names, wherever they stand in it.

    Files keep their order among themselves. A file that is not there may be a recipe of the package, whose path takes
    its place. An option that gives a whole group, such as `--data ImageFolder`, goes before the options inside that
    group, such as `--data.train`.

    Raises:
        ValueError: a configuration file that cannot be read.
    """
    files: list[_Option] = []
    others: list[_Option] = []
    for option in _options(arguments):
        if option.is_file:
            if option.value is not None:
                option.name_file(locate_configuration(option.value))
                _read(option.value)
            files.append(option)
            continue
        names = [other.name.rstrip("+") for other in others]
        inside = [index for index, name in enumerate(names) if name.startswith(f"{option.name}.")]
        # Where the group was given before, the order says which of the two an inner option belongs to.
        moved = bool(inside) and option.name not in names
        others.insert(inside[0] if moved else len(others), option)
    return [text for option in (*files, *others) for text in option.texts]


def read_given(arguments: Sequence[str]) -> GivenSettings:
    """Collect the settings of a command line, later ones over earlier ones; ValueError for a broken `--config`."""
    given = GivenSettings()
    for option in _options(arguments):
        if option.name and option.value is not None and option.name not in ("h", "help", "print_config"):
            new = _read(option.value) if option.is_file else ({option.name: option.value}, COMMAND_LINE)
            given.lay(*new, given.values)
    return given


@dataclass
class _Option:
    """An option of a command line with the words that follow it."""

    name: str  # without dashes, empty for a word in front of the first option
    value: str | None
    texts: list[str]

    @property
    def is_file(self) -> bool:
        return self.name in ("c", "config")

    def name_file(self, value: str) -> None:
        """Give another value in place of its own; the words behind it stay."""
        if value != self.value:
            behind = self.texts.index(self.value) + 1 if self.value in self.texts else 1
            self.value, self.texts = value, [f"--config={value}", *self.texts[behind:]]


def _options(arguments: Sequence[str]) -> list[_Option]:
    found: list[_Option] = []
    for argument in arguments:
        option, equals, text = argument.partition("=")
        if option.startswith("-c") and option != "-c":  # its file may follow without a space
            option, equals, text = "-c", "=", argument[2:]
        is_option = option.startswith("--") or option in ("-c", "-h")
        if is_option or not found:
            found.append(_Option(option.lstrip("-") if is_option else "", text if equals else None, [argument]))
        else:
            last = found[-1]
            last.value = argument if last.value is None else last.value
            last.texts.append(argument)
    return found


def _read(config: str) -> tuple[dict[str, Any], str]:
    """Read a configuration file, or a configuration in place of its name, and say what to call it."""
    inline = config.lstrip().startswith("{")
    # A checkpoint's model is given as JSON.
    source = config if not inline else "the checkpoint" if config.startswith('{"') else COMMAND_LINE
    if not inline and ("\0" in config or (Path(config).exists() and not Path(config).is_file())):
        raise ValueError(f"--config {config}: not a file")
    try:
        text = config if inline else read_text(config)
    except (OSError, ValueError) as error:
        looked = where_recipes_are(config) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"--config {config}: {getattr(error, 'strerror', None) or error}{looked}") from error
    try:
        values = read_settings(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ValueError(f"{source} must hold `key: value` lines, it {what}")
    return values, source


def _opened(value: Any) -> Any:
    """Read the settings of a file whose name stands in place of them."""
    is_file = isinstance(value, str) and value.endswith((".yaml", ".yml")) and Path(value).is_file()
    return _read(value)[0] if is_file else value


def _arguments(called: Any, skip: int = 0) -> dict[str, Any]:
    """List the arguments of a class, function or parser by name, groups nested: type, and whether it is required."""
    parser = called if isinstance(called, ArgumentParser) else ArgumentParser(exit_on_error=False)
    if not isinstance(called, ArgumentParser):
        add = parser.add_class_arguments if inspect.isclass(called) else parser.add_function_arguments
        add(called, skip={skip} if skip else set(), fail_untyped=False, sub_configs=True)
    found: dict[str, Any] = {}
    # There is no public list of a parser's arguments (`_actions`), nor a public name for their types (`_typehint`).
    for action in parser._actions:
        if action.default is not SUPPRESS and action.dest != "config":
            *groups, name = action.dest.split(".")
            kind = getattr(action, "_typehint", None) or action.type or Any
            reduce(lambda inside, group: inside.setdefault(group, {}), groups, found)[name] = (kind, action.required)
    return found


def _check_settings(accepted: Settings, values: Settings, path: str, owner: str, inherited: Settings) -> Problems:
    """Compare the settings at a dotted path with the arguments of `owner`; required ones may be inherited."""
    problems: Problems = []
    for name in dict.fromkeys((*values, *accepted)):
        full, argument = _join(path, name), accepted.get(name)
        if argument is None:
            problems.append((full, f"is not a setting of {owner}{_suggest(name, accepted, path)}"))
        elif isinstance(argument, dict):
            inside, before = _opened(values.get(name, {})), _opened(inherited.get(name, {}))
            if isinstance(inside, Mapping) and isinstance(before, Mapping):
                problems += _check_settings(argument, inside, full, owner, before)
        elif name in values:
            problems += _check_value(values[name], argument[0], full)
        elif argument[1] and (name not in inherited or _check_value(inherited[name], argument[0], full)):
            problems.append((full, f"is required by {owner}: {_describe(argument[0])}{_of_data(full)}"))
    return problems


def _check_value(value: Any, kind: Any, path: str) -> Problems:
    """Compare one value with the type that its setting is annotated with."""
    origin, parts = get_origin(kind), get_args(kind)
    wrong = [(path, f"is {value!r}, accepted: {_describe(kind)}")]
    if origin in (Union, types.UnionType):
        tried = [(part, _check_value(value, part, path)) for part in parts]
        if not all(problems for _, problems in tried):
            return []
        # Settings were meant for a class. Of its kind the member that got furthest was meant; but a word is more likely
        # a number gone wrong than a class.
        classes = [problems for part, problems in tried if _is_class(part) or get_origin(part) is Callable]
        settings = isinstance(value, Mapping) and bool(classes)
        deepest = max(classes if settings else [problems for _, problems in tried], key=lambda found: len(found[0][0]))
        word = isinstance(value, str) and {bool, int, float}.intersection(parts)
        return wrong if word or (deepest[0][0] == path and not settings) else deepest
    if isinstance(value, list) and inspect.isclass(origin) and issubclass(origin, Sequence | set):
        kinds = parts if origin is tuple and parts[-1] is not Ellipsis else [parts[0]] * len(value)
        if len(kinds) == len(value):
            items = enumerate(zip(value, kinds, strict=True))
            return [problem for index, item in items for problem in _check_value(*item, f"{path}[{index}]")]
    base, skip = (parts[-1], 0 if parts[0] is ... else len(parts[0])) if origin is Callable and parts else (kind, 0)
    if _is_class(base):
        inside = _opened(value)
        if is_dataclass(base) and isinstance(inside, Mapping) and "class_path" not in inside:
            return _check_settings(_arguments(base), inside, path, base.__name__, {})
        if isinstance(inside, Mapping | str):
            return _check_class({"class_path": inside} if isinstance(inside, str) else inside, base, path, skip)
        if value is None:  # the parser below would take it for a setting that is not given
            return wrong
    with suppress(ArgumentError, ValueError):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=kind)
        parser.parse_object({"value": value})
        return []
    return wrong


def _check_class(given: Settings, base: type, path: str, skip: int) -> Problems:
    """Compare `{class_path, init_args}` with a base class; its first `skip` arguments are given by whoever calls it."""
    known, keys = _known_classes(base), (*_CLASS_KEYS, INHERITED)
    for name in given:
        if name not in keys and ("class_path" in given or get_close_matches(name, _CLASS_KEYS, n=1)):
            return [(_join(path, name), f"is not accepted{_suggest(name, _CLASS_KEYS, path)}")]
    if "class_path" not in given:
        return [(path, f"needs a class_path{_of_data(path)}{_suggest('', known)}")]
    name, arguments = str(given["class_path"]), given.get("init_args") or {}
    # Of a class that was imported, the bare name is enough.
    module, _, last = next((item for item in known if item.rpartition(".")[2] == name), name).rpartition(".")
    found: Any = None
    try:
        found = getattr(import_module(module), last, None)
    except ImportError as error:
        # Where the module is there, what it needs is not.
        if not f"{module}.".startswith(f"{error.name}."):
            return [(_join(path, "class_path"), f"is {name!r}, and {module} cannot be imported: {error}")]
    except (ValueError, TypeError):  # no name of a module, such as one that begins with a dot
        pass
    made = found
    if inspect.isroutine(found):
        made = None
        with suppress(ValueError):  # a function that is not written in Python may have no signature
            made = inspect.signature(found).return_annotation
    fits = isinstance(made, str) or (inspect.isclass(made) and issubclass(made, base))
    if not fits or inspect.isabstract(found):
        why = "not there" if found is None else "abstract" if fits else f"no {base.__name__}"
        beside = getattr(sys.modules.get(module), "__all__", ()) if found is None else ()
        choices = _known_classes(found) if fits else [*known, *(f"{module}.{other}" for other in beside)]
        return [(_join(path, "class_path"), f"is {name!r}, which is {why}{_suggest(name, choices)}")]
    if not isinstance(arguments, Mapping):
        return [(_join(path, "init_args"), f"is {arguments!r}, accepted: the arguments of {name}")]
    return _check_settings(_arguments(found, skip), arguments, _join(path, "init_args"), name, given.get(INHERITED, {}))


def _of_data(path: str) -> str:
    """Say where the data come from, if it is they that are missing: every recipe leaves them to a file of their own."""
    return f", as `--config` of a file such as {_DATA_FILE} beside this one gives it" if path == "data" else ""


def _known_classes(base: Any) -> list[str]:
    """List the class paths that jsonargparse's help knows for a base class: those that were imported."""
    parser = ArgumentParser()
    parser.add_argument("--value", type=base)
    listed = "".join(parser.format_help().split()).partition("knownsubclasses:")[2]
    return listed.partition(")")[0].split(",") if listed else []


def _suggest(given: str, choices: Iterable[str], path: str = "") -> str:
    """Name the choice that is nearest to what was given, else all of them; of a class path, the last part counts."""
    by_name = {choice.rpartition(".")[2].casefold(): choice for choice in sorted(choices)}
    for nearest in get_close_matches(given.rpartition(".")[2].casefold(), by_name, n=1, cutoff=0.5):
        return f"; did you mean {_join(path, by_name[nearest])}?"
    more = f" and {len(by_name) - _MOST_LISTED} more" if len(by_name) > _MOST_LISTED else ""
    return f"; accepted: {', '.join(sorted(set(choices))[:_MOST_LISTED])}{more}"


def _describe(kind: Any) -> str:
    """Say a type in the words of a YAML file."""
    origin, parts = get_origin(kind), get_args(kind)
    name = "null" if kind in (None, types.NoneType) else getattr(origin or kind, "__name__", str(kind))
    words = [_describe(part) for part in parts if part is not Ellipsis and origin is not Literal]
    if origin in (Union, types.UnionType, Literal):
        return " or ".join(dict.fromkeys(words or map(repr, parts)))
    if words:
        return words[-1] if origin is Callable else f"{name} of {', '.join(words)}"
    return f"{'the settings' if is_dataclass(kind) else 'a class_path'} of {name}" if _is_class(kind) else name


def _is_class(kind: Any) -> TypeGuard[type]:
    """Tell whether values of this type are given as `{class_path, init_args}`."""
    simple = ("builtins", "datetime", "pathlib", "os", "jsonargparse.typing")
    return inspect.isclass(kind) and get_origin(kind) is None and kind.__module__ not in simple


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
