"""Make clips of scikit-learn's handwritten digits, which move across a square and bounce off its sides.

The digits (1,797 of 8x8 pixels) come with scikit-learn: `pip install scikit-learn`. Its file alone is enough:

  pip download --no-deps scikit-learn && unzip scikit_learn-*.whl sklearn/datasets/data/digits.csv.gz
  python data/moving_digits.py --output shards/moving_digits --file sklearn/datasets/data/digits.csv.gz

which writes shards/moving_digits/train, validation and test: shards of grey GIFs, 16 frames of 16x16 pixels, with the
digit as their label. The digits of the three splits are other images. `VideoClips` reads them with frame_rate: 10.
Disk: 20 MB.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import MovingDigits
from discrete_lit.data.sources.moving_digits import SPLITS


def moving_digits(
    output: Path,
    file: Path | None = None,
    count: int = 4_000,
    test_count: int = 500,
    frames: int = 16,
    side: int = 16,
) -> None:
    """Write the shards of the three splits.

    Args:
        output: Folder for train/, validation/ and test/.
        file: scikit-learn's digits.csv.gz; by default that of the installed package.
        count: Clips of train.
        test_count: Clips of validation, and of test.
        frames: Frames of a clip.
        side: Height and width of a frame in pixels, above 8.

    Raises:
        ValueError: no digits, a setting out of its range, or `output` holds other shards.
    """
    for split in SPLITS:
        clips = count if split == "train" else test_count
        source = MovingDigits(split, count=clips, frames=frames, side=side, file=file)
        manifest = write_shards(source, output / split, split=split)
        print(f"{output / split}: {manifest['count']:,} clips")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(moving_digits, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
