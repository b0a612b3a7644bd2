"""The hybrid tokenizer: ids and residual add up, skipping the residual is VAR, and what training skips and trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor

from discrete_lit.checkpoints import save
from discrete_lit.tokenizers import HybridLatents, HybridVQ, MultiScaleVQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

SETTINGS: dict[str, Any] = {"codebook_size": 7, "code_dim": 3, "scales": (1, 2, 3)}


def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return ConvAutoencoder(code_dim, latent_dim, channels=8, multipliers=(1, 1, 2), blocks=1, norm_groups=4)


def hybrid(**settings: Any) -> HybridVQ:
    """Of 12 x 12 pixels, with random weights."""
    return randomise(HybridVQ(network, **{**SETTINGS, **settings}), 0.5).eval()


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 12, 12) * 2 - 1


def plain_like(module: HybridVQ) -> MultiScaleVQ:
    """VAR's tokenizer of the same weights."""
    plain = MultiScaleVQ(network, **SETTINGS)
    plain.load_state_dict(module.state_dict())
    return plain.eval()


@torch.no_grad()
def test_ids_and_residual_add_up() -> None:
    module, x = hybrid(), images()
    tokens, residual = module.encode_with_residual(x)
    f = module.network.encode(x)
    assert tokens.shape == (4, 14) and residual.shape == f.shape == (4, 3, 3, 3)
    assert float(residual.abs().max()) > 0.1
    torch.testing.assert_close(module.join(tokens, residual), f, rtol=0, atol=1e-5)
    torch.testing.assert_close(module.decode_with_residual(tokens, residual), module.decode_latents(f))
    # Validation sees the residual too.
    torch.testing.assert_close(module.reconstruct(x).outputs.clamp(-1, 1), module.decode_latents(f))


@torch.no_grad()
def test_without_the_residual_it_is_vars_tokenizer() -> None:
    module, x = hybrid(skip_residual=1.0), images()
    plain = plain_like(module)
    tokens = module.encode(x)
    assert torch.equal(tokens, plain.encode(x)) and torch.equal(tokens, module.encode_with_residual(x).tokens)
    assert torch.equal(module.decode(tokens), plain.decode(tokens))
    trained, other = module.train().reconstruct(x), plain.train().reconstruct(x)
    torch.testing.assert_close(trained.outputs, other.outputs)
    assert trained.losses.keys() == other.losses.keys() == {"commitment", "codebook"}
    for name, value in other.losses.items():
        torch.testing.assert_close(trained.losses[name], value)


@torch.no_grad()
def test_the_residual_stands_on_codes_without_phi_at_the_last_scale() -> None:
    """The sums of the released code: with phi everywhere, and with the raw codes of the last scale."""
    quantizer = hybrid().quantizer
    tokens = torch.randint(7, (2, 14))
    *coarse, last = quantizer.split(tokens)
    expected = quantizer.codebook.codes[last].unflatten(1, (3, 3)).movedim(-1, 1)
    for number, ids in enumerate(coarse):
        expected = expected + quantizer.contribution(number, ids)
    torch.testing.assert_close(quantizer.before_residual(tokens), expected)
    assert float((quantizer.lookup(tokens).movedim(-1, 1) - expected).abs().max()) > 0.1


