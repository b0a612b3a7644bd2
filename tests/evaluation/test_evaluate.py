"""`discrete-lit evaluate` on tiny sets, end to end: what the report says, and what is refused."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stored_images import pixels, save_folder, save_npz
from PIL import Image
from torch import Tensor

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.data import ImageFolder
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources.class_folders import ClassFolders
from discrete_lit.data.transforms import UndecodableImage
from discrete_lit.evaluation import feature_statistics
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.moments import Moments
from discrete_lit.metrics.precision_recall import Manifold
from discrete_lit.tokenizers.quantizers.quantizer import Component


class Means(FeatureExtractor):
    """Mean and standard deviation of each colour."""

    name = "Means"
    dim = 6
    protocol = "none"
    weights_sha256 = "a" * 64

    def extract(self, images: Tensor) -> Tensor:
        values = images.double().flatten(2)
        return torch.cat((values.mean(2), values.std(2)), 1)


def numpy_features(images: np.ndarray) -> np.ndarray:
    values = images.reshape(len(images), -1, 3).astype(np.float64)
    return np.concatenate((values.mean(1), values.std(1, ddof=1)), 1).astype(np.float32).astype(np.float64)


def numpy_distance(first: np.ndarray, second: np.ndarray) -> float:
    import scipy.linalg

    first, second = numpy_features(first), numpy_features(second)
    covariances = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root))


@pytest.fixture
def sets(tmp_path) -> dict:
    """A reference folder of 24 images, 12 held-out images, and a run of 12 samples with its run.json and grid.png."""
    labels = np.arange(12) % 3
    save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3)
    save_folder(tmp_path / "held_out", pixels(12, 1), labels)
    samples = save_npz(tmp_path / "run" / "samples.npz", pixels(12, 2) // 2, labels)
    run = {"network_calls": 8, "sequential_passes": 16, "images_per_second": 2.5, "seed": 3}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    (tmp_path / "run" / "grid.png").write_bytes(b"")
    return {
        "reference": str(tmp_path / "reference"),
        "held_out": str(tmp_path / "held_out"),
        "samples": {"mine": samples},
        "output": str(tmp_path / "report"),
        "image_size": 8,
        "num_images": 12,
        "extractor": Means(),
    }


def test_report_has_the_floor_and_the_samples_at_one_count(sets, capsys):
    report = evaluate(**sets)
    floor, mine = report["rows"]
    assert (floor["name"], floor["kind"], mine["name"], mine["kind"]) == (
        "held-out real images",
        "real",
        "mine",
        "samples",
    )
    assert report["metric"] == "FD-Means" and floor["count"] == mine["count"] == report["num_images"] == 12
    assert mine["FD-Means"] == pytest.approx(numpy_distance(pixels(12, 2) // 2, pixels(24, 0)), rel=1e-6)
    assert floor["FD-Means"] == pytest.approx(numpy_distance(pixels(12, 1), pixels(24, 0)), rel=1e-6)
    means = [numpy_features(images).mean(0) for images in (pixels(12, 2) // 2, pixels(24, 0))]
    assert mine["record"]["mean_term"] == pytest.approx(np.sum((means[0] - means[1]) ** 2), rel=1e-6)
    assert mine["record"]["mean_term"] + mine["record"]["covariance_term"] == pytest.approx(mine["FD-Means"])
    fingerprint = open_image_set(sets["reference"], 8).fingerprint()
    assert report["reference"] == {
        "name": sets["reference"],
        "sha256": fingerprint,
        "count": 24,
        "manifold_features": 24,
        "manifold_neighbours": 3,
    }
    assert report["environment"]["device"].startswith("cpu")
    assert report["extractor"] == {"name": "Means", "weights_sha256": "a" * 64, "protocol": "none"}
    assert mine["sampling"]["sequential_passes"] == 16 and floor["sampling"] == {}
    assert (
        floor["within_class_diversity"] == 1.0 > mine["within_class_diversity"] > 0 and mine["label_accuracy"] is None
    )
    assert json.loads((Path(sets["output"]) / "report.json").read_text()) == report
    printed = capsys.readouterr().out
    assert (Path(sets["output"]) / "report.md").read_text() in printed
    assert "| mine " in printed and "2.5" in printed and "label accuracy" not in printed
    assert f"mine: {Path(sets['samples']['mine']).parent / 'grid.png'}" in printed


def test_one_image_repeated_has_no_diversity(sets, tmp_path):
    repeated = np.repeat(pixels(1, 5), 12, axis=0)
    sets["samples"] = {"collapsed": save_npz(tmp_path / "c.npz", repeated, np.arange(12) % 3)}
    row = evaluate(**sets)["rows"][1]
    assert row["within_class_diversity"] == 0.0 and row["within_class_diversity_by_class"] == [0.0] * 3
    assert row["sampling"] == {} and row["picture"] is None


def test_reference_moments_are_kept_for_the_next_run(sets, monkeypatch):
    first = evaluate(**sets)["rows"]
    measured = []
    original = feature_statistics.measure

    def measure(*args, **kwargs):
        measured.append(kwargs["description"])
        return original(*args, **kwargs)

    monkeypatch.setattr(feature_statistics, "measure", measure)
    assert evaluate(**sets)["rows"] == first
    assert measured == ["held-out real images", "mine"]
    other = Means()
    other.weights_sha256 = "b" * 64
    evaluate(**{**sets, "extractor": other})
    evaluate(**{**sets, "num_reference": 12})
    Path(sets["reference"], "class0", "000.png").unlink()
    evaluate(**sets)
    assert measured.count("reference") == 3


@pytest.mark.parametrize("suffix", ["npz", "features.npy", "radii-3.npy"])
def test_a_broken_cache_is_computed_again(sets, suffix):
    first = evaluate(**sets)["rows"]
    (kept,) = Path(sets["output"]).glob(f"reference-*.{suffix}")
    kept.write_bytes(kept.read_bytes()[:100])
    assert evaluate(**sets)["rows"] == first


def test_the_balls_of_a_reference_are_kept(sets, monkeypatch):
    first = evaluate(**sets)["rows"]
    spanned = []
    compute = Manifold._squared_radii_of

    def noted(manifold, *arguments):
        spanned.append(len(manifold.features))
        return compute(manifold, *arguments)

    monkeypatch.setattr(Manifold, "_squared_radii_of", noted)
    assert evaluate(**sets)["rows"] == first
    assert spanned == [row["count"] for row in first]  # those of the sets, not of the reference
    (kept,) = Path(sets["output"]).glob("reference-*.radii-3.npy")
    np.save(kept, np.load(kept)[1:])
    assert evaluate(**sets)["rows"] == first
    assert len(spanned) == 2 * len(first) + 1


def test_a_reference_of_another_extractor_is_refused_before_anything_is_computed(sets, tmp_path, monkeypatch):
    Moments(torch.zeros(4).double(), torch.eye(4).double()).save(tmp_path / "moments.npz")
    monkeypatch.setattr(feature_statistics, "measure", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"moments\.npz' has 4 features, Means gives 6"):
        evaluate(**{**sets, "reference": str(tmp_path / "moments.npz")})


def test_precision_and_recall_are_of_the_features(sets, monkeypatch):
    """Against torch-fidelity on the same features; of a larger reference evenly spaced ones are kept."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    def features(images):
        return torch.from_numpy(numpy_features(images))

    # The folder's order is class by class.
    order = np.argsort(np.arange(24) % 3, kind="stable")
    samples = pixels(12, 0, 8)
    samples[6:] //= 2
    sets["samples"] = {"mine": save_npz(Path(sets["output"]).parent / "half" / "s.npz", samples, np.arange(12) % 3)}
    for most, kept in ((24, order), (8, order[::3])):
        monkeypatch.setattr(feature_statistics, "MOST_FEATURES", most)
        report = evaluate(**{**sets, "output": f"{sets['output']}{most}"})
        expected = calculate_precision_recall_full(features(samples), features(pixels(24, 0)[kept]))
        row = report["rows"][1]
        assert (row["precision"], row["recall"]) == pytest.approx(expected) and 0 < row["precision"] < 1
        assert report["reference"]["manifold_features"] == most
        again = evaluate(**{**sets, "output": f"{sets['output']}{most}"})
        assert again["rows"] == report["rows"]
    assert f"the features of {most} images" in (Path(f"{sets['output']}{most}") / "report.md").read_text()


