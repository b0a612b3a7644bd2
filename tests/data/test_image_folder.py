import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from discrete_lit.data import ImageFolder, ImageShards
from discrete_lit.data.loaders import TooManyBadSamples
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders
from discrete_lit.data.transforms import UndecodableImage
from discrete_lit.evaluation.image_sets import open_image_set

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def make_data(train: Any, **settings: Any) -> ImageFolder:
    return ImageFolder(train, **({"image_size": 8, "batch_size": 4, "num_workers": 0} | settings))


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.fixture
def folder(tmp_path: Path, make_class_folder: Callable[..., Path]) -> Path:
    return make_class_folder(tmp_path / "images", {"cat": 5, "ant": 4, "bee": 6})


def test_a_batch_holds_image_label_key_and_index(folder: Path) -> None:
    data = make_data(str(folder), flip=False)
    assert (data.num_classes, data.classes, data.image_size) == (3, ["ant", "bee", "cat"], 8)
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        batch = next(iter(loader))
        floats = data.on_after_batch_transfer(batch, 0)["image"]
        assert floats.shape == (4, 3, 8, 8) and floats.dtype == torch.float32 and floats.is_contiguous()
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        for image, values, label, key in zip(batch["image"], floats, batch["label"], batch["key"], strict=True):
            pixels = np.asarray(Image.open(folder / key))
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
            np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)
            assert data.classes[label] == key.split("/")[0]


def test_evaluation_reads_sorted_files_once_in_uneven_ranks(folder: Path) -> None:
    data = make_data(str(folder), num_workers=2)
    expected = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    for world_size in (1, 2, 4):
        batches = [batch for rank in range(world_size) for batch in data.evaluation_loader("train", rank, world_size)]
        assert keys(batches) == expected
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(15))


def test_training_shuffles_anew_in_every_epoch_and_drops_the_tail(folder: Path) -> None:
    loader = make_data(str(folder)).training_loader(0, 1)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 3
    assert len(set(keys(first))) == 12
    assert keys(first) != keys(second) and keys(first) != sorted(keys(first))
    assert torch.cat([batch["index"] for batch in first + second]).tolist() == [*range(12), *range(15, 27)]
    other = make_data(str(folder), seed=1).training_loader(0, 1)
    assert keys(other) != keys(first)


def test_two_ranks_see_the_global_batches_of_one(folder: Path) -> None:
    whole = list(make_data(str(folder), image_size=6).training_loader(0, 1))
    halves = [
        list(make_data(str(folder), image_size=6, batch_size=2, num_workers=rank).training_loader(rank, 2))
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch["key"] == first["key"] + second["key"]
        for name in ("image", "label", "index"):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]]))


def test_images_are_found_at_any_depth_and_other_files_are_not(folder: Path) -> None:
    deep = folder / "ant" / "more"
    deep.mkdir()
    (folder / "ant" / "0005.png").rename(deep / "DEEP.PNG")
    (folder / "ant" / "notes.txt").write_text("not an image")
    (folder / "ant" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    data = make_data(str(folder))
    read = keys(data.evaluation_loader("train", 0, 1))
    assert "ant/more/DEEP.PNG" in read and len(read) == 15


def test_the_module_the_source_and_the_evaluation_find_the_same_images(folder: Path) -> None:
    picture = next(folder.glob("ant/*.png")).read_bytes()
    found = ["ant/a-b/1.png", "ant/a/2.png"]
    left_out = ["bee/.thumbnails/0.png", "cat/.hidden.png", "cat/png", "bee/readme.md"]
    for name in found + left_out:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture)
    module = keys(make_data(str(folder)).evaluation_loader("train", 0, 1))
    source = [entry.key for entry in ClassFolders(folder).entries]
    assert len(module) == 17 and sorted(module) == sorted(f"{key}.png" for key in source)
    assert open_image_set(folder, 8).count == 17
    # Each in its own order, on which permutations and fingerprints rest.
    assert module[4:6] == ["ant/a-b/1.png", "ant/a/2.png"]
    assert source[4:6] == ["ant/a/2", "ant/a-b/1"]


def test_a_class_may_have_no_image_and_keeps_its_label(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "aardvark").mkdir()
    data = make_data(str(folder))
    assert data.classes[0] == ClassFolders(folder).classes[0] == "aardvark"
    assert open_image_set(folder, 8).num_classes == 4
    assert min(next(iter(data.evaluation_loader("train", 0, 1)))["label"].tolist()) == 1
    (record,) = caplog.records  # Once, whoever reads the folder.
    assert "class folder without an image, which keeps its label (1, first aardvark)" in record.getMessage()


