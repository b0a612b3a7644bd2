"""Read the settings of a reference model, in its own argument names: each is read by somebody, or refused by name.

A function that converts a model says of every argument what becomes of it:

- `take` honours it: ours is built with it;
- `agree` compares it with what the tensors say, or with what all models of the family have in common;
- `without_effect` names what changes nothing that we compute, and why.

What none of them named is an error when `finish` is called, so that nothing can be ignored silently.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from discrete_lit.core.bounded_reading import read_json, read_text
from discrete_lit.core.configuration import plain_yaml

Reference = Mapping[str, Any]
_Value = TypeVar("_Value")
_Kind = TypeVar("_Kind", int, float, str)

# What stands around the arguments of a model in published files: taming and LDM, Lightning's CLI, 1d-tokenizer.
AROUND = ("config", "model", "params", "init_args")
# Parts of published files that are about the run of a training, or about its data.
_OF_A_RUN = {
    *("experiment", "losses", "dataset", "optimizer", "lr_scheduler", "training", "evaluator", "visualization"),
    *("data", "trainer", "lightning", "callbacks", "seed_everything", "ckpt_path", "seed", "ngpus", "eval", "optim"),
    *("base_learning_rate", "learning_rate", "weight_decay", "scheduler_config", "monitor", "ignore_keys", "resume_lr"),
    *("wandb", "checkpointing", "hydra", "strategy", "loader", "wandb_logger", "work_dir", "load_dir", "defaults"),
}
_NOTE = "note"


class Settings:
    """The arguments of a reference model's constructor, which remember who has read them.

    Args:
        given: the arguments, in the reference's own names.
        name: where they stand in the whole configuration: `""`, or a name that ends with a dot.
    """

    def __init__(self, given: Reference | None = None, name: str = "") -> None:
        self._given = dict(given or {})
        self._name = name
        self._read = set[str]()
        self._accepted: dict[str, None] = {}
        self._taken: dict[str, None] = {}
        self._sections: dict[str, Settings] = {}
        self._reasons: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return self._given.get(name) is not None

    def where(self, name: str) -> str:
        """Return an argument's name with those of the sections around it, for messages."""
        return f"{self._name}{name}"

    def take(self, name: str, default: _Value, choices: Collection[_Value] | None = None) -> _Value:
        """Return an argument, of the type of its default.

        Raises:
            ValueError: it is given with a value of another type, or with none of the choices.
        """
        self._mark([name])
        if name not in self._given:
            return default
        self._taken[name] = None
        value = self._as(name, type(default))
        if choices is not None and value not in choices:
            raise ValueError(
                f"reference_config has {self._name}{name}={value!r}; {' and '.join(map(str, choices))} are read"
            )
        return cast(_Value, value)

    def optional(self, name: str, kind: type[_Kind]) -> _Kind | None:
        """Return an argument of this type; None where it is not given, or null."""
        self._mark([name])
        if name not in self:
            return None
        self._taken[name] = None
        return self._as(name, kind)

    def agree(self, found: Reference, who: str = "the tensors have") -> None:
        """Refuse arguments that contradict the tensors, or what all models of the family have in common.

        Args:
            found: the values that these arguments must have where they are given.
            who: what demands these values, for the message.

        Raises:
            ValueError: an argument is given with another value.
        """
        self._mark(found)
        for name, value in found.items():
            given = _as_lists(self._given[name] if name in self else value)
            if given != _as_lists(value) or isinstance(given, bool) != isinstance(value, bool):
                raise ValueError(f"reference_config has {self._name}{name}={given}, but {who} {value}")

    def agree_each(self, name: str, value: Any, count: int) -> None:
        """Refuse an argument that is neither this value nor a list that has it `count` times.

        Raises:
            ValueError: it is given with another value.
        """
        given = self._given.get(name)
        self.agree({name: [value] * count if isinstance(given, list | tuple) else value})

    def without_effect(self, because: str, *names: str) -> None:
        """Name arguments, or sections, that change nothing that our model computes, with the reason."""
        self._mark(names)
        self._reasons |= {f"{self._name}{name}": because for name in names if name in self._given}

    def section(self, name: str, around: Collection[str] = AROUND) -> "Settings":
        """Return a part with arguments of its own; without any where it is not given, or null.

        Args:
            name: of the part.
            around: names that may stand around its arguments, as for `read_settings`.

        Raises:
            ValueError: something else than arguments stands there.
        """
        self._mark([name])
        if name not in self._sections:
            given = self._given.get(name) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"reference_config has {self._name}{name}={given!r}, but arguments are needed there")
            self._sections[name] = Settings(_unwrap(given, around, f"{self._name}{name}."), f"{self._name}{name}.")
        return self._sections[name]

    def word(self, name: str, choices: Collection[str]) -> str | None:
        """Return a text that may stand in the place of a section; None where a section stands there, or nothing.

        Raises:
            ValueError: it is none of the choices.
        """
        return self.take(name, "", choices) if isinstance(self._given.get(name), str) else None

    def class_name(self, default: str, choices: Collection[str]) -> str:
        """Return the name, without its modules, of the class that `target` or `class_path` names.

        Raises:
            ValueError: it is none of the choices.
        """
        names = ("target", "class_path")
        self._mark(names)
        given = [str(self._given[name]) for name in names if name in self._given]
        if not given:
            return default
        name = given[0].rpartition(".")[2]
        if name not in choices:
            raise ValueError(f"reference_config has {self._name}target={given[0]}; {' and '.join(choices)} are read")
        return name

    @property
    def honoured(self) -> dict[str, Any]:
        """The arguments that were given and that our model is built with, by their dotted names."""
        own = {f"{self._name}{name}": self._given[name] for name in self._taken}
        return own | {name: value for section in self._sections.values() for name, value in section.honoured.items()}

    @property
    def effectless(self) -> dict[str, str]:
        """The arguments that were given and change nothing, by their dotted names, with the reasons."""
        return self._reasons | {
            name: why for section in self._sections.values() for name, why in section.effectless.items()
        }

    def finish(self) -> None:
        """Refuse every argument that nobody has read, here and in all sections.

        Raises:
            ValueError: there is one; the message names it and the nearest one that is read.
        """
        self.without_effect("it is about the run that trained the model", *(_OF_A_RUN - self._read))
        notes = [name for name in self._unread() if not name.isidentifier() or name == _NOTE]
        if notes:
            warnings.warn(
                f"reference_config has notes, which are no arguments and are not read: {', '.join(notes)}", stacklevel=3
            )
        unknown = [name for name in self._unread() if name not in notes]
        if unknown:
            name = unknown[0]
            accepted = sorted(set(self._accepted) - _OF_A_RUN)
            nearest = get_close_matches(name, accepted, n=1)
            guess = f"; did you mean {self._name}{nearest[0]}?" if nearest else ""
            more = f" (nor {', '.join(unknown[1:])})" if unknown[1:] else ""
            raise ValueError(
                f"reference_config has {self._name}{name}={self._given[name]!r}, which is not read{more}{guess} "
                f"Read are: {', '.join(accepted)}"
            )
        for section in self._sections.values():
            section.finish()

    def _unread(self) -> list[str]:
        return [name for name in self._given if name not in self._read]

    def _mark(self, names: Iterable[str]) -> None:
        self._read.update(names)
        self._accepted |= dict.fromkeys(names)

    def _as(self, name: str, kind: type[Any]) -> Any:
        value = self._given[name]
        if kind is float and isinstance(value, str):
            # YAML 1.1 reads 1e-5 as text.
            value = _number(value)
        fits = {
            bool: isinstance(value, bool),
            int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value),
            list: isinstance(value, list | tuple),
            tuple: isinstance(value, list | tuple),
        }.get(kind, isinstance(value, kind))
        if not fits:
            raise ValueError(f"reference_config has {self._name}{name}={value!r}, but a {kind.__name__} is needed")
        return kind(value)


