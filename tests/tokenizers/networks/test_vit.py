"""The transformer autoencoder; its blocks against PyTorch's own encoder layers."""

import pytest
import torch
from helpers.random_weights import randomise
from torch import nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks import TransformerSize, ViTAutoencoder
from discrete_lit.tokenizers.networks.vit import TransformerBlocks, initialise


def tiny(**arguments) -> ViTAutoencoder:
    sizes = {"encoder": TransformerSize(16, 1, heads=2), "decoder": TransformerSize(24, 2, heads=3, mlp_hidden=32)}
    return ViTAutoencoder(**{"code_dim": 3, "latent_dim": 6, "patch_size": 4, **sizes, **arguments})


@pytest.mark.parametrize("positions", [{}, {"positions": "learned", "image_size": 16}])
@torch.no_grad()
def test_shapes(positions) -> None:
    network = tiny(image_channels=2, **positions)
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
    for size, call in (
        ("8", lambda: network.grid(8)),
        (r"\(16, 8\)", lambda: network.encode(torch.rand(1, 3, 16, 8))),
    ):
        with pytest.raises(ValueError, match=f"image_size={size}: the learned positions of this network are those of"):
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
    network = tiny(encoder=TransformerSize(16, 0, heads=2), decoder=TransformerSize(24, 0, heads=3))
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


@torch.no_grad()
def test_blocks_are_equal_to_pytorchs_encoder_layers() -> None:
    """`nn.TransformerEncoderLayer` is an independent pre-norm block around `nn.MultiheadAttention`, with eps 1e-5."""
    blocks = randomise(TransformerBlocks(TransformerSize(width=24, depth=2, heads=3, mlp_hidden=40)), 0.3)
    reference = nn.ModuleList(
        nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        for _ in range(2)
    )
    names = {
        "self_attn.in_proj_": "attention.query_key_value.",
        "self_attn.out_proj.": "attention.out.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
        "linear1.": "mlp.expand.",
        "linear2.": "mlp.contract.",
    }
    own = blocks.state_dict()
    renamed = {}
    for key in reference.state_dict():
        name = key
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[key] = own.pop(f"blocks.{name}")
    assert not own
    reference.load_state_dict(renamed)
    x = torch.randn(2, 7, 24) * 1e-2  # small, so that the norms' epsilon counts
    expected = x
    for layer in reference:
        expected = layer(expected)
    torch.testing.assert_close(blocks(x), expected, rtol=1e-5, atol=1e-5)


def test_block_sizes() -> None:
    blocks = TransformerBlocks(TransformerSize(width=8, depth=3, heads=2))
    assert len(blocks.blocks) == 3
    assert blocks.blocks[0].mlp.expand.out_features == 32
    for heads in (3, 0, -2):
        with pytest.raises(ValueError, match=f"width=8 is not a multiple of heads={heads}"):
            TransformerBlocks(TransformerSize(width=8, depth=1, heads=heads))


def test_initial_weights() -> None:
    layers = nn.Sequential(nn.Linear(100, 100), nn.Conv2d(3, 100, 5, bias=False))
    initialise(layers)
    assert not layers[0].bias.any()
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_positions_of_images_that_are_not_square() -> None:
    """Row r and column c of a 2 x 4 grid are patch 4 r + c, whose embedding is made of r and c, in this order."""
    learned = tiny(positions="learned", image_size=[8, 16], image_channels=1)
    assert learned.grid((8, 16)) == (2, 4) and learned.encode(torch.rand(1, 1, 8, 16)).shape == (1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"image_size=\(16, 8\): the learned positions .* those of \(8, 16\) pixels"):
        learned.encode(torch.rand(1, 1, 16, 8))
    positions = tiny().encoder_positions
    table = positions(torch.zeros(1, 8, 16), (2, 4))[0]
    waves = 10000.0 ** -(torch.arange(4) / 4)
    for row in range(2):
        for column in range(4):
            angles = [axis * waves for axis in (row, column)]
            expected = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())])
            torch.testing.assert_close(table[4 * row + column], expected)
    assert not torch.equal(positions(torch.zeros(1, 8, 16), (4, 2))[0], table)
