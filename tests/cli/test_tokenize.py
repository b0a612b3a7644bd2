"""`discrete-lit tokenize`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise images, 8x8, in folders: 3, 4 and 5 of them."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(3 + label):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png")
    return root


def tokenize(checkpoint: Path, images: Path, output: Path, *arguments: object) -> None:
    from discrete_lit.cli.commands import main

    data = {
        "class_path": "discrete_lit.data.ImageFolder",
        "init_args": {"train": str(images), "image_size": 8, "batch_size": 5, "num_workers": 0},
    }
    where = ["--ckpt_path", str(checkpoint), "--data", json.dumps(data), "--output", str(output)]
    main(["tokenize", *where, "--accelerator", "cpu", *map(str, arguments)])


def test_every_row_is_the_encoding_of_its_image(tokenizer_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.images import from_uint8

    tokenize(tokenizer_checkpoint, images, tmp_path / "tokens")
    tokens = np.load(tmp_path / "tokens" / "tokens.npy")
    labels = np.load(tmp_path / "tokens" / "labels.npy")
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    tokenizer = discrete_lit.load(tokenizer_checkpoint)
    files = sorted(images.rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).movedim(-1, 1)
    with torch.no_grad():
        expected = tokenizer.encode(from_uint8(pixels)).numpy()
    assert tokens.dtype == np.uint16 and np.array_equal(tokens, expected)
    assert labels.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert manifest["tokenizer"] == tokenizer.fingerprint()
    assert manifest["token_shape"] == [4, 4] and manifest["vocab_size"] == 12 and manifest["num_classes"] == 3


def test_every_crop_is_encoded(tokenizer_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.images import from_uint8
    from discrete_lit.data.transforms import ten_crops

    tokenize(tokenizer_checkpoint, images, tmp_path / "tokens", "--crops", "ten", "--ten_crop_scales", "[1.5,1.25]")
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    tokens = np.load(tmp_path / "tokens" / "tokens.npy")
    assert manifest["variants"] == 20 and manifest["token_shape"] == [4, 4] and tokens.shape == (12, 20, 4, 4)
    tokenizer = discrete_lit.load(tokenizer_checkpoint)
    for row, file in enumerate(sorted(images.rglob("*.png"))):
        with Image.open(file) as image:
            crops = np.concatenate([ten_crops(image, 8, scale) for scale in (1.5, 1.25)])
        with torch.no_grad():
            expected = tokenizer.encode(from_uint8(torch.from_numpy(crops).movedim(-1, 1).contiguous()))
        np.testing.assert_array_equal(tokens[row], expected.numpy())
    assert np.unique(tokens[0].reshape(20, -1), axis=0).shape[0] > 5


def test_the_crop_of_evaluation_and_its_mirror_image(tokenizer_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    tokenize(tokenizer_checkpoint, images, tmp_path / "flip", "--crops", "flip")
    tokenize(tokenizer_checkpoint, images, tmp_path / "center")
    flip, center = (np.load(tmp_path / name / "tokens.npy") for name in ("flip", "center"))
    assert flip.shape == (12, 2, 4, 4) and np.array_equal(flip[:, 0], center) and not np.array_equal(flip[:, 1], center)


def test_a_generator_of_another_tokenizer_refuses_the_arrays(
    tokenizer_checkpoint: Path, generator_checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    import torch
    from lightning import Trainer

    import discrete_lit
    from discrete_lit.data import TokenArrays

    tokenize(tokenizer_checkpoint, images, tmp_path / "tokens")
    generator = discrete_lit.load(generator_checkpoints["Masked"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def validate() -> None:
        data = TokenArrays(None, str(tmp_path / "tokens"), batch_size=6, num_workers=0)
        trainer.validate(generator, data, verbose=False)

    validate()
    with torch.no_grad():
        next(generator.tokenizer.parameters()).add_(1)
    with pytest.raises(ValueError, match="make the tokens anew with `discrete-lit tokenize`"):
        validate()


def test_an_unreadable_image_leaves_no_array_that_passes_for_complete(
    tokenizer_checkpoint: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    victim = broken / "class1" / "2.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(SystemExit):
        tokenize(tokenizer_checkpoint, broken, tmp_path / "tokens")
    assert "class1/2" in capfd.readouterr().err
    assert not (tmp_path / "tokens" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "validation"], "no validation split"),
        (["--crops", "ten", "--ten_crop_scales", "[0.5]"], "ten_crop_scales is [0.5]; each must be in [1, 8]"),
        (["--split", "val"], "split must be 'train' or 'validation', got 'val'"),
    ],
)
def test_mistakes_are_refused(
    arguments: list,
    message: str,
    tokenizer_checkpoint: Path,
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit):
        tokenize(tokenizer_checkpoint, images, tmp_path / "tokens", *arguments)
    assert message in capfd.readouterr().err


def test_the_second_command_into_a_folder_is_refused(
    tokenizer_checkpoint: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from discrete_lit.core.locks import sole_writer

    folder = tmp_path / "tokens"
    with sole_writer(folder, "tokenize"):
        with pytest.raises(SystemExit) as stopped:
            tokenize(tokenizer_checkpoint, images, folder)
        assert stopped.value.code == 2
        assert f"{folder} is being written by" in capfd.readouterr().err
        assert [file.name for file in folder.iterdir()] == [".tokenize.lock"]
    tokenize(tokenizer_checkpoint, images, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["labels.npy", "manifest.json", "tokens.npy"]


def test_an_array_is_not_finished_by_who_lost_its_folder(
    tokenizer_checkpoint: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    from discrete_lit.cli import tokenize as command

    folder = tmp_path / "tokens"
    lock = folder / ".tokenize.lock"

    def taken_over(*arguments: Any, **settings: Any) -> Any:
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "token": "another", "host": "node7"}))
        return loader(*arguments, **settings)

    loader = command.EvaluationLoader
    monkeypatch.setattr(command, "EvaluationLoader", taken_over)
    with pytest.raises(SystemExit):
        tokenize(tokenizer_checkpoint, images, folder)
    assert "was taken over by" in (message := capfd.readouterr().err) and "node7" in message
    assert not (folder / "manifest.json").exists() and lock.exists()


def test_a_generators_checkpoint_is_refused(
    generator_checkpoints: dict[str, Path], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tokenize(generator_checkpoints["Masked"], images, tmp_path / "tokens")
    assert "holds a Masked, not a Tokenizer" in capfd.readouterr().err


@pytest.fixture(scope="module")
def klvae_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KLVAE of two channels on 4x4 grids of 8x8 images, whose latents are far from unit deviation."""
    import torch

    from discrete_lit.checkpoints import instantiate, save

    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
    }
    arguments = {"network": network, "latent_channels": 2, "kl_weight": 1e-6, "scale_factor": 20.0}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("klvae") / "klvae.ckpt"
    save(instantiate({"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": arguments}).eval(), path)
    return path


