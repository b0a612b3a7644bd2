"""VQVAE and FSQ: images to ids and back, the loss, the figures of validation."""

from functools import partial
from math import exp, log, log10

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from discrete_lit.core.images import to_uint8
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

each_kind = pytest.mark.parametrize("kind", ["fsq", "vqvae"])


def logged_by(tokenizer, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the tokenizer logs from now on, by name; the last value of each."""
    logged: dict[str, object] = {}
    monkeypatch.setattr(tokenizer, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(tokenizer, "log_dict", lambda values, **_: logged.update(values))
    return logged


@each_kind
@torch.no_grad()
def test_encode_and_decode(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    tokens = tokenizer.encode(torch.rand(5, 3, 16, 16) * 2 - 1)
    assert tokens.shape == (5, *tokenizer.token_shape(16)) == (5, 4, 4)
    assert tokens.dtype == torch.int64 and 0 <= int(tokens.min()) and int(tokens.max()) < tokenizer.vocab_size == 12
    assert tokenizer.embed(tokens).shape == (5, tokenizer.quantizer.dim, 4, 4)
    for parameter in tokenizer.network.decoder.parameters():
        parameter.mul_(20)  # pixels far outside [-1, 1], before they are clamped
    images = tokenizer.decode(tokens)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.float32
    assert float(images.min()) == -1 and float(images.max()) == 1


@each_kind
@torch.no_grad()
def test_decode_is_what_training_reconstructs(make_tokenizer, kind: str) -> None:
    """The ids carry everything: decoding them gives the reconstruction of the loss."""
    tokenizer = make_tokenizer(kind)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    _, _, made = tokenizer.loss(images)
    assert torch.equal(tokenizer.encode(images), made.tokens)
    torch.testing.assert_close(tokenizer.decode(made.tokens), made.outputs.clamp(-1, 1))


@each_kind
@torch.no_grad()
def test_decoding_needs_no_loss(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    tokens = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    expected = tokenizer.decode(tokens)
    del tokenizer.objective
    assert torch.equal(tokenizer.decode(tokens), expected)


@each_kind
def test_sizes_that_the_downsampling_does_not_divide(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for call in (lambda: tokenizer.token_shape(18), lambda: tokenizer.encode(torch.rand(1, 3, 18, 18))):
        with pytest.raises(ValueError, match="image_size=18 is not a multiple of the down-sampling 4"):
            call()


@pytest.mark.parametrize(("reconstruction_loss", "function"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_loss_is_the_sum_of_its_terms(make_tokenizer, reconstruction_loss: str, function) -> None:
    for kind, names in (("fsq", {"reconstruction"}), ("vqvae", {"reconstruction", "commitment"})):
        tokenizer = make_tokenizer(kind, reconstruction_loss=reconstruction_loss)
        images = torch.rand(2, 3, 8, 8) * 2 - 1
        loss, terms, made = tokenizer.loss(images)
        assert set(terms) == names
        torch.testing.assert_close(loss, torch.stack(list(terms.values())).sum())
        torch.testing.assert_close(terms["reconstruction"], function(made.outputs, images))


@pytest.mark.parametrize(
    ("kind", "arguments"), [("fsq", {}), ("vqvae", {}), ("vqvae", {"codebook_update": "gradient"})]
)
def test_every_parameter_is_trained(make_tokenizer, kind: str, arguments) -> None:
    tokenizer = make_tokenizer(kind, **arguments).train()
    tokenizer.loss(torch.rand(2, 3, 8, 8) * 2 - 1)[0].backward()
    assert not [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]


@each_kind
def test_it_learns(make_tokenizer, kind: str) -> None:
    """Four images, each with another half white, are told apart and given back."""
    tokenizer = make_tokenizer(kind, optimizer=partial(torch.optim.Adam, lr=1e-2)).train()
    images = torch.full((4, 3, 8, 8), -0.9)
    images[0, :, :4], images[1, :, 4:], images[2, :, :, :4], images[3, :, :, 4:] = 0.9, 0.9, 0.9, 0.9
    optimizer = tokenizer.configure_optimizers()
    for _ in range(60):
        loss = tokenizer.loss(images)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        assert F.mse_loss(tokenizer.decode(tokens), images) < 0.1
    assert len(tokens.flatten(1).unique(dim=0)) == 4


def test_psnr_by_hand(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over images of 10 log10(255^2 / mean squared error), on uint8 pixels."""
    tokenizer = make_tokenizer()
    logged = logged_by(tokenizer, monkeypatch)
    expected = []
    with torch.no_grad():
        for batch in (torch.rand(3, 3, 8, 8) * 2 - 1, torch.rand(1, 3, 8, 8) * 2 - 1):
            tokenizer.validation_step({"image": batch}, 0)
            rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(batch))).tolist()
            for one, other in zip(rebuilt, to_uint8(batch).tolist(), strict=True):
                flat = [
                    (a - b) ** 2
                    for rows, others in zip(one, other, strict=True)
                    for row, second in zip(rows, others, strict=True)
                    for a, b in zip(row, second, strict=True)
                ]
                expected.append(10 * log10(255**2 / (sum(flat) / len(flat))))
    assert logged["validation/psnr"] is tokenizer.psnr
    assert float(tokenizer.psnr.compute()) == pytest.approx(sum(expected) / 4, rel=1e-5)


