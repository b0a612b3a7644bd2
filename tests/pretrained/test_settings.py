"""The settings of published models: each is read by somebody, and changes something or says why not."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import Case, published, published_state
from helpers.golden_cases import cases_of
from helpers.golden_text_tokenizers import words_of
from torch import Tensor

from discrete_lit.pretrained import FAMILIES
from discrete_lit.pretrained.conversion import Conversion, recognise
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings, read_settings


def read_all(settings: Settings) -> None:
    settings.agree({"n_embed": 16})
    settings.take("heads", 4)
    settings.take("rate", 0.5)
    settings.optional("scale", float)
    settings.section("part").take("kind", "a", ("a", "b"))
    settings.without_effect("only in training", "dropout")
    settings.finish()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"haeds": 3}, r"has haeds=3, which is not read; did you mean heads\? Read are: dropout, heads, n_embed, part"),
        ({"part": {"knid": 3}}, r"has part\.knid=3, which is not read; did you mean part\.kind\? Read are: kind"),
        ({"nothing": 3, "other": 4}, r"has nothing=3, which is not read \(nor other\) Read are"),
        ({"n_embed": 17}, "has n_embed=17, but the tensors have 16"),
        ({"heads": "3"}, "has heads='3', but a int is needed"),
        ({"heads": True}, "has heads=True, but a int is needed"),
        ({"heads": 2.5}, "has heads=2.5, but a int is needed"),
        ({"rate": "fast"}, "has rate='fast', but a float is needed"),
        ({"rate": float("nan")}, "has rate=nan, but a float is needed"),
        ({"rate": "inf"}, "has rate=inf, but a float is needed"),
        ({"part": {"kind": "c"}}, r"has part\.kind='c'; a and b are read"),
        ({"part": 3}, "has part=3, but arguments are needed there"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"reference_config {message}"):
        read_all(Settings(given))


def test_what_is_read() -> None:
    settings = Settings({"heads": 3, "rate": "1e-5", "dropout": 0.1, "part": {"kind": "b"}, "scale": None})
    read_all(settings)
    assert (settings.take("heads", 4), settings.take("rate", 0.5), settings.optional("scale", float)) == (3, 1e-5, None)
    assert settings.section("part").take("kind", "a") == "b" and settings.effectless == {"dropout": "only in training"}


def test_notes_are_said_not_to_be_read() -> None:
    with pytest.warns(UserWarning, match="has notes, which are no arguments and are not read: heads of the case, note"):
        read_all(Settings({"heads of the case": 3, "note": "no heads"}))


def test_what_stands_around_arguments() -> None:
    """What stands beside them counts too, and what is about the run does not; a name may stand for another value."""
    published = {
        "experiment": {"name": "x"},
        "model": {"vq": {"size": 8}, "generator": {"length": "${model.vq.size}", "width": 4}},
    }
    settings = read_settings(published, "generator")
    assert settings.take("length", 0) == 8 and settings.section("vq").take("size", 0) == 8
    with pytest.raises(ValueError, match="has width=4, which is not read"):
        settings.finish()
    with pytest.raises(ValueError, match="has width twice, in generator and beside it"):
        read_settings({"generator": {"width": 4}, "width": 5}, "generator")


# --- Every key of every golden constructor ---


def leaves(arguments: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each argument that is no section, with the keys that lead to it."""
    if isinstance(arguments, dict) and arguments:
        for name, value in arguments.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, arguments


def others(value: Any) -> list[Any]:
    """Other values of the same kind, and of none."""
    return [other for other in _changes(value) if other != value or type(other) is not type(value)]


def _changes(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in (value + 1, 2 * value + 2, 0, -1) if other != value]
    if isinstance(value, float):
        return [value / 2 + 0.25, value + 1]
    if isinstance(value, str):
        return [f"{value}x", "unknown"]
    if isinstance(value, list):
        return [[*value, 1], value[1:] or [2]]
    return [{"target": "no.such.Class"}, 3]


def changed(arguments: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = deepcopy(arguments)
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return made


def convert(case: Case, arguments: dict[str, Any]) -> tuple[Conversion, Settings]:
    family = FAMILIES[case.family]
    settings = read_settings(arguments, family.section)
    if family.reads_text:
        settings.tokens = words_of(case)
    conversion = family.convert(recognise(family, State(published_state(case), str(case))), settings)
    settings.finish()
    return conversion, settings


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def within(path: tuple[str, ...], name: str) -> bool:
    """Whether a path leads through the parts of a dotted name, wrappers left out."""
    parts = iter(path)
    return all(part in parts for part in name.split("."))


@pytest.mark.filterwarnings("ignore:of '.*' the part .* is read")  # a case may hold several models
@pytest.mark.parametrize("case", cases_of(FAMILIES))
def test_every_setting_counts(case: Case) -> None:
    """A changed setting changes the model, is refused by its name, or is known to change nothing, with the reason."""
    own, settings = convert(case, case.arguments)
    assert all(settings.effectless.values())
    silent = []
    for path, value in leaves(case.arguments):
        for other in others(value):
            try:
                conversion, settings = convert(case, changed(case.arguments, path, other))
            except ValueError as error:
                # By its name, or by that of a section around it.
                assert any(name in str(error) for name in path), f"{path} is refused without its name: {error}"
                continue
            kept = conversion.config == own.config and conversion.tokens == own.tokens and conversion.text == own.text
            tokenizers = [made.tokenizer.config for made in (conversion, own) if made.tokenizer is not None]
            kept &= len(tokenizers) < 2 or tokenizers[0] == tokenizers[1]
            idle = any(within(path, name) for name in settings.effectless)
            if kept and same(conversion.tensors, own.tensors) and not idle:
                silent.append(f"{'.'.join(path)}={other!r}")
    assert not silent, f"{case}: ignored silently: {', '.join(silent)}"


@pytest.mark.filterwarnings("ignore:of '.*' the part .* is read")  # a case may hold several models
@pytest.mark.parametrize("case", cases_of(FAMILIES))
def test_no_key_is_unknown(case: Case) -> None:
    idle = convert(case, case.arguments)[1].effectless
    for path, _ in leaves(case.arguments):
        if any(within(path[:-1], name) for name in idle) or path[:-1] == ("vocabulary_map",):
            continue  # of a section that is not read at all, with the reason; or a token, which may have any name
        misspelt = changed(case.arguments, (*path[:-1], f"{path[-1]}_"), 1)
        with pytest.raises(ValueError, match=f"{path[-1]}_=1, which is not read"):
            convert(case, misspelt)


@pytest.mark.parametrize("case", cases_of(["var_vqvae"]))
def test_what_the_module_refuses_is_said_by_the_references_names(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(built with .*v_patch_nums=\[1, 2, 2, 4\].* of reference_config\)"):
        published(case, tmp_path)(v_patch_nums=[1, 2, 2, 4])
