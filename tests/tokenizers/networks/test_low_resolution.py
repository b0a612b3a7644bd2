"""The convolutional autoencoder of low resolution: sizes, its border, its start, BatchNorm in its two modes."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

from discrete_lit.tokenizers import FSQ, LFQ, VQVAE, MultiScaleVQ
from discrete_lit.tokenizers.networks import LowResolutionAutoencoder
from discrete_lit.tokenizers.networks.low_resolution import BatchNorm, PreActivationBlock


def tiny(code_dim: int = 3, latent_dim: int | None = None, **settings: Any) -> LowResolutionAutoencoder:
    small = {"widths": [4, 6], "blocks": [0, 1], "decoder_widths": [3, 4, 5], "decoder_blocks": [0, 1, 2]}
    return LowResolutionAutoencoder(code_dim, latent_dim, **{"image_channels": 1, **small, **settings})


@pytest.mark.parametrize(
    ("settings", "size", "grid"),
    [
        ({}, (8, 12), (2, 3)),
        ({"border": 2}, (12, 16), (2, 3)),
        ({"image_channels": 3, "out_channels": 6, "block_kernel": 3}, (8, 8), (2, 2)),
        ({"widths": [4], "blocks": [1], "decoder_widths": [3, 4], "decoder_blocks": [1, 0]}, (6, 4), (3, 2)),
        (
            {"widths": [2, 3, 4], "blocks": [1, 0, 2], "decoder_widths": [2, 2, 3, 4], "decoder_blocks": [0, 1, 0, 1]},
            (16, 8),
            (2, 1),
        ),
    ],
)
@torch.no_grad()
def test_any_size_channels_and_factor(settings, size, grid) -> None:
    network = tiny(latent_dim=5, **settings)
    images = torch.rand(2, network.image_channels, *size)
    latents = network.encode(images)
    assert network.grid(size) == grid and latents.shape == (2, 5, *grid)
    outputs = network.decode(latents[:, :3])
    assert outputs.shape == (2, settings.get("out_channels", network.image_channels), *size)


@torch.no_grad()
def test_the_border_is_cropped_and_put_back() -> None:
    network = randomise(tiny(border=2, border_value=0.25), 0.3).eval()
    inside = tiny().eval()
    inside.load_state_dict(network.state_dict())
    images = torch.rand(2, 1, 12, 12)
    latents = network.encode(images)
    assert torch.equal(latents, inside.encode(images[:, :, 2:-2, 2:-2]))
    outputs = network.decode(latents)
    assert torch.equal(outputs[:, :, 2:-2, 2:-2], inside.decode(latents))
    outputs[:, :, 2:-2, 2:-2] = 0.25
    assert torch.equal(outputs, torch.full_like(outputs, 0.25))


@torch.no_grad()
def test_residual_branches_begin_at_zero() -> None:
    block = PreActivationBlock(4, 3)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    randomise(block, 0.5).eval()
    branch = block.conv2(torch.nn.functional.silu(block.conv1(torch.nn.functional.silu(block.norm(x)))))
    assert torch.equal(block(x), x + branch) and branch.abs().sum() > 0


@pytest.mark.parametrize("side", [9, 10, 4])
def test_sizes_that_do_not_divide(side: int) -> None:
    network = tiny(border=2)
    for call in (lambda: network.grid(side), lambda: network.encode(torch.rand(1, 1, 8, side))):
        with pytest.raises(ValueError, match=rf"image_size={side} without its border of 2 is not a multiple of .* 4"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": [1]}, r"blocks=\[1\] must be as many as widths=\[4, 6\]"),
        ({"decoder_widths": [3, 4], "decoder_blocks": [0, 1]}, r"decoder_widths=\[3, 4\] must be one more than"),
        ({"decoder_blocks": [1]}, r"decoder_blocks=\[1\] and .* must be as many as decoder_widths=\[3, 4, 5\]"),
        ({"decoder_block_kernels": [3, 3]}, r"decoder_block_kernels=\[3, 3\] must be as many"),
        ({"block_kernel": 5}, "has the size 1 or 3, got block_kernel=5"),
        ({"widths": [], "blocks": []}, r"widths=\[\] .* must be at least 1"),
        ({"blocks": [0, -1]}, "at least 0"),
        ({"border": -1}, "border=-1 must be at least 0"),
        ({"border_value": -2.0}, r"border_value=-2.0 in \[-1, 1\]"),
    ],
)
def test_settings_that_do_not_fit(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


TOKENIZERS = {
    FSQ: {"levels": [4, 3]},
    LFQ: {"bits": 3},
    VQVAE: {"codebook_size": 7, "code_dim": 3},
    MultiScaleVQ: {"codebook_size": 7, "code_dim": 3, "scales": [1, 2]},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_tokenizer_trains_and_reads_on_it(kind: type) -> None:
    """And gives the same tokens in training mode as in eval mode, without moving the running statistics."""
    tokenizer = kind(lambda code, latent: tiny(code, latent, border=2), **TOKENIZERS[kind]).train()
    images = torch.rand(6, 1, 12, 12) * 2 - 1
    norms = [module for module in tokenizer.modules() if isinstance(module, BatchNorm)]
    for _ in range(2):
        loss, _, _ = tokenizer.loss(images)
        loss.backward()
    assert all(norm.num_batches_tracked == 2 for norm in norms)
    assert any(weight.grad is not None for weight in tokenizer.network.encoder.parameters())
    tokens = tokenizer.encode(images)
    assert all(norm.num_batches_tracked == 2 for norm in norms)
    assert torch.equal(tokenizer.eval().encode(images), tokens)
    assert torch.equal(tokenizer.encode(images[:1]), tokens[:1])
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape and (decoded[:, :, :2] == -1).all()


def test_norms_keep_their_digits_in_half_precision() -> None:
    network = randomise(tiny(), 0.3).to(torch.bfloat16)
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 7
    assert all(norm.weight.dtype == norm.running_var.dtype == torch.float32 for norm in norms)
    assert network.decode(network.encode(torch.rand(2, 1, 8, 8).bfloat16())).dtype == torch.bfloat16
    assert network.double().decode(network.encode(torch.rand(2, 1, 8, 8).double())).dtype == torch.float64
