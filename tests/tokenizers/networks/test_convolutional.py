"""The convolutional autoencoder."""

import pytest
import torch

from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.networks.network import initialise_layers


def tiny(**arguments) -> ConvAutoencoder:
    return ConvAutoencoder(
        **{"code_dim": 3, "channels": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4, **arguments}
    )


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("multipliers", "downsampling"), [((1,), 1), ((1, 2), 2), ((1, 1, 2), 4), ((2, 1, 1, 1), 8)])
@torch.no_grad()
def test_shapes(attention: bool, multipliers: tuple[int, ...], downsampling: int) -> None:
    network = tiny(attention=attention, multipliers=multipliers, image_channels=1)
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
def test_dropout_of_hidden_units() -> None:
    """Half of what enters the second convolution of each block becomes 0 and the rest double, in training alone."""
    network = tiny(dropout=0.5, bias=False)
    plain = tiny(bias=False)
    plain.load_state_dict(network.state_dict())
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(network.eval().encode(images), plain.encode(images))
    block = network.train().encoder.levels[0].blocks[0]
    entering: list[torch.Tensor] = []
    block.conv2.register_forward_pre_hook(lambda layer, given: entering.append(given[0]))
    for training in (False, True):
        block.train(training)(images.repeat(1, 3, 1, 1)[:, :8])
    whole, thinned = entering
    kept = thinned != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(thinned[kept], 2 * whole[kept])
    with pytest.raises(ValueError, match=r"dropout of ConvAutoencoder must lie in \[0, 1\), got 1.0"):
        tiny(dropout=1.0)


def test_first_weights_of_vaex() -> None:
    """Xavier's normal law times one half, of the whole matrix of queries, keys and values; biases 0."""
    network = tiny(channels=64, norm_groups=32)
    initialise_layers(network, "vaex")
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    for layer in convolutions:
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        expected = 0.5 * (2 / ((layer.in_channels + layer.out_channels) * kernel)) ** 0.5
        sharp = 5 / (2 * layer.weight.numel()) ** 0.5  # five standard errors
        assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(expected, rel=sharp)
        assert layer.bias is None or not layer.bias.any()
    assert len(convolutions) > 10
    with pytest.raises(ValueError, match="initialization='xavier' is not known, accepted: vaex, lecun"):
        initialise_layers(network, "xavier")


def count_of(module: torch.nn.Module, kind: str) -> int:
    return sum(type(part).__name__ == kind for part in module.modules())