def test_the_likelihood_of_held_out_images_stands_beside_the_samples(
    sets, make_generator, make_grid_tokenizer, monkeypatch, tmp_path
):
    import discrete_lit.checkpoints as files

    generators = {
        name: make_generator(name, 4, (8, 8), 3, spread=0.5, tokenizer=make_grid_tokenizer(4, (8, 8)), image_size=8)
        for name in ("masked", "autoregressive")
    }
    loaded = []
    monkeypatch.setattr(files, "load", lambda path: loaded.append(path) or generators[path])
    samples = sets["samples"]["mine"]
    sets["samples"] = {"a": samples, "b": samples, "again": samples, "without": samples}
    likelihoods = {"a": "autoregressive", "b": "masked", "again": "masked"}
    floor, a, b, again, without = evaluate(**sets, likelihoods=likelihoods)["rows"]
    assert loaded == ["autoregressive", "masked"]
    assert floor["likelihood"] is None and without["likelihood"] is None and b["likelihood"] == again["likelihood"]
    assert a["likelihood"]["kind"] == "exact" and b["likelihood"]["kind"] == "bound"
    assert a["likelihood"]["count"] == 12 and a["likelihood"]["tokens"] == 64
    table = (Path(sets["output"]) / "report.md").read_text()
    assert f"  {a['likelihood']['nats']:,.1f} ± " in table and f" ≤ {b['likelihood']['nats']:,.1f} ± " in table
    assert "comparable between generators of one tokenizer alone" in table

    for wrong, message in (
        ({"c": "masked"}, r"likelihoods\.c is of no row"),
        ({"a": "tokenizer"}, r"likelihoods\.a='tokenizer' holds a GridTokenizer, not a Generator"),
        ({"a": "large"}, r"likelihoods\.a='large' models images of 16 pixels, image_size is 8"),
    ):
        generators["tokenizer"] = generators["masked"].tokenizer
        generators["large"] = make_generator("masked", 4, (8, 8), 3, image_size=16)
        with pytest.raises(ValueError, match=message):
            evaluate(**sets, likelihoods=wrong)
    with pytest.raises(ValueError, match="likelihoods are of the held-out images: give held_out"):
        evaluate(**{**sets, "held_out": None}, likelihoods={"a": "masked"})


