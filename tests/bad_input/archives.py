"""Shards and what names them: tars, manifests, patterns, servers."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from PIL import Image

from bad_input.case import Case, nothing, written
from discrete_lit.data import ImageShards

BLOCK = tarfile.BLOCKSIZE
GOOD = 3


def png(number: int) -> bytes:
    """An 8x8 picture of noise."""
    buffer = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **header: Any) -> bytes:
    """An entry of a tar; other fields of its header may be given, such as `size` and `type`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    padding = -len(content) % BLOCK
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(padding)


def sample(number: int, label: bytes = b"1", image: bytes | None = None) -> bytes:
    """The two entries of a sample."""
    return member(f"s{number}.png", png(number) if image is None else image) + member(f"s{number}.cls", label)


def pax(records: bytes) -> bytes:
    """A PAX header with these records, as they are."""
    return member("pax", records, type=tarfile.XHDTYPE)


def record(key: str, value: str) -> bytes:
    """A PAX record, whose length counts itself."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return f"{length} {key}={value}\n".encode()


END = bytes(2 * BLOCK)
SAMPLES = [sample(number) for number in range(GOOD)]
WHOLE = b"".join(SAMPLES) + END


def patched(block: bytes, start: int, value: bytes) -> bytes:
    """Change bytes of a header and mend its checksum."""
    changed = bytearray(block)
    changed[start : start + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = f"{sum(changed[:BLOCK]):06o}\0 ".encode()
    return bytes(changed)


def manifest(**changes: Any) -> str:
    """The manifest of one shard of three samples."""
    content = {
        "format": "discrete-lit-shards-1",
        "split": "train",
        "count": GOOD,
        "num_classes": 3,
        "classes": ["ant", "bee", "cat"],
        "shuffle_seed": 0,
        "source": "noise",
        "shards": [{"name": "a.tar", "count": GOOD, "sha256": ""}],
    }
    return json.dumps({name: value for name, value in (content | changes).items() if value is not ...})


def read_shards(location: str | list[str], **settings: Any) -> list[str]:
    """The keys of all samples, in order, each with its label where there is one."""
    settings = {"image_size": 8, "batch_size": 1, "num_workers": 0, "max_bad_fraction": 0.0, **settings}
    data = ImageShards(location, **settings)
    found = []
    for batch in data.evaluation_loader("train", 0, 1):
        assert batch["image"].shape[1:] == (3, 8, 8) and str(batch["image"].dtype) == "torch.uint8"
        found += [f"{key} {label}" for key, label in zip(batch["key"], batch.get("label", ["-"] * 9), strict=False)]
    return found


def keys(*expected: str) -> Callable[[list[str]], bool]:
    """Whether samples of these keys, and no others, were read."""
    return lambda found: [entry.rpartition(" ")[0] for entry in found] == list(expected)


ALL = keys("s0", "s1", "s2")


def tar(name: str, content: bytes | Callable[[], bytes], refused: str | None = "a.tar", **more: Any) -> Case:
    """A shard without a manifest, which is counted first."""

    def craft(folder: Path) -> None:
        (folder / "a.tar").write_bytes(content() if callable(content) else content)

    return Case(name=f"tar: {name}", craft=craft, read=lambda folder: read_shards("a.tar"), refused=refused, **more)


def labelled(name: str, content: bytes, refused: str | None = "a.tar", **more: Any) -> Case:
    """A shard that a manifest says to hold three samples of three classes."""

    def craft(folder: Path) -> None:
        (folder / "a.tar").write_bytes(content)
        (folder / "manifest.json").write_text(manifest())

    return Case(name=f"tar: {name}", craft=craft, read=lambda folder: read_shards("a.tar"), refused=refused, **more)


def zeros(count: int, pack: Any) -> bytes:
    """So many zeros, packed, in little memory."""
    buffer = io.BytesIO()
    with pack(buffer, "wb") as file:
        for _ in range(count // 2**20):
            file.write(bytes(2**20))
    return buffer.getvalue()


def packed(parts: Iterable[bytes], level: int = 1) -> bytes:
    """Bytes packed by gzip part by part."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=level, mtime=0) as file:
        for part in parts:
            file.write(part)
    return buffer.getvalue()


