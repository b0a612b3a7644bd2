"""Latent arrays: what is stored, what is drawn from it, how a run resumes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from discrete_lit.data import LatentArrays, LatentWriter
from discrete_lit.data.latent_arrays import LatentFolder

SHAPE = (3, 2, 4)
MANIFEST: dict[str, Any] = {
    "latent_shape": SHAPE,
    "image_size": 8,
    "num_classes": 3,
    "classes": ["ant", "bee", "cat"],
    "tokenizer": "a" * 64,
    "source": "noise",
}


def moments(count: int, variants: int | None = None) -> torch.Tensor:
    """Means far apart, with logarithms of variances around -4: `(count, [variants,] 2, D, h, w)`."""
    random = torch.Generator().manual_seed(0)
    shape = (count, *(() if variants is None else (variants,)), *SHAPE)
    mean, logvar = torch.randn(shape, generator=random), torch.randn(shape, generator=random) - 4
    return torch.stack((mean, logvar), dim=-4)


def write(folder: Path, codes: torch.Tensor, **settings: Any) -> Path:
    settings = {"storage": "moments", "dtype": "float16", **MANIFEST, **settings}
    LatentWriter.create(folder, count=len(codes), **settings)
    writer = LatentWriter(folder)
    for rows in torch.arange(len(codes)).split(5):
        writer.write(rows, codes[rows], rows % 3)
    writer.close()
    LatentWriter.finalise(folder)
    return folder


def joined(batches: Any, name: str) -> torch.Tensor:
    return torch.cat([batch[name] for batch in batches])


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_samples_are_stored_to_the_bits_of_the_type(tmp_path: Path, dtype: str, bits: int) -> None:
    latents = moments(7)[:, 0]
    data = LatentArrays(None, str(write(tmp_path / "l", latents, storage="sample", dtype=dtype)), batch_size=3)
    batches = list(data.evaluation_loader("validation", 0, 1))
    found = joined(batches, "latents")
    assert found.dtype == torch.float32 and np.load(tmp_path / "l" / "latents.npy").itemsize == 2
    assert torch.equal(found, latents.to(getattr(torch, dtype)).float())
    assert ((found - latents).abs() <= 2.0**-bits * latents.abs()).all()
    assert joined(batches, "label").tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert joined(batches, "index").tolist() == list(range(7))
    assert data.latent_shape == SHAPE and data.image_size == 8 and data.classes == ["ant", "bee", "cat"]


def test_latents_are_drawn_from_the_stored_moments(tmp_path: Path) -> None:
    stored = moments(400)
    data = LatentArrays(str(write(tmp_path / "l", stored)), batch_size=400)
    mean, logvar = stored.half().float().unbind(1)
    loader = data.training_loader(0, 1)
    draws = []
    for epoch in range(2):
        batch = next(iter(loader))
        order = [int((mean - latents).square().flatten(1).sum(1).argmin()) for latents in batch["latents"]]
        assert sorted(order) == list(range(400)) and torch.equal(batch["label"], torch.tensor(order) % 3)
        assert batch["index"].tolist() == list(range(400 * epoch, 400 * epoch + 400))
        unit = (batch["latents"] - mean[order]) / (logvar[order] / 2).exp()
        draws.append(unit[torch.tensor(order).argsort()])
        assert kstest(unit.flatten().numpy(), "norm").pvalue > 1e-3
    # Each epoch has noise of its own, independent of the other's.
    assert abs(float(torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))[0, 1])) < 0.05


def test_noise_belongs_to_seed_epoch_and_row(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "l", moments(12)))

    def epochs(seed: int, batch_size: int, world_size: int = 1) -> list[dict[int, torch.Tensor]]:
        """The latents of each row, known by its mean, in two epochs."""
        mean = moments(12)[:, 0]
        found: list[dict[int, torch.Tensor]] = [{}, {}]
        for rank in range(world_size):
            loader = LatentArrays(folder, batch_size=batch_size, seed=seed).training_loader(rank, world_size)
            for epoch in range(2):
                for latents in joined(loader, "latents"):
                    found[epoch][int((mean - latents).square().flatten(1).sum(1).argmin())] = latents
        return found

    one, other, ranks = epochs(0, 12), epochs(1, 12), epochs(0, 3, world_size=2)
    for epoch in range(2):
        assert all(torch.equal(one[epoch][row], ranks[epoch][row]) for row in range(12))
        assert not any(torch.equal(one[epoch][row], other[epoch][row]) for row in range(12))
    assert not any(torch.equal(one[0][row], one[1][row]) for row in range(12))
    # Validation draws the same again.
    data = LatentArrays(None, folder, batch_size=5)
    first, second = (joined(data.evaluation_loader("validation", 0, 1), "latents") for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, moments(12)[:, 0].half().float())


def test_a_resumed_epoch_has_the_same_latents(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "l", moments(20, variants=2), variants=2))
    make = lambda: LatentArrays(folder, batch_size=4).training_loader(0, 1)  # noqa: E731
    loader = make()
    whole = [joined(loader, "latents") for _ in range(2)]
    stopped = make()
    iterator = iter(stopped)
    for _ in range(3):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(joined(resumed, "latents"), whole[0][12:])
    assert torch.equal(joined(resumed, "latents"), whole[1])


def test_training_draws_a_mirror_image_and_evaluation_takes_the_first(tmp_path: Path) -> None:
    # Variant v of row r is the constant r + 100 v.
    latents = (torch.arange(16)[:, None] + 100 * torch.arange(2))[:, :, None, None, None].expand(16, 2, *SHAPE)
    folder = str(write(tmp_path / "l", latents.float(), storage="sample", variants=2))
    data = LatentArrays(folder, folder, batch_size=16)
    seen = [next(iter(loader := data.training_loader(0, 1)))["latents"][:, 0, 0, 0]]
    seen.append(next(iter(loader))["latents"][:, 0, 0, 0])
    for drawn in seen:
        assert sorted((drawn % 100).tolist()) == list(range(16)) and 2 < int((drawn >= 100).sum()) < 14
    assert not torch.equal(*seen)
    first = next(iter(data.evaluation_loader("validation", 0, 1)))["latents"][:, 0, 0, 0]
    assert first.tolist() == list(range(16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variants", [None, 2])
def test_the_manifest_has_the_statistics_of_the_channels(
    tmp_path: Path, dtype: str, variants: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discrete_lit.data.latent_arrays._BYTES_AT_ONCE", 1000)
    stored = moments(30, variants) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 0.5
    data = LatentArrays(str(write(tmp_path / "l", stored, dtype=dtype, variants=variants)), batch_size=3)
    kept = stored.to(getattr(torch, dtype)).double().reshape(-1, 2, *SHAPE)
    mean, variance = kept[:, 0], kept[:, 1].exp()
    torch.testing.assert_close(torch.tensor(data.latent_mean).double(), mean.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    n = mean[:, 0].numel()
    expected = (mean.var(dim=(0, 2, 3)) + variance.sum(dim=(0, 2, 3)) / (n - 1)).sqrt()
    torch.testing.assert_close(torch.tensor(data.latent_std).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, *SHAPE), 1e5), r"latents up to 1e\+05 are not finite numbers of float16: .* bfloat16"),
        (torch.full((1, 2, *SHAPE), float("nan")), "are not finite numbers of float16"),
        (torch.zeros((1, 2, *SHAPE), dtype=torch.int64), "are these the ids of a Tokenizer"),
        (torch.zeros((1, *SHAPE)), r"got latents \(1, 3, 2, 4\) and labels \(1,\) for rows of \(1, 2, 3, 2, 4\)"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, codes: torch.Tensor, message: str) -> None:
    LatentWriter.create(tmp_path / "l", count=1, storage="moments", dtype="float16", **MANIFEST)
    writer = LatentWriter(tmp_path / "l")
    with pytest.raises(ValueError, match=message):
        writer.write(torch.tensor([0]), codes, torch.tensor([0]))
    with pytest.raises(ValueError, match="1 of 1 rows"):
        LatentWriter.finalise(tmp_path / "l")


def test_settings_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="storage must be one of moments, sample, got 'mean'"):
        LatentWriter.create(tmp_path / "l", count=1, storage="mean", dtype="float16", **MANIFEST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, got 'float8'"):
        LatentWriter.create(tmp_path / "l", count=1, storage="sample", dtype="float8", **MANIFEST)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "discrete-lit-tokens-1"}, "a latent array has 'discrete-lit-latents-1'"),
        ({"storage": "sample"}, r"holds float16 \(4, 2, 3, 2, 4\); its manifest says float16 \(4, 3, 2, 4\)"),
        ({"dtype": "bfloat16"}, "its manifest says uint16"),
        ({"dtype": "float8"}, "has moments or sample, and float16 or bfloat16"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "l", moments(4))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=message):
        LatentFolder(folder)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "l", moments(4))
    codes = np.load(folder / "latents.npy")
    codes[2, 1, 0, 0, 0] = np.inf
    np.save(folder / "latents.npy", codes)
    with pytest.raises(ValueError, match="not finite in one of the rows"):
        list(LatentArrays(str(folder), batch_size=4).training_loader(0, 1))


def test_latents_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "l", moments(4))
    data = LatentArrays(str(folder), str(write(tmp_path / "o", moments(4), tokenizer="b" * 64)), batch_size=2)
    with pytest.raises(ValueError, match="do not belong together: tokenizer is"):
        _ = data.folders
    with pytest.raises(ValueError, match=r"the latents in .* were made by the tokenizer aaaa"):
        LatentArrays(str(folder), batch_size=2).check_tokenizer("b" * 64)
