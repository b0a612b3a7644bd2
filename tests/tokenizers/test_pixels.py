"""Pixels as tokens: levels and palettes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_runs import QUIET, run, write_settings

import discrete_lit
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.tokenizers import ColourPalette, PixelLevels
from discrete_lit.tokenizers.pixels import colour_clusters

PRIMARIES = [[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]


def every_level() -> torch.Tensor:
    """All 256 values in each channel, in another order in each: `(1, 3, 16, 16)` uint8."""
    levels = torch.arange(256, dtype=torch.uint8)
    return torch.stack((levels, levels.flip(0), levels.roll(100))).reshape(1, 3, 16, 16)


def test_levels_of_uint8_images_come_back() -> None:
    tokenizer = PixelLevels()
    pixels = every_level()
    tokens = tokenizer.encode(from_uint8(pixels))
    assert tokens.shape == (1, *tokenizer.token_shape(16)) == (1, 16, 16, 3) and tokens.dtype == torch.int64
    assert torch.equal(tokens[0].movedim(-1, 0), pixels[0].long())
    assert torch.equal(tokenizer.decode(tokens), from_uint8(pixels))
    assert tokenizer.embed(tokens).shape == (1, 1, 16, 16, 3)


def test_grey_images_come_back_and_colours_become_their_luma() -> None:
    tokenizer = PixelLevels(grey=True)
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    tokens = tokenizer.encode(from_uint8(grey))
    assert tokens.shape == (1, *tokenizer.token_shape(16)) == (1, 16, 16)
    assert torch.equal(tokenizer.decode(tokens), from_uint8(grey))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert tokenizer.encode(from_uint8(red)).item() == round(0.299 * 255)


@pytest.mark.parametrize("levels", [2, 3, 17])
def test_fewer_levels_are_spread_over_the_range(levels: int) -> None:
    tokenizer = PixelLevels(levels)
    values = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8)  # also outside the range
    images = tokenizer.decode(tokenizer.encode(values))
    assert images.unique().tolist() == pytest.approx(
        [2 * level / (levels - 1) - 1 for level in range(levels)], abs=1e-6
    )
    assert float((images - values.clamp(-1, 1)).abs().max()) <= 1 / (levels - 1) + 1e-6


def test_nearest_colour() -> None:
    tokenizer = ColourPalette(PRIMARIES)
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, *tokenizer.token_shape(4)) == (2, 4, 4)
    palette = torch.tensor(PRIMARIES)
    distances = (images.movedim(1, -1)[..., None, :] - palette).square().sum(dim=-1)
    assert torch.equal(tokens, distances.argmin(dim=-1))
    decoded = tokenizer.decode(tokens)
    assert torch.equal(decoded.movedim(1, -1), palette[tokens])
    assert torch.equal(tokenizer.encode(decoded), tokens)


def test_clusters_of_images() -> None:
    """Pixels of four colours and a little noise: k-means finds the four."""
    ids = torch.randint(4, (8, 6, 6))
    images = torch.tensor(PRIMARIES)[ids].movedim(-1, 1) * 0.8 + torch.randn(8, 3, 6, 6) * 0.01
    clusters = colour_clusters(images, 4, seed=3)
    assert clusters.shape == (4, 3)
    found = torch.cdist(torch.tensor(PRIMARIES) * 0.8, clusters)
    assert float(found.amin(dim=1).max()) < 0.02 and len(found.argmin(dim=1).unique()) == 4
    with pytest.raises(ValueError, match=r"colours must lie in \[1, 4\], the number of pixels, got 5"):
        colour_clusters(images[:1, :, :2, :2], 5)


def test_palette_files(tmp_path: Path) -> None:
    floats, bytes_ = tmp_path / "floats.npy", tmp_path / "bytes.npy"
    np.save(floats, np.array(PRIMARIES))
    np.save(bytes_, to_uint8(torch.tensor(PRIMARIES)).numpy())
    assert ColourPalette(str(floats)).fingerprint() == ColourPalette(PRIMARIES).fingerprint()
    assert torch.equal(ColourPalette(str(bytes_)).palette, from_uint8(to_uint8(torch.tensor(PRIMARIES))))
    with pytest.raises(ValueError, match=r"palette: no file 'nowhere\.npy'"):
        ColourPalette("nowhere.npy")
    np.save(floats, np.zeros(4))
    with pytest.raises(ValueError, match=r"floats\.npy' holds an array of shape \(4,\); \(K, 3\) is needed"):
        ColourPalette(str(floats))
    np.save(floats, np.full((4, 3), 255.0))
    with pytest.raises(ValueError, match=r"colours outside \[-1, 1\], and is not of type uint8"):
        ColourPalette(str(floats))
    np.save(floats, np.full((4, 3), None), allow_pickle=True)
    with pytest.raises(ValueError, match="is not an array of numbers"):
        ColourPalette(str(floats))


def test_fingerprints_differ() -> None:
    channels = [PixelLevels(image_channels=number) for number in (1, 4)]
    tokenizers = [PixelLevels(), PixelLevels(16), PixelLevels(grey=True), ColourPalette(PRIMARIES), *channels]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == 6


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 6)), (3, (4, 6, 3)), (4, (4, 6, 4))])
def test_levels_of_any_channels_and_sizes_come_back(channels: int, shape: tuple[int, ...]) -> None:
    tokenizer = PixelLevels(image_channels=channels)
    pixels = torch.randint(256, (2, channels, 4, 6), dtype=torch.uint8)
    tokens = tokenizer.encode(from_uint8(pixels))
    assert tokenizer.token_shape([4, 6]) == shape == tokens.shape[1:]
    assert torch.equal(tokens, pixels.movedim(1, -1).reshape(2, *shape).long())
    assert torch.equal(to_uint8(tokenizer.decode(tokens)), pixels)
    with pytest.raises(ValueError, match="and 3 with grey, the luma of RGB; got 1, grey=True"):
        PixelLevels(grey=True, image_channels=1)


def test_a_palette_of_grey() -> None:
    tokenizer = ColourPalette([[-1.0], [0.0], [1.0]])
    images = torch.tensor([-0.9, 0.2, 0.7, 0.4, -0.3, -0.6]).reshape(1, 1, 2, 3)
    tokens = tokenizer.encode(images)
    assert tokenizer.token_shape((2, 3)) == (2, 3) and tokens.tolist() == [[[0, 1, 2], [1, 1, 0]]]
    assert tokenizer.decode(tokens).shape == (1, 1, 2, 3)
    assert colour_clusters(images, 2).shape == (2, 1)


@pytest.mark.parametrize("tokenizer", [PixelLevels(4), PixelLevels(4, grey=True), ColourPalette(PRIMARIES)])
def test_bad_input(tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"images have 1 channels \(shape \(2, 1, 4, 4\)\), and this \w+ was made for 3"
    ):
        tokenizer.encode(torch.zeros(2, 1, 4, 4))
    broken = torch.zeros(2, 3, 4, 4)
    broken[1, 0, 2, 3] = float("nan")
    with pytest.raises(
        ValueError, match="1 of 2 images have pixels that are not finite numbers; their positions in the batch: 1"
    ):
        tokenizer.encode(broken)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 4\)"):
        tokenizer.decode(torch.full((1, *tokenizer.token_shape(4)), 4))
    with pytest.raises(ValueError, match="image_size=0: it must be"):
        tokenizer.token_shape(0)
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        PixelLevels(1)


def checkpoint(config, path: Path) -> Path:
    save(instantiate(config), path)
    return path


def test_a_palettes_checkpoint_needs_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "palette.npy"
    np.save(file, np.array(PRIMARIES))
    config = {"class_path": "discrete_lit.tokenizers.ColourPalette", "init_args": {"palette": str(file)}}
    saved = checkpoint(config, tmp_path / "palette.ckpt")
    file.unlink()
    loaded = discrete_lit.load(saved)
    assert isinstance(loaded, ColourPalette)
    assert loaded.fingerprint() == ColourPalette(PRIMARIES).fingerprint()
    assert instantiate(dict(loaded.hparams)).fingerprint() == loaded.fingerprint()


@pytest.mark.parametrize("kind", ["levels", "palette"])
def test_from_a_data_set_to_samples(kind: str, tmp_path: Path) -> None:
    """The tokenize verb, and a generator that is trained, saved, loaded and sampled."""
    from PIL import Image

    for number in range(4):
        (tmp_path / "images" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (4, 4, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "images" / f"class{number % 2}" / f"{number}.png")
    config = {"class_path": "discrete_lit.tokenizers.PixelLevels", "init_args": {"levels": 4, "grey": True}}
    if kind == "palette":
        np.save(tmp_path / "palette.npy", np.array(PRIMARIES))
        config = {
            "class_path": "discrete_lit.tokenizers.ColourPalette",
            "init_args": {"palette": str(tmp_path / "palette.npy")},
        }
    saved = checkpoint(config, tmp_path / "tokenizer.ckpt")
    data = ["--data=ImageFolder", f"--data.train={tmp_path / 'images'}", "--data.image_size=4", "--data.batch_size=2"]
    data += ["--data.num_workers=0"]
    run("tokenize", "--ckpt_path", saved, *data, "--output", tmp_path / "tokens", "--accelerator=cpu")
    tokens = np.load(tmp_path / "tokens" / "tokens.npy")
    assert tokens.shape == (4, 4, 4) and tokens.max() < 4
    settings = {
        "model": {
            "class_path": "discrete_lit.generators.Masked",
            "init_args": {
                "tokenizer": config,
                "image_size": 4,
                "num_classes": 2,
                "backbone": {
                    "class_path": "discrete_lit.backbones.Transformer",
                    "init_args": {"width": 8, "depth": 1, "heads": 2},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "discrete_lit.data.TokenArrays",
            "init_args": {"train": str(tmp_path / "tokens"), "batch_size": 2, "num_workers": 0},
        },
        "trainer": {**QUIET, "max_steps": 1, "limit_val_batches": 0},
        "run_dir": str(tmp_path / "run"),
    }
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    (tmp_path / "palette.npy").unlink(missing_ok=True)
    generator = discrete_lit.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert generator.tokenizer.decode(generator.sample(torch.tensor([0, 1, 2]))).shape == (3, 3, 4, 4)
