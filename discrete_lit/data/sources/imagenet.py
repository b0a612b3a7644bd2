"""ImageNet from the archives of ILSVRC2012: the training tar, the validation tar and its ground truth.

The archives are read in place and never unpacked. Labels are the positions of the sorted WordNet ids, the order of
every published model. Keys are the original names without `.JPEG`; the bytes are untouched.
"""

import io
import os
import re
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from discrete_lit.data.sources.source import Entry, Source, file_change
from discrete_lit.data.tars import Extent, TarIndex, read_file, tar_files

_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_TRAINING_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LINE = re.compile(r"(?:(ILSVRC2012_val_\d+)(?:\.JPEG)?(?:\s*,\s*|\s+))?(n\d{8})(?:\s.*)?")
_NUMBER_LINE = re.compile(r"(?:\S+[,\s]+)?\d{1,4}")
_KAGGLE_HEADER = "ImageId,PredictionString"

_ACCEPTED = (
    "Give ILSVRC2012_devkit_t12.tar.gz, Kaggle's LOC_val_solution.csv, lines of "
    "'ILSVRC2012_val_00000001.JPEG n01751748', or one WordNet id a line in the order of the image numbers"
)


class ImageNetTrain(Source):
    """`ILSVRC2012_img_train.tar`: a tar of one tar per class, `n01440764.tar` of `n01440764_18.JPEG` and so on.

    One image is a PNG by content and some are CMYK: that is for the reader of the shards.

    Args:
        archive: the tar file.
        expected_count: number of images that the archive must hold; null accepts any.
        expected_classes: number of classes that the archive must hold; null accepts any.

    Raises:
        ValueError: it is another archive, is damaged, or the counts differ.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str],
        *,
        expected_count: int | None = 1_281_167,
        expected_classes: int | None = 1000,
    ) -> None:
        self._index = TarIndex(archive)
        path = self._index.path
        first = next(self._index.files(), None)
        if first is None:
            raise ValueError(f"{path} is empty: it is damaged or cut off; download it again")
        if not _CLASS_ARCHIVE.fullmatch(first.name):
            hint = "is the validation archive" if first.name.startswith("ILSVRC2012_val_") else "is another archive"
            raise ValueError(
                f"{path} {hint}: its first member is {first.name}, where ILSVRC2012_img_train.tar holds one tar per "
                "class, such as n01440764.tar"
            )
        classes: dict[str, list[Extent]] = {}
        members = tqdm(
            self._index.files_in_members(), f"indexing {path.name}", expected_classes, unit="class", disable=None
        )
        for name, files in members:
            match = _CLASS_ARCHIVE.fullmatch(name)
            if match is None:
                raise ValueError(f"{path} holds {name}, which is not the tar of a class such as n01440764.tar")
            classes[match[1]] = files
        names = sorted(classes)
        if expected_classes is not None and len(names) != expected_classes:
            raise ValueError(
                f"{path} holds {len(names)} classes, expected {expected_classes}. The classification task has "
                "ILSVRC2012_img_train.tar (tasks 1 and 2); set expected_classes to null for an archive of your own"
            )
        label_of = {name: label for label, name in enumerate(names)}
        entries: list[Entry] = []
        self._extents: list[Extent] = []
        for name, files in classes.items():
            for file in files:
                match = _TRAINING_IMAGE.fullmatch(file.name)
                if match is None or match[1] != name:
                    raise ValueError(
                        f"{path} holds {file.name} in the tar of class {name}; expected {name}_<number>.JPEG"
                    )
                entries.append(Entry(file.name.removesuffix(".JPEG"), "jpeg", label_of[name], file.size))
                self._extents.append(file)
        if expected_count is not None and len(entries) != expected_count:
            raise ValueError(
                f"{path} holds {len(entries):,} images, expected {expected_count:,}: it is cut off or is not the "
                "released archive. Download it again, or set expected_count to null to go on with what there is"
            )
        super().__init__(f"ImageNet training archive {path.name}", classes=names, entries=entries)

    def read(self, index: int) -> bytes:
        return self._index.read(self._extents[index])

    def last_change(self, index: int) -> int:
        return file_change(self._index.path)


class ImageNetValidation(Source):
    """`ILSVRC2012_img_val.tar`: a flat tar of `ILSVRC2012_val_00000001.JPEG` and so on, without labels.

    Args:
        archive: the tar file.
        ground_truth: file with the class of each image, in one of the forms that name classes by WordNet id: the
            development kit `ILSVRC2012_devkit_t12.tar.gz`; Kaggle's `LOC_val_solution.csv`; lines of
            `ILSVRC2012_val_00000001.JPEG n01751748`; or one WordNet id a line, in the order of the image numbers. A
            text file of integers is refused: see `read_ground_truth`.
        expected_count: number of images that the archive must hold; null accepts any.
        expected_classes: number of classes that the ground truth must have; null accepts any. If both numbers are
            given, every class must have the same number of images.

    Raises:
        ValueError: it is another archive, is damaged, the counts differ, or the ground truth cannot be read or does not
            belong to these images.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str],
        ground_truth: str | os.PathLike[str],
        *,
        expected_count: int | None = 50_000,
        expected_classes: int | None = 1000,
    ) -> None:
        self._index = TarIndex(archive)
        path = self._index.path
        numbered: dict[int, Extent] = {}
        for file in self._index.files():
            match = _VALIDATION_IMAGE.fullmatch(file.name)
            if match is None:
                hint = "is the training archive" if re.fullmatch(r"n\d{8}\.tar", file.name) else "is another archive"
                raise ValueError(
                    f"{path} {hint}: it holds {file.name}, where ILSVRC2012_img_val.tar holds images named "
                    "ILSVRC2012_val_00000001.JPEG and so on"
                )
            numbered[int(match[1])] = file
        if not numbered:
            raise ValueError(f"{path} is empty: it is damaged or cut off; download it again")
        if expected_count is not None and len(numbered) != expected_count:
            raise ValueError(
                f"{path} holds {len(numbered):,} images, expected {expected_count:,}: it is cut off or is not the "
                "released archive. Download it again, or set expected_count to null to go on with what there is"
            )
        truth = read_ground_truth(ground_truth)
        if set(truth.class_of) != set(numbered):
            strangers = sorted(set(truth.class_of) ^ set(numbered))
            raise ValueError(
                f"{ground_truth} gives classes for {len(truth.class_of):,} images and {path} holds {len(numbered):,}: "
                f"they do not belong together; image number {strangers[0]} is in only one of them"
            )
        if expected_classes is not None and len(truth.classes) != expected_classes:
            raise ValueError(
                f"{ground_truth} has {len(truth.classes)} classes, expected {expected_classes}; set expected_classes "
                "to null for a ground truth of your own"
            )
        if expected_count is not None and expected_classes is not None:
            each = expected_count // expected_classes
            uneven = [item for item in Counter(truth.class_of.values()).items() if item[1] != each]
            if uneven:
                raise ValueError(
                    f"{ground_truth} gives {uneven[0][1]} images to class {uneven[0][0]}, where every class has {each}"
                    ": it is damaged or belongs to another set"
                )
        label_of = {name: label for label, name in enumerate(truth.classes)}
        self._extents = list(numbered.values())
        entries = [
            Entry(file.name.removesuffix(".JPEG"), "jpeg", label_of[truth.class_of[number]], file.size)
            for number, file in numbered.items()
        ]
        super().__init__(f"ImageNet validation archive {path.name}", classes=truth.classes, entries=entries)

    def read(self, index: int) -> bytes:
        return self._index.read(self._extents[index])

    def last_change(self, index: int) -> int:
        return file_change(self._index.path)


