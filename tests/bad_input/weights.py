"""Checkpoints and published weights: damaged, packed again, with code, with numbers or settings that cannot be."""

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from helpers.tiny_runs import TOKENIZER, generator_settings
from safetensors.torch import save as save_tensors

from bad_input.case import CANARY, Case
from discrete_lit.checkpoints import instantiate, load, save
from discrete_lit.core.weight_files import read_weights
from discrete_lit.pretrained.reading import read_state


@cache
def checkpoints() -> dict[str, bytes]:
    """The checkpoints of a tokenizer and of a generator on it, made once."""
    with TemporaryDirectory() as folder:
        tokenizer, generator = Path(folder, "tokenizer.ckpt"), Path(folder, "generator.ckpt")
        save(instantiate(copy.deepcopy(TOKENIZER["model"])), tokenizer)
        save(instantiate(generator_settings(tokenizer)["model"]), generator)
        return {"tokenizer.ckpt": tokenizer.read_bytes(), "generator.ckpt": generator.read_bytes()}


def contents() -> dict[str, Any]:
    return torch.load(io.BytesIO(checkpoints()["tokenizer.ckpt"]), weights_only=True)


def stored(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def changed(*path: str | int, value: Any) -> Callable[[], bytes]:
    """The tokenizer's checkpoint with another value at a path of keys; `...` removes it."""

    def make() -> bytes:
        whole = contents()
        inside: Any = whole
        for name in path[:-1]:
            inside = inside[name]
        if value is ...:
            del inside[path[-1]]
        else:
            inside[path[-1]] = value
        return stored(whole)

    return make


def checkpoint(name: str, content: Callable[[], bytes], refused: str | None = "x.ckpt", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "x.ckpt").write_bytes(content())

    # tests/test_hostile_files.py has the like of them.
    more = {"quick": False, **more}
    return Case(name=f"checkpoint: {name}", craft=craft, read=lambda folder: load("x.ckpt"), refused=refused, **more)


def whole() -> bytes:
    return checkpoints()["tokenizer.ckpt"]


def repacked(compression: int, change: Callable[[str, bytes], bytes] = lambda name, data: data) -> Callable[[], bytes]:
    """The checkpoint packed again by `zipfile`."""

    def make() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole())) as old, zipfile.ZipFile(buffer, "w", compression) as new:
            for record in old.infolist():
                new.writestr(record.filename, change(record.filename, old.read(record)))
        return buffer.getvalue()

    return make


def record_of(gigabytes: int, name: str) -> Callable[[], bytes]:
    """The checkpoint with a compressed record of zeros."""

    def make() -> bytes:
        buffer = io.BytesIO(whole())
        with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(name, "w", force_zip64=True) as record:
                for _ in range(gigabytes * 256):
                    record.write(bytes(2**22))
        return buffer.getvalue()

    return make


def twice() -> bytes:
    buffer = io.BytesIO(whole())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(archive.infolist()[0].orig_filename, b"other")
    return buffer.getvalue()


def flipped() -> bytes:
    data = bytearray(whole())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0x10
    return bytes(data)


class Runs:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


class Imports:
    def __reduce__(self) -> Any:
        return __import__, ("this",)


def doubled(times: int) -> Any:
    value: Any = [1]
    for _ in range(times):
        value = [value, value]
    return value


def in_itself() -> Any:
    value: dict[str, Any] = {}
    value["inside"] = value
    return value


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


