import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from discrete_lit.core.files import atomic_write, atomic_write_text, content_sha256, file_sha256, publish


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    with atomic_write(path) as file:
        file.write(b"12")
        assert not path.exists()
        file.write(b"34")
    assert path.read_bytes() == b"1234"
    atomic_write_text(path, "Käse\n")
    assert path.read_bytes() == "Käse\n".encode()
    assert os.listdir(tmp_path) == ["numbers.bin"]


@pytest.mark.parametrize("mistake", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, mistake: type[BaseException]) -> None:
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"before")
    with pytest.raises(mistake), atomic_write(path) as file:
        file.write(b"half")
        raise mistake("the disk is full")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["numbers.bin"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"before")

    def full_disk(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 5
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        atomic_write_text(path, "after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["numbers.bin"]


def test_a_folder_takes_the_place_of_a_folder_or_a_file_of_a_file(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    publish(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["old", "old/new"]


def test_hashes_are_of_the_content(tmp_path: Path) -> None:
    content = "Käse".encode() * 1000
    expected = hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == content_sha256(content) == content_sha256("Käse" * 1000) == expected
    assert content_sha256(iter([content[:7], content[7:-5], "Käse"])) == expected


def test_nothing_heavy_is_loaded() -> None:
    script = "import sys, discrete_lit.core.files; print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
