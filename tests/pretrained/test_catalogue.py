"""The list of published models: each entry is one that the family reads, and its tokenizer is in the list."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.golden import Case
from helpers.golden_cases import cases_of

from discrete_lit.pretrained import FAMILIES
from discrete_lit.pretrained.catalogue import LISTS_VARIABLE, by_hand, find_model, matching, published_models
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

ENTRIES = list(published_models().values())


@pytest.fixture
def own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`own_list(text)`: a list of the user, named by the environment."""

    def write(text: str) -> Path:
        file = tmp_path / "own.yaml"
        file.write_text(text)
        monkeypatch.setenv(LISTS_VARIABLE, str(file))
        return file

    return write


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_one_that_can_be_read(entry: Any) -> None:
    assert entry.family in FAMILIES
    assert entry.source.startswith("https://") and all(
        file.url.startswith(("https://", "hf://")) for file in entry.files
    )
    if entry.tokenizer is not None:
        tokenizer = find_model(entry.tokenizer)
        assert tokenizer.tokenizer is None, "a tokenizer has no tokenizer"
        # VAR's 512, MaskGIT's 512: a tokenizer of a fixed grid is made for the size; others take any.
        assert tokenizer.family not in ("var_vqvae", "titok") or tokenizer.image_size == entry.image_size


def test_every_family_is_in_the_list_or_says_why_not() -> None:
    listed = {entry.family for entry in ENTRIES}
    assert listed.isdisjoint(by_hand()) and listed | by_hand().keys() == set(FAMILIES)


WITH_SETTINGS = {entry.family for entry in ENTRIES if entry.reference_config}


@pytest.mark.parametrize("case", cases_of(WITH_SETTINGS))
def test_the_settings_of_the_list_are_read_by_the_family(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key that an entry of the case's family gives is one that the family's function reads."""
    # The tensors are of other sizes than the published ones: here it matters who reads the names.
    monkeypatch.setattr(Settings, "agree", lambda self, found, who="": self._mark(found))
    for entry in ENTRIES:
        if entry.family != case.family or not entry.reference_config:
            continue
        names = [file.name for file in entry.files]
        given = {
            name: value if isinstance(value, dict) else case.arguments.get(name, None if value in names else value)
            for name, value in entry.reference_config.items()
        }
        settings = Settings({**case.arguments, **given})
        FAMILIES[case.family].convert(State(case.state, "golden"), settings)
        settings.finish()


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(ValueError, match=r"model='rar-b' is not in the list .*did you mean 'rar_b'"):
        find_model("rar-b")
    with pytest.raises(ValueError, match=r"`discrete-lit models` shows all"):
        find_model("zzz")


def test_a_word_finds_names_families_sources_and_licences() -> None:
    assert {entry.name for entry in matching("rar_", ENTRIES)} >= {"rar_b", "rar_xxl"}
    assert {entry.family for entry in matching("foundationvision/var", ENTRIES)} == {"var_vqvae", "var_transformer"}
    assert {entry.name for entry in matching("cc-by-nc", ENTRIES)} == {"dit_xl2_256", "dit_xl2_512"}
    assert not matching("no such word", ENTRIES)


def test_an_own_list_stands_before_the_shipped_one(own_list: Callable[[str], Path]) -> None:
    own_list(
        "published: [{source: https://example.org, models: {rar_b: {family: rar, files: [https://example.org/mine.bin]},"
        " mine: {family: rar, files: [{url: 'https://example.org/?id=3', name: w.bin}], tokenizer: maskgit_vqgan}}}]"
    )
    assert find_model("rar_b").files[0].name == "mine.bin" and find_model("rar_l").family == "rar"
    assert find_model("mine").files[0].name == "w.bin"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{family: rar, files: []}", "needs `family:` and `files:`"),
        ("{family: rar, files: [ftp://a/b]}", "must begin with one of hf://"),
        ("{family: rar, files: [hf://owner]}", "hf://owner/name or hf://owner/name/file"),
        ("{family: rar, files: ['hf://owner/../x/y']}", "hf://owner/name or hf://owner/name/file"),
        ("{family: rar, files: ['https://a/b/']}", "give `name:`"),
        ("{family: rar, files: [{url: 'https://a/b', name: '../b'}]}", "is no file's name"),
        ("{family: rar, files: [{url: 'https://a/b', sha256: 12}]}", "64 hexadecimal digits"),
        ("{family: rar, files: ['https://a/b'], licenze: MIT}", "has licenze, which is not read"),
        ("{family: rar, files: ['https://a/b'], image_size: big}", "image_size='big', where a int is needed"),
        ("{family: rar, files: ['https://a/b'], tokenizer: nowhere}", "tokenizer='nowhere', which it has no entry for"),
    ],
)
def test_a_list_with_a_mistake(entry: str, message: str, own_list: Callable[[str], Path]) -> None:
    own_list(f"published: [{{source: https://example.org, models: {{mine: {entry}}}}}]")
    with pytest.raises(ValueError, match=message):
        published_models()


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "needs `published:`"), ("a: [", "cannot be read"), ("", "needs")]
)
def test_a_list_that_is_none(text: str, message: str, own_list: Callable[[str], Path]) -> None:
    own_list(text)
    with pytest.raises(ValueError, match=message):
        published_models()


def test_a_list_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LISTS_VARIABLE, "/nowhere.yaml")
    with pytest.raises(ValueError, match=r"there is no file '/nowhere.yaml'"):
        published_models()
