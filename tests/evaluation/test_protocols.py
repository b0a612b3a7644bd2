"""Protocols by name: the number that they give, and every input that would make it another is refused by that name."""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.stored_images import pixels, save_folder, save_npz
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_full

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.evaluation.protocols import PROTOCOLS
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import Moments


class Inception(ColourMeans):
    """Stands for the network that FID is taken over."""

    name = "InceptionV3"

    @property
    def metric_name(self) -> str:
        return "FID"

    @property
    def dims(self) -> dict[str, int]:
        return {"pool": 6, "spatial": 3, "logits": 4}

    def extract_parts(self, images: Tensor, parts: Any) -> dict[str, Tensor]:
        corner = images[:, :, 0, 0].double()
        return {"pool": self.extract(images), "spatial": corner, "logits": torch.cat((corner, corner[:, :1]), 1) / 50}


def moments_of(images: np.ndarray) -> Moments:
    features = ColourMeans()(torch.from_numpy(images).movedim(-1, 1)).double()
    return Moments(features.mean(0), features.T.cov(), count=len(images))


def save_adm(path: Path, images: np.ndarray, **changes: Any) -> str:
    """A reference file as ADM publishes them: moments of a whole set, and some of its images."""
    moments = moments_of(images)
    arrays: dict[str, Any] = {"arr_0": images[:10], "mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    arrays |= {"mu_s": np.zeros(3), "sigma_s": np.eye(3), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return str(path)


@pytest.fixture
def adm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(PROTOCOLS, "gfid_adm50k", replace(PROTOCOLS["gfid_adm50k"], count=12))
    return {
        "reference": save_adm(tmp_path / "adm.npz", pixels(40, 0)),
        "output": str(tmp_path / "report"),
        "samples": {"mine": save_npz(tmp_path / "s.npz", pixels(12, 2) // 2, np.arange(12) % 3)},
        "image_size": 8,
        "extractor": Inception(),
        "protocol": "gfid_adm50k",
    }


def test_gfid_is_against_the_statistics_of_adms_file(adm: dict[str, Any]) -> None:
    report = evaluate(**adm)
    (row,) = report["rows"]
    samples = moments_of(pixels(12, 2) // 2)
    assert row["gfid_adm50k"] == pytest.approx(frechet_distance(samples, moments_of(pixels(40, 0))), rel=1e-6)
    assert report["protocol"] == report["metric"] == "gfid_adm50k"
    # Precision and recall are against its images.
    extractor = ColourMeans()
    features = [
        extractor(torch.from_numpy(images).movedim(-1, 1)) for images in (pixels(12, 2) // 2, pixels(40, 0)[:10])
    ]
    assert (row["precision"], row["recall"]) == pytest.approx(calculate_precision_recall_full(*features))
    assert row["record"]["labels"] == "4 of each of 3 classes"
    corners = torch.from_numpy((pixels(12, 2) // 2)[:, 0, 0]).double()
    spatial = Moments(corners.mean(0), corners.T.cov(), count=12)
    expected = frechet_distance(spatial, Moments(torch.zeros(3).double(), torch.eye(3).double()))
    assert row["sfid"] == pytest.approx(expected, rel=1e-6)
    # Ten consecutive splits of one or two images.
    probabilities = (torch.cat((corners, corners[:, :1]), 1) / 50).softmax(1)
    splits = [probabilities[split * 12 // 10 : (split + 1) * 12 // 10] for split in range(10)]
    assert all(1 <= len(split) <= 2 for split in splits)
    scores = [(split * (split / split.mean(0)).log()).sum(1).mean().exp() for split in splits]
    assert row["inception_score"] == pytest.approx(float(torch.stack(scores).mean()), rel=1e-6)
    text = (Path(adm["output"]) / "report.md").read_text()
    assert "| gfid_adm50k |" in text and "labels: 4 of each of 3 classes" in text and "(FID)" in text


def test_labels_of_samples_are_said(adm: dict[str, Any], tmp_path: Path) -> None:
    random = save_npz(tmp_path / "r.npz", pixels(12, 3), np.array([0] * 7 + [1] * 3 + [2] * 2))
    plain = save_npz(tmp_path / "p.npz", pixels(12, 3))
    rows = evaluate(**{**adm, "samples": {"random": random, "plain": plain}})["rows"]
    assert [row["record"]["labels"] for row in rows] == ["uneven: 2 to 7 of each of 3 of 3 classes", "no labels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu_s": None}, r"reference=.*adm\.npz' has no mu_s; ADM's file of the data set holds arr_0, mu, mu_s"),
        ({"arr_0": None}, r"adm\.npz' has no arr_0"),
        ({"arr_0": pixels(10, 0, 16)}, r"are \(10, 16, 16, 3\), image_size is 8x8: the statistics are of another crop"),
    ],
)
def test_a_reference_of_adm_that_is_none(adm: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    save_adm(tmp_path / "adm.npz", pixels(40, 0), **change)
    with pytest.raises(ValueError, match=f"protocol=gfid_adm50k: .*{message}"):
        evaluate(**adm)


def test_inputs_of_another_number_are_refused_by_name(adm: dict[str, Any], tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", pixels(24, 0), np.arange(24) % 3)
    few = save_npz(tmp_path / "few.npz", pixels(10, 2))
    for change, message in (
        ({"samples": {"mine": few}}, r"it is of 12 images a row, samples\.mine has 10"),
        ({"num_images": 10}, "it is of 12 images a row, num_images is 10"),
        ({"extractor": ColourMeans()}, "its extractor is InceptionV3, whose distance is called FID; .* FD-Means"),
        ({"reference": folder}, "its reference is ADM's file"),
        ({"apply_exif": True}, "image files are read as they are stored"),
        ({"protocol": "rfid_val50k", "num_images": 50_000}, "it is of reconstructions, 'mine' is of samples"),
        ({"protocol": "fd_dinov2"}, "its extractor is DINOv2"),
    ):
        with pytest.raises(ValueError, match=f"protocol={change.get('protocol', 'gfid_adm50k')}: {message}"):
            evaluate(**{**adm, **change})


@pytest.fixture
def validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_grid_tokenizer) -> dict[str, Any]:
    import discrete_lit.checkpoints as files

    tokenizer = make_grid_tokenizer(4, (8, 8))
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: torch.zeros(len(tokens), 3, 8, 8) + tokens.float().mean())
    monkeypatch.setattr(files, "load", lambda path: tokenizer)
    monkeypatch.setitem(PROTOCOLS, "rfid_val50k", replace(PROTOCOLS["rfid_val50k"], count=24))
    images = save_folder(tmp_path / "validation", pixels(24, 0), np.arange(24) % 3)
    return {
        "reference": images,
        "held_out": images,
        "output": str(tmp_path / "report"),
        "reconstructions": {"tokenizer": "t.ckpt"},
        "image_size": 8,
        "extractor": Inception(),
        "protocol": "rfid_val50k",
    }


def test_rfid_is_against_the_same_crops(validation: dict[str, Any], tmp_path: Path) -> None:
    floor, made = evaluate(**validation)["rows"]
    assert floor["rfid_val50k"] == pytest.approx(0, abs=1e-6) and made["rfid_val50k"] > 1
    assert made["record"]["checkpoint"] == "t.ckpt" and made["record"]["count"] == 24
    moments_of(pixels(24, 0)).save(tmp_path / "moments.npz")
    other = save_folder(tmp_path / "other", pixels(24, 5), np.arange(24) % 3)
    larger = save_folder(tmp_path / "larger", pixels(30, 0), np.arange(30) % 3)
    for change, message in (
        ({"reference": str(tmp_path / "moments.npz")}, "moments do not say their crop"),
        ({"reference": other}, "both sides are the same images, reference=.*other' and held_out=.*validation' are not"),
        (
            {"reference": larger},
            "its reference is all 24 validation images, reference=.* has 30, num_reference takes 30",
        ),
        ({"num_reference": 12}, "has 24, num_reference takes 12"),
    ):
        with pytest.raises(ValueError, match=f"protocol=rfid_val50k: .*{message}"):
            evaluate(**{**validation, **change})


def test_moments_of_an_unknown_network_are_refused(adm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = ColourMeans()
    extractor.name = "EffNetLite0"
    with pytest.raises(ValueError, match=r"protocol=fd_efficientnet: .*does not say which network its moments are of"):
        evaluate(**{**adm, "protocol": "fd_efficientnet", "extractor": extractor, "num_images": 12})
    known = moments_of(pixels(40, 0))
    known.extractor, known.weights_sha256 = extractor.name, extractor.weights_sha256
    known.save(Path(adm["output"]).parent / "known.npz")
    adm["reference"] = str(Path(adm["output"]).parent / "known.npz")
    report = evaluate(**{**adm, "protocol": "fd_efficientnet", "extractor": extractor, "num_images": 12})
    assert report["rows"][0]["fd_efficientnet"] > 0


def test_anyones_npz_is_read_and_ours_is_one_that_adms_evaluator_reads(adm: dict[str, Any], tmp_path: Path) -> None:
    """As ADM's evaluator does: `arr_0.npy` of the zip, uint8, C order, (N, H, W, 3), read row by row."""
    np.savez_compressed(tmp_path / "theirs.npz", pixels(12, 2) // 2, np.arange(12) % 3)
    ours, theirs = (
        evaluate(**{**adm, "samples": {"mine": path}})["rows"][0]
        for path in (adm["samples"]["mine"], str(tmp_path / "theirs.npz"))
    )
    assert ours["gfid_adm50k"] == theirs["gfid_adm50k"] and ours["record"]["labels"] == theirs["record"]["labels"]


@pytest.mark.parametrize("kind", ["truncated", "pickled", "labels are pickled"])
def test_broken_sample_files_are_named(adm: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.npz"
    if kind == "truncated":
        whole = Path(adm["samples"]["mine"]).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "pickled":
        np.savez(path, arr_0=np.array([pixels(1, 0)[0], None], dtype=object))
    else:
        np.savez(path, arr_0=pixels(12, 2), labels=np.array([None] * 12, dtype=object))
    with pytest.raises(ValueError, match=r"broken\.npz'"):
        evaluate(**{**adm, "samples": {"mine": str(path)}})


def test_an_npz_of_sample_is_what_adms_evaluator_reads(generator_npz: Path) -> None:
    with zipfile.ZipFile(generator_npz) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        rows = np.frombuffer(file.read(), dtype).reshape(shape)
    assert dtype == np.uint8 and not fortran and len(shape) == 4 and shape[3] == 3 and len(rows) == 5


@pytest.fixture
def generator_npz(make_generator, make_grid_tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import discrete_lit.cli.sample as command

    tokenizer = make_grid_tokenizer(4, (8, 8))
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: torch.zeros(len(tokens), 3, 8, 8))
    generator = make_generator("masked", 4, (8, 8), 3, tokenizer=tokenizer, image_size=8)
    monkeypatch.setattr(command, "load", lambda path: generator)
    (tmp_path / "g.ckpt").write_bytes(b"")
    command.sample(str(tmp_path / "g.ckpt"), str(tmp_path / "run"), num_samples=5, accelerator="cpu")
    return tmp_path / "run" / "samples.npz"
