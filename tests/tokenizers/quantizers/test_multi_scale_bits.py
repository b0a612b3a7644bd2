"""Multi-scale binary spherical quantisation: its ids, what is read of them, its losses, and flipped bits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import BinarySphericalQuantizer, MultiScaleBinarySphericalQuantizer

SIZES = [(1, 1), (2, 3), (4, 6)]


def make(bits: int = 3, **settings) -> MultiScaleBinarySphericalQuantizer:
    return MultiScaleBinarySphericalQuantizer(bits, scales=[1, (2, 3), (4, 6)], **settings)


def by_hand(latents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Bits `(B, h w, d)` of each scale, and f_hat `(B, d, H, W)` after it."""
    f = latents.movedim(-1, 1)
    f_hat, bits, after = torch.zeros_like(f), [], []
    for size in SIZES:
        pooled = F.adaptive_avg_pool2d(f - f_hat, size)
        bits.append((pooled > 0).flatten(2).transpose(1, 2).long())
        signs = (2.0 * (pooled > 0) - 1) / 3**0.5
        f_hat = f_hat + F.interpolate(signs, SIZES[-1], mode="bilinear", align_corners=False)
        after.append(f_hat)
    return bits, after


@pytest.mark.parametrize("bit_order", ["first_most_significant", "first_least_significant"])
def test_ids_and_codes_are_those_of_the_algorithm(bit_order) -> None:
    quantizer, latents = make(bit_order=bit_order), torch.randn(2, 4, 6, 3)
    made = quantizer(latents)
    bits, after = by_hand(latents)
    assert torch.equal(quantizer.bits_of(made.tokens), torch.cat(bits, dim=1))
    assert torch.equal(quantizer.ids_of(quantizer.bits_of(made.tokens)), made.tokens)
    assert torch.equal(quantizer.encode(latents), made.tokens)
    torch.testing.assert_close(made.z_q, after[-1].movedim(1, -1))
    torch.testing.assert_close(quantizer.lookup(made.tokens), after[-1].movedim(1, -1))
    torch.testing.assert_close(quantizer.cumulative(made.tokens), torch.stack(after))
    read = [F.interpolate(each, size, mode="bilinear") for each, size in zip(after, SIZES[1:], strict=False)]
    expected = torch.cat([each.flatten(2).transpose(1, 2) for each in read], dim=1)
    torch.testing.assert_close(quantizer.teacher_forcing(made.tokens), expected)


def test_the_losses_are_those_of_each_scale() -> None:
    quantizer, latents = make(commitment_weight=0.5), torch.randn(2, 4, 6, 3)
    made = quantizer(latents)
    _, after = by_hand(latents)
    f, plain, expected = latents.movedim(-1, 1), BinarySphericalQuantizer(3, commitment_weight=0.5), {}
    for size, f_hat in zip(SIZES, [torch.zeros_like(f), *after], strict=False):
        pooled = F.adaptive_avg_pool2d(f - f_hat, size).movedim(1, -1)
        for name, value in plain(pooled).losses.items():
            expected[name] = expected.get(name, 0) + value / 3
    assert made.losses.keys() == expected.keys()
    for name, value in made.losses.items():
        torch.testing.assert_close(value, expected[name])


def test_the_gradient_goes_straight_through() -> None:
    latents = torch.randn(2, 4, 6, 3, requires_grad=True)
    weight = torch.randn(2, 4, 6, 3)
    (make(entropy_weight=0.0)(latents).z_q * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)


def test_what_follows_makes_up_for_flipped_bits() -> None:
    """Without flips, the ids and what teacher forcing reads; with them, the targets of the flipped sum's residual."""
    quantizer, latents = make(), torch.randn(2, 4, 6, 3)
    none = torch.zeros(2, 31, 3, dtype=torch.bool)
    targets, read = quantizer.self_corrected(latents, none)
    ids = quantizer.encode(latents)
    assert torch.equal(targets, ids) and torch.equal(read, quantizer.teacher_forcing(ids))

    flips = none.clone()
    flips[:, 0] = True  # all bits of the first scale
    targets, read = quantizer.self_corrected(latents, flips)
    assert torch.equal(targets[:, :1], ids[:, :1])  # what is to be predicted is right
    wrong = quantizer.ids_of(1 - quantizer.bits_of(ids[:, :1]))
    torch.testing.assert_close(read[:, :6], quantizer.at_scale(1, quantizer.contribution(0, wrong)))
    rest = latents.movedim(-1, 1) - quantizer.contribution(0, wrong)
    pooled = F.adaptive_avg_pool2d(rest, (2, 3)).flatten(2).transpose(1, 2)
    assert torch.equal(quantizer.bits_of(targets[:, 1:7]), (pooled > 0).long())


def test_other_grids_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the scales .* end at 4 x 6"):
        make()(torch.randn(1, 4, 4, 3))
    with pytest.raises(ValueError, match="neither height nor width may shrink"):
        MultiScaleBinarySphericalQuantizer(3, scales=[2, 1])
    with pytest.raises(ValueError, match=r"bits must lie in \[1, 62\]"):
        make(63)
