import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from discrete_lit.data.sources import EmbeddedSet
from discrete_lit.data.sources.fashion_mnist import EMBEDDED_SHA256

FILE = Path(__file__).parents[2] / "data" / "fashion_mnist.npz"

Sources = dict[str, EmbeddedSet]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return {"train": EmbeddedSet(FILE, "train"), "test": EmbeddedSet(FILE, "test")}


def test_file_is_the_recorded_one_and_small() -> None:
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == EMBEDDED_SHA256
    assert len(content) < 15_000_000
    assert EMBEDDED_SHA256 in FILE.with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("split", "each", "first_labels"),
    # The first labels of the original files, as published.
    [("train", 2000, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]), ("test", 1000, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7])],
)
def test_counts_labels_and_keys(sources: Sources, split: str, each: int, first_labels: list[int]) -> None:
    source = sources[split]
    labels = [entry.label for entry in source.entries]
    assert Counter(labels) == dict.fromkeys(range(10), each)
    assert labels[:10] == first_labels
    assert [source.classes[label] for label in labels[:3]] == (
        ["Ankle boot", "T-shirt/top", "T-shirt/top"] if split == "train" else ["Ankle boot", "Pullover", "Trouser"]
    )
    assert source.entries[0].key == f"{split}-00000"
    assert source.entries[-1].key == f"{split}-{10 * each - 1:05d}"


def test_images_are_grey_png_with_two_black_pixels_around(sources: Sources) -> None:
    source = sources["test"]
    with np.load(FILE, allow_pickle=False) as arrays:
        stored = arrays["test_images"]
    for index in (0, 1, 9999):
        image = Image.open(io.BytesIO(source[index].data))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
        pixels = np.asarray(image)
        assert np.array_equal(pixels[2:30, 2:30], stored[index])
        assert pixels.sum() == stored[index].sum() > 0


def test_splits_differ(sources: Sources) -> None:
    assert sources["train"].fingerprint() != sources["test"].fingerprint()


def test_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        EmbeddedSet(tmp_path / "none.npz", "train")
    content = bytearray(FILE.read_bytes())
    content[5_000_000] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(ValueError, match=f"expected {EMBEDDED_SHA256}"):
        EmbeddedSet(tmp_path / "damaged.npz", "train")
