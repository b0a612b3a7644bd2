from pathlib import Path

import pytest

from discrete_lit.config_errors import COMMAND_LINE, INHERITED, read_given


def test_later_files_and_the_command_line_win_and_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("a: {b: 1, c: 2}\nd: 3\n")
    second.write_text("a: {c: 4}\n")
    given = read_given(["--config", str(first), f"--config={second}", "--a.b", "5", "--print_config"])
    assert given.values == {"a": {"b": "5", "c": 4}, "d": 3}
    assert given.source("a.b") == COMMAND_LINE
    assert given.source("a.c") == str(second)
    assert given.source("d") == str(first)
    assert given.source("nothing") is None


def test_shorthands_of_the_command_line() -> None:
    given = read_given(["--model=Name", "--model.depth=3", "--calls+=First", "--calls.x=1", "--n", "-1"])
    assert given.values == {
        "model": {"class_path": "Name", "init_args": {"depth": "3"}},
        "calls": [{"class_path": "First", "init_args": {"x": "1"}}],
        "n": "-1",
    }
    assert given.source("calls[0].init_args.x") == COMMAND_LINE


def test_another_class_sets_the_arguments_of_the_first_aside(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("model: {class_path: A, init_args: {x: 1}}\n")
    given = read_given(["--config", str(file), "--model", "B", "--model.y=2"])
    assert given.values["model"] == {"class_path": "B", "init_args": {"y": "2"}, INHERITED: {"x": 1}}
    assert given.source("model.class_path") == COMMAND_LINE


@pytest.mark.parametrize("name", ["callbacks", "callbacks+"])
def test_lists_are_replaced_or_extended(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("trainer: {callbacks: [1]}\n")
    second.write_text(f"trainer: {{{name}: [2]}}\n")
    callbacks = read_given(["--config", str(first), "--config", str(second)]).values["trainer"]["callbacks"]
    assert callbacks == ([1, 2] if name.endswith("+") else [2])
