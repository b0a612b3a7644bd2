"""Files that chance damages: each reader gives what the file holds, or one error that is for the user.

Hypothesis looks for the smallest damage that ends otherwise. The crafted ones are in the package `bad_input`.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from discrete_lit.checkpoints import read_checkpoint
from discrete_lit.core.bounded_reading import open_array, parse_json
from discrete_lit.core.configuration import read_settings
from discrete_lit.core.files import Npz
from discrete_lit.data.loaders import TrainingOrder
from discrete_lit.data.shard_order import Layout, ShardOrder, window_shuffle
from discrete_lit.data.shard_set import Shard, read_manifest
from discrete_lit.data.tars import read_samples
from discrete_lit.data.transforms import UndecodableImage, decode_image

settings.register_profile(
    "quick",
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    # One folder serves all examples of a test: each writes its file anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("quick")

SAMPLES = 3
# Where bytes are overwritten, as a fraction of the file, and by what; and how much of the file is there.
damage = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
)


def damaged(content: bytes, how: tuple[list[tuple[float, bytes]], float]) -> bytes:
    found = bytearray(content)
    for place, values in how[0]:
        start = int(place * (len(found) - 1))
        found[start : start + len(values)] = values[: len(found) - start]
    return bytes(found[: int(how[1] * len(found))])


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, ("PNG", "JPEG", "BMP")[number % 3])
    return stream.getvalue()


def shard() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(SAMPLES):
            for name, data in ((f"{number}.png", picture(number)), (f"{number}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def written(write: Callable[[io.BytesIO], Any]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def manifest() -> dict[str, Any]:
    shards = [{"name": f"train-{number:06d}.tar", "count": number, "sha256": ""} for number in (2, 3)]
    return {"format": "discrete-lit-shards-1", "count": 5, "num_classes": 2, "classes": ["a", "b"], "shards": shards}


ARRAY = np.arange(12, dtype=np.uint16).reshape(3, 4)
WEIGHTS = {"state_dict": {"weight": torch.arange(6.0)}, "epoch": 0, "global_step": 3}
SHARD = shard()
NPY = written(lambda file: np.save(file, ARRAY))
NPZ = written(lambda file: np.savez(file, a=ARRAY))
NPZ_PACKED = written(lambda file: np.savez_compressed(file, a=ARRAY))
CHECKPOINT = written(lambda file: torch.save(WEIGHTS, file))


@given(how=damage)
def test_shards(tmp_path: Path, how: Any) -> None:
    file = tmp_path / "shard.tar"
    file.write_bytes(damaged(SHARD, how))
    try:
        found = list(read_samples(Shard(str(file), SAMPLES), np.ones(SAMPLES, dtype=bool)))
    except ValueError as error:
        assert "shard.tar" in str(error)
        return
    # Each sample of the count is there once: itself, or one that says what is wrong.
    assert [position for position, _ in found] == list(range(SAMPLES))
    assert all(sample.problem or sample.image for _, sample in found)


@given(how=damage, number=st.integers(0, 2))
def test_pictures(how: Any, number: int) -> None:
    try:
        image = decode_image(damaged(picture(number), how))
    except UndecodableImage:
        return
    assert image.mode == "RGB"


@given(how=damage, mapped=st.booleans())
def test_arrays(tmp_path: Path, how: Any, mapped: bool) -> None:
    file = tmp_path / "tokens.npy"
    file.write_bytes(damaged(NPY, how))
    try:
        array = open_array(file, mapped=mapped)
    except ValueError as error:
        assert "tokens.npy" in str(error)
        return
    assert not array.dtype.hasobject
    assert array.nbytes < len(NPY)


@given(how=damage, packed=st.booleans())
def test_npz_files(tmp_path: Path, how: Any, packed: bool) -> None:
    file = tmp_path / "samples.npz"
    file.write_bytes(damaged(NPZ_PACKED if packed else NPZ, how))
    try:
        with Npz(file) as archive:
            arrays = [archive.read(name) for name in archive.headers]
    except ValueError as error:
        assert "samples.npz" in str(error)
        return
    # A changed bit of a value is found by its checksum.
    assert all(np.array_equal(array, ARRAY) for array in arrays)


@given(how=damage)
def test_checkpoints(tmp_path: Path, how: Any) -> None:
    file = tmp_path / "last.bin"
    content = damaged(CHECKPOINT, how)
    file.write_bytes(content)
    try:
        found = read_checkpoint(file)
    except ValueError as error:
        assert "last.bin" in str(error)
        return
    assert set(found) == set(WEIGHTS) and torch.equal(found["state_dict"]["weight"], WEIGHTS["state_dict"]["weight"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=json_values)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value), "report.json") == value


@given(content=st.binary(max_size=40) | st.text(max_size=40))
def test_any_text_as_json(content: bytes | str) -> None:
    try:
        parse_json(content, "report.json")
    except ValueError as error:
        assert "report.json" in str(error)


@given(place=st.sampled_from(["format", "count", "num_classes", "classes", "shards"]), value=json_values)
def test_manifests(place: str, value: Any) -> None:
    content = manifest() | {place: value}
    try:
        found = read_manifest(json.dumps(content).encode(), "manifest.json")
    except ValueError as error:
        assert "manifest.json" in str(error)
        return
    assert sum(entry["count"] for entry in found["shards"]) == found.get("count", 0)


@given(entry=st.sampled_from(["name", "count"]), value=json_values)
def test_shards_of_manifests(entry: str, value: Any) -> None:
    content = manifest()
    content["shards"][0] |= {entry: value}
    try:
        found = read_manifest(json.dumps(content).encode(), "manifest.json")
    except ValueError as error:
        assert "manifest.json" in str(error)
        return
    assert found["shards"][0][entry] == value


@given(text=st.text(max_size=60))
def test_any_text_as_settings(text: str) -> None:
    try:
        read_settings(text)
    except (yaml.YAMLError, ValueError):
        return


@given(
    count=st.integers(1, 300),
    layout=st.builds(Layout, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)),
    window=st.integers(0, 40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_of_shards_has_each_sample_once(count: int, layout: Layout, window: int, epoch: int) -> None:
    step = layout.batch_size * layout.world_size
    if count < step:
        with pytest.raises(ValueError, match="do not fill one batch"):
            ShardOrder(count, layout, shuffle_window=window, seed=1)
        return
    order = ShardOrder(count, layout, shuffle_window=window, seed=1)
    splits, places = order.locate(np.arange(count // step * step))
    given_out = {split: order.given_out(epoch, split) for split in range(layout.world_size * layout.workers)}
    found = [int(given_out[split][place]) for split, place in zip(splits.tolist(), places.tolist(), strict=True)]
    assert sorted(found) == list(range(len(found)))
    assert np.array_equal(np.sort(window_shuffle(count, window, 3)), np.arange(count))


@given(count=st.integers(12, 200), ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 2**62))
def test_the_ranks_of_an_epoch_share_its_global_batches(count: int, ranks: int, seed: int) -> None:
    orders = [TrainingOrder(count, 12 // ranks, rank=rank, world_size=ranks, seed=seed) for rank in range(ranks)]
    for number in range(orders[0].batches):
        joined = np.concatenate([order.permutation(2)[order.positions(number)] for order in orders])
        assert np.array_equal(joined, orders[0].permutation(2)[number * 12 : (number + 1) * 12])


def test_the_undamaged_files_are_read(tmp_path: Path) -> None:
    """Else every test above would pass for the wrong reason."""
    for name, content in {"shard.tar": SHARD, "tokens.npy": NPY, "samples.npz": NPZ, "last.bin": CHECKPOINT}.items():
        (tmp_path / name).write_bytes(content)
    found = list(read_samples(Shard(str(tmp_path / "shard.tar"), SAMPLES), np.ones(SAMPLES, dtype=bool)))
    assert [sample.image for _, sample in found] == [picture(number) for number in range(SAMPLES)]
    assert np.array_equal(open_array(tmp_path / "tokens.npy"), ARRAY)
    assert zipfile.is_zipfile(tmp_path / "samples.npz")
    assert read_checkpoint(tmp_path / "last.bin")["global_step"] == 3
    assert read_manifest(json.dumps(manifest()).encode(), "manifest.json")["count"] == 5
