"""Image files to the batches that both image DataModules yield."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.captions import caption_batch, drawn
from discrete_lit.data.loaders import Batch
from discrete_lit.data.transforms import (
    MODES,
    Picture,
    center_crop,
    dall_e_crop,
    decode_image,
    decode_image_fast,
    mirrored,
    random_crop,
    random_resized_crop,
    ten_crops,
)

_LARGEST_SCALE = 8

TrainingCrop = Literal["random", "center", "random_resized", "dall_e"]
Decoding = Literal["exact", "fast"]


@dataclass(frozen=True)
class LabelledSample:
    """One sample of a batch, an image or a clip."""

    values: np.ndarray
    """An image as uint8 `(H, W, C)`, or `(V, H, W, C)` of V crops; a clip as its pipeline makes it."""
    label: int | None
    _: KW_ONLY
    key: str
    index: int
    captions: tuple[str, ...] | None = None
    """All captions of the sample; None where none are read."""
    caption: str | None = None
    """The one that training drew; None in evaluation."""


@dataclass(frozen=True)
class EvaluationCrops:
    """The crops of an image that evaluation, or an array of tokens, is made of.

    Args:
        kind: `"center"`, ADM's crop; `"flip"`, that and its mirror image; or `"ten"`, the centre and the corners, each
            with its mirror image, see `transforms.ten_crops`.
        ten_crop_scales: each at least 1; ten crops for each of them.

    Raises:
        ValueError: another kind, or a scale below 1 or above 8.
    """

    kind: str = "center"
    ten_crop_scales: tuple[float, ...] = (1.1,)

    def __post_init__(self) -> None:
        if self.kind not in ("center", "flip", "ten"):
            raise ValueError(f"crops is {self.kind!r}; it must be 'center', 'flip' or 'ten'")
        if not self.ten_crop_scales or not all(1 <= scale <= _LARGEST_SCALE for scale in self.ten_crop_scales):
            raise ValueError(f"ten_crop_scales is {list(self.ten_crop_scales)}; each must be in [1, {_LARGEST_SCALE}]")

    @property
    def count(self) -> int | None:
        """V, the crops of an image; None for a single one, which has no dimension of its own."""
        return {"center": None, "flip": 2, "ten": 10 * len(self.ten_crop_scales)}[self.kind]

    def cut(self, image: Image, size: ImageSize) -> np.ndarray:
        """Cut an image: uint8 `(H, W, C)`, or `(V, H, W, C)` of several crops."""
        if self.kind == "ten":
            return np.concatenate([ten_crops(image, size, scale) for scale in self.ten_crop_scales])
        pixels = center_crop(image, size)
        return np.stack((pixels, pixels[:, ::-1])) if self.kind == "flip" else pixels


CENTER_CROP = EvaluationCrops()


class SamplePipeline(ABC):
    """Decode samples and cut them, for any DataModule that reads files: of images, of clips.

    It is copied to the workers, so it must pickle. What is random is keyed by `seed`, the epoch and the sample's key.
    """

    seed: int

    @abstractmethod
    def training(self, data: bytes, epoch: int, key: str) -> np.ndarray:
        """Decode and augment a file: the same for the same (seed, epoch, key).

        Raises:
            UndecodableSample: it cannot be read completely.
        """

    @abstractmethod
    def evaluation(self, data: bytes, crops: EvaluationCrops) -> np.ndarray:
        """Decode a file and cut it for evaluation.

        Raises:
            UndecodableSample: it cannot be read completely.
        """

    @abstractmethod
    def batch(self, samples: Sequence[LabelledSample]) -> Batch:
        """Make a batch, which may be one of no sample."""

    def evaluation_settings(self) -> dict[str, Any]:
        """Name what decides, beside the size, how a file is decoded for evaluation; nothing by default."""
        return {}

    def training_caption(self, captions: tuple[str, ...] | None, epoch: int, key: str) -> str | None:
        """Draw one of a sample's captions, the same for the same (seed, epoch, key); None where it has none."""
        if captions is None:
            return None
        return drawn(captions, augmentation_uniforms(self.seed, epoch, f"caption of {key}")[0])


