"""A folder of images: one subfolder per class, `root/<class name>/**/<image>`, or images alone.

`find_images` is the one walk of such a folder, for this source, the DataModule `ImageFolder` and the evaluation alike.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import content_sha256
from discrete_lit.data.captions import LONGEST_FILE, Captions
from discrete_lit.data.media import VIDEOS, MediaKind, UndecodableSample
from discrete_lit.data.sources.source import Entry, Source, file_change, key_from_path
from discrete_lit.data.transforms import (
    IMAGE_BYTES_VARIABLE,
    IMAGES,
    UndecodableImage,
    image_bytes_limit,
)

_log = logging.getLogger(__name__)

# What systems put beside a user's files.
_SYSTEM_FOLDERS = frozenset(["__MACOSX", "@eaDir", "lost+found"])
_said: set[str] = set()


class ClassFolders(Source):
    """Your own images, found as `find_images` says: `root/<class name>/**/<image>`, or images alone, without labels.

    A key is the path below `root` without the extension, as `key_from_path` writes it. Where two files of a folder
    differ in nothing but the extension, the key keeps the extension (`a%2Ejpg`, `a%2Epng`).

    Args:
        root: the folder.
        classes_from: `manifest.json` of the training shards. Give it for the validation folder: the labels are then
            those of training even if a class has no validation folder.
        labels: False takes every image below `root` without a label.
        captions: where the captions are, in files beside the images, see `Captions`; by default none are taken.

    Raises:
        ValueError: the folder has another form, see `find_images`, or a class is not in `classes_from`. Reading raises
            it for an image without a caption.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes_from: str | os.PathLike[str] | None = None,
        *,
        labels: bool = True,
        captions: Captions | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self._captions = captions
        kind = None if captions is None else captions.kind
        found = find_images(self.root, labels=labels, captions=kind, kind=self.media)
        classes = found.classes
        if classes_from is not None:
            if not classes:
                raise ValueError(f"classes_from has no effect: the images of {self.root} have no labels")
            classes = _known_classes(Path(classes_from).expanduser(), classes)
        entries: list[Entry] = []
        self._paths: list[Path] = []
        for name, files in found.files.items():
            label = None if name is None else classes.index(name)
            for file, key in zip(files, _keys(files), strict=True):
                path = self.root / file
                entries.append(Entry(key, _extension(file), label, path.stat().st_size))
                self._paths.append(path)
        super().__init__(f"class folders {self.root.resolve().name}", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        if (size := self.entries[index].size) > image_bytes_limit():
            raise UndecodableImage(f"{self._paths[index]} has {size:,} bytes, more than {IMAGE_BYTES_VARIABLE} allows")
        data = self._paths[index].read_bytes()
        if len(data) != self.entries[index].size:
            raise ValueError(f"{self._paths[index]} changed while it was read: start again when nothing writes to it")
        return data

    def captions(self, index: int) -> tuple[str, ...]:
        if self._captions is None:
            return ()
        try:
            # One without a caption has no caption file in a shard, which is then read as it is asked for there.
            return tuple(filter(None, captions_beside(self._paths[index], self._captions)))
        except UndecodableSample as error:
            raise ValueError(f"{self._paths[index]} cannot be written with its caption: {error}") from error

    def last_change(self, index: int) -> int:
        beside = self._beside(index)
        image = file_change(self._paths[index])
        return image if beside is None else max(image, file_change(beside))

    def fingerprint(self) -> str:
        if self._captions is None:
            return super().fingerprint()
        files = (self._beside(index) for index in range(len(self)))
        sizes = [None if file is None else file.stat().st_size for file in files]
        return content_sha256([super().fingerprint(), str(self._captions), json.dumps(sizes)])

    def _beside(self, index: int) -> Path | None:
        """The caption file of an image, where captions are taken and there is one."""
        if self._captions is None:
            return None
        file = self._paths[index].with_suffix(f".{self._captions.kind}")
        return file if file.is_file() else None


class VideoFolders(ClassFolders):
    """Your own videos, found as `ClassFolders` finds images: `root/<class name>/**/<clip>`, or clips alone.

    Files are those that `VideoClips` reads.
    """

    media = VIDEOS


@dataclass(kw_only=True)
class FoundImages:
    """The images of a folder by class, and what was left out."""

    root: Path
    kind: MediaKind = IMAGES
    classes: list[str] = field(default_factory=list)
    """Names of the class folders in sorted order; none where the images have no labels."""
    files: dict[str | None, list[str]] = field(default_factory=dict)
    """Paths below `root` of each class's images, in the order of their folders' and then their own names; those
    without labels under None."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The number of entries of each kind that were passed over."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first entry of each kind."""

    def leave_out(self, kind: str, path: str) -> None:
        """Count an entry that is passed over."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, path)

    def summary(self) -> str:
        """Say in one line what was left out; nothing where all was taken."""
        return ", ".join(
            f"{kind} ({count}, first {self.examples[kind]})" for kind, count in sorted(self.left_out.items())
        )


def captions_beside(image: Path, captions: Captions) -> tuple[str, ...]:
    """Read the captions of an image file from the file of the same name beside it.

    Raises:
        UndecodableSample: there is none, and `captions` does not say that there need not be, or it is broken.
    """
    file = image.with_suffix(f".{captions.kind}")
    try:
        if file.stat().st_size > LONGEST_FILE:
            raise UndecodableSample(f"its .{captions.kind} has more than {LONGEST_FILE:,} bytes: that is no caption")
        content = file.read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as error:
        raise UndecodableSample(f"its .{captions.kind}: {type(error).__name__}: {error}") from error
    return captions.read(content)


def find_images(
    root: str | os.PathLike[str], *, labels: bool = True, captions: str | None = None, kind: MediaKind = IMAGES
) -> FoundImages:
    """Find the images, or the files of another kind, of a folder, at any depth, symbolic links included.

    The subfolders of `root` are its classes; one without an image keeps its label. Where images lie in `root` and none
    in a subfolder, they have no labels. Left out, and counted by kind in one warning, are hidden files and folders
    (such as `.ipynb_checkpoints`), AppleDouble files (`._*`), folders of the system (`__MACOSX`), links that lead
    nowhere or back into a folder above, files that are no images, and devices and pipes.

    Args:
        root: the folder.
        labels: False takes every image below `root` without a label, wherever it lies.
        captions: the extension of caption files, which are then no files to warn of.
        kind: the files to find.

    Raises:
        ValueError: `root` is no folder, or holds no image; a folder cannot be opened; images lie beside class folders.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; give one with a subfolder of {kind.name}s per class, or of {kind.name}s alone"
        )
    found = FoundImages(root=path, kind=kind)
    loose: list[str] = []
    by_folder: dict[str, list[str]] = {}
    status = path.stat()
    above = ((status.st_dev, status.st_ino),)
    for name, folder in _listed(path, "", above, found):
        if folder is None:
            loose.append(name)
        else:
            by_folder[name] = sorted(_walk(path / name, f"{name}/", folder, found), key=lambda file: file.split("/"))
    nested = [file for files in by_folder.values() for file in files]
    if not loose and not nested:
        summary = found.summary()
        raise ValueError(
            f"no {kind.name}s in {path}"
            + (f", which holds {summary}" if summary else "")
            + f"; known extensions: {', '.join(sorted(kind.extensions))}"
        )
    if loose and nested and labels:
        raise ValueError(
            f"{len(loose)} {kind.name}s lie directly in {path}, the first is {loose[0]}: their class is unknown, for "
            f"others are in subfolders such as {nested[0]}. Move each into a subfolder named after its class, or set "
            "labels: false if none of them has a class"
        )
    if labels and not loose:
        found.classes = list(by_folder)
        found.files = {**by_folder}
        for name, files in by_folder.items():
            if not files:
                found.leave_out(f"class folder without {kind.one}, which keeps its label", name)
    else:
        found.files[None] = sorted(loose + nested, key=lambda file: file.split("/"))
    if captions is not None:
        del found.left_out[f".{captions}"]
    if found.left_out:
        _say_once(f"left out {found.left_out.total()} entries of {path}: {found.summary()}")
    return found


