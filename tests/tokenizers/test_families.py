"""LFQ, RQVAE, MultiScaleVQ and KLVAE: from a configuration to ids or latents and back, learning, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from discrete_lit import load
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.tokenizers import KLVAE, Tokenizer, continuous_from_checkpoint, from_checkpoint

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": False, "norm_groups": 4},
}
OPTIMIZER = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
# Of each family: its arguments, the number of ids, the shape of the ids of an 8-pixel image.
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "LFQ": ({"bits": 5}, 32, (2, 2)),
    "RQVAE": ({"codebook_size": 12, "code_dim": 3, "depth": 3}, 12, (2, 2, 3)),
    "MultiScaleVQ": ({"codebook_size": 12, "code_dim": 3, "scales": [1, 2], "revive_below": 0.5}, 12, (5,)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    init_args = {"network": NETWORK, "optimizer": OPTIMIZER, **arguments}
    return instantiate({"class_path": f"discrete_lit.tokenizers.{family}", "init_args": init_args}).eval()


def four_images() -> torch.Tensor:
    """8 x 8, each with another half white."""
    images = torch.full((4, 3, 8, 8), -0.9)
    images[0, :, :4], images[1, :, 4:], images[2, :, :, :4], images[3, :, :, 4:] = 0.9, 0.9, 0.9, 0.9
    return images


def train(module: Any, steps: int, falling: bool = False) -> None:
    """`falling`: the learning rate falls to 0 linearly."""
    module.train()
    images, optimizer = four_images(), module.configure_optimizers()
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps) if falling else rate
        loss = module.training_step({"image": images, "index": torch.arange(4) + 4 * step}, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a module logs outside a Trainer."""
    logged: dict[str, Any] = {}
    monkeypatch.setattr("lightning.LightningModule.log", lambda self, name, value, **_: logged.update({name: value}))
    monkeypatch.setattr("lightning.LightningModule.log_dict", lambda self, values, **_: logged.update(values))
    return logged


@each_family
@torch.no_grad()
def test_ids_and_back(family: str) -> None:
    arguments, vocab_size, shape = FAMILIES[family]
    tokenizer = make(family, **arguments)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokenizer.vocab_size == vocab_size and tokenizer.token_shape(8) == shape
    assert tokens.shape == (3, *shape) and tokens.dtype == torch.int64
    made = tokenizer.reconstruct(images)
    assert torch.equal(made.tokens, tokens)
    torch.testing.assert_close(tokenizer.decode(tokens), made.outputs.clamp(-1, 1))
    assert tokenizer.embed(tokens).shape == (3, tokenizer.quantizer.dim, 2, 2)
    with pytest.raises(ValueError, match=rf"token ids must lie in \[0, {vocab_size}\)"):
        tokenizer.decode(torch.full_like(tokens, vocab_size))


@pytest.mark.slow
@each_family
def test_it_learns(family: str) -> None:
    arguments, _, _ = FAMILIES[family]
    # At a rate of 0.01, or after 50 steps, the error is 0.01 or 0.8 by the processor's rounding alone, and at a rate
    # that does not fall a bit may flip in the last step. LFQ's own temperature of 0.01 leaves the entropies no gradient
    # but next to 0, so that bits which begin equal stay equal.
    arguments = {**arguments, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.003}}}
    if family == "LFQ":
        arguments["entropy_temperature"] = 1.0
    tokenizer, images = make(family, **arguments), four_images()
    train(tokenizer, 400, falling=True)
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        assert F.mse_loss(tokenizer.decode(tokens), images) < 0.2
    assert len(tokens.flatten(1).unique(dim=0)) == 4


@each_family
def test_every_parameter_is_trained(family: str) -> None:
    arguments, _, _ = FAMILIES[family]
    if family == "MultiScaleVQ":
        arguments = {**arguments, "phi_kernels": 2}
    tokenizer = make(family, **arguments).train()
    tokenizer.loss(four_images())[0].backward()
    assert not [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]


@each_family
@torch.no_grad()
def test_validation_measures_the_parts(family: str, no_log: dict[str, Any]) -> None:
    arguments, _, _ = FAMILIES[family]
    tokenizer = make(family, **arguments)
    tokenizer.validation_step({"image": four_images()}, 0)
    tokenizer.on_validation_epoch_end()
    parts = {
        "LFQ": [f"bit_{channel}" for channel in range(5)],
        "RQVAE": [f"depth_{number}" for number in range(3)],
        "MultiScaleVQ": ["scale_1", "scale_2"],
    }[family]
    for part in parts:
        assert 0 < float(no_log[f"validation/codebook_usage/{part}"]) <= 1
        assert float(no_log[f"validation/perplexity/{part}"]) >= 1