def test_table_7_of_the_paper() -> None:
    """Encoder and decoder of VQGAN at 256 pixels: two blocks a level, three in the decoder, attention at 16 x 16."""
    network = ConvAutoencoder(256, channels=32)
    assert count_of(network.encoder, "ResidualBlock") == 5 * 2 + 2
    assert count_of(network.encoder, "SpatialAttention") == 2 + 1
    assert count_of(network.decoder, "ResidualBlock") == 5 * 3 + 2
    assert count_of(network.decoder, "SpatialAttention") == 3 + 1
    assert network.grid(256) == (16, 16)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(
        ValueError, match=r"norm_groups=3 must divide every width of the network, each at least 1, got \[8, 16\]"
    ):
        tiny(norm_groups=3)
    with pytest.raises(ValueError, match=r"got \[\]"):
        tiny(multipliers=())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"decoder_multipliers": (1, 2, 2)},
            r"decoder_multipliers=\[1, 2, 2\] must be as many as multipliers=\[1, 2\]",
        ),
        ({"latent_kernel": None, "z_channels": 4}, "z_channels=4 needs a latent_kernel"),
        ({"causal": True}, "need dims=3, got dims=2"),
        ({"clip_start": "zeros"}, "need dims=3, got dims=2"),
        ({"causal": "norms", "dims": 3}, "causal='norms' must be true, false or 'convolutions'"),
        ({"time_levels": [1], "dims": 3}, r"time_levels=\[1\] must be among the levels that are halved, \[0\]"),
        ({"attention": [2]}, r"attention=\[2\] must be levels between 0, the full resolution, and 1"),
        ({"decoder_attention": [-1]}, r"decoder_attention=\[-1\] must be levels"),
        ({"middle_blocks": 0}, "at least one block"),
    ],
)
def test_settings_that_do_not_fit_together(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize("downsampling", ["right", "symmetric", "average"])
@pytest.mark.parametrize("upsampling", ["nearest", "depth_to_space"])
@pytest.mark.parametrize(("dims", "grid"), [(1, (4,)), (2, (4, 4)), (3, (4, 4, 4))])
@torch.no_grad()
def test_one_two_and_three_axes(dims: int, grid: tuple[int, ...], upsampling: str, downsampling: str) -> None:
    network = tiny(dims=dims, upsampling=upsampling, downsampling=downsampling, adaptive_norm=True)
    images = torch.rand(2, 3, *(8,) * dims)
    latents = network.encode(images)
    assert network.grid(8) == latents.shape[2:] == grid
    assert network.decode(latents).shape == images.shape


@torch.no_grad()
def test_a_third_axis_that_the_kernels_do_not_use_changes_nothing() -> None:
    flat = tiny(latent_kernel=3, downsampling="average")
    deep = tiny(latent_kernel=3, downsampling="average", dims=3)
    weights = flat.state_dict()
    for name, weight in deep.state_dict().items():
        if weight.dim() == 5:
            weight.zero_()[:, :, weight.shape[2] // 2] = weights[name]
        else:
            weight.copy_(weights[name])
    images = torch.rand(2, 3, 8, 8)
    clip = images[:, :, None].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(deep.encode(clip), flat.encode(images)[:, :, None].expand(-1, -1, 2, -1, -1))
    latents = torch.randn(2, 3, 4, 4)
    expected = flat.decode(latents)[:, :, None].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(deep.decode(latents[:, :, None].expand(-1, -1, 2, -1, -1)), expected)


@torch.no_grad()
def test_wider_and_narrower_settings_change_the_modules_that_they_name() -> None:
    network = tiny(
        code_dim=3,
        latent_dim=5,
        z_channels=7,
        latent_kernel=3,
        encoder_out_kernel=1,
        blocks=2,
        decoder_blocks=1,
        middle_blocks=3,
        multipliers=(1, 2),
        decoder_multipliers=(3, 1),
        attention=[0],
        decoder_attention=[],
        bias=False,
        out_channels=6,
    )
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["encoder.conv_out.weight"] == (7, 16, 1, 1) and shapes["encoder.to_latents.weight"] == (5, 7, 3, 3)
    assert shapes["decoder.from_codes.weight"] == (7, 3, 3, 3) and shapes["decoder.conv_in.weight"] == (8, 7, 3, 3)
    assert shapes["decoder.levels.1.blocks.0.conv1.weight"] == (24, 8, 3, 3)
    assert shapes["decoder.conv_out.weight"] == (6, 24, 3, 3) and network.last_layer.shape == (6, 24, 3, 3)
    assert (
        "encoder.levels.0.attention.1.out.weight" in shapes and "encoder.levels.1.attention.0.out.weight" not in shapes
    )
    assert count_of(network.decoder, "SpatialAttention") == 1 and count_of(network.decoder, "ResidualBlock") == 2 + 3
    biases = {name for name in shapes if name.endswith("bias") and "norm" not in name}
    assert not [name for name in biases if "blocks" in name] and "encoder.conv_in.bias" not in biases
    assert {"encoder.conv_out.bias", "encoder.levels.0.resample.conv.bias", "decoder.conv_in.bias"} < biases
    codes = torch.rand(1, 3, 4, 4)
    assert network.encode(torch.rand(1, 3, 8, 8)).shape == (1, 5, 4, 4) and network.decode(codes).shape == (1, 6, 8, 8)


@torch.no_grad()
def test_shortcut_of_the_output_drops_the_input() -> None:
    """MaskGIT's blocks forget their input where the channels change: with convolutions of zero nothing passes."""
    for shortcut, passes in (("input", True), ("output", False)):
        block = tiny(shortcut=shortcut).encoder.levels[1].blocks[0]
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
        block.shortcut.bias.zero_()
        assert bool(block(torch.rand(1, 8, 4, 4)).abs().max() > 0) == passes


@torch.no_grad()
def test_unit_pixels() -> None:
    """The same weights on [0, 1]: images in [-1, 1] outside, whatever the network works on."""
    signed, unit = tiny(), tiny(pixels="unit")
    unit.load_state_dict(signed.state_dict())
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(unit.encode(images), signed.encode((images + 1) / 2))
    latents = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(unit.decode(latents), signed.decode(latents) * 2 - 1)


@torch.no_grad()
def test_depth_to_space_puts_channel_groups_side_by_side() -> None:
    """Group g of the channels is the neighbour g in row-major order (ONNX's DCR mode)."""
    module = tiny(upsampling="depth_to_space").decoder.levels[0].resample
    module.conv.weight.zero_()
    module.conv.bias.copy_(torch.arange(64.0))
    larger = module(torch.rand(1, 16, 2, 2))
    assert larger.shape == (1, 16, 4, 4)
    for channel in range(16):
        expected = torch.tensor([[channel, 16 + channel], [32 + channel, 48 + channel]]).float().tile(2, 2)
        assert torch.equal(larger[0, channel], expected)


@pytest.mark.parametrize("downsampling", ["right", "symmetric", "average"])
@pytest.mark.parametrize("upsampling", ["nearest", "depth_to_space"])
@torch.no_grad()
def test_no_frame_of_a_causal_network_sees_a_later_one(downsampling: str, upsampling: str) -> None:
    """Latent j holds frames up to 4j, and a frame is decoded from latents that hold nothing later than its block."""
    settings = {"dims": 3, "causal": True, "multipliers": (1, 2, 2), "attention": True, "adaptive_norm": True}
    network = tiny(**settings, downsampling=downsampling, upsampling=upsampling, frames=9)
    clip = torch.rand(1, 3, 9, 8, 8)
    latents = network.encode(clip)
    assert network.grid(8) == latents.shape[2:] == (3, 2, 2)
    decoded = network.decode(latents)
    assert decoded.shape == clip.shape
    for start in range(1, 9):
        changed = clip.clone()
        changed[:, :, start:] += 1
        difference = (network.encode(changed) - latents).abs().amax(dim=(0, 1, 3, 4))
        assert [bool(value > 0) for value in difference] == [4 * latent >= start for latent in range(3)]
    for start in (1, 2):
        changed = latents.clone()
        changed[:, :, start:] += 1
        difference = (network.decode(changed) - decoded).abs().amax(dim=(0, 1, 3, 4))
        assert [bool(value > 0) for value in difference] == [frame > 4 * (start - 1) for frame in range(9)]


@torch.no_grad()
def test_norms_over_all_frames_tell_the_first_of_the_last() -> None:
    """The published layout of Open-MAGVIT2 is not causal, though its convolutions look back only."""
    settings = {"dims": 3, "clip_start": "zeros", "downsampling": "symmetric", "upsampling": "depth_to_space"}
    clip = torch.rand(1, 3, 5, 8, 8)
    changed = torch.cat((clip[:, :, :1], clip[:, :, 1:] + 1), dim=2)
    seen = {}
    for causal in (True, "convolutions"):
        network = tiny(**settings, causal=causal, adaptive_norm=True)
        seen[causal] = float((network.encode(changed) - network.encode(clip))[:, :, 0].abs().max())
    assert seen[True] == 0 < seen["convolutions"]


@torch.no_grad()
def test_the_first_frame_of_a_causal_network_is_an_image() -> None:
    network = tiny(dims=3, causal=True, adaptive_norm=True)
    clip = torch.rand(1, 3, 5, 8, 8)
    latents = network.encode(clip)
    torch.testing.assert_close(network.encode(clip[:, :, :1]), latents[:, :, :1])
    torch.testing.assert_close(network.decode(latents[:, :, :1]), network.decode(latents)[:, :, :1])
    image = network.encode(clip[:, :, 0])
    assert image.ndim == 4 and torch.equal(image, network.encode(clip[:, :, :1])[:, :, 0])
    assert torch.equal(network.decode(image), network.decode(image[:, :, None])[:, :, 0])


@pytest.mark.parametrize("downsampling", ["right", "symmetric", "average"])
@pytest.mark.parametrize("upsampling", ["nearest", "depth_to_space"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_levels_that_leave_time_as_it_is(downsampling: str, upsampling: str, causal: bool) -> None:
    settings = {"dims": 3, "causal": causal, "multipliers": (1, 2, 2), "time_levels": [1]}
    network = tiny(**settings, downsampling=downsampling, upsampling=upsampling)
    clip = torch.rand(1, 3, 4 + causal, 8, 16)
    latents = network.encode(clip)
    assert latents.shape[2:] == network.grid((4 + causal, 8, 16)) == (2 + causal, 2, 4)
    assert network.decode(latents).shape == clip.shape


@torch.no_grad()
def test_frames_take_the_norms_of_their_own_codes() -> None:
    """Each group of frames reads the codes that it is decoded from, the first frame by itself."""
    network = tiny(dims=3, causal=True, multipliers=(1, 1, 1), adaptive_norm=True)
    norm = network.decoder.adaptive_norms[-1]
    x, codes = torch.randn(1, 8, 9, 8, 8), torch.randn(1, 3, 3, 2, 2)
    found = norm(x, codes)
    for code, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        alone = norm(x[:, :, frames][:, :, :1], codes[:, :, code : code + 1])
        torch.testing.assert_close(found[:, :, frames][:, :, :1], alone)


@pytest.mark.parametrize("downsampling", ["right", "symmetric", "average"])
@torch.no_grad()
def test_a_still_clip_has_still_latents(downsampling: str) -> None:
    """A clip starts as if it had stood still before: nothing tells its first frames from its last."""
    network = tiny(dims=3, causal=True, downsampling=downsampling)
    latents = network.encode(torch.rand(1, 3, 1, 8, 8).expand(-1, -1, 7, -1, -1))
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents))
    images = network.decode(latents)
    torch.testing.assert_close(images, images[:, :, :1].expand_as(images))


def test_clips_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"4 frames .* its length must be 1 \+ a multiple of the down-sampling 2"):
        tiny(dims=3, causal=True).encode(torch.rand(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"5 frames .* its length must be a multiple of the down-sampling 2"):
        tiny(dims=3).encode(torch.rand(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="set frames"):
        tiny(dims=3, causal=True).grid(8)
    with pytest.raises(ValueError, match=r"\(dims=3\) encodes \(B, C, T, H, W\), got \(1, 3, 8, 8\)"):
        tiny(dims=3).encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(dims=2\) encodes \(B, C, H, W\)"):
        tiny().encode(torch.rand(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="image_size=7"):
        tiny(dims=3, causal=True).encode(torch.rand(1, 3, 5, 8, 7))
    assert tiny(dims=3, frames=4).grid(8) == (2, 4, 4)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@torch.no_grad()
def test_images_that_are_not_square(channels: int) -> None:
    network = tiny(multipliers=(1, 1, 2), attention=True, image_channels=channels)
    latents = network.encode(torch.rand(2, channels, 16, 24))
    assert network.grid((16, 24)) == network.grid([16, 24]) == latents.shape[2:] == (4, 6)
    assert network.decode(latents).shape == (2, channels, 16, 24)
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of the down-sampling 4"):
        network.grid((16, 18))


def test_signals_and_clips_have_their_own_sizes() -> None:
    assert tiny(dims=3, frames=6).grid((16, 24)) == (3, 8, 12)
    with pytest.raises(ValueError, match=r"image_size=\[16, 24\]: signals \(dims=1\) have a length alone"):
        tiny(dims=1).grid((16, 24))
    with pytest.raises(ValueError, match=r"image_size=\[16, 24\]: how many frames the clips have is not known"):
        tiny(dims=3).grid((16, 24))


def test_an_adaptive_norm_of_a_single_position() -> None:
    """One position has no deviation from itself: the gain is that of 0, and nothing is 0 / 0."""
    network = tiny(adaptive_norm=True)
    latents = network.encode(torch.rand(2, 3, 2, 2))
    assert latents.shape[2:] == (1, 1)
    network.decode(latents).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    norm = network.decoder.adaptive_norms[0]
    with torch.no_grad():
        gain = norm.gain(torch.full((1, 3), 1e-3))  # the root of the variance's 1e-6
        x = torch.rand(1, norm.norm.num_channels, 4, 4)
        codes = torch.rand(1, 3, 1, 1)
        expected = gain[..., None, None] * norm.norm(x) + norm.offset(codes[..., 0, 0])[..., None, None]
        torch.testing.assert_close(norm(x, codes), expected)
