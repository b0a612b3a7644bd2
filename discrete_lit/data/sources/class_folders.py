"""A folder with one subfolder per class."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from discrete_lit.data.decoding import IMAGE_EXTENSIONS
from discrete_lit.data.sources.keys import key_from_path
from discrete_lit.data.sources.source import Entry, Source

_log = logging.getLogger(__name__)


class ClassFolders(Source):
    """Your own images: `root/<class name>/**/<image>`.

    Classes are the subfolders in sorted order. Images are found at any depth below them, symbolic links included;
    hidden files and folders are left out, and so are, with a warning, files that are not images. A key is the path
    below `root` without the extension, as `key_from_path` writes it. Where two files of a folder differ in nothing but
    the extension, the key keeps the extension (`a%2Ejpg`, `a%2Epng`).

    Args:
        root: The folder.
        classes_from: `manifest.json` of the training shards. Give it for the validation folder: the labels are then
            those of training even if a class has no validation image.

    Raises:
        ValueError: `root` is no folder, has no class folder, a class folder has no image, images lie beside the class
            folders, or a class is not in `classes_from`.
    """

    def __init__(self, root: str | os.PathLike[str], classes_from: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root)
        found = _class_names(self.root)
        classes = found if classes_from is None else _known_classes(Path(classes_from), found)
        entries: list[Entry] = []
        self._paths: list[Path] = []
        skipped: list[Path] = []
        for name in found:
            images, others = _files_below(self.root / name)
            skipped += others
            if not images:
                raise ValueError(
                    f"class folder {self.root / name} holds no image. Put images in it or remove it; "
                    f"known extensions: {', '.join(sorted(IMAGE_EXTENSIONS))}"
                )
            label = classes.index(name)
            for path, key in zip(images, _keys(self.root, images), strict=True):
                entries.append(Entry(key, _extension(path), label, path.stat().st_size))
                self._paths.append(path)
        if skipped:
            _log.warning("left out %d files that are not images, the first is %s", len(skipped), skipped[0])
        super().__init__(f"class folders {self.root.resolve().name}", classes, entries)

    def read(self, index: int) -> bytes:
        data = self._paths[index].read_bytes()
        if len(data) != self.entries[index].size:
            raise ValueError(f"{self._paths[index]} changed while it was read: start again when nothing writes to it")
        return data


def _class_names(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds one subfolder per class")
    children = sorted(child for child in root.iterdir() if not child.name.startswith("."))
    loose = [child for child in children if child.is_file() and _extension(child) in IMAGE_EXTENSIONS]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {root}, the first is {loose[0].name}: their class is unknown. "
            "Move every image into a subfolder named after its class (one subfolder if there is only one class)"
        )
    names = [child.name for child in children if child.is_dir()]
    if not names:
        raise ValueError(f"{root} has no subfolder; it must hold one subfolder of images per class")
    return names


def _known_classes(manifest: Path, found: Sequence[str]) -> list[str]:
    try:
        classes = json.loads(manifest.read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"classes_from {manifest} is not the manifest.json of a folder of shards ({error!r})"
        ) from error
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"class folders {unknown} are not among the {len(classes)} classes of {manifest}")
    return classes


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sorted (images, other files) at any depth."""
    images: list[Path] = []
    others: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = Path(parent, name)
                (images if _extension(path) in IMAGE_EXTENSIONS else others).append(path)
    return sorted(images), sorted(others)


def _keys(root: Path, images: Sequence[Path]) -> list[str]:
    without_extension = Counter(path.with_suffix("") for path in images)
    keys = []
    for path in images:
        *folders, name = path.relative_to(root).parts
        clash = without_extension[path.with_suffix("")] > 1
        keys.append(key_from_path([*folders, name if clash else path.stem]))
    return keys
