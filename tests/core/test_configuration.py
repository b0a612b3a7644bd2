"""How the YAML of a user is read."""

from typing import Any

import pytest
import yaml

from discrete_lit.core.configuration import read_settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e-3", -0.0005),
        ("-1", -1),
        ("1_000", 1000),
        ("0", 0),
        ("0x1f", 31),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-11-27", "2026-11-27"),
        ("true", True),
        ("null", None),
        (".inf", float("inf")),
        ("a$b", "a$b"),
        ("$5", "$5"),
    ],
)
def test_words_and_numbers(text: str, value: Any) -> None:
    read = read_settings(f"key: {text}")["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("value", ["010", "1:30", "0x1f", 1e-4, 3, "~x", 1e22, -0.0])
def test_what_is_written_is_read_back(value: Any) -> None:
    assert read_settings(yaml.safe_dump({"key": value})) == {"key": value}


def test_home_and_environment_begin_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    read = read_settings("{a: ~/runs, b: [$SCRATCH/runs, '${SCRATCH}'], c: x/~/y, d: a/$SCRATCH}")
    assert read == {"a": "/home/me/runs", "b": ["/scratch/me/runs", "/scratch/me"], "c": "x/~/y", "d": "a/$SCRATCH"}


@pytest.mark.parametrize("text", ["$NOT_SET_ANYWHERE/runs", "${oc.env:HOME}/runs", "${model.width}"])
def test_a_variable_that_would_become_a_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"variable that is not set|taken literally"):
        read_settings(f"run_dir: {text}")


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
MAPPING_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{x: *a{i}, y: *a{i}}}\n" for i in range(40))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "trainer: {max_steps: 1}\nmodel: x\ntrainer: {devices: 2}",
            "'trainer' is given twice in one place, lines 1 and 3",
        ),
        ("a:\n  b: 1\n  b: 2", "'b' is given twice"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: {c: *a}}", "contains itself"),
        ("a: " + "{a: " * 200 + "1" + "}" * 200, "nested deeper"),
        (BOMB, "entries"),
        (MAPPING_BOMB, "entries"),
    ],
)
def test_documents_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(yaml.YAMLError, match=why):
        read_settings(text)


def test_a_merge_may_be_repeated() -> None:
    read = read_settings("one: &one {a: 1}\ntwo: &two {b: 2}\nall:\n  <<: *one\n  c: 3\nmore: {<<: [*one, *two]}")
    assert read["all"] == {"a": 1, "c": 3}
    assert read["more"] == {"a": 1, "b": 2}


def test_dotted_keys_of_a_class_lead_into_it() -> None:
    read = read_settings(
        """
        model:
          class_path: A
          init_args.levels: [4, 3]
          init_args:
            network.class_path: B
            network.init_args.channels: 4
            optimizer: {class_path: C, init_args.lr: 1e-4}
        trainer: {callbacks: [{class_path: D, init_args.save_last: true}]}
        samples: {model.v1: runs/a, model.v2: runs/b}
        """
    )
    network = {"class_path": "B", "init_args": {"channels": 4}}
    optimizer = {"class_path": "C", "init_args": {"lr": 1e-4}}
    assert read["model"] == {
        "class_path": "A",
        "init_args": {"levels": [4, 3], "network": network, "optimizer": optimizer},
    }
    assert read["trainer"]["callbacks"] == [{"class_path": "D", "init_args": {"save_last": True}}]
    assert read["samples"] == {"model.v1": "runs/a", "model.v2": "runs/b"}


def test_a_setting_that_a_dotted_key_gives_again_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="'lr' is given twice, once by a dotted name"):
        read_settings("{class_path: A, init_args.lr: 1, init_args: {lr: 2}}")
