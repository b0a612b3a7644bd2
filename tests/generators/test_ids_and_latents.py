"""Ids where latents are needed, latents where ids are, moments for samples: refused by name, wherever they come."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import (
    TOKENIZER,
    generator_settings,
    latent_settings,
    refusal,
    run,
    untrained,
    untrained_fsq,
    untrained_klvae,
    write_settings,
)

import discrete_lit
from discrete_lit.backbones import MaskedAutoencoder, TokenDiffusionHead, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.latent_arrays import LatentWriter
from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.diffusion.gaussian import GaussianDenoiser, SteppedPath, cosine_betas
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators import ContinuousMasked, Masked
from discrete_lit.samplers import MARSampler
from discrete_lit.tokenizers import LatentGrid
from discrete_lit.tokenizers.tokenizer import TokenGrid


@pytest.fixture(scope="module")
def of_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_fsq(tmp_path_factory.mktemp("of_ids") / "tokenizer.ckpt")


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_klvae(tmp_path_factory.mktemp("of_latents") / "tokenizer.ckpt")


def described(checkpoint: Path) -> dict[str, Any]:
    tokenizer = discrete_lit.load(checkpoint)
    common = {"image_size": 8, "num_classes": 2, "classes": ["zero", "one"], "source": "noise"}
    return {**common, "count": 4, "tokenizer": tokenizer.fingerprint()}


def arrays(checkpoint: Path, folder: Path) -> Path:
    """Four rows of what a tokenizer makes."""
    values = torch.zeros(4, 4, 4, dtype=torch.int64)
    writer: TokenWriter | LatentWriter
    if isinstance(discrete_lit.load(checkpoint), discrete_lit.tokenizers.Tokenizer):
        TokenWriter.create(folder, token_shape=(4, 4), vocab_size=12, **described(checkpoint))
        writer, codes = TokenWriter(folder), values
    else:
        settings: Any = {"latent_shape": (2, 4, 4), "storage": "sample", "dtype": "float16"}
        LatentWriter.create(folder, **settings, **described(checkpoint))
        torch.manual_seed(0)
        writer, codes = LatentWriter(folder), torch.randn(4, 2, 4, 4)
    writer.write(torch.arange(4), codes, torch.arange(4) % 2)
    writer.close()
    type(writer).finalise(folder)
    return folder


def refused(settings: dict[str, Any], data: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture) -> str:
    """What `fit` says before it fails with the code of a user's mistake."""
    file = write_settings(folder / "settings.yaml", {**settings, "data": data})
    return refusal(capfd, "fit", "--config", file, "--run_dir", folder / f"run_{len(list(folder.iterdir()))}")


