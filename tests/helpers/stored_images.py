"""Tiny sets of images on disk, in each form that an evaluation reads."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(count: int, seed: int, size: int = 8) -> np.ndarray:
    """uint8 `(count, size, size, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, arr_0=images, **({} if labels is None else {"labels": labels}))
    return str(path)


def save_folder(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = path / f"class{label}" / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return str(path)
