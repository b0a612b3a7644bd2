"""From published tensors to ours: every published tensor becomes one of ours or is dropped by a named rule.

- `Renaming` maps our names to published ones; `Arrangement` cuts, joins or reorders published tensors before that.
- `Conversion` is a model's configuration with both, and what a family's function returns.
- `register` adds a `Family` to `FAMILIES`; `convert` carries a conversion out, and meets every weight of ours.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.trust import printable
from discrete_lit.pretrained.reading import Averages, State, part_of
from discrete_lit.pretrained.settings import Settings


@dataclass(frozen=True)
class Renaming:
    """Maps our names to published ones, by pairs of templates; the first pair that fits holds.

    `{rest}` stands for any text, other names for a number. On the published side `{mirror}` is `levels - 1 - level`,
    for layouts that count a decoder's levels from the other end, and `{q|k|v}` are three tensors that ours joins along
    the first axis.
    """

    rules: Sequence[tuple[str, str]]
    levels: int = 0

    def published(self, own: str) -> tuple[str, ...]:
        """Return the published names of one of our weights; none if no rule fits."""
        for ours, theirs in self.rules:
            fields = match(ours, own)
            if fields is not None:
                values = {name: int(text) if name != "rest" else text for name, text in fields.items()}
                if "level" in fields:
                    values["mirror"] = self.levels - 1 - int(fields["level"])
                joined = re.search(r"\{(\w+(?:\|\w+)+)\}", theirs)
                variants = joined[1].split("|") if joined else [""]
                names = [theirs.replace(joined[0], variant) if joined else theirs for variant in variants]
                return tuple(name.format(**values) for name in names)
        return ()


def match(template: str, name: str) -> dict[str, str] | None:
    """Return the values that a template's fields have in a name; None if the name does not fit."""
    pattern = re.escape(template).replace(r"\{rest\}", r"(?P<rest>.+)")
    found = re.fullmatch(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", pattern), name)
    return None if found is None else found.groupdict()


@dataclass(frozen=True)
class Arrangement:
    """Turns some published tensors into others, wherever their names occur; fields are as in `Renaming`.

    The tensors that it takes are used up, so that each published tensor still has one use.

    Attributes:
        takes: templates of the published names; the matches of the first one decide how often it is applied.
        gives: templates of the names of the new tensors; none if the taken ones are only checked.
        make: function from the tensors taken to those given, in order; it refuses them by a `ValueError`.
    """

    takes: Sequence[str]
    gives: Sequence[str]
    make: Callable[..., Sequence[Tensor]]


def arrange(state: State, arrangements: Iterable[Arrangement]) -> State:
    """Apply all arrangements in turn to the published tensors.

    Raises:
        ValueError: a tensor that an arrangement takes is missing or refused.
    """
    arranged = State(state, state.source)
    for arrangement in arrangements:
        for name in list(arranged):
            fields = match(arrangement.takes[0], name)
            if fields is None:
                continue
            taken = [template.format(**fields) for template in arrangement.takes]
            try:
                made = arrangement.make(*(arranged[key] for key in taken))
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"the weights of {state.source!r} do not fit: {' + '.join(taken)}: {error}") from error
            for key in taken:
                del arranged[key]
            names = [template.format(**fields) for template in arrangement.gives]
            arranged.update(zip(names, made, strict=True))
    return arranged


def cut_rows(name: str, parts: dict[str, tuple[int, int]]) -> Arrangement:
    """Give rows `[first, last)` of a tensor names of their own, and drop the other rows."""
    return Arrangement([name], list(parts), lambda table: [table[first:last] for first, last in parts.values()])


def reorder_chunks(name: str, order: Sequence[int]) -> Arrangement:
    """Reorder equal chunks along the first axis: chunk `order[i]` becomes chunk i."""

    def make(value: Tensor) -> list[Tensor]:
        chunks = value.chunk(len(order))
        return [torch.cat([chunks[number] for number in order])]

    return Arrangement([name], [name], make)


def must_be_zero(name: str) -> Arrangement:
    """Drop a tensor that the published code never changes from zero, after a check that it is zero."""

    def check(value: Tensor) -> list[Any]:
        if value.any():
            raise ValueError(f"{name} holds other numbers than 0, which our module has no place for")
        return []

    return Arrangement([name], [], check)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The conversion of a published checkpoint to one of our modules."""

    config: dict[str, Any]
    """`{"class_path", "init_args"}` of our module; a generator's lacks its tokenizer and image size."""
    tensors: Mapping[str, Tensor]
    """The published tensors; each is used once or dropped."""
    renaming: Renaming
    dropped: Sequence[str] = ()
    """Patterns of published names that our module has no place for."""
    kept: Sequence[str] = ()
    """Patterns of our names whose values follow from the configuration, or only count in training."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of a generator beside its backbone, by our names: what its training has learned of its levels."""
    tokens: "Tokens | None" = None
    """The tokens that a generator models; the names are then those of its backbone. None for a tokenizer."""
    latents: tuple[int, ...] | None = None
    """The shape `(D, *grid)` of the latents that a generator models; the names are then those of its backbone,
    or begin with `backbone.` or `head.` where it has both."""
    tokenizer: "Conversion | None" = None
    """The conversion of the tokenizer in a generator's file, if there is one."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that a generator models; its tokenizer must make the same."""

    vocab_size: int
    shape: tuple[int, ...]
    needs_tokenizer: bool = False
    """Whether the generator cannot run on ids alone."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published layout, with the function that converts it."""

    name: str
    convert: "Convert"
    marks: Sequence[str]
    """Names that tell this layout from others; `!` stands before a name that it does not have."""
    wrappers: Sequence[str]
    """Names under which its files may keep the weights, the one to prefer first; a dot leads into the next mapping."""
    section: str | None
    """The part of a published configuration with this model's arguments; None if all of it is about this model."""
    averages: Averages | None
    """The list of EMA weights that its files may hold beside the named ones; it is preferred."""

    def lacks(self, names: State) -> list[str]:
        """Return the marks that do not hold."""
        return [mark for mark in self.marks if (mark.lstrip("!") in names) == mark.startswith("!")]


