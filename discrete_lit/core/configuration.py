"""Configurations as plain data: how YAML is read, names of earlier versions, building what a configuration describes.

A class path that was ever written into a checkpoint or stood in a shipped recipe goes on loading: it is put into
today's names before anything is built. Every rename is added to the tables here, and nowhere else.
"""

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import isnan
from typing import Any, Self, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from discrete_lit.core.bounded_reading import MOST_SETTINGS

# Packages that moved, inner ones first. Inside a package a class is found by its own name, whatever its module was.
_PACKAGES = {
    "discrete_lit.backbones.positions": "discrete_lit.backbones.embeddings",
    "discrete_lit.processes.losses": "discrete_lit.diffusion.losses",
    "discrete_lit.processes": "discrete_lit.diffusion",
    "discrete_lit.verbs": "discrete_lit.cli",
    "discrete_lit.resuming": "discrete_lit.cli.resume",
    "discrete_lit.run_folder": "discrete_lit.cli.train",
}
# Classes that left their package or have another name, by their old names, which no other class has.
_CLASSES = {
    "CavityHead": "discrete_lit.diffusion.LeaveOneOutHead",
    "ConfidenceSampler": "discrete_lit.samplers.MaskGITSampler",
    "DiagonalGaussian": "discrete_lit.tokenizers.DiagonalGaussian",
    "Drawing": "discrete_lit.samplers.SamplingContext",
    "EfficientNetLite0": "discrete_lit.metrics.EfficientNetLite0",
    "FeatureExtractor": "discrete_lit.metrics.FeatureExtractor",
    "FlowMatching": "discrete_lit.diffusion.losses.DiscreteFlowMatching",
    "GaussianBottleneck": "discrete_lit.tokenizers.GaussianBottleneck",
    "GaussianProcess": "discrete_lit.diffusion.DiscretizedGaussianProcess",
    "InceptionV3": "discrete_lit.metrics.InceptionV3",
    "PartSettings": "discrete_lit.samplers.SubTokenSettings",
    "PlaceHead": "discrete_lit.backbones.SubTokenHead",
    "ProxyDecoder": "discrete_lit.tokenizers.ProxyDecoder",
    "ReconstructionFrechet": "discrete_lit.callbacks.ImageDistance",
    "ShortSchedule": "discrete_lit.diffusion.schedules.ClippedSchedule",
    "TiTokAutoencoder": "discrete_lit.tokenizers.TiTokAutoencoder",
    "TrainingAlarm": "discrete_lit.callbacks.TrainingGuard",
    "WarmupAndFall": "discrete_lit.optimization.WarmupDecay",
}
# Arguments that have another name, by the class that takes them.
_ARGUMENTS = {
    "ConvAutoencoder": {"in_channels": "image_channels"},
    "HybridProcess": {"mask_share": "mask_fraction"},
    "MixtureProcess": {"mask_share": "mask_fraction"},
    "PatchGAN": {"in_channels": "image_channels"},
    "StyleGANDiscriminator": {"in_channels": "image_channels"},
    "TiTokAutoencoder": {"in_channels": "image_channels"},
    "Transformer": {"recompute": "activation_checkpointing"},
    "ViTAutoencoder": {"in_channels": "image_channels"},
    "WarmupCosine": {"final_share": "min_lr_factor"},
    "WarmupLinear": {"final_share": "min_lr_factor"},
}
# How jsonargparse begins to report a value that fits no member of a union, such as a class whose constructor raised.
_UNION = "Does not validate against any of the Union subtypes"
_OTHER_CLASS = re.compile("does not correspond to a subclass of|Not a valid subclass of")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
# A file with more entries than this, aliases counted as often as they are used, is no configuration.
_MOST_ENTRIES, _MOST_KEYS, _DEEPEST = 200_000, 1_000, 100
# At the beginning of a value: the environment variable that a path begins with.
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})(?=/|$)")
# What a function may return that is no part of a model.
_VALUES = (type(None), bool, bytes, dict, float, int, list, object, set, str, tuple)
_logged: set[str] = set()
_CLASS_PATH = re.compile(r"discrete_lit(\.[a-z]\w*)+\.[A-Z]\w*")


