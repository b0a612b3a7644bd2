"""`discrete-lit evaluate` on tiny sets, end to end: what the report says, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stored_images import pixels, save_folder, save_npz
from torch import Tensor

from discrete_lit.cli.commands import evaluate as verb
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.evaluation import feature_statistics as reference
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.frechet import Moments
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
    original = verb.measure
    for user in (verb, reference):
        monkeypatch.setattr(
            user, "measure", lambda *args, **kwargs: measured.append(kwargs["description"]) or original(*args, **kwargs)
        )
    assert evaluate(**sets)["rows"] == first
    assert measured == ["held-out real images", "mine"]
    other = Means()
    other.weights_sha256 = "b" * 64
    evaluate(**{**sets, "extractor": other})
    evaluate(**{**sets, "num_reference": 12})
    Path(sets["reference"], "class0", "000.png").unlink()
    evaluate(**sets)
    assert measured.count("reference") == 3


@pytest.mark.parametrize("suffix", ["npz", "features.npy"])
def test_a_broken_cache_is_computed_again(sets, suffix):
    first = evaluate(**sets)["rows"]
    (kept,) = Path(sets["output"]).glob(f"reference-*.{suffix}")
    kept.write_bytes(kept.read_bytes()[:100])
    assert evaluate(**sets)["rows"] == first


def test_a_reference_of_another_extractor_is_refused_before_anything_is_computed(sets, tmp_path, monkeypatch):
    Moments(torch.zeros(4).double(), torch.eye(4).double()).save(tmp_path / "moments.npz")
    for user in (verb, reference):
        monkeypatch.setattr(user, "measure", lambda *_, **__: pytest.fail("computed"))
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
        monkeypatch.setattr(reference, "MOST_FEATURES", most)
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


def test_samples_without_labels_need_no_classes(sets, tmp_path):
    sets["samples"] = {"plain": save_npz(tmp_path / "plain.npz", pixels(12, 2))}
    row = evaluate(**{**sets, "held_out": None})["rows"][0]
    assert row["within_class_diversity"] is None and row["FD-Means"] > 0


def test_few_images_are_noted(sets):
    assert evaluate(**{**sets, "num_images": 6})["notes"][0].startswith("samples: 6 images for 6 features")


def test_a_set_with_fewer_images_is_refused_before_anything_is_computed(sets, monkeypatch):
    for user in (verb, reference):
        monkeypatch.setattr(user, "measure", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"samples\.npz' has 12 images, num_images is 15"):
        evaluate(**{**sets, "num_images": 15, "held_out": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": {}, "held_out": None}, "nothing to evaluate"),
        ({"reconstructions": {"t": "t.ckpt"}, "held_out": None}, "give held_out"),
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
    assert "exact, of each part of its ids: bit_7 100.0% of 2, perplexity" in table
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
