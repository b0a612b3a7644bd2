"""ImageNet in miniature: archives of the structure of the released ones, byte by byte, with 4 classes."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ImageNetTrain, ImageNetValidation

RECIPE = Path(__file__).parents[2] / "data" / "imagenet.py"

# In the order of the development kit (ILSVRC2012_ID 1, 2, 3, 4), which is not that of the sorted WordNet ids.
KIT_ORDER = ["n02119789", "n02100735", "n01440764", "n01751748"]
SORTED = ["n01440764", "n01751748", "n02100735", "n02119789"]
# Classes of validation images 1 to 8.
TRUTH = ["n01751748", "n02119789", "n02119789", "n01440764", "n02100735", "n01751748", "n01440764", "n02100735"]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 7, 13, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uname, info.gname = len(data), 1_340_000_000, "imagenet", "imagenet"
    archive.addfile(info, io.BytesIO(data))


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return buffer.getvalue()


TRAIN = {f"{wnid}_{number}.JPEG": jpeg(number) for wnid in SORTED for number in (10026, 18, 7)}
VALIDATION = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(100 + number) for number in range(1, 9)}


@pytest.fixture
def train_archive(tmp_path: Path) -> Path:
    classes = {f"{w}.tar": tar({n: d for n, d in TRAIN.items() if n.startswith(w)}) for w in reversed(SORTED)}
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar(classes))
    return path


@pytest.fixture
def val_archive(tmp_path: Path) -> Path:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar(dict(reversed(VALIDATION.items()))))
    return path


def meta_mat() -> bytes:
    """The table of the development kit: the classes, then inner nodes of the WordNet tree."""
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [
        (float(i), wnid, "tench, Tinca tinca", "a fish", 0.0, [], 0.0, 1300.0) for i, wnid in enumerate(KIT_ORDER, 1)
    ]
    rows += [(5.0, "n00001740", "entity", "that which is", 2.0, [1.0, 2.0], 9.0, 0.0)]
    rows += [(6.0, "n00001930", "physical entity", "a thing", 1.0, [3.0], 8.0, 0.0)]
    table = np.zeros((len(rows), 1), [(name, object) for name in names])
    for row, values in enumerate(rows):
        table[row, 0] = values
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table}, do_compression=True)
    return buffer.getvalue()


def kit(path: Path, **changes: bytes | None) -> Path:
    root = "ILSVRC2012_devkit_t12"
    files: dict[str, bytes | None] = {
        f"{root}/readme.txt": b"ImageNet Large Scale Visual Recognition Challenge 2012",
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": kit_numbers(),
        f"{root}/data/meta.mat": meta_mat(),
        f"{root}/evaluation/demo_eval.m": b"% demo",
    }
    files |= {f"{root}/data/{name.replace('__', '.')}": data for name, data in changes.items()}
    path.write_bytes(gzip.compress(tar({name: data for name, data in files.items() if data is not None})))
    return path


def kit_numbers() -> bytes:
    return "".join(f"{KIT_ORDER.index(wnid) + 1}\n" for wnid in TRUTH).encode()


def kaggle() -> str:
    rows = [f"ILSVRC2012_val_{n:08d},{w} 85 1 499 272 {w} 3 4 5 6 \n" for n, w in enumerate(TRUTH, 1)]
    return "ImageId,PredictionString\n" + "".join(reversed(rows))


def read_shards(folder: Path) -> dict[str, tuple[bytes, int]]:
    """(image file, label) of each key."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                files[member.name] = content.read()
    keys = [name.removesuffix(".cls") for name in files if name.endswith(".cls")]
    assert len(files) == 2 * len(keys)
    return {key: (files[f"{key}.jpeg"], int(files[f"{key}.cls"])) for key in keys}


EXPECTED_TRAIN = {n.removesuffix(".JPEG"): (d, SORTED.index(n[:9])) for n, d in TRAIN.items()}
EXPECTED_VALIDATION = {
    n.removesuffix(".JPEG"): (d, SORTED.index(w)) for (n, d), w in zip(VALIDATION.items(), TRUTH, strict=True)
}


