"""A step of several accumulated micro-batches is that of one batch of all their samples."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import latent_generators
from helpers.precision_cases import SIDE, TIMED, convolutional, make_generator, make_tokenizer, on_grid
from helpers.random_weights import randomise
from helpers.segment_layouts import Words
from helpers.sounds import waveforms
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from discrete_lit.backbones import SegmentTransformer, Transformer
from discrete_lit.diffusion import MaskAndReplaceProcess, MaskAndReplaceSchedule, PosteriorHead
from discrete_lit.diffusion.mask_and_replace import VQDiffusionLoss
from discrete_lit.generators import BitwiseNextScale, DelayedAutoregressive, DiscreteDiffusion, Unified
from discrete_lit.tokenizers import RQVAE, VQVAE, EnCodec, PixelLevels, RawPixels, TokenGrid
from discrete_lit.tokenizers.losses import GradientBalancer, MultiScaleSTFTDiscriminator, SpectrogramAdversarialLoss
from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss, LeCam
from discrete_lit.tokenizers.losses.augmentation import DifferentiableAugmentation
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder, SEANet
from discrete_lit.tokenizers.quantizers import GumbelQuantizer, ResidualQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

ROWS = 12


def one_step(module: LightningModule, rows: list[Any], *, batch: int, accumulated: int) -> LightningModule:
    module = deepcopy(module).train()
    trainer = Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=batch))
    assert trainer.global_step == 1
    return module


def moved(after: LightningModule, before: LightningModule) -> Tensor:
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    return torch.cat([(new - old).detach().flatten() for new, old in pairs if new.requires_grad])


def assert_same_step(module: LightningModule, rows: list[Any], *, batch: int, accumulated: int) -> LightningModule:
    whole = one_step(module, rows, batch=len(rows), accumulated=1)
    parts = one_step(module, rows, batch=batch, accumulated=accumulated)
    expected = moved(whole, module)
    assert expected.abs().max() > 0
    torch.testing.assert_close(moved(parts, module), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for (name, buffer), (_, other) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        torch.testing.assert_close(other, buffer, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    return parts


def tokens_of(generator: Any) -> list[Any]:
    ids = torch.randint(
        generator.vocab_size, (ROWS, *generator.token_shape), generator=torch.Generator().manual_seed(0)
    )
    return [{"tokens": row, "label": number % 2, "index": number} for number, row in enumerate(ids)]


def images() -> list[Any]:
    pixels = torch.rand(ROWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [{"image": image, "index": number} for number, image in enumerate(pixels)]


def vq_diffusion() -> Any:
    """As long trained as its steps are drawn by what they cost."""
    made = on_grid(
        DiscreteDiffusion,
        schedule=MaskAndReplaceSchedule(4, first=0.9, last=0.1),
        process=lambda size: MaskAndReplaceProcess(size, first=(0.9, 0.05), last=(0.1, 0.8)),
        head=PosteriorHead(),
        loss=VQDiffusionLoss(4),
        **TIMED,
    )
    made.importance.counts.fill_(11)
    made.importance.squares.copy_(torch.tensor([9.0, 1.0, 4.0, 16.0]))
    return randomise(made, 0.3)


def bitwise() -> Any:
    network = partial(Transformer, width=16, depth=1, heads=2)
    return randomise(BitwiseNextScale(TokenGrid(4, (3,)), 2, num_classes=2, scales=(1, (1, 2)), backbone=network), 0.3)


def delayed() -> Any:
    network = partial(Transformer, width=16, depth=1, heads=2, conditioning="added")
    return randomise(DelayedAutoregressive(TokenGrid(6, (5, 3)), 8, num_classes=2, backbone=network), 0.3)


FAMILIES: dict[str, Any] = {
    **{
        name: partial(make_generator, name)
        for name in (
            *("Masked", "Masked, MaskBit", "Masked, Halton-MaskGIT", "DiscreteDiffusion, uniform", "NextScale"),
            *("Autoregressive, RAR", "Autoregressive, BAR", "Autoregressive, BitDance", "Autoregressive, Open-MAGVIT2"),
        )
    },
    "VQ-Diffusion": vq_diffusion,
    "BitwiseNextScale": bitwise,
    "DelayedAutoregressive": delayed,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_generators(family: str) -> None:
    generator = FAMILIES[family]()
    generator.optimizer = partial(torch.optim.SGD, lr=1.0)
    assert_same_step(generator, tokens_of(generator), batch=3, accumulated=4)


@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("family", latent_generators.FAMILIES)
def test_gradients_of_generators_of_latents(family: str, batch: int) -> None:
    """In equal parts, and in parts of 5, 5 and 2."""
    generator = latent_generators.make(family)
    generator.optimizer = partial(torch.optim.SGD, lr=1.0)
    rows = latent_generators.rows_of(family, generator, ROWS)
    assert_same_step(generator, rows, batch=batch, accumulated=-(-ROWS // batch))


@pytest.mark.parametrize(("batch", "accumulated"), [(5, 3), (4, 8)])
def test_a_smaller_last_batch_and_a_shorter_last_step(batch: int, accumulated: int) -> None:
    generator = make_generator("Masked")
    generator.optimizer = partial(torch.optim.SGD, lr=1.0)
    assert_same_step(generator, tokens_of(generator), batch=batch, accumulated=accumulated)
    tokenizer = make_tokenizer("FSQ")
    tokenizer.optimizer = partial(torch.optim.SGD, lr=1.0)
    assert_same_step(tokenizer, images(), batch=batch, accumulated=accumulated)


@pytest.mark.parametrize(
    "make",
    [
        partial(VQVAE, codebook_size=8, code_dim=4, codebook_init="normal"),
        partial(VQVAE, codebook_size=64, code_dim=4, codebook_init="normal", revive_below=1.0, decay=0.5),
        partial(VQVAE, codebook_size=8, code_dim=4, codebook_init="normal", normalize=True),
        partial(RQVAE, codebook_size=8, code_dim=4, depth=2, codebook_init="normal", shared_codebook=False),
    ],
    ids=["running means", "revival", "on the sphere", "residual"],
)
def test_codebooks(make: Any) -> None:
    tokenizer = randomise(make(convolutional, optimizer=partial(torch.optim.SGD, lr=0.1)), 0.3)
    before = {name: value.clone() for name, value in tokenizer.quantizer.named_buffers()}
    after = assert_same_step(tokenizer, images(), batch=3, accumulated=4)
    assert any(not torch.equal(value, before[name]) for name, value in after.quantizer.named_buffers())


def test_what_a_discriminator_is_shown() -> None:
    """How an image is changed for a discriminator belongs to the image and the step."""
    adversarial = AdversarialLoss(
        PatchGAN(width=4, layers=1),
        weight=0.3,
        adaptive=False,
        augmentation=DifferentiableAugmentation(crop_size=SIDE - 1),
        consistency_weight=4.0,
    )
    made = VQVAE(
        convolutional,
        codebook_size=8,
        code_dim=4,
        codebook_init="normal",
        adversarial_loss=adversarial,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    assert_same_step(randomise(made, 0.3), images(), batch=3, accumulated=4)


def codec(**settings: Any) -> EnCodec:
    network = partial(SEANet, filters=4, ratios=(4, 2), kernel=5, last_kernel=3)
    given: dict[str, Any] = {"codebook_size": 8, "code_dim": 4, "depth": 2, "codebook_init": "normal", **settings}
    made = EnCodec(network, **given, sample_rate=8000, spectral_windows=(5, 6))
    return randomise(made, 0.3)


def test_a_codec_and_a_tokenizer_of_clips() -> None:
    rows: list[Any] = [{"audio": one, "index": number} for number, one in enumerate(waveforms(ROWS, 1, 160))]
    made = codec(optimizer=partial(torch.optim.SGD, lr=0.1), training_books=[1, 2])
    before = made.quantizer.codebooks[0].codes.clone()
    after = assert_same_step(made, rows, batch=3, accumulated=4)
    assert not torch.equal(after.quantizer.codebooks[0].codes, before)

    network = partial(
        ConvAutoencoder, image_channels=1, channels=4, multipliers=(1, 1), time_levels=(0,), blocks=1, norm_groups=4
    )
    clips = torch.rand(ROWS, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    of_clips = VQVAE(
        partial(network, attention=False, dims=3, causal=True),
        codebook_size=8,
        code_dim=4,
        codebook_init="normal",
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    rows = [{"video": clip, "index": number} for number, clip in enumerate(clips)]
    assert_same_step(randomise(of_clips, 0.3), rows, batch=3, accumulated=4)


def unified(**settings: Any) -> tuple[Unified, list[Any]]:
    """A model of two grey pixels and captions of none to two words, and data for it."""
    given: dict[str, Any] = {"tokenizer": PixelLevels(2, image_channels=1), "image_size": [1, 2], **settings}
    made = Unified(
        **given,
        text_tokenizer=Words(("black", "white")),
        text_length=4,
        backbone=partial(SegmentTransformer, width=16, depth=1, heads=2),
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    captions = ("", "black", "white black")
    images = torch.rand(ROWS, 1, *made.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [{"image": one, "caption": captions[n % 3], "index": n} for n, one in enumerate(images)]
    return randomise(made, 0.3), rows


def test_ids_of_texts_and_images() -> None:
    made, rows = unified(z_loss=1e-2)
    assert_same_step(made, rows, batch=4, accumulated=3)


def without_quantizer_terms(**settings: Any) -> VQVAE:
    return VQVAE(convolutional, codebook_size=8, code_dim=4, codebook_init="normal", **settings)


def discriminated(norm: Any = "group", **settings: Any) -> VQVAE:
    given: dict[str, Any] = {"adaptive": False, **settings}
    return without_quantizer_terms(adversarial_loss=AdversarialLoss(PatchGAN(width=4, layers=1, norm=norm), **given))


def of_sounds(**settings: Any) -> EnCodec:
    discriminator = MultiScaleSTFTDiscriminator(windows=(32,), filters=2)
    return codec(adversarial_loss=SpectrogramAdversarialLoss(discriminator, **settings))


WHOLE: dict[str, tuple[Any, str]] = {
    "batch norm": (partial(discriminated, "batch"), "batch norms"),
    "batch norm of all ranks": (partial(discriminated, "sync"), "batch norms"),
    "adaptive weight": (
        partial(discriminated, adaptive=True),
        "the adaptive weight of the adversarial loss (adaptive)",
    ),
    "LeCam": (partial(discriminated, lecam_weight=0.1), "the means of LeCam (lecam_weight)"),
    "LFQ": (partial(make_tokenizer, "LFQ"), "the batch entropy (entropy_weight)"),
    "BSQ": (partial(make_tokenizer, "VQGAN with BSQ"), "the batch entropy (entropy_weight)"),
    "IBQ": (partial(make_tokenizer, "VQGAN with IBQ"), "the batch entropy (entropy_weight)"),
    "RQ-VAE": (partial(make_tokenizer, "RQVAE"), "a codebook that moves from depth to depth"),
    "features": (of_sounds, "the distance of features, a ratio of means (feature_weight)"),
    "balancer": (lambda: codec(balancer=GradientBalancer()), "the balancer of gradients (balancer)"),
    "masked images beside texts": (
        lambda: unified(image_prediction="masked")[0],
        "two means, of the ids of captions and of images (image_weight)",
    ),
    "latents beside texts": (lambda: unified(tokenizer=RawPixels(1))[0], "two means, of the ids of captions"),
}


@pytest.mark.parametrize("part", WHOLE)
def test_what_needs_the_whole_batch_is_refused(part: str) -> None:
    make, named = WHOLE[part]
    trainer = Trainer(accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    made = make().train()
    made.trainer = trainer
    with pytest.raises(ValueError, match=r"accumulate_grad_batches is 4.*accumulation to by_micro_batch") as refused:
        made.setup("fit")
    assert named in str(refused.value)
    made.accumulation = "by_micro_batch"
    made.setup("fit")
    made.accumulation = "each"
    with pytest.raises(ValueError, match=r"accumulation must be one of exact, by_micro_batch, got 'each'"):
        made.setup("fit")
    made.accumulation = "exact"
    made.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    made.setup("fit")


def test_what_needs_no_whole_batch_is_not_refused() -> None:
    """A frozen tokenizer's losses, and settings that leave the terms out."""
    trainer: Any = Trainer(accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    frozen = Unified(
        make_tokenizer("LFQ"),
        SIDE,
        text_tokenizer=Words(("black",)),
        text_length=3,
        backbone=partial(SegmentTransformer, width=16, depth=1, heads=2),
    )
    for made in (frozen, discriminated(), codec(), of_sounds(feature_weight=0.0)):
        made.train().trainer = trainer
        made.setup("fit")


@pytest.mark.parametrize("part", ["LFQ", "masked images beside texts", "latents beside texts"])
def test_each_micro_batch_by_itself(part: str) -> None:
    """A mean over equal micro-batches, also where the captions of one of them are all dropped."""
    if part == "LFQ":
        made, rows = make_tokenizer("LFQ"), images()
    else:
        settings: dict[str, Any] = {"tokenizer": RawPixels(1)} if "latents" in part else {"image_prediction": "masked"}
        made, rows = unified(label_dropout=1.0, **settings)
    with pytest.raises(ValueError, match="accumulation to by_micro_batch"):
        one_step(made, rows, batch=3, accumulated=4)
    made.accumulation = "by_micro_batch"
    made.optimizer = partial(torch.optim.SGD, lr=1.0)
    found = moved(one_step(made, rows, batch=3, accumulated=4), made)
    apart = [moved(one_step(made, rows[at : at + 3], batch=3, accumulated=1), made) for at in range(0, ROWS, 3)]
    expected = torch.stack(apart).mean(dim=0)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def halves(quantizer: Any, latents: Tensor) -> list[Any]:
    quantizer.accumulating = True
    made = [quantizer(part) for part in latents.chunk(2)]
    quantizer.end_step()
    return made


def test_noise_of_a_relaxed_sample() -> None:
    whole = GumbelQuantizer(8, 4).train()
    parts, latents = deepcopy(whole), torch.randn(6, 5, 4)
    expected = whole(latents).tokens
    assert torch.equal(torch.cat([made.tokens for made in halves(parts, latents)]), expected)
    assert int(parts.steps) == int(whole.steps) == 1
    assert torch.equal(torch.cat([made.tokens for made in halves(parts, latents)]), whole(latents).tokens)


def test_a_shared_codebook_takes_a_step_for_each_depth() -> None:
    quantizer = ResidualQuantizer(8, 4, depth=3, codebook_init="normal").train()
    before = quantizer.codebook(0).codes.clone()
    quantizer.codebook(0).accumulating = True
    for part in torch.randn(6, 5, 4).chunk(2):
        quantizer(part)
        assert torch.equal(quantizer.codebook(0).codes, before) and int(quantizer.codebook(0).steps) == 0
    quantizer.codebook(0).end_step()
    assert int(quantizer.codebook(0).steps) == 3 and not torch.equal(quantizer.codebook(0).codes, before)


def test_running_means_of_logits() -> None:
    whole = LeCam(0.9)
    parts, real, fake = deepcopy(whole), torch.randn(8, 1), torch.randn(8, 1)
    expected = whole(real, fake)
    parts.accumulating = True
    first, second = (parts(*each) for each in zip(real.chunk(2), fake.chunk(2), strict=True))
    assert float(parts.real_mean) == 0
    parts.end_step()
    torch.testing.assert_close(parts.real_mean, whole.real_mean)
    torch.testing.assert_close(parts.fake_mean, whole.fake_mean)
    # The first half is compared with the means of itself, the second with those of both.
    moved_by_all = 0.1 * real.mean(), 0.1 * fake.mean()
    real, fake = real[4:], fake[4:]
    by_hand = (real - moved_by_all[1]).relu().square().mean() + (moved_by_all[0] - fake).relu().square().mean()
    torch.testing.assert_close(second, by_hand)
    assert first.isfinite() and expected.isfinite()
