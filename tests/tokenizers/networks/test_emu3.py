"""Emu3's autoencoder: images as clips of equal frames, and what is refused."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

from discrete_lit.tokenizers import VQGAN
from discrete_lit.tokenizers.networks import Emu3Autoencoder
from discrete_lit.tokenizers.quantizers import VectorQuantizer

SIZES: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "norm_groups": 4}


def network(**changes: Any) -> Emu3Autoencoder:
    return randomise(Emu3Autoencoder(3, **{**SIZES, **changes}), 0.3).eval()


@pytest.mark.parametrize("frames", [1, 4])
@torch.no_grad()
def test_an_image_is_a_clip_of_equal_frames(frames: int) -> None:
    made, images = network(frames=frames), torch.randn(2, 3, 4, 6)
    clips = images[:, :, None].expand(-1, -1, frames, -1, -1)
    latents = made.encode(images)
    assert latents.shape == (2, 3, 2, 3) and made.grid([4, 6]) == (2, 3)
    torch.testing.assert_close(made.encode(clips), latents)
    decoded = made.decode(latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(made.decode(latents[:, :, None])[:, :, 0], decoded)


@torch.no_grad()
def test_no_frame_sees_a_later_one() -> None:
    """The first grid of codes stands for the first four frames, whatever comes behind."""
    made, clip = network(), torch.randn(1, 3, 8, 4, 4)
    other = clip.clone()
    other[:, :, 4:] += 1
    first, second = made.encode(clip), made.encode(other)
    assert first.shape == (1, 3, 2, 2, 2)
    torch.testing.assert_close(first[:, :, 0], second[:, :, 0])
    assert (first[:, :, 1] - second[:, :, 1]).abs().max() > 1e-3
    frames = made.decode(torch.stack((first[:, :, 0], second[:, :, 1]), dim=2))
    torch.testing.assert_close(frames[:, :, :4], made.decode(first)[:, :, :4])


def test_a_tokenizer_of_it_trains() -> None:
    tokenizer = VQGAN(
        lambda code_dim, latent_dim: Emu3Autoencoder(code_dim, latent_dim, **SIZES),
        VectorQuantizer(6, 3, codebook_update="gradient", codebook_init="normal"),
    )
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    loss = tokenizer.loss(images)[0]
    loss.backward()
    named = dict(tokenizer.named_parameters())
    # What stands before a norm of one group of channels may have no effect on it.
    reached = [name for name, value in named.items() if value.grad is not None and bool(value.grad.any())]
    assert "quantizer.codebook.codes" in reached and "network.encoder.conv_in.weight" in reached
    assert all(value.grad is not None for value in named.values())
    assert tokenizer.encode(images).shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 3}, "frames=3 must be a power of two"),
        ({"norm_groups": 5}, "norm_groups=5 must divide"),
        ({"attention": (2,)}, "levels between 0 and 1"),
        ({"latent_dim": 4}, "as wide as codes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_images_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of the down-sampling 2"):
        network().encode(torch.randn(1, 3, 4, 5))
    with pytest.raises(ValueError, match="3 frames, which is no multiple of 4"):
        network().encode(torch.randn(1, 3, 3, 4, 4))