@each_family
@torch.no_grad()
def test_a_checkpoint_is_enough(family: str, tmp_path: Path) -> None:
    arguments, _, _ = FAMILIES[family]
    tokenizer = make(family, **arguments)
    save(tokenizer, tmp_path / "tokenizer.ckpt")
    loaded = from_checkpoint(str(tmp_path / "tokenizer.ckpt"))
    assert type(loaded) is type(tokenizer) and loaded.fingerprint() == tokenizer.fingerprint()
    images = four_images()
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_images_of_other_sizes_than_the_scales() -> None:
    tokenizer = make("MultiScaleVQ", **FAMILIES["MultiScaleVQ"][0])
    for call in (lambda: tokenizer.token_shape(16), lambda: tokenizer.encode(torch.zeros(1, 3, 16, 16))):
        with pytest.raises(ValueError, match=r"latent grid is 4 x 4, and the scales \[1, 2\] end at 2"):
            call()


def test_levels_and_vocabulary_of_a_configuration() -> None:
    assert make("FSQ", levels=[8, 6, 5], formula="atanh", codebook_size=240).quantizer.formula == "atanh"
    with pytest.raises(ValueError, match="codebook_size=256 is not the product of the levels"):
        make("FSQ", levels=[8, 6, 5], codebook_size=256)


@torch.no_grad()
def test_continuous_latents_and_back() -> None:
    autoencoder = make("KLVAE", latent_channels=5, kl_weight=1e-3, scale_factor=0.25)
    assert isinstance(autoencoder, KLVAE) and not isinstance(autoencoder, Tokenizer)
    images = torch.rand(3, 3, 16, 8) * 2 - 1
    latents = autoencoder.encode(images)
    assert latents.shape == (3, 5, 4, 2) and autoencoder.latent_shape(16) == (5, 4, 4)
    posterior = autoencoder.posterior(images)
    assert torch.equal(latents, 0.25 * posterior.mean.movedim(-1, 1))
    made = autoencoder.reconstruct(images)
    torch.testing.assert_close(autoencoder.decode(latents), made.outputs.clamp(-1, 1))
    torch.testing.assert_close(made.losses["kl"], 1e-3 * posterior.kl().mean())
    random = CounterRandom(0, torch.arange(3))
    assert torch.equal(autoencoder.encode(images, random), 0.25 * posterior.sample(random).movedim(-1, 1))
    with pytest.raises(ValueError, match="image_size=18 is not a multiple"):
        autoencoder.latent_shape(18)


def test_continuous_latents_learn() -> None:
    autoencoder, images = make("KLVAE", latent_channels=4, kl_weight=1e-3), four_images()
    before = autoencoder.posterior(images).kl().mean()
    train(autoencoder, 50)
    with torch.no_grad():
        assert F.mse_loss(autoencoder.decode(autoencoder.encode(images)), images) < 0.2
    train(heavy := make("KLVAE", latent_channels=4, kl_weight=10.0), 30)
    assert heavy.posterior(images).kl().mean() < 0.2 * before


def test_training_noise_belongs_to_the_sample() -> None:
    """The same samples in other batches have the same latents, other samples and seeds others."""
    autoencoder = make("KLVAE", latent_channels=2, kl_weight=1.0).train()
    seen: list[torch.Tensor] = []
    autoencoder.bottleneck.register_forward_hook(lambda module, given, made: seen.append(made[0].detach()))
    images = four_images()
    for rows, first in ((slice(0, 4), 0), (slice(2, 4), 2), (slice(0, 4), 4)):
        batch = {"image": images[rows], "index": torch.arange(first, first + len(images[rows]))}
        autoencoder.training_step(batch, 0)
    torch.testing.assert_close(seen[0][2:], seen[1])
    assert not (seen[0] == seen[2]).any()
    autoencoder.training_step({"image": images}, 0)
    assert not (seen[0] == seen[3]).any()


@torch.no_grad()
def test_a_checkpoint_of_continuous_latents(tmp_path: Path) -> None:
    autoencoder = make("KLVAE", latent_channels=2, kl_weight=1.0, scale_factor=0.5)
    save(autoencoder, tmp_path / "klvae.ckpt")
    loaded = load(tmp_path / "klvae.ckpt")
    assert isinstance(loaded, KLVAE) and not loaded.training
    assert torch.equal(loaded.encode(four_images()), autoencoder.encode(four_images()))
    frozen = continuous_from_checkpoint(str(tmp_path / "klvae.ckpt"), sha256=autoencoder.fingerprint())
    assert not any(parameter.requires_grad for parameter in frozen.parameters()) and frozen.latent_dim == 2
    with pytest.raises(ValueError, match=r"holds a KLVAE.*continuous_from_checkpoint"):
        from_checkpoint(str(tmp_path / "klvae.ckpt"))
    with pytest.raises(ValueError, match="expected sha256=0000"):
        continuous_from_checkpoint(str(tmp_path / "klvae.ckpt"), sha256="0000")
    save(make("FSQ", levels=[4, 4]), tmp_path / "fsq.ckpt")
    with pytest.raises(ValueError, match="holds a FSQ, which is not a ContinuousTokenizer: it codes ids"):
        continuous_from_checkpoint(str(tmp_path / "fsq.ckpt"))


