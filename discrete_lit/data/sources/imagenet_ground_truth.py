"""The classes of the ILSVRC2012 validation images, by WordNet id."""

import io
import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_LINE = re.compile(r"(?:(ILSVRC2012_val_\d+)(?:\.JPEG)?(?:\s*,\s*|\s+))?(n\d{8})(?:\s.*)?")
_NUMBER_LINE = re.compile(r"(?:\S+[,\s]+)?\d{1,4}")
_KAGGLE_HEADER = "ImageId,PredictionString"

_ACCEPTED = (
    "Give ILSVRC2012_devkit_t12.tar.gz, Kaggle's LOC_val_solution.csv, lines of "
    "'ILSVRC2012_val_00000001.JPEG n01751748', or one WordNet id a line in the order of the image numbers"
)


class GroundTruth(NamedTuple):
    """Class of each validation image."""

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
        ValueError: The file is missing, has another form, is inconsistent, or SciPy (for `meta.mat`) is missing.
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
            for member in archive:
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    found[name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"development kit {path} cannot be read ({error}); download it again") from error
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{path} is not the development kit: it has no {' and no '.join(missing)}. {_ACCEPTED}")
    return found


def _leaf_classes(path: Path, meta: bytes) -> dict[int, str]:
    """WordNet id of each ILSVRC2012_ID, without the inner nodes of the WordNet tree, which follow in the same table."""
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
