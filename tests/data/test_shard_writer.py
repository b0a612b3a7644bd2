import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from discrete_lit.core.locks import sole_writer
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders, Entry, Source


class Made(Source):
    """Numbered files whose content says which they are; reading fails at the given number of reads."""

    def __init__(self, count: int = 23, classes: int = 3, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.reads = 0
        names = [f"class {label}" for label in range(classes)]
        entries = [Entry(f"image-{index:03d}", "png", index % classes, 100 + index) for index in range(count)]
        super().__init__("made", classes=names, entries=entries)

    def read(self, index: int) -> bytes:
        if self.reads == self.fail_at:
            raise KeyboardInterrupt
        self.reads += 1
        return bytes([index]) * (100 + index)


def write(
    source: Source, output: Path, *, split: str = "train", samples_per_shard: int = 5, shuffle_seed: int | None = 0
):
    return write_shards(source, output, split=split, samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed)


def samples_of(shard: Path) -> list[dict]:
    """What webdataset itself makes of a shard."""
    with open(shard, "rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def keys(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [name.split(".")[0] for name in archive.getnames() if name.endswith(".cls")]
    return names


def test_webdataset_reads_back_every_sample_and_the_manifest_is_true(tmp_path: Path) -> None:
    manifest = write(Made(), tmp_path)
    samples: dict[str, tuple[bytes, int]] = {}
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    for shard in manifest["shards"]:
        assert hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
        read = samples_of(tmp_path / shard["name"])
        assert len(read) == shard["count"]
        samples |= {sample["__key__"]: (sample["png"], int(sample["cls"])) for sample in read}
    assert samples == {f"image-{i:03d}": (bytes([i]) * (100 + i), i % 3) for i in range(23)}
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    expected = {
        "format": "discrete-lit-shards-1",
        "split": "train",
        "count": 23,
        "num_classes": 3,
        "classes": ["class 0", "class 1", "class 2"],
        "shuffle_seed": 0,
        "source": "made",
        "samples_per_shard": 5,
    }
    assert expected.items() <= manifest.items()
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"train-{i:06d}.tar" for i in range(5))]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write(Made(), tmp_path / "a")
    write(Made(), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_shuffle_is_fixed_by_the_seed_and_the_keys(tmp_path: Path) -> None:
    in_order = [f"image-{index:03d}" for index in range(23)]
    write(Made(), tmp_path / "none", shuffle_seed=None)
    assert keys(tmp_path / "none") == in_order
    write(Made(), tmp_path / "0")
    write(Made(), tmp_path / "1", shuffle_seed=1)
    first, second = keys(tmp_path / "0"), keys(tmp_path / "1")
    assert sorted(first) == sorted(second) == in_order
    assert len({tuple(in_order), tuple(first), tuple(second)}) == 3
    assert first == sorted(in_order, key=lambda key: hashlib.sha256(f"0 {key}".encode()).digest())


@pytest.mark.parametrize("fail_at", [0, 4, 5, 12, 22])
def test_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, fail_at: int) -> None:
    write(Made(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(Made(fail_at=fail_at), tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    second = Made()
    write(second, tmp_path / "cut")
    assert second.reads == 23 - fail_at // 5 * 5, "finished shards are not read again"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_run_killed_while_a_shard_is_written(tmp_path: Path) -> None:
    """The process ends without any clean-up, in the middle of a tar."""
    for index in range(23):
        path = tmp_path / "in" / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * 100)
    script = """
import os, sys, tarfile
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders
add, done = tarfile.TarFile.addfile, []
def addfile(archive, *arguments):
    done.append(add(archive, *arguments))
    if len(done) == 27:
        archive.fileobj.flush()
        os._exit(9)
tarfile.TarFile.addfile = addfile
write_shards(ClassFolders(sys.argv[1]), sys.argv[2], split="train", samples_per_shard=5)
"""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "in"), str(cut)], check=False)
    assert ended.returncode == 9
    assert (cut / "train-000002.tar.tmp").stat().st_size > 0
    kept = {path.name: path.stat().st_ino for path in cut.glob("*.tar")}
    assert sorted(kept) == ["train-000000.tar", "train-000001.tar"]
    write(ClassFolders(tmp_path / "in"), cut)
    assert kept.items() <= {path.name: path.stat().st_ino for path in cut.glob("*.tar")}.items()
    write(ClassFolders(tmp_path / "in"), whole)
    assert contents(cut) == contents(whole)


def test_finished_output_is_checked_and_kept(tmp_path: Path) -> None:
    write(Made(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = Made()
    write(second, tmp_path)
    assert second.reads == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_images_that_changed_under_the_same_names_sizes_and_times_are_noticed(
    tmp_path: Path, interrupted: bool
) -> None:
    for index in range(12):
        path = tmp_path / "in" / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * 100)
    write(ClassFolders(tmp_path / "in"), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert write(ClassFolders(tmp_path / "in"), tmp_path / "out") and contents(tmp_path / "out") == before
    if interrupted:
        (tmp_path / "out" / "manifest.json").rename(tmp_path / "out" / "manifest.unfinished.json")
    state = path.stat()
    path.write_bytes(bytes([99]) * 100)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match=r"have changed under the same names and sizes since .*train-00000\d\.tar was"):
        write(ClassFolders(tmp_path / "in"), tmp_path / "out")
    assert {name: value for name, value in contents(tmp_path / "out").items() if name.endswith(".tar")} == {
        name: value for name, value in before.items() if name.endswith(".tar")
    }


def test_files_older_than_their_shard_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.png").write_bytes(bytes(100))
    write(ClassFolders(tmp_path / "in"), tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    later = shard.stat().st_mtime_ns + 3600 * 10**9
    os.utime(shard, ns=(later, later))
    monkeypatch.setattr(ClassFolders, "read", lambda *_: pytest.fail("read"))
    write(ClassFolders(tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize("interrupted", [False, True])
def test_damaged_and_missing_shards_are_written_again(tmp_path: Path, interrupted: bool) -> None:
    write(Made(), tmp_path / "whole")
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            write(Made(fail_at=21), tmp_path / "bad")
    else:
        write(Made(), tmp_path / "bad")
    damaged = tmp_path / "bad" / "train-000001.tar"
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "bad" / "train-000003.tar").unlink()
    again = Made()
    write(again, tmp_path / "bad")
    assert again.reads == (13 if interrupted else 10)
    assert contents(tmp_path / "bad") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "test"}, "split: 'train' there, 'test' now"),
        ({"shuffle_seed": 1}, "shuffle_seed: 0 there, 1 now"),
        ({"samples_per_shard": 6}, "samples_per_shard: 5 there, 6 now"),
        ({"source": Made(24)}, "count: 23 there, 24 now"),
        ({"source": Made(classes=4)}, "num_classes: 3 there, 4 now"),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_output_of_other_settings_is_refused(tmp_path: Path, changed: dict, message: str, interrupted: bool) -> None:
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            write(Made(fail_at=7), tmp_path)
    else:
        write(Made(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        write(**{"source": Made(), "output": tmp_path, **changed})
    assert contents(tmp_path) == before


def test_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="no manifest"):
        write(Made(), tmp_path)
    assert contents(tmp_path) == {"train-000000.tar": hashlib.sha256(b"precious").hexdigest()}


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": [1]}'])
def test_unreadable_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        write(Made(), tmp_path)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "shards"), pytest.raises(ValueError, match="is being written by"):
        write(Made(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(Made(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"split": "a/b"}, "split 'a/b'"),
        ({"split": ""}, "split ''"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(Made(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
