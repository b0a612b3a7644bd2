"""The law of a training crop, re-derived from the authors' transform, and a chi-squared test of our crops against it.

A transform is its outcomes: parts of an image, each cut, resized and perhaps mirrored, with their probabilities. Images
are a few pixels wide, so that there are few outcomes and our crops can be told apart; every law here depends on the
ratio of sizes alone. Crops of ours that are no outcome of the authors' transform fail at once.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from discrete_lit.data.image_batches import ImagePipeline

SIZE = 8
DRAWS = 2000
# Levels of 255 by which filters of two codes may differ; neighbouring outcomes are further apart.
MOST_OFF = 6
# Of 2:1, of which no two codes round the longer side differently, and squares, or of what is nearly one.
IMAGES = ((24, 12), (12, 12))
NEARLY_SQUARE = ((24, 12), (22, 20))


@dataclass(frozen=True)
class Outcome:
    """A part (left, top, width, height) of the image that was first resized to `resized`; then to SIZE; mirrored.

    Where `before` is given, that part of the image is what is resized.
    """

    resized: tuple[int, int]
    part: tuple[int, int, int, int]
    mirrored: bool
    before: tuple[int, int, int, int] | None = None


class NoOutcomeError(Exception):
    """Raised where a crop of ours is none that the authors' transform gives."""


# From the width and height of an image to the probabilities of the outcomes.
Law = Callable[[int, int], dict[Outcome, float]]


def _uniform(resized: tuple[int, int], side: int, weight: float) -> dict[Outcome, float]:
    """A square of a side anywhere in a resized image."""
    across, down = resized[0] - side + 1, resized[1] - side + 1
    return {
        Outcome(resized, (left, top, side, side), False): weight / (across * down)
        for left, top in product(range(across), range(down))
    }


def _shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    shorter = min(width, height)
    return round(width * side / shorter), round(height * side / shorter)


def random_crop(ratio: float = 1.0) -> Law:
    """Resize the shorter side to `ratio` times the size, then torchvision's or albumentations' RandomCrop."""
    return lambda width, height: _uniform(_shorter_side(width, height, round(SIZE * ratio)), SIZE, 1.0)


def adm_random_crop(least: float) -> Law:
    """ADM's `random_crop_arr(min_crop_frac)`: the shorter side is a whole number, uniform, and the place is."""
    sides = range(SIZE, math.ceil(SIZE / least) + 1)

    def law(width: int, height: int) -> dict[Outcome, float]:
        found: dict[Outcome, float] = {}
        for side in sides:
            found |= _uniform(_shorter_side(width, height, side), SIZE, 1 / len(sides))
        return found

    return law