def zero_image(name: str, megabytes: int) -> Iterator[bytes]:
    """An entry of zeros."""
    yield member(name, size=megabytes * 2**20)
    yield from [bytes(2**20)] * megabytes


def many_images() -> bytes:
    """A sample of twenty images of 200 MB each."""
    parts = [part for number in range(20) for part in zero_image(f"s.{number}.png", 200)]
    return packed([*parts, member("s.cls", b"1"), END])


def headers_for_hours() -> bytes:
    """Folders without an end in sight, and no sample."""
    return packed([member("folder/", type=tarfile.DIRTYPE) * 1000] * 1200)


def sparse(claimed: int) -> bytes:
    """GNU's old format of a file of holes: 512 bytes that claim to be this long."""
    header = member("s0.png", bytes(BLOCK), type=tarfile.GNUTYPE_SPARSE)
    header = patched(header[:BLOCK], 386, b"00000000000\000000001000\0") + header[BLOCK:]
    return patched(header[:BLOCK], 483, b"%011o\0" % claimed) + header[BLOCK:]


SPARSE_1 = [record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.name", "s0.png")]
FIRST = sample(0)
SIZE_AT, NAME_AT, MODE_AT = 124, 0, 100
CANARY_PICKLE = b"cposix\nsystem\n(S'touch canary'\ntR."

TARS = [
    tar("empty", b""),
    tar("zeros alone", bytes(10240)),
    tar("noise", np.random.RandomState(0).bytes(10240)),
    tar("text", b"not a tar file\n" * 100),
    tar("an HTML page", b"<!DOCTYPE html><html><body>404</body></html>" + bytes(2000)),
    tar("cut before the end mark", WHOLE[: -2 * BLOCK]),
    tar("cut in the end mark", WHOLE[: -BLOCK - 100]),
    tar("cut in a header", WHOLE[: len(SAMPLES[0]) + 100]),
    tar("cut in an image", WHOLE[: len(SAMPLES[0]) + BLOCK + 50]),
    tar("whole", WHOLE, None, right=ALL),
    tar("joined by cat", WHOLE + WHOLE),
    tar("garbage behind the end", WHOLE + b"x" * BLOCK),
    tar("a gigabyte of zeros behind the end", lambda: packed([WHOLE, *[bytes(2**20)] * 1024]), quick=False),
    tar("gzip", gzip.compress(WHOLE), None, right=ALL),
    tar("bzip2", bz2.compress(WHOLE), None, right=ALL),
    tar("xz", lzma.compress(WHOLE), None, right=ALL),
    tar("zstd", b"\x28\xb5\x2f\xfd" + bytes(1000)),
    tar("gzip, cut", gzip.compress(WHOLE)[:-300]),
    tar("gzip without its checksum", gzip.compress(WHOLE)[:-6]),
    tar("gzip with a wrong checksum", gzip.compress(WHOLE)[:-8] + bytes(8)),
    tar("gzip of nothing", gzip.compress(b"")),
    tar("gzip of gzip", gzip.compress(gzip.compress(WHOLE))),
    tar("gzip of 4 GB of zeros", lambda: zeros(2**32, gzip.open), quick=False),
    tar("bzip2 of 2 GB of zeros", lambda: zeros(2**31, bz2.open), quick=False),
    tar("xz of 4 GB of zeros", lambda: zeros(2**32, lzma.open), quick=False),
    tar("a sample of twenty images of 200 MB", many_images, quick=False),
    tar("headers for hours", headers_for_hours, quick=False),
    tar(
        "zip",
        lambda: (buffer := io.BytesIO(), zipfile.ZipFile(buffer, "w").writestr("s0.png", png(0)), buffer)[2].getvalue(),
    ),
    tar("claims 7 GB", member("s0.png", size=7 * 2**30) + b"x" * BLOCK + END),
    tar("claims 2^62", patched(FIRST, SIZE_AT, b"\x80" + (2**62).to_bytes(11, "big")) + END),
    tar("claims 2^63", patched(FIRST, SIZE_AT, b"\x80" + (2**63).to_bytes(11, "big")) + END),
    tar("claims 2^88", patched(FIRST, SIZE_AT, b"\x80" + b"\xff" * 11) + END),
    tar("claims a negative size", patched(FIRST, SIZE_AT, b"\xff" * 12) + END),
    tar("a size that is no number", patched(FIRST, SIZE_AT, b"12 monkeys!\0") + END),
    tar("a mode that is no number", patched(FIRST, MODE_AT, b"rwxrwxr\0") + END),
    tar("a wrong checksum", FIRST[:150] + b"9" + FIRST[151:] + END),
    tar("holes that claim 7 GB", sparse(7 * 2**30) + member("s0.cls", b"1") + END),
    tar("holes that claim 8 GB less one", sparse(2**33 - 1) + END),
    tar("PAX header of 5 GB", member("pax", type=tarfile.XHDTYPE, size=5 * 2**30) + WHOLE),
    tar("global PAX header of 5 GB", member("pax", type=tarfile.XGLTYPE, size=5 * 2**30) + WHOLE),
    tar("long name of 5 GB", member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=5 * 2**30) + WHOLE),
    tar("long link of 5 GB", member("././@LongLink", type=tarfile.GNUTYPE_LONGLINK, size=5 * 2**30) + WHOLE),
    tar("PAX size of 7 GB", pax(record("size", str(7 * 2**30))) + FIRST + END),
    tar("PAX size of -1", pax(record("size", "-1")) + FIRST + END),
    tar("PAX size that is no number", pax(record("size", "many")) + FIRST + END),
    tar("PAX size of 5000 digits", pax(record("size", "9" * 5000)) + FIRST + END),
    tar("PAX holes of 7 GB", pax(b"".join(SPARSE_1) + record("GNU.sparse.realsize", str(7 * 2**30))) + FIRST + END),
    tar("PAX holes with a map of noise", pax(record("GNU.sparse.map", "0,x,1")) + FIRST + END),
    tar(
        "PAX holes with an endless map",
        pax(b"".join(SPARSE_1) + record("GNU.sparse.realsize", "8")) + member("s0.png", b"9" * 4096) + END,
    ),
    tar("PAX record that claims more", pax(b"99999999 path=x.png\n") + FIRST + END),
    tar("PAX record of no length", pax(b"path=x.png\n") + FIRST + END, right=keys("s0")),
    tar("PAX record of length 0", pax(b"0 path=x.png\n") + FIRST + END),
    tar("PAX name with a null", pax(record("path", "s0\0.png")) + WHOLE, "a.tar", right=lambda found: len(found) == 3),
    tar("PAX time that is no number", pax(record("mtime", "nan")) + WHOLE, "a.tar", right=ALL),
    tar(
        "PAX name with an escape sequence",
        pax(record("path", "\x1b[2Jerror: fine.png")) + FIRST[:0] + member("x", b"") + END,
    ),
    labelled(
        "an image that is a link",
        member("s0.png", type=tarfile.SYMTYPE, linkname="/etc/passwd") + WHOLE[len(FIRST) - 2 * BLOCK :],
    ),
    labelled(
        "an image that is a hard link",
        WHOLE[: -2 * BLOCK] + member("s9.png", type=tarfile.LNKTYPE, linkname="s0.png") + END,
    ),
    labelled(
        "an image that is a device",
        member("s0.png", type=tarfile.CHRTYPE) + member("s0.cls", b"1") + b"".join(SAMPLES[1:]) + END,
    ),
    labelled(
        "an image that is a pipe",
        member("s0.png", type=tarfile.FIFOTYPE) + member("s0.cls", b"1") + b"".join(SAMPLES[1:]) + END,
    ),
    labelled("an image that is empty", sample(0, image=b"") + b"".join(SAMPLES[1:]) + END),
    labelled("an image of text", sample(0, image=b"no image") + b"".join(SAMPLES[1:]) + END),
    labelled("no label", member("s0.png", png(0)) + b"".join(SAMPLES[1:]) + END),
    labelled(
        "two images",
        member("s0.png", png(0)) + member("s0.jpg", png(0)) + member("s0.cls", b"1") + b"".join(SAMPLES[1:]) + END,
    ),
    labelled("a sample twice", SAMPLES[0] + SAMPLES[0] + SAMPLES[1] + SAMPLES[2] + END),
    labelled("one sample more than the manifest says", WHOLE[: -2 * BLOCK] + sample(3) + END),
    labelled("one sample less than the manifest says", b"".join(SAMPLES[:2]) + END),
    labelled(
        "pickles beside the images",
        b"".join(SAMPLES[:2]) + member("s2.pyd", CANARY_PICKLE) + member("s2.pth", CANARY_PICKLE) + SAMPLES[2] + END,
        None,
        right=ALL,
    ),
    labelled("a pickle in place of an image", sample(0, image=CANARY_PICKLE) + b"".join(SAMPLES[1:]) + END),
    labelled(
        "names that lead away",
        member("../../s0.png", png(0)) + member("../../s0.cls", b"1") + b"".join(SAMPLES[1:]) + END,
        None,
        right=keys("../../s0", "s1", "s2"),
    ),
    *(
        labelled(f"label {name}", sample(0, label=label) + b"".join(SAMPLES[1:]) + END)
        for name, label in {
            "of text": b"cat",
            "of nothing": b"",
            "-1": b"-1",
            "3 of 3": b"3",
            "1.0": b"1.0",
            "1e0": b"1e0",
            "of 5000 digits": b"9" * 5000,
            "of 1 MB": b"1" * 2**20,
            "of other digits": "١".encode(),
            "with a null": b"1\0",
            "of two numbers": b"1 1",
        }.items()
    ),
]


