"""Images that are not square and have one channel, through every command from the files to the report."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings
from PIL import Image
from torch import Tensor

from discrete_lit.metrics.extractors import FeatureExtractor

HEIGHT, WIDTH = SIZE = [16, 24]


class Means(FeatureExtractor):
    """Mean and standard deviation of each colour."""

    name = "Means"
    dim = 6
    protocol = "none"
    weights_sha256 = "a" * 64

    def extract(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, HEIGHT, WIDTH)
        values = images.double().flatten(2)
        return torch.cat((values.mean(2), values.std(2)), 1)


def image_folder(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"image_size": SIZE, "image_channels": 1, "batch_size": 4, "num_workers": 0, "flip": False}
    return {
        "class_path": "discrete_lit.data.ImageFolder",
        "init_args": {"train": str(folder), "validation": str(folder), **settings, **changes},
    }


def tokenizer_settings(data: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy(TOKENIZER) | {"data": data}
    settings["model"]["init_args"]["network"]["init_args"]["image_channels"] = 1
    return settings


def settings_on_tokens(tokenizer: Path, tokens: Path, size: list[int]) -> dict[str, Any]:
    settings = generator_settings(tokenizer)
    settings["model"]["init_args"]["image_size"] = size
    settings["model"]["init_args"]["backbone"]["init_args"]["positions"] = "rope_2d"
    settings["data"] = {
        "class_path": "discrete_lit.data.TokenArrays",
        "init_args": {"train": str(tokens), "batch_size": 4},
    }
    return settings


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight grey pictures of two classes, and the runs `tokenizer`, `tokens`, `generator` and `samples` from them."""
    root, random = tmp_path_factory.mktemp("chain"), np.random.default_rng(0)
    for number in range(8):
        file = root / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30), dtype=np.uint8)).save(file)
    data = image_folder(root / "images")
    fit = write_settings(root / "tokenizer.yaml", tokenizer_settings(data))
    run("fit", "--config", fit, "--run_dir", root / "tokenizer")
    tokenizer = root / "tokenizer" / "checkpoints" / "last.ckpt"
    where = ["--ckpt_path", tokenizer, "--data", json.dumps(data), "--output", root / "tokens"]
    run("tokenize", *where, "--accelerator", "cpu")
    fit = write_settings(root / "generator.yaml", settings_on_tokens(tokenizer, root / "tokens", SIZE))
    run("fit", "--config", fit, "--run_dir", root / "generator")
    generator = root / "generator" / "checkpoints" / "last.ckpt"
    where = ["--ckpt_path", generator, "--output", root / "samples", "--num_samples", 6, "--batch_size", 6]
    run("sample", *where, "--accelerator", "cpu")
    return root


def test_every_file_has_the_shape_of_the_images(chain: Path) -> None:
    manifest = json.loads((chain / "tokens" / "manifest.json").read_text())
    assert manifest["image_size"] == SIZE and manifest["token_shape"] == [HEIGHT // 2, WIDTH // 2]
    with np.load(chain / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (6, HEIGHT, WIDTH, 1) and samples["arr_0"].dtype == np.uint8
        first = samples["arr_0"][1]
    with Image.open(chain / "samples" / "grid.png") as grid:
        assert grid.mode == "L" and grid.size == (6 * WIDTH, HEIGHT)
        assert np.array_equal(np.asarray(grid)[:, WIDTH : 2 * WIDTH], first[..., 0])


def test_they_are_evaluated_against_a_reference_of_their_shape(chain: Path, tmp_path: Path) -> None:
    from discrete_lit.cli.evaluate import evaluate

    settings: dict[str, Any] = {
        "samples": {"mine": str(chain / "samples" / "samples.npz")},
        "held_out": str(chain / "images"),
        "reconstructions": {"fsq": str(chain / "tokenizer" / "checkpoints" / "last.ckpt")},
        "likelihoods": {"mine": str(chain / "generator" / "checkpoints" / "last.ckpt")},
        "num_images": 6,
        "extractor": Means(),
        "accelerator": "cpu",
    }
    report = evaluate(str(chain / "images"), str(tmp_path), image_size=(16, 24), image_channels=1, **settings)
    assert tuple(report["image_size"]) == (16, 24) and report["image_channels"] == 1
    text = (tmp_path / "report.md").read_text()
    assert "of 16x24 pixels, grey, repeated to three channels, against" in text
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["fsq"]["reconstruction"]["pixels"] == 16 * 24
    assert rows["mine"]["likelihood"]["tokens"] == 8 * 12
    for changes, message in (
        ({"image_size": [24, 16]}, "images of 16x24, image_size is 24x16"),
        ({"image_size": 16}, "images of 16x24, image_size is 16x16"),
        ({"image_channels": 3}, "reconstructions.fsq=.* takes images of 1 channels, image_channels is 3"),
        ({"image_channels": 4}, "images of 1 channels, image_channels is 4"),
        ({"image_channels": 2}, r"image_channels is 2; it must be 1 \(grey\), 3 \(RGB\) or 4"),
    ):
        shape: dict[str, Any] = {"image_size": SIZE, "image_channels": 1, **changes}
        with pytest.raises(ValueError, match=message):
            evaluate(str(chain / "images"), str(tmp_path), **shape, **settings)


def test_other_shapes_are_refused_by_name(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chain / "tokenizer" / "checkpoints" / "last.ckpt"
    turned = settings_on_tokens(tokenizer, chain / "tokens", [WIDTH, HEIGHT])
    coloured = tokenizer_settings(image_folder(chain / "images", image_channels=3))
    odd = tokenizer_settings(image_folder(chain / "images", image_size=[16, 25]))
    data = json.dumps(image_folder(chain / "images", image_channels=3))
    with pytest.raises(SystemExit):
        run("tokenize", "--ckpt_path", tokenizer, "--data", data, "--output", tmp_path / "tokens")
    assert "takes images of 1 channels: set data.init_args.image_channels to that" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    for number, (settings, message) in enumerate(
        (
            (turned, "the data has images of (16, 24) pixels, model.init_args.image_size is (24, 16)"),
            (coloured, "the images have 3 channels (shape (4, 3, 16, 24)), and the network of this FSQ was made for 1"),
            (odd, "image_size=25 is not a multiple of the down-sampling 2"),
        )
    ):
        with pytest.raises(SystemExit):
            file = write_settings(tmp_path / f"{number}.yaml", settings)
            run("fit", "--config", file, "--run_dir", tmp_path / str(number))
        assert message in capsys.readouterr().err


def test_samples_are_resized_to_any_shape(chain: Path, tmp_path: Path) -> None:
    where = ["--ckpt_path", chain / "generator" / "checkpoints" / "last.ckpt", "--output", tmp_path]
    run("sample", *where, "--num_samples", 2, "--accelerator", "cpu", "--image_size", "[8, 12]")
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_0"].shape == (2, 8, 12, 1)
    assert json.loads((tmp_path / "run.json").read_text())["image_size"] == [8, 12]