def dall_e_crop(width: int, height: int) -> dict[Outcome, float]:
    """`DalleTransformerPreprocessor` of VQ-Diffusion's data/utils/image_preprocessor.py, with whole numbers in its
    `uniform`s; the place of its RandomCrop is uniform."""
    shorter = min(width, height)
    starts = {}
    for name, side in (("left", width), ("top", height)):
        rest = side - shorter
        starts[name] = range(3 * rest // 8, max(3 * rest // 8 + 1, 5 * rest // 8))
    sides = range(SIZE, max(min(shorter, round(9 / 8 * SIZE)), SIZE) + 1)
    places = list(product(starts["left"], starts["top"], sides))
    found: dict[Outcome, float] = {}
    for left, top, side in places:
        square = (left, top, shorter, shorter)
        for across, down in product(range(side - SIZE + 1), repeat=2):
            outcome = Outcome((side, side), (across, down, SIZE, SIZE), False, square)
            found[outcome] = 1 / len(places) / (side - SIZE + 1) ** 2
    return found


def center_crop(width: int, height: int) -> dict[Outcome, float]:
    """ADM's `center_crop_arr`."""
    resized = _shorter_side(width, height, SIZE)
    left, top = (resized[0] - SIZE) // 2, (resized[1] - SIZE) // 2
    return {Outcome(resized, (left, top, SIZE, SIZE), False): 1.0}


def random_resized_crop(least: float) -> Law:
    """torchvision's RandomResizedCrop(scale=(least, 1), ratio=(1, 1)): ten tries at a square, then the centre."""

    def law(width: int, height: int) -> dict[Outcome, float]:
        area = width * height
        # The area is uniform, and the side the root of it, rounded: each side has an interval of areas.
        shares = {
            side: max(0.0, min(area, (side + 0.5) ** 2) - max(least * area, (side - 0.5) ** 2)) / (area - least * area)
            for side in range(1, max(width, height) + 2)
        }
        fitting = {side: share for side, share in shares.items() if share and side <= min(width, height)}
        fits = sum(fitting.values())
        tried = 1 - (1 - fits) ** 10
        found: dict[Outcome, float] = {}
        for side, share in fitting.items():
            found |= _uniform((width, height), side, share / fits * tried)
        side = min(width, height)
        centre = Outcome((width, height), ((width - side) // 2, (height - side) // 2, side, side), False)
        found[centre] = found.get(centre, 0.0) + (1 - tried)
        return found

    return law


def mirrored(law: Law) -> Law:
    """RandomHorizontalFlip: half of the images."""

    def both(width: int, height: int) -> dict[Outcome, float]:
        plain = law(width, height)
        return {replace(one, mirrored=flip): share / 2 for one, share in plain.items() for flip in (False, True)}

    return both


def _picture(width: int, height: int) -> Image.Image:
    """A smooth picture in which every part looks different: two ramps, and their product."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack((across, down, across * down), axis=-1)
    return Image.fromarray(np.uint8(np.round(20 + 215 * pixels)))


def _cut(picture: Image.Image, outcome: Outcome) -> np.ndarray:
    left, top, wide, high = outcome.part
    if outcome.before is not None:
        left_before, top_before, *size = outcome.before
        picture = picture.crop((left_before, top_before, left_before + size[0], top_before + size[1]))
    resized = picture.resize(outcome.resized, Image.Resampling.BICUBIC)
    part = resized.crop((left, top, left + wide, top + high)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(part, dtype=np.int64)
    return pixels[:, ::-1] if outcome.mirrored else pixels


@dataclass(frozen=True)
class ChiSquared:
    """Pearson's statistic of all images together, its degrees of freedom, and the chance of one as large."""

    statistic: float
    degrees: int

    @property
    def chance(self) -> float:
        if not self.degrees:
            return 1.0
        half = torch.tensor([self.degrees / 2, self.statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


def compare(data: dict[str, Any], law: Law, images: Sequence[tuple[int, int]] = IMAGES) -> ChiSquared:
    """Draw training crops as a recipe's settings say, and compare how often each came with the authors' law.

    Args:
        data: the settings of a DataModule of images.
        law: of the authors' transform.
        images: widths and heights.

    Raises:
        NoOutcomeError: a crop that the authors' transform never gives.
    """
    names = ("crop", "minimum_crop", "maximum_crop", "crop_area", "crop_aspect", "flip")
    given = {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names if name in data}
    pipeline = ImagePipeline(SIZE, 0, apply_exif=False, **{"crop": "random", "flip": True} | given)
    statistic, degrees = 0.0, 0
    for width, height in images:
        picture = _picture(width, height)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        probabilities = law(width, height)
        assert math.isclose(sum(probabilities.values()), 1.0, rel_tol=1e-9)
        outcomes = list(probabilities)
        looks = np.stack([_cut(picture, outcome) for outcome in outcomes]).reshape(len(outcomes), -1)
        counts = np.zeros(len(outcomes))
        for draw in range(DRAWS):
            drawn = pipeline.training(buffer.getvalue(), 0, f"{draw}").astype(np.int64).reshape(-1)
            off = np.abs(looks - drawn).max(axis=1)
            nearest = int(off.argmin())
            if off[nearest] > MOST_OFF:
                raise NoOutcomeError(f"of {width} x {height} pixels, {off[nearest]} levels off the nearest outcome")
            counts[nearest] += 1
        expected = DRAWS * np.array([probabilities[outcome] for outcome in outcomes])
        statistic += float(((counts - expected) ** 2 / expected).sum())
        degrees += len(outcomes) - 1
    return ChiSquared(statistic, degrees)
