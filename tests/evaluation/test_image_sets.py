"""Every form of image set gives the stored pixels; a selection is balanced and never silently smaller."""

import io
import json
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stored_images import pixels, save_folder, save_npz
from PIL import Image

from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.data import ImageShards
from discrete_lit.data.transforms import UndecodableImage, center_crop
from discrete_lit.evaluation.compared_images import Selection, match_classes
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.evaluation.shares import Tally, measure_in_shares


def everything(images) -> list[tuple[int | None, bytes]]:
    return [(label, decode().tobytes()) for label, decode in images.stream()]


class Gather:
    """Keeps the images and labels that it is given."""

    def __init__(self) -> None:
        self.kept: list[Tally] = []

    def update(self, images, labels, indices):
        known = {} if labels is None else {"labels": labels}
        self.kept.append(Tally(rows={"images": images, "indices": indices, **known}))

    def tally(self):
        return Tally.joined(self.kept)

    def restore(self, tally):
        self.kept = [tally]


def gather(selection, batch_size=4):
    meter = Gather()
    assert measure_in_shares(selection, meter, batch_size=batch_size, device="cpu")
    return meter.tally().rows


def select(images, num_images, num_classes=3, batch_size=4):
    rows = gather(Selection(images, num_images, num_classes=num_classes), batch_size)
    assert len(set(rows["indices"].tolist())) == len(rows["images"])
    return rows["images"], rows.get("labels")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_streams_its_images_in_order(tmp_path, compressed):
    images, labels = pixels(7, 0), np.array([0, 2, 1, 0, 1, 2, 0])
    (np.savez_compressed if compressed else np.savez)(tmp_path / "s.npz", arr_0=images, labels=labels)
    found = open_image_set(tmp_path / "s.npz", 8)
    assert everything(found) == [(label, image.tobytes()) for label, image in zip(labels, images, strict=True)]
    assert (found.count, found.num_classes) == (7, 3)


def test_npz_labels_may_be_adms_second_array_or_absent(tmp_path):
    images = pixels(4, 0)
    np.savez(tmp_path / "adm.npz", images, np.array([3, 1, 0, 2]))
    adm = open_image_set(tmp_path / "adm.npz", 8)
    assert adm.labels is not None and adm.labels.tolist() == [3, 1, 0, 2]
    assert open_image_set(save_npz(tmp_path / "plain.npz", images), 8).num_classes is None


def test_shards_and_folder_hold_the_same_images(folder, shards):
    from_folder, from_shards = open_image_set(folder, 8), open_image_set(shards, 8)
    assert sorted(everything(from_folder)) == sorted(everything(from_shards))
    assert everything(from_folder) != everything(from_shards)
    assert from_folder.num_classes == from_shards.num_classes == 3
    assert from_folder.count == from_shards.count == 24


def test_files_get_adms_centre_crop(tmp_path):
    large = pixels(1, 0, size=40)[0][:, :30]
    save_folder(tmp_path / "large", large[None], np.array([0]))
    ((_, found),) = everything(open_image_set(tmp_path / "large", 8))
    assert found == center_crop(Image.fromarray(large), 8).tobytes()


def test_flat_folder_has_no_labels(tmp_path):
    images = pixels(3, 0)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    assert everything(open_image_set(tmp_path, 8)) == [(None, image.tobytes()) for image in images]


def test_fingerprints_follow_the_images(tmp_path):
    prints = {open_image_set(save_npz(tmp_path / f"{seed}.npz", pixels(3, seed)), 8).fingerprint() for seed in (0, 1)}
    again = open_image_set(save_npz(tmp_path / "again.npz", pixels(3, 0)), 8).fingerprint()
    assert len(prints) == 2 and again in prints


def test_selection_takes_the_first_of_each_class_in_order(tmp_path):
    labels = np.array([2, 0, 0, 0, 1, 2, 1, 2, 1])
    images = pixels(9, 0)
    found, chosen = select(open_image_set(save_npz(tmp_path / "s.npz", images, labels), 8), 6)
    assert chosen.tolist() == [2, 0, 0, 1, 2, 1]
    expected = images[[0, 1, 2, 4, 5, 6]].transpose(0, 3, 1, 2)
    assert np.array_equal(found.numpy(), expected) and found.dtype == torch.uint8


def test_remainder_goes_to_the_first_classes(folder):
    _, labels = select(open_image_set(folder, 8), 7)
    assert Counter(labels.tolist()) == {0: 3, 1: 2, 2: 2}