def manifest_case(name: str, content: str | bytes, refused: str | None = "manifest.json", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "shards").mkdir()
        (folder / "shards" / "a.tar").write_bytes(WHOLE)
        written("shards/manifest.json", content)(folder)

    return Case(
        name=f"manifest: {name}", craft=craft, read=lambda folder: read_shards("shards"), refused=refused, **more
    )


def shards(*entries: Any) -> str:
    return manifest(shards=list(entries), count=...)


MANIFESTS = [
    manifest_case("whole", manifest(), None, right=lambda found: found == ["s0 1", "s1 1", "s2 1"]),
    *(
        manifest_case(f"is {name}", content)
        for name, content in {
            "null": "null",
            "a list": "[]",
            "a text": '"manifest"',
            "a number": "12",
            "empty": "",
            "no UTF-8": b"\xff\xfe{}",
            "100,000 lists deep": "[" * 100_000,
            "of another format": manifest(format="mine-1"),
            "of no format": manifest(format=...),
            "a number of 5000 digits": manifest().replace('"count": 3', '"count": ' + "9" * 5000),
            "given a key twice": manifest()[:-1] + ', "classes": ["x", "y", "z"]}',
        }.items()
    ),
    manifest_case("40 MB of lists", "[" + "[]," * (40 * 2**20 // 3) + "0]", quick=False),
    manifest_case("30 MB of lists", "[" + "[]," * (30 * 2**20 // 3) + "0]", quick=False),
    *(
        manifest_case(f"count of a shard is {value!r}", shards({"name": "a.tar", "count": value}))
        for value in (-1, -8, 8.9, 3.0, "3", None, True, 10**15, float("inf"), float("nan"), [3])
    ),
    manifest_case("a shard without a count", shards({"name": "a.tar"})),
    manifest_case("a shard without a name", shards({"count": 3})),
    *(
        manifest_case(f"a shard named {value!r}", shards({"name": value, "count": 3}))
        for value in ("../a.tar", "/etc/a.tar", "b/a.tar", "a.txt", "", None, 3, "a\0.tar", "\x1b[2Ja.tar/")
    ),
    manifest_case("a shard that is not there", shards({"name": "b.tar", "count": 3}), "b.tar"),
    manifest_case(
        "a shard named by an escape sequence", shards({"name": "\x1b[2J\nerror: b.tar", "count": 3}), "b.tar"
    ),
    manifest_case("one shard eight times", shards(*[{"name": "a.tar", "count": 3}] * 8)),
    manifest_case("counts one too many", shards({"name": "a.tar", "count": 4}), "a.tar"),
    manifest_case("counts one too few", shards({"name": "a.tar", "count": 2}), "a.tar"),
    manifest_case("no shards", shards(), "shards"),
    manifest_case("shards by name", manifest(shards={"a.tar": 3})),
    manifest_case("shards of text", manifest(shards=["a.tar"])),
    manifest_case("null shards", manifest(shards=None)),
    manifest_case("a total that is none", manifest(count=4)),
    manifest_case("a total of text", manifest(count="3")),
    *(
        manifest_case(f"classes {name}", manifest(classes=value, num_classes=number))
        for name, value, number in (
            ("of one text", "ab", 2),
            ("of numbers", [1, 2, 3], 3),
            ("missing", ..., 3),
            ("null", None, 3),
            ("twice", ["ant", "ant", "bee"], 3),
            ("fewer than their number", ["ant", "bee"], 3),
            ("of a number that is text", ["ant", "bee", "cat"], "3"),
            ("of ten billion", ["ant"], 10**10),
        )
    ),
    manifest_case("fewer classes than labels", manifest(classes=["ant"], num_classes=1), "a.tar"),
]


def located(name: str, location: Any, refused: str, craft: Callable[[Path], None] = nothing, **more: Any) -> Case:
    settings = more.pop("settings", {})
    return Case(
        name=f"location: {name}",
        craft=craft,
        read=lambda folder: read_shards(location, **settings),
        refused=refused,
        **more,
    )


def linked(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: os.symlink(target, folder / name)


LOCATIONS = [
    located("a billion numbers", "a-{000000..999999999}.tar", "a-{000000..999999999}.tar"),
    located("two billion numbers", "a-{1..2000000000}.tar", "a-{1..2000000000}.tar"),
    located("numbers of a hundred digits", "a-{1.." + "9" * 100 + "}.tar", "a-{1..9999"),
    located("2^40 words", "{a,b}" * 40 + ".tar", "{a,b}"),
    located("letters to the 20th", "{a..z}" * 20 + ".tar", "{a..z}"),
    located("braces in braces", "{" * 500 + "a" + ",b}" * 500 + ".tar", "{{{"),
    located("an open brace", "a-{1..3.tar", "a-{1..3.tar"),
    located("a step of zero", "a-{1..9..0}.tar", "a-1.tar"),
    located("missing files", "a-{1..3}.tar", "a-1.tar"),
    located("no file matches", "a-*.tar", "a-*.tar"),
    located("an empty name", "", "''"),
    located("an empty list", [], "list of shards is empty"),
    located("a number", [3], "3"),
    located("a null", "a\0.tar", "a"),
    located("a folder without shards", ".", "."),
    located("a file that is no shard", "a.txt", "a.txt", written("a.txt", "x")),
    located("a pipe", "a.tar", "a.tar", lambda folder: os.mkfifo(folder / "a.tar")),
    located("a link to /dev/zero", "a.tar", "a.tar", linked("a.tar", "/dev/zero")),
    located("a link to itself", "a.tar", "a.tar", linked("a.tar", "a.tar")),
    located("a name of 5000 letters", "a" * 5000 + ".tar", "aaaa"),
    located("counts of text", "a.tar", "a.tar", settings={"train_count": [3, 4]}),
    located("a scheme that is none", "nowhere://a/b.tar", "nowhere", settings={"train_count": 3}),
    located("a command that fails", "pipe:false", "pipe:false", settings={"train_count": 3}, quick=False),
    located("a command that is silent", "pipe:sleep 1000", "sleep 1000", settings={"train_count": 3}, quick=False),
    located(
        "a command without an end, of zeros",
        "pipe:cat /dev/zero",
        "/dev/zero",
        settings={"train_count": 3},
        quick=False,
    ),
    located("a command without an end, of text", "pipe:yes", "yes", settings={"train_count": 3}, quick=False),
    located(
        "a command that is not there",
        "pipe:no_such_command_here",
        "no_such_command_here",
        settings={"train_count": 3},
        quick=False,
    ),
    located("a server that is not there", "http://127.0.0.1:9/a.tar", "127.0.0.1:9/manifest.json", quick=False),
    located("a host that is not there", "http://no-such-host.invalid/a.tar", "no-such-host.invalid", quick=False),
    located("a port that is none", "http://127.0.0.1:99999/a.tar", "127.0.0.1:99999", quick=False),
    located("an address that is none", "http://[::1/a.tar", "[::1/a.tar"),
]


class _Trouble(BaseHTTPRequestHandler):
    """Answers as its server's kind of trouble says."""

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        kind, ended = self.server.kind, self.server.ended  # type: ignore[attr-defined]
        if kind == "mute":
            ended.wait(120)
        elif kind == "a letter a second":
            while not ended.wait(1):
                self.wfile.write(b"H")
        elif kind == "no HTTP":
            self.wfile.write(b"\0\1\2 hello\r\n\r\n")
        elif kind == "endless header":
            for number in range(10**6):
                self.wfile.write(f"X-{number}: {'x' * 1000}\r\n".encode())
        elif kind.isdecimal():
            self.send_error(int(kind))
        elif kind in ("a loop", "to a file", "to nowhere"):
            target = {"a loop": self.path, "to a file": "file:///etc/passwd", "to nowhere": "http://127.0.0.1:9/"}
            self.send_response(302)
            self.send_header("Location", target[kind])
            self.end_headers()
        elif self.path.endswith("manifest.json") and kind != "endless":
            self.send_error(404)
        else:
            self._body(kind, ended)

    def _body(self, kind: str, ended: Event) -> None:
        self.send_response(200)
        length = {"longer than it says": 2 * BLOCK, "a length that is none": "many"}.get(kind, len(WHOLE))
        if not kind.startswith("endless"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind == "endless":
            while not ended.is_set():
                self.wfile.write(b"[" + b"[]," * 2**16)
        elif kind == "endless image":
            self.wfile.write(member("s0.png", size=2**40))
            while not ended.is_set():
                self.wfile.write(bytes(2**16))
        elif kind == "stops":
            self.wfile.write(WHOLE[: len(WHOLE) // 2])
            ended.wait(120)
        else:
            self.wfile.write(WHOLE[: len(WHOLE) // 2] if kind == "breaks off" else WHOLE)


def read_from_server(kind: str) -> list[str]:
    """Read a shard from a server with this kind of trouble."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Trouble)
    server.daemon_threads = True
    server.kind, server.ended = kind, Event()  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # a reader that left
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        return read_shards(f"http://127.0.0.1:{server.server_address[1]}/a.tar", train_count=3)
    finally:
        server.ended.set()  # type: ignore[attr-defined]
        server.shutdown()


def served(kind: str, refused: str | None = "127.0.0.1", **more: Any) -> Case:
    return Case(
        name=f"server: {kind}",
        craft=nothing,
        read=lambda folder: read_from_server(kind),
        refused=refused,
        quick=False,
        **more,
    )


SERVERS = [
    served("well", None, right=ALL),
    *map(
        served, ("mute", "a letter a second", "no HTTP", "endless header", "503", "404", "401", "a loop", "to a file")
    ),
    *map(served, ("to nowhere", "stops", "breaks off", "endless image")),
    served("longer than it says", right=ALL),
    served("a length that is none", right=ALL),
    Case(
        name="server: endless manifest",
        craft=nothing,
        read=lambda folder: _read_endless_manifest(),
        refused="manifest.json",
        quick=False,
    ),
]


def _read_endless_manifest() -> list[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Trouble)
    server.daemon_threads = True
    server.kind, server.ended = "endless", Event()  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        return read_shards(f"http://127.0.0.1:{server.server_address[1]}/a.tar")
    finally:
        server.ended.set()  # type: ignore[attr-defined]
        server.shutdown()


CASES = [*TARS, *MANIFESTS, *LOCATIONS, *SERVERS]
