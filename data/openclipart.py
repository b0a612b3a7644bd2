"""Turn the Open Clip Art Library into shards: some 6,900 drawings in 22 classes, each with two captions.

They are in the Debian and Ubuntu package openclipart-png (131 MB to fetch, public domain):

  apt-get install openclipart-png
  python data/openclipart.py --output shards/openclipart

It need not be installed: `apt-get download openclipart-png`, then `dpkg -x openclipart-png_*.deb clipart`, and `--root
clipart/usr/share/openclipart/png`. Captions are made of the names of files and folders: "seagull" and "seagull,
animals, birds". A tenth of the drawings, by a hash of their names, are the test set. --leave_out '[shapes/stars]'
leaves out 1,378 stars that a program drew.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import OpenClipart


def openclipart(
    output: Path,
    root: Path = Path("/usr/share/openclipart/png"),
    longest_side: int = 256,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Write the shards of both splits.

    Args:
        output: Folder for train/ and test/.
        root: The folder of the package's pictures.
        longest_side: Pixels; larger pictures are shrunk.
        leave_out: Folders of `root` without which the set is made.

    Raises:
        ValueError: no drawings in `root`, a folder that is not there, or `output` holds other shards.
    """
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        source = OpenClipart(root, split, longest_side=longest_side, leave_out=leave_out)
        manifest = write_shards(source, output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} drawings of {manifest['num_classes']} classes")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(openclipart, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