def test_reference_may_be_a_moments_file(sets, tmp_path):
    features = numpy_features(pixels(24, 0))
    Moments(torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features.T))).save(tmp_path / "moments.npz")
    expected = evaluate(**sets)["rows"][1]["FD-Means"]
    report = evaluate(**{**sets, "reference": str(tmp_path / "moments.npz")})
    assert report["rows"][1]["FD-Means"] == pytest.approx(expected, rel=1e-9)
    assert report["rows"][1]["recall"] is None and report["reference"]["manifold_features"] is None
    assert report["reference"]["count"] is None and "does not say which extractor" in report["notes"][0]


def test_a_reference_of_images_of_another_size_is_refused(sets, tmp_path):
    evaluate(**sets)
    (kept,) = Path(sets["output"]).glob("reference-*.npz")
    other = {**sets, "reference": str(kept), "samples": {}, "image_size": 4}
    with pytest.raises(ValueError, match=r"was measured on images of 8x8 pixels, those compared with it are of 4x4"):
        evaluate(**other)
    assert evaluate(**{**other, "image_size": 8})["rows"][0]["count"] == 12


def test_samples_without_labels_need_no_classes(sets, tmp_path):
    sets["samples"] = {"plain": save_npz(tmp_path / "plain.npz", pixels(12, 2))}
    row = evaluate(**{**sets, "held_out": None})["rows"][0]
    assert row["within_class_diversity"] is None and row["FD-Means"] > 0


def test_few_images_are_noted(sets):
    assert evaluate(**{**sets, "num_images": 6})["notes"][0].startswith("samples: 6 for 6 features")


def test_a_set_with_fewer_images_is_refused_before_anything_is_computed(sets, monkeypatch):
    monkeypatch.setattr(feature_statistics, "measure", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"samples\.npz' has 12 images, num_images is 15"):
        evaluate(**{**sets, "num_images": 15, "held_out": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": {}, "held_out": None}, "nothing to evaluate"),
        ({"reconstructions": {"t": "t.ckpt"}, "held_out": None}, "give held_out"),
        ({"samples": {}, "reconstructions": {"t": "t.ckpt"}, "held_out": None}, "reconstructions are made of"),
        ({"num_images": 1}, "num_images=1"),
        ({"image_size": 16}, "images of 8x8, image_size is 16"),
        ({"reference": "missing.npz"}, "'missing.npz' is no image set"),
        ({"samples": {"mine": "missing.npz"}}, "'missing.npz' is no image set"),
        ({"num_images": None, "held_out": None}, "give num_images or held_out"),
        ({"reconstructions": {"mine": "t.ckpt"}}, "a name stands for one row"),
    ],
)
def test_mistakes_are_refused(sets, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**{**sets, **change})


