"""The way of audio on the command line: a codec is trained, tokens are made, a generator speaks, and goes on."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.sounds import audio_bytes, write_tones
from helpers.tiny_runs import QUIET

import discrete_lit
from discrete_lit.cli.commands import main

CODEC: dict[str, Any] = {
    "class_path": "EnCodec",
    "init_args": {
        "network": {"class_path": "SEANet", "init_args": {"filters": 4, "ratios": [4, 2]}},
        "codebook_size": 8,
        "code_dim": 4,
        "depth": 2,
        "sample_rate": 8000,
        "training_books": [1, 2],
        "spectral_windows": [32, 64],
        "adversarial_loss": {
            "class_path": "SpectrogramAdversarialLoss",
            "init_args": {
                "discriminator": {
                    "class_path": "MultiScaleSTFTDiscriminator",
                    "init_args": {"filters": 2, "windows": [32, 64]},
                }
            },
        },
        "balancer": {"class_path": "GradientBalancer"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
    },
}


def fit(folder: Path, model: dict[str, Any], data: dict[str, Any]) -> Path:
    """Fit two steps, with examples in TensorBoard; the checkpoint."""
    trainer = {**QUIET, "devices": 1, "max_steps": 2, "val_check_interval": 1}
    trainer["callbacks"] = [{"class_path": "AudioExamples", "init_args": {"count": 2}}]
    settings = {"run_dir": str(folder), "model": model, "data": data, "trainer": trainer}
    folder.parent.mkdir(exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(file)])
    return folder / "checkpoints" / "last.ckpt"


def tags(run: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for file in run.rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {*events.Tags()["audio"], *events.Tags()["images"]}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A codec, its tokens, and a generator of them, each made by its command."""
    folder = tmp_path_factory.mktemp("audio")
    write_tones(folder / "tones")
    clips = {"train": str(folder / "tones"), "validation": str(folder / "tones"), "sample_rate": 8000, "length": 256}
    data = {"class_path": "AudioClips", "init_args": {**clips, "batch_size": 4, "num_workers": 0}}
    codec = fit(folder / "codec", CODEC, data)
    settings = folder / "tokens.yaml"
    settings.write_text(yaml.safe_dump({"ckpt_path": str(codec), "data": data}))
    tokens = folder / "tokens"
    main(["tokenize", "--config", str(settings), "--split", "train", "--output", str(tokens), "--accelerator", "cpu"])
    model = {
        "class_path": "DelayedAutoregressive",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": str(codec)},
            },
            "image_size": [256],
            "num_classes": 2,
            "label_dropout": 0.1,
            "backbone": {
                "class_path": "Transformer",
                "init_args": {
                    **{"width": 16, "depth": 1, "heads": 2},
                    **{"positions": "sinusoidal", "conditioning": "added"},
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
    }
    arrays = {"train": str(tokens), "validation": str(tokens), "batch_size": 4, "num_workers": 0}
    generator = fit(folder / "speech", model, {"class_path": "TokenArrays", "init_args": arrays})
    return {"codec": codec, "tokens": tokens, "generator": generator, "tones": folder / "tones"}


def test_tokens_are_the_codecs(runs: dict[str, Path]) -> None:
    tokens, codec = np.load(runs["tokens"] / "tokens.npy"), discrete_lit.load(runs["codec"])
    assert tokens.shape == (8, 32, 2)
    from discrete_lit.data.audio_clips import decode_audio

    first = decode_audio((runs["tones"] / "high" / "1.wav").read_bytes(), 8000, channels=1)[:, 192:448]
    with torch.no_grad():
        assert np.array_equal(tokens[0], codec.encode(torch.from_numpy(first)[None])[0].numpy())


def test_examples_are_in_tensorboard(runs: dict[str, Path]) -> None:
    of_codec = tags(runs["codec"].parents[1])
    assert {"audio/original_0", "audio/reconstruction_1", "spectrograms/reconstruction_1"} <= of_codec
    assert {"audio/sample_1", "spectrograms/sample_0"} <= tags(runs["generator"].parents[1])


def sample(runs: dict[str, Path], output: Path, *more: str) -> Path:
    given = ["--ckpt_path", str(runs["generator"]), "--output", str(output), "--num_samples", "4"]
    main(["sample", *given, "--accelerator", "cpu", *more])
    return output


def test_samples_are_files_that_play(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = sample(runs, tmp_path, "--sampler", "DelaySampler", "--sampler.guidance_scale", "2")
    with np.load(folder / "samples.npz") as samples:
        clips = samples["audio"]
        assert clips.shape == (4, 256, 1) and clips.dtype == np.int16 and samples["sample_rate"] == 8000
        assert samples["labels"].tolist() == [0, 1, 0, 1]
    for number in range(4):
        with wave.open(str(folder / "clips" / f"{number:06d}.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
            assert np.array_equal(np.frombuffer(file.readframes(256), dtype="<i2"), clips[number, :, 0])
    assert (folder / "grid.png").is_file() and not (folder / "samples.txt").exists()


def test_clips_are_continued(runs: dict[str, Path], tmp_path: Path) -> None:
    """What is kept of the first frames is heard as it was: those before the last that later codes reach."""
    folder = sample(runs, tmp_path, "--known", str(runs["tokens"]), "--known_positions", str(list(range(10))))
    codec, tokens = discrete_lit.load(runs["codec"]), torch.from_numpy(np.load(runs["tokens"] / "tokens.npy"))
    with torch.no_grad():
        expected = codec.decode(tokens[:4, :10].long())[..., :80]
    with np.load(folder / "samples.npz") as samples:
        found = torch.from_numpy(samples["audio"]).movedim(-1, 1) / 32767
    assert (found[..., :80] - expected).abs().max() < 1e-4


def test_data_that_the_codec_was_not_made_for(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["tokenize", "--ckpt_path", str(runs["codec"]), "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    clips = ["--data", "AudioClips", "--data.train", str(runs["tones"]), "--data.length", "256"]
    for more, message in (
        ([*clips, "--data.batch_size", "2", "--data.sample_rate", "16000"], "the data have 16000 samples a second"),
        (
            [*clips, "--data.batch_size", "2", "--data.sample_rate", "8000", "--data.channels", "2"],
            "takes audio of 1 channels: set data.init_args.channels to that, it is 2",
        ),
        (
            ["--data", "ImageFolder", "--data.train", ".", "--data.image_size", "8", "--data.batch_size", "1"],
            "takes audio, and a ImageFolder has image: give data of that kind",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*given, *more])
        assert message in capsys.readouterr().err


def test_clips_are_measured_against_real_ones(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Real clips, each number of books and samples in one table; another sample rate, or too few clips, are refused."""
    drawn = sample(runs, tmp_path / "drawn", "--num_samples", "8") / "samples.npz"
    tones = str(runs["tones"])
    given = ["evaluate_audio", "--data", "AudioClips", "--data.train", tones, "--data.validation", tones]
    given += ["--data.length", "256", "--data.batch_size", "3", "--data.num_workers", "0", "--accelerator", "cpu"]
    given += ["--output", str(tmp_path / "report"), "--samples", json.dumps({"drawn": str(drawn)})]
    extractor = ["--extractor", "MelStatistics", "--extractor.sample_rate", "8000", "--extractor.window", "64"]
    extractor += ["--extractor.bands", "2", "--reconstructions", json.dumps({"codec": str(runs["codec"])})]
    main([*given, "--data.sample_rate", "8000", *extractor])
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["real clips", "codec, 1 books", "codec, 2 books", "drawn"]
    assert {row["metric"] for row in rows} == {"FAD-mel2-64"} and {row["count"] for row in rows} == {8}
    assert rows[2]["bits_per_second"] == 2 * rows[1]["bits_per_second"]
    assert abs(rows[0]["value"]) < 1e-6 < min(row["value"] for row in rows[1:])  # the real clips are the reference here
    with np.load(drawn) as samples:
        np.savez(drawn, audio=samples["audio"][:4], sample_rate=samples["sample_rate"])
    for more, message in (
        (["--data.sample_rate", "8000", "--num_clips", "8"], "has 4 clips, 8 are measured: set num_clips"),
        (["--data.sample_rate", "16000", "--num_clips", "4"], "has 8000 samples a second, the data have 16000"),
        (["--data.sample_rate", "16000", "--num_clips", "4", *extractor], "takes 8000 samples a second"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *more])
        assert message in capsys.readouterr().err


def write_bad(folder: Path) -> None:
    """Eight tones, of which one is silence, one shorter than a window, one cut off, and one holds a NaN."""
    write_tones(folder)
    silence, whole = np.zeros((640, 1), dtype=np.float32), (folder / "high" / "1.wav").read_bytes()
    holes = silence.copy()
    holes[7] = np.nan
    (folder / "low" / "0.wav").write_bytes(audio_bytes(silence, 8000))
    (folder / "low" / "2.wav").write_bytes(audio_bytes(silence[:3], 8000))
    (folder / "low" / "4.wav").write_bytes(whole[:500])
    (folder / "low" / "6.wav").write_bytes(audio_bytes(holes, 8000, subtype="FLOAT"))


def test_bad_clips_are_counted_or_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Silence and a short clip are coded and trained on; a cut file and a NaN end the run, or are replaced and told."""
    write_bad(tmp_path / "bad")
    given = ["--data", "AudioClips", "--data.train", str(tmp_path / "bad"), "--data.length", "256"]
    given += ["--data.sample_rate", "8000", "--data.batch_size", "2", "--data.num_workers", "0"]
    command = ["tokenize", "--ckpt_path", str(runs["codec"]), "--output", str(tmp_path / "tokens"), *given]
    with pytest.raises(SystemExit):
        main([*command, "--accelerator", "cpu"])
    assert "samples are bad" in capsys.readouterr().err
    clips = {"train": str(tmp_path / "bad"), "sample_rate": 8000, "length": 256, "batch_size": 4, "num_workers": 0}
    clips["validation"] = str(runs["tones"])
    data = {"class_path": "AudioClips", "init_args": {**clips, "max_bad_fraction": 0.3}}
    codec = discrete_lit.load(fit(tmp_path / "run", CODEC, data))
    assert all(value.isfinite().all() for value in codec.state_dict().values())
    assert "it is cut off" in caplog.text and "1 of its samples are not finite numbers" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--model.init_args.books", "3"], "this codec has 2 codebooks (depth), numbers of books are in 1..2"),
        (["--model.init_args.training_books", "[1, 3]"], "this codec has 2 codebooks (depth)"),
        (["--data.init_args.length", "16"], "clips of 16 samples are shorter than the shortest window, 32"),
        (["--data.init_args.sample_rate", "16000"], "the data have 16000 samples a second"),
        (["--data.init_args.channels", "2"], "this codec takes waveforms (B, 1, T) of T > 0 samples, got (4, 2, 256)"),
    ],
)
def test_settings_that_do_not_fit_each_other(
    runs: dict[str, Path], setting: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        recipe = runs["codec"].parents[1].with_suffix(".yaml")
        main(["fit", "--config", str(recipe), "--run_dir", str(tmp_path / "run"), *setting])
    assert message in capsys.readouterr().err
