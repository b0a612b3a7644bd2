"""The kinds of files that samples are made of: images, and clips of audio and video.

Folders, shards and their order are the same for all of them; a `MediaKind` says which files of a folder or a shard are
samples. How one is decoded and cut stands with its DataModule.
"""

from dataclasses import KW_ONLY, dataclass


class UndecodableSample(ValueError):
    """The bytes of a sample cannot be read completely: it is a bad sample, which is logged and counted."""


@dataclass(frozen=True)
class MediaKind:
    """A kind of files, by the extensions of their names: lower case, without the dot.

    Args:
        name: one file of it, for messages.
        extensions: of the files that are read.
        unreadable: of files of this kind that are not read, which whoever has them must be told of.
        reader: the library that reads them, for messages.
    """

    name: str
    extensions: frozenset[str]
    _: KW_ONLY
    unreadable: frozenset[str] = frozenset()
    reader: str = "Pillow"

    @property
    def one(self) -> str:
        """The name of one file with its article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


AUDIO_FILES = MediaKind(
    "audio clip",
    frozenset(["wav", "flac", "ogg", "oga"]),
    unreadable=frozenset(["mp3", "m4a", "aac", "wma", "opus", "aif", "aiff"]),
    reader="soundfile",
)
"""Audio files, which soundfile reads."""

VIDEOS = MediaKind(
    "video",
    frozenset(["mp4", "m4v", "mov", "webm", "mkv", "avi", "gif"]),
    unreadable=frozenset(["wmv", "flv", "mpg", "mpeg", "ts", "mts", "ogv", "3gp"]),
    reader="PyAV",
)
"""The files that clips of video are read from."""