def test_every_command_leaves_out_the_same_and_says_it_once(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = next(folder.glob("ant/*.png")).read_bytes()
    for name in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "ant/.ipynb_checkpoints/0-checkpoint.png",
        "ant/.hidden.png",
        "ant/._0000.png",
        "__MACOSX/ant/._0000.png",
        "ant/notes.txt",
        "ant/data",
        "ant/IMG_1.HEIC",
        "readme.md",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
    (folder / "ant" / "loop").symlink_to(folder)
    (folder / "ant" / "itself").symlink_to("itself")
    (folder / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "dog").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "bee" / "pipe.png")
    (folder / "bee" / "UPPER.PnG").write_bytes(picture)
    (folder / "bee" / "linked.png").symlink_to(folder / "ant" / "0005.png")
    data = make_data(str(folder))
    assert data.classes == ["ant", "bee", "cat"]
    read = keys(data.evaluation_loader("train", 0, 1))
    source, images = ClassFolders(folder), open_image_set(folder, 8)
    assert len(read) == len(source) == images.count == 17 and "bee/UPPER.PnG" in read
    assert source.classes == data.classes and images.num_classes == 3
    (record,) = caplog.records
    message = record.getMessage()
    assert "left out 14 entries of" in message
    for kind in (
        "hidden (4, first .ipynb_checkpoints)",
        "AppleDouble (1, first ant/._0000.png)",
        "link to a folder above it (1, first ant/loop)",
        "broken link (3, first ant/itself)",
        "device or pipe (1, first bee/pipe.png)",
        ".heic, which Pillow does not read here: convert it (1, first ant/IMG_1.HEIC)",
        ".txt (1, first ant/notes.txt)",
        ".md (1, first readme.md)",
        "no extension (1, first ant/data)",
    ):
        assert kind in message


@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_are_not_utf8(folder: Path, workers: int) -> None:
    for name in (b"caf\xe9.png", "na\u00efve \u732b\nnew line.png".encode()):
        os.rename(folder / "cat" / f"000{1 + len(name) % 2}.png", os.fsencode(folder / "cat") + b"/" + name)
    os.rename(folder / "cat", os.fsencode(folder) + b"/ch\xe2t")
    data = make_data(str(folder), num_workers=workers, batch_size=5)
    assert data.classes == ["ant", "bee", os.fsdecode(b"ch\xe2t")]
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        read = keys(loader)
        assert len(set(read)) == 15
        for key in read:
            assert os.path.isfile(os.fsencode(folder) + b"/" + os.fsencode(key))


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"bee cannot be read \(Permission denied\)"):
        _ = make_data(str(folder)).classes


# Without labels.


@pytest.fixture
def pictures(tmp_path: Path, image_bytes: Callable[..., bytes]) -> Path:
    """Five images in one folder."""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(image_bytes(number))
    return tmp_path / "pictures"


@pytest.mark.parametrize("nested", [False, True])
def test_images_without_classes_have_no_labels(pictures: Path, image_bytes: Any, nested: bool) -> None:
    if nested:
        (pictures / "more" / "deeper").mkdir(parents=True)
        (pictures / "more" / "deeper" / "9.png").write_bytes(image_bytes(9))
        with pytest.raises(ValueError, match=r"5 images lie directly in .* more/deeper/9\.png.*labels: false"):
            _ = make_data(str(pictures)).classes
    data = make_data(str(pictures), labels=not nested, batch_size=5 + nested)
    assert (data.num_classes, data.classes) == (0, [])
    for loader in (data.training_loader(0, 1), data.evaluation_loader("train", 0, 1)):
        (batch,) = list(loader)
        assert sorted(batch) == ["image", "index", "key"] and len(batch["key"]) == 5 + nested
    source = ClassFolders(pictures, labels=not nested)
    assert len(source) == 5 + nested and source.classes == [] and source[0].label is None


def test_shards_of_images_without_labels(tmp_path: Path, pictures: Path) -> None:
    manifest = write_shards(ClassFolders(pictures), tmp_path / "shards", split="train")
    assert (manifest["num_classes"], manifest["classes"]) == (0, [])
    data = ImageShards(str(tmp_path / "shards"), image_size=8, batch_size=5, num_workers=0)
    assert [sorted(batch) for batch in data.training_loader(0, 1)] == [["image", "index", "key"]]
    assert open_image_set(tmp_path / "shards", 8).num_classes is None
    with pytest.raises(ValueError, match="classes_from has no effect"):
        ClassFolders(pictures, tmp_path / "shards" / "manifest.json")


def test_validation_has_labels_only_where_training_has(folder: Path, pictures: Path) -> None:
    data = make_data(str(pictures), validation=str(folder))
    assert data.num_classes == 0 and "label" not in next(iter(data.val_dataloader()))
    data = make_data(str(folder), validation=str(pictures))
    assert data.num_classes == 3 and "label" not in next(iter(data.val_dataloader()))