# A folder's place in the file system, and those of the folders above it.
_Identities = tuple[tuple[int, int], ...]


def _listed(
    folder: Path, below: str, above: _Identities, found: FoundImages
) -> Iterator[tuple[str, _Identities | None]]:
    """The images, with None, and the folders, with their identities, that a folder holds, in the order of names."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"the folder {folder} cannot be read ({error.strerror}): its {found.kind.name}s would be lost"
        ) from error
    for entry in listed:
        name, path, extension = entry.name, f"{below}{entry.name}", _extension(entry.name)
        # Only links and folders are looked up: the kind of a file is in the listing.
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
            status = entry.stat() if is_folder else None
        except OSError:  # A link to itself.
            is_folder, is_file, status = False, False, None
        if name.startswith("._"):
            found.leave_out("AppleDouble", path)
        elif name.startswith(".") or name in _SYSTEM_FOLDERS:
            found.leave_out("hidden", path)
        elif status is not None:
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                found.leave_out("link to a folder above it", path)
            else:
                yield name, (*above, identity)
        elif not is_file:
            found.leave_out("broken link" if entry.is_symlink() else "device or pipe", path)
        elif extension in found.kind.unreadable:
            found.leave_out(f".{extension}, which {found.kind.reader} does not read here: convert it", path)
        elif extension not in found.kind.extensions:
            found.leave_out(f".{extension}" if extension else "no extension", path)
        else:
            yield name, None


def _walk(folder: Path, below: str, above: _Identities, found: FoundImages) -> Iterator[str]:
    for name, deeper in _listed(folder, below, above, found):
        if deeper is None:
            yield f"{below}{name}"
        else:
            yield from _walk(folder / name, f"{below}{name}/", deeper, found)


def _say_once(message: str) -> None:
    """Warn, in this process once: several readers may walk the same folder."""
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def _extension(path: str) -> str:
    return PurePath(path).suffix[1:].lower()


def _known_classes(manifest: Path, found: Sequence[str]) -> list[str]:
    try:
        classes = read_json(manifest)["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are no list of names")
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