def pixels_of(images: Path) -> Any:
    import torch

    from discrete_lit.core.images import from_uint8

    files = sorted(images.rglob("*.png"))
    return from_uint8(torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).movedim(-1, 1))


@pytest.mark.parametrize("storage", ["moments", "sample"])
def test_latents_of_a_continuous_tokenizer(
    storage: str, klvae_checkpoint: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.random import CounterRandom
    from discrete_lit.data import LatentArrays

    given = ["--latents", storage, "--crops", "flip", "--seed", "3"]
    tokenize(klvae_checkpoint, images, tmp_path / "latents", *given)
    stored = torch.from_numpy(np.load(tmp_path / "latents" / "latents.npy"))
    tokenizer, pixels = discrete_lit.load(klvae_checkpoint), pixels_of(images)
    for variant, shown in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            random = CounterRandom(3, torch.arange(12) * 2 + variant)
            moments = torch.stack(tokenizer.moments(shown), dim=1)
            expected = moments if storage == "moments" else tokenizer.encode(shown, random)
        torch.testing.assert_close(stored[:, variant].float(), expected, rtol=1e-3, atol=1e-3)
    data = LatentArrays(str(tmp_path / "latents"), batch_size=6)
    data.check_tokenizer(tokenizer.fingerprint())
    assert data.latent_shape == tokenizer.latent_shape(8) == (2, 4, 4)
    assert next(iter(data.training_loader(0, 1)))["latents"].shape == (6, 2, 4, 4)
    # Its deviation is told where training would fail without a word.
    assert "latents must have about unit deviation, between 0.5 and 2.0" in caplog.text


@pytest.mark.parametrize("scale", ["factor", "channels"])
def test_the_scale_that_latents_need(scale: str, klvae_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.cli.commands import main
    from discrete_lit.core.random import CounterRandom

    data = {
        "class_path": "discrete_lit.data.ImageFolder",
        "init_args": {"train": str(images), "image_size": 8, "batch_size": 5, "num_workers": 0},
    }
    where = ["--ckpt_path", str(klvae_checkpoint), "--data", json.dumps(data), "--accelerator", "cpu"]
    main(["measure_latents", *where, "--scale", scale, "--output", str(tmp_path / "scaled.ckpt")])
    scaled = discrete_lit.load(tmp_path / "scaled.ckpt")
    assert (scaled.scale_factor == 1) == (scale == "channels")
    repeated = pixels_of(images).repeat(400, 1, 1, 1)
    with torch.no_grad():
        drawn = scaled.encode(repeated, CounterRandom(0, torch.arange(len(repeated))))
    if scale == "factor":
        assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    else:
        torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), torch.ones(2), rtol=0, atol=0.02)
        torch.testing.assert_close(drawn.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=0.02)
    # Images of the scaled latents are those of the same weights.
    first = discrete_lit.load(klvae_checkpoint)
    images_of = pixels_of(images)
    with torch.no_grad():
        torch.testing.assert_close(scaled.decode(scaled.encode(images_of)), first.decode(first.encode(images_of)))


