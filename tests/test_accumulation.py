"""A step of several accumulated micro-batches is that of one batch of all their samples."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import latent_generators
from helpers.precision_cases import SIDE, convolutional, make_generator, make_tokenizer
from helpers.random_weights import randomise
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from discrete_lit.tokenizers import RQVAE, VQVAE
from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss, LeCam
from discrete_lit.tokenizers.losses.augmentation import DifferentiableAugmentation
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
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


FAMILIES = [
    *("Masked", "Masked, MaskBit", "Masked, Halton-MaskGIT", "DiscreteDiffusion, uniform", "NextScale"),
    *("Autoregressive, RAR", "Autoregressive, BAR", "Autoregressive, BitDance", "Autoregressive, Open-MAGVIT2"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_generators(family: str) -> None:
    generator = make_generator(family)
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
