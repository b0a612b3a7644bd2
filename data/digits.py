"""Put scikit-learn's handwritten digits together to captioned pictures: "three left of seven", or the sum of "2+3".

The digits (1,797 of 8x8 pixels) come with scikit-learn: `pip install scikit-learn`. Its file alone is enough:

  pip download --no-deps scikit-learn && unzip scikit_learn-*.whl sklearn/datasets/data/digits.csv.gz
  python data/digits.py --output shards/digits --file sklearn/datasets/data/digits.csv.gz

which writes shards/digits/train, validation and test. A fifth of the pairs of digits are shown in test alone, and the
digits of validation and test are other images than those of train. --composition beside is 8x16 pixels ("three left of
seven"), around 16x16 (above and below too), sum 8x16 (the result of "2+3"; --thought true writes "2+3=5"). Each pixel
has one of 17 levels, so `PixelLevels` with 17 levels codes a picture without loss. Disk: 75 MB. Time: 5 seconds.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import DigitCompositions
from discrete_lit.data.sources.digit_compositions import Composition


def digits(
    output: Path,
    file: Path | None = None,
    composition: Composition = "beside",
    thought: bool = False,
    count: int = 20_000,
    test_count: int = 2_000,
) -> None:
    """Write the shards of the three splits.

    Args:
        output: Folder for train/, validation/ and test/.
        file: scikit-learn's digits.csv.gz; by default that of the installed package.
        composition: beside, around or sum.
        thought: End the caption of a sum with its result.
        count: Pictures of train.
        test_count: Pictures of validation, and of test.

    Raises:
        ValueError: no digits, or `output` holds other shards.
    """
    splits: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
    for split in splits:
        pictures = count if split == "train" else test_count
        source = DigitCompositions(split, composition, count=pictures, thought=thought, file=file)
        manifest = write_shards(source, output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} pictures, the first captions {list(source.captions(0))}")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(digits, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