def test_selection_of_shards_is_balanced_and_repeats(shards):
    found, labels = select(open_image_set(shards, 8), 9)
    again, _ = select(open_image_set(shards, 8), 9, batch_size=5)
    assert Counter(labels.tolist()) == {0: 3, 1: 3, 2: 3} and torch.equal(found, again)


def test_no_count_takes_everything(folder):
    found, labels = select(open_image_set(folder, 8), None)
    assert len(found) == len(labels) == 24


def test_fewer_images_than_asked_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"has 24 images, num_images is 25"):
        Selection(open_image_set(folder, 8), 25, num_classes=3)
    uneven = open_image_set(save_npz(tmp_path / "s.npz", pixels(7, 0), np.array([0, 0, 0, 0, 1, 1, 2])), 8)
    with pytest.raises(ValueError, match=r"has 1 images of class 2, needs 2"):
        Selection(uneven, 6, num_classes=3)


def test_too_few_of_a_class_in_shards_are_found_when_read(tmp_path):
    from discrete_lit.data.shard_writer import write_shards
    from discrete_lit.data.sources.class_folders import ClassFolders

    source = save_folder(tmp_path / "uneven", pixels(9, 0), np.array([0, 0, 0, 0, 0, 1, 1, 1, 2]))
    write_shards(ClassFolders(source), tmp_path / "shards", split="test")
    with pytest.raises(ValueError, match=r"has 1 images of class 2, needs 2"):
        select(open_image_set(tmp_path / "shards", 8), 6)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    images = open_image_set(save_npz(tmp_path / "s.npz", pixels(4, 0), np.array([0, 1, 2, 3])), 8)
    with pytest.raises(ValueError, match="has label 3, there are 3 classes"):
        Selection(images, 3, num_classes=3)


def test_a_broken_image_is_replaced_by_the_next_of_its_class(tmp_path, caplog):
    images, labels = pixels(300, 0), np.arange(300) % 3
    root = Path(save_folder(tmp_path / "folder", images, labels))
    (root / "class0" / "000.png").write_bytes(b"broken")
    found, chosen = select(open_image_set(root, 8), 270)
    assert Counter(chosen.tolist()) == {0: 90, 1: 90, 2: 90}
    assert "left out a broken image" in caplog.text
    assert found[0].numpy().tobytes() == images[3].transpose(2, 0, 1).tobytes()
    whole, _ = select(open_image_set(root, 8), None)
    assert len(whole) == 299


def test_many_broken_images_are_an_error(folder):
    for name in ("000.png", "003.png"):
        (Path(folder) / "class0" / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match="2 of 24 images are broken"):
        select(open_image_set(folder, 8), None)
    with pytest.raises(ValueError, match="2 of 24 images are broken"):
        select(open_image_set(folder, 8), 24)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.savez(path, images=pixels(2, 0)), "no arr_0"),
        (lambda path: np.savez(path, arr_0=pixels(2, 0).astype(np.float32)), "must be uint8"),
        (lambda path: np.savez(path, arr_0=pixels(2, 0)[..., 0]), "must be uint8"),
        (lambda path: np.savez(path, arr_0=pixels(2, 0, size=16)), "images of 16x16, image_size is 8"),
        (lambda path: np.savez(path, arr_0=pixels(2, 0), labels=np.arange(3)), "labels are int64"),
        (lambda path: np.savez(path, arr_0=pixels(2, 0), labels=np.array([0, -1])), "labels are int64"),
        (lambda path: path.write_bytes(b"no zip"), "not a readable npz"),
        (lambda path: np.savez(path, arr_0=np.array([object()] * 2)), "must be uint8"),
    ],
)
def test_npz_of_another_kind_is_refused(tmp_path, write, message):
    write(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=message):
        open_image_set(tmp_path / "s.npz", 8)


def test_what_is_no_image_set_is_refused(tmp_path, shards):
    for path in (tmp_path / "missing", Path(shards) / "test-000000.tar"):
        with pytest.raises(ValueError, match="is no image set: accepted are"):
            open_image_set(path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        open_image_set(tmp_path / "empty", 8)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"format": "discrete-lit-tokens-1"}))
    with pytest.raises(ValueError, match="discrete-lit-tokens-1"):
        open_image_set(tmp_path / "tokens", 8)
    (Path(shards) / "test-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 shards are missing: .*test-000001\.tar"):
        open_image_set(shards, 8)


def test_pickles_in_a_shard_are_not_opened(tmp_path, shards):
    first = Path(shards) / "test-000000.tar"
    (tmp_path / "payload.pyd").write_bytes(b"payload")
    with tarfile.open(first, "a") as archive:
        archive.add(tmp_path / "payload.pyd", "zzz.pyd")
    assert len(everything(open_image_set(shards, 8))) == 24