def test_a_discrete_tokenizer_has_no_latents_to_measure(
    tokenizer_checkpoint: Path, images: Path, capfd: pytest.CaptureFixture
) -> None:
    from discrete_lit.cli.commands import main

    data = {"class_path": "discrete_lit.data.ImageFolder"}
    data["init_args"] = {"train": str(images), "image_size": 8, "batch_size": 5}
    with pytest.raises(SystemExit):
        main(["measure_latents", "--ckpt_path", str(tokenizer_checkpoint), "--data", json.dumps(data)])
    assert "holds a FSQ, not a KLVAE" in capfd.readouterr().err


WIDE = {
    "LFQ of 33 bits": ("LookupFreeQuantizer", {"bits": 33, "entropy_weight": 0.0}),
    "LFQ of 62 bits": ("LookupFreeQuantizer", {"bits": 62, "entropy_weight": 0.0}),
    "BSQ of 48 bits": ("BinarySphericalQuantizer", {"bits": 48}),
    "FSQ of 2^57 ids": ("FiniteScalarQuantizer", {"levels": [8] * 19}),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_ids_keep_every_bit(name: str, images: Path, tmp_path: Path) -> None:
    """From the images to the arrays, and from these to the codes that the decoder takes."""
    import torch

    from discrete_lit.checkpoints import instantiate, save
    from discrete_lit.core.images import from_uint8
    from discrete_lit.data import TokenArrays

    quantizer, settings = WIDE[name]
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1, 2], "blocks": 1, "attention": False, "norm_groups": 2},
    }
    arguments = {
        "network": network,
        "quantizer": {"class_path": f"discrete_lit.tokenizers.quantizers.{quantizer}", "init_args": settings},
    }
    torch.manual_seed(0)
    tokenizer = instantiate({"class_path": "discrete_lit.tokenizers.VQGAN", "init_args": arguments}).eval()
    save(tokenizer, tmp_path / "tokenizer.ckpt")
    tokenize(tmp_path / "tokenizer.ckpt", images, tmp_path / "tokens")
    data = TokenArrays(None, str(tmp_path / "tokens"), batch_size=12)
    tokens = next(iter(data.evaluation_loader("validation", 0, 1)))["tokens"]
    assert int(tokens.max()) >= 2**32 and data.vocab_size == tokenizer.vocab_size
    files = sorted(images.rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).movedim(-1, 1)
    with torch.no_grad():
        quantized = tokenizer.quantizer(tokenizer.latents(from_uint8(pixels)))
        assert torch.equal(tokenizer.quantizer.lookup(tokens), quantized.z_q)
        assert tokenizer.decode(tokens).isfinite().all()


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true", "bf16-mixed"])
def test_precision(precision: str, tokenizer_checkpoint: Path, images: Path, tmp_path: Path, monkeypatch) -> None:
    import torch

    from discrete_lit.tokenizers.networks import ConvAutoencoder

    expected = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}[precision.partition("-")[0]]
    seen: list = []
    monkeypatch.setattr(ConvAutoencoder, "encode", observed(ConvAutoencoder.encode, seen))
    tokenize(tokenizer_checkpoint, images, tmp_path / "t", "--precision", precision)
    assert set(seen) == {expected}
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["precision"] == precision
    tokenize(tokenizer_checkpoint, images, tmp_path / "exact")
    assert manifest["tokenizer"] == json.loads((tmp_path / "exact" / "manifest.json").read_text())["tokenizer"]
    same = np.load(tmp_path / "t" / "tokens.npy") == np.load(tmp_path / "exact" / "tokens.npy")
    assert same.mean() > (0.99 if precision == "64-true" else 0.8)


def test_the_manifest_says_what_the_automatic_precision_became(
    tokenizer_checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    from discrete_lit.core.auto_precision import resolve_precision

    tokenize(tokenizer_checkpoint, images, tmp_path / "t", "--precision", "auto", "--accelerator", "cpu")
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["precision"] == resolve_precision("auto", "cpu") != "auto"


def observed(method, seen: list):
    """The method, which notes the precision of what it gives."""

    def run(self, images):
        result = method(self, images)
        seen.append(result.dtype)
        return result

    return run
