import bz2
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from discrete_lit.data import ImageShards
from discrete_lit.data.loaders import TooManyBadSamples
from discrete_lit.data.shard_order import window_shuffle, worker_range
from discrete_lit.data.shard_set import Shard
from discrete_lit.data.tars import BrokenShard
from discrete_lit.evaluation.image_sets import open_image_set

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

COUNTS = (13, 1, 9, 18)
COUNT = sum(COUNTS)


def make_data(train: Any, **settings: Any) -> ImageShards:
    defaults = {"image_size": 8, "batch_size": 4, "num_workers": 0, "shuffle_window": 5}
    return ImageShards(train, **(defaults | settings))


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def all_keys(count: int = COUNT) -> list[str]:
    return [f"sample-{number:04d}" for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Path]) -> Path:
    return make_shards(tmp_path / "shards", COUNTS)


def test_a_batch_holds_image_label_key_and_index(folder: Path, image_bytes: Callable[..., bytes]) -> None:
    data = make_data(str(folder), flip=False)
    assert (data.num_classes, data.classes, data.image_size) == (3, ["ant", "bee", "cat"], 8)
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        batch = next(iter(loader))
        floats = data.on_after_batch_transfer(batch, 0)["image"]
        assert floats.shape == (4, 3, 8, 8) and floats.dtype == torch.float32 and floats.is_contiguous()
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        for image, values, label, key in zip(batch["image"], floats, batch["label"], batch["key"], strict=True):
            number = int(key.removeprefix("sample-"))
            pixels = np.asarray(Image.open(io.BytesIO(image_bytes(number))))
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
            np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)
            assert label == number % 3


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_reads_every_sample_once_less_one_incomplete_batch(
    folder: Path, workers: int, world_size: int
) -> None:
    data = make_data(str(folder), num_workers=workers)
    loaders = [data.training_loader(rank, world_size) for rank in range(world_size)]
    indices = []
    orders = []
    for epoch in range(2):
        batches = [list(loader) for loader in loaders]
        assert {len(part) for part in batches} == {len(loaders[0])} == {COUNT // (4 * world_size)}
        assert all(len(batch["key"]) == 4 for part in batches for batch in part)
        read = keys(batch for part in batches for batch in part)
        assert len(set(read)) == len(read) == COUNT // (4 * world_size) * 4 * world_size
        index = [number for part in batches for batch in part for number in batch["index"].tolist()]
        assert all(epoch * COUNT <= number < (epoch + 1) * COUNT for number in index)
        indices += index
        orders.append(read)
    assert len(set(indices)) == len(indices)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_every_sample_once_in_uneven_ranks(folder: Path, workers: int, world_size: int) -> None:
    data = make_data(None, validation=str(folder), num_workers=workers)
    batches = [batch for rank in range(world_size) for batch in data.evaluation_loader("validation", rank, world_size)]
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(COUNT))
    assert keys(batches) == [f"sample-{number:04d}" for number in index.tolist()]


def test_ranks_without_a_sample_evaluate_nothing(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    data = make_data(str(make_shards(tmp_path / "shards", [2])), batch_size=1)
    batches = [list(data.evaluation_loader("train", rank, 4)) for rank in range(4)]
    assert sorted(keys(batch for part in batches for batch in part)) == all_keys(2)
    assert [] in batches


def test_more_workers_than_batches_work(folder: Path) -> None:
    data = make_data(str(folder), num_workers=4, batch_size=20)
    assert len(set(keys(data.training_loader(0, 1)))) == 40
    assert sorted(keys(data.evaluation_loader("train", 0, 1))) == all_keys()


def test_a_set_smaller_than_one_batch_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="41 training samples do not fill one batch of 24 on each of 2 ranks"):
        make_data(str(folder), batch_size=24).training_loader(0, 2)


