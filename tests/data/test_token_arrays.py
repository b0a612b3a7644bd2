import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discrete_lit.data import TokenArrays, TokenWriter
from discrete_lit.data.token_arrays import TokenFolder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

MANIFEST: dict[str, Any] = {
    "count": 11,
    "token_shape": (2, 3),
    "vocab_size": 16,
    "image_size": 8,
    "num_classes": 3,
    "classes": ["ant", "bee", "cat"],
    "tokenizer": "a" * 64,
    "source": "noise",
}


@pytest.fixture
def folder(tmp_path: Path, make_token_folder: Callable[..., Path]) -> Path:
    return make_token_folder(tmp_path / "tokens")


def make_data(train: Path | None, validation: Path | None = None, **settings: Any) -> TokenArrays:
    paths = (None if path is None else str(path) for path in (train, validation))
    return TokenArrays(*paths, **({"batch_size": 4} | settings))


def joined(batches: Any, name: str) -> torch.Tensor:
    return torch.cat([batch[name] for batch in batches])


def test_a_batch_holds_tokens_label_and_index(folder: Path) -> None:
    data = make_data(folder)
    assert (data.vocab_size, data.token_shape, data.image_size) == (16, (2, 3), 8)
    assert (data.num_classes, data.classes) == (3, ["ant", "bee", "cat"])
    batch = next(iter(data.training_loader(0, 1)))
    assert set(batch) == {"tokens", "label", "index"}
    assert batch["tokens"].shape == (4, 2, 3)
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_each_row_once_in_order_in_uneven_ranks(folder: Path, workers: int) -> None:
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    for world_size in (1, 3):
        data = make_data(None, folder, num_workers=workers)
        batches = [
            batch for rank in range(world_size) for batch in data.evaluation_loader("validation", rank, world_size)
        ]
        assert torch.equal(joined(batches, "index"), torch.arange(40))
        assert torch.equal(joined(batches, "tokens"), tokens)
        assert torch.equal(joined(batches, "label"), torch.arange(40) % 3)


