"""Images between floats and bytes."""

import pytest
import torch

from discrete_lit.core.images import (
    check_channels,
    displayable,
    from_uint8,
    height_and_width,
    normal_size,
    pixels_as_floats,
    size_text,
    to_rgb,
    to_uint8,
)


def test_every_byte_round_trips() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    images = from_uint8(bytes_)
    assert images.dtype == torch.float32
    assert float(images.min()) == -1 and float(images.max()) == 1
    assert torch.equal(to_uint8(images), bytes_)
    assert torch.equal(to_uint8(images.double()), bytes_)


def test_rounds_to_the_nearest_and_clamps() -> None:
    levels = torch.tensor([-0.4, 0.4, 0.6, 127.4, 127.6, 254.6, 255.4, 300.0, -50.0])
    assert to_uint8(levels / 127.5 - 1).tolist() == [0, 0, 1, 127, 128, 255, 255, 255, 0]
    assert to_uint8(torch.tensor([-torch.inf, torch.inf])).tolist() == [0, 255]


def test_half_precision_is_rounded_in_float32() -> None:
    images = torch.linspace(-1, 1, 1000).bfloat16()
    assert torch.equal(to_uint8(images), to_uint8(images.float()))


@pytest.mark.parametrize("given", [8, (8, 8), [8, 8]])
def test_a_square_has_one_form(given) -> None:
    assert height_and_width(given) == (8, 8) and normal_size(given) == 8 and size_text(given) == "8x8"


def test_a_size_is_height_then_width() -> None:
    assert height_and_width([16, 24]) == normal_size((16, 24)) == (16, 24) and size_text([16, 24]) == "16x24"


@pytest.mark.parametrize("given", [0, -3, [16], [16, 0], (16, 24, 3), [16, 2.5], [], 1.5, "ab"])
def test_what_is_no_size_is_refused(given) -> None:
    with pytest.raises(ValueError, match=r"a_size=.*, or \[height, width\], each at least 1"):
        height_and_width(given, "a_size")


def test_grey_is_repeated_and_rgba_laid_over_white() -> None:
    grey = torch.rand(2, 1, 3, 5) * 2 - 1
    assert torch.equal(to_rgb(grey, "x"), grey.expand(2, 3, 3, 5))
    colour = torch.rand(2, 3, 3, 5) * 2 - 1
    assert to_rgb(colour, "x").data_ptr() == colour.data_ptr()
    for opacity, expected in ((1.0, colour), (-1.0, torch.ones_like(colour)), (0.0, (colour + 1) / 2)):
        alpha = torch.full((2, 1, 3, 5), opacity)
        torch.testing.assert_close(to_rgb(torch.cat((colour, alpha), dim=1), "x"), expected)
    pixels = torch.randint(256, (2, 4, 3, 5), dtype=torch.uint8)
    share = pixels[:, 3:].double() / 255
    expected = pixels[:, :3] * share + 255 * (1 - share)  # Porter and Duff's "over"
    assert (to_rgb(pixels, "x").double() - expected).abs().max() <= 0.5 + 1e-4
    assert to_rgb(pixels, "x").dtype == torch.uint8


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_have_no_colour(channels: int) -> None:
    images = torch.rand(2, channels, 3, 5)
    with pytest.raises(ValueError, match=f"LPIPS sees colour images: .*; got {channels}"):
        to_rgb(images, "LPIPS")
    assert torch.equal(displayable(images), images[:, :1])


def test_the_bytes_of_a_batch_become_floats_and_nothing_else_changes() -> None:
    pixels = torch.randint(256, (2, 4, 5, 3), dtype=torch.uint8)
    batch = {"image": pixels.movedim(-1, 1), "audio": torch.rand(2, 1, 7), "label": torch.arange(2), "key": ["a", "b"]}
    floats = pixels_as_floats(batch)
    assert torch.equal(floats["image"], from_uint8(pixels).movedim(-1, 1)) and floats["image"].is_contiguous()
    assert all(floats[name] is batch[name] for name in ("audio", "label", "key")) and list(floats) == list(batch)
    assert batch["image"].dtype == torch.uint8 and pixels_as_floats(floats)["image"] is floats["image"]
    with pytest.raises(ValueError, match=r"are torch.uint8, and this VQVAE takes floats .*pixels_as_floats makes"):
        check_channels(batch["image"], 3, "this VQVAE")


def test_channels_that_do_not_fit_are_named() -> None:
    check_channels(torch.rand(2, 5, 4, 4), 5, "this VQVAE")
    with pytest.raises(ValueError, match=r"images have 1 channels .*, and this VQVAE was made for 3: set image_ch"):
        check_channels(torch.rand(2, 1, 4, 4), 3, "this VQVAE")