Convert = Callable[[State, Settings], Conversion]
"""A family's function: it reads the tensors, and every setting of the reference's constructor."""

FAMILIES: dict[str, Family] = {}
"""The families by name, as `load_pretrained` and `discrete-lit import` accept them."""


def register(
    name: str,
    marks: Sequence[str],
    wrappers: Sequence[str] = (),
    section: str | None = "vq_model",
    averages: Averages | None = None,
) -> Callable[[Convert], Convert]:
    """Register a family: decorate its function from tensors and reference arguments to a `Conversion`."""

    def add(convert: Convert) -> Convert:
        assert name not in FAMILIES
        FAMILIES[name] = Family(
            name=name,
            convert=convert,
            marks=marks,
            wrappers=wrappers,
            section=section,
            averages=averages,
        )
        return convert

    return add


def find_family(name: str) -> Family:
    """Return the family of this name.

    Raises:
        ValueError: there is none; the message says which is nearest.
    """
    if name not in FAMILIES:
        nearest = get_close_matches(name, FAMILIES, n=1)
        guess = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"family={name!r} is not known{guess} The families are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def recognise(family: Family, state: State) -> State:
    """Return the tensors by the names of a family's layout: as they stand, or without a prefix that they all have.

    Raises:
        ValueError: the marks of the family do not hold; the message says which family the file looks like.
    """
    lacks = family.lacks(state)
    if not lacks:
        return state
    alike = [other.name for other in FAMILIES.values() if not other.lacks(state)]
    if not alike:
        part = part_of(state, [mark for mark in family.marks if not mark.startswith("!")])
        if part is not None and not family.lacks(part):
            return part
    guess = f"it looks like {' or '.join(alike)}" if alike else "it looks like none of the known families"
    what = "; ".join(f"has {mark[1:]!r}" if mark.startswith("!") else f"has no {mark!r}" for mark in lacks[:3])
    raise ValueError(f"{state.source!r} is no {family.name} checkpoint (it {what}): {guess}")


_MOST_SHOWN = 5


def convert(own: Mapping[str, Tensor], conversion: Conversion, source: str) -> dict[str, Tensor]:
    """Return the published weights under our names, in the precision of ours.

    Args:
        own: the state dict of our module, whose names and shapes must all be met.
        conversion: the published tensors and the rules for them.
        source: the file's name, for messages.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen, of another kind of number, or not finite; the message
            names them.
    """
    published, made, used, wrong = conversion.tensors, dict[str, Tensor](), set[str](), list[str]()
    broken = list[str]()
    for name, value in own.items():
        if _fits(name, conversion.kept):
            made[name] = value
            continue
        names = conversion.renaming.published(name)
        assert names, f"no rule for {name}"
        assert not used.intersection(names), f"{names} used twice"
        used.update(names)
        missing = [key for key in names if key not in published]
        wrong += [f"{key!r} is missing" for key in missing]
        if not missing:
            given = published[names[0]] if len(names) == 1 else torch.cat([published[key] for key in names])
            # A 1x1 convolution is a linear layer.
            if given.dim() > value.dim() and given.shape == (*value.shape, *(1,) * (given.dim() - value.dim())):
                given = given.reshape(value.shape)
            keys = " + ".join(map(repr, names))
            if given.is_floating_point() and not given.is_meta and not bool(given.isfinite().all()):
                broken.append(keys)
            if given.is_floating_point() != value.is_floating_point() or given.is_complex() != value.is_complex():
                wrong.append(f"{keys} is {given.dtype} instead of {value.dtype}")
            if given.shape != value.shape:
                wrong.append(f"{keys} has shape {tuple(given.shape)} instead of {tuple(value.shape)}")
            made[name] = given.to(value.dtype)
    wrong += [f"{key!r} is unexpected" for key in published if key not in used and not _fits(key, conversion.dropped)]
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise ValueError(f"the weights of {source!r} do not fit: {'; '.join(wrong[:_MOST_SHOWN])}{more}")
    if broken:
        where = printable(", ".join(broken[:_MOST_SHOWN]))
        raise ValueError(f"the weights of {source!r} are not all finite numbers, first in {where}")
    return made


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