def test_training_reads_every_row_once_an_epoch_in_an_order_of_its_own(folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy")
    loader = make_data(folder, batch_size=6).training_loader(0, 1)
    orders = []
    for epoch in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        rows = joined(batches, "tokens").numpy()
        # The rows differ from each other, so that a row tells which one it is.
        order = [int(np.flatnonzero((tokens == row).all((1, 2)))[0]) for row in rows]
        assert len(set(order)) == 36
        assert torch.equal(joined(batches, "label"), torch.tensor(order) % 3)
        assert joined(batches, "index").tolist() == list(range(epoch * 40, epoch * 40 + 36))
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_two_ranks_see_the_global_batches_of_one(folder: Path) -> None:
    whole = list(make_data(folder).training_loader(0, 1))
    halves = [list(make_data(folder, batch_size=2, num_workers=rank).training_loader(rank, 2)) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        for name in ("tokens", "label", "index"):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]]))


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Eleven rows of four crops; row r and crop v hold tokens that tell both, 4 r + v."""
    TokenWriter.create(tmp_path / "crops", **(MANIFEST | {"vocab_size": 44}), variants=4)
    writer = TokenWriter(tmp_path / "crops")
    tokens = (torch.arange(44).view(11, 4, 1, 1)).expand(11, 4, 2, 3)
    writer.write(torch.arange(11), tokens, torch.arange(11) % 3)
    writer.close()
    TokenWriter.finalise(tmp_path / "crops")
    return tmp_path / "crops"


def drawn(loader: Any) -> list[tuple[int, int]]:
    """The row and the crop of every sample of an epoch."""
    ids = joined(list(loader), "tokens")
    assert ids.shape[1:] == (2, 3) and bool((ids == ids[:, :1, :1]).all())
    return [divmod(token, 4) for token in ids[:, 0, 0].tolist()]


def test_training_draws_one_crop_of_each_row_in_each_epoch(crops: Path) -> None:
    loader = make_data(crops, batch_size=1).training_loader(0, 1)
    epochs = [dict(drawn(loader)) for _ in range(60)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    for row in range(11):
        counts = np.bincount([epoch[row] for epoch in epochs], minlength=4)
        assert len(counts) == 4 and counts.min() >= 3, (row, counts)
    assert len({tuple(epoch.values()) for epoch in epochs}) == 60
    again = make_data(crops, batch_size=1).training_loader(0, 1)
    assert dict(drawn(again)) == epochs[0]
    assert dict(drawn(make_data(crops, batch_size=1, seed=1).training_loader(0, 1))) != epochs[0]


def test_the_crop_of_a_row_is_the_same_for_every_number_of_ranks_and_after_a_resume(crops: Path) -> None:
    whole = drawn(make_data(crops).training_loader(0, 1))
    halves = [drawn(make_data(crops, batch_size=2, num_workers=rank).training_loader(rank, 2)) for rank in range(2)]
    assert [halves[place // 2 % 2][place // 4 * 2 + place % 2] for place in range(8)] == whole
    one = dict(drawn(make_data(crops, batch_size=1).training_loader(0, 1)))
    assert all(one[row] == crop for row, crop in whole)
    loader = make_data(crops).training_loader(0, 1)
    next(iter(loader))
    resumed = make_data(crops).training_loader(0, 1)
    resumed.load_state_dict(loader.state_dict())
    assert drawn(resumed) == whole[4:]


def test_evaluation_reads_the_first_crop(crops: Path) -> None:
    assert drawn(make_data(None, crops).evaluation_loader("validation", 0, 1)) == [(row, 0) for row in range(11)]


def test_crops_for_training_go_with_one_for_validation(crops: Path, make_token_folder: Callable[..., Path]) -> None:
    folder = make_token_folder(crops.parent / "one", vocab_size=44)
    data = make_data(crops, folder)
    assert data.folders["train"].variants == 4 and data.folders["validation"].variants == 1
    inside = make_data(crops).training_loader(0, 1)
    next(iter(inside))
    with pytest.raises(ValueError, match="variants was 4, is None"):
        make_data(folder, batch_size=4).training_loader(0, 1).load_state_dict(inside.state_dict())


def test_crops_that_the_manifest_does_not_say_are_refused(crops: Path) -> None:
    manifest = json.loads((crops / "manifest.json").read_text())
    (crops / "manifest.json").write_text(json.dumps(manifest | {"variants": 5}))
    with pytest.raises(ValueError, match=r"holds uint16 \(11, 4, 2, 3\); .* \(11, 5, 2, 3\)"):
        _ = make_data(crops).folders


def test_the_tokens_are_not_copied_to_the_workers(folder: Path) -> None:
    opened = TokenFolder(folder)
    assert isinstance(opened.codes, np.memmap)
    copy = pickle.loads(pickle.dumps(opened))
    assert copy._codes is None
    np.testing.assert_array_equal(copy.codes, opened.codes)


def test_tokens_of_another_tokenizer_are_refused(
    tmp_path: Path, folder: Path, make_token_folder: Callable[..., Path]
) -> None:
    data = make_data(folder)
    data.check_tokenizer("a" * 64)
    assert data.tokenizer_fingerprint == "a" * 64
    with pytest.raises(ValueError, match=f"made by the tokenizer {'a' * 64}, not by {'b' * 64}"):
        data.check_tokenizer("b" * 64)
    other = make_token_folder(tmp_path / "other", tokenizer="b" * 64)
    with pytest.raises(ValueError, match="do not belong together: tokenizer is 'aaaa"):
        make_data(folder, other).training_loader(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "has format 'other'"),
        ({"count": 41}, r"holds uint16 \(40, 2, 3\)"),
        ({"token_shape": [3, 2]}, r"its manifest says uint16 or uint32 \(40, 3, 2\)"),
        ({"num_classes": 2, "classes": ["a", "b"]}, r"row 2 of .*labels\.npy has label 2; labels must be in 0\.\.1"),
        ({"num_classes": 2}, "num_classes is 2, and classes names 3"),
        ({"classes": "ant"}, "its classes is 'ant', it must be a list of names"),
        ({"count": "40"}, "its count is '40', it must be a whole number above 0"),
        ({"count": 40.0}, "its count is '40.0'"),
        ({"count": True}, "its count is 'True'"),
        ({"token_shape": None}, "its token_shape is 'None'"),
        ({"vocab_size": 16.9}, "its vocab_size is '16.9'"),
        ({"image_size": 10**9, "vocab_size": None}, "its vocab_size is 'None'"),
        ({"image_size": 0}, "its image_size is '0'"),
        ({"tokenizer": 3}, "its tokenizer is '3'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=message):
        _ = make_data(folder).folders


def test_arrays_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    np.save(folder / "labels.npy", np.zeros(39, dtype=np.int64))
    with pytest.raises(ValueError, match=r"labels\.npy holds int64 \(39,\)"):
        _ = make_data(folder).folders
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        _ = make_data(folder).folders
    with pytest.raises(ValueError, match="holds no token array"):
        _ = make_data(tmp_path).folders
    with pytest.raises(ValueError, match="set `train`, `validation` or both"):
        make_data(None)


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy"])
@pytest.mark.parametrize("kept", [None, 0, 5, 100, 0.9])
def test_a_folder_that_was_copied_in_part_is_named(name: str, kept: float | None, folder: Path) -> None:
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match="copy the folder again") as refused:
        _ = make_data(folder).folders
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    "text", ['{"format": "discrete-lit-tokens-1", "count": 40}', "[]", "null", '"text"', "[" * 100_000, "9" * 5000]
)
def test_a_manifest_that_is_not_whole_is_named(text: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        _ = make_data(folder).folders


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy"])
def test_what_is_no_array_is_not_waited_for_and_not_believed(name: str, folder: Path) -> None:
    file = folder / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"{name} is no file, but a folder, a pipe or a device"):
        _ = make_data(folder).folders
    file.unlink()
    with file.open("wb") as lying:
        np.lib.format.write_array_header_1_0(lying, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
    with pytest.raises(ValueError, match=rf"{name} .* takes 9,007,199,254,740,992 bytes, there are 0"):
        _ = make_data(folder).folders
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match="is not a whole"):
        _ = make_data(folder).folders


def test_an_array_that_is_cut_short_while_it_is_read_is_noticed(folder: Path) -> None:
    """A memory map would give zeros for what is missing on the last page."""
    loader = make_data(folder).evaluation_loader("train", 0, 1)
    batches = iter(loader)
    next(batches)
    os.truncate(folder / "tokens.npy", 300)
    with pytest.raises(ValueError, match=r"tokens\.npy was cut short while it was read, it has 300 bytes left"):
        list(batches)


def test_a_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy")
    tokens[7, 1, 1] = 16
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(ValueError, match=r"holds token 16 .*vocabulary is 0\.\.15"):
        list(make_data(folder).evaluation_loader("train", 0, 1))


# Writing.


def noise(count: int = 11, vocab_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (count, 2, 3), generator=random), torch.arange(count) % 3


@pytest.mark.parametrize(("vocab_size", "bytes_a_token"), [(16, 2), (65536, 2), (65537, 4)])
def test_two_writers_fill_one_array_in_any_order(tmp_path: Path, vocab_size: int, bytes_a_token: int) -> None:
    tokens, labels = noise(vocab_size=vocab_size)
    tokens[0, 0, 0] = vocab_size - 1
    TokenWriter.create(tmp_path / "new", **(MANIFEST | {"vocab_size": vocab_size}))
    writers = [TokenWriter(tmp_path / "new") for _ in range(2)]
    for writer, rows in (
        (writers[0], [3, 4, 5]),
        (writers[1], [10, 0, 7, 8]),
        (writers[0], [9, 6]),
        (writers[1], [1, 2]),
    ):
        writer.write(torch.tensor(rows), tokens[rows], labels[rows])
    for writer in writers:
        writer.close()
    manifest = TokenWriter.finalise(tmp_path / "new")
    assert manifest["format"] == "discrete-lit-tokens-1" and manifest["tokenizer"] == "a" * 64
    assert np.load(tmp_path / "new" / "tokens.npy").itemsize == bytes_a_token
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"manifest.json", "tokens.npy", "labels.npy"}
    batches = list(make_data(tmp_path / "new").evaluation_loader("train", 0, 1))
    assert torch.equal(joined(batches, "tokens"), tokens)
    assert torch.equal(joined(batches, "label"), labels)


def test_an_incomplete_array_is_refused(tmp_path: Path) -> None:
    tokens, labels = noise()
    TokenWriter.create(tmp_path, **MANIFEST)
    writer = TokenWriter(tmp_path)
    rows = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 10])
    writer.write(rows, tokens[rows], labels[rows])
    writer.close()
    with pytest.raises(ValueError, match=r"2 of 11 rows of .* were never written, the first are \[3, 9\]"):
        TokenWriter.finalise(tmp_path)
    with pytest.raises(ValueError, match="is incomplete"):
        _ = make_data(tmp_path).folders


def test_a_second_attempt_starts_anew_and_a_finished_array_is_kept(tmp_path: Path) -> None:
    tokens, labels = noise()
    for _ in range(2):
        TokenWriter.create(tmp_path, **MANIFEST)
        writer = TokenWriter(tmp_path)
        writer.write(torch.arange(3), tokens[:3], labels[:3])
    writer.write(torch.arange(3, 11), tokens[3:], labels[3:])
    writer.close()
    TokenWriter.finalise(tmp_path)
    with pytest.raises(ValueError, match="already holds a finished token array"):
        TokenWriter.create(tmp_path, **MANIFEST)
    with pytest.raises(ValueError, match=r"call TokenWriter\.create first"):
        TokenWriter(tmp_path)


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    tokens, labels = noise()
    TokenWriter.create(tmp_path, **MANIFEST)
    writer = TokenWriter(tmp_path)
    rows = torch.arange(2)
    writer.write(rows, tokens[:2], labels[:2])
    for index, values, classes, message in (
        (rows + 1, tokens[:2], labels[:2], r"written twice in .*\[1\]"),
        (torch.tensor([5, 5]), tokens[:2], labels[:2], "written twice"),
        (rows + 10, tokens[:2], labels[:2], r"rows 10\.\.11 are outside 0\.\.10"),
        (rows + 5, tokens[:2] + 16, labels[:2], r"tokens .* are outside 0\.\.15"),
        (rows + 5, tokens[:2], labels[:2] - 1, r"labels -1\.\.0 are outside 0\.\.2"),
        (rows + 5, tokens[:2, :1], labels[:2], r"got tokens \(2, 1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(index, values, classes)
    writer.write(torch.arange(0), tokens[:0], labels[:0])
    writer.write(torch.arange(2, 11), tokens[2:], labels[2:])
    writer.close()
    TokenWriter.finalise(tmp_path)
    assert torch.equal(joined(make_data(tmp_path).evaluation_loader("train", 0, 1), "tokens"), tokens)
    with pytest.raises(ValueError, match="count is 0"):
        TokenWriter.create(tmp_path / "empty", **(MANIFEST | {"count": 0}))


@pytest.mark.parametrize(("given", "stored", "read"), [(8, 8, 8), ((8, 8), 8, 8), ((8, 12), [8, 12], (8, 12))])
def test_the_size_of_the_images_is_kept(tmp_path: Path, given: Any, stored: Any, read: Any) -> None:
    folder = tmp_path / "sized"
    TokenWriter.create(folder, **{**MANIFEST, "count": 1, "image_size": given})
    writer = TokenWriter(folder)
    writer.write(torch.tensor([0]), torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([0]))
    writer.close()
    TokenWriter.finalise(folder)
    assert json.loads((folder / "manifest.json").read_text())["image_size"] == stored
    assert make_data(folder, batch_size=1).image_size == read


def test_images_without_labels_make_tokens_without_labels(tmp_path: Path) -> None:
    tokens = torch.arange(24).reshape(4, 2, 3) % 16
    settings = dict(vocab_size=16, image_size=8, tokenizer="a" * 64, source="noise")
    TokenWriter.create(tmp_path / "t", count=4, token_shape=(2, 3), num_classes=0, classes=[], **settings)
    writer = TokenWriter(tmp_path / "t")
    with pytest.raises(ValueError, match="laid out for 0 classes, and the images have labels"):
        writer.write(torch.arange(4), tokens, torch.zeros(4, dtype=torch.int64))
    writer.write(torch.arange(4), tokens, None)
    writer.close()
    TokenWriter.finalise(tmp_path / "t")
    data = TokenArrays(str(tmp_path / "t"), batch_size=2)
    assert data.num_classes == 0
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        batches = list(loader)
        assert [sorted(batch) for batch in batches] == [["index", "tokens"]] * 2
    assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), tokens)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8])
def test_labels_of_other_integer_types_are_read(
    make_token_folder: Callable[..., Path], tmp_path: Path, dtype: Any
) -> None:
    folder = make_token_folder(tmp_path / "t")
    np.save(folder / "labels.npy", (np.arange(40) % 2).astype(dtype))
    batch = next(iter(TokenArrays(str(folder), batch_size=4).evaluation_loader("train", 0, 1)))
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (2**16, np.uint16),
        (2**16 + 1, np.uint32),
        (2**32, np.uint32),
        (2**32 + 1, np.int64),
        (2**53 + 1, np.int64),
        (2**62, np.int64),
    ],
)
def test_ids_are_stored_exactly_in_the_narrowest_type(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    largest = vocab_size - 1
    values = [0, 1, largest, largest - 1, largest // 2, largest // 3]
    tokens = torch.tensor(values).reshape(1, 2, 3)
    TokenWriter.create(tmp_path / "t", **(MANIFEST | {"count": 1, "vocab_size": vocab_size}))
    writer = TokenWriter(tmp_path / "t")
    writer.write(torch.tensor([0]), tokens, torch.tensor([0]))
    writer.close()
    TokenWriter.finalise(tmp_path / "t")
    assert np.load(tmp_path / "t" / "tokens.npy").dtype == dtype
    batch = next(iter(make_data(None, tmp_path / "t").evaluation_loader("validation", 0, 1)))
    assert torch.equal(batch["tokens"], tokens)


def test_ids_that_no_integer_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids of 2\\^63 and more fit into no int64"):
        TokenWriter.create(tmp_path / "t", **(MANIFEST | {"vocab_size": 2**63 + 1}))


def test_an_array_whose_ids_were_cut_is_refused(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.load(folder / "tokens.npy").astype(np.uint32))
    assert len(TokenFolder(folder).codes) == 40  # wider than it needs to be
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 2**36}))
    with pytest.raises(ValueError, match=r"holds uint32 \(40, 2, 3\); its manifest says int64 \(40, 2, 3\)"):
        TokenFolder(folder)


def test_negative_ids_are_refused(tmp_path: Path, make_token_folder: Callable[..., Path]) -> None:
    folder = make_token_folder(tmp_path / "tokens", vocab_size=16)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 2**36}))
    np.save(folder / "tokens.npy", np.full((40, 2, 3), -1, np.int64))
    with pytest.raises(ValueError, match="holds token -1 in one of the rows"):
        next(iter(make_data(None, folder).evaluation_loader("validation", 0, 1)))
