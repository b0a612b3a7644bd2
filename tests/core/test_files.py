import errno
import hashlib
import io
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from discrete_lit.core.files import Npz, RowFile, atomic_write, atomic_write_text, content_sha256, file_sha256, publish


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_rows_are_written_in_place_by_several(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy.partial"
    RowFile.create(path, dtype, (7, 2, 3))
    rows = np.arange(42).reshape(7, 2, 3)
    for numbers in ([5, 6, 0], [1, 3, 2], [4]):
        file = RowFile(path)
        file.write(np.array(numbers), rows[numbers])
        assert np.array_equal(file.read(np.array(numbers)), rows[numbers])
        file.close()
    found = np.load(path, mmap_mode="r")
    assert found.dtype == dtype and np.array_equal(found, rows)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"rows\.npy\.partial' is not a readable \.npy file"):
        RowFile(path)


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    RowFile.create(path, np.uint8, (10, 5))
    rows = RowFile(path)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, largest[1]))
    try:
        for write in (lambda file: file.write(bytes(101)), lambda file: torch.save(torch.zeros(101), file)):
            with pytest.raises(OSError) as met, atomic_write(path) as file:
                write(file)
            assert met.value.filename == str(path) and met.value.errno == errno.EFBIG
        with pytest.raises(OSError) as met:
            rows.write(np.arange(10), np.zeros((10, 5), np.uint8))
        assert met.value.filename == str(path)
        rows.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    with pytest.raises(OSError) as met, atomic_write(path / "below"):
        pass
    assert str(path / "below") in str(met.value)


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


class TestNpz:
    """npz files that are broken, in every way that was thought of: one kind of error, which names the file."""

    @staticmethod
    def written(path, name="a.npy", data=None, **zip_settings):
        if data is None:
            buffer = io.BytesIO()
            np.save(buffer, np.arange(12, dtype=np.int64).reshape(4, 3))
            data = buffer.getvalue()
        with zipfile.ZipFile(path, "w", **zip_settings) as file:
            file.writestr(name, data)
        return path

    @staticmethod
    def header(text: str) -> bytes:
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_headers_values_and_rows(self, tmp_path, compression):
        with Npz(self.written(tmp_path / "a.npz", compression=compression)) as file:
            assert file.headers == {"a": ((4, 3), np.dtype(np.int64), False)}
            assert file.read("a").tolist() == np.arange(12).reshape(4, 3).tolist()
            assert [row.tolist() for row in file.rows("a")] == file.read("a").tolist()

    def test_a_claim_of_more_than_there_is_takes_no_memory(self, tmp_path):
        data = self.header("{'descr': '<f8', 'fortran_order': False, 'shape': (4000000000000,), }\n") + bytes(80)
        with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: .*32,000,000,000,000 bytes"):
            Npz(self.written(tmp_path / "a.npz", data=data))

    @pytest.mark.parametrize(
        "text",
        [
            "{'descr': open('x'), 'fortran_order': False, 'shape': (1,), }\n",
            "{'descr': '<f8', 'fortran_order': False, 'shape': 3, }\n",
            "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }\n",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), ",
            "((((((((",
        ],
    )
    def test_broken_headers(self, tmp_path, text):
        with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: "):
            Npz(self.written(tmp_path / "a.npz", data=self.header(text) + bytes(8)))

    def test_objects_are_not_unpickled(self, tmp_path):
        np.savez(tmp_path / "a.npz", a=np.array([print], dtype=object))
        with Npz(tmp_path / "a.npz") as file:
            with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: .*allow_pickle"):
                file.read("a")
            with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: "):
                list(file.rows("a"))

    @pytest.mark.parametrize("read", [lambda file: file.read("a"), lambda file: list(file.rows("a"))])
    def test_a_flipped_bit_is_noticed(self, tmp_path, read):
        np.savez(tmp_path / "a.npz", a=np.arange(20000))
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[data.index(np.int64(15000).tobytes())] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with (
            Npz(tmp_path / "a.npz") as file,
            pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: Bad CRC-32"),
        ):
            read(file)

    def test_encrypted_and_unknown_compression(self, tmp_path):
        whole = self.written(tmp_path / "a.npz").read_bytes()
        for offset, value in ((6, 1), (8, 99)):
            data = bytearray(whole)
            data[offset] = value
            data[data.index(b"PK\x01\x02") + offset + 2] = value
            (tmp_path / "a.npz").write_bytes(data)
            with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: a: "):
                Npz(tmp_path / "a.npz")

    @pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06"])
    def test_no_zip(self, tmp_path, content):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: File is not a zip"):
            Npz(tmp_path / "a.npz")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.npz' is not a readable npz file: .*No such file"):
            Npz(tmp_path / "a.npz")
