"""Make the embedded set, data/fashion_mnist.npz, from the four original IDX files of Fashion-MNIST.

The file comes with the project: this shows how it was made. It holds the first 2,000 training images of each class
and all 10,000 test images, in the order of the original files.

Where to get them (31 MB): the Debian and Ubuntu package dataset-fashion-mnist (apt-get install dataset-fashion-mnist),
or https://github.com/zalandoresearch/fashion-mnist. Disk: 12 MB. Time: 3 seconds.
"""

import gzip
import io
import struct
import sys
import zipfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from jsonargparse import DefaultHelpFormatter, auto_cli

from discrete_lit.core.files import atomic_write, content_sha256
from discrete_lit.data.sources.fashion_mnist import EMBEDDED_SHA256

CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
PER_CLASS = 2000


def fashion_mnist(
    idx: Path = Path("/usr/share/datasets/fashion-mnist"), output: Path = Path("data/fashion_mnist.npz")
) -> None:
    """Write the embedded set again.

    Args:
        idx: Folder of train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and
            t10k-labels-idx1-ubyte.gz.
        output: The file to write.

    Raises:
        ValueError: The files are missing or are not the original ones.
    """
    content = pack(idx)
    digest = content_sha256(content)
    if digest != EMBEDDED_SHA256:
        raise ValueError(
            f"the files of {idx} give SHA-256 {digest}, expected {EMBEDDED_SHA256}: they are not the original "
            "Fashion-MNIST"
        )
    with atomic_write(output) as file:
        file.write(content)
    print(f"{output}: {len(content):,} bytes, SHA-256 {digest}")


def pack(idx: Path) -> bytes:
    """The content of the npz file: always the same bytes for the same images.

    Raises:
        ValueError: A file is missing or is not an IDX file of unsigned bytes.
    """
    images, labels = read_idx(idx / "train-images-idx3-ubyte.gz"), read_idx(idx / "train-labels-idx1-ubyte.gz")
    first = np.sort(np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in range(len(CLASSES))]))
    arrays = {
        "train_images": images[first],
        "train_labels": labels[first],
        "test_images": read_idx(idx / "t10k-images-idx3-ubyte.gz"),
        "test_labels": read_idx(idx / "t10k-labels-idx1-ubyte.gz"),
        "classes": np.array(CLASSES),
    }
    buffer = io.BytesIO()
    # numpy.savez uses zlib, whose output differs between builds; bzip2's does not, and is smaller.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system = 3
            info.compress_type = zipfile.ZIP_BZIP2
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped, as an array of its shape.

    Raises:
        ValueError: The file is missing or is something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; `apt-get install dataset-fashion-mnist` puts it in /usr/share/datasets")
    content = gzip.decompress(path.read_bytes())
    zero, kind, dimensions = struct.unpack(">HBB", content[:4])
    if zero != 0 or kind != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the text above, and shows types and defaults."""


if __name__ == "__main__":
    try:
        auto_cli(fashion_mnist, as_positional=False, description=__doc__, formatter_class=Help)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