def test_pieces_fit_together_and_have_the_batches_of_their_worker() -> None:
    for samples in (0, 1, 7, 8, 40, 41):
        for workers in (1, 2, 5):
            pieces = [worker_range(worker, workers, samples=samples, batch_size=4) for worker in range(workers)]
            assert pieces[0][0] == 0 and pieces[-1][1] == samples
            assert all(before[1] == after[0] for before, after in pairwise(pieces))
            batches = [-(-(stop - start) // 4) for start, stop in pieces]
            assert batches == [len(range(worker, -(-samples // 4), workers)) for worker in range(workers)]


def test_the_window_bounds_what_is_held_in_memory() -> None:
    order = window_shuffle(2000, 50, 1, 2)
    assert sorted(order) == list(range(2000))
    held = np.maximum.accumulate(order) - np.arange(2000)
    assert 25 < held.max() <= 50
    assert np.mean(order == np.arange(2000)) < 0.1
    assert window_shuffle(9, 0, 1).tolist() == list(range(9))


def test_a_resume_opens_only_what_is_left(
    tmp_path: Path, make_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(str(make_shards(tmp_path / "shards", [8] * 5)), shuffle_window=0)
    opened: list[str] = []
    original = Shard.open
    monkeypatch.setattr(Shard, "open", lambda shard: opened.append(shard.url) or original(shard))
    loader = data.training_loader(0, 1)
    iterator = iter(loader)
    for _ in range(8):
        next(iterator)
    assert len(set(opened)) == 4
    opened.clear()
    resumed = data.training_loader(0, 1)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 2
    assert len(opened) == 1


# Where shards are.


def test_shards_are_found_by_folder_pattern_list_file_and_url(folder: Path) -> None:
    pattern = f"{folder}/train-{{000000..000003}}.tar"
    files = sorted(str(path) for path in folder.glob("*.tar"))
    for location in (
        str(folder),
        pattern,
        files,
        f"file:{folder}",
        [files[0], f"{folder}/train-{{000001..000003}}.tar"],
    ):
        assert keys(make_data(location).evaluation_loader("train", 0, 1)) == all_keys()
    assert keys(make_data(files[2]).evaluation_loader("train", 0, 1)) == all_keys()[14:23]
    assert make_data(files[2]).classes == ["ant", "bee", "cat"]


def test_local_shards_without_a_manifest_are_counted(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "shards", COUNTS, manifest=False)
    data = make_data(str(folder), num_classes=3)
    assert keys(data.evaluation_loader("train", 0, 1)) == all_keys()
    assert data.classes == ["0", "1", "2"]


def test_missing_shards_are_named_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 5 shards are missing: .*train-000004\.tar"):
        make_data(f"{folder}/train-{{000000..000004}}.tar").training_loader(0, 1)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 shards are missing: .*train-000001\.tar"):
        make_data(str(folder)).training_loader(0, 1)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    for location in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=f"no shards in {location}"):
            _ = make_data(location).shards


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"format": "other"}', "has format 'other'"),
        ('{"format": "discrete-lit-shards-1", "classes": ["a"], "shards": []}', "no samples"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        _ = make_data(str(folder)).shards


def test_what_contradicts_the_manifest_is_refused(
    folder: Path, tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"num_classes is 4, but .* has 3 classes"):
        _ = make_data(str(folder), num_classes=4).shards
    os.rename(folder / "train-000003.tar", folder / "extra.tar")
    with pytest.raises(ValueError, match=r"extra\.tar is not in the manifest\.json beside it"):
        _ = make_data(str(folder / "extra.tar")).shards
    other = make_shards(tmp_path / "other", [4])
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"classes": ["x", "y", "z"]}))
    with pytest.raises(ValueError, match="are not the same"):
        _ = make_data(f"{folder}/train-000000.tar", validation=str(other)).shards


class Server(ThreadingHTTPServer):
    """Serves a folder; the first answers for a name in `trouble` are of that kind, one for each entry.

    `break` ends after half of the bytes, `mute` says nothing, `slow` gives its header byte by byte, `stall` half of the
    bytes, a number is a status. With `signed` what has not this query is forbidden.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.trouble: dict[str, list[str]] = {}
        self.requested: list[str] = []
        self.signed = ""
        self.ended = Event()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix("/").partition("?")
        self.server.requested.append(path)
        kind = next(iter(self.server.trouble.get(path, [])), None)
        if kind is not None:
            self.server.trouble[path].pop(0)
        if query != self.server.signed:
            self.send_error(403)
        elif kind is None:
            super().do_GET()
        elif kind == "mute":
            self.server.ended.wait(20)
        elif kind == "slow":
            while not self.server.ended.wait(0.05):
                self.wfile.write(b"H")
        elif kind == "file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif kind.isdecimal():
            self.send_error(int(kind))
        else:
            content = (Path(self.directory) / path).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            if kind == "stall":
                self.server.ended.wait(20)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("discrete_lit.data.tars._PAUSE", 0.05)
    with Server(folder) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_streamed_over_http(server: Server, folder: Path, workers: int) -> None:
    for location in (server.url, f"{server.url}/train-{{000000..000003}}.tar"):
        data = make_data(location, num_workers=workers)
        assert data.num_classes == 3
        assert sorted(keys(data.evaluation_loader("train", 0, 1))) == all_keys()
    local = make_data(str(folder), num_workers=workers)
    assert keys(data.training_loader(1, 2)) == keys(local.training_loader(1, 2))


def test_a_broken_transfer_is_taken_up_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.trouble["train-000003.tar"] = ["break"]
    assert keys(make_data(server.url).evaluation_loader("train", 0, 1)) == all_keys()
    assert server.requested.count("train-000003.tar") == 2
    assert not caplog.records


@pytest.mark.parametrize("kind", ["503", "429", "mute", "stall"])
def test_trouble_that_passes_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.5")
    server.trouble["train-000003.tar"] = [kind]
    server.trouble["manifest.json"] = [kind] if kind != "stall" else []
    assert keys(make_data(server.url).evaluation_loader("train", 0, 1)) == all_keys()
    assert server.requested.count("train-000003.tar") == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mute", "timed out|no answer within"),
        ("slow", "no answer within 0.3 s; see DISCRETE_LIT_READ_TIMEOUT"),
        ("stall", "timed out"),
        ("break", "after [0-9,]+ of [0-9,]+ bytes"),
        ("503", "the server answers 503 Service Unavailable"),
        ("404", "the server answers 404 Not Found"),
        ("file", "the server answers 302 .*not allowed"),
    ],
)
def test_trouble_that_does_not_pass_ends_with_the_servers_reason(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: Any, kind: str, message: str
) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.3")
    server.trouble["train-000000.tar"] = [kind] * 50
    data = make_data(f"{server.url}/train-000000.tar", train_count=13, num_classes=3, max_bad_fraction=0.1)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"train-000000\.tar.*({message})"):
        list(data.evaluation_loader("train", 0, 1))
    assert time.monotonic() - start < 20, "the server keeps a request open for as long"
    if kind in ("404", "file"):
        assert server.requested.count("train-000000.tar") == 1


def test_a_manifest_that_cannot_be_had_now_is_not_one_that_is_not_there(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.3")
    server.trouble["manifest.json"] = ["503"] * 50
    with pytest.raises(ValueError, match=r"cannot read .*manifest\.json: the server answers 503"):
        _ = make_data(server.url).shards
    with pytest.raises(ValueError, match=r"cannot read http://127\.0\.0\.1:9/.*refused"):
        _ = make_data("http://127.0.0.1:9/shards").shards


def test_a_signature_is_kept_for_the_server_and_from_messages(server: Server) -> None:
    server.signed = "X-Amz-Credential=me%2F2026%2Fs3&X-Amz-Signature=00.tar/1"
    for location in (server.url, f"{server.url}/train-{{000000..000003}}.tar"):
        data = make_data(f"{location}?{server.signed}")
        assert sorted(keys(data.evaluation_loader("train", 0, 1))) == all_keys()
    with pytest.raises(BrokenShard, match=r"train-000000\.tar: the server answers 403") as error:
        list(
            make_data(f"{server.url}/train-000000.tar?X-Amz-Signature=secret", train_count=4).evaluation_loader(
                "train", 0, 1
            )
        )
    assert "secret" not in str(error.value)


def test_a_command_that_fails_or_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("discrete_lit.data.tars._PAUSE", 0.05)
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "0.3")
    for command, message in (
        ("echo no bucket >&2; exit 3", "status 3: no bucket"),
        ("sleep 20", "gave nothing for 0.3 s"),
    ):
        data = make_data(f"pipe:{command} # {tmp_path}", train_count=4)
        with pytest.raises(BrokenShard, match=message):
            list(data.evaluation_loader("train", 0, 1))
    # Nothing is left of the one that slept.
    running = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdecimal()]
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in running if path.exists())


def test_a_url_without_a_manifest_needs_counts(server: Server, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    pattern = f"{server.url}/train-{{000000..000003}}.tar"
    with pytest.raises(ValueError, match="train_count"):
        _ = make_data(pattern).shards
    with pytest.raises(ValueError, match=f"no shards in {server.url}"):
        _ = make_data(server.url).shards
    with pytest.raises(ValueError, match="2 counts were given for 4 shards"):
        _ = make_data(pattern, train_count=[1, 2], num_classes=3).shards
    data = make_data(pattern, train_count=list(COUNTS), num_classes=3)
    assert keys(data.evaluation_loader("train", 0, 1)) == all_keys()
    # 41 samples spread evenly are not how these shards are filled: nothing is lost without a word.
    with pytest.raises(ValueError, match="more samples than the 11 declared"):
        list(make_data(pattern, train_count=COUNT, num_classes=3).evaluation_loader("train", 0, 1))
    one = make_data(f"{server.url}/train-000003.tar", train_count=18, num_classes=3)
    assert len(keys(one.evaluation_loader("train", 0, 1))) == 18


def test_a_shard_that_is_not_on_the_server_ends_the_run(server: Server) -> None:
    data = make_data(f"{server.url}/train-000009.tar", train_count=4, num_classes=3)
    with pytest.raises(BrokenShard, match=r"train-000009\.tar"):
        list(data.evaluation_loader("train", 0, 1))


def test_any_command_can_be_read(folder: Path) -> None:
    data = make_data(f"pipe:cat {folder}/train-000000.tar", train_count=13, num_classes=3)
    assert len(set(keys(data.training_loader(0, 1)))) == 12


# Bad input.


@pytest.mark.parametrize("label", [b"3", b"-1", b"1000", b"ant", b"", b"1.0"])
@pytest.mark.parametrize("training", [True, False])
def test_a_label_out_of_range_is_named(
    tmp_path: Path, make_shards: Any, make_tar: Any, image_bytes: Any, label: bytes, training: bool
) -> None:
    folder = make_shards(tmp_path / "shards", [2])
    entries = [("a.png", image_bytes(0)), ("a.cls", b"2\n"), ("b.png", image_bytes(1)), ("b.cls", label)]
    make_tar(folder / "train-000000.tar", entries)
    data = make_data(str(folder), batch_size=2)
    with pytest.raises(ValueError, match=rf"'b' .*has label '{label.decode()}'; labels must be in 0\.\.2"):
        list(data.training_loader(0, 1) if training else data.evaluation_loader("train", 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_in_training_counted_and_logged(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    broken = {5: b"broken", 6: b"", 22: b"\x89PNG"}
    folder = make_shards(tmp_path / "shards", COUNTS, replace=broken)
    data = make_data(str(folder), num_workers=workers, max_bad_fraction=0.1, batch_size=2)
    loader = data.training_loader(0, 1)
    batches = list(loader)
    assert len(batches) == len(loader) == 20
    assert all(len(batch["key"]) == 2 for batch in batches)
    read = keys(batches)
    missing = {f"sample-{number:04d}" for number in broken}
    assert not missing & set(read)
    # One sample, good or bad, is in the incomplete batch that is dropped.
    messages = [record.getMessage() for record in caplog.records]
    logged = {key for key in missing if any(f"bad sample '{key}'" in message for message in messages)}
    assert len(messages) == len(logged) >= 2
    assert all("train-00000" in message and "of 40 in this epoch" in message for message in messages)
    assert len(set(read)) == 40 - len(logged)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_bad_samples_are_left_out_of_evaluation(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(tmp_path / "shards", COUNTS, replace={n: b"broken" for n in (4, 5, 6, 7, 22)})
    data = make_data(str(folder), max_bad_fraction=0.2)
    batches = list(data.evaluation_loader("train", 0, 1))
    index = torch.cat([batch["index"] for batch in batches]).tolist()
    assert index == [n for n in range(COUNT) if n not in (4, 5, 6, 7, 22)]
    assert keys(batches) == [f"sample-{number:04d}" for number in index]
    assert len(caplog.records) == 5
    # Batch 4..7 has nothing left.
    assert len(batches) == 10
    with pytest.raises(TooManyBadSamples, match="sample-0004"):
        list(data.evaluation_loader("train", 0, 1, max_bad_fraction=0.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_fails_past_the_accepted_fraction(
    tmp_path: Path, make_shards: Callable[..., Path], workers: int
) -> None:
    folder = make_shards(tmp_path / "shards", [10, 10], replace={n: b"broken" for n in (1, 12, 17)})
    accepted = make_data(str(folder), max_bad_fraction=0.15, num_workers=workers)
    assert len(list(accepted.training_loader(0, 1))) == 5
    refused = make_data(str(folder), max_bad_fraction=0.14, num_workers=workers)
    with pytest.raises(TooManyBadSamples, match=r"3 of 20 samples are bad, more than max_bad_fraction = 0\.14"):
        list(refused.training_loader(0, 1))


def test_a_worker_without_a_readable_sample_ends_the_run(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "shards", [8], replace={n: b"broken" for n in range(8)})
    with pytest.raises(TooManyBadSamples, match="not one sample"):
        list(make_data(str(folder), max_bad_fraction=1.0).training_loader(0, 1))


def test_the_last_sample_may_be_bad_with_batches_of_one(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "shards", [6], replace={5: b"broken"})
    data = make_data(str(folder), max_bad_fraction=0.5, batch_size=1, shuffle_window=0)
    assert keys(data.training_loader(0, 1)) == [*all_keys(5), "sample-0000"]


def test_a_sample_without_image_or_label_is_a_bad_one(
    tmp_path: Path, make_shards: Any, make_tar: Any, image_bytes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(tmp_path / "shards", [4])
    entries = [("a.png", image_bytes(0)), ("a.cls", b"0"), ("b.png", image_bytes(0)), ("c.cls", b"0")]
    entries += [("d.png", image_bytes(0)), ("d.jpg", image_bytes(0)), ("d.cls", b"0")]
    make_tar(folder / "train-000000.tar", entries)
    batches = list(make_data(str(folder), max_bad_fraction=1.0).evaluation_loader("train", 0, 1))
    assert keys(batches) == ["a"]
    messages = [record.getMessage() for record in caplog.records]
    for key, reason in (("b", "it has no .cls entry"), ("c", "it has no image"), ("d", "it has 2 images")):
        assert any(f"'{key}'" in message and reason in message for message in messages)


@pytest.mark.parametrize("training", [True, False])
def test_a_truncated_shard_lacks_its_samples_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture, training: bool
) -> None:
    path = folder / "train-000003.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = make_data(str(folder), max_bad_fraction=0.5)
    if training:
        loader = data.training_loader(0, 1)
        batches = list(loader)
        assert len(batches) == len(loader) == 10 and len(keys(batches)) == 40
        whole = list(data.training_loader(0, 1))
        assert keys(whole) == keys(batches)
    else:
        read = keys(data.evaluation_loader("train", 0, 1))
        assert read == all_keys()[: len(read)] and 23 < len(read) < 41
        assert len(caplog.records) == 41 - len(read)
    message = caplog.records[0].getMessage()
    assert "train-000003.tar" in message and "the shard ends after" in message and "of 18 samples" in message
    with pytest.raises(TooManyBadSamples, match=r"train-000003\.tar"):
        list(make_data(str(folder)).training_loader(0, 1))


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, bytes(10240)])
def test_a_shard_of_which_nothing_can_be_read_ends_the_run(folder: Path, content: bytes) -> None:
    (folder / "train-000002.tar").write_bytes(content)
    data = make_data(str(folder), max_bad_fraction=1.0)
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        with pytest.raises(BrokenShard, match=r"cannot read .*train-000002\.tar"):
            list(loader)


def test_more_samples_than_the_manifest_says_are_not_lost_without_a_word(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][3]["count"] = 17
    manifest["count"] = COUNT - 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train-000003\.tar holds more samples than the 17 declared"):
        list(make_data(str(folder)).evaluation_loader("train", 0, 1))


class Payload:
    """Unpickling one leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "pt", "npy", "json"])
def test_nothing_in_a_shard_is_unpickled(
    tmp_path: Path, make_shards: Any, make_tar: Any, image_bytes: Any, extension: str
) -> None:
    trace = tmp_path / "executed"
    payload = pickle.dumps(Payload(trace))
    pickle.loads(payload)
    assert trace.exists()
    trace.unlink()
    folder = make_shards(tmp_path / "shards", [2])
    entries = []
    for key in ("a", "b"):
        entries += [(f"{key}.{extension}", payload), (f"{key}.png", image_bytes(0)), (f"{key}.cls", b"1")]
    make_tar(folder / "train-000000.tar", entries)
    data = make_data(str(folder), batch_size=2)
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        assert sorted(keys(loader)) == ["a", "b"]
    assert not trace.exists()


def test_entries_about_the_archive_and_folders_are_passed_over(
    tmp_path: Path, make_shards: Any, image_bytes: Any
) -> None:
    folder = make_shards(tmp_path / "shards", [2])
    with tarfile.open(folder / "train-000000.tar", "w") as archive:
        for name, content in (
            ("__index__/list.json", b"{}"),
            ("n01/", None),
            ("n01/a.PNG", image_bytes(0)),
            ("n01/a.cls", b"0"),
            ("n02/a.png", image_bytes(1)),
            ("n02/a.cls", b"1"),
        ):
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    data = make_data(str(folder), batch_size=2)
    assert keys(data.evaluation_loader("train", 0, 1)) == ["n01/a", "n02/a"]


def test_exif_orientation_is_an_option(tmp_path: Path, make_shards: Any) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    folder = make_shards(tmp_path / "shards", [1], replace={0: buffer.getvalue()})
    images = []
    for apply_exif in (False, True):
        data = make_data(str(folder), batch_size=1, apply_exif=apply_exif)
        images.append(next(iter(data.evaluation_loader("train", 0, 1)))["image"][0, 0])
    assert (images[0][:, :4] > 242).all() and (images[0][:, 4:] < 13).all()
    assert (images[1][:4] > 242).all() and (images[1][4:] < 13).all()


def test_settings_and_splits_that_do_not_exist_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="set `train`, `validation` or both"):
        make_data(None)
    for name, value in (("batch_size", 0), ("num_workers", -1), ("seed", -1), ("shuffle_window", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            make_data(str(folder), **{name: value})
    with pytest.raises(ValueError, match="max_bad_fraction is 2"):
        make_data(str(folder), max_bad_fraction=2)
    data = make_data(str(folder))
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="given no validation data: set its `validation`"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="split 'test' is not known"):
        data.evaluation_loader("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="given no train data"):
        make_data(None, validation=str(folder)).train_dataloader()


@pytest.mark.parametrize("channels", [1, 4])
def test_batches_of_other_shapes(folder: Path, channels: int) -> None:
    data = make_data(str(folder), image_size=(6, 10), image_channels=channels)
    assert (data.image_size, data.image_channels) == ((6, 10), channels)
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        assert next(iter(loader))["image"].shape == (4, channels, 6, 10)


# Ways to name shards, and what is believed of them.


def test_compressed_and_plain_shards_of_a_folder_are_read_in_one_order(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(tmp_path / "shards", [3, 4, 2, 5], manifest=False)
    for number, suffix in ((1, ".tar.gz"), (2, ".tgz")):
        plain = folder / f"train-{number:06d}.tar"
        plain.with_name(plain.stem + suffix).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    (folder / "train-000003.tar").rename(folder / "train-000003.TAR")
    (folder / "._train-000000.tar").write_bytes(b"what macOS puts beside a file")
    (folder / "00000.parquet").write_bytes(b"what img2dataset puts beside a shard")
    for location in (
        str(folder),
        f"{folder}/*",
        [f"{folder}/train-00000[01].*", f"{folder}/train-00000{{2.tgz,3.TAR}}"],
    ):
        assert keys(make_data(location, num_classes=3).evaluation_loader("train", 0, 1)) == all_keys(14)
    assert not caplog.records
    assert open_image_set(folder, 8).count == 14
    assert "labels (<key>.cls)" in caplog.text  # which it reads from a manifest alone


def test_what_is_left_out_beside_shards_is_said(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(tmp_path / "shards", [3, 4, 2], manifest=False)
    for number, suffix, compress in ((1, ".tar.bz2", bz2.compress), (2, ".txz", lzma.compress)):
        plain = folder / f"train-{number:06d}.tar"
        plain.with_name(plain.stem + suffix).write_bytes(compress(plain.read_bytes()))
        plain.unlink()
    make_shards(folder / "more", [1], manifest=False)
    for name in ("0.tar.zst", "1.zip", "2.png", "00000.parquet"):
        (folder / name).write_bytes(b"")
    assert make_data(folder, num_classes=3).shards["train"].count == 9  # a path as good as its name
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"left out 1 folders with shards of their own in {folder}, the first is more",
        f"left out 1 images outside the shards in {folder}, the first is 2.png",
        f"left out 2 archives that are not read in {folder}, the first is 0.tar.zst",
    ]
    caplog.clear()
    assert make_data([folder / "train-000000.tar", f"{folder}/*.txz"]).num_classes == 0
    assert "labels (<key>.cls)" in caplog.text and "num_classes" in caplog.text
    with pytest.raises(ValueError, match=r"0\.tar\.zst is no shard: they end with \.tar, "):
        _ = make_data(f"{folder}/0.tar.zst").shards
    with pytest.raises(ValueError, match="the list of shards is empty"):
        _ = make_data([]).shards


def test_shards_beside_a_manifest_that_does_not_list_them_are_said(folder: Path, caplog: Any) -> None:
    (folder / "train-000009.tar.gz").write_bytes(b"")
    assert make_data(str(folder)).shards["train"].count == COUNT
    assert "left out 1 shards of" in caplog.text and "train-000009.tar.gz" in caplog.text


def test_patterns_of_the_disk(tmp_path: Path, make_shards: Any, monkeypatch: Any, caplog: Any) -> None:
    folder = make_shards(tmp_path / "a [1] {b,c}", COUNTS)
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in ("~/a [[]1] {b,c}/*.tar", str(folder), f"{tmp_path}/a*", "~/a [1] {b,c}/train-000000.tar"):
        count = 13 if location.endswith("0.tar") else COUNT
        if location.startswith("~/a [["):  # Braces of a pattern are written with a backslash.
            location = location.replace("{b,c}", r"\{b,c\}")
        assert make_data(location).shards["train"].count == count
    with pytest.raises(ValueError, match=r"no shards match .*x\*\.tar"):
        _ = make_data(f"{tmp_path}/x*.tar").shards
    assert not caplog.records
    first = f"{tmp_path}/a*/train-000000.tar"
    assert make_data([first, first]).shards["train"].count == 26
    assert "train-000000.tar is named 2 times" in caplog.text


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{1..2000000000}.tar",
        "{a,b}" * 40 + ".tar",
        "{a..z}" * 9 + ".tar",
        "{{1..9},{0..999999999}}.tar",
        "{1.." + "9" * 5000 + "}.tar",
    ],
)
def test_braces_that_stand_for_too_many_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="stand for more than 300,000 shards"):
        _ = make_data(pattern).shards