def recipe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_recipe_for_the_training_archive(train_archive: Path, tmp_path: Path) -> None:
    arguments = ["train", "--archive", train_archive, "--output", tmp_path / "out", "--samples_per_shard", 5]
    ended = recipe(*arguments, "--expected_count", 12, "--expected_classes", 4)
    assert ended.returncode == 0, ended.stderr
    assert read_shards(tmp_path / "out") == EXPECTED_TRAIN
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["split"], manifest["count"], manifest["classes"]) == ("train", 12, SORTED)
    ended = recipe(*arguments)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert "holds 4 classes, expected 1000" in ended.stderr


def test_recipe_for_the_validation_archive(val_archive: Path, tmp_path: Path) -> None:
    truth = kit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    arguments = ["validation", "--archive", val_archive, "--ground_truth", truth, "--output", tmp_path / "out"]
    ended = recipe(*arguments, "--expected_count", 8, "--expected_classes", 4)
    assert ended.returncode == 0, ended.stderr
    assert read_shards(tmp_path / "out") == EXPECTED_VALIDATION
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["split"], manifest["count"], manifest["classes"]) == ("val", 8, SORTED)
    ended = recipe(*arguments)
    assert ended.returncode == 1
    assert "holds 8 images, expected 50,000" in ended.stderr


