"""Images between floats and bytes."""

import torch

from discrete_lit.core.images import from_uint8, to_uint8


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