def test_a_sample_without_its_label_is_broken(tmp_path, shards):
    first = Path(shards) / "test-000000.tar"
    Image.fromarray(pixels(1, 0)[0]).save(tmp_path / "image.png")
    with tarfile.open(first, "a") as archive:
        archive.add(tmp_path / "image.png", "class0/unlabelled.png")
    with pytest.raises(ValueError, match=r"test-000000\.tar holds more samples than the 5 declared"):
        select(open_image_set(shards, 8), None)
    manifest = json.loads((Path(shards) / "manifest.json").read_text())
    manifest["count"] += 1
    manifest["shards"][0]["count"] += 1
    (Path(shards) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"1 of 25 images are broken, the last: .*it has no \.cls entry"):
        select(open_image_set(shards, 8), None)


def test_a_shard_that_ends_early_is_refused(shards):
    last = Path(shards) / "test-000004.tar"
    last.write_bytes(last.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cannot read .*test-000004\.tar"):
        everything(open_image_set(shards, 8))


def test_hidden_files_of_a_flat_folder_are_left_out(tmp_path):
    for name in ("0.png", ".1.png"):
        Image.fromarray(pixels(1, 0)[0]).save(tmp_path / name)
    assert open_image_set(tmp_path, 8).count == 1


def test_uint8_conversion_rounds_and_clamps():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-2.0, -1.0, 1.0, 2.0, 0.0])).tolist()[:4] == [0, 0, 255, 255]
    step = 2 / 255
    assert to_uint8(torch.tensor([-1 + 0.6 * step, -1 + 0.4 * step])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("stored", "asked", "read"), [(1, 1, 1), (1, 3, 3), (3, 3, 3), (4, 4, 4), (3, 1, None), (4, 3, None)]
)
def test_npz_of_other_shapes(tmp_path, stored, asked, read):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, stored), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images)
    if read is None:
        with pytest.raises(ValueError, match=f"images of {stored} channels, image_channels is {asked}"):
            open_image_set(tmp_path / "s.npz", (8, 12), image_channels=asked)
        return
    decoded = np.stack(
        [decode() for _, decode in open_image_set(tmp_path / "s.npz", [8, 12], image_channels=asked).stream()]
    )
    np.testing.assert_array_equal(decoded, np.repeat(images, read // stored, axis=3))
    with pytest.raises(ValueError, match="has images of 8x12, image_size is 12x8"):
        open_image_set(tmp_path / "s.npz", (12, 8), image_channels=asked)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 2**64 - 1], np.uint64), "labels are uint64 and have 18446744073709551615"),
        (np.array([0, -1]), "labels are int64 and have -1"),
        (np.array([0.0, 1.0]), r"labels are float64 \(2,\)"),
        (np.array([[1, 0], [0, 1]]), r"labels are int64 \(2, 2\)"),
        (np.array(["cat", "dog"]), r"labels are <U3 \(2,\)"),
        (np.zeros(10**6, np.int64), r"labels are int64 \(1000000,\), expected \(2,\)"),
    ],
)
def test_labels_that_are_no_class_ids_are_refused_by_name(tmp_path, labels, message):
    with pytest.raises(ValueError, match=rf"s\.npz': {message}"):
        open_image_set(save_npz(tmp_path / "s.npz", pixels(2, 0), labels), 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool, np.uint64])
def test_labels_of_any_whole_type(tmp_path, dtype):
    found = open_image_set(save_npz(tmp_path / "s.npz", pixels(3, 0), np.array([0, 1, 1], dtype)), 8)
    assert found.labels is not None and found.labels.dtype == np.int64 and found.labels.tolist() == [0, 1, 1]


