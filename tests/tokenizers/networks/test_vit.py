"""The transformer autoencoder."""

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.tokenizers.networks import TransformerSize, ViTAutoencoder


def tiny(**arguments) -> ViTAutoencoder:
    sizes = {"encoder": TransformerSize(16, 1, 2), "decoder": TransformerSize(24, 2, 3, 32)}
    return ViTAutoencoder(**{"code_dim": 3, "latent_dim": 6, "patch_size": 4, **sizes, **arguments})


@pytest.mark.parametrize("positions", [{}, {"positions": "learned", "image_size": 16}])
@torch.no_grad()
def test_shapes(positions) -> None:
    network = tiny(in_channels=2, **positions)
    latents = network.encode(torch.rand(5, 2, 16, 16))
    assert network.grid(16) == (4, 4)
    assert latents.shape == (5, 6, 4, 4)
    assert network.decode(latents[:, :3]).shape == (5, 2, 16, 16)
    assert tiny(out_channels=6).decode(latents[:, :3]).shape == (5, 6, 16, 16)


@torch.no_grad()
def test_fixed_positions_fit_any_size() -> None:
    """And what was computed for one size is not used for another."""
    network = tiny()
    images = torch.rand(1, 3, 16, 8)
    latents = network.encode(images)
    assert latents.shape[2:] == (4, 2)
    assert network.decode(latents[:, :3]).shape == (1, 3, 16, 8)
    network.encode(torch.rand(1, 3, 8, 16))
    assert torch.equal(network.encode(images), latents)


@torch.no_grad()
def test_learned_positions_fit_one_size() -> None:
    network = tiny(positions="learned", image_size=16)
    for call in (lambda: network.grid(8), lambda: network.encode(torch.rand(1, 3, 16, 8))):
        with pytest.raises(ValueError, match="image_size=8: the learned positions of this network are those of 16 pix"):
            call()
    with pytest.raises(ValueError, match=r"learned positions are those of a grid \(4, 4\), got \(2, 8\)"):
        network.decode(torch.rand(1, 3, 2, 8))
    with pytest.raises(ValueError, match="positions='learned' need image_size"):
        tiny(positions="learned")


def test_sizes_that_the_patches_do_not_divide() -> None:
    network = tiny()
    for call in (lambda: network.grid(18), lambda: network.encode(torch.rand(1, 3, 16, 18))):
        with pytest.raises(ValueError, match="image_size=18 is not a multiple of patch_size=4"):
            call()
    with pytest.raises(ValueError, match="image_size=0"):
        network.grid(0)


@pytest.mark.parametrize("positions", [{}, {"positions": "learned", "image_size": 16}])
@torch.no_grad()
def test_places_are_told_apart(positions) -> None:
    """Of an image of equal patches every latent differs, and of equal codes every patch."""
    network = tiny(**positions)
    for parameter in network.parameters():
        parameter.mul_(10)
    latents = network.encode(torch.full((1, 3, 16, 16), 0.5)).flatten(2)[0].T
    patches = F.pixel_unshuffle(network.decode(torch.ones(1, 3, 4, 4)), 4).flatten(2)[0].T
    for rows in (latents, patches):
        assert len(rows) == 16 and torch.pdist(rows).min() > 1e-3


@torch.no_grad()
def test_patches_keep_their_place() -> None:
    """Without blocks, positions and head, a latent is the embedding of its own patch, and decodes into its own."""
    network = tiny(encoder=TransformerSize(16, 0, 2), decoder=TransformerSize(24, 0, 3))
    images = torch.rand(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 1
    moved = (network.encode(changed) - network.encode(images)).abs().amax(dim=(0, 1)).nonzero().tolist()
    assert moved == [[1, 2]]
    codes = torch.zeros(1, 3, 4, 4)
    other = codes.clone()
    other[:, :, 1, 2] = 1
    moved = (network.decode(other) - network.decode(codes)).abs().amax(dim=(0, 1)).nonzero()
    assert moved.amin(dim=0).tolist() == [4, 8] and moved.amax(dim=0).tolist() == [7, 11] and len(moved) == 16


def test_every_parameter_is_trained_and_the_last_layer_makes_the_pixels() -> None:
    network = tiny(positions="learned", image_size=16)
    outputs = network.decode(network.encode(torch.rand(1, 3, 16, 16))[:, :3])
    outputs.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert network.last_layer.shape == (3 * 4 * 4, 32)