def test_the_home_folder_and_a_file_above_the_limit(folder: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert make_data(f"~/{folder.name}").num_classes == ClassFolders(f"~/{folder.name}").classes.index("cat") + 1
    assert open_image_set(f"~/{folder.name}", 8).count == 15
    (folder / "cat" / "large.png").write_bytes(bytes(2000))
    monkeypatch.setenv("DISCRETE_LIT_MAX_IMAGE_MEGABYTES", "0.001")
    list(make_data(str(folder), max_bad_fraction=0.5).evaluation_loader("train", 0, 1))
    assert "it has 2,000 bytes, more than DISCRETE_LIT_MAX_IMAGE_MEGABYTES allows" in caplog.text
    with pytest.raises(ValueError, match=r"cat/large\.png has 2,000 bytes, more than DISCRETE_LIT_MAX_IMAGE_MEGABYTES"):
        write_shards(ClassFolders(folder), folder.parent / "shards", split="train")
    decoders = [decode for _, decode in open_image_set(folder, 8).stream()]
    (folder / "cat" / "0000.png").unlink()
    for number, message in ((10, "No such file"), (15, "large.png has 2,000 bytes")):
        with pytest.raises(UndecodableImage, match=message):
            decoders[number]()


def test_images_beside_the_class_folders_are_refused(folder: Path) -> None:
    (folder / "stray.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 images lie directly in .* stray\.png"):
        make_data(str(folder)).training_loader(0, 1)


def test_validation_takes_its_labels_from_the_training_classes(
    tmp_path: Path, folder: Path, make_class_folder: Callable[..., Path]
) -> None:
    validation = make_class_folder(tmp_path / "validation", {"cat": 2, "bee": 1})
    batch = next(iter(make_data(str(folder), validation=str(validation)).val_dataloader()))
    assert batch["label"].tolist() == [1, 2, 2]
    assert make_data(None, validation=str(validation)).classes == ["bee", "cat"]
    make_class_folder(validation, {"dog": 1})
    with pytest.raises(ValueError, match="has a class 'dog' that the training folder has not"):
        make_data(str(folder), validation=str(validation)).val_dataloader()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "no images in")):
        with pytest.raises(ValueError, match=message):
            make_data(str(path)).training_loader(0, 1)
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        make_data(str(tmp_path)).training_loader(0, 1)
    with pytest.raises(ValueError, match="set `train`, `validation` or both"):
        make_data(None)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_in_training_and_left_out_of_evaluation(
    folder: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (folder / "cat" / "0001.png").write_bytes(b"broken")
    data = make_data(str(folder), num_workers=workers, batch_size=5, max_bad_fraction=0.1)
    read = keys(data.training_loader(0, 1))
    assert len(read) == 15 and len(set(read)) == 14 and "cat/0001.png" not in read
    assert "bad sample 'cat/0001.png'" in caplog.text
    batches = list(data.evaluation_loader("train", 0, 1))
    assert len(keys(batches)) == 14
    assert 11 not in torch.cat([batch["index"] for batch in batches])
    with pytest.raises(TooManyBadSamples, match=r"1 of 15 samples are bad.*cat/0001\.png"):
        list(make_data(str(folder), batch_size=5).training_loader(0, 1))


def test_a_folder_of_broken_images_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    for number in range(4):
        (tmp_path / "ant" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(TooManyBadSamples, match="not one image"):
        list(make_data(str(tmp_path), max_bad_fraction=1.0).training_loader(0, 1))


def test_augmentation_differs_between_epochs_and_is_off_in_evaluation(
    tmp_path: Path, make_class_folder: Callable[..., Path]
) -> None:
    folder = make_class_folder(tmp_path / "images", {"ant": 4}, size=(40, 20))
    data = make_data(str(folder))
    loader = data.training_loader(0, 1)

    def by_key(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return dict(zip(batch["key"], batch["image"], strict=True))

    first, second = by_key(next(iter(loader))), by_key(next(iter(loader)))
    plain = by_key(next(iter(data.evaluation_loader("train", 0, 1))))
    assert sum(not torch.equal(first[key], second[key]) for key in first) >= 3
    again = by_key(next(iter(data.evaluation_loader("train", 0, 1))))
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_batches_of_other_shapes(folder: Path, channels: int, mode: str) -> None:
    settings = {"image_size": [6, 10], "image_channels": channels, "batch_size": 16}
    data = make_data(None, validation=str(folder), **settings)
    assert (data.image_size, data.image_channels) == ((6, 10), channels)
    batch = next(iter(data.evaluation_loader("validation", 0, 1)))
    assert batch["image"].shape == (15, channels, 6, 10)
    images = open_image_set(folder, (6, 10), image_channels=channels)
    for image, (_, decode) in zip(batch["image"], images.stream(), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), decode())
    file = Image.open(folder / batch["key"][0]).convert(mode)
    scaled = np.asarray(file.resize((10, 10), Image.Resampling.BICUBIC))[2:8]
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), scaled.reshape(6, 10, channels))
    training = make_data(str(folder), **settings | {"batch_size": 4})
    assert next(iter(training.training_loader(0, 1)))["image"].shape == (4, channels, 6, 10)
    with pytest.raises(ValueError, match=r"image_channels is 2; it must be 1 \(grey\), 3 \(RGB\) or 4"):
        make_data(str(folder), image_channels=2)
    with pytest.raises(ValueError, match=r"image_size=\[6\]: it must be"):
        make_data(str(folder), image_size=[6])
