"""Turn Asterisk's spoken prompts into shards: 568 clips of one speaker, 25 minutes at 8 kHz, with what they say.

They are in the Debian and Ubuntu package asterisk-core-sounds-en-wav (18 MB to fetch, CC-BY-SA-3.0):

  apt-get install asterisk-core-sounds-en-wav
  python data/spoken_prompts.py --output shards/prompts

It need not be installed: `apt-get download asterisk-core-sounds-en-wav`, then `dpkg -x asterisk-core-sounds-en-wav*.deb
sounds`, and `--root sounds/usr/share/asterisk/sounds/en_US_f_Allison`. A tenth of the prompts, by a hash of their
names, are the test set. `--part digits` writes the ten words zero to nine alone, one recording each, as ten classes.
Disk: 25 MB. Time: seconds. Reading the clips needs `discrete-lit[audio]`.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import SpokenPrompts


def prompts(
    output: Path,
    root: Path = Path("/usr/share/asterisk/sounds/en_US_f_Allison"),
    part: Literal["all", "digits"] = "all",
) -> None:
    """Write the shards of both splits.

    Args:
        output: Folder for train/ and test/.
        root: The folder of the package's sounds.
        part: All prompts, or the ten digits as ten classes.

    Raises:
        ValueError: no sounds in `root`, or `output` holds other shards.
    """
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        manifest = write_shards(SpokenPrompts(root, split, part=part), output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} prompts of {manifest['num_classes']} classes")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(prompts, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
