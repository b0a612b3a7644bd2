"""The commands of `data/`, run as a user runs them. ImageNet's are in tests/data/test_sources_imagenet.py."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from discrete_lit.data.sources.emoji import Emoji, combinations_of, split_of, words_of

DATA = Path(__file__).parents[2] / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def recipe(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DATA / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet"], ["image-net.org", "138 GB", "ILSVRC2012_devkit_t12.tar.gz", "run the same command again"]),
        (["imagenet", "train"], ["--archive", "--output"]),
        (["imagenet", "validation"], ["--ground_truth", "LOC_val_solution.csv"]),
        (["folder"], ["--classes_from", "as much disk", "run the same command again"]),
        (["tuxpaint"], ["apt-get install tuxpaint-stamps-default", "161 MB"]),
        (["digits"], ["pip install scikit-learn", "5 seconds"]),
        (["emoji"], ["npm pack emoji-datasource-google", "Apache-2.0"]),
        (["fashion_mnist"], ["apt-get install dataset-fashion-mnist", "31 MB"]),
    ],
)
def test_help_says_where_the_data_is_and_what_it_takes(arguments: list[str], words: list[str]) -> None:
    ended = recipe(*arguments, "--help")
    assert ended.returncode == 0, ended.stderr
    for word in words:
        assert word in ended.stdout


def test_folder_for_training_and_validation(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "val/dog/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(path)
    ended = recipe("folder", "--root", tmp_path / "train", "--output", tmp_path / "shards")
    assert ended.returncode == 0, ended.stderr
    manifest = tmp_path / "shards" / "manifest.json"
    ended = recipe(
        *("folder", "--root", tmp_path / "val", "--output", tmp_path / "shards_val"),
        *("--split", "val", "--classes_from", manifest),
    )
    assert ended.returncode == 0, ended.stderr
    training, validation = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("shards", "shards_val"))
    assert (training["count"], training["classes"]) == (3, ["cat", "dog"])
    assert (validation["count"], validation["classes"], validation["split"]) == (1, ["cat", "dog"], "val")


def test_mistakes_end_with_one_line(tmp_path: Path) -> None:
    ended = recipe("folder", "--root", tmp_path / "none", "--output", tmp_path / "shards")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {tmp_path / 'none'} is not a folder; give one with a subfolder")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "shards").exists()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the original files: apt-get install dataset-fashion-mnist")
def test_embedded_set_is_made_again_bit_for_bit(tmp_path: Path) -> None:
    ended = recipe("fashion_mnist", "--output", tmp_path / "again.npz")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "again.npz").read_bytes() == (DATA / "fashion_mnist.npz").read_bytes()


def idx(kind: int, shape: tuple[int, ...]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    header = bytes([0, 0, kind, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    return gzip.compress(header + bytes(count))


def test_other_idx_files_are_refused(tmp_path: Path) -> None:
    shapes = {
        "train-images-idx3-ubyte.gz": (20, 28, 28),
        "train-labels-idx1-ubyte.gz": (20,),
        "t10k-images-idx3-ubyte.gz": (5, 28, 28),
        "t10k-labels-idx1-ubyte.gz": (5,),
    }
    arguments = ("fashion_mnist", "--idx", tmp_path, "--output", tmp_path / "made.npz")
    ended = recipe(*arguments)
    assert ended.stderr.startswith(f"error: there is no {tmp_path / 'train-images-idx3-ubyte.gz'}")
    for name, shape in shapes.items():
        (tmp_path / name).write_bytes(idx(8, shape))
    ended = recipe(*arguments)
    assert "they are not the original Fashion-MNIST" in ended.stderr
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(13, (20, 28, 28)))
    ended = recipe(*arguments)
    assert "is not an IDX file of unsigned bytes" in ended.stderr
    assert not (tmp_path / "made.npz").exists()


def test_emoji_into_both_splits(tmp_path: Path) -> None:
    """Transparent pictures come on white, with their category, and a form stays with its base."""
    pictures = tmp_path / "package" / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    table = []
    for number in range(40):
        base = f"{0x1F400 + number:x}"
        forms = {tone: {"image": f"{base}-{tone}.png", "has_img_google": True} for tone in ("1F3FB", "1F3FF")}
        category = "Food & Drink" if number % 2 else "Animals & Nature"
        named = {"name": f"SOME ANIMAL {number}", "short_name": "cat_face" if number else "flag-de"}
        emoji = {"image": f"{base}.png", "has_img_google": True, "category": category, "skin_variations": forms}
        table.append({**emoji, **named})
        for name in (base, *(f"{base}-{tone}" for tone in forms)):
            picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
            picture.putpixel((5, 6), (0, 0, 255, 128))
            picture.save(pictures / f"{name}.png")
    Image.new("RGBA", (64, 64)).save(pictures / "ffff.png")  # not in the table
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(table))
    (tmp_path / "package" / "package.json").write_text('{"version": "16.0.0"}')

    ended = recipe("emoji", "--package", tmp_path / "package", "--output", tmp_path / "shards")
    assert ended.returncode == 0, ended.stderr
    bases, count = {}, 0
    for split in ("train", "test"):
        folder = tmp_path / "shards" / split
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["classes"] == ["Animals & Nature", "Food & Drink"]
        count += manifest["count"]
        with tarfile.open(folder / f"{split}-000000.tar") as archive:
            names = archive.getnames()
            content = {name: archive.extractfile(name).read() for name in names}
        keys = {name.split(".")[0] for name in names}
        bases[split] = {key.split("-")[0] for key in keys}
        key = min(keys)
        number = int(key.split("-")[0], 16) - 0x1F400
        assert content[f"{key}.cls"] == str(number % 2).encode()
        image = Image.open(io.BytesIO(content[f"{key}.png"]))
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((5, 6)) == (127, 127, 255)
    assert count == 120 and not bases["train"] & bases["test"] and 1 <= len(bases["test"]) <= 12

    # Names beside the pictures, where they are asked for.
    ended = recipe("emoji", "--package", tmp_path / "package", "--output", tmp_path / "named", "--captions", "true")
    assert ended.returncode == 0, ended.stderr
    found = {}
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "named" / split / f"{split}-000000.tar") as archive:
            found |= {name: archive.extractfile(name).read().decode() for name in archive.getnames() if "txt" in name}
    assert len(found) == 120
    assert found["1f400.txt"] == "some animal 0\n"
    assert found["1f405.txt"] == "some animal 5\ncat face\n"
    assert found["1f405-1F3FF.txt"] == "some animal 5, dark skin tone\ncat face, dark skin tone\n"

    ended = recipe("emoji", "--package", tmp_path, "--output", tmp_path / "other")
    assert ended.returncode == 1 and "npm pack emoji-datasource-google" in ended.stderr


def test_emoji_that_choices_are_made_on_are_neither_trained_nor_tested() -> None:
    names = [f"{0x1F400 + number:x}" for number in range(400)]
    splits = {split_of(name, 0.2) for name in names}
    assert splits == {"train", "validation", "test"}
    for name in names:
        assert split_of(f"{name}-1f3fb", 0.2) == split_of(name, 0.2)
        assert (split_of(name) == "test") == (split_of(name, 0.2) == "test") and split_of(name) != "validation"
    with pytest.raises(ValueError, match=r"validation_fraction is 1\.5"):
        Emoji("package", "train", validation_fraction=1.5)


def test_names_that_are_held_out_are_made_of_words_of_other_names() -> None:
    tones = ("light", "dark", "medium-light")
    names = {
        f"{who} {what}, {tone} skin tone"
        for who in ("man", "woman")
        for what in ("surfing", "bowing")
        for tone in tones
    }
    keys = {f"{number}{form}": name for number, name in enumerate(sorted(names)) for form in ("", "-fe0f")}
    keys |= {"tent": "tent", "yo": "yo-yo"}
    held = combinations_of(keys, 0.5)
    assert 4 <= len(held) <= 16 and len(held) % 2 == 0  # both forms of a name
    left = {word for key, name in keys.items() if key not in held for word in words_of(name)}
    assert {"tent", "yo"}.isdisjoint(held) and all(set(words_of(keys[key])) <= left for key in held)
    # Not even of all names is one taken that has the last of a word.
    held = combinations_of(keys, 0.99)
    left = {word for key, name in keys.items() if key not in held for word in words_of(name)}
    assert held and all(set(words_of(keys[key])) <= left for key in held)
    assert not combinations_of(keys, 0.0)
    with pytest.raises(ValueError, match=r"combinations_fraction is 1"):
        Emoji("package", "train", combinations_fraction=1.0)
