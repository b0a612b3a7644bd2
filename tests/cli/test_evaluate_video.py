"""`discrete-lit evaluate_video`: reconstructions, continuations and samples beside real clips, and what is refused."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_runs import QUIET
from helpers.video import write_videos
from torch import Tensor

import discrete_lit
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.commands import main
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.data import VideoClips
from discrete_lit.evaluation.classifier import ClassifierFeatures, load_classifier
from discrete_lit.evaluation.clip_measures import classes_of
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import FeatureMoments
from discrete_lit.metrics.video import ClipFeatures, VideoFidelity

SIZE = (5, 16, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders of clips, a tokenizer of them, a classifier that was fitted to them, and clips as `sample` writes."""
    root = tmp_path_factory.mktemp("clips")
    folders = {
        split: write_videos(root / split, count=8, frames=frames) for split, frames in (("train", 7), ("validation", 6))
    }
    network = {
        "class_path": "discrete_lit.tokenizers.networks.LowResolutionAutoencoder",
        "init_args": {"image_channels": 1, "widths": [4, 4], "decoder_widths": [4, 4, 4], "time_levels": [1]},
    }
    tokenizer = {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"levels": [4, 3], "network": network}}
    save(instantiate(tokenizer), root / "tokenizer.ckpt")
    settings = {
        "model": {
            "class_path": "ImageClassifier",
            "init_args": {
                "num_classes": 2,
                "channels": [4, 6],
                "image_channels": 1,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "VideoClips", "init_args": data_settings(folders)},
        "run_dir": str(root / "classifier"),
        "trainer": {**QUIET, "max_steps": 2, "val_check_interval": 1},
    }
    (root / "classifier.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(root / "classifier.yaml")])
    random = np.random.default_rng(0)
    clips = random.integers(0, 255, (6, *SIZE, 1), dtype=np.uint8)
    np.savez(root / "samples.npz", arr_0=clips, labels=np.array([0, 1, 2, 0, 1, 2]))  # 2 is no class
    classifier = root / "classifier" / "checkpoints" / "last.ckpt"
    return {**folders, "tokenizer": root / "tokenizer.ckpt", "classifier": classifier, "samples": root / "samples.npz"}


def data_settings(folders: dict[str, Path]) -> dict[str, Any]:
    splits = {split: str(folders[split]) for split in ("train", "validation")}
    return {**splits, "image_size": list(SIZE), "image_channels": 1, "batch_size": 4, "num_workers": 0}


def evaluate(made: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "data": {"class_path": "VideoClips", "init_args": data_settings(made)},
        "output": str(output),
        "num_clips": 6,
        "extractor": {"class_path": "ClassifierFeatures", "init_args": {"checkpoint": str(made["classifier"])}},
        "classifier": str(made["classifier"]),
        "accelerator": "cpu",
        "reconstructions": {"reconstructed": str(made["tokenizer"])},
        "continuations": {"continued": str(made["samples"])},
        "samples": {"drawn": str(made["samples"])},
        **changes,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.yaml").write_text(yaml.safe_dump(settings))
    main(["evaluate_video", "--config", str(output / "settings.yaml")])
    return json.loads((output / "report.json").read_text())


def real(made: dict[str, Path], split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
    batches = list(VideoClips(**data_settings(made)).evaluation_loader(split, 0, 1))
    return torch.cat([each["video"] for each in batches]), torch.cat([each["label"] for each in batches])


def test_every_figure_is_that_of_its_definition(made: dict[str, Path], tmp_path: Path) -> None:
    report = evaluate(made, tmp_path, lpips_weights="random")
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["kind"] for row in report["rows"]] == ["real", "reconstructions", "continuations", "samples"]
    assert all(row["count"] == 6 for row in rows.values()) and report["reference_count"] == 8
    reference, _ = real(made, "train")
    originals, labels = (each[:6] for each in real(made, "validation"))
    tokenizer: Any = discrete_lit.load(made["tokenizer"])
    with torch.no_grad():
        ids = tokenizer.encode(from_uint8(originals))
        reconstructed = to_uint8(tokenizer.decode(ids))
    with np.load(made["samples"]) as file:
        drawn, classes = torch.from_numpy(file["arr_0"]).movedim(-1, 1), torch.from_numpy(file["labels"])

    features = ClipFeatures(ClassifierFeatures(str(made["classifier"])))
    assert features.dim == 12 and features.metric_name.startswith("FD-classifier-")

    def moments(clips: Tensor) -> Any:
        sums = FeatureMoments(features)
        sums.update(features(clips))
        return sums.compute()

    classifier = load_classifier(made["classifier"])
    for name, clips, shown in (
        ("real clips", originals, labels),
        ("reconstructed", reconstructed, labels),
        ("continued", drawn, classes),
        ("drawn", drawn, classes),
    ):
        (distance,) = rows[name]["distances"]
        assert distance["metric"] == features.metric_name
        assert distance["value"] == pytest.approx(frechet_distance(moments(clips), moments(reference)), rel=1e-4)
        known = shown < 2
        right = float((classes_of(classifier, clips) == shown)[known].double().mean())
        assert rows[name]["accuracy"] == pytest.approx(right)
    for name, clips in (("reconstructed", reconstructed), ("continued", drawn)):
        fidelity = VideoFidelity(5)
        fidelity.update(clips, originals)
        expected = fidelity.compute()
        found = rows[name]["fidelity"]
        assert found["psnr_by_frame"] == pytest.approx(expected.psnr_by_frame)
        assert len(found["lpips_by_frame"]) == 5 and np.mean(found["lpips_by_frame"]) == pytest.approx(found["lpips"])
        assert found["lpips"] > 0
        assert found["temporal_difference"] == pytest.approx(expected.temporal_difference)
    assert rows["reconstructed"]["usage"] == pytest.approx(len(ids.unique()) / 12)
    assert rows["drawn"]["fidelity"] is None and rows["continued"]["usage"] is None
    table = (tmp_path / "report.md").read_text()
    assert (
        "PSNR of frame" in table
        and "LPIPS of frame" in table
        and f"{rows['reconstructed']['fidelity']['psnr']:.2f}" in table
    )


def test_the_class_of_a_clip_is_that_of_all_its_frames(made: dict[str, Path]) -> None:
    """One frame of five says another class: the mean log-probability decides, and the mean logit does not."""

    class Sure(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            bright = images.mean(dim=(1, 2, 3))[:, None]
            return torch.where(bright > 0.5, torch.tensor([[60.0, 62.0]]), torch.tensor([[1.0, 0.0]]))

    clips = torch.zeros(1, 1, 5, 8, 8, dtype=torch.uint8)
    clips[:, :, :1] = 255
    assert classes_of(Sure(), clips).tolist() == [0]  # type: ignore[arg-type]
    clips[:, :, :3] = 255
    assert classes_of(Sure(), clips).tolist() == [1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstructions": None, "continuations": None, "samples": None}, "nothing to measure"),
        ({"num_clips": 9}, "num_clips=9 must lie between 1 and the 8"),
        ({"num_clips": 7}, "has 6 clips, 7 are measured"),
        ({"samples": {"reconstructed": "SAMPLES"}}, "two rows of the table have the same name"),
        ({"samples": {"drawn": "nowhere.npz"}}, "does not exist"),
        ({"reconstructions": {"made": "CLASSIFIER"}}, "ImageClassifier, not a Tokenizer"),
        ({"classifier": "TOKENIZER"}, "holds no usable ImageClassifier"),
        ({"i3d_weights": "i3d.pt"}, "at least 9 frames, these have 5"),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], message: str, made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: named(each) for name, each in value.items()}
        return str(made[value.lower()]) if isinstance(value, str) and value.lower() in made else value

    with pytest.raises(SystemExit) as stopped:
        evaluate(made, tmp_path, **named(changes))
    assert stopped.value.code == 2 and message in capfd.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_clips_of_another_size_are_refused(
    made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((6, 5, 8, 9, 1), np.uint8))
    with pytest.raises(SystemExit):
        evaluate(made, tmp_path, samples={"drawn": str(tmp_path / "other.npz")})
    assert "must hold uint8 clips arr_0 (N, 5, 16, 16, 1), got uint8 (6, 5, 8, 9, 1)" in capfd.readouterr().err