def test_damage_among_the_images_names_the_file(tmp_path):
    path = Path(save_npz(tmp_path / "s.npz", pixels(40, 0, 16)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.npz' is not a readable npz file: arr_0: Bad CRC"):
        everything(open_image_set(path, 16))


def test_labels_beyond_all_class_ids_take_no_memory(tmp_path):
    images = open_image_set(save_npz(tmp_path / "s.npz", pixels(2, 0), np.array([0, 10**12])), 8)
    with pytest.raises(ValueError, match="at most 1,048,576 classes"):
        match_classes({"held_out": images}, {})
    assert match_classes({}, {"mine": images}).count is None
    assert len(gather(Selection(images, 2, num_classes=None))["images"]) == 2


def test_selection_of_samples_alone_is_balanced_over_their_own_classes(tmp_path):
    images = open_image_set(
        save_npz(tmp_path / "s.npz", pixels(9, 0), np.array([7, 7, 7, 7, 7, 7, 10**9, 10**9, 3])), 8
    )
    _, labels = select(images, 3, num_classes=None)
    assert sorted(labels.tolist()) == [3, 7, 10**9]


def test_one_image_is_no_set(tmp_path):
    with pytest.raises(ValueError, match=r"s\.npz' has 1 images, at least 2 are needed"):
        Selection(open_image_set(save_npz(tmp_path / "s.npz", pixels(1, 0)), 8), None, num_classes=None)


@pytest.mark.parametrize("cut", ["before a header", "inside a header", "inside an image", "between image and label"])
def test_a_truncated_shard_lacks_the_same_samples_as_in_training(shards, cut):
    last = Path(shards) / "test-000004.tar"
    whole = last.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = list(archive)
    place = {
        "before a header": members[4].offset,
        "inside a header": members[4].offset + 100,
        "inside an image": members[4].offset_data + 20,
        "between image and label": members[5].offset,
    }[cut]
    last.write_bytes(whole[:place])
    images = open_image_set(shards, 8)
    problems = []
    for _, decode in images.stream():
        try:
            decode()
        except UndecodableImage as error:
            problems.append(str(error))
    data = ImageShards(str(shards), image_size=8, batch_size=4, num_workers=0, max_bad_fraction=1.0)
    read = sum(len(batch["key"]) for batch in data.evaluation_loader("train"))
    assert images.count - len(problems) == read == 22
    assert all("test-000004.tar: the shard ends after 2 of 4 samples (at byte" in problem for problem in problems)
    with pytest.raises(ValueError, match=r"2 of 24 images are broken, the last: .*test-000004\.tar: the shard ends"):
        select(images, None)


@pytest.mark.parametrize("label", [b"7", b"ant", b"9" * 5000])
def test_a_label_of_a_shard_that_is_no_class_is_named(shards, label):
    first = Path(shards) / "test-000000.tar"
    with tarfile.open(first) as archive:
        entries = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(first, "w") as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            data = label if name.endswith(".cls") else data
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"of .*test-000000\.tar has label '.{1,40}'; labels must be in 0\.\.2"):
        select(open_image_set(shards, 8), None)


def test_shards_without_a_manifest_are_images_without_labels(shards):
    expected = [pixels for _, pixels in everything(open_image_set(shards, 8))]
    before = open_image_set(shards, 8).fingerprint()
    (Path(shards) / "manifest.json").unlink()
    images = open_image_set(shards, 8)
    assert images.num_classes is None and images.count == 24 and images.fingerprint() != before
    assert everything(images) == [(None, pixels) for pixels in expected]


def test_of_samples_without_a_class_the_first_are_taken(tmp_path):
    images = pixels(7, 0)
    plain = select(open_image_set(save_npz(tmp_path / "plain.npz", images), 8), 5)[0]
    null = open_image_set(save_npz(tmp_path / "null.npz", images, np.full(7, 3)), 8)
    selection = Selection(null, 5, num_classes=3, numbering=match_classes({}, {"null": null}, 3).numbering["null"])
    assert torch.equal(gather(selection)["images"], plain) and not selection.uneven


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_decoded_by_threads_in_the_order_of_the_set(tmp_path, monkeypatch, threads, ahead):
    """The first of each batch takes longest; a broken one and those that are not turned stand where they are."""
    images = pixels(23, 0)
    folder = save_folder(tmp_path / "images", images, np.zeros(23, int))
    files = sorted(Path(folder).rglob("*.png"))
    files[9].write_bytes(b"no image")
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in (3, 17):
        Image.fromarray(images[number]).save(files[number], exif=turned)
    found = open_image_set(folder, 8)
    decode, begun, running = type(found)._decoded, [], set()

    def slow(self, data):
        begun.append(data)
        running.add(threading.get_ident())
        time.sleep(0.02 if len(begun) % 5 == 1 else 0.0)
        return decode(self, data)

    monkeypatch.setattr(type(found), "_decoded", slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    selection = Selection(found, None, num_classes=None)
    batches, at_work = [], []
    for batch in selection.read(np.arange(23), 5, ahead=ahead):
        batches.append(batch)
        at_work.append(len(begun))
    assert [len(batch.images) for batch in batches] == [5, 4, 5, 5, 3]
    whole = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(whole, np.delete(images, 9, axis=0))
    assert list(batches[1].broken) == [9] and [batch.unturned for batch in batches] == [1, 0, 0, 1, 0]
    assert len(running) <= threads and threading.get_ident() not in running
    # Nobody decodes while who reads is busy, unless he is asked to.
    assert ahead or at_work == [5, 10, 15, 20, 23]