@torch.no_grad()
def test_the_scale_of_latents(tmp_path: Path) -> None:
    statistics = {"latent_mean": [0.5, -3.0], "latent_std": [2.0, 0.25]}
    plain = make("KLVAE", latent_channels=2, kl_weight=1.0)
    scaled = make("KLVAE", latent_channels=2, kl_weight=1.0, scale_factor=0.5, **statistics)
    scaled.load_state_dict(plain.state_dict())
    images = four_images()
    raw = plain.encode(images)
    expected = (raw - torch.tensor([0.5, -3.0])[:, None, None]) / torch.tensor([2.0, 0.25])[:, None, None] * 0.5
    torch.testing.assert_close(scaled.encode(images), expected)
    torch.testing.assert_close(scaled.decode(expected), plain.decode(raw))
    # Moments are those of the latents that `encode` draws.
    noise = CounterRandom(3, torch.arange(4))
    mean, logvar = scaled.moments(images)
    torch.testing.assert_close(mean, expected)
    unit = (plain.encode(images, noise) - raw) / (plain.moments(images)[1] / 2).exp()
    torch.testing.assert_close(scaled.encode(images, noise), mean + (logvar / 2).exp() * unit, rtol=1e-4, atol=1e-4)
    # The scale is part of what codes, and of every checkpoint.
    save(scaled, tmp_path / "scaled.ckpt")
    assert load(tmp_path / "scaled.ckpt").fingerprint() == scaled.fingerprint() != plain.fingerprint()
    assert torch.equal(load(tmp_path / "scaled.ckpt").encode(images), scaled.encode(images))


def test_latents_that_cannot_be_decoded() -> None:
    autoencoder = make("KLVAE", latent_channels=2, kl_weight=1.0)
    with pytest.raises(ValueError, match=r"decodes latents, floating-point numbers .* are these the ids"):
        autoencoder.decode(torch.zeros(1, 2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"are \(B, 2, \*grid\), got \(1, 3, 4, 4\)"):
        autoencoder.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="1 of 4 images have pixels that are not finite"):
        autoencoder.encode(four_images().index_fill(0, torch.tensor([2]), float("nan")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_mean": [0.0]}, "latent_mean must be 2 finite numbers"),
        ({"latent_mean": [0.0, float("nan")]}, "latent_mean must be 2 finite numbers"),
        ({"latent_std": [1.0, 0.0]}, "latent_std must be above 0"),
        ({"scale_factor": float("inf")}, "scale_factor must be above 0"),
    ],
)
def test_statistics_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("KLVAE", latent_channels=2, kl_weight=1.0, **settings)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_scale_factors_out_of_range(factor: float) -> None:
    with pytest.raises(ValueError, match="scale_factor must be above 0"):
        make("KLVAE", latent_channels=2, kl_weight=1.0, scale_factor=factor)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("family", "arguments", "shape"),
    [
        ("FSQ", {"levels": [4, 3]}, (2, 4)),
        ("LFQ", FAMILIES["LFQ"][0], (2, 4)),
        ("RQVAE", FAMILIES["RQVAE"][0], (2, 4, 3)),
        ("VQVAE", {"codebook_size": 12, "code_dim": 3}, (2, 4)),
        ("DVAE", {"codebook_size": 12, "code_dim": 3, "reconstruction_loss": "l2"}, (2, 4)),
        ("MultiScaleVQ", {"codebook_size": 12, "code_dim": 3, "scales": [1, [1, 2], [2, 4]]}, (1 + 2 + 8,)),
        ("KLVAE", {"latent_channels": 3, "kl_weight": 1e-6}, (3, 2, 4)),
    ],
)
def test_other_shapes_train_and_come_back(
    family: str, arguments: dict[str, Any], shape: tuple[int, ...], channels: int, tmp_path: Path
) -> None:
    network = {**NETWORK, "init_args": {**NETWORK["init_args"], "image_channels": channels}}
    module = make(family, network=network, **arguments)
    images = torch.rand(2, channels, 8, 16) * 2 - 1
    module.train().training_step({"image": images, "index": torch.arange(2)}, 0)["loss"].backward()
    assert not [name for name, value in module.network.named_parameters() if value.grad is None]
    save(module.eval(), tmp_path / "module.ckpt")
    loaded = load(tmp_path / "module.ckpt")
    with torch.no_grad():
        codes = loaded.encode(images)
        assert codes.shape == (2, *shape) and loaded.image_channels == channels
        assert shape == (loaded.token_shape if isinstance(loaded, Tokenizer) else loaded.latent_shape)([8, 16])
        assert loaded.decode(codes).shape == images.shape
        module.validation_step({"image": images}, 0)
    for call in (lambda: module.encode(torch.zeros(2, 3, 8, 16)), lambda: module.loss(torch.zeros(2, 3, 8, 16))):
        with pytest.raises(ValueError, match=f"have 3 channels .* network of this {family} was made for {channels}"):
            call()
