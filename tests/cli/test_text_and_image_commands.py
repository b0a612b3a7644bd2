"""Commands of a model of text and image: prompts and thoughts to pictures, pictures to captions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_weights import randomise
from helpers.tiny_runs import run, write_settings
from PIL import Image

import discrete_lit
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.tokenizers import TextTokenizer


def model_settings(**settings: Any) -> dict[str, Any]:
    """A model of 2x4 grey pixels of two levels, and of texts of at most four letters."""
    return {
        "tokenizer": {
            "class_path": "discrete_lit.tokenizers.PixelLevels",
            "init_args": {"levels": 2, "image_channels": 1},
        },
        "image_size": [2, 4],
        "text_tokenizer": TextTokenizer.characters("abw+").config(),
        "text_length": 6,
        "backbone": {
            "class_path": "discrete_lit.backbones.SegmentTransformer",
            "init_args": {"width": 16, "depth": 1, "heads": 2},
        },
        **settings,
    }


def write_model(path: Path, **settings: Any) -> Path:
    made = instantiate({"class_path": "discrete_lit.generators.Unified", "init_args": model_settings(**settings)})
    save(randomise(made, 0.5), path)
    return path


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("unified") / "unified.ckpt")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    return write_model(folder / "unified.ckpt", order="text_first", thought_length=5)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("thinks", [False, True])
def test_fit_shows_samples_of_the_captions(thinks: bool, photos: Path, tmp_path: Path) -> None:
    """From a folder with captions, by `fit`, to a grid of samples and a checkpoint that draws."""
    for file in photos.glob("*.png"):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "train" / file.name).with_suffix(".txt").write_text(f"a+b{'=w' * thinks}\n")
    more = {"order": "text_first", "thought_length": 4} if thinks else {}
    data = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "train"), "image_size": [2, 4]}
    data |= {"image_channels": 1, "batch_size": 3, "num_workers": 0, "captions": {"kind": "txt"}, "labels": False}
    grid = {"class_path": "SampleGrid", "init_args": {"count": 4, "columns": 2, "save_png": True}}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    settings = {
        "model": {"class_path": "Unified", "init_args": {**model_settings(**more), "optimizer": optimizer}},
        "data": {"class_path": "ImageFolder", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": [grid]}
        | {"enable_model_summary": False, "num_sanity_val_steps": 0},
    }
    file = write_settings(tmp_path / "fit.yaml", settings)
    run("fit", "--config", file, "--run_dir", tmp_path / "run")
    with Image.open(next((tmp_path / "run").rglob("samples-*.png"))) as shown:
        assert shown.width > 8
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    record = sample(checkpoint, tmp_path / "samples", "--prompt", "a+b", "--num_samples", 2)
    assert (record["thoughts"] is not None) == thinks


def sample(checkpoint: Path, output: Path, *arguments: Any) -> dict[str, Any]:
    run("sample", "--ckpt_path", checkpoint, "--output", output, "--accelerator", "cpu", *arguments)
    return json.loads((output / "run.json").read_text())


def pixels(output: Path) -> np.ndarray:
    with np.load(output / "samples.npz") as file:
        return file["arr_0"]


SAMPLER = '{"class_path": "SegmentSampler", "init_args": {"settings": {"image": {"guidance_scale": 2.0}}}}'


def test_prompts_are_drawn_and_stand_in_the_record(both_ways: Path, tmp_path: Path) -> None:
    given = ("--prompt", "ab", "--prompt", "w", "--num_samples", 5, "--batch_size", 2)
    record = sample(both_ways, tmp_path / "one", *given)
    assert record["prompts"] == ["ab", "w"] and record["thoughts"] is None and record["generator"] == "Unified"
    assert record["flops_per_image"] > 0 and record["network_calls"] == 8
    generator: Any = discrete_lit.load(both_ways)
    expected = generator.tokenizer.decode(generator.sample(generator.captions_of(["ab", "w", "ab", "w", "ab"])))
    assert np.array_equal(pixels(tmp_path / "one")[:, :, :, 0], (expected[:, 0].numpy() > 0) * 255)
    # Pictures of two rows are shown 16 times as large, under their texts.
    with Image.open(tmp_path / "one" / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid)[-32::16, 0:64:16, 0], pixels(tmp_path / "one")[1, :, :, 0])
    guided = sample(both_ways, tmp_path / "two", *given, "--sampler", SAMPLER, "--negative_prompt", "bb")
    assert guided["network_calls"] == 16 and guided["negative_prompt"] == "bb"


def test_thoughts_are_shown_and_can_be_given(thinking: Path, tmp_path: Path) -> None:
    given = ("--prompt", "a+b", "--prompt", "b+b", "--num_samples", 7)
    own = sample(thinking, tmp_path / "own", *given, "--batch_size", 3)
    generator: Any = discrete_lit.load(thinking)
    prompts = [("a+b", "b+b")[number % 2] for number in range(7)]
    assert own["thoughts"] == generator.think(generator.captions_of(prompts)) and own["given_thoughts"] is None
    assert len(set(own["thoughts"])) > 2
    forced = sample(thinking, tmp_path / "forced", *given, "--thought", "w")
    assert forced["thoughts"] == ["w"] * 7 and forced["given_thoughts"] == ["w"]
    each = sample(thinking, tmp_path / "each", *given, "--thought", "w", "--thought=aa")
    assert each["thoughts"] == ["w", "aa"] * 3 + ["w"]
    expected = generator.sample(generator.captions_of(prompts, thoughts=each["thoughts"]))
    assert np.array_equal(pixels(tmp_path / "each")[:, :, :, 0], expected.numpy() * 255)
    # They stand behind the prompts, in the grid.
    grids = []
    for name in ("forced", "each"):
        with Image.open(tmp_path / name / "grid.png") as grid:
            grids.append(np.asarray(grid))
    height = len(grids[0]) // 2
    assert np.array_equal(grids[0][: height - 32], grids[1][: height - 32])
    assert not np.array_equal(grids[0][height:-32], grids[1][height:-32])
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "draws what a text says: give --prompt"),
        (("--prompt", "abwab"), "here it is model.init_args.text_length"),
        (("--prompt", "xyz"), "which this vocabulary lacks"),
        (("--prompt", "a", "--thought", "b"), "this Unified has none"),
        (("--prompt", "a", "--negative_prompt", "b"), "negative_prompt is of guidance"),
        (("--prompt", "a", "--sampler", "MaskGITSampler"), "needs a SegmentSampler"),
    ],
)
def test_prompts_that_are_refused(
    both_ways: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sample(both_ways, tmp_path, "--num_samples", 1, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--thought", "abwa"), "here it is model.init_args.thought_length"),
        (("--prompt", "a", "--prompt", "b", *["--thought", "b"] * 3), "thought is given 3 times for 2 prompts"),
    ],
)
def test_thoughts_that_are_refused(
    thinking: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sample(thinking, tmp_path, "--num_samples", 1, *arguments)
    assert message in capsys.readouterr().err


def test_thoughts_are_of_models_that_think(
    generator_checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sample(generator_checkpoints["Masked"], tmp_path, "--num_samples", 1, "--thought", "5")
    assert "this Masked has none: a Unified has thoughts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of the model's size, one of them in a folder below."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    (folder / "more").mkdir()
    for number in range(7):
        file = folder / ("more" if number == 6 else "") / f"{number}.png"
        Image.fromarray(draw.randint(0, 2, (2, 4)).astype(np.uint8) * 255).save(file)
    return folder


def test_captions_are_written_and_printed(
    both_ways: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "captions.json"
    more = ("--accelerator", "cpu", "--batch_size", 3, "--seed", 4)
    run("caption", photos, "--ckpt_path", both_ways, "--output", output, *more)
    record = json.loads(output.read_text())
    generator: Any = discrete_lit.load(both_ways)
    files = [*(photos / f"{number}.png" for number in range(6)), photos / "more" / "6.png"]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    expected = generator.caption(torch.from_numpy(images).long() // 255, seed=4)
    assert list(record["captions"].items()) == [(str(file), text) for file, text in zip(files, expected, strict=True)]
    assert len(set(expected)) > 1 and record["seed"] == 4
    assert capsys.readouterr().out.splitlines()[-7:] == [f"{file}: {text}" for file, text in record["captions"].items()]
    # Files may be named too, as words in front or by the option, and a larger picture is resized where that is wanted.
    Image.new("L", (12, 10)).save(tmp_path / "large.png")
    named = ("caption", photos / "3.png", tmp_path / "large.png", "--images", photos / "1.png")
    run(*named, "--ckpt_path", both_ways, "--output", output, "--resize", "true", "--accelerator", "cpu")
    assert [Path(file).name for file in json.loads(output.read_text())["captions"]] == ["3.png", "large.png", "1.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (), "images is required"),
        (lambda folder: (folder / "nowhere.png",), "there is no file or folder"),
        (lambda folder: (folder / "empty",), "no images in"),
        (lambda folder: (folder / "large.png",), "has 10x12 pixels, height first, and this Unified models 2x4"),
        (lambda folder: (folder / "broken.png",), "broken.png cannot be read: cannot identify the image"),
    ],
)
def test_images_that_are_refused(
    both_ways: Path, tmp_path: Path, make: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    Image.new("L", (12, 10)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "captions.json"
    with pytest.raises(SystemExit):
        run("caption", *make(tmp_path), "--ckpt_path", both_ways, "--output", output, "--accelerator", "cpu")
    assert message in capsys.readouterr().err and not output.exists()


def test_models_that_write_no_captions_are_refused(
    thinking: Path,
    generator_checkpoints: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for checkpoint, message in (
        (thinking, "draws images of captions alone: train one with order: both"),
        (generator_checkpoints["Masked"], "holds a Masked, which writes no captions"),
    ):
        with pytest.raises(SystemExit):
            run("caption", photos, "--ckpt_path", checkpoint, "--output", tmp_path / "captions.json")
        assert message in capsys.readouterr().err
