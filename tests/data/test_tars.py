"""What a shard may look like: cut off anywhere, compressed, damaged, or claiming more than it holds."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discrete_lit.data import ImageShards
from discrete_lit.data.shard_set import Shard
from discrete_lit.data.tars import BrokenShard, TarIndex, count_samples, find_labels, read_samples


def shard_bytes(count: int, size: int = 700) -> bytes:
    """A tar of `count` samples, each an image of noise and a label."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(count):
            noise = np.random.RandomState(number).bytes(size)
            for name, data in ((f"{number:04d}.jpg", noise), (f"{number:04d}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **settings: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in settings.items():
        setattr(info, key, value)
    return info


def write(path: Path, content: bytes) -> Shard:
    path.write_bytes(content)
    return Shard(str(path), 3)


def read(shard: Shard) -> list[Any]:
    return [sample for _, sample in read_samples(shard, np.ones(shard.count, dtype=bool))]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_every_cut_is_noticed(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    plain = shard_bytes(3)
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        members = list(archive)
        end = archive.offset
    whole = compress(plain)
    assert count_samples(write(tmp_path / "whole.tar", whole)) == 3
    if compress is bytes:
        # Every boundary of a member, of its content and of its header, and all of the cuts around them.
        places = [place for info in members for place in (info.offset, info.offset + 512, info.offset_data + info.size)]
        cuts = sorted({place + shift for place in (*places, end) for shift in (-1, 0, 1, 256)} & set(range(end + 512)))
    else:
        cuts = list(range(0, len(whole), 37)) + list(range(len(whole) - 12, len(whole)))
    for cut in cuts:
        with pytest.raises(BrokenShard, match=r"cannot read .*cut\.tar to its end"):
            count_samples(write(tmp_path / "cut.tar", whole[:cut]))


def test_a_cut_names_the_shard_and_the_byte(tmp_path: Path) -> None:
    whole = shard_bytes(3)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        boundary = list(archive)[3].offset
    with pytest.raises(BrokenShard, match=rf"cut\.tar .* at byte {boundary:,}: the file ends without the end mark"):
        count_samples(write(tmp_path / "cut.tar", whole[:boundary]))
    # The image of sample 1 is whole, and its label is lost: it is one of the samples that are missed.
    samples = read(write(tmp_path / "cut.tar", whole[:boundary]))
    assert [sample.problem is None for sample in samples] == [True, False, False]
    assert f"ends after 1 of 3 samples (at byte {boundary:,}" in samples[1].problem
    # What only lacks its end mark gets one as the message says.
    with open(tmp_path / "mended.tar", "wb") as file:
        file.write(whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512])
        file.truncate(file.tell() + 1024)
    assert count_samples(Shard(str(tmp_path / "mended.tar"), 0)) == 3


@pytest.mark.parametrize("damage", ["header", "zeros", "joined", "tail"])
def test_damage_in_the_middle_is_no_end(tmp_path: Path, damage: str) -> None:
    whole = bytearray(shard_bytes(3))
    if damage == "header":
        whole[2560 + 3] ^= 0xFF
    elif damage == "zeros":  # A block that was never written.
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            start = list(archive)[2].offset
        whole[start : start + 512] = bytes(512)
    elif damage == "joined":
        whole += shard_bytes(2)
    else:  # Space that was reserved, and not filled.
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            start = list(archive)[2].offset
        whole[start:] = bytes(2**21)
    message = {"header": "there is no header", "zeros": "more follows", "joined": "more follows", "tail": "but zeros"}
    with pytest.raises(BrokenShard, match=message[damage]):
        count_samples(write(tmp_path / "damaged.tar", bytes(whole)))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_what_a_shard_is_compressed_with_is_seen_in_it(tmp_path: Path, compress: Any, name: str) -> None:
    shard = write(tmp_path / name, compress(shard_bytes(3)))
    assert count_samples(shard) == 3
    assert [sample.key for sample in read(shard)] == ["0000", "0001", "0002"]


def test_a_flipped_bit_of_a_gzip_is_noticed(tmp_path: Path) -> None:
    stored = bytearray(gzip.compress(shard_bytes(3), compresslevel=0))
    stored[stored.index(np.random.RandomState(1).bytes(700)) + 100] ^= 1
    with pytest.raises(BrokenShard, match="CRC"):
        count_samples(write(tmp_path / "a.tgz", bytes(stored)))


def claims(size: int) -> bytes:
    """A header of an image of `size` bytes, of which there are but a few."""
    info = member("0000.jpg", size)
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(512) + bytes(1024)


def pax(**headers: str) -> bytes:
    info = member("0000.jpg", 0)
    info.pax_headers = headers
    return tar_of((info, b""), format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = member("long", 2**33, kind)
    content = info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    with pytest.raises(BrokenShard, match=r"a header claims 8,589,934,592 bytes"):
        count_samples(write(tmp_path / "a.tar", content))


@pytest.mark.parametrize(
    "content",
    [
        claims(2**40),
        claims(2**63),
        claims(-1),
        pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        pax(**{"GNU.sparse.map": "0,x", "GNU.sparse.size": "7"}),
        pax(size="99999999999999999999999"),
    ],
)
def test_headers_that_make_no_sense_are_one_error(tmp_path: Path, content: bytes) -> None:
    for shard in (write(tmp_path / "a.tar", content), write(tmp_path / "a.tgz", gzip.compress(content))):
        with pytest.raises(BrokenShard, match=r"cannot read .*a\.t"):
            count_samples(shard)
        try:
            assert all(sample.problem for sample in read(shard))
        except BrokenShard:
            pass


def test_an_entry_above_the_limit_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A sparse file of a few bytes that claims seven gigabytes.
    sparse = member("0001.jpg", 512)
    sparse.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": str(7 * 10**9), "GNU.sparse.name": "0001.jpg"}
    shard = write(
        tmp_path / "a.tar",
        tar_of(
            (member("0000.jpg", 600), bytes(600)),
            (sparse, bytes(512)),
            (member("0002.jpg", 300), bytes(300)),
            format=tarfile.PAX_FORMAT,
        ),
    )
    problems = [sample.problem for sample in read(shard)]
    assert problems[0] is None and problems[2] is None
    assert "claims 7,000,000,000 bytes, more than DISCRETE_LIT_MAX_IMAGE_MEGABYTES allows" in problems[1]
    monkeypatch.setenv("DISCRETE_LIT_MAX_IMAGE_MEGABYTES", "0.0005")
    assert [sample.problem is None for sample in read(shard)] == [False, False, True]
    monkeypatch.setenv("DISCRETE_LIT_MAX_IMAGE_MEGABYTES", "much")
    with pytest.raises(ValueError, match="DISCRETE_LIT_MAX_IMAGE_MEGABYTES is 'much'"):
        read(shard)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    shard = write(
        tmp_path / "a.tar",
        tar_of(
            (member("0000.jpg", kind=tarfile.SYMTYPE, linkname="x"), b""),
            (member("0001.jpg", kind=tarfile.FIFOTYPE), b""),
            (member("0002.heic", 4), b"heic"),
            (member("readme.md", 4), b"text"),
            (member("._0003.jpg", 4), b"mac!"),
        ),
    )
    assert count_samples(shard) == 3
    problems = [sample.problem for sample in read(shard)]
    for problem, message in zip(
        problems, ("is no file but a link", "but a device", "a .heic, which Pillow"), strict=True
    ):
        assert message in problem


def test_labels_are_found_by_the_headers(tmp_path: Path) -> None:
    content = tar_of((member("a.jpg", 4), b"1234"), (member("b.jpg", 4), b"1234"), (member("b.cls", 1), b"0"))
    assert find_labels(write(tmp_path / "a.tar", content)).tolist() == [False, True]


def test_an_archive_of_a_data_set_is_not_read_short(tmp_path: Path) -> None:
    whole = shard_bytes(3)
    (tmp_path / "a.tar").write_bytes(whole)
    assert len(list(TarIndex(tmp_path / "a.tar").files())) == 6
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        (tmp_path / "a.tar").write_bytes(whole[: list(archive)[4].offset])
    with pytest.raises(ValueError, match="ends without the end mark"):
        list(TarIndex(tmp_path / "a.tar").files())


def test_a_cut_shard_without_a_manifest_is_refused_before_a_run(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar", "c.tar"):
        (tmp_path / name).write_bytes(shard_bytes(3)[: None if name == "a.tar" else 2560])
    with pytest.raises(
        ValueError, match=r"(?s)2 of 3 shards cannot be counted.*b\.tar.*byte 2,560.*c\.tar.*byte 2,560"
    ):
        _ = ImageShards(str(tmp_path), image_size=8, batch_size=1, num_classes=2).shards