def read_settings(config: Reference | str | Path | None, section: str | None = None) -> Settings:
    """Read the arguments of a reference model's constructor.

    What stands beside the arguments in a published file, such as the tokenizer's part in that of a generator, is kept:
    it says something of the model too, or is known to say nothing.

    Args:
        config: the arguments, a published configuration around them, or the path of its YAML or JSON file.
        section: the part of a configuration with several, like those of 1d-tokenizer and MaskBit, that this model is
            built of; None where all of it is about this model.

    Raises:
        ValueError: there is no such file, it holds no mapping, or says one thing twice.
    """
    if config is None:
        return Settings()
    found = _read_file(Path(config)) if isinstance(config, str | Path) else config
    found = _resolve(found, found)
    return Settings(_unwrap(found, (*AROUND, section) if section else ("config",)))


def _unwrap(found: Reference, around: Iterable[str], name: str = "") -> dict[str, Any]:
    """Put the arguments inside of names that only stand around them beside what stands outside."""
    unwrapped = dict(found)
    while inner := [wrapper for wrapper in around if isinstance(unwrapped.get(wrapper), Mapping)]:
        inside = unwrapped.pop(inner[0])
        twice = [key for key in inside if key in unwrapped]
        if twice:
            raise ValueError(f"reference_config has {name}{twice[0]} twice, in {inner[0]} and beside it")
        unwrapped |= inside
    return unwrapped


def _resolve(value: Any, whole: Reference) -> Any:
    """Put the values that OmegaConf's `${model.vq_model.codebook_size}` stands for in its place."""
    if isinstance(value, Mapping):
        return {name: _resolve(inner, whole) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(inner, whole) for inner in value]
    stands_for = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if stands_for is None:
        return value
    found: Any = whole
    for name in stands_for[1].split("."):
        found = found.get(name, value) if isinstance(found, Mapping) else value
    return found


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no reference_config at {str(path)!r}")
    try:
        read = read_json(path) if path.suffix == ".json" else plain_yaml(read_text(path))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"reference_config={str(path)!r} is neither YAML nor JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"reference_config={str(path)!r} holds a {type(read).__name__}, not settings")
    return read


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value
