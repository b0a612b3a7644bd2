"""Small images, shards, class folders and token arrays, written without the package's own writers."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from discrete_lit.data import ImageFolder, ImageShards, LatentArrays, TokenArrays
from discrete_lit.data.data_module import ResumableDataModule


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A noise image, `(width, height)`, that its number decides."""
    pixels = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, entries: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def image_bytes() -> Callable[..., bytes]:
    """`image_bytes(number, size=(8, 8))`: a PNG of noise."""
    return png


@pytest.fixture
def make_tar() -> Callable[..., None]:
    """`make_tar(path, [(name, bytes), ...])`."""
    return write_tar


@pytest.fixture
def make_shards() -> Callable[..., Path]:
    """`make_shards(folder, counts, replace={3: b"..."}, manifest=True)`: shards of `counts` samples.

    Sample n of the set has the key `sample-<n>` and the label n mod 3; `replace` gives the image bytes of some.
    """

    def make(
        folder: Path, counts: Sequence[int], replace: Mapping[int, bytes] | None = None, manifest: bool = True
    ) -> Path:
        folder.mkdir(parents=True)
        shards, number = [], 0
        for shard, count in enumerate(counts):
            name = f"train-{shard:06d}.tar"
            entries = []
            for sample in range(number, number + count):
                entries.append((f"sample-{sample:04d}.png", (replace or {}).get(sample, png(sample))))
                entries.append((f"sample-{sample:04d}.cls", str(sample % 3).encode()))
            write_tar(folder / name, entries)
            shards.append({"name": name, "count": count, "sha256": ""})
            number += count
        if manifest:
            content = {
                "format": "discrete-lit-shards-1",
                "split": "train",
                "count": number,
                "num_classes": 3,
                "classes": ["ant", "bee", "cat"],
                "shuffle_seed": 0,
                "source": "noise",
                "shards": shards,
            }
            (folder / "manifest.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def make_class_folder() -> Callable[..., Path]:
    """`make_class_folder(folder, {"ant": 4, "bee": 3}, size=(8, 8))`: PNG files below one subfolder per class."""

    def make(folder: Path, counts: Mapping[str, int], size: tuple[int, int] = (8, 8)) -> Path:
        number = 0
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for _ in range(count):
                (folder / name / f"{number:04d}.png").write_bytes(png(number, size))
                number += 1
        return folder

    return make


@pytest.fixture
def make_token_folder() -> Callable[..., Path]:
    """`make_token_folder(folder, count=40, **manifest)`: tokens `(count, 2, 3)` of 16 ids, labels row mod 3."""

    def make(folder: Path, count: int = 40, **manifest: Any) -> Path:
        folder.mkdir(parents=True)
        random = np.random.RandomState(0)
        tokens = random.randint(0, 16, (count, 2, 3)).astype(np.uint16)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "labels.npy", np.arange(count) % 3)
        content = {
            "format": "discrete-lit-tokens-1",
            "count": count,
            "token_shape": [2, 3],
            "vocab_size": 16,
            "image_size": 8,
            "num_classes": 3,
            "classes": ["ant", "bee", "cat"],
            "tokenizer": "a" * 64,
            "source": "noise",
            **manifest,
        }
        (folder / "manifest.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def make_latent_folder() -> Callable[..., Path]:
    """`make_latent_folder(folder, count=40)`: moments of latents `(2, 1, 3)` in float16, labels row mod 3."""

    def make(folder: Path, count: int = 40) -> Path:
        folder.mkdir(parents=True)
        latents = np.random.RandomState(0).standard_normal((count, 2, 2, 1, 3)).astype(np.float16)
        np.save(folder / "latents.npy", latents)
        np.save(folder / "labels.npy", np.arange(count) % 3)
        content = {
            "format": "discrete-lit-latents-1",
            "count": count,
            "latent_shape": [2, 1, 3],
            "storage": "moments",
            "dtype": "float16",
            "image_size": 8,
            "num_classes": 3,
            "classes": ["ant", "bee", "cat"],
            "tokenizer": "a" * 64,
            "source": "noise",
            "latent_mean": [0.0, 0.0],
            "latent_std": [1.0, 1.0],
        }
        (folder / "manifest.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(params=["shards", "folder", "tokens", "latents"])
def make_data(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_shards: Callable[..., Path],
    make_class_folder: Callable[..., Path],
    make_token_folder: Callable[..., Path],
    make_latent_folder: Callable[..., Path],
) -> Callable[..., ResumableDataModule]:
    """`make_data(**changes)`: 43 training samples in each kind of DataModule; batches of 4, so 10 a process."""
    if request.param == "shards":
        folder = make_shards(tmp_path / "shards", (13, 3, 9, 18), replace={7: b"broken", 30: b""})
        kind, settings = ImageShards, {"image_size": 6, "shuffle_window": 7, "max_bad_fraction": 0.1}
    elif request.param == "folder":
        folder = make_class_folder(tmp_path / "folder", {"ant": 20, "bee": 23})
        (folder / "ant" / "0003.png").write_bytes(b"broken")
        kind, settings = ImageFolder, {"image_size": 6, "max_bad_fraction": 0.1}
    elif request.param == "tokens":
        folder = make_token_folder(tmp_path / "tokens", count=43)
        kind, settings = TokenArrays, {}
    else:
        folder = make_latent_folder(tmp_path / "latents", count=43)
        kind, settings = LatentArrays, {}

    def make(**changes: Any) -> ResumableDataModule:
        return kind(str(folder), str(folder), **{"batch_size": 4, "num_workers": 0, **settings, **changes})

    return make
