"""Video by the commands: a tokenizer of clips, their tokens, generators, samples that play, and continuations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.tiny_runs import QUIET
from helpers.video import write_videos
from PIL import Image

SIZE = [5, 8, 8]
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}


def clips_settings(folder: Path) -> dict[str, Any]:
    arguments = {"train": str(folder), "validation": str(folder), "image_size": SIZE, "image_channels": 1}
    return {"class_path": "VideoClips", "init_args": {**arguments, "batch_size": 4, "num_workers": 0}}


def fit(settings: dict[str, Any], run: Path) -> Path:
    from discrete_lit.cli.commands import main

    settings = {**settings, "run_dir": str(run), "trainer": {**QUIET, "max_steps": 1, "val_check_interval": 1}}
    run.parent.mkdir(exist_ok=True)
    file = run.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(file)])
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips of 5x8x8 to 3x4x4 tokens of 12 ids: the tokenizer, the tokens of twelve clips, two generators."""
    from discrete_lit.cli.commands import main

    root = tmp_path_factory.mktemp("video")
    folder = write_videos(root / "clips", count=12)
    network = {
        "class_path": "ConvAutoencoder",
        "init_args": {
            "dims": 3,
            "causal": True,
            "image_channels": 1,
            "channels": 4,
            "multipliers": [1, 1],
            "blocks": 1,
            "attention": False,
            "norm_groups": 2,
        },
    }
    model = {"class_path": "FSQ", "init_args": {"levels": [4, 3], "network": network, "optimizer": OPTIMIZER}}
    data = clips_settings(folder)
    made = {"clips": folder, "tokenizer": fit({"model": model, "data": data}, root / "tokenizer")}
    for split in ("train", "validation"):
        where = ["--ckpt_path", str(made["tokenizer"]), "--data", json.dumps(data), "--split", split]
        main(["tokenize", *where, "--output", str(root / split), "--accelerator", "cpu"])
    made["tokens"] = root / "validation"
    for kind in ("Autoregressive", "Masked"):
        arguments = {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": str(made["tokenizer"])},
            },
            "image_size": SIZE,
            "num_classes": 2,
            "backbone": {
                "class_path": "Transformer",
                "init_args": {"width": 12, "depth": 1, "heads": 2, "positions": "rope_2d"},
            },
            "optimizer": OPTIMIZER,
        }
        arrays = {"train": str(root / "train"), "validation": str(root / "validation"), "batch_size": 4}
        settings = {
            "model": {"class_path": kind, "init_args": arguments},
            "data": {"class_path": "TokenArrays", "init_args": arrays},
        }
        made[kind] = fit(settings, root / kind)
    return made


def draw(checkpoint: Path, output: Path, *arguments: object) -> dict[str, Any]:
    from discrete_lit.cli.commands import main

    where = ["--ckpt_path", str(checkpoint), "--output", str(output), "--accelerator", "cpu"]
    main(["sample", *where, *map(str, arguments)])
    with np.load(output / "samples.npz") as file:
        return {**file, "run": json.loads((output / "run.json").read_text())}


def test_tokens_of_clips(runs: dict[str, Path]) -> None:
    tokens = np.load(runs["tokens"] / "tokens.npy")
    manifest = json.loads((runs["tokens"] / "manifest.json").read_text())
    assert tokens.shape == (12, 3, 4, 4) and manifest["image_size"] == SIZE and manifest["num_classes"] == 2


@pytest.mark.parametrize("kind", ["Autoregressive", "Masked"])
def test_samples_that_play(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    found = draw(runs[kind], tmp_path, "--num_samples", 6, "--batch_size", 4, "--frame_rate", 5)
    clips = found["arr_0"]
    assert clips.shape == (6, 5, 8, 8, 1) and found["labels"].tolist() == [0, 1] * 3
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (5 * 8, 6 * 8)
        assert np.array_equal(np.asarray(grid)[8:16, 16:24], clips[1, 2, ..., 0])
    with Image.open(tmp_path / "samples.gif") as gif:
        assert gif.size == (6 * 8, 8) and 1 <= gif.n_frames <= 5 and gif.info["duration"] % 200 == 0
    assert (tmp_path / "samples.mp4").stat().st_size > 0
    again = draw(runs[kind], tmp_path, "--num_samples", 3, "--batch_size", 3)
    assert np.array_equal(again["arr_0"], clips[:3])


@pytest.mark.parametrize(("kind", "positions"), [("Autoregressive", [0]), ("Masked", [0, 2])])
def test_clips_are_continued_and_filled_in(
    kind: str, positions: list[int], runs: dict[str, Path], tmp_path: Path
) -> None:
    """The first frame of pixels is that of the first frame of tokens; labels and rows begin again after the last."""
    import torch

    import discrete_lit

    tokens = np.load(runs["tokens"] / "tokens.npy").astype(np.int64)
    labels = np.load(runs["tokens"] / "labels.npy")
    arguments = ("--num_samples", 14, "--batch_size", 5, "--known", runs["tokens"])
    found = draw(runs[kind], tmp_path / "known", *arguments, "--known_positions", positions)
    generator: Any = discrete_lit.load(runs[kind])
    known = torch.from_numpy(np.resize(tokens, (14, 3, 4, 4)))
    assert found["labels"].tolist() == np.resize(labels, 14).tolist()
    drawn = torch.full_like(known, -1)
    drawn[:, positions] = known[:, positions]
    expected = generator.sample(torch.from_numpy(found["labels"]), known=drawn)
    assert torch.equal(expected[:, positions], known[:, positions]) and not torch.equal(expected, known)
    with torch.no_grad():
        pixels = discrete_lit.core.images.to_uint8(generator.tokenizer.decode(expected)).movedim(1, -1).numpy()
    assert np.abs(found["arr_0"].astype(int) - pixels.astype(int)).max() <= 1
    assert found["run"]["known_positions"] == positions


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("Autoregressive", ["--known_positions", "[1]"], "known must be the first tokens"),
        ("Masked", ["--known_positions", "[3]"], "known_positions=[3] must be some, and not all, of the 3 positions"),
        ("Masked", ["--known_positions", "[0, 1, 2]"], "must be some, and not all"),
        ("Masked", [], "are given together"),
        ("Masked", ["--known_positions", "[0]", "--image_size", "8"], "makes no images"),
    ],
)
def test_known_tokens_that_cannot_be(
    kind: str,
    arguments: list[str],
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        draw(runs[kind], tmp_path, "--num_samples", 2, "--known", runs["tokens"], *arguments)
    assert stopped.value.code == 2 and message in capfd.readouterr().err


def test_tokens_of_another_tokenizer(runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(runs["tokens"], tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "another"}))
    with pytest.raises(SystemExit):
        draw(runs["Masked"], tmp_path, "--num_samples", 2, "--known", tmp_path / "other", "--known_positions", "[0]")
    assert "were made by the tokenizer another" in capfd.readouterr().err


def test_grids_of_a_run_play(runs: dict[str, Path]) -> None:
    """In TensorBoard: strips of frames, and a GIF, of reconstructions and of samples."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, name in (("tokenizer", "reconstructions"), ("Masked", "samples")):
        (file,) = runs[run].parents[1].rglob("events.out.*")
        log = EventAccumulator(str(file.parent), size_guidance={"images": 0})
        log.Reload()
        assert {f"images/{name}", f"videos/{name}"} <= set(log.Tags()["images"])
        (event,) = log.Images(f"videos/{name}")
        assert event.encoded_image_string.startswith(b"GIF8")
