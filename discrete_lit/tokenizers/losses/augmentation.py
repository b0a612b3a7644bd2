"""Random changes of what a discriminator is shown, images and reconstructions, lest it learn the data by heart.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020): both players see images only
through random changes T that can be differentiated, L = loss(D(T(x)), D(T(y))). `AdversarialLoss` shows every batch so,
and may ask that two showings of an image look alike to the discriminator (its `consistency_weight`).

    translate       by whole pixels, zeros come in
    change colours  brightness, saturation, contrast
    cut out         a square becomes zero
    blur            at the beginning of the adversarial training, less and less (StyleGAN-T)
    crop            of half of the batches a random square is seen instead of the whole (vaex)
"""

from dataclasses import dataclass
from math import floor, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.distributed import rank
from discrete_lit.core.random import CounterRandom, Purpose

# What is drawn for a showing of an image: two shifts, three changes of colour, two places of the square that is cut
# out, two of the crop.
_DRAWS = 9
# Showings of an image and its reconstruction in a step: to the generator, to the discriminator, and once more.
SHOWINGS = 3


@dataclass(frozen=True, kw_only=True)
class DifferentiableAugmentation:
    """Change images at random as Zhao et al. (2020) do, in the form of StyleGAN-T.

    What is drawn for an image depends on its number in the run and on the step, not on ranks or batches.

    Args:
        translation: the longest shift of each axis, a fraction of the side.
        color: change the brightness by up to 0.5, multiply the distance to the image's grey by a factor in [0, 2] and
            the contrast by one in [0.5, 1.5].
        cutout: the side of the square that becomes zero, a fraction of the image's; 0.2 in StyleGAN-T and vaex.
        blur_steps: steps from the generator's first meeting with the discriminator until nothing is blurred any more.
            The blur halves at a distance of sqrt(H / 2) pixels at first, and that distance falls along a line.
        crop_size: half of the batches of larger images are seen as random squares of this side; None shows all of them
            whole.
        seed: of the draws.

    Raises:
        ValueError: a setting out of its range.
    """

    translation: float = 0.125
    color: bool = True
    cutout: float = 0.5
    blur_steps: int = 0
    crop_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.translation < 1 or not 0 <= self.cutout <= 1:
            raise ValueError(
                "translation of an augmentation must lie in [0, 1) and cutout in [0, 1], got "
                f"translation={self.translation}, cutout={self.cutout}"
            )
        if self.blur_steps < 0 or (self.crop_size is not None and self.crop_size < 1):
            raise ValueError(
                "blur_steps of an augmentation must be >= 0 and crop_size at least 1 pixel, got "
                f"blur_steps={self.blur_steps}, crop_size={self.crop_size}"
            )

    def draws(self, count: int, step: int, *, index: Tensor | None, device: torch.device) -> Tensor:
        """Draw all that a batch needs in a step: `(2, SHOWINGS, B, 9)` in (0, 1), of reconstructions and images.

        Args:
            count: B.
            step: of the optimizer.
            index: `(B,)` int64, each image's number in the run; None, where nobody knows, takes its place in the batch.
            device: of the result.
        """
        if index is None:
            index = rank() * 2**16 + torch.arange(count, device=device)
        numbers = CounterRandom(self.seed, index).uniform(Purpose.AUGMENTATION, 2 * SHOWINGS * _DRAWS, step)
        below_1 = numbers.float().clamp(max=1 - 2**-24)  # the largest ones would be rounded up
        return below_1.view(count, 2, SHOWINGS, _DRAWS).permute(1, 2, 0, 3)

    def crops(self, step: int) -> list[bool]:
        """Decide for each showing of a step whether a crop is seen; the same on all ranks."""
        if self.crop_size is None:
            return [False] * SHOWINGS
        numbers = CounterRandom(self.seed, torch.zeros(1, dtype=torch.int64))
        return (numbers.uniform(Purpose.AUGMENTATION_CROP, SHOWINGS, step)[0] < 0.5).tolist()

    def blur(self, since: int) -> float:
        """Give the share of the first blur that is left so many steps after the generator's first meeting."""
        return 1 - min(1.0, max(since, 0) / self.blur_steps) if self.blur_steps else 0.0

    def __call__(self, images: Tensor, draws: Tensor, *, blur: float = 0.0, crop: bool = False) -> Tensor:
        """Show images `(B, C, H, W)`; differentiable in them.

        Args:
            images: about [-1, 1].
            draws: `(B, 9)` in (0, 1).
            blur: the share of the first blur.
            crop: see a random square of `crop_size`, where the images are larger.

        Returns:
            `(B, C, H, W)`, or `(B, C, crop_size, crop_size)`.
        """
        shown = blurred(images, blur * sqrt(images.shape[-2] / 2))
        if self.translation:
            shown = translated(shown, draws[:, 0:2], self.translation)
        if self.color:
            shown = recolored(shown, draws[:, 2:5])
        if self.cutout:
            shown = cut_out(shown, draws[:, 5:7], self.cutout)
        if crop and self.crop_size is not None and min(images.shape[-2:]) > self.crop_size:
            shown = cropped(shown, draws[:, 7:9], self.crop_size)
        return shown