@torch.no_grad()
def test_training_skips_the_residual_of_an_image_by_its_number() -> None:
    module, x = hybrid().train(), images(2)
    numbers = torch.arange(4000)
    skipped = module._skipped(numbers, numbers)
    assert float(skipped.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(module._skipped(numbers[:3], numbers[900:903]), skipped[900:903])
    one, other = (int((skipped == which).nonzero()[0]) for which in (True, False))
    made = module.reconstruct(x, index=torch.tensor([one, other])).outputs
    module.skip_residual = 1.0
    without = module.reconstruct(x, index=torch.tensor([one, other])).outputs
    module.skip_residual = 0.0
    whole = module.reconstruct(x, index=torch.tensor([one, other])).outputs
    torch.testing.assert_close(made, torch.stack((without[0], whole[1])))
    assert float((without - whole).abs().max()) > 0.1


def test_gradients_reach_the_encoder_with_and_without_the_residual() -> None:
    for skip in (0.0, 1.0):
        module = hybrid(skip_residual=skip).train()
        made = module.reconstruct(images())
        made.outputs.square().mean().backward()
        assert module.network.encoder.conv_in.weight.grad.abs().sum() > 0
        # Codes learn by the quantizer's losses alone.
        assert module.quantizer.codebook.codes.grad is None


def test_the_decoder_alone_is_trained() -> None:
    module = hybrid(decoder_only=True, codebook_update="ema").train()
    assert not module.network.encoder.training and not module.quantizer.training and module.network.decoder.training
    before = {name: value.clone() for name, value in module.quantizer.state_dict().items()}
    loss, terms, _ = module.loss(images(), step=0, index=torch.arange(4))
    assert terms.keys() == {"reconstruction"}
    loss.backward()
    learned = {name for name, value in module.named_parameters() if value.grad is not None}
    assert learned and all(name.startswith("network.decoder.") for name in learned)
    assert {name for name, value in module.named_parameters() if value.requires_grad} == learned
    assert all(torch.equal(value, before[name]) for name, value in module.quantizer.state_dict().items())


def first_stage(folder: Path, kind: str, **settings: Any) -> str:
    from discrete_lit.checkpoints import instantiate

    autoencoder = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "norm_groups": 4},
    }
    config = {"class_path": f"discrete_lit.tokenizers.{kind}", "init_args": {"network": autoencoder, **settings}}
    save(randomise(instantiate(config), 0.5), folder / f"{kind}.ckpt")
    return str(folder / f"{kind}.ckpt")


def test_it_begins_from_a_first_stage(tmp_path: Path) -> None:
    import discrete_lit

    file = first_stage(tmp_path, "MultiScaleVQ", codebook_size=7, code_dim=3, scales=[1, 2, 3])
    module = hybrid()
    module._begin_from(file)
    first = discrete_lit.load(file)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(ValueError, match=r"has the scales \[1, 2, 3\], this HybridVQ \[1, 3\]"):
        hybrid(scales=(1, 3))._begin_from(file)
    with pytest.raises(ValueError, match="is a tokenizer of other sizes"):
        hybrid(codebook_size=8)._begin_from(file)
    with pytest.raises(ValueError, match="holds a FSQ, not a MultiScaleVQ"):
        module._begin_from(first_stage(tmp_path, "FSQ", levels=[4, 4, 4]))


@torch.no_grad()
def test_latents_of_a_hybrid_tokenizer() -> None:
    module, x = hybrid(), images(2)
    latents = HybridLatents(module)
    f = latents.encode(x)
    assert latents.latent_shape(12) == (3, 3, 3) and torch.equal(f, module.network.encode(x))
    assert torch.equal(latents.decode(f), module.decode_latents(f))
    mean, logvar = latents.moments(x)
    assert torch.equal(mean, f) and (logvar == -30).all()
    assert HybridLatents(hybrid()).fingerprint() != latents.fingerprint()
    assert not latents.train().tokenizer.training


def test_bad_input(make_tokenizer) -> None:
    module = hybrid()
    tokens, residual = module.encode_with_residual(images(2))
    with pytest.raises(ValueError, match=r"skip_residual must lie in \[0, 1\], got 2"):
        hybrid(skip_residual=2)
    with pytest.raises(ValueError, match="are they of another tokenizer or image size"):
        module.decode_with_residual(tokens, residual[:, :, :2])
    with pytest.raises(ValueError, match="are they of another tokenizer or image size"):
        module.join(tokens, residual.long())
    with pytest.raises(ValueError, match=r"ids of the scales \[1, 2, 3\] have shape \(B, 14\), got \(2, 10\)"):
        module.decode_with_residual(tokens[:, :10], residual)
    with pytest.raises(ValueError, match="were these tokens made by another tokenizer"):
        module.decode_with_residual(tokens + 7, residual)
    with pytest.raises(ValueError, match="the latent grid is 4 x 4, and the scales"):
        HybridLatents(module).latent_shape(16)
    with pytest.raises(ValueError, match="those of a HybridVQ, ids with a residual; got a FSQ"):
        HybridLatents(make_tokenizer("fsq"))
    with pytest.raises(ValueError, match="are these the ids of a Tokenizer"):
        HybridLatents(module).decode(torch.zeros(2, 3, 3, 3, dtype=torch.int64))