@pytest.mark.parametrize("pattern", ["", "a-{1..3.tar", "{" * 21 + "a" + ",b}" * 21 + ".tar", 3])
def test_what_names_no_shards_is_refused(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"named by|are not closed|more than 20 deep"):
        _ = make_data([pattern]).shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 40}, "count is 40, and the shards hold 41"),
        ({"count": 41.5}, "count is 41.5"),
        ({"classes": "ab"}, "classes is not a list of names"),
        ({"classes": ["a", "a", "b"]}, "3 classes have 2 names"),
        ({"num_classes": 4}, "num_classes is 4, and classes names 3"),
        ({"shards": None}, "shards is not a list"),
        ({"shards": [["train-000000.tar", 13]]}, "shards is not a list"),
        ({"shards": [{"count": 13}]}, "None is no name of a shard"),
        ({"shards": [{"name": "../shards/train-000000.tar", "count": 13}]}, "is no name of a shard in its folder"),
        ({"shards": [{"name": "/etc/passwd", "count": 13}]}, "is no name of a shard in its folder"),
        ({"shards": [{"name": "labels.npy", "count": 13}]}, "is no name of a shard in its folder"),
        ({"shards": [{"name": "train-000000.tar", "count": 8.9}]}, "has 8.9 samples"),
        ({"shards": [{"name": "train-000000.tar", "count": -1}]}, "has -1 samples"),
        ({"shards": [{"name": "train-000000.tar", "count": float("inf")}]}, "has inf samples"),
        ({"shards": [{"name": "train-000000.tar", "count": True}]}, "has True samples"),
        ({"shards": [{"name": "train-000000.tar", "count": 2 * 10**9}]}, "whole number up to"),
        ({"shards": [{"name": "train-000000.tar", "count": 13}] * 2}, "train-000000.tar is listed more than once"),
    ],
)
def test_a_manifest_is_not_believed(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (lambda: make_data(str(folder)).shards, lambda: open_image_set(folder, 8)):
        with pytest.raises(ValueError, match=rf"manifest\.json cannot be believed: .*{re.escape(message)}"):
            read()


@pytest.mark.parametrize("content", ["null", "[]", "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_one_error(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=r"manifest\.json (is not JSON|has format)"):
        _ = make_data(str(folder)).shards


def test_numbers_out_of_range_are_refused(folder: Path) -> None:
    for settings in ({"num_classes": 10**10}, {"num_classes": 0}, {"train_count": -1}, {"train_count": [1, -2, 3, 4]}):
        with pytest.raises(ValueError, match=r"num_classes is|numbers of samples are"):
            _ = make_data(str(folder), **settings).shards


# Without labels.


def unlabelled(folder: Path, counts: Any, make_tar: Any, image_bytes: Any) -> Path:
    """Shards as img2dataset writes them."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        entries = []
        for _ in range(count):
            key = f"{number:09d}"
            entries += [(f"{key}.jpg", image_bytes(number)), (f"{key}.json", b"{}"), (f"{key}.txt", b"a cat")]
            number += 1
        make_tar(folder / f"{shard:05d}.tar", entries)
    return folder


@pytest.mark.parametrize("num_classes", [None, 1])
def test_shards_without_labels_give_images_alone(
    tmp_path: Path, make_tar: Any, image_bytes: Any, caplog: Any, num_classes: int | None
) -> None:
    folder = unlabelled(tmp_path / "shards", [5, 3], make_tar, image_bytes)
    data = make_data(str(folder), num_classes=num_classes)
    assert (data.num_classes, data.classes) == (0, [])
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        batches = list(loader)
        assert [sorted(batch) for batch in batches] == [["image", "index", "key"]] * 2
        assert sorted(keys(batches)) == [f"{number:09d}" for number in range(8)]
    assert ("num_classes=1 has no effect" in caplog.text) == (num_classes == 1)
    images = open_image_set(folder, 8)
    assert (images.count, images.num_classes, images.labels) == (8, None, None)
    assert len(list(images.stream())) == 8


def test_labels_without_their_number_are_not_read(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "shards", [8], manifest=False)
    assert "label" not in next(iter(make_data(str(folder)).training_loader(0, 1)))


def test_validation_has_labels_only_where_training_has(
    tmp_path: Path, folder: Path, make_tar: Any, image_bytes: Any
) -> None:
    plain = str(unlabelled(tmp_path / "plain", [8], make_tar, image_bytes))
    data = make_data(plain, validation=str(folder))
    assert "label" not in next(iter(data.evaluation_loader("validation", 0, 1))) and data.num_classes == 0
    data = make_data(str(folder), validation=plain)
    assert "label" in next(iter(data.training_loader(0, 1))) and data.num_classes == 3
    assert "label" not in next(iter(data.evaluation_loader("validation", 0, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_one_line(folder: Path, make_tar: Any, image_bytes: Any, workers: int) -> None:
    for name in folder.glob("*.tar"):
        make_tar(
            name,
            [
                (f"{number}.png" if half else f"{number}.cls", image_bytes(0) if half else b"9" * 5000)
                for number in range({"0": 13, "1": 1, "2": 9, "3": 18}[name.stem[-1]])
                for half in (True, False)
            ],
        )
    with pytest.raises(ValueError) as error:
        list(make_data(str(folder), num_workers=workers).training_loader(0, 1))
    assert "\n" not in str(error.value) and "labels must be in 0..2" in str(error.value) and len(str(error.value)) < 300
