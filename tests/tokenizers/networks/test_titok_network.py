"""TiTok's autoencoder."""

from functools import partial

import pytest
import torch
from helpers.random_weights import randomise
from torch import nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks import ConvAutoencoder, TransformerSize
from discrete_lit.tokenizers.titok import ProxyDecoder, TiTokAutoencoder


def tiny(**arguments) -> TiTokAutoencoder:
    sizes = {"encoder": TransformerSize(16, 1, heads=2), "decoder": TransformerSize(24, 2, heads=3)}
    shape = {"image_size": 16, "patch_size": 4, "latent_tokens": 5}
    return TiTokAutoencoder(**{"code_dim": 3, "latent_dim": 6, **shape, **sizes, **arguments})


def proxy() -> ProxyDecoder:
    network = partial(ConvAutoencoder, channels=8, multipliers=(1, 2, 1), blocks=1, norm_groups=4, latent_kernel=None)
    return ProxyDecoder(11, 8, network=network)


@torch.no_grad()
def test_shapes() -> None:
    images = torch.rand(2, 3, 16, 16)
    for network in (tiny(), tiny(proxy=proxy())):
        latents = network.encode(images)
        assert latents.shape == (2, 6, 5) and network.grid(16) == (5,)
        assert network.decode(latents[:, :3]).shape == (2, 3, 16, 16)
    assert network.proxy_logits(latents[:, :3]).shape == (2, 11, 4, 4)
    assert tiny(image_channels=1).decode(latents[:, :3]).shape == (2, 1, 16, 16)


def test_other_image_sizes() -> None:
    network = tiny()
    for size, call in (
        ("32", lambda: network.grid(32)),
        (r"\(16, 32\)", lambda: network.encode(torch.rand(1, 3, 16, 32))),
    ):
        with pytest.raises(
            ValueError, match=f"image_size={size}: the learned positions of this network are those of 16 pix"
        ):
            call()
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of patch_size=4"):
        tiny(image_size=18)
    with pytest.raises(ValueError, match="latent_tokens must be positive, got 0"):
        tiny(latent_tokens=0)


@torch.no_grad()
def test_the_legacy_reshape_only_reorders() -> None:
    """It reads the N x D outputs of the encoder row by row as D x N: here by an index computed by hand."""
    plain, legacy = tiny(latent_tokens=3), tiny(latent_tokens=3, legacy_reshape=True)
    legacy.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    outputs: list[torch.Tensor] = []
    plain.encoder.project.register_forward_hook(lambda module, given, made: outputs.append(given[0]))
    plain.encode(images)
    tokens = outputs[0]  # (B, N, D)
    scrambled = torch.empty_like(tokens)
    for token in range(3):
        for channel in range(16):
            place = channel * 3 + token
            scrambled[:, token, channel] = tokens[:, place // 16, place % 16]
    expected = plain.encoder.project(scrambled).transpose(1, 2)
    torch.testing.assert_close(legacy.encode(images), expected)
    assert not torch.allclose(plain.encode(images), expected)


@torch.no_grad()
def test_the_encoder_from_its_parts() -> None:
    """Class token, patches in raster order, latent tokens, each with its position; pixels in [0, 1]."""
    network = tiny()
    randomise(network, 0.3)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    encoder = network.encoder
    rows = []
    for row in range(4):
        for column in range(4):
            patch = (images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] + 1) / 2
            weight = encoder.patch_embedding.weight
            rows.append(torch.einsum("bcij,dcij->bd", patch, weight) + encoder.patch_embedding.bias)
    patches = torch.stack(rows, dim=1)
    part = encoder.sequence
    sequence = torch.cat(
        (
            (part.class_token + part.patch_positions[:1]).expand(2, -1, -1),
            patches + part.patch_positions[1:],
            (encoder.latent_tokens + part.latent_positions).expand(2, -1, -1),
        ),
        dim=1,
    )
    hidden = part.blocks(part.first_norm(sequence))
    expected = encoder.project(part.final_norm(hidden[:, 17:])).transpose(1, 2)
    torch.testing.assert_close(network.encode(images), expected)


@torch.no_grad()
def test_the_decoder_sees_codes_in_order_and_gives_patches_in_place() -> None:
    network = randomise(tiny(), 0.3)
    codes = torch.randn(2, 3, 5)
    before = network.decode(codes)
    assert not torch.allclose(network.decode(codes.flip(2)), before, atol=1e-3)
    # The linear layer's channels are row, column and colour of a pixel within its patch.
    network.pixels.smooth.weight.zero_()
    network.pixels.smooth.bias.zero_()
    network.pixels.smooth.weight[range(3), range(3), 1, 1] = 1.0
    vectors = network.decoder(codes)
    pixels = network.pixels.pixels(vectors).reshape(2, 4, 4, 4, 4, 3)
    images = network.decode(codes)
    for y, x, colour in ((0, 0, 0), (5, 9, 2), (15, 4, 1)):
        expected = pixels[:, y // 4, x // 4, y % 4, x % 4, colour] * 2 - 1
        torch.testing.assert_close(images[:, colour, y, x], expected)


@torch.no_grad()
def test_a_certain_proxy_decodes_its_code() -> None:
    """With one logit far above the others, the mixture is that code."""
    decoder = proxy()
    ids = torch.randint(11, (2, 4, 4))
    logits = F.one_hot(ids, 11).movedim(-1, 1) * 100.0
    expected = decoder.network.decode(decoder.codebook[ids].movedim(-1, 1))
    torch.testing.assert_close(decoder(logits), expected)
    mixed = decoder.codebook.mean(dim=0)[None, :, None, None].expand(2, -1, 4, 4)
    torch.testing.assert_close(decoder(torch.zeros(2, 11, 4, 4)), decoder.network.decode(mixed))


@pytest.mark.parametrize("with_proxy", [False, True])
def test_every_parameter_is_trained(with_proxy: bool) -> None:
    network = tiny(proxy=proxy() if with_proxy else None)
    network.decode(network.encode(torch.rand(1, 3, 16, 16))[:, :3]).square().sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert any(network.last_layer is parameter for parameter in network.parameters())
    assert isinstance(network.last_layer, nn.Parameter) and len(network.last_layer) == 3


@torch.no_grad()
def test_patches_of_an_image_that_is_not_square_stay_in_place() -> None:
    network = randomise(tiny(image_size=(8, 16), image_channels=1), 0.3)
    images = torch.rand(2, 1, 8, 16)
    latents = network.encode(images)
    assert latents.shape == (2, 6, 5) and network.grid([8, 16]) == (5,)
    network.pixels.smooth.weight.zero_()
    network.pixels.smooth.bias.zero_()
    network.pixels.smooth.weight[0, 0, 1, 1] = 1.0
    decoded = network.decode(latents[:, :3])
    assert decoded.shape == (2, 1, 8, 16)
    pixels = network.pixels.pixels(network.decoder(latents[:, :3])).reshape(2, 2, 4, 4, 4)
    for y, x in ((0, 0), (5, 9), (7, 4), (2, 15)):
        torch.testing.assert_close(decoded[:, 0, y, x], pixels[:, y // 4, x // 4, y % 4, x % 4] * 2 - 1)
    proxied = tiny(image_size=(8, 16), proxy=proxy())
    assert proxied.proxy_logits(torch.rand(2, 3, 5)).shape == (2, 11, 2, 4)
    assert proxied.decode(torch.rand(2, 3, 5)).shape == (2, 3, 8, 16)