@torch.no_grad()
def test_usage_and_perplexity_over_an_epoch(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    logged = logged_by(tokenizer, monkeypatch)
    for epoch in range(2):  # the second epoch forgets the first
        images = (torch.rand(6, 3, 8, 8) * 2 - 1) * (1 + 2 * epoch)
        for part in images.split(2):
            tokenizer.validation_step({"image": part}, 0)
        tokenizer.on_validation_epoch_end()
        ids = tokenizer.encode(images).flatten().tolist()
        shares = [ids.count(token) / len(ids) for token in set(ids)]
        assert float(logged["validation/codebook_usage"]) == pytest.approx(len(shares) / 12)  # type: ignore[arg-type]
        perplexity = exp(-sum(share * log(share) for share in shares))
        assert float(logged["validation/perplexity"]) == pytest.approx(perplexity)  # type: ignore[arg-type]


def test_training_logs_every_term(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("vqvae", codebook_update="gradient").train()
    logged = logged_by(tokenizer, monkeypatch)
    batch = {"image": torch.rand(2, 3, 8, 8)}
    ids = tokenizer.eval().encode(batch["image"])
    made = tokenizer.train().training_step(batch, 0)
    loss = made["loss"]
    assert set(logged) == {f"train/{name}" for name in ("loss", "reconstruction", "commitment", "codebook")}
    assert logged["train/loss"] is loss and loss.requires_grad
    assert made["tokens"].shape == ids.shape and made["tokens"].dtype == torch.int64


@each_kind
@torch.no_grad()
def test_autocast_decodes_float32(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).dtype == torch.float32


@torch.no_grad()
def test_images_too_small_for_ssim_have_a_psnr(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("fsq")
    logged = logged_by(tokenizer, monkeypatch)
    tokenizer.validation_step({"image": torch.rand(2, 3, 4, 8) * 2 - 1}, 0)
    assert float(logged["validation/psnr"].compute()) > 0 and "validation/ssim" not in logged


class Dropping(ConvAutoencoder):
    """Half of what goes in is left out in training."""

    def encode(self, images):
        return super().encode(nn.functional.dropout(images, training=self.training))

    def decode(self, latents):
        return super().decode(nn.functional.dropout(latents, training=self.training))


def test_codes_and_images_are_those_of_eval_mode() -> None:
    tokenizer = FSQ(partial(Dropping, channels=8, multipliers=(1, 2), blocks=1, attention=False, norm_groups=4), [8, 8])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = tokenizer.eval().encode(images)
    decoded = tokenizer.decode(tokens)
    tokenizer.train()
    tokenizer.network.decoder.eval()
    before = [module.training for module in tokenizer.modules()]
    assert torch.equal(tokenizer.encode(images), tokens) and torch.equal(tokenizer.decode(tokens), decoded)
    assert [module.training for module in tokenizer.modules()] == before and tokenizer.training
    assert not torch.equal(tokenizer.quantizer.encode(tokenizer.latents(images)), tokens)