def test_fit_refuses_arrays_of_the_other_kind(
    of_ids: Path, of_latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = {
        "class_path": "TokenArrays",
        "init_args": {"train": str(arrays(of_ids, tmp_path / "tokens")), "batch_size": 2},
    }
    said = refused(latent_settings(of_latents), data, tmp_path, capfd)
    assert "data is TokenArrays, which holds tokens, and ContinuousMasked models latents" in said
    data = {
        "class_path": "LatentArrays",
        "init_args": {"train": str(arrays(of_latents, tmp_path / "latents")), "batch_size": 2},
    }
    said = refused(generator_settings(of_ids), data, tmp_path, capfd)
    assert "data is LatentArrays, which holds latents, and Masked models tokens" in said
    # And a folder of one kind, given as the other.
    data["class_path"] = "TokenArrays"
    said = refused(generator_settings(of_ids), data, tmp_path, capfd)
    assert "has format 'discrete-lit-latents-1'; a token array has 'discrete-lit-tokens-1'" in said


def test_a_checkpoint_of_the_other_kind_of_tokenizer_is_refused(
    of_ids: Path, of_latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = TOKENIZER["data"]
    said = refused(latent_settings(of_ids), data, tmp_path, capfd)
    assert "holds a FSQ, which is not a ContinuousTokenizer: it codes ids, take `from_checkpoint`" in said
    said = refused(generator_settings(of_latents), data, tmp_path, capfd)
    assert "holds a KLVAE, which is not a Tokenizer: its latents are continuous" in said


def masked(**settings: Any) -> Masked:
    return Masked(TokenGrid(12, (4, 4)), 8, num_classes=2, backbone=small_transformer, **settings)


def small_transformer(layout: Any) -> Transformer:
    return Transformer(layout, width=8, depth=1, heads=2)


def small_network(layout: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(layout, width=8, depth=1, heads=2, buffer=2)


def continuous(tokenizer: Any = None, **head: Any) -> ContinuousMasked:
    return ContinuousMasked(
        tokenizer or LatentGrid((2, 4, 4)),
        8,
        num_classes=2,
        backbone=small_network,
        head=lambda dim, width: TokenDiffusionHead(dim, width, width=8, depth=1, **head),
        sampler=MARSampler(2),
    )


def test_a_generator_of_latents_refuses_a_tokenizer_of_ids() -> None:
    with pytest.raises(ValueError, match="ContinuousMasked models latents, tokenizer is a TokenGrid, which makes ids"):
        continuous(TokenGrid(12, (4, 4)))


def test_batches_of_the_other_kind_are_refused() -> None:
    made = masked()
    with pytest.raises(ValueError, match='a batch holds latents, label: Masked needs "image" or "tokens"'):
        made.tokens_of({"latents": torch.randn(2, 2, 4, 4), "label": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"Masked models ids, integers in \[0, 12\), got torch.float32 \(2, 4, 4\)"):
        made.tokens_of({"tokens": torch.randn(2, 4, 4)})
    random = CounterRandom(0, torch.arange(2))
    with pytest.raises(ValueError, match='a batch holds tokens: ContinuousMasked needs "image" or "latents"; ids are'):
        continuous().data_of({"tokens": torch.zeros(2, 4, 4, dtype=torch.int64)}, random)


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 2, 4, 4)])
def test_moments_in_the_place_of_samples_are_refused(shape: tuple[int, ...]) -> None:
    """As MAR's and LDM's caches hold them, and as a latent array does."""
    random = CounterRandom(0, torch.arange(3))
    with pytest.raises(ValueError, match=r"models \(2, 4, 4\): are these means and variances\? A batch holds samples"):
        continuous().data_of({"latents": torch.randn(3, *shape)}, random)


def test_unscaled_latents_of_kl16_are_refused_in_the_first_batch() -> None:
    """Trained on them, MAR samples noise and says nothing."""
    random, latents = CounterRandom(0, torch.arange(3)), torch.randn(3, 2, 4, 4)
    made = continuous()
    for wrong in (latents / 0.2325, latents * 0.2325):
        with pytest.raises(ValueError, match=r"the first batch of latents: latents must have about unit deviation"):
            made.data_of({"latents": wrong}, random)
    shifted = latents + torch.tensor([1.4, 1.4])[:, None, None]
    with pytest.raises(ValueError, match="the first batch of latents: latents must have means about 0"):
        made.data_of({"latents": shifted}, random)
    made.data_of({"latents": latents}, random)


def test_sample_refuses_a_sampler_of_the_other_kind(
    of_ids: Path, of_latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for settings, sampler, generator in (
        (generator_settings(of_ids), "MARSampler", "Masked"),
        (latent_settings(of_latents), "MaskGITSampler", "ContinuousMasked"),
    ):
        file = untrained(settings, tmp_path / f"{generator}.ckpt")
        with pytest.raises(SystemExit):
            run("sample", "--ckpt_path", file, "--sampler", sampler, "--num_samples", 2, "--output", tmp_path)
        assert f"sampler={sampler} does not draw from a {generator}" in capfd.readouterr().err


def test_tokenizers_decode_and_arrays_store_their_own_kind_alone(
    of_ids: Path, of_latents: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"a FSQ decodes ids, integers in \[0, 12\), got torch.float32"):
        discrete_lit.load(of_ids).decode(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="a KLVAE decodes latents, floating-point numbers"):
        discrete_lit.load(of_latents).decode(torch.zeros(1, 2, 4, 4, dtype=torch.int64))
    TokenWriter.create(tmp_path / "tokens", token_shape=(4, 4), vocab_size=12, **described(of_ids))
    with pytest.raises(ValueError, match=r"tokens are integers, got torch.float32: are these the latents"):
        TokenWriter(tmp_path / "tokens").write(torch.arange(4), torch.zeros(4, 4, 4), torch.zeros(4).long())
    settings: Any = {"latent_shape": (2, 4, 4), "storage": "sample", "dtype": "float16"}
    LatentWriter.create(tmp_path / "latents", **settings, **described(of_latents))
    with pytest.raises(ValueError, match=r"latents are floating-point numbers, got torch\.int64: are these the ids"):
        codes = torch.zeros(4, 2, 4, 4, dtype=torch.int64)
        LatentWriter(tmp_path / "latents").write(torch.arange(4), codes, torch.zeros(4).long())


def test_a_likelihood_of_latents_has_no_place_in_the_table(of_latents: Path, tmp_path: Path) -> None:
    from discrete_lit.evaluation.inputs import Run, _load_generators

    file = untrained(latent_settings(of_latents), tmp_path / "mar.ckpt")
    with pytest.raises(ValueError, match="holds a ContinuousMasked, not a Generator"):
        _load_generators([Run("mar", "mar", str(file))], 8, 3)


def test_more_steps_than_were_trained_are_refused_and_a_bound_takes_what_there_is() -> None:
    denoiser = GaussianDenoiser(SteppedPath(cosine_betas(10)), learned_variance=True)
    with pytest.raises(ValueError, match="steps=11 exceeds the 10 steps that the network was trained on"):
        continuous(denoiser=denoiser, solver=DDPM(11))
    made, labels = continuous(denoiser=denoiser, solver=DDPM(10)).eval(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="steps=11 exceeds the 10 steps that the network was trained on"):
        made.sample(labels, MARSampler(2, solver=DDPM(11)))
    assert made.likelihood_steps == 10
    assert made.log_likelihood(torch.randn(2, 2, 4, 4), labels).nats.isfinite().all()
