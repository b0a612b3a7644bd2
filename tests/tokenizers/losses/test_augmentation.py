"""What a discriminator is shown, against loops over pixels; and that draws belong to an image and a step."""

from math import floor

import pytest
import torch

from discrete_lit.tokenizers.losses.augmentation import (
    SHOWINGS,
    DifferentiableAugmentation,
    blurred,
    cropped,
    cut_out,
    recolored,
    translated,
)

LEAST, MOST = 1e-6, 1 - 1e-6


def images(count: int = 3, height: int = 8, width: int = 10) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def uniforms(count: int, numbers: int) -> torch.Tensor:
    return torch.rand(count, numbers, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extreme", [None, LEAST, MOST])
def test_translation(extreme: float | None) -> None:
    """A pixel comes from where the shift says, or from outside, where all is zero; shifts end at the fraction."""
    pictures, draws = images(), uniforms(3, 2)
    if extreme is not None:
        draws.fill_(extreme)
    found = translated(pictures, draws, 0.25)
    for picture, (down, across), moved in zip(pictures, draws.tolist(), found, strict=True):
        shift = floor(down * 5) - 2, floor(across * 5) - 2  # a quarter of 8 and, rounded to even, of 10 pixels
        if extreme is not None:
            assert shift == ((-2, -2) if extreme == LEAST else (2, 2))
        for row in range(8):
            for column in range(10):
                source = row + shift[0], column + shift[1]
                inside = 0 <= source[0] < 8 and 0 <= source[1] < 10
                expected = picture[:, source[0], source[1]] if inside else torch.zeros(3)
                torch.testing.assert_close(moved[:, row, column], expected)


def test_colours() -> None:
    pictures, draws = images(2), uniforms(2, 3)
    found = recolored(pictures, draws)
    for picture, (brightness, saturation, contrast), changed in zip(pictures, draws.tolist(), found, strict=True):
        expected = picture + brightness - 0.5
        grey = expected.mean(dim=0)
        expected = torch.stack([grey + 2 * saturation * (channel - grey) for channel in expected])
        expected = expected.mean() + (0.5 + contrast) * (expected - expected.mean())
        torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(recolored(pictures, torch.full((2, 3), 0.5)), pictures)  # nothing changes in the middle


@pytest.mark.parametrize("fraction", [0.25, 0.4, 1.0])
def test_cutout(fraction: float) -> None:
    """A rectangle of rounded sides around a centre anywhere in the image, cut off at its borders."""
    for draw in ((LEAST, LEAST), (MOST, MOST), (0.3, 0.8), (0.55, 0.1)):
        kept = cut_out(torch.ones(1, 1, 8, 10), torch.tensor([draw]), fraction)[0, 0]
        expected = torch.ones(8, 10)
        spans = []
        for side, number in ((8, draw[0]), (10, draw[1])):
            length = round(side * fraction)
            first = floor(number * (side + 1 - length % 2)) - length // 2
            ends = min(max(first, 0), side - 1), min(max(first + length - 1, 0), side - 1)
            spans.append(slice(ends[0], ends[1] + 1))
        expected[spans[0], spans[1]] = 0
        torch.testing.assert_close(kept, expected)
    assert torch.equal(cut_out(images(), uniforms(3, 2), 0.01), images())  # no pixel is as small


def test_blur() -> None:
    """A bright pixel becomes a Gaussian that is half as high at the distance, and the brightness stays."""
    spot = torch.zeros(1, 3, 31, 31)
    spot[..., 15, 15] = 1
    found = blurred(spot, 3.0)[0, 0]
    assert float(found[15, 18] / found[15, 15]) == pytest.approx(0.5, rel=1e-5)
    assert float(found[12, 15] / found[15, 15]) == pytest.approx(0.5, rel=1e-5)
    assert float(found[18, 18] / found[15, 15]) == pytest.approx(0.25, rel=1e-5)
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)
    constant = torch.full((2, 3, 31, 20), 0.7)
    torch.testing.assert_close(blurred(constant, 3.0), constant)  # borders are mirrored
    assert blurred(spot, 0.3) is spot  # shorter than a pixel


def test_crop() -> None:
    pictures, draws = images(), torch.tensor([[LEAST, LEAST], [MOST, MOST], [0.5, 0.3]])
    found = cropped(pictures, draws, 6)
    for picture, (top, left), part in zip(pictures, ((0, 0), (2, 4), (1, 1)), found, strict=True):
        torch.testing.assert_close(part, picture[:, top : top + 6, left : left + 6])


def test_it_can_be_differentiated() -> None:
    augmentation = DifferentiableAugmentation(crop_size=5, blur_steps=10)
    pictures, draws = images(2).double().requires_grad_(), uniforms(2, 9).double()
    assert torch.autograd.gradcheck(lambda given: augmentation(given, draws, blur=0.5, crop=True), pictures)


def test_draws_belong_to_an_image_and_a_step() -> None:
    augmentation, device = DifferentiableAugmentation(crop_size=4), torch.device("cpu")
    whole = augmentation.draws(6, 3, index=torch.arange(6), device=device)
    assert whole.shape == (2, SHOWINGS, 6, 9)
    half = augmentation.draws(3, 3, index=torch.tensor([5, 0, 2]), device=device)
    assert torch.equal(half, whole[:, :, [5, 0, 2]])
    assert not torch.equal(whole, augmentation.draws(6, 4, index=torch.arange(6), device=device))
    assert len(whole.unique()) == whole.numel()  # of the showings and of both kinds of images, none is another's
    assert torch.equal(augmentation.draws(6, 3, index=None, device=device), whole)  # their places in the batch
    crops = torch.tensor([augmentation.crops(step) for step in range(400)], dtype=torch.float64)
    assert crops.shape == (400, SHOWINGS) and (crops.mean(dim=0) - 0.5).abs().max() < 0.1
    assert DifferentiableAugmentation().crops(3) == [False] * SHOWINGS


def test_the_blur_goes() -> None:
    augmentation = DifferentiableAugmentation(blur_steps=10)
    assert [augmentation.blur(step) for step in (-5, 0, 5, 10, 20)] == [1, 1, 0.5, 0, 0]
    assert DifferentiableAugmentation().blur(0) == 0


def test_wrong_settings() -> None:
    for settings, message in (
        ({"translation": 1.0}, "translation of an augmentation must lie in .*, got translation=1.0, cutout=0.5"),
        ({"cutout": 1.5}, "got translation=0.125, cutout=1.5"),
        ({"blur_steps": -1}, "blur_steps of an augmentation must be >= 0 .*, got blur_steps=-1, crop_size=None"),
        ({"crop_size": 0}, "got blur_steps=0, crop_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            DifferentiableAugmentation(**settings)
