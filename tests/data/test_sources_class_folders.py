import json
import logging
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders
from discrete_lit.data.sources.source import path_from_key


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    return root


def samples_of(shard: Path) -> list[dict]:
    """What webdataset itself makes of a shard."""
    with open(shard, "rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])))


def test_names_labels_and_bytes(tmp_path: Path) -> None:
    source = ClassFolders(touch(tmp_path, "b/2.jpg", "b/1.JPEG", "B/1.png", "a b/deep/er/x.webp", "a b/.hidden.jpg"))
    assert source.classes == ["B", "a b", "b"]
    assert [tuple(source[index]) for index in range(len(source))] == [
        ("B/1", "png", 0, b"content of B/1.png", ()),
        ("a b/deep/er/x", "webp", 1, b"content of a b/deep/er/x.webp", ()),
        ("b/1", "jpeg", 2, b"content of b/1.JPEG", ()),
        ("b/2", "jpg", 2, b"content of b/2.jpg", ()),
    ]


def test_every_file_survives_in_the_shards_whatever_its_name(tmp_path: Path) -> None:
    names = [
        "cat/img.v2.001.jpg",
        "cat/img.v2.002.jpg",
        "cat/same.jpg",
        "cat/same.png",
        "cat/same.JPG",
        "cat/100%.png",
        "cat/a_b.jpg",
        "cat/a.b.jpg",
        "dog/same.jpg",
        "v1.0/x.jpg",
        "__none__/x.jpg",
        f"dog/{'long' * 40}.jpg",
        "Käse/写真.jpg",
    ]
    source = ClassFolders(touch(tmp_path / "in", *names))
    write_shards(source, tmp_path / "out", split="train")
    samples = samples_of(tmp_path / "out" / "train-000000.tar")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(names)
    found = {}
    for sample in samples:
        (extension,) = set(sample) & {"jpg", "png"}
        name = path_from_key(sample["__key__"])
        if Path(name).suffix.lower() != f".{extension}":
            name = f"{name}.{extension}"
        assert source.classes[int(sample["cls"])] == name.split("/")[0]
        found[name] = sample[extension]
    assert found == {name: f"content of {name}".encode() for name in names}


def test_labels_of_validation_are_those_of_training(tmp_path: Path) -> None:
    training = ClassFolders(touch(tmp_path / "train", "a/1.jpg", "b/1.jpg", "c/1.jpg"))
    write_shards(training, tmp_path / "shards", split="train")
    manifest = tmp_path / "shards" / "manifest.json"
    source = ClassFolders(touch(tmp_path / "val", "c/2.jpg", "b/2.jpg"), classes_from=manifest)
    assert source.classes == ["a", "b", "c"]
    assert [(entry.key, entry.label) for entry in source.entries] == [("b/2", 1), ("c/2", 2)]
    with pytest.raises(ValueError, match=r"\['d'\] are not among the 3 classes"):
        ClassFolders(touch(tmp_path / "strange", "d/1.jpg"), classes_from=manifest)
    (tmp_path / "other.json").write_text(json.dumps([1]))
    for wrong in ("missing.json", "other.json"):
        with pytest.raises(ValueError, match=r"is not the manifest\.json"):
            ClassFolders(tmp_path / "val", classes_from=tmp_path / wrong)


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "deep/1.jpg")
    root = touch(tmp_path / "root", "a/0.jpg")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "deep")
    assert [entry.key for entry in ClassFolders(root).entries] == ["a/0", "a/linked/deep/1", "b/1"]


def test_other_files_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = ClassFolders(touch(tmp_path, "a/1.jpg", "a/notes.txt", "a/weights.pth", "readme.md"))
    assert [entry.key for entry in source.entries] == ["a/1"]
    assert ": .md (1, first readme.md), .pth (1, first a/weights.pth), .txt (1, first a/notes.txt)" in caplog.text
    assert "left out 3 entries" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images in"),
        (["readme.md"], r"no images in .*, which holds \.md \(1, first readme\.md\)"),
        ([".git/x.jpg"], r"no images in .*, which holds hidden \(1, first \.git\)"),
        (["a/1.heic"], r"no images in .*, which holds \.heic, which Pillow does not read here"),
        (["a/1.jpg", "stray.png"], r"1 images lie directly in .* stray\.png"),
        (["a/x.jpg", "a/x.png", "a/x.jpg.jpg"], "two images of .* have the key 'a/x%2Ejpg'"),
    ],
)
def test_folders_of_another_form_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ValueError, match=message):
        ClassFolders(touch(root, *names))


def test_missing_folder_and_file_for_folder(tmp_path: Path) -> None:
    touch(tmp_path, "file.jpg")
    for root in (tmp_path / "missing", tmp_path / "file.jpg"):
        with pytest.raises(ValueError, match="is not a folder"):
            ClassFolders(root)


def test_image_that_changed_since_is_refused(tmp_path: Path) -> None:
    source = ClassFolders(touch(tmp_path, "a/1.jpg"))
    (tmp_path / "a" / "1.jpg").write_bytes(b"shorter")
    with pytest.raises(ValueError, match="changed"):
        source[0]
