"""Image files to the batches that both image DataModules yield."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from PIL.Image import Image

from discrete_lit.core.images import from_uint8
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.loaders import Batch
from discrete_lit.data.transforms import center_crop, decode_image, random_crop, ten_crops


@dataclass(frozen=True)
class LabelledImage:
    """One sample of a batch; `pixels` is uint8 `(H, W, 3)`, or `(V, H, W, 3)` of V crops."""

    pixels: np.ndarray
    label: int | None
    _: KW_ONLY
    key: str
    index: int


@dataclass(frozen=True)
class EvaluationCrops:
    """The crops of an image that evaluation, or an array of tokens, is made of.

    Args:
        kind: `"center"`, ADM's crop; `"flip"`, that and its mirror image; or `"ten"`, the centre and the corners, each
            with its mirror image, see `transforms.ten_crops`.
        ten_crop_scales: each at least 1; ten crops for each of them.

    Raises:
        ValueError: another kind, or a scale below 1.
    """

    kind: str = "center"
    ten_crop_scales: tuple[float, ...] = (1.1,)

    def __post_init__(self) -> None:
        if self.kind not in ("center", "flip", "ten"):
            raise ValueError(f"crops is {self.kind!r}; it must be 'center', 'flip' or 'ten'")
        if not self.ten_crop_scales or min(self.ten_crop_scales) < 1:
            raise ValueError(f"ten_crop_scales is {list(self.ten_crop_scales)}; each must be at least 1")

    @property
    def count(self) -> int | None:
        """V, the crops of an image; None for a single one, which has no dimension of its own."""
        return {"center": None, "flip": 2, "ten": 10 * len(self.ten_crop_scales)}[self.kind]

    def cut(self, image: Image, size: int) -> np.ndarray:
        """Cut an image: uint8 `(size, size, 3)`, or `(V, size, size, 3)` of several crops."""
        if self.kind == "ten":
            return np.concatenate([ten_crops(image, size, scale) for scale in self.ten_crop_scales])
        pixels = center_crop(image, size)
        return np.stack((pixels, pixels[:, ::-1])) if self.kind == "flip" else pixels


CENTER_CROP = EvaluationCrops()


@dataclass(frozen=True)
class ImagePipeline:
    """Decoding and cropping, the same in every DataModule of images.

    Args:
        image_size: side of the square that comes out, in pixels.
        seed: decides the augmentation.
        crop: the training crop, see `transforms`.
        minimum_crop: see `transforms.random_crop`.
        flip: mirror half of the training images.
        apply_exif: turn pictures as their EXIF orientation says.
    """

    image_size: int
    seed: int
    _: KW_ONLY
    crop: str
    minimum_crop: float
    flip: bool
    apply_exif: bool

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1")
        if self.crop not in ("random", "center"):
            raise ValueError(f"crop {self.crop!r} is not known; it is 'random' or 'center'")
        if not 0 < self.minimum_crop <= 1:
            raise ValueError(f"minimum_crop is {self.minimum_crop}; it must be in (0, 1]")

    def training(self, data: bytes, epoch: int, key: str) -> np.ndarray:
        """Augment an image: uint8 `(image_size, image_size, 3)`, the same for the same (seed, epoch, key)."""
        image = decode_image(data, self.apply_exif)
        randomness = augmentation_uniforms(self.seed, epoch, key)
        if self.crop == "random":
            return random_crop(image, self.image_size, randomness, minimum_crop=self.minimum_crop, flip=self.flip)
        pixels = center_crop(image, self.image_size)
        return pixels[:, ::-1] if self.flip and randomness[3] < 0.5 else pixels

    def evaluation(self, data: bytes, crops: EvaluationCrops) -> np.ndarray:
        """Crop an image for evaluation: uint8 `(image_size, image_size, 3)`, or `(V, image_size, image_size, 3)`."""
        return crops.cut(decode_image(data, self.apply_exif), self.image_size)


def image_batch(samples: Sequence[LabelledImage], image_size: int) -> Batch:
    """Make a batch: `{"image": float32 in [-1, 1], "label": int64 (B,), "key": list[str], "index": int64 (B,)}`.

    A set without labels makes batches without `"label"`.

    Images are `(B, 3, H, W)`, or `(B, V, 3, H, W)` of several crops.
    """
    shape = samples[0].pixels.shape if samples else (image_size, image_size, 3)
    pixels = np.empty((len(samples), *shape), dtype=np.uint8)
    for row, sample in enumerate(samples):
        pixels[row] = sample.pixels
    images = from_uint8(torch.from_numpy(pixels).movedim(-1, -3).contiguous())
    labels = [sample.label for sample in samples if sample.label is not None]
    assert len(labels) in (0, len(samples)), "a set has labels or none"
    return {
        "image": images,
        **({"label": torch.tensor(labels, dtype=torch.int64)} if labels else {}),
        "key": [sample.key for sample in samples],
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
    }
