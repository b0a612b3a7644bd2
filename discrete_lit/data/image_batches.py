"""From image files to the batches that both image DataModules yield."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from discrete_lit.data import keyed_random
from discrete_lit.data.decoding import decode_image
from discrete_lit.data.resumable import Batch
from discrete_lit.data.transforms import center_crop, random_crop
from discrete_lit.images import from_uint8


@dataclass(frozen=True)
class LabelledImage:
    """One sample of a batch; `pixels` is uint8 `(H, W, 3)`."""

    pixels: np.ndarray
    label: int
    key: str
    index: int


@dataclass(frozen=True)
class ImagePipeline:
    """Decoding and cropping, the same in every DataModule of images.

    Args:
        image_size: side of the square that comes out, in pixels.
        seed: of the augmentation.
        crop: the training crop, see `transforms`.
        minimum_crop: see `transforms.random_crop`.
        flip: mirror half of the training images.
        apply_exif: turn pictures as their EXIF orientation says.
    """

    image_size: int
    seed: int
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
        """An augmented image, uint8 `(image_size, image_size, 3)`; the same for the same (seed, epoch, key)."""
        image = decode_image(data, self.apply_exif)
        randomness = keyed_random.uniforms(self.seed, epoch, key)
        if self.crop == "random":
            return random_crop(image, self.image_size, randomness, self.minimum_crop, self.flip)
        pixels = center_crop(image, self.image_size)
        return pixels[:, ::-1] if self.flip and randomness[3] < 0.5 else pixels

    def evaluation(self, data: bytes) -> np.ndarray:
        """ADM's centre crop, uint8 `(image_size, image_size, 3)`."""
        return center_crop(decode_image(data, self.apply_exif), self.image_size)


def image_batch(samples: Sequence[LabelledImage], image_size: int) -> Batch:
    """`{"image": float32 (B, 3, H, W) in [-1, 1], "label": int64 (B,), "key": list[str], "index": int64 (B,)}`."""
    pixels = np.empty((len(samples), image_size, image_size, 3), dtype=np.uint8)
    for row, sample in enumerate(samples):
        pixels[row] = sample.pixels
    images = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    return {
        "image": images,
        "label": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        "key": [sample.key for sample in samples],
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
    }
