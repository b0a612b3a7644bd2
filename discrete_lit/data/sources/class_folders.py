"""A folder with one subfolder per class: `root/<class name>/**/<image>`.

`class_files` is the one walk of such a folder, for this source, the DataModule `ImageFolder` and the evaluation alike.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from discrete_lit.data.sources.source import Entry, Source, key_from_path
from discrete_lit.data.transforms import IMAGE_EXTENSIONS

_log = logging.getLogger(__name__)


class ClassFolders(Source):
    """Your own images: `root/<class name>/**/<image>`, found as `class_files` says.

    A key is the path below `root` without the extension, as `key_from_path` writes it. Where two files of a folder
    differ in nothing but the extension, the key keeps the extension (`a%2Ejpg`, `a%2Epng`).

    Args:
        root: the folder.
        classes_from: `manifest.json` of the training shards. Give it for the validation folder: the labels are then
            those of training even if a class has no validation image.

    Raises:
        ValueError: the folder has another form, see `class_files`, or a class is not in `classes_from`.
    """

    def __init__(self, root: str | os.PathLike[str], classes_from: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root)
        found = class_names(self.root)
        classes = found if classes_from is None else _known_classes(Path(classes_from), found)
        entries: list[Entry] = []
        self._paths: list[Path] = []
        for name, files in class_files(self.root):
            label = classes.index(name)
            for file, key in zip(files, _keys(files), strict=True):
                path = self.root / file
                entries.append(Entry(key, _extension(file), label, path.stat().st_size))
                self._paths.append(path)
        super().__init__(f"class folders {self.root.resolve().name}", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        data = self._paths[index].read_bytes()
        if len(data) != self.entries[index].size:
            raise ValueError(f"{self._paths[index]} changed while it was read: start again when nothing writes to it")
        return data


def class_names(root: str | os.PathLike[str]) -> list[str]:
    """List the class folders of `root`: the names of its subfolders in sorted order, without hidden ones.

    Raises:
        ValueError: `root` is no folder, has no class folder, or images lie beside the class folders.
    """
    path = Path(root)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder that holds one subfolder of images per class")
    with os.scandir(path) as entries:
        children = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    loose = [name for name, folder in children if not folder and is_image_file(name)]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {path}, the first is {loose[0]}: their class is unknown. "
            "Move every image into a subfolder named after its class (one subfolder if there is only one class)"
        )
    names = [name for name, folder in children if folder]
    if not names:
        raise ValueError(f"{path} has no class folders: it has no subfolder, where images are <folder>/<class>/<image>")
    return names


def class_files(root: str | os.PathLike[str], *, allow_empty: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Find the images of each class folder of `root`: the class, and the paths below `root` of its images.

    Classes come in the order of `class_names`, the files of a class in that of their folders' and then their own
    names. Images are found at any depth, symbolic links included; hidden files and folders are left out, and so are,
    with a warning at the end, files that are not images.

    Args:
        root: the folder of the class folders.
        allow_empty: accept class folders without an image.

    Raises:
        ValueError: as `class_names`, or a class folder has no image.
    """
    skipped: list[str] = []
    for name in class_names(root):
        images: list[str] = []
        for parent, folders, files in os.walk(os.path.join(root, name), followlinks=True):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            below = Path(parent).relative_to(root).as_posix()
            for file in files:
                if is_image_file(file):
                    images.append(f"{below}/{file}")
                elif not file.startswith("."):
                    skipped.append(f"{parent}/{file}")
        if not images and not allow_empty:
            raise ValueError(
                f"no images in one of the classes: class folder {Path(root, name)} holds no image. Put images in it or "
                f"remove it; known extensions: {', '.join(sorted(IMAGE_EXTENSIONS))}"
            )
        yield name, sorted(images, key=lambda path: path.split("/"))
    if skipped:
        _log.warning("left out %d files that are not images, the first is %s", len(skipped), min(skipped))


def is_image_file(name: str) -> bool:
    """Whether a file name is that of an image, by its extension; hidden files are not."""
    return not name.startswith(".") and _extension(name) in IMAGE_EXTENSIONS


def _extension(path: str) -> str:
    return PurePath(path).suffix[1:].lower()


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


def _keys(files: Sequence[str]) -> list[str]:
    without_extension = Counter(PurePath(file).with_suffix("") for file in files)
    keys = []
    for path in map(PurePath, files):
        *folders, name = path.parts
        clash = without_extension[path.with_suffix("")] > 1
        keys.append(key_from_path([*folders, name if clash else path.stem]))
    return keys
