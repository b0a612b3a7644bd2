"""`discrete-lit caption`: images to texts, by a generator of text and image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from discrete_lit.checkpoints import load, weights_of
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.files import atomic_write_text, file_sha256
from discrete_lit.core.images import from_uint8, height_and_width, size_text
from discrete_lit.core.provenance import describe, environment
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.sources.class_folders import find_images
from discrete_lit.data.transforms import center_crop, decode_image
from discrete_lit.generators import Unified
from discrete_lit.samplers import SegmentSampler


def caption(
    images: list[str],
    ckpt_path: str,
    output: str = "captions.json",
    *,
    sampler: SegmentSampler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    resize: bool = False,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Write the captions of images by the checkpoint of a `Unified`, which alone is enough.

    Prints a line for each image, its file and its caption, and writes a JSON file with these and every setting. Caption
    i is a function of (seed, i) and image i alone.

    Args:
        images: files, and folders whose images are taken at any depth, in the order of their names; words in front of
            the first option are these too.
        ckpt_path: checkpoint of a Unified of order `both`; it carries its tokenizers.
        output: the JSON file.
        sampler: how to draw; the generator's own by default. `top_k: 1` of the text takes its most probable id each
            time.
        seed: of the draw.
        batch_size: images at a time.
        resize: shrink or enlarge images of another size than the model's, and cut out their centre, as in evaluation;
            otherwise they are refused.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        precision: as of `discrete-lit sample`.

    Returns:
        What the file holds: `"captions"`, a caption for each file by its path, beside the settings.

    Raises:
        ValueError: no images, an image that cannot be read or has another size; a checkpoint of another kind of model,
            or of one that draws no texts.
    """
    generator = load(ckpt_path)
    if not isinstance(generator, Unified):
        raise ValueError(
            f"ckpt_path={ckpt_path!r} holds a {type(generator).__name__}, which writes no captions: give the "
            "checkpoint of a Unified"
        )
    if not generator.describes:
        raise ValueError(
            f"the Unified of ckpt_path={ckpt_path!r} draws images of captions alone: train one with order: both"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    files = _files(images)
    precision = resolve_precision(precision, accelerator)
    fabric = make_fabric(accelerator, devices=1, precision=precision)
    fabric.strategy.precision.convert_module(generator)
    generator = generator.to(fabric.device)
    texts: list[str] = []
    for start in tqdm(range(0, len(files), batch_size), desc="caption", unit="batch", disable=None):
        pixels = np.stack([_read(file, generator, resize) for file in files[start : start + batch_size]])
        numbers = torch.arange(start, start + len(pixels), device=fabric.device)
        shown = from_uint8(torch.from_numpy(pixels)).movedim(-1, 1).to(fabric.device)
        with torch.inference_mode(), fabric.autocast():
            # An encoder of the model's own reads images, where it has one; the others read their tokens.
            data = shown
            if generator.vision is None:
                data = generator.data_of({"image": shown}, CounterRandom(seed, numbers))
            texts += generator.caption(data, sampler, seed=seed, indices=numbers)
    for file, text in zip(files, texts, strict=True):
        print(f"{file}: {text}")
    run = {
        "captions": {str(file): text for file, text in zip(files, texts, strict=True)},
        "checkpoint": str(ckpt_path),
        "checkpoint_sha256": file_sha256(weights_of(ckpt_path)),
        "sampler": describe(sampler or generator.sampler),
        "seed": seed,
        "resize": resize,
        "precision": precision,
        **environment(fabric.device),
    }
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
    return run


def _files(images: list[str]) -> list[Path]:
    """The image files that are named, and those of the folders that are.

    Raises:
        ValueError: nothing is named, no such file, or a folder without an image.
    """
    files: list[Path] = []
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found = find_images(path, labels=False)
            files += [path / file for files_of in found.files.values() for file in files_of]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"images: there is no file or folder {name!r}")
    if not files:
        raise ValueError("images names nothing: give files or folders, as in `discrete-lit caption a.png photos/ ...`")
    return files


def _read(file: Path, generator: Unified, resize: bool) -> np.ndarray:
    """Decode an image to uint8 `(H, W, C)` of the generator's size."""
    size = height_and_width(generator.image_size)
    try:
        image = decode_image(file.read_bytes(), image_channels=generator.tokenizer.image_channels)
    except UndecodableSample as error:
        raise ValueError(f"images: {file} cannot be read: {error}") from error
    if not resize and (image.height, image.width) != size:
        raise ValueError(
            f"images: {file} has {size_text((image.height, image.width))} pixels, height first, and this Unified "
            f"models {size_text(generator.image_size)}: give images of that size, or `--resize true`, which cuts out "
            "the centre"
        )
    return center_crop(image, generator.image_size)