def test_shuffle_mixes_the_classes_and_does_not_depend_on_the_archive_order(
    tmp_path: Path, train_archive: Path
) -> None:
    def keys(path: Path, output: str) -> list[str]:
        write_shards(ImageNetTrain(path, expected_count=12, expected_classes=4), tmp_path / output, split="train")
        return list(read_shards(tmp_path / output))

    reordered = tmp_path / "reordered.tar"
    reordered.write_bytes(
        tar({f"{w}.tar": tar({n: d for n, d in sorted(TRAIN.items()) if n.startswith(w)}) for w in SORTED})
    )
    order = keys(train_archive, "a")
    assert order == keys(reordered, "b")
    assert [key[:9] for key in order] != sorted((key[:9] for key in order), reverse=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_val_solution.csv", kaggle()),
        ("with_names.txt", "".join(f"ILSVRC2012_val_{n:08d}.JPEG {w}\n" for n, w in enumerate(TRUTH, 1))),
        ("synset_labels.txt", "\n".join(TRUTH)),
        ("windows.txt", "\ufeff" + "\r\n".join(TRUTH) + "\r\n"),
    ],
)
def test_ground_truth_by_wordnet_id(val_archive: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    source = ImageNetValidation(val_archive, tmp_path / name, expected_count=8, expected_classes=4)
    assert source.classes == SORTED
    assert {s.key: (s.data, s.label) for s in map(source.__getitem__, range(8))} == EXPECTED_VALIDATION


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (kit_numbers().decode(), "line 1 .* numbers the classes, and does not say in which order.*devkit_t12"),
        ("ILSVRC2012_val_00000001.JPEG 65\n", "line 1 .* numbers the classes"),
        ("ILSVRC2012_val_00000001,65\n", "line 1 .* numbers the classes"),
        ("sea snake\n", "line 1 of ground truth .* is 'sea snake'"),
        ("", "is empty"),
        ("\n".join(TRUTH[:7]), "gives classes for 7 images and .* holds 8.*number 8"),
        ("\n".join([*TRUTH, TRUTH[0]]), "gives classes for 9 images and .* holds 8.*number 9"),
        (kaggle().replace("val_00000003", "val_00000030"), "for 8 images and .* holds 8.*number 3 "),
        (kaggle().replace("val_00000003", "val_00000004"), "names ILSVRC2012_val_00000004 for the second time"),
        (kaggle() + TRUTH[0], "some lines have an image name"),
        ("\n".join([*TRUTH[:7], "n09999999"]), "has 5 classes, expected 4"),
        ("\n".join([*TRUTH[:7], TRUTH[0]]), "images to class n0.*, where every class has 2"),
    ],
)
def test_ground_truth_that_could_give_wrong_labels_is_refused(
    val_archive: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "truth.txt").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ImageNetValidation(val_archive, tmp_path / "truth.txt", expected_count=8, expected_classes=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta__mat": None}, r"is not the development kit: it has no meta\.mat"),
        ({"ILSVRC2012_validation_ground_truth__txt": None}, "it has no ILSVRC2012_validation_ground_truth"),
        ({"ILSVRC2012_validation_ground_truth__txt": b"1\n5\n"}, "line 2 .* is '5', which is not the ILSVRC2012_ID"),
        ({"ILSVRC2012_validation_ground_truth__txt": b"1\nx\n"}, "line 2 .* is 'x'"),
        ({"meta__mat": b"not a table"}, r"meta\.mat of .* cannot be read"),
    ],
)
def test_damaged_development_kit(val_archive: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNetValidation(val_archive, kit(tmp_path / "kit.tar.gz", **changes), expected_count=8, expected_classes=4)


def test_cut_off_development_kit_and_missing_ground_truth(val_archive: Path, tmp_path: Path) -> None:
    path = kit(tmp_path / "kit.tar.gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="kit"):
        ImageNetValidation(val_archive, path, expected_count=8, expected_classes=4)
    with pytest.raises(ValueError, match="there is no ground truth"):
        ImageNetValidation(val_archive, tmp_path / "missing.txt", expected_count=8, expected_classes=4)


def test_development_kit_without_scipy(val_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        ImageNetValidation(val_archive, kit(tmp_path / "kit.tar.gz"), expected_count=8, expected_classes=4)


def test_archives_given_for_one_another(train_archive: Path, val_archive: Path, tmp_path: Path) -> None:
    truth = kit(tmp_path / "kit.tar.gz")
    with pytest.raises(ValueError, match="is the validation archive"):
        ImageNetTrain(val_archive)
    with pytest.raises(ValueError, match="is the training archive"):
        ImageNetValidation(train_archive, truth)
    other = tmp_path / "other.tar"
    other.write_bytes(tar({"notes.txt": b"hello"}))
    for use in (ImageNetTrain, lambda archive: ImageNetValidation(archive, truth)):
        with pytest.raises(ValueError, match=r"is another archive: .*notes\.txt"):
            use(other)
        with pytest.raises(ValueError, match="cannot be read as an uncompressed tar"):
            use(truth)
        with pytest.raises(ValueError, match="there is no archive"):
            use(tmp_path / "missing.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as an uncompressed tar"):
        ImageNetTrain(tmp_path / "empty.tar")
    (tmp_path / "empty.tar").write_bytes(tar({}))
    for use in (ImageNetTrain, lambda archive: ImageNetValidation(archive, truth)):
        with pytest.raises(ValueError, match="is empty"):
            use(tmp_path / "empty.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"n01440764.tar": b"x" * 600}, r"member n01440764\.tar of .* is not a readable tar"),
        ({"n01440764.tar": tar({"n01751748_1.JPEG": b"x"})}, r"n01751748_1\.JPEG in the tar of class n01440764"),
        ({"n01440764.tar": tar({"a.JPEG": b"x"})}, r"a\.JPEG in the tar of class n01440764"),
        ({"n01440764.tar": tar({}), "readme.tar": tar({})}, r"holds readme\.tar"),
    ],
)
def test_training_archive_with_strange_members(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    path = tmp_path / "strange.tar"
    path.write_bytes(tar(files))
    with pytest.raises(ValueError, match=message):
        ImageNetTrain(path, expected_count=None, expected_classes=None)


def test_cut_off_archives(train_archive: Path, val_archive: Path, tmp_path: Path) -> None:
    os.truncate(train_archive, train_archive.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"is not a readable tar .* cut off"):
        ImageNetTrain(train_archive, expected_count=12, expected_classes=4)
    truth = kit(tmp_path / "kit.tar.gz")
    source = ImageNetValidation(val_archive, truth, expected_count=8, expected_classes=4)
    os.truncate(val_archive, 5000)
    with pytest.raises(ValueError, match="cut off"):
        ImageNetValidation(val_archive, truth, expected_count=8, expected_classes=4)
    with pytest.raises(ValueError, match="ends inside ILSVRC2012_val_"):
        source[7]


def test_counts_that_differ_can_be_accepted(train_archive: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 12 images, expected 1,281,167"):
        ImageNetTrain(train_archive, expected_classes=4)
    assert len(ImageNetTrain(train_archive, expected_count=None, expected_classes=None)) == 12
