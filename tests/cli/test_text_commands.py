"""The commands with text: captions to shards, to a tokenizer, to arrays, to a generator, to pictures of prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings
from PIL import Image

import discrete_lit
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.data.captions import Captions
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import ClassFolders
from discrete_lit.tokenizers import StaticTextEncoder, TextTokenizer

WORDS = ("dark coat", "bright boot")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captions")
    draw = np.random.RandomState(0)
    for number in range(8):
        file = root / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"a {WORDS[number % 2]}\n{WORDS[number % 2]} {number}\n")
    write_shards(ClassFolders(root / "images", captions=Captions()), root / "shards", split="train")
    return root / "shards"


def test_text_tokenizer_learns_the_captions_of_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    run("text_tokenizer", "--shards", shards, "--output", output, "--vocab_size", 290)
    said = capsys.readouterr().out
    made = TextTokenizer(str(output))
    assert made.fingerprint() in said and "16 captions of 8 images" in said
    assert made.vocab_size <= 290 and len(made.ids("a dark coat")) <= 4
    content = output.read_bytes()
    run("text_tokenizer", "--shards", shards, "--output", output, "--vocab_size", 290)
    assert output.read_bytes() == content


def test_text_tokenizer_refuses_shards_without_captions(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--captions.kind", "json"), "not one of 8 images"),
        (("--vocab_size", "100"), "vocab_size=100 is below 259"),
        (("--trust", "mine"), "--trust is of no use to `text_tokenizer`"),
        (("--output", str(tmp_path)), "is a folder: name a file"),
    ):
        with pytest.raises(SystemExit):
            run(*("text_tokenizer", "--shards", shards, "--output", tmp_path / "t", "--vocab_size", 290), *arguments)
        assert message in capsys.readouterr().err


def text_generator(tmp_path: Path, tokenizer: Path, **init_args: Any) -> dict[str, Any]:
    """Settings of a tiny Masked generator that reads captions by a table of vectors."""
    words = TextTokenizer.learn([f"a {text}" for text in WORDS], 280)
    encoder = StaticTextEncoder(words, 4, length=24)
    settings = generator_settings(tokenizer)
    settings["model"]["init_args"] |= {"num_classes": 1, "text_encoder": dict(encoder.hparams), **init_args}
    settings["model"]["init_args"]["backbone"]["init_args"]["context_dim"] = 4
    return settings


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.ckpt"
    save(instantiate(TOKENIZER["model"]), path)
    return path


@pytest.fixture(scope="module")
def fitted(shards: Path, image_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on token arrays that keep the captions of the shards."""
    root = tmp_path_factory.mktemp("fitted")
    data = {
        "class_path": "discrete_lit.data.ImageShards",
        "init_args": {
            "train": str(shards),
            "image_size": 8,
            "batch_size": 4,
            "num_workers": 0,
            "captions": {"kind": "txt"},
        },
    }
    encoded = {"ckpt_path": str(image_tokenizer), "data": data, "output": str(root / "tokens")}
    run("tokenize", "--config", write_settings(root / "tokenize.yaml", {**encoded, "accelerator": "cpu"}))
    settings = text_generator(root, image_tokenizer)
    settings["data"] = {
        "class_path": "discrete_lit.data.TokenArrays",
        "init_args": {"train": str(root / "tokens"), "validation": str(root / "tokens"), "batch_size": 4},
    }
    settings["trainer"]["limit_val_batches"] = 1
    grid = {
        "class_path": "discrete_lit.callbacks.SampleGrid",
        "init_args": {"count": 4, "columns": 2, "save_png": True},
    }
    settings["trainer"] |= {"callbacks": [grid], "val_check_interval": 2}
    run("fit", "--config", write_settings(root / "fit.yaml", settings), "--run_dir", root / "run")
    return root


def checkpoint_of(root: Path) -> Path:
    return next((root / "run").rglob("*.ckpt"))


def sample(checkpoint: Path, output: Path, *arguments: Any) -> dict[str, Any]:
    run("sample", "--ckpt_path", checkpoint, "--output", output, "--accelerator", "cpu", *arguments)
    return json.loads((output / "run.json").read_text())


