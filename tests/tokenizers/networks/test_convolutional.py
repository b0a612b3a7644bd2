"""The convolutional autoencoder."""

import pytest
import torch

from discrete_lit.tokenizers.networks import ConvAutoencoder


def tiny(**arguments) -> ConvAutoencoder:
    return ConvAutoencoder(
        **{"code_dim": 3, "channels": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4, **arguments}
    )


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("multipliers", "downsampling"), [((1,), 1), ((1, 2), 2), ((1, 1, 2), 4), ((2, 1, 1, 1), 8)])
@torch.no_grad()
def test_shapes(attention: bool, multipliers: tuple[int, ...], downsampling: int) -> None:
    network = tiny(attention=attention, multipliers=multipliers, in_channels=1)
    latents = network.encode(torch.rand(2, 1, 16, 16))
    assert network.grid(16) == latents.shape[2:] == (16 // downsampling,) * 2
    assert latents.shape[1] == 3
    assert network.decode(latents).shape == (2, 1, 16, 16)


def test_sizes_that_the_downsampling_does_not_divide() -> None:
    network = tiny()
    for call in (lambda: network.grid(15), lambda: network.encode(torch.rand(1, 3, 16, 15))):
        with pytest.raises(ValueError, match="image_size=15 is not a multiple of the down-sampling 2"):
            call()
    with pytest.raises(ValueError, match="image_size=0"):
        network.grid(0)


@torch.no_grad()
def test_attention_reaches_every_position() -> None:
    """Without attention a latent sees its neighbourhood; with it, a change in one corner reaches the other."""
    images = torch.rand(1, 3, 48, 48)
    changed = images.clone()
    changed[..., :4, :4] += 1
    for attention in (True, False):
        network = tiny(attention=attention, norm_groups=8, channels=8)
        # GroupNorm's statistics would carry the change everywhere: make every norm the identity.
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
        difference = (network.encode(changed) - network.encode(images)).abs()[0, :, -1, -1].max()
        assert bool(difference > 0) == attention


@torch.no_grad()
def test_table_7_of_the_paper() -> None:
    """Encoder and decoder of VQGAN at 256 pixels: two blocks a level, three in the decoder, attention at 16 x 16."""
    network = ConvAutoencoder(256, channels=32)
    kinds = [type(module).__name__ for module in network.encoder]
    assert kinds.count("ResidualBlock") == 5 * 2 + 2 and kinds.count("SpatialAttention") == 2 + 1
    kinds = [type(module).__name__ for module in network.decoder]
    assert kinds.count("ResidualBlock") == 5 * 3 + 2 and kinds.count("SpatialAttention") == 3 + 1
    assert network.grid(256) == (16, 16)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"norm_groups=3 must divide every width of the network, got \[8, 16\]"):
        tiny(norm_groups=3)
    with pytest.raises(ValueError, match=r"got \[\]"):
        tiny(multipliers=())
