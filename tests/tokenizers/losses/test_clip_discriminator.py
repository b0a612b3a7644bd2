"""The discriminator of whole clips: its layout, what it can tell and another cannot, and the loss around it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.images import frames_of
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective
from discrete_lit.tokenizers.losses.adversarial import discriminator_loss
from discrete_lit.tokenizers.losses.augmentation import DifferentiableAugmentation
from discrete_lit.tokenizers.losses.clip_discriminator import ClipStyleGANDiscriminator, _ClipAveragePool, _ClipBlurPool

SIZE = (5, 8, 8)


def discriminator(**changes: Any) -> ClipStyleGANDiscriminator:
    settings: dict[str, Any] = {"image_channels": 1, "width": 4, "multipliers": (2, 2), **changes}
    return ClipStyleGANDiscriminator(SIZE, **settings)


def test_the_published_size() -> None:
    """The parameters of MAGVIT's base model: each layer's, counted by hand from its published code."""
    with torch.device("meta"):
        made = ClipStyleGANDiscriminator((17, 128, 128))
    widths = [64, 128, 256, 256, 256, 256]
    blocks = sum(
        27 * before * before + before + 27 * before * after + after + before * after
        for before, after in pairwise(widths)
    )
    expected = 27 * 3 * 64 + 64 + blocks + 27 * 256 * 256 + 256 + (256 * 1 * 4 * 4) * 256 + 256 + 256 + 1
    assert sum(parameter.numel() for parameter in made.parameters()) == expected


def test_halves_round_up_and_average_what_is_there() -> None:
    clip = torch.rand(1, 1, 3, 4, 5)
    found = _ClipAveragePool()(clip)
    assert found.shape == (1, 1, 2, 2, 3)
    torch.testing.assert_close(found[0, 0, 0, 0, 0], clip[0, 0, :2, :2, :2].mean())
    torch.testing.assert_close(found[0, 0, 1, 1, 2], clip[0, 0, 2, 2:, 4].mean())
    assert _ClipBlurPool()(clip).shape == (1, 1, 2, 2, 3)
    # In the middle of a constant the binomial filter sees it whole; behind three axes its corners weigh 1/8^3.
    still = _ClipBlurPool()(torch.ones(1, 1, 8, 8, 8))
    torch.testing.assert_close(still[0, 0, 1, 1, 1], torch.tensor(1.0))
    corner = torch.zeros(1, 1, 8, 8, 8)
    corner[..., 1, 1, 1] = 512.0
    assert (
        float(_ClipBlurPool()(corner)[0, 0, 1, 1, 1]) == 1.0 and float(_ClipBlurPool()(corner)[0, 0, 0, 0, 0]) == 27.0
    )


def test_it_tells_the_order_of_frames() -> None:
    """Which a batch of frames does not hold: real clips grow brighter, the others have the same frames backwards."""
    torch.manual_seed(0)
    made = discriminator()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    real = torch.zeros(0)
    for _ in range(30):
        real = torch.linspace(-1, 1, SIZE[0]).view(1, 1, -1, 1, 1) + 0.2 * torch.randn(4, 1, *SIZE)
        loss = discriminator_loss("hinge", made(real), made(real.flip(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        loss = discriminator_loss("hinge", made(real), made(real.flip(2)))
    assert float(loss) < 0.3


@pytest.mark.parametrize("pooling", ["blur", "average"])
def test_the_loss_shows_it_clips(pooling: str) -> None:
    """Pixels are compared frame by frame as ever; the generator's gradient is that of the logit of a whole clip."""
    clips, outputs = torch.rand(2, 1, *SIZE), torch.rand(2, 1, *SIZE, requires_grad=True)
    made = discriminator(pooling=pooling)
    adversarial = AdversarialLoss(
        made, start_step=0, weight=0.5, adaptive=False, loss="non_saturating", r1_weight=5.0, r1_every=1
    )
    found = Objective("l1", adversarial_loss=adversarial)(outputs, clips, step=0, index=torch.arange(2))
    found.loss.backward()

    again = outputs.detach().requires_grad_()
    expected = F.l1_loss(frames_of(again), frames_of(clips)) + 0.5 * F.softplus(-made(again)).mean()
    (gradient,) = torch.autograd.grad(expected, again)
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, gradient)
    assert {"reconstruction", "generator", "discriminator", "r1"} <= found.terms.keys() and found.terms["r1"] > 0
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in made.parameters())


def test_an_image_is_a_clip_that_stands_still() -> None:
    made = discriminator().eval()
    images = torch.rand(2, 1, 8, 8)
    still: Tensor = images[:, :, None].expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(made(images), made(still))


@pytest.mark.parametrize(
    ("changes", "clips", "message"),
    [
        ({"width": 0}, None, "must be at least 1, got width=0"),
        ({"multipliers": ()}, None, "must be at least 1"),
        ({"pooling": "maximum"}, None, "must be 'blur' or 'average'"),
        ({}, torch.zeros(1, 3, *SIZE), "the images have 3 channels"),
        ({}, torch.zeros(1, 1, 4, 8, 8), r"made for image_size=\[5, 8, 8\], got clips of \[4, 8, 8\]"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], clips: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discriminator(**changes)(clips)


def test_an_augmentation_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="a ClipStyleGANDiscriminator sees clips"):
        AdversarialLoss(discriminator(), augmentation=DifferentiableAugmentation())