class GroundTruth(NamedTuple):
    """The class of each validation image, by WordNet id."""

    classes: list[str]
    """WordNet ids, sorted: the position is the label."""
    class_of: dict[int, str]
    """WordNet id of each image number (from 1)."""


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """Read the development kit or a text file that names classes by WordNet id.

    Integers alone are refused. `ILSVRC2012_validation_ground_truth.txt` counts classes in the order of the development
    kit's `meta.mat` (`ILSVRC2012_ID`, from 1), other lists count sorted WordNet ids from 0 or from 1; nothing in such a
    file tells which, and a wrong guess gives labels that look right and are not. The development kit has the numbers
    and the table that they belong to, so it is read as a whole.

    Raises:
        ValueError: the file is missing, has another form, is inconsistent, or SciPy (for `meta.mat`) is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no ground truth {path}. {_ACCEPTED}")
    return _from_development_kit(path) if tarfile.is_tarfile(path) else _from_text(path)


def _from_text(path: Path) -> GroundTruth:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"ground truth {path} is neither a text file nor the development kit. {_ACCEPTED}") from error
    class_of: dict[int, str] = {}
    named: bool | None = None
    for position, line in enumerate(lines, start=1):
        if not line or line == _KAGGLE_HEADER:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            trap = ""
            if _NUMBER_LINE.fullmatch(line):
                trap = (
                    " It numbers the classes, and does not say in which order: ILSVRC2012_validation_ground_truth.txt "
                    "counts in the development kit's own order, not in that of the sorted WordNet ids."
                )
            raise ValueError(f"line {position} of ground truth {path} is {line[:60]!r}.{trap} {_ACCEPTED}")
        name, wordnet_id = match.groups()
        if named is not None and named != (name is not None):
            raise ValueError(
                f"line {position} of ground truth {path}: some lines have an image name and others have none"
            )
        named = name is not None
        number = int(name.rsplit("_", 1)[1]) if name else len(class_of) + 1
        if number in class_of:
            raise ValueError(f"line {position} of ground truth {path} names {name} for the second time")
        class_of[number] = wordnet_id
    if not class_of:
        raise ValueError(f"ground truth {path} is empty. {_ACCEPTED}")
    return GroundTruth(sorted(set(class_of.values())), class_of)


def _from_development_kit(path: Path) -> GroundTruth:
    files = _members(path, {"meta.mat", "ILSVRC2012_validation_ground_truth.txt"})
    wordnet_id_of = _leaf_classes(path, files["meta.mat"])
    class_of: dict[int, str] = {}
    for number, line in enumerate(files["ILSVRC2012_validation_ground_truth.txt"].decode("ascii").split(), start=1):
        if not line.isdigit() or int(line) not in wordnet_id_of:
            raise ValueError(
                f"line {number} of ILSVRC2012_validation_ground_truth.txt in {path} is {line!r}, which is not the "
                "ILSVRC2012_ID of a class in its meta.mat"
            )
        class_of[number] = wordnet_id_of[int(line)]
    return GroundTruth(sorted(wordnet_id_of.values()), class_of)


def _members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in tar_files(archive):
                name = PurePosixPath(member.name).name
                if name in wanted:
                    found[name] = read_file(archive, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"development kit {path} cannot be read ({error}); download it again") from error
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{path} is not the development kit: it has no {' and no '.join(missing)}. {_ACCEPTED}")
    return found


def _leaf_classes(path: Path, meta: bytes) -> dict[int, str]:
    """The WordNet id of each ILSVRC2012_ID; the inner nodes of the WordNet tree, later in the table, are left out."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading meta.mat of {path} needs SciPy: pip install scipy, or use a text file. {_ACCEPTED}"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
        leaves = synsets[synsets["num_children"].astype(int) == 0]
    except (MatReadError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"meta.mat of {path} cannot be read ({error}); download the development kit again") from error
    return {
        int(identifier): str(wordnet_id)
        for identifier, wordnet_id in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
    }