def test_tokens_keep_captions_and_a_generator_learns_from_both(fitted: Path) -> None:
    lines = (fitted / "tokens" / "captions.jsonl").read_text().splitlines()
    assert len(lines) == 8 and all(json.loads(line)[0] in [f"a {text}" for text in WORDS] for line in lines)
    made = discrete_lit.load(checkpoint_of(fitted))
    words = TextTokenizer.learn([f"a {text}" for text in WORDS], 280)
    assert made.text_encoder.text_tokenizer.fingerprint() == words.fingerprint()
    assert list((fitted / "run").rglob("samples-*.png"))


def test_prompts_stand_in_the_record_and_decide_the_pictures(fitted: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(fitted)
    given = ("--prompt", "a dark coat", "--prompt=a bright boot", "--prompt", "")
    record = sample(checkpoint, tmp_path / "one", *given, "--num_samples", 7, "--batch_size", 3)
    assert record["prompts"] == ["a dark coat", "a bright boot", ""] and record["negative_prompt"] is None
    made = discrete_lit.load(checkpoint)
    texts = [record["prompts"][number % 3] for number in range(7)]
    expected = made.tokenizer.decode(made.sample(made.condition_of_texts(texts), seed=0))
    with np.load(tmp_path / "one" / "samples.npz") as file:
        found = torch.from_numpy(file["arr_0"]).movedim(-1, 1)
    assert (found.float() / 127.5 - 1 - expected).abs().max() < 0.02
    # A file has the same, and a row of the grid, with its text, for each.
    (tmp_path / "prompts.txt").write_text("a dark coat\n\na bright boot\n")
    other = sample(checkpoint, tmp_path / "two", "--prompt_file", tmp_path / "prompts.txt", "--num_samples", 4)
    assert other["prompts"] == ["a dark coat", "a bright boot"]
    with Image.open(tmp_path / "two" / "grid.png") as grid, np.load(tmp_path / "two" / "samples.npz") as file:
        pixels = np.asarray(grid)
        height = len(pixels) // 2
        assert height > 32 + 10  # pictures of 8 pixels are shown four times as large
        for row in range(2):
            strip = pixels[row * height : (row + 1) * height]
            shown = np.concatenate(file["arr_0"][row::2], axis=1).repeat(4, axis=0).repeat(4, axis=1)
            assert np.array_equal(strip[-32:, :64], shown)
            assert (strip[:-32] < 128).any()  # the text
        assert not np.array_equal(pixels[: height - 32], pixels[height:-32])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "draws what a text says: give --prompt"),
        (("--prompt", "a", "--prompt_file", "x"), "take one of them"),
        (("--prompt_file", "nowhere.txt"), "prompt_file='nowhere.txt': no such file"),
        (("--prompt", "long " * 30), "ids with its 2 special tokens, and the length is 24"),
        (("--prompt", "a", "--negative_prompt", "b"), "negative_prompt is of guidance"),
        (("--prompt", "a", "--graph", "true"), "texts are drawn without one"),
    ],
)
def test_prompts_that_are_refused(
    fitted: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sample(checkpoint_of(fitted), tmp_path, "--num_samples", 1, *arguments)
    assert message in capsys.readouterr().err


def test_a_negative_prompt_changes_the_pictures(fitted: Path, tmp_path: Path) -> None:
    guided = ("--prompt", "a dark coat", "--num_samples", 8, "--sampler", "MaskGITSampler")
    guided += ("--sampler.guidance_scale", 9)
    drawn = []
    for name, more in (("plain", ()), ("away", ("--negative_prompt", "a bright boot"))):
        record = sample(checkpoint_of(fitted), tmp_path / name, *guided, *more)
        assert record["negative_prompt"] == (more[1] if more else None)
        with np.load(tmp_path / name / "samples.npz") as file:
            drawn.append(file["arr_0"])
    assert drawn[0].shape == drawn[1].shape


@pytest.mark.parametrize("name", ["--prompt", "--prompt_file", "--negative_prompt"])
def test_a_prompt_for_a_model_without_text_is_refused(
    name: str,
    generator_checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        sample(generator_checkpoints["Masked"], tmp_path, "--num_samples", 1, name, "a dark coat")
    assert f"{name[2:]} is given, and this Masked reads no text" in capsys.readouterr().err


def test_a_run_on_images_without_captions_says_what_is_missing(
    image_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = text_generator(tmp_path, image_tokenizer)
    with pytest.raises(SystemExit):
        run("fit", "--config", write_settings(tmp_path / "fit.yaml", settings), "--run_dir", tmp_path / "run")
    assert "no caption, which this Masked reads: set data.init_args.captions" in capsys.readouterr().err
