"""The published families that can be loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from discrete_lit.pretrained.reading import Averages, State
from discrete_lit.pretrained.reference import Reference
from discrete_lit.pretrained.renaming import Renaming


@dataclass(frozen=True)
class Conversion:
    """How a published checkpoint becomes one of our modules."""

    config: dict[str, Any]
    """`{"class_path", "init_args"}` of our module; of a generator without its tokenizer and image size."""
    tensors: Mapping[str, Tensor]
    """Published tensors, of which each is used once or dropped."""
    renaming: Renaming
    dropped: Sequence[str] = ()
    """Patterns of published names that our module has no place for."""
    kept: Sequence[str] = ()
    """Patterns of our names whose values follow from the configuration, or only count in training."""
    tokens: "Tokens | None" = None
    """Of a generator, whose names are then those of its backbone."""
    tokenizer: "Conversion | None" = None
    """Of the tokenizer that lies in a generator's file."""


@dataclass(frozen=True)
class Tokens:
    """What a generator models; its tokenizer must give this."""

    vocab_size: int
    shape: tuple[int, ...]
    needs_tokenizer: bool = False
    """Whether ids alone are not enough to run it."""


@dataclass(frozen=True)
class Family:
    """A published layout."""

    name: str
    convert: Callable[[State, Reference], Conversion]
    marks: Sequence[str]
    """Names that tell this layout from others; with `!` before it, a name that it does not have."""
    wrappers: Sequence[str]
    """Names under which its files may keep the weights, the one to prefer first; a dot leads into the next mapping."""
    section: str | None
    """Where a published configuration of all parts of a model keeps this one's arguments; None where they are all."""
    prefixes: Sequence[str]
    """What training may have put before every name."""
    averages: Averages | None
    """The list of averaged weights that its files may hold beside the named ones, and which is preferred."""

    def lacks(self, names: State) -> list[str]:
        """The marks that do not hold."""
        return [mark for mark in self.marks if (mark.lstrip("!") in names) == mark.startswith("!")]


FAMILIES: dict[str, Family] = {}
"""By name; `load_pretrained` and `discrete-lit import` accept these."""


def register(
    name: str,
    marks: Sequence[str],
    wrappers: Sequence[str] = (),
    section: str | None = "vq_model",
    prefixes: Sequence[str] = (),
    averages: Averages | None = None,
) -> Callable[[Callable[[State, Reference], Conversion]], Callable[[State, Reference], Conversion]]:
    """Add a family: a function from its tensors and its reference arguments to a `Conversion`."""

    def add(convert: Callable[[State, Reference], Conversion]) -> Callable[[State, Reference], Conversion]:
        assert name not in FAMILIES
        FAMILIES[name] = Family(name, convert, marks, wrappers, section, prefixes, averages)
        return convert

    return add


def find_family(name: str) -> Family:
    """The family of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        nearest = get_close_matches(name, FAMILIES, n=1)
        guess = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"family={name!r} is not known{guess} The families are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def check_family(family: Family, state: State) -> None:
    """Refuse a checkpoint of another family.

    Raises:
        ValueError: it has not the names that tell the family; it says which family it looks like.
    """
    lacks = family.lacks(state)
    if not lacks:
        return
    alike = [other.name for other in FAMILIES.values() if not other.lacks(state)]
    guess = f"it looks like {' or '.join(alike)}" if alike else "it looks like none of the known families"
    what = "; ".join(f"has {mark[1:]!r}" if mark.startswith("!") else f"has no {mark!r}" for mark in lacks[:3])
    raise ValueError(f"{state.source!r} is no {family.name} checkpoint (it {what}): {guess}")
