"""Text as token arrays."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from discrete_lit.data import TokenArrays
from discrete_lit.data.text import own_prose, to_text8, write_text
from discrete_lit.tokenizers import Characters

ROOT = Path(__file__).parents[2]


def test_the_form_of_text8() -> None:
    assert (
        to_text8("Born in 1984,  the C-3PO's\n4th heir!")
        == "born in one nine eight four the c three po s four th heir "
    )
    own = " anarchism originated as a term of abuse "
    assert to_text8(own) == own
    assert to_text8("Größe\u00a0is\tÀ la carte") == "gr e is la carte"


def test_the_splits_are_the_text_in_its_order(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + place % 26) if place % 7 else " " for place in range(2000))
    manifests = write_text(text, tmp_path, length=16, source="letters")
    assert {split: manifest["count"] for split, manifest in manifests.items()} == {
        "train": 112,
        "validation": 6,
        "test": 6,
    }
    data = TokenArrays(str(tmp_path / "train"), str(tmp_path / "validation"), batch_size=8)
    data.check_tokenizer(Characters().fingerprint())
    assert (data.vocab_size, data.token_shape, data.image_size, data.num_classes) == (27, (16,), 16, 1)
    for split, first in (("train", 0), ("validation", 1800), ("test", 1900)):
        tokens = np.load(tmp_path / split / "tokens.npy")
        found = "".join("".join(" abcdefghijklmnopqrstuvwxyz"[number] for number in row) for row in tokens)
        assert found == text[first : first + len(found)]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"100 characters: a twentieth of it must fill a chunk of length=16"):
        write_text("a" * 100, tmp_path, length=16, source="letters")
    with pytest.raises(ValueError, match="length must be at least 1"):
        write_text("a" * 100, tmp_path, length=0, source="letters")
    with pytest.raises(ValueError, match=r"characters \['A'\] that are not among the symbols"):
        write_text("A" * 1000, tmp_path, length=16, source="letters")


@pytest.mark.slow
def test_the_recipe_writes_this_repositorys_prose(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data" / "text.py"), "--output", str(tmp_path / "prose"), "--length", "64"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    prose = to_text8(own_prose(ROOT))
    assert f"train: {round(0.9 * len(prose)) // 64:,} chunks of 64 characters" in printed
    assert "discrete image generation" in prose and "lower case letters digits as words" in prose
    tokens = np.load(tmp_path / "prose" / "train" / "tokens.npy")
    assert "".join(" abcdefghijklmnopqrstuvwxyz"[number] for number in tokens[0]) == prose[:64]


def test_a_missing_file(tmp_path: Path) -> None:
    recipe = runpy.run_path(str(ROOT / "data" / "text.py"))
    with pytest.raises(ValueError, match="--input nowhere is no file"):
        recipe["text"](tmp_path, input=Path("nowhere"))