def test_the_classifier_needs_labels(sets, tmp_path):
    sets["samples"] = {"plain": save_npz(tmp_path / "plain.npz", pixels(12, 2))}
    with pytest.raises(ValueError, match=r"samples\.plain=.* has no labels"):
        evaluate(**sets, classifier="classifier.ckpt")


def test_reconstructions_are_measured_on_the_held_out_images(sets, monkeypatch, make_grid_tokenizer, tmp_path):
    """A tokenizer that keeps every pixel of grey images gives them back: the row equals the floor."""
    grey = np.repeat(pixels(12, 1)[..., :1], 3, axis=3)
    save_folder(tmp_path / "grey", grey, np.arange(12) % 3)
    import discrete_lit.checkpoints as files

    exact = make_grid_tokenizer(256, (64,))
    monkeypatch.setattr(exact, "decode", lambda tokens: (tokens / 127.5 - 1).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1))
    monkeypatch.setattr(exact, "components", lambda tokens: {"bit_7": Component(tokens // 128, 2)})
    monkeypatch.setattr(files, "load", lambda path: exact)
    reconstructions = {"exact": "t.ckpt", "again": "t.ckpt"}
    sets |= {"held_out": str(tmp_path / "grey"), "reconstructions": reconstructions}
    with pytest.raises(ValueError, match=r"missing\.pth"):
        evaluate(**sets, lpips_weights="missing.pth")
    report = evaluate(**sets)
    floor, exact_row, second, _ = report["rows"]
    assert exact_row["kind"] == second["kind"] == "reconstructions" and exact_row["source"] == "t.ckpt"
    assert exact_row["FD-Means"] == floor["FD-Means"] == second["FD-Means"]
    figures = exact_row["reconstruction"]
    assert figures["psnr"] is None and figures["ssim"] == pytest.approx(1) and floor["reconstruction"] is None
    assert figures["ids"]["size"] == 256 and figures["capacity_bits"] == 64 * 8 and figures["bits_per_pixel"] == 8
    assert figures["ids"]["usage"] == pytest.approx(len(np.unique(grey)) / 256)
    table = (Path(sets["output"]) / "report.md").read_text()
    assert "exact, of each component of its ids: bit_7 100.0% of 2, perplexity" in table
    assert "| L log2 K |" in table and "|      512 |" in table and "plug-in estimate" in table


def test_from_the_command_line_with_a_yaml(sets, tmp_path, monkeypatch, capsys):
    from discrete_lit.cli.commands import main

    monkeypatch.setitem(__import__("sys").modules, "tiny_extractors", __import__(__name__))
    config = {key: value for key, value in sets.items() if key != "extractor"}
    config["extractor"] = {"class_path": "tiny_extractors.Means"}
    (tmp_path / "evaluate.yaml").write_text(json.dumps(config))
    main(["evaluate", "--config", str(tmp_path / "evaluate.yaml"), "--num_images", "9"])
    assert json.loads((Path(sets["output"]) / "report.json").read_text())["num_images"] == 9
    assert "FD-Means" in capsys.readouterr().out


def test_all_held_out_images_by_default(sets, tmp_path):
    """An uneven held-out set is taken whole, and the samples at its count."""
    save_folder(tmp_path / "uneven", pixels(11, 1), np.array([0] * 7 + [1, 2, 2, 2]))
    report = evaluate(**{**sets, "held_out": str(tmp_path / "uneven"), "num_images": None})
    assert report["num_images"] == 11 and {row["count"] for row in report["rows"]} == {11}


def test_a_generator_reconstructs_nothing(sets, monkeypatch, make_generator, tmp_path):
    import discrete_lit.checkpoints as files

    save_folder(tmp_path / "real", pixels(12, 1), np.arange(12) % 3)
    monkeypatch.setattr(files, "load", lambda path: make_generator("masked"))
    with pytest.raises(ValueError, match=r"reconstructions\.theirs='m\.ckpt' holds a Masked, which is a generator"):
        evaluate(**{**sets, "held_out": str(tmp_path / "real"), "reconstructions": {"theirs": "m.ckpt"}})


def notes(report: dict) -> str:
    return "\n".join(report["notes"])


def rewritten(path: Path, pixels_of: int) -> None:
    """Other pixels in a bitmap of the same name, size and times."""
    state = path.stat()
    Image.fromarray(pixels(1, pixels_of)[0]).save(path)
    assert path.stat().st_size == state.st_size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("form", ["class folders", "images alone", "shards"])
def test_a_kept_reference_follows_the_content_of_its_images(sets, tmp_path, form):
    """Images that change under the same names, sizes and times are measured again."""
    root = tmp_path / "bitmaps"
    for index, image in enumerate(pixels(12, 4)):
        path = root / ("" if form == "images alone" else f"class{index % 3}") / f"{index:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    reference = root
    if form == "shards":
        reference = tmp_path / "shards"
        manifest = write_shards(ClassFolders(root), reference, split="train", samples_per_shard=5)
    sets |= {"reference": str(reference), "held_out": None}
    first = evaluate(**sets)
    if form == "shards":
        shard = reference / manifest["shards"][0]["name"]
        state, data = shard.stat(), bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            start = next(member for member in tar if member.name.endswith(".bmp")).offset_data
        data[start + 60 : start + 200] = bytes(140)
        shard.write_bytes(data)
        os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        rewritten(next(root.rglob("00.bmp")), 9)
    second = evaluate(**sets)
    assert second["reference"]["sha256"] != first["reference"]["sha256"]
    assert second["rows"][0]["FD-Means"] != first["rows"][0]["FD-Means"]
    assert second["rows"] == evaluate(**{**sets, "output": str(tmp_path / "fresh")})["rows"]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_exif_orientation_is_applied_where_the_training_does(sets, tmp_path, kind):
    """Photographs that are stored turned are measured upright, and the kept reference is one of that reading."""
    upright = np.linspace(230, 20, 8).astype(np.uint8)[:, None, None].repeat(8, 1).repeat(3, 2)
    variants = np.stack([upright // (1 + index % 4) + index for index in range(12)])
    turned = tmp_path / "turned"
    exif = Image.Exif()
    exif[0x0112] = 6
    for index, image in enumerate(variants):
        path = turned / f"class{index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    data = ImageFolder(str(turned), image_size=8, batch_size=12, num_workers=0, apply_exif=True)
    seen = next(iter(data.evaluation_loader("train")))["image"]
    if kind == "shards":
        write_shards(ClassFolders(turned), tmp_path / "shards", split="train", shuffle_seed=None)
        turned = tmp_path / "shards"
    upright_set = Selection(open_image_set(turned, 8, apply_exif=True), None, num_classes=3)
    read = next(upright_set.read(upright_set.positions(), 12)).images
    assert read is not None and torch.equal(read, seen) and not torch.equal(read, read.transpose(2, 3))
    sets |= {"reference": str(turned), "held_out": None, "extractor": Rows()}
    sets["samples"] = {"upright": save_npz(tmp_path / "upright.npz", variants)}
    ignored, applied = evaluate(**sets), evaluate(**sets, apply_exif=True)
    assert (ignored["apply_exif"], applied["apply_exif"]) == (False, True)
    assert applied["rows"][0]["FD-Rows"] == pytest.approx(0, abs=1e-6) and ignored["rows"][0]["FD-Rows"] > 1000
    kept = {file: Moments.load(file).apply_exif for file in Path(sets["output"]).glob("reference-*.npz")}
    assert sorted(kept.values()) == [False, True]
    file = next(file for file, value in kept.items() if value)
    with pytest.raises(ValueError, match=r"was measured with apply_exif=true, apply_exif is false here"):
        evaluate(**{**sets, "reference": str(file)})


def test_an_orientation_that_is_not_applied_is_said(sets, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels(1, 3)[0]).save(Path(sets["held_out"], "class0", "000.png"), exif=exif)
    assert "1 images were read without turning them as their EXIF orientation says" in notes(evaluate(**sets))
    assert "EXIF" not in notes(evaluate(**sets, apply_exif=True))


class Rows(FeatureExtractor):
    """Mean of the first and of the last row."""

    name = "Rows"
    dim = 2
    protocol = "none"
    weights_sha256 = "c" * 64

    def extract(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 3))[:, [0, -1]]


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]), "mine has 3 to 5 images of a class"),
        (np.ones(12, np.int32), "mine shows 1 of 3 classes"),
        (np.full(12, 3, np.uint8), "mine: 12 of 12 images have the null label"),
        (np.array([0, 1, 2] * 3 + [3] * 3), "mine: 3 of 12 images have the null label"),
    ],
)
def test_samples_are_measured_whatever_their_labels(sets, tmp_path, labels, note):
    """Labels decide nothing of the distance of a whole set; what is said of classes is of those that are there."""
    sets["samples"] = {"mine": save_npz(tmp_path / "s.npz", pixels(12, 2) // 2, labels)}
    report = evaluate(**sets)
    row = report["rows"][1]
    assert row["count"] == 12 and note in notes(report)
    assert row["FD-Means"] == pytest.approx(numpy_distance(pixels(12, 2) // 2, pixels(24, 0)), rel=1e-6)
    found = [value is not None for value in row["within_class_diversity_by_class"]]
    assert found == [bool((labels == label).sum() > 1) for label in range(3)]
    assert (row["within_class_diversity"] is None) == (not any(found))


def test_of_uneven_samples_images_are_taken_over_the_whole_set(sets, tmp_path):
    labels = np.array([0] * 20 + [1] * 3 + [2])
    images = pixels(24, 7)
    sets["samples"] = {"mine": save_npz(tmp_path / "s.npz", images, labels)}
    report = evaluate(**sets)
    assert report["rows"][1]["FD-Means"] == pytest.approx(numpy_distance(images[::2], pixels(24, 0)), rel=1e-6)
    assert "mine: a class has fewer images than 12 over the number of classes" in notes(report)


def test_a_label_beyond_the_null_label_is_refused(sets, tmp_path):
    sets["samples"] = {"mine": save_npz(tmp_path / "s.npz", pixels(12, 2), np.full(12, 4))}
    with pytest.raises(ValueError, match=r"samples\.mine: .*s\.npz' has label 4, there are 3 classes"):
        evaluate(**sets)


def test_classes_are_matched_by_name(sets, tmp_path):
    """A held-out folder without one class: its second class is the reference's third, and so is its diversity."""
    held_out = tmp_path / "two"
    for index, image in enumerate(pixels(12, 1)):
        path = held_out / ("class0" if index % 2 else "class2") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    report = evaluate(**{**sets, "held_out": str(held_out)})
    floor, mine = report["rows"]
    assert [value is None for value in floor["within_class_diversity_by_class"]] == [False, True, False]
    assert [value is None for value in mine["within_class_diversity_by_class"]] == [False, True, False]
    assert "held_out has 2 of the 3 classes of reference, not 'class1'" in notes(report)
    assert "samples.mine have no names and are matched by position: 0 is taken for 'class0'" in notes(report)

    (held_out / "class2").rename(held_out / "other")
    message = r"held_out: 1 of the 2 classes of .*two' are not among the 3 of reference, such as 'other'"
    with pytest.raises(ValueError, match=message):
        evaluate(**{**sets, "held_out": str(held_out)})


def test_the_report_is_json_of_any_reader(sets):
    """No NaN and no Infinity, also from a run.json that has them; what is null says why."""
    run = Path(sets["samples"]["mine"]).parent / "run.json"
    run.write_text('{"images_per_second": Infinity, "sampler": {"temperature": NaN, "steps": [1, -Infinity]}}')
    report = evaluate(**sets)
    assert report["rows"][1]["sampling"] == {
        "images_per_second": None,
        "sampler": {"temperature": None, "steps": [1, None]},
    }

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is no JSON")

    text = (Path(sets["output"]) / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == report
    assert "rows[1].sampling.images_per_second is inf" in notes(report)
    assert "rows[1].sampling.sampler.steps[1] is -inf" in notes(report)


@pytest.mark.parametrize("text", ["{", "[1]", '{"images_per_second": "fast"}'])
def test_a_broken_run_json_is_named(sets, text):
    run = Path(sets["samples"]["mine"]).parent / "run.json"
    run.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json'"):
        evaluate(**sets)


def test_a_class_without_differences_has_no_ratio(sets, tmp_path):
    """Real images of a class that are all equal: no infinite diversity."""
    images = pixels(12, 1)
    images[::3] = images[0]
    sets["held_out"] = save_folder(tmp_path / "equal", images, np.arange(12) % 3)
    report = evaluate(**sets)
    assert [value is None for value in report["rows"][1]["within_class_diversity_by_class"]] == [True, False, False]
    assert report["rows"][1]["within_class_diversity"] > 0
    assert "mean over 2 of 3 classes" in notes(report)


def test_broken_images_are_counted_in_the_report(sets, tmp_path):
    for name in ("reference", "held_out"):
        sets[name] = save_folder(tmp_path / f"many_{name}", pixels(300, 0), np.arange(300) % 3)
        (Path(sets[name]) / "class0" / "000.png").write_bytes(b"broken")
    report = evaluate(**{**sets, "num_images": None, "samples": {}})
    assert "reference: 1 broken images were left out" in notes(report)
    assert "held-out real images: 1 broken images were left out, 299 measured" in notes(report)
    assert report["reference"]["count"] == 299


def test_an_image_that_cannot_be_opened_is_one_of_the_broken(sets, tmp_path):
    sets["reference"] = save_folder(tmp_path / "many", pixels(300, 0), np.arange(300) % 3)
    folder = open_image_set(sets["reference"], 8)
    (Path(sets["reference"]) / "class0" / "000.png").unlink()
    with pytest.raises(UndecodableImage):
        next(iter(folder.stream()))[1]()
    assert len(folder.fingerprint()) == 64


def test_why_precision_is_missing_is_said(sets, tmp_path):
    features = numpy_features(pixels(24, 0))
    Moments(torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features.T))).save(tmp_path / "moments.npz")
    report = evaluate(**{**sets, "reference": str(tmp_path / "moments.npz")})
    assert "precision and recall are not measured: the reference is a file of moments" in notes(report)
    report = evaluate(**{**sets, "num_images": 3, "output": str(tmp_path / "few")})
    assert "they need more than k = 3 images in every set" in notes(report)


def test_features_that_are_not_finite_name_their_set(sets):
    class Broken(Means):
        def extract(self, images: Tensor) -> Tensor:
            return super().extract(images) / 0

    with pytest.raises(ValueError, match=r"Means gives features of .*reference' that are not finite"):
        evaluate(**{**sets, "extractor": Broken()})


def test_a_reference_with_nan_is_refused_by_name(sets, tmp_path):
    np.savez(tmp_path / "nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    with pytest.raises(ValueError, match=r"nan\.npz'.*not finite"):
        evaluate(**{**sets, "reference": str(tmp_path / "nan.npz")})


@pytest.mark.parametrize(("name", "words"), [("accelerator", "abacus"), ("lpips_weights", "lpips_weights measure")])
def test_settings_that_can_have_no_effect(name: str, words: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": {"a": "a.npz"}, "num_images": 8, "image_size": 8, name: "abacus"}
    with pytest.raises(ValueError, match=words):
        evaluate("nowhere", str(tmp_path), **settings)


def several_runs(sets: dict, tmp_path: Path, name: str, seeds: range, darker: int) -> list[str]:
    labels = np.arange(12) % 3
    paths = []
    for seed in seeds:
        paths.append(save_npz(tmp_path / f"{name}{seed}" / "samples.npz", pixels(12, seed) // darker, labels))
        run = {"network_calls": 8, "images_per_second": 2.0 + seed, "sampler": {"class_path": name}}
        (tmp_path / f"{name}{seed}" / "run.json").write_text(json.dumps(run))
    return paths


def test_a_row_of_several_runs_has_a_mean_and_a_spread(sets, tmp_path):
    near = several_runs(sets, tmp_path, "near", range(10, 13), 1)
    also = several_runs(sets, tmp_path, "also", range(20, 22), 1)
    dark = several_runs(sets, tmp_path, "dark", range(30, 33), 4)
    sets["samples"] = {"near": near, "also": also, "dark": dark, **sets["samples"]}
    report = evaluate(**sets)
    rows = report["rows"]
    assert [(row["name"], row["run"], row["source"]) for row in rows] == [
        ("held-out real images", 1, sets["held_out"]),
        *(("near", run, path) for run, path in enumerate(near, start=1)),
        *(("also", run, path) for run, path in enumerate(also, start=1)),
        *(("dark", run, path) for run, path in enumerate(dark, start=1)),
        ("mine", 1, sets["samples"]["mine"]),
    ]
    assert set(report["spread"]) == {"near", "also", "dark"}
    distances = [row["FD-Means"] for row in rows if row["name"] == "near"]
    found = report["spread"]["near"]["FD-Means"]
    assert found["values"] == distances and found["mean"] == pytest.approx(np.mean(distances))
    assert found["standard_deviation"] == pytest.approx(np.std(distances, ddof=1))
    differences = {tuple(pair["rows"]): pair["figures"] for pair in report["differences"]}
    assert set(differences) == {("near", "also"), ("near", "dark"), ("also", "dark")}
    assert not differences["near", "dark"]["FD-Means"]["within_the_spread"]
    assert differences["near", "also"]["FD-Means"]["within_the_spread"]

    text = (Path(sets["output"]) / "report.md").read_text()
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.split("\n\n")[0].split("\n")
    }
    header = lines["images of"]
    cells = {name: dict(zip(header, cells, strict=True)) for name, cells in lines.items()}
    assert [cells[name]["runs"] for name in ("held-out real images", "near", "also", "mine")] == ["1", "3", "2", "1"]
    assert cells["near"]["FD-Means"] == f"{np.mean(distances):.2f} ± {np.std(distances, ddof=1):.2f}"
    assert cells["near"]["network calls"] == "8" and cells["near"]["images/s"] == "13.0 ± 1.0"
    assert "±" not in "".join(lines["held-out real images"] + lines["mine"])
    assert f"- near and dark: beyond the spread: FD-Means ({cells['near']['FD-Means']} and " in text
    assert "one run of each row" not in text and "mean ± sample standard deviation" in text


def test_one_run_of_each_row_shows_no_spread(sets, tmp_path):
    sets["samples"] = {"mine": [sets["samples"]["mine"]]}
    report = evaluate(**sets)
    text = (Path(sets["output"]) / "report.md").read_text()
    assert report["spread"] == {} and report["differences"] == []
    assert "one run of each row: the spread over training seeds is not measured" in text
    assert "| runs |" not in text and "±" not in text.split("\n\n")[0] and "Differences between rows" not in text


def test_runs_of_other_settings_are_no_seeds(sets, tmp_path):
    paths = several_runs(sets, tmp_path, "a", range(2), 1) + several_runs(sets, tmp_path, "b", range(1), 2)
    sets["samples"] = {"mine": paths}
    assert "mine: its runs differ in sampler, so their spread is not that of seeds" in notes(evaluate(**sets))
    sets["samples"] = {"mine": paths[:2]}
    assert "its runs differ" not in notes(evaluate(**sets))


def test_reconstructions_and_likelihoods_of_several_runs(
    sets, tmp_path, make_generator, make_grid_tokenizer, monkeypatch
):
    import discrete_lit.checkpoints as files

    def loaded(path: str) -> Any:
        kind, seed = path.split("-")
        torch.manual_seed(int(seed))
        tokenizer = make_grid_tokenizer(4, (8, 8))
        if kind == "tokenizer":
            tokenizer.decode = lambda tokens: torch.full((len(tokens), 3, 8, 8), 0.1 * int(seed))
            return tokenizer
        return make_generator(kind, 4, (8, 8), 3, spread=0.5 * int(seed), tokenizer=tokenizer, image_size=8)

    monkeypatch.setattr(files, "load", loaded)
    sets["samples"] = {"mine": several_runs(sets, tmp_path, "a", range(2), 1)}
    sets["reconstructions"] = {"tokenizer": ["tokenizer-1", "tokenizer-2"]}
    report = evaluate(**sets, likelihoods={"mine": ["autoregressive-1", "autoregressive-2"]})
    mine = [row["likelihood"] for row in report["rows"] if row["name"] == "mine"]
    assert [found["checkpoint"] for found in mine] == ["autoregressive-1", "autoregressive-2"]
    nats = [found["nats"] for found in mine]
    assert nats[0] != nats[1] and report["spread"]["mine"]["-log p (nats)"]["values"] == nats
    text = (Path(sets["output"]) / "report.md").read_text()
    assert f" {np.mean(nats):,.1f} ± {np.std(nats, ddof=1):,.1f} |" in text
    made = [row["reconstruction"]["psnr"] for row in report["rows"] if row["name"] == "tokenizer"]
    assert made[0] != made[1] and report["spread"]["tokenizer"]["PSNR"]["values"] == made
    assert f"| tokenizer |    2 | {np.mean(made):.2f} ± {np.std(made, ddof=1):.2f} |" in text
    with pytest.raises(ValueError, match=r"likelihoods\.mine has 1 checkpoints, samples\.mine has 2 runs"):
        evaluate(**sets, likelihoods={"mine": "autoregressive-1"})


def test_runs_that_are_none_or_the_same_are_refused(sets):
    mine = sets["samples"]["mine"]
    with pytest.raises(ValueError, match=r"samples\.mine is empty: give a path, or a list"):
        evaluate(**{**sets, "samples": {"mine": []}})
    with pytest.raises(ValueError, match=r"samples\.mine has .*samples\.npz' 2 times"):
        evaluate(**{**sets, "samples": {"mine": [mine, mine]}})
    with pytest.raises(ValueError, match=r"reconstructions\.t has 'a\.ckpt' 2 times"):
        evaluate(**sets, reconstructions={"t": ["a.ckpt", "a.ckpt"]})