def current_class_path(path: str) -> str:
    """Return today's class path of a class of this package: `path` itself where it still leads to one.

    Args:
        path: a full class path, such as `discrete_lit.processes.AbsorbingProcess`; paths of other packages, names
            without a package and paths that never led anywhere are returned as they are.
    """
    if not _CLASS_PATH.fullmatch(path):
        return path
    package, _, name = path.rpartition(".")
    for old, new in _PACKAGES.items():
        if package == old or package.startswith(f"{old}."):
            package = new + package[len(old) :]
            break
    else:
        if _leads_somewhere(path):
            return path
    if name in _CLASSES:
        return _CLASSES[name]
    while package.count(".") > 0:
        if _leads_somewhere(f"{package}.{name}"):
            return f"{package}.{name}"
        package = package.rpartition(".")[0]
    return path


def current_names(config: Any) -> Any:
    """Return a configuration, plain data of any depth, with today's class paths and argument names."""
    if isinstance(config, str):
        return current_class_path(config)
    if isinstance(config, list | tuple):
        return type(config)(current_names(entry) for entry in config)
    if not isinstance(config, dict):
        return config
    renamed = {key: current_names(value) for key, value in config.items()}
    class_path, init_args = renamed.get("class_path"), renamed.get("init_args")
    if isinstance(class_path, str):
        renamed["class_path"] = _CLASSES.get(class_path, class_path)  # it may be named without its package
        if isinstance(init_args, dict):
            arguments = _ARGUMENTS.get(class_path.rpartition(".")[2], {})
            # An argument that is given by both names is left for the parser to refuse.
            arguments = {old: new for old, new in arguments.items() if new not in init_args}
            renamed["init_args"] = {arguments.get(name, name): value for name, value in init_args.items()}
    return renamed


def renames(old: Any, new: Any) -> Iterator[str]:
    """Yield one line for each name that `current_names` changed on the way from `old` to `new`."""
    # A name that was given without its package is no old one.
    if isinstance(old, str) and old not in (new, new.rpartition(".")[2]):
        yield f"{old} is now {new}"
    elif isinstance(old, list | tuple):
        for before, after in zip(old, new, strict=True):
            yield from renames(before, after)
    elif isinstance(old, dict):
        for (key, before), (new_key, after) in zip(old.items(), new.items(), strict=True):
            if key != new_key:
                yield f"{key} is now {new_key}"
            yield from renames(before, after)


def _leads_somewhere(path: str) -> bool:
    package, _, name = path.rpartition(".")
    try:
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # that of an earlier version has no file
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = getattr(import_module(package), name, None)
    except ModuleNotFoundError:
        return False
    # An old name that still leads to a class is not that class's own name.
    return found is not None and getattr(found, "__name__", name) == name


class BoundedLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Read YAML whose size is bounded, and in which a key stands once.

    Raises:
        yaml.YAMLError: also for a key that is given twice, where the parser would drop the first one with all that it
            holds, for a document that contains itself, or whose aliases multiply it beyond measure, and for one that is
            too long to be settings.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_SETTINGS:
            raise yaml.YAMLError(f"it has more than {MOST_SETTINGS:,} letters: those are no settings")
        # Each entry has one of these beside it; to read the text would take minutes.
        if sum(map(text.count, ",\n:[{")) > _MOST_ENTRIES:
            raise yaml.YAMLError(f"it has more than {_MOST_ENTRIES:,} entries: those are no settings")
        super().__init__(text)

    def get_single_node(self) -> Any:
        try:
            node = super().get_single_node()
        except RecursionError:
            raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels") from None
        if node is not None and _entries(node, (), {}) > _MOST_ENTRIES:
            raise yaml.YAMLError(
                f"it has more than {_MOST_ENTRIES:,} entries, aliases counted as often as they are used"
            )
        return node


class SettingsLoader(BoundedLoader):
    """Read YAML as users of this field mean it: `1e-4` is a number, `010` and `1:30` are words, `.nan` is refused.

    Raises:
        yaml.YAMLError: what `BoundedLoader` raises.
    """

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if isnan(value):
            raise yaml.YAMLError(f"{node.value!r} is no number, line {node.start_mark.line + 1}")
        return value


SettingsLoader.add_constructor("tag:yaml.org,2002:float", SettingsLoader.construct_yaml_float)