SHELL = {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}}
BIAS = ("state_dict", "network.encoder.conv_in.bias")
ARGUMENTS = ("hyper_parameters", "init_args")
CHECKPOINTS = [
    checkpoint("whole", whole, None, right=lambda found: type(found).__name__ == "FSQ"),
    checkpoint("empty", lambda: b""),
    checkpoint("text", lambda: b"no checkpoint"),
    checkpoint("noise", lambda: bytes(range(256)) * 100),
    checkpoint(
        "a git-lfs pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    ),
    checkpoint("HTML", lambda: b"<!DOCTYPE html><html></html>"),
    *(
        checkpoint(f"cut to {share:.1%}", lambda share=share: whole()[: int(len(whole()) * share)])
        for share in (0.001, 0.1, 0.5, 0.9, 0.999)
    ),
    checkpoint("cut in front", lambda: whole()[100:]),
    checkpoint("with more behind it", lambda: whole() + bytes(70_000)),
    checkpoint("a flipped bit", flipped),
    checkpoint("compressed", repacked(zipfile.ZIP_DEFLATED)),
    checkpoint("compressed by LZMA", repacked(zipfile.ZIP_LZMA)),
    checkpoint(
        "packed again without compression",
        repacked(zipfile.ZIP_STORED),
        right=lambda found: type(found).__name__ == "FSQ",
    ),
    checkpoint("a record twice", twice),
    checkpoint("a compressed record of 3 GB", record_of(3, "archive/data/999"), quick=False),
    checkpoint("a compressed byte order of 3 GB", record_of(3, "archive/byteorder2"), quick=False),
    checkpoint("a pickle", lambda: pickle.dumps({"state_dict": {}})),
    checkpoint("a pickle with code", lambda: pickle.dumps(Runs())),
    checkpoint(
        "a zip of other things",
        lambda: (b := io.BytesIO(), zipfile.ZipFile(b, "w").writestr("a", "b"), b)[2].getvalue(),
    ),
    checkpoint("the old format", lambda: stored(contents(), _use_new_zipfile_serialization=False)),
    checkpoint("code among the weights", lambda: stored({**contents(), "state_dict": Runs()})),
    checkpoint("code beside the weights", lambda: stored({**contents(), "more": Runs()})),
    checkpoint("an import beside the weights", lambda: stored({**contents(), "more": Imports()})),
    checkpoint("a list", lambda: stored([1, 2])),
    checkpoint("a tensor", lambda: stored(torch.zeros(3))),
    checkpoint("nothing", lambda: stored({})),
    *(
        checkpoint(f"{name}", changed(*path, value=value))
        for name, path, value in (
            ("weights that are none", ("state_dict",), None),
            ("weights in a list", ("state_dict",), [torch.zeros(3)]),
            ("a weight missing", BIAS, ...),
            ("a weight too many", ("state_dict", "more"), torch.zeros(3)),
            ("a weight of another shape", BIAS, torch.zeros(5)),
            ("a weight of no dimension", BIAS, torch.tensor(0.0)),
            ("a weight that is text", BIAS, "zeros"),
            ("a weight that is null", BIAS, None),
            ("a weight of int8", BIAS, torch.zeros(4, dtype=torch.int8)),
            ("a weight of booleans", BIAS, torch.zeros(4, dtype=torch.bool)),
            ("a weight of complex numbers", BIAS, torch.zeros(4, dtype=torch.complex64)),
            ("a sparse weight", BIAS, torch.ones(4).to_sparse()),
            ("a weight that is not a number", BIAS, torch.tensor([0, float("nan"), 0, 0])),
            ("a weight that is infinite", BIAS, torch.tensor([0, float("inf"), 0, 0])),
            ("a name with an escape sequence", ("state_dict", "\x1b[2J\nerror: all is well"), torch.zeros(1)),
            ("a name of a megabyte", ("state_dict", "x" * 10**6), torch.zeros(1)),
            ("a name that is a number", ("state_dict", 5), torch.zeros(1)),
            ("settings that are null", ("hyper_parameters",), None),
            ("settings that are a list", ("hyper_parameters",), [1]),
            ("settings without a class", ("hyper_parameters",), {"init_args": {}}),
            ("a class that is a number", ("hyper_parameters", "class_path"), 5),
            ("a class that is not there", ("hyper_parameters", "class_path"), "discrete_lit.tokenizers.Nothing"),
            ("a class of another kind", ("hyper_parameters", "class_path"), "torch.optim.AdamW"),
            ("a class of Python's", ("hyper_parameters", "class_path"), "subprocess.Popen"),
            ("a class of the current folder", ("hyper_parameters", "class_path"), "hostile.Class"),
            ("arguments that are null", ARGUMENTS, None),
            ("arguments that are a number", ARGUMENTS, 3),
            ("an unknown argument", (*ARGUMENTS, "nothing"), 3),
            ("a function for a network", (*ARGUMENTS, "network"), SHELL),
            ("a function for an optimizer", (*ARGUMENTS, "optimizer"), SHELL),
            ("a function by name", (*ARGUMENTS, "network"), "os.abort"),
            ("a text of settings", (*ARGUMENTS, "network"), json.dumps(SHELL)),
            ("levels doubled 32 times", (*ARGUMENTS, "levels"), doubled(32)),
            ("levels in themselves", (*ARGUMENTS, "levels"), in_itself()),
            ("levels 200 deep", (*ARGUMENTS, "levels"), deep(200)),
            ("levels of 2^30", (*ARGUMENTS, "levels"), [2**30] * 3),
            ("levels of zero", (*ARGUMENTS, "levels"), [0, 0]),
            ("negative levels", (*ARGUMENTS, "levels"), [-4, -3]),
            ("no levels", (*ARGUMENTS, "levels"), []),
            ("levels that are not numbers", (*ARGUMENTS, "levels"), [float("nan")]),
            ("levels that are a tensor", (*ARGUMENTS, "levels"), torch.zeros(2)),
            ("2^40 channels", (*ARGUMENTS, "network", "init_args", "channels"), 2**40),
            ("no channels", (*ARGUMENTS, "network", "init_args", "channels"), 0),
            ("loops that are a number", ("loops",), 5),
            ("callbacks in themselves", ("callbacks",), in_itself()),
            ("optimizers doubled 40 times", ("optimizer_states",), doubled(40)),
            ("optimizers 150 deep", ("optimizer_states",), deep(150)),
            ("a step that is text", ("global_step",), "many"),
        )
    ),
]


def sharded(folder: Path) -> None:
    """A folder of a sharded checkpoint whose description runs a command."""
    path = folder / "x.ckpt"
    path.mkdir()
    torch.save(contents() | {"state_dict": {}}, path / "meta.pt")
    (path / ".metadata").write_bytes(pickle.dumps(Runs()))
    (path / "__0_0.distcp").write_bytes(bytes(100))


PLACES = [
    Case(name="checkpoint: missing", craft=lambda folder: None, read=lambda folder: load("x.ckpt"), refused="x.ckpt"),
    Case(
        name="checkpoint: a folder",
        craft=lambda folder: (folder / "x.ckpt").mkdir(),
        read=lambda folder: load("x.ckpt"),
        refused="x.ckpt",
    ),
    Case(
        name="checkpoint: a pipe",
        craft=lambda folder: os.mkfifo(folder / "x.ckpt"),
        read=lambda folder: load("x.ckpt"),
        refused="x.ckpt",
    ),
    Case(
        name="checkpoint: a link to /dev/zero",
        craft=lambda folder: os.symlink("/dev/zero", folder / "x.ckpt"),
        read=lambda folder: load("x.ckpt"),
        refused="x.ckpt",
    ),
    Case(name="checkpoint: shards with code", craft=sharded, read=lambda folder: load("x.ckpt"), refused="x.ckpt"),
]


def published(
    name: str, content: Callable[[], bytes], file: str = "w.pt", refused: str | None = "", **more: Any
) -> Case:
    def craft(folder: Path) -> None:
        (folder / file).write_bytes(content())

    refused = file if refused == "" else refused
    return Case(name=f"published: {name}", craft=craft, read=lambda folder: read_state(file), refused=refused, **more)


def tensors(name: str, content: Callable[[], bytes], refused: str | None = "w.safetensors", **more: Any) -> Case:
    return published(name, content, "w.safetensors", refused, **more)


def header(text: str | bytes, data: bytes = bytes(16), length: int | None = None) -> Callable[[], bytes]:
    """A safetensors file with a header of one's own."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda: struct.pack("<Q", len(raw) if length is None else length) + raw + data


def described(**entry: Any) -> Callable[[], bytes]:
    return header(json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entry}))


def wrapped_in_itself(**more: Any) -> dict[str, Any]:
    value: dict[str, Any] = {"a": torch.zeros(2), **more}
    value["model"] = value
    return value


def wrappers_doubled(levels: int) -> Any:
    value: Any = {"note": 1}
    for _ in range(levels):
        value = {"model": value, "ema": value, "state_dict": value}
    return value


def old_pickle(*values: Any) -> bytes:
    return b"".join(pickle.dumps(value, protocol=2) for value in values)


def flax(content: bytes) -> Callable[[], bytes]:
    return lambda: content


PUBLISHED = [
    published("whole", lambda: stored({"a": torch.ones(2)}), refused=None, right=lambda found: list(found) == ["a"]),
    published("empty", lambda: b""),
    published("cut", lambda: stored({"a": torch.ones(500)})[:-700]),
    published("compressed", repacked(zipfile.ZIP_DEFLATED)),
    published("code", lambda: stored({"a": torch.ones(2), "b": Runs()})),
    published(
        "code in an old file", lambda: stored({"a": torch.ones(2), "b": Runs()}, _use_new_zipfile_serialization=False)
    ),
    published("a pickle with code", lambda: pickle.dumps(Runs())),
    published("a pickle of a network", lambda: stored(torch.nn.Linear(2, 2))),
    published("a number", lambda: stored(5)),
    published("nothing", lambda: stored({})),
    published("texts", lambda: stored({"a": "b"})),
    published("tensors without names", lambda: stored([torch.ones(2)])),
    published("a wrapper in itself", lambda: stored(wrapped_in_itself())),
    published("a wrapper in itself without tensors", lambda: stored(in_itself())),
    published("wrappers tripled 30 times", lambda: stored(wrappers_doubled(30))),
    published("wrappers 150 deep", lambda: stored({"model": deep(150)})),
    published("two names that become one", lambda: stored(OrderedDict(a=torch.ones(2), **{"module.a": torch.ones(2)}))),
    published("names with escape sequences", lambda: stored({"\x1b[2J\nerror: all is well": "x"})),
    published("an old file of other numbers", lambda: old_pickle(1, 2, 3)),
    published(
        "an old file without an end", lambda: old_pickle(0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})[:-1]
    ),
    published("a pickle that claims 2^60 letters", lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc."),
    published("a pickle of 200,000 lists", lambda: b"\x80\x02" + b"]" * 200_000 + b"."),
    tensors("safetensors", lambda: save_tensors({"a": torch.ones(2)}), None, right=lambda found: list(found) == ["a"]),
    tensors("safetensors, empty", lambda: b""),
    tensors("safetensors, cut", lambda: save_tensors({"a": torch.ones(500)})[:-9]),
    tensors("safetensors whose header claims 2^63", header("{}", length=2**63)),
    tensors("safetensors whose header claims 2^40", header("{}", length=2**40)),
    tensors("safetensors whose header is no JSON", header("{no")),
    tensors("safetensors whose header is no UTF-8", header(b"{\xff}")),
    tensors("safetensors 100,000 lists deep", header("[" * 100_000)),
    tensors("safetensors of an unknown type", described(dtype="F99")),
    tensors(
        "safetensors of a rare type", described(dtype="F8_E8M0", shape=[16]), right=lambda found: list(found) == ["a"]
    ),
    tensors("safetensors of more than there is", described(shape=[2**31, 2**31])),
    tensors("safetensors of a negative shape", described(shape=[-2, -2])),
    tensors(
        "safetensors whose tensors overlap",
        header(
            json.dumps(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                }
            )
        ),
    ),
    tensors("safetensors whose tensor ends before it begins", described(data_offsets=[16, 0])),
    tensors("safetensors of no tensor", header("{}", b"")),
    published("MessagePack, cut", flax(b"\x81\xa1a\xc6\xff\xff\xff\xff")),
    published("MessagePack of 2^32 entries", flax(b"\xdf\xff\xff\xff\xff\xa1a\x01")),
    published("MessagePack 10,000 deep", flax(b"\x81\xa1a" * 10_000 + b"\x01")),
    published("MessagePack of a list of 2^32", flax(b"\x81\xa1a\xdd\xff\xff\xff\xff\x01")),
    published("MessagePack of an unknown extension", flax(b"\x81\xa1a\xd4\x05\x00")),
    published("MessagePack of an array of objects", flax(b"\x81\xa1a\xc7\x0f\x01\x93\x91\x01\xa6object\xc4\x02ab")),
    published("MessagePack of a key that is a number", flax(b"\x81\x05\x01")),
]


def plain(name: str, content: Callable[[], bytes], refused: str | None = "w.pt", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "w.pt").write_bytes(content())

    read = more.pop("read", lambda folder: read_weights("w.pt", "lpips_weights"))
    return Case(name=f"weights of a metric: {name}", craft=craft, read=read, refused=refused, **more)


METRICS = [
    plain("code", lambda: stored({"a": Runs()})),
    plain("a list", lambda: stored([1])),
    plain("compressed", repacked(zipfile.ZIP_DEFLATED)),
    plain("numbers", lambda: stored({"a": 1})),
    plain("not a number", lambda: stored({"a": torch.tensor([float("nan")])})),
]

CASES = [*CHECKPOINTS, *PLACES, *PUBLISHED, *METRICS]
