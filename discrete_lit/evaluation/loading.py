"""The networks that an evaluation is asked for, from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from discrete_lit.evaluation.reconstruction import ReconstructionMeter

if TYPE_CHECKING:
    from discrete_lit.generators import Generator


def load_meters(
    checkpoints: dict[str, str], lpips_weights: str | None, device: torch.device
) -> dict[str, ReconstructionMeter]:
    """A meter on `device` for each named checkpoint of an autoencoder, all with LPIPS where its weights are given.

    Raises:
        ValueError: a checkpoint that cannot be read or holds a generator; weights that are not LPIPS's.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator
    from discrete_lit.tokenizers.losses.perceptual import LPIPS

    lpips = None
    if lpips_weights is not None and checkpoints:
        lpips = LPIPS(lpips_weights).to(device)
        lpips.prepare()
    meters = {}
    for name, path in checkpoints.items():
        autoencoder = files.load(path)
        if isinstance(autoencoder, Generator):
            raise ValueError(
                f"reconstructions.{name}={path!r} holds a {type(autoencoder).__name__}, which is a generator; give the "
                "checkpoint of a tokenizer or of a continuous autoencoder"
            )
        meters[name] = ReconstructionMeter(autoencoder.to(device), lpips)
    return meters


def load_judge(checkpoint: str, num_classes: int | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A classifier on `device`, from images in [-1, 1] to logits.

    Raises:
        ValueError: a checkpoint that holds no classifier, or one of other classes.
    """
    from discrete_lit.evaluation.classifier import load_classifier

    classifier = load_classifier(checkpoint)
    if num_classes is not None and classifier.num_classes != num_classes:
        raise ValueError(
            f"classifier={checkpoint!r} knows {classifier.num_classes} classes, the images have {num_classes}"
        )
    return classifier.to(device)


def load_generators(likelihoods: dict[str, str], image_size: int) -> dict[str, Generator]:
    """Each checkpoint of a dictionary from names to checkpoints, and its generator on the CPU.

    Raises:
        ValueError: a checkpoint that holds no generator, or one of another image size.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator

    generators: dict[str, Generator] = {}
    for name, path in likelihoods.items():
        if path in generators:
            continue
        module = files.load(path)
        if not isinstance(module, Generator):
            raise ValueError(f"likelihoods.{name}={path!r} holds a {type(module).__name__}, not a Generator")
        if module.image_size != image_size:
            raise ValueError(
                f"likelihoods.{name}={path!r} models images of {module.image_size} pixels, image_size is {image_size}"
            )
        generators[path] = module
    return generators
