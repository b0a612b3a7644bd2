"""Captions beside images: in shards, in folders and beside arrays; which of several is drawn, and what is missing."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discrete_lit.data import ImageFolder, ImageShards, TokenArrays, TokenWriter
from discrete_lit.data.captions import Captions
from discrete_lit.data.shard_captions import shard_captions
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders, PartOfSource

COUNT = 12


def captions_of(number: int) -> list[str]:
    return [f"first of {number}", f"zweite é of {number}", f"third of {number}"][: 1 + number % 3]


@pytest.fixture
def folder(tmp_path: Path, image_bytes: Callable[..., bytes]) -> Path:
    """Twelve images of two classes, each with a .txt and a .json beside it."""
    root = tmp_path / "images"
    for number in range(COUNT):
        path = root / "ab"[number % 2] / f"image{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
        path.with_suffix(".txt").write_text("\n".join([*captions_of(number), "", "  "]), encoding="utf-8")
        fields = {"caption": captions_of(number)[0], "all": captions_of(number), "width": 8}
        path.with_suffix(".json").write_text(json.dumps(fields), encoding="utf-8")
    return root


def number_of(key: str) -> int:
    return int(key[-6:-4] if key.endswith(".png") else key[-2:])


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    write_shards(ClassFolders(folder, captions=Captions()), tmp_path / "shards", split="train", samples_per_shard=5)
    return tmp_path / "shards"


def data_of(kind: str, folder: Path, shards: Path, **settings: Any) -> ImageShards | ImageFolder:
    made = {"batch_size": 4, "image_size": 8, "num_workers": 0, "captions": Captions()} | settings
    return ImageFolder(str(folder), **made) if kind == "folder" else ImageShards(str(shards), **made)


KINDS = pytest.mark.parametrize("kind", ["folder", "shards"])


@KINDS
def test_evaluation_has_the_first_and_all(kind: str, folder: Path, shards: Path) -> None:
    batches = list(data_of(kind, folder, shards).evaluation_loader("train"))
    seen = [number_of(key) for batch in batches for key in batch["key"]]
    assert sorted(seen) == list(range(COUNT))
    assert [text for batch in batches for text in batch["caption"]] == [captions_of(number)[0] for number in seen]
    assert [texts for batch in batches for texts in batch["captions"]] == [captions_of(number) for number in seen]
    assert "label" in batches[0] and "image" in batches[0]


def training(data: Any, epochs: int, rank: int = 0, world_size: int = 1) -> list[dict[str, str]]:
    """The caption of each image that was drawn in each epoch."""
    loader = data.training_loader(rank, world_size)
    return [dict(zip(b["key"], b["caption"], strict=True)) for _ in range(epochs) for b in [joined(loader)]]


def joined(loader: Any) -> dict[str, list[str]]:
    batches = list(loader)
    assert all("captions" not in batch for batch in batches)
    return {name: [value for batch in batches for value in batch[name]] for name in ("key", "caption")}


@KINDS
def test_training_draws_one_of_several_by_seed_epoch_and_key(kind: str, folder: Path, shards: Path) -> None:
    drawn = training(data_of(kind, folder, shards), 30)
    for key in drawn[0]:
        texts = Counter(epoch[key] for epoch in drawn)
        allowed = captions_of(number_of(key))
        assert set(texts) == set(allowed)
        # Even: of 30 draws at least 3 are of each, but for one set in ten thousand.
        assert min(texts.values()) >= 3
    assert training(data_of(kind, folder, shards), 3) == drawn[:3]
    other = training(data_of(kind, folder, shards, seed=1), 1)[0]
    assert any(other[key] != drawn[0][key] for key in other)
    # Neither ranks nor workers change what is drawn.
    halves = [training(data_of(kind, folder, shards, batch_size=2, num_workers=1), 1, rank, 2)[0] for rank in (0, 1)]
    assert all(drawn[0][key] == text for half in halves for key, text in half.items())


@KINDS
def test_a_resume_draws_what_would_have_come(kind: str, folder: Path, shards: Path) -> None:
    whole = [batch["caption"] for batch in data_of(kind, folder, shards).training_loader(0, 1)]
    first = data_of(kind, folder, shards).training_loader(0, 1)
    assert next(iter(first))["caption"] == whole[0]
    second = data_of(kind, folder, shards).training_loader(0, 1)
    second.load_state_dict(first.state_dict())
    assert [batch["caption"] for batch in second] == whole[1:]


@KINDS
def test_json_has_one_or_several_in_a_field(
    kind: str, folder: Path, tmp_path: Path, make_tar: Callable[..., None]
) -> None:
    files = sorted(folder.rglob("*.*"))
    # As tools that sort names write them: .json before .png, .txt behind; other entries in between.
    entries = [(f"{file.stem}{file.suffix}", file.read_bytes()) for file in files]
    (tmp_path / "other").mkdir()
    make_tar(tmp_path / "other" / "train-0.tar", sorted([*entries, ("alone.txt", b"no image"), ("alone.json", b"{}")]))
    for field, expected in ((None, lambda n: captions_of(n)[:1]), ("all", captions_of)):
        captions = Captions(kind="json", field=field)
        made = data_of(kind, folder, tmp_path / "other", captions=captions)
        for batch in made.evaluation_loader("train"):
            assert batch["captions"] == [expected(number_of(key)) for key in batch["key"]]
    if kind == "shards":
        lines = data_of(kind, folder, tmp_path / "other").evaluation_loader("train")
        assert sum(len(batch["key"]) for batch in lines) == COUNT


@KINDS
def test_without_the_setting_nothing_is_read(kind: str, folder: Path, shards: Path) -> None:
    batch = next(iter(data_of(kind, folder, shards, captions=None).training_loader(0, 1)))
    assert "caption" not in batch


def spoilt(folder: Path, content: bytes | None) -> Path:
    file = folder / "a" / "image04.txt"
    file.unlink() if content is None else file.write_bytes(content)
    return file


@KINDS
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "it has no .txt"), (b" \n\n", "no caption in its .txt"), (b"\xff\xfe\xff", "its .txt cannot be read")],
)
def test_a_missing_caption_is_a_bad_sample_or_empty(
    kind: str,
    content: bytes | None,
    reason: str,
    folder: Path,
    tmp_path: Path,
    make_tar: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoilt(folder, content)
    (tmp_path / "other").mkdir()
    make_tar(
        tmp_path / "other" / "train-0.tar",
        [(file.name, file.read_bytes()) for file in sorted(folder.rglob("*.*")) if file.suffix != ".json"],
    )
    made = data_of(kind, folder, tmp_path / "other")
    with pytest.raises(ValueError, match=r"1 of 12 samples are bad.*image04.*" + reason):
        list(made.evaluation_loader("train"))
    tolerant = data_of(kind, folder, tmp_path / "other", max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        drawn = training(tolerant, 1)[0]
    assert "image04" in caplog.text and not any("image04" in key for key in drawn)
    empty = data_of(kind, folder, tmp_path / "other", captions=Captions(missing="empty"))
    if content == b"\xff\xfe\xff":  # a broken file is no missing one
        with pytest.raises(ValueError, match="cannot be read"):
            list(empty.evaluation_loader("train"))
        return
    texts = {
        key: text for b in empty.evaluation_loader("train") for key, text in zip(b["key"], b["caption"], strict=True)
    }
    assert [text for key, text in texts.items() if "image04" in key] == [""]
    assert sum(text == "" for text in texts.values()) == 1


def test_a_field_that_is_missing_is_named_beside_those_that_are_there(folder: Path) -> None:
    made = ImageFolder(
        str(folder), image_size=8, batch_size=4, num_workers=0, captions=Captions(kind="json", field="text")
    )
    with pytest.raises(ValueError, match="field 'text' is missing or empty; it holds caption, all, width"):
        list(made.evaluation_loader("train"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csv"}, "captions.kind is 'csv'"),
        ({"missing": "skip"}, "captions.missing is 'skip'"),
        ({"field": "caption"}, "is of JSON"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captions(**settings)


# Writing shards.


def test_shards_with_captions_are_another_source_and_notice_changes(folder: Path, tmp_path: Path) -> None:
    plain, captioned = ClassFolders(folder), ClassFolders(folder, captions=Captions())
    assert plain.fingerprint() != captioned.fingerprint()
    assert plain[3].captions == () and captioned[3].captions == tuple(captions_of(number_of(captioned[3].key)))
    part = PartOfSource(captioned, stop=2)
    assert part[1].captions == tuple(captions_of(number_of(part[1].key)))
    before = captioned.fingerprint()
    spoilt(folder, b"something longer than it was")
    assert ClassFolders(folder, captions=Captions()).fingerprint() != before


def test_an_image_without_a_caption_is_named_or_written_without(folder: Path, tmp_path: Path) -> None:
    spoilt(folder, None)
    with pytest.raises(ValueError, match=r"image04\.png cannot be written with its caption: it has no \.txt"):
        write_shards(ClassFolders(folder, captions=Captions()), tmp_path / "shards", split="train")
    tolerant = ClassFolders(folder, captions=Captions(missing="empty"))
    write_shards(tolerant, tmp_path / "other", split="train")
    found = list(shard_captions(str(tmp_path / "other"), Captions()))
    assert len(found) == COUNT - 1


def test_captions_of_shards_without_any_are_refused(folder: Path, tmp_path: Path) -> None:
    write_shards(ClassFolders(folder), tmp_path / "shards", split="train")
    with pytest.raises(ValueError, match=r"not one of 12 images in .* has a caption; sample .*: it has no .txt"):
        list(shard_captions(str(tmp_path / "shards"), Captions()))


# Beside arrays.


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    output = tmp_path / "tokens"
    TokenWriter.create(
        output,
        count=COUNT,
        token_shape=(2,),
        vocab_size=COUNT,
        image_size=8,
        num_classes=0,
        classes=[],
        tokenizer="f",
        source="test",
        captions=True,
    )
    writers = [TokenWriter(output), TokenWriter(output)]
    for number in reversed(range(COUNT)):
        row, codes = torch.tensor([number]), torch.full((1, 2), number)
        writers[number % 2].write(row, codes, None, captions=[[*captions_of(number), "line\u2028separator"]])
    for writer in writers:
        writer.close()
    TokenWriter.finalise(output)
    return output


def test_token_arrays_keep_captions_beside_tokens(tokens: Path) -> None:
    assert sorted(path.name for path in tokens.iterdir()) == [
        "caption_starts.npy",
        "captions.jsonl",
        "labels.npy",
        "manifest.json",
        "tokens.npy",
    ]
    data = TokenArrays(str(tokens), batch_size=4)
    for batch in data.evaluation_loader("train"):
        numbers = batch["tokens"][:, 0].tolist()
        assert batch["captions"] == [[*captions_of(n), "line\u2028separator"] for n in numbers]
        assert batch["caption"] == [captions_of(n)[0] for n in numbers]


def test_arrays_draw_captions_as_images_do(tokens: Path) -> None:
    def epochs(**settings: Any) -> list[dict[int, str]]:
        loader = TokenArrays(str(tokens), batch_size=4, **settings).training_loader(0, 1)
        return [
            {n: t for b in loader for n, t in zip(b["tokens"][:, 0].tolist(), b["caption"], strict=True)}
            for _ in range(20)
        ]

    drawn = epochs()
    for number in range(COUNT):
        assert {epoch[number] for epoch in drawn} == {*captions_of(number), "line\u2028separator"}
    assert epochs(num_workers=1) == drawn
    assert epochs(seed=1) != drawn


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "captions.jsonl").unlink(), "cannot be read"),
        (lambda folder: (folder / "captions.jsonl").write_text("[]\n"), "are not of the same 12 rows"),
        (lambda folder: np.save(folder / "caption_starts.npy", np.arange(5)), "are not of the same 12 rows"),
    ],
)
def test_captions_that_were_copied_in_part_are_refused(tokens: Path, harm: Callable, message: str) -> None:
    harm(tokens)
    with pytest.raises(ValueError, match=message):
        list(TokenArrays(str(tokens), batch_size=4).evaluation_loader("train"))


def test_rows_without_captions_are_refused(tmp_path: Path) -> None:
    common = {"token_shape": (2,), "vocab_size": 3, "image_size": 8, "num_classes": 0, "classes": [], "source": "test"}
    TokenWriter.create(tmp_path, count=1, tokenizer="f", captions=True, **common)
    writer = TokenWriter(tmp_path)
    row, codes = torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="was laid out with captions, and none were given for 1 rows"):
        writer.write(row, codes, None)
    with pytest.raises(ValueError, match="row 0 has no caption"):
        writer.write(row, codes, None, captions=[[]])
