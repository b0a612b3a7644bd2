"""What crops and batches cost beside decoding the JPEG alone, on one core.

    OMP_NUM_THREADS=1 python benchmarks/image_pipeline.py
    OMP_NUM_THREADS=1 python benchmarks/image_pipeline.py --images 64 --rounds 9

The images are of ImageNet's usual size, 500 x 375 pixels and about 110 kB, drawn with a falling spectrum. The bare arm
decodes each to RGB by Pillow, with libjpeg-turbo; torchvision's decoder and resizing stand beside it. The others are
what a worker of `ImageShards` or `ImageFolder` does for a batch behind reading its bytes: decode, crop, and make the
batch, of bytes, exactly or by `decoding: fast`. The figure is bare decoding's time over the arm's: the share of a
core's decoding that is left.
"""

import argparse
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.data.image_batches import CENTER_CROP, ImagePipeline, LabelledSample, image_batch


def jpeg(number: int, width: int = 500, height: int = 375, quality: int = 92) -> bytes:
    """Draw a picture whose amplitudes fall with the frequency, as those of photographs do."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.1
    planes = []
    for _ in range(3):
        phases = random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)
        plane = np.fft.irfft2(phases * amplitude, (height, width))
        planes.append(plane / plane.std())
    grey, *colour = planes
    pixels = np.stack([grey, *(grey + 0.3 * each for each in colour)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((128 + 50 * pixels).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decoded_by_pillow(files: list[bytes]) -> None:
    for data in files:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.load()


def batch_of(files: list[bytes], pipeline: ImagePipeline, *, training: bool) -> dict:
    """What a worker makes of some files."""
    pixels = [
        pipeline.training(data, 0, str(number)) if training else pipeline.evaluation(data, CENTER_CROP)
        for number, data in enumerate(files)
    ]
    return image_batch([LabelledSample(each, 0, key="", index=0) for each in pixels], pipeline.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=256, help="of the crops in pixels")
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = [jpeg(number) for number in range(given.images)]
    print(f"{given.images} files of {sum(map(len, files)) / len(files) / 1e3:.0f} kB, {torch.__version__}, 1 thread")

    def pipeline(**settings: Any) -> ImagePipeline:
        usual: dict[str, Any] = {"crop": "random", "flip": True, "apply_exif": False}
        return ImagePipeline(given.size, 0, **(usual | settings))

    crops = {
        "random (VQGAN)": pipeline(),
        "random from 0.8 (LlamaGen)": pipeline(minimum_crop=0.8),
        "random 0.889 (VAR)": pipeline(minimum_crop=0.889, maximum_crop=0.889),
        "random part (MaskBit)": pipeline(crop="random_resized", crop_area=(0.8, 1.0), crop_aspect=(1.0, 1.0)),
        "centre (ADM)": pipeline(crop="center"),
    }
    arms: dict[str, Callable[[], object]] = {"decoding alone": lambda: decoded_by_pillow(files)}
    for name, each in crops.items():
        arms[name] = lambda each=each: batch_of(files, each, training=True)
        fast = replace(each, decoding="fast")
        arms[f"{name}, fast"] = lambda each=fast: batch_of(files, each, training=True)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2.functional import resize

        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        side = [given.size]

        def by_torchvision() -> None:
            for data in tensors:
                resize(cast(torch.Tensor, decode_jpeg(data, mode=ImageReadMode.RGB)), side, antialias=True)

        arms["torchvision's decoding alone"] = lambda: [decode_jpeg(data, mode=ImageReadMode.RGB) for data in tensors]
        arms["torchvision's decoding and resizing"] = by_torchvision
    except (ImportError, RuntimeError) as error:
        print(f"torchvision decodes no JPEG here: {error}")
    taken = alternate(arms, given.rounds)
    bare = taken["decoding alone"]
    for name, seconds in taken.items():
        each = milliseconds([type(one)(one.wall / given.images, one.processor / given.images) for one in seconds])
        print(f"{name:38s} {each} an image; {ratio(bare, seconds, 'at least 0.8')}")


if __name__ == "__main__":
    main()