# The resolvers of YAML 1.1 without dates, base 60 and octal numbers, and with numbers such as 1e-4.
SettingsLoader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _entries(node: yaml.Node, above: tuple[int, ...], counted: dict[int, int]) -> int:
    """Count the entries of a YAML document as they are when every alias is written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError(f"it contains itself, line {node.start_mark.line + 1}")
    if len(above) > _DEEPEST:
        raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels, line {node.start_mark.line + 1}")
    if id(node) not in counted:
        within = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            if len(node.value) > _MOST_KEYS:
                raise yaml.YAMLError(
                    f"it has more than {_MOST_KEYS:,} keys in one place, line {node.start_mark.line + 1}"
                )
            first: dict[Any, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"a key is no word, line {line}")
                if key.value in first and key.value != "<<":
                    raise yaml.YAMLError(
                        f"{key.value!r} is given twice in one place, lines {first[key.value]} and {line}"
                    )
                first[key.value] = line
            counted[id(node)] = 1 + sum(_entries(value, within, counted) for _, value in node.value)
        else:
            counted[id(node)] = 1 + sum(_entries(item, within, counted) for item in node.value)
    return counted[id(node)]


def plain_yaml(text: str) -> Any:
    """Read YAML 1.1 as other programs write it, within the bounds of `BoundedLoader`.

    Raises:
        yaml.YAMLError: not YAML, or what those bounds refuse.
    """
    return yaml.load(text, Loader=BoundedLoader)


def read_settings(text: str) -> Any:
    """Read YAML as `SettingsLoader` does, in today's names and with `~` and environment variables put in.

    Of a class, keys may be dotted, such as `init_args.optimizer.init_args.lr`.

    Raises:
        yaml.YAMLError: not YAML, or a setting that is given twice.
        ValueError: a value begins with an environment variable that is not set.
    """
    return _in_current_names(_nested(_expanded(yaml.load(text, Loader=SettingsLoader))))


def use_current_names(arguments: Sequence[str]) -> list[str]:
    """Return a command line in today's names, and have every file that it leads to read by `read_settings`.

    Raises:
        ValueError: a value begins with an environment variable that is not set, or is no number (`.nan`).
    """
    if get_loader("yaml") is not _load_settings:
        set_loader("yaml", _load_settings, exceptions=(yaml.YAMLError,))
    values = [argument.partition("=")[2] if argument.startswith("-") else argument for argument in arguments]
    for argument, value in zip(arguments, values, strict=True):
        if value.lower() == ".nan":
            raise ValueError(f"{argument[:200]}: {value} is no number")
    return [
        argument[: len(argument) - len(value)] + _in_current_names(_expanded(value))
        for argument, value in zip(arguments, values, strict=True)
    ]


def _load_settings(text: str) -> Any:
    settings = read_settings(text)
    # A word such as {a,b} in a list of shards is a mapping for YAML.
    braces = isinstance(settings, dict) and bool(settings) and all(value is None for value in settings.values())
    return text if braces and (text.lstrip().startswith("{") or text.strip().endswith(":")) else settings


def _expanded(settings: Any) -> Any:
    """Put in the home folder and the environment variable that a value begins with, as a shell does for a path."""
    if isinstance(settings, list):
        return [_expanded(entry) for entry in settings]
    if isinstance(settings, dict):
        return {key: _expanded(value) for key, value in settings.items()}
    if not isinstance(settings, str):
        return settings
    if settings == "~" or settings.startswith("~/"):
        return os.path.expanduser(settings)
    found = _VARIABLE.match(settings)
    if found is not None:
        name = found.group(1) or found.group(2)
        if name not in os.environ:
            raise ValueError(f"{settings!r} begins with an environment variable that is not set")
        return os.environ[name] + settings[found.end() :]
    if re.match(r"\$\{[^}]*\}", settings):
        raise ValueError(
            f"{settings!r} would be taken literally; accepted at the beginning of a value: $NAME or ${{NAME}}"
        )
    return settings


def _nested(settings: Any, *, dotted: bool = False) -> Any:
    """Write out the dotted keys of the settings of classes, which the parser would drop; other mappings keep theirs.

    Args:
        settings: plain data.
        dotted: whether the keys are names of settings, in which a dot can only lead into a group.
    """
    if isinstance(settings, list):
        return [_nested(entry) for entry in settings]
    if not isinstance(settings, dict):
        return settings
    of_class = any(str(key).partition(".")[0] in ("class_path", "init_args") for key in settings)
    result: dict[Any, Any] = {}
    for key, value in settings.items():
        # Beside a whole group the parser would drop it too.
        beside = isinstance(settings.get(str(key).partition(".")[0]), dict)
        first, dot, rest = str(key).partition(".") if dotted or of_class or beside else (key, "", "")
        if beside and dot and "class_path" in settings[first] and rest.partition(".")[0] not in _CLASS_KEYS:
            rest = f"init_args.{rest}"  # the shorthand of the command line
        inside = _nested({rest: value} if dot else value, dotted=first == "init_args" or bool(dot))
        _lay_beside(result, first, inside)
    return result


def _lay_beside(settings: dict[Any, Any], key: Any, value: Any) -> None:
    before = settings.get(key)
    if key not in settings:
        settings[key] = value
    elif isinstance(before, dict) and isinstance(value, dict):
        for name, inside in value.items():
            _lay_beside(before, name, inside)
    else:
        raise yaml.YAMLError(f"{key!r} is given twice, once by a dotted name")


def _in_current_names(settings: Any) -> Any:
    """Rename what earlier versions called otherwise, and log each such name once with the one that it has now."""
    current = current_names(settings)
    for line in renames(settings, current):
        if line not in _logged:
            _logged.add(line)
            logging.getLogger(__name__).warning("%s: the old name still works", line)
    return current


def build(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """Instantiate the classes of parsed settings; what a constructor raises comes out as it was raised.

    Raises:
        ValueError: a class path leads to a function that does not say which class it returns, or memory does not hold
            what the settings ask for.
    """
    _check_functions(settings.as_dict(), "")
    try:
        return parser.instantiate(settings)
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
        original: BaseException = error
        # The parser tries every member of a union and reports that none of them could be built.
        while str(original).startswith(_UNION) and original.__cause__ is not None:
            # The cause is the first member's; where another class was named, that class's is in the text alone.
            if _OTHER_CLASS.search(str(original.__cause__)) and (meant := _reason(str(original))) is not None:
                raise ValueError(meant) from original
            original = original.__cause__
        if isinstance(original, ImportError):  # of a class that wants a package, as `WandbLogger` does
            raise ValueError(str(original)) from original
        # PyTorch's allocators and the sizes that they are asked for: a RuntimeError, or a subclass.
        if not isinstance(original, ValueError) and (not isinstance(original, RuntimeError) or _memory(original)):
            reason = str(original).partition("\n")[0]
            raise ValueError(f"the sizes in the configuration are too large to build: {reason}") from original
        if original is error:
            raise
        raise original from None


def _reason(message: str) -> str | None:
    """Find in a report about a union why the class that was meant could not be built; None where all are others."""
    listed = message.partition("\nErrors:\n")[2].partition("\nGiven value")[0]
    reasons = [" ".join(reason.split()) for reason in re.split(r"(?:^|\n)  - ", listed) if reason.strip()]
    return next((reason for reason in reasons if not _OTHER_CLASS.search(reason)), None)


def _memory(error: RuntimeError) -> bool:
    return re.search("alloc|out of memory|overflow|too large|invalid for storage", str(error)) is not None


def _check_functions(value: Any, path: str) -> None:
    """Refuse a function as a class path unless it says that it returns a class; the parser would call any."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inside in items:
        where = f"{path}.{key}" if path and isinstance(key, str) else f"{path}[{key}]" if path else str(key)
        _check_functions(inside, where)
    name = value.get("class_path") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return
    found: Any = None
    for part in name.split("."):  # the parser has imported it
        found = sys.modules.get(part) if found is None else getattr(found, part, None)
    if inspect.isroutine(found):
        try:
            returned = get_type_hints(found).get("return")
        except (NameError, TypeError):  # a name that only a type checker imports
            returned = getattr(found, "__annotations__", {}).get("return")
        if returned is not Self and (not isinstance(returned, str | type) or returned in (*_VALUES, "None")):
            raise ValueError(
                f"{path}.class_path is {name!r}, a function, and it does not say that it returns a class of this "
                "package or yours: give a class, or a function with such a return annotation"
            )
