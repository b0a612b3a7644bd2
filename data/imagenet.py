"""Turn the ILSVRC2012 archives of ImageNet into shards, the JPEG files as they are.

Registered users find the archives on https://image-net.org/download-images, "ILSVRC2012":

  ILSVRC2012_img_train.tar        138 GB   Training images (Task 1 & 2)
  ILSVRC2012_img_val.tar          6.3 GB   Validation images (all tasks)
  ILSVRC2012_devkit_t12.tar.gz    2.5 MB   Development kit (Task 1 & 2), for the classes of the validation images

  python data/imagenet.py train --archive ILSVRC2012_img_train.tar --output shards/imagenet/train
  python data/imagenet.py validation --archive ILSVRC2012_img_val.tar --ground_truth ILSVRC2012_devkit_t12.tar.gz \\
      --output shards/imagenet/val

The archives are read in place and never unpacked. The shards need as much disk again, and 1 kB more an image: 139 GB
and 6.4 GB. First the archive is indexed, which takes some minutes. After that the time is that of reading every image
once, at random within the archive, and writing it once: the disk decides. Interrupted, run the same command again: it
goes on from the last finished shard.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ImageNetTrain, ImageNetValidation


def train(
    archive: Path,
    output: Path,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = 0,
    expected_count: int | None = 1_281_167,
    expected_classes: int | None = 1000,
) -> None:
    """ILSVRC2012_img_train.tar into shards.

    Args:
        archive: ILSVRC2012_img_train.tar.
        output: Folder for the training shards.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Seed of the one fixed shuffle; null keeps the order of the archive, which is by class.
        expected_count: Images that the archive must hold; null accepts any.
        expected_classes: Classes that the archive must hold; null accepts any.
    """
    source = ImageNetTrain(archive, expected_count=expected_count, expected_classes=expected_classes)
    write_shards(source, output, split="train", samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed)


def validation(
    archive: Path,
    ground_truth: Path,
    output: Path,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = 0,
    expected_count: int | None = 50_000,
    expected_classes: int | None = 1000,
) -> None:
    """ILSVRC2012_img_val.tar and its ground truth into shards.

    Args:
        archive: ILSVRC2012_img_val.tar.
        ground_truth: ILSVRC2012_devkit_t12.tar.gz, or a text file that names classes by WordNet id: Kaggle's
            LOC_val_solution.csv, lines of "ILSVRC2012_val_00000001.JPEG n01751748", or one WordNet id a line in the
            order of the image numbers. Files that number the classes are refused, because their order is unknown.
        output: Folder for the validation shards.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Seed of the one fixed shuffle; null keeps the order of the archive.
        expected_count: Images that the archive must hold; null accepts any.
        expected_classes: Classes that the ground truth must have; null accepts any.
    """
    source = ImageNetValidation(archive, ground_truth, expected_count=expected_count, expected_classes=expected_classes)
    write_shards(source, output, split="val", samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed)


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli([train, validation], as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
