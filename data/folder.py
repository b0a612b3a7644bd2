"""Turn your own images into shards: a folder with one subfolder per class, as photos/train/cat/1.jpg, or images alone.

Run it once for training and once for validation, each with its own output folder:

  python data/folder.py --root photos/train --output shards/train
  python data/folder.py --root photos/val --output shards/val --split validation \\
      --classes_from shards/train/manifest.json

The image files are copied as they are: the shards need as much disk as the folder, and 2 kB more an image. The time is
that of copying the folder. Interrupted, run the same command again: it goes on from the last finished shard.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders


def folder(
    root: Path,
    output: Path,
    split: str = "train",
    classes_from: Path | None = None,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = 0,
) -> None:
    """Write the shards of one folder.

    Args:
        root: The folder: a subfolder per class, or images alone, which then have no labels.
        output: Folder for the shards of this split.
        split: Name of the split: train, validation or test.
        classes_from: manifest.json of the training shards, for validation: its class order is used.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Seed of the one fixed shuffle; null keeps the order of the names.
    """
    write_shards(
        ClassFolders(root, classes_from),
        output,
        split=split,
        samples_per_shard=samples_per_shard,
        shuffle_seed=shuffle_seed,
    )


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(folder, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
