"""Turn Google's Noto emoji into shards: 64x64 colour images in ten categories, split by code point.

Where to get them (74 MB): the npm package emoji-datasource-google,

  npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
  python data/emoji.py --package package --output shards/emoji

which writes shards/emoji/train and shards/emoji/test. The pictures are under the Apache-2.0 licence. An emoji and its
variations in skin tone or gender are always in the same split. With --captions true each has its Unicode name beside
it, "waving hand sign, dark skin tone", for models of text and image. Disk: 20 MB of shards. Time: 10 seconds.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import Emoji


def emoji(package: Path, output: Path, captions: bool = False) -> None:
    """Write the shards of both splits.

    Args:
        package: The folder that the package's archive unpacks to.
        output: Folder for train/ and test/.
        captions: Write the Unicode name of each emoji, and its short name, beside it.

    Raises:
        ValueError: `package` is something else, or `output` holds other shards.
    """
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        manifest = write_shards(Emoji(package, split, captions=captions), output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} images of {manifest['num_classes']} categories")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(emoji, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
