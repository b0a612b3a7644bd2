"""Captions that a model wrote of images, compared with those that lie beside the images."""

from dataclasses import dataclass
from pathlib import Path

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.data.captions import Captions
from discrete_lit.data.media import UndecodableSample


@dataclass(frozen=True, kw_only=True)
class CaptionMatch:
    """Count the captions of a file that are exactly those of their images.

    Attributes:
        source: the file.
        count: images.
        exact: of these, those whose caption is one of the image's own, but for spaces and capitals.
    """

    source: str
    count: int
    exact: int

    @property
    def fraction(self) -> float:
        """The share of exact captions, in [0, 1]."""
        return self.exact / self.count


def match_captions(file: str, name: str = "captions") -> CaptionMatch:
    """Compare the captions that `discrete-lit caption` wrote with the `.txt`, or else the `.json`, beside each image.

    Args:
        file: JSON with `"captions"`, the caption of each image by the path of its file.
        name: of the setting, for messages.

    Raises:
        ValueError: no such file, one of another form, or an image without a caption beside it.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{name}={file!r}: no such file; `discrete-lit caption` writes one")
    content = read_json(path)
    written = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(written, dict) or not written or not all(isinstance(text, str) for text in written.values()):
        raise ValueError(f'{name}={file!r} holds no "captions", a text by the path of each image')
    exact = 0
    for image, text in written.items():
        exact += _plain(text) in map(_plain, _beside(Path(image), f"{name}={file!r}"))
    return CaptionMatch(source=file, count=len(written), exact=exact)


def _beside(image: Path, where: str) -> tuple[str, ...]:
    """Read the captions beside an image.

    Raises:
        ValueError: there are none.
    """
    kind = "json" if not image.with_suffix(".txt").is_file() and image.with_suffix(".json").is_file() else "txt"
    file = image.with_suffix(f".{kind}")
    try:
        return Captions(kind=kind).read(file.read_bytes() if file.is_file() else None)
    except UndecodableSample as error:
        raise ValueError(f"{where}: there is no caption to compare with that of {str(image)!r}: {error}") from error


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
