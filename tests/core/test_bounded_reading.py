"""Reading small files that may come from anywhere: what is not one, is too long, or nested without an end."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discrete_lit.core.bounded_reading import check_nesting, open_array, parse_json, read_json, read_text


def test_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ["ä", 1e-4, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": ["ä", 1e-4, None]}
    assert read_text(tmp_path / "a.json", most=27).startswith("{")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for reader in (read_text, read_json, open_array):
            with pytest.raises(ValueError, match="is no file, but a folder, a pipe or a device"):
                reader(name)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x" * 101, "more than the 100 bytes"),
        (b"\xff", "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[" * 90 + b"]", "is not JSON"),
        (b'{"a": 1, "a": 2}', "gives 'a' twice"),
        (b'{"b": {"a": 1, "c": 3, "a": 2}}', "gives 'a' twice"),
        (b"1" * 99 + b"x", "is not JSON"),
    ],
)
def test_what_is_wrong_is_said_of_the_file(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_json(tmp_path / "a.json", most=100)
    assert "a.json" in str(refused.value)


def test_json_of_any_depth_and_length_of_numbers_is_one_error() -> None:
    for text in ("[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError, match="here is not JSON"):
            parse_json(text, "here")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("values", [np.arange(6).reshape(2, 3), np.zeros((0, 3)), np.array(5), np.array(["a", "bc"])])
def test_an_array_is_what_it_was(values: np.ndarray, mapped: bool, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values)
    found = open_array(tmp_path / "a.npy", mapped=mapped)
    assert found.dtype == values.dtype and found.shape == values.shape and (found == values).all()
    assert isinstance(found, np.memmap) == (mapped and values.size > 0)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:20], bytes])
def test_an_array_of_another_length_than_it_claims_is_refused(change: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(change(data) if change is not bytes else b"")
    with pytest.raises(ValueError, match=r"a\.npy is not a whole \.npy file"):
        open_array(tmp_path / "a.npy")


def test_nesting_without_an_end() -> None:
    value: Any = [1]
    check_nesting({"a": value, "b": [value] * 1000, "c": {"d": (value, {1, 2})}}, "x")
    for _ in range(40):
        value = [value, value]
    with pytest.raises(ValueError, match="'x' has more than 10,000,000 values"):
        check_nesting({"a": value}, "x")
    inside: dict[str, Any] = {}
    inside["again"] = [inside]
    with pytest.raises(ValueError, match="'x' holds a dict that contains itself"):
        check_nesting(inside, "x")
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="'x' is nested deeper than 100 levels"):
        check_nesting(value, "x")
