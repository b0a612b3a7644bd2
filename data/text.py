"""Turn text into token arrays of its characters: text8 (27 symbols, chunks of 256), or any text brought to its form.

text8 is the first 100 million characters of a cleaned Wikipedia (31 MB to fetch):

  curl -O http://mattmahoney.net/dc/text8.zip && unzip text8.zip
  python data/text.py --input text8 --output tokens/text8

Without --input it takes this repository's own prose, its pages and docstrings, which needs no network:

  python data/text.py --output tokens/prose

Writes train, validation and test under the output: 90%, 5% and 5% of the text in its order, as is usual for text8.
Letters become lower-case, digits words, and everything else single spaces; text8 itself stays as it is. Disk: 2 bytes a
character. Time: half a minute for text8, else a few seconds.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.data.text import own_prose, to_text8, write_text


def text(output: Path, input: Path | None = None, length: int = 256) -> None:
    """Write the token arrays of three splits.

    Args:
        output: Folder for train/, validation/ and test/.
        input: A text file in UTF-8; by default this repository's own prose.
        length: Characters of a chunk, one sample. A remainder is left out.

    Raises:
        ValueError: no such file, a text that is too short, or an output that holds other arrays.
    """
    if input is not None and not input.is_file():
        raise ValueError(f"--input {input} is no file")
    root = Path(__file__).parents[1]
    content = own_prose(root) if input is None else input.read_text(encoding="utf-8")
    source = "this repository's prose" if input is None else input.name
    for split, manifest in write_text(to_text8(content), output, length=length, source=source).items():
        print(f"{output / split}: {manifest['count']:,} chunks of {length} characters")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(text, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
