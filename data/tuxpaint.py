"""Turn Tux Paint's stamps into shards: some 790 pictures in 16 classes, most cut out of photographs, with captions.

They are in the Debian and Ubuntu package tuxpaint-stamps-default (161 MB to fetch, GPL-2):

  apt-get install tuxpaint-stamps-default
  python data/tuxpaint.py --output shards/stamps

It need not be installed: `apt-get download tuxpaint-stamps-default`, then `dpkg -x tuxpaint-stamps-*.deb stamps`, and
`--root stamps/usr/share/tuxpaint/stamps`. Captions are in up to 80 languages: `--languages '[en, fr, de]'` writes
three of each picture. A tenth of the stamps, by a hash of their names, are the test set. Disk: 25 MB. Time: 5 seconds.

`--part speech` writes the captions as volunteers read them, one class a language: `--languages '[be, bg, ca, el, es,
fr, ro, ru]'` are those of which most stamps have a recording. Reading the clips needs `discrete-lit[audio]`.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import TuxpaintSpeech, TuxpaintStamps


def stamps(
    output: Path,
    root: Path = Path("/usr/share/tuxpaint/stamps"),
    languages: tuple[str, ...] = ("en",),
    part: Literal["pictures", "speech"] = "pictures",
) -> None:
    """Write the shards of both splits.

    Args:
        output: Folder for train/ and test/.
        root: The folder of the package's stamps.
        languages: Codes of the languages of captions, such as en, fr, de.
        part: The pictures, or the spoken captions.

    Raises:
        ValueError: no stamps in `root`, an unknown language, or `output` holds other shards.
    """
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    kind = TuxpaintStamps if part == "pictures" else TuxpaintSpeech
    for split in splits:
        manifest = write_shards(kind(root, split, languages=languages), output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} {part} of {manifest['num_classes']} classes")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(stamps, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
