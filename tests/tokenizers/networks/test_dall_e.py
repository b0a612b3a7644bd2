"""DALL-E's network: its sizes, what it sees of pixels, its start, what it refuses; golden cases have its outputs."""

import pytest
import torch
from torch import nn

from discrete_lit.tokenizers.networks import DALLEAutoencoder


def test_sizes_are_those_of_dall_e() -> None:
    """Parameters counted by the convolutions of each block."""
    with torch.device("meta"):
        network = DALLEAutoencoder(128, 2048)
    blocks = [(256, 256), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 2048), (2048, 2048)]

    def count(pairs: list[tuple[int, int]], kernels: tuple[int, ...]) -> int:
        total = 0
        for enter, leave in pairs:
            widths = (enter, leave // 4, leave // 4, leave // 4, leave)
            total += sum(a * b * k**2 + b for a, b, k in zip(widths, widths[1:], kernels, strict=False))
            total += (enter + 1) * leave if enter != leave else 0
        return total

    encoder = count(blocks, (3, 3, 3, 1)) + 3 * 49 * 256 + 256
    backwards = [(128, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 256)]
    decoder = count(backwards, (1, 3, 3, 3)) + 257 * 6
    assert sum(parameter.numel() for parameter in network.parameters()) == encoder + decoder
    assert network.grid(256) == (32, 32) and network.grid([64, 24]) == (8, 3)


def test_a_new_network() -> None:
    network = DALLEAutoencoder(5, 64, channels=8, blocks=1, image_channels=1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert not layer.bias.any()
            deviation = layer.weight[0].numel() ** -0.5
            assert layer.weight.std().item() == pytest.approx(deviation, rel=0.5)
    latents = network.encode(torch.rand(2, 1, 16, 24) * 2 - 1)
    assert latents.shape == (2, 64, 2, 3) and latents.min() == 0
    assert network.decode(torch.randn(2, 5, 2, 3)).shape == (2, 2, 16, 24)
    seen = []
    network.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network.encode(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8))
    assert [float(image.unique()) for image in seen[0]] == pytest.approx([0.1, 0.9])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="channels=8 has latents of width 64, got latent_dim=32"):
        DALLEAutoencoder(5, 32, channels=8)
    with pytest.raises(ValueError, match="multiple of 4 and blocks at least 1, got channels=6, blocks=1"):
        DALLEAutoencoder(5, 48, channels=6, blocks=1)
    with pytest.raises(ValueError, match="image_size=12 is not a multiple of the down-sampling 8"):
        DALLEAutoencoder(5, 32, channels=4).grid(12)