def blurred(images: Tensor, distance: float) -> Tensor:
    """Blur images `(B, C, H, W)`, mirrored at their edges, by a Gaussian that is 1/2 at a distance in pixels."""
    radius = floor(3 * distance)
    if radius < 1:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp2(-(offsets / distance).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    for weight in (kernel[..., None], kernel[:, :, None]):  # down, then across
        padded = F.conv2d(padded, weight, groups=images.shape[1])
    return padded


def translated(images: Tensor, draws: Tensor, fraction: float) -> Tensor:
    """Shift images `(B, C, H, W)` by whole pixels, by draws `(B, 2)` for down and across; zeros come in."""
    for axis in (2, 3):
        side = images.shape[axis]
        longest = round(side * fraction)
        shift = (draws[:, axis - 2] * (2 * longest + 1)).floor().long() - longest
        places = torch.arange(side, device=images.device) + shift[:, None]  # (B, side): where a pixel comes from
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        inside = ((places >= 0) & (places < side)).view(shape)
        images = images.gather(axis, places.clamp(0, side - 1).view(shape).expand(images.shape)) * inside
    return images


def recolored(images: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, saturation and contrast of images `(B, C, H, W)`, in this order, by draws `(B, 3)`."""
    brightness, saturation, contrast = draws[:, :, None, None, None].unbind(dim=1)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def cut_out(images: Tensor, draws: Tensor, fraction: float) -> Tensor:
    """Set a rectangle of images `(B, C, H, W)`, centred by draws `(B, 2)` anywhere in them, to zero."""
    inside = []
    for axis in (2, 3):
        side = images.shape[axis]
        length = round(side * fraction)
        # An even length has its centre between two pixels, of which there is one more.
        centre = (draws[:, axis - 2, None] * (side + 1 - length % 2)).floor()
        places = torch.arange(side, device=images.device)
        first = (centre - length // 2).clamp(0, side - 1)
        last = (centre - length // 2 + length - 1).clamp(0, side - 1)
        inside.append((places >= first) & (places <= last) & (length > 0))
    rows, columns = inside
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def cropped(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Cut a square of `size` out of images `(B, C, H, W)`, at a place of its own of each by draws `(B, 2)`."""
    for axis in (2, 3):
        first = (draws[:, axis - 2] * (images.shape[axis] - size + 1)).floor().long()
        places = torch.arange(size, device=images.device) + first[:, None]
        shape, wanted = [len(images), 1, 1, 1], list(images.shape)
        shape[axis] = wanted[axis] = size
        images = images.gather(axis, places.view(shape).expand(wanted))
    return images