@dataclass(frozen=True)
class ImagePipeline(SamplePipeline):
    """Decoding and cropping, the same in every DataModule of images.

    Args:
        image_size: of what comes out, in pixels: the side of a square, or height and width.
        seed: decides the augmentation.
        image_channels: C: 1 for grey, 3 for RGB, 4 for RGBA.
        crop: the training crop, see `transforms`.
        minimum_crop, maximum_crop: see `transforms.random_crop`.
        crop_area, crop_aspect: see `transforms.random_resized_crop`.
        flip: mirror half of the training images.
        apply_exif: turn pictures as their EXIF orientation says.
        decoding: of training images: `exact`, or `fast` by `transforms.decode_image_fast`.
    """

    image_size: ImageSize
    seed: int
    _: KW_ONLY
    image_channels: int = 3
    crop: TrainingCrop
    minimum_crop: float = 1.0
    maximum_crop: float = 1.0
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool
    apply_exif: bool
    decoding: Decoding = "exact"

    def __post_init__(self) -> None:
        height_and_width(self.image_size)  # refuses what is no size
        if self.image_channels not in MODES:
            raise ValueError(f"image_channels is {self.image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
        if self.crop not in get_args(TrainingCrop):
            raise ValueError(f"crop {self.crop!r} is not known; it is 'random', 'center', 'random_resized' or 'dall_e'")
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding {self.decoding!r} is not known; it is 'exact' or 'fast'")
        height, width = height_and_width(self.image_size)
        if self.crop == "dall_e" and height != width:
            raise ValueError(f"crop 'dall_e' cuts squares, and image_size is {[height, width]}")
        if not 0 < self.minimum_crop <= 1:
            raise ValueError(f"minimum_crop is {self.minimum_crop}; it must be in (0, 1]")
        if not self.minimum_crop <= self.maximum_crop <= 1:
            raise ValueError(
                f"maximum_crop is {self.maximum_crop}; it must be in [minimum_crop, 1], and minimum_crop is "
                f"{self.minimum_crop}"
            )
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area is {list(self.crop_area)}; it must be two rising fractions in (0, 1]")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ValueError(f"crop_aspect is {list(self.crop_aspect)}; it must be two rising ratios above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the images that come out."""
        return (*height_and_width(self.image_size), self.image_channels)

    def training(self, data: bytes, epoch: int, key: str) -> np.ndarray:
        """Augment an image: uint8 `(H, W, C)`, the same for the same (seed, epoch, key)."""
        image = self._decoded(data)
        randomness = augmentation_uniforms(self.seed, epoch, key)
        if self.crop == "random":
            return random_crop(
                image,
                self.image_size,
                randomness,
                minimum_crop=self.minimum_crop,
                maximum_crop=self.maximum_crop,
                flip=self.flip,
            )
        if self.crop == "random_resized":
            pixels = random_resized_crop(
                image,
                self.image_size,
                lambda attempt: augmentation_uniforms(self.seed, epoch, f"part {attempt} of {key}"),
                area=self.crop_area,
                aspect=self.crop_aspect,
            )
        elif self.crop == "dall_e":
            place = augmentation_uniforms(self.seed, epoch, f"place of {key}")
            pixels = dall_e_crop(image, self.image_size, place)
        else:
            pixels = center_crop(image, self.image_size)
        return mirrored(pixels) if self.flip and randomness[3] < 0.5 else pixels

    def _decoded(self, data: bytes) -> Picture:
        """Decode a file for training."""
        if self.decoding == "exact":
            return decode_image(data, self.apply_exif, image_channels=self.image_channels)
        height, width = height_and_width(self.image_size)
        # Of what is cut before it is resized the scale is not known yet.
        enlarged = {"random": 1 / self.minimum_crop, "center": 1.0, "dall_e": 9 / 8}.get(self.crop)
        covered = None if enlarged is None else (math.ceil(height * enlarged), math.ceil(width * enlarged))
        return decode_image_fast(data, self.apply_exif, image_channels=self.image_channels, covered=covered)

    def batch(self, samples: Sequence[LabelledSample]) -> Batch:
        """Make a batch, see `image_batch`."""
        return image_batch(samples, self.shape)

    def evaluation_settings(self) -> dict[str, Any]:
        return {"apply_exif": self.apply_exif}

    def evaluation(self, data: bytes, crops: EvaluationCrops) -> np.ndarray:
        """Crop an image for evaluation: uint8 `(H, W, C)`, or `(V, H, W, C)` of several crops."""
        return crops.cut(decode_image(data, self.apply_exif, image_channels=self.image_channels), self.image_size)


def image_batch(samples: Sequence[LabelledSample], shape: tuple[int, int, int]) -> Batch:
    """Make a batch: `{"image": uint8, "label": int64 (B,), "key": list[str], "index": int64 (B,)}`.

    A set without labels makes batches without `"label"`. Where captions are read there is `"caption": list[str]`, one
    of each image: in training a random one of several, in evaluation the first, beside all of them in `"captions"`.

    Images are `(B, C, H, W)` in 0..255, or `(B, V, C, H, W)` of several crops; see `core.images.pixels_as_floats`.

    Args:
        samples: of the batch.
        shape: `(H, W, C)` of an image, for a batch of none.
    """
    return {"image": pixels_of(samples, shape).movedim(-1, -3), **label_batch(samples)}


def pixels_of(samples: Sequence[LabelledSample], shape: tuple[int, ...]) -> Tensor:
    """Put the pixels of samples into one uint8 tensor `(B, ..., C)`, which has `shape` for a batch of none."""
    pixels = np.empty((len(samples), *(samples[0].values.shape if samples else shape)), dtype=np.uint8)
    for row, sample in enumerate(samples):
        pixels[row] = sample.values
    return torch.from_numpy(pixels)


def label_batch(samples: Sequence[LabelledSample]) -> Batch:
    """Make what a batch has beside the images or clips themselves, as `image_batch` says."""
    labels = [sample.label for sample in samples if sample.label is not None]
    assert len(labels) in (0, len(samples)), "a set has labels or none"
    captions = [sample.captions for sample in samples if sample.captions is not None]
    chosen = [sample.caption for sample in samples if sample.caption is not None]
    return {
        **({"label": torch.tensor(labels, dtype=torch.int64)} if labels else {}),
        **(caption_batch(captions, chosen or None) if captions else {}),
        "key": [sample.key for sample in samples],
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
    }
