"""Reconstruction figures against their definitions."""

from math import log, log2

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.metrics.reconstruction import (
    IdStatistics,
    ReconstructionFidelity,
    ReconstructionMeter,
    pixel_fidelity,
)
from discrete_lit.tokenizers.quantizers.quantizer import Component


class Quarters:
    """Each quarter of an 16x16 grey image is one of four greys, its id; the last bit of the id is lost on decoding."""

    vocab_size = 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return ((images[:, 0, ::8, ::8] + 1) / 2 * 7).round().long()

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        greys = (tokens // 2 * 2).float() / 7 * 2 - 1
        return greys.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)

    def components(self, tokens: torch.Tensor) -> dict[str, Component]:
        return {"bit_0": Component(tokens % 2, 2)}


def images_of(tokens: torch.Tensor) -> torch.Tensor:
    greys = (tokens / 7 * 255).round().to(torch.uint8)
    return greys.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)


def test_figures_of_ids_and_pixels_over_batches() -> None:
    tokens = torch.tensor([[[0, 0], [2, 3]], [[0, 0], [4, 4]], [[1, 1], [1, 0]]])
    meter = ReconstructionMeter(Quarters())
    for part in tokens.split(2):
        rebuilt = meter(images_of(part))
        assert torch.equal(rebuilt, images_of(part // 2 * 2))
    made = meter.figures()
    counts = torch.tensor([5.0, 3, 1, 1, 2])
    entropy = float(-(counts / 12 * (counts / 12).log()).sum())
    assert made.tokens == 4 and made.pixels == 256 and made.ids is not None
    assert made.ids.size == 8 and made.ids.usage == pytest.approx(5 / 8)
    assert log(made.ids.perplexity) == pytest.approx(entropy, rel=1e-5)
    assert made.capacity_bits == 12 and made.bits_per_pixel == 12 / 256
    assert made.entropy_bits == pytest.approx(4 * entropy / log(2), rel=1e-5)
    assert made.parts["bit_0"].usage == 1 and made.parts["bit_0"].size == 2
    odd = 4 / 12
    assert log2(made.parts["bit_0"].perplexity) == pytest.approx(-odd * log2(odd) - (1 - odd) * log2(1 - odd), rel=1e-5)
    assert made.to_dict()["capacity_bits"] == 12


def test_psnr_is_the_mean_over_images_of_decibels() -> None:
    tokens = torch.tensor([[[0, 0], [0, 3]], [[1, 1], [1, 1]]])
    meter = ReconstructionMeter(Quarters(), lpips=lambda first, second: (first - second).abs().amax((1, 2, 3)).mean())
    for part in tokens.split(1):
        meter(images_of(part))
    step = 109 - 73, 36  # greys of ids 3 and 2, of 1 and 0, in 8 bits
    expected = [10 * torch.log10(torch.tensor(255.0**2 / error)) for error in (step[0] ** 2 / 4, step[1] ** 2)]
    assert meter.figures().psnr == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    assert meter.figures().lpips == pytest.approx(36 / 127.5, rel=1e-4)


def test_ssim_against_its_formula() -> None:
    """Wang et al., eq. 13, with the 11x11 Gaussian window written out, around every pixel of the reflected image."""
    first = torch.randint(0, 256, (1, 1, 13, 12), dtype=torch.uint8)
    second = (first.int() + torch.randint(-40, 40, first.shape)).clamp(0, 255).to(torch.uint8)
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = (window[:, None] * window) / (window[:, None] * window).sum()
    padded = (F.pad(image.double(), (5, 5, 5, 5), mode="reflect")[0, 0] for image in (first, second))
    x, y = (image.unfold(0, 11, 1).unfold(1, 11, 1) for image in padded)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * window).sum((2, 3))

    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    local = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    local = local / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (variances + c2))
    assert float(pixel_fidelity(second, first)[1]) == pytest.approx(float(local.mean()), abs=1e-4)


def test_a_continuous_autoencoder_has_no_ids() -> None:
    class Exact:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

        decode = encode

    meter = ReconstructionMeter(Exact())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(meter(images), images)
    made = meter.figures()
    assert made.ids is None and made.tokens is None and made.bits_per_pixel is None and made.ssim == pytest.approx(1)


def test_statistics_of_ids() -> None:
    from discrete_lit.metrics.codebook_usage import CodebookUsage

    usage = CodebookUsage(4)
    usage.update(torch.tensor([0, 1, 1, 0]))
    assert IdStatistics.of(usage) == IdStatistics(4, 0.5, pytest.approx(2.0))


def test_ids_beyond_counting_are_reported_by_their_parts() -> None:
    class Wide(Quarters):
        vocab_size = 2**36

    meter = ReconstructionMeter(Wide())
    meter(images_of(torch.tensor([[[0, 0], [2, 3]]])))
    made = meter.figures()
    assert made.ids is None and made.entropy_bits is None
    assert made.capacity_bits == 4 * 36 and made.parts["bit_0"].usage == 1


@pytest.mark.parametrize(("size", "defined"), [((5, 16), False), ((16, 5), False), ((6, 6), True)])
def test_ssim_needs_room_for_its_window(size: tuple[int, int], defined: bool) -> None:
    images = torch.randint(256, (2, 1, *size), dtype=torch.uint8)
    psnr, ssim = pixel_fidelity(images // 2, images)
    assert psnr.isfinite().all() and (ssim is not None) == defined
    fidelity = ReconstructionFidelity()
    fidelity.update(images // 2, images)
    mean_psnr, mean_ssim, _ = fidelity.compute()
    assert float(mean_psnr) == pytest.approx(float(psnr.mean())) and (mean_ssim is not None) == defined
