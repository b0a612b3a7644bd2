"""A generator with its tokenizer as a folder of `diffusers`: `model_index.json` and a pipeline of its own.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline(class_labels=[207, 360], seed=0).images

The folder's two Python files only hand over to discrete-lit, which must be installed; `diffusers` runs them, which is
why it asks for `trust_remote_code`. `discrete_lit.load(folder)` reads the same folder, and runs no code of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule

from discrete_lit.checkpoints import save_pretrained
from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.hub_folders import GENERATOR, PIPELINE_INDEX
from discrete_lit.core.images import to_uint8
from discrete_lit.generators import Generator, LatentGenerator, Unified
from discrete_lit.samplers.adjustment import with_settings

_PIPELINE = '''"""A pipeline of diffusers around a generator of discrete-lit."""

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from discrete_lit.pretrained.pipelines import draw_images


class DiscreteLitOutput(BaseOutput):
    images: list


class DiscreteLitPipeline(DiffusionPipeline):
    def __init__(self, generator):
        super().__init__()
        self.register_modules(generator=generator)

    def __call__(self, class_labels=None, prompt=None, seed=0, output_type="pil", **settings):
        """Draw an image for each label, or prompt; `guidance_scale`, `temperature` and `steps` change the sampler."""
        images = draw_images(self.generator, class_labels, prompt=prompt, seed=seed, **settings)
        return DiscreteLitOutput(images=self.numpy_to_pil(images / 255.0) if output_type == "pil" else images)
'''
_COMPONENT = '''"""The generator of a pipeline, as discrete-lit reads it."""

import discrete_lit


class DiscreteLitGenerator:
    @classmethod
    def from_pretrained(cls, folder, **settings):
        return discrete_lit.load(folder)
'''


def write_pipeline(module: LightningModule, folder: str | Path, *, licence: str = "") -> None:
    """Write a generator of images as a folder that `diffusers.DiffusionPipeline.from_pretrained` reads.

    Args:
        module: a generator that was built from a configuration, with a tokenizer that makes images.
        folder: made where it is not there.
        licence: for the model card, as the Hub names it.

    Raises:
        ValueError: no generator, or one without images.
    """
    check_draws_images(module)
    place = Path(folder)
    save_pretrained(module, place / GENERATOR, licence=licence)
    atomic_write_text(place / GENERATOR / "discrete_lit_generator.py", _COMPONENT)
    atomic_write_text(place / "discrete_lit_pipeline.py", _PIPELINE)
    index = {
        "_class_name": ["discrete_lit_pipeline", "DiscreteLitPipeline"],
        "_diffusers_version": "0.35.0",
        GENERATOR: ["discrete_lit_generator", "DiscreteLitGenerator"],
    }
    atomic_write_text(place / PIPELINE_INDEX, json.dumps(index, indent=2) + "\n")


def check_draws_images(module: Any) -> None:
    """Check that a module is a generator whose tokenizer makes images.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(module, Generator | LatentGenerator | Unified):
        raise ValueError(f"a {type(module).__name__} draws nothing: a generator is needed")
    if not module.tokenizer.makes_images:
        raise ValueError(
            f"this {type(module).__name__} has a {type(module.tokenizer).__name__}, which makes no images: give it its "
            "tokenizer when it is imported"
        )


@torch.inference_mode()
def draw_images(
    generator: Any,
    labels: Sequence[int] | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> np.ndarray:
    """Draw an image for each label, or for each prompt.

    Args:
        generator: with a tokenizer that makes images.
        labels: classes; for a generator of texts they may be left out.
        prompt: a text or several, for a generator that reads texts.
        seed: image i is the one that `discrete-lit sample` draws as sample i with this seed.
        **settings: of the generator's own sampler, in place of its values: `guidance_scale`, `temperature`, `steps`.

    Returns:
        Images `(B, H, W, C)` uint8.

    Raises:
        ValueError: a label out of range, prompts for a generator without texts or none for one that reads them, or a
            setting that the sampler does not have.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if generator.reads_text != bool(texts):
        raise ValueError(f"this {type(generator).__name__} reads {'texts: give a prompt' if not texts else 'no texts'}")
    given = list(labels) if labels is not None else [0] * max(1, len(texts))
    wrong = [label for label in given if type(label) is not int or not 0 <= label <= generator.num_classes]
    if wrong:
        raise ValueError(f"label {wrong[0]!r} is out of range, accepted: int in [0, {generator.num_classes}]")
    device = next(generator.parameters()).device
    condition: Any = torch.tensor(given, device=device)
    if texts:
        if isinstance(generator, Unified):
            condition = generator.condition_of_texts(texts)
        else:
            condition = generator.condition_of_texts(texts, labels=condition if generator.num_classes > 1 else None)
    tokens = generator.sample(condition, with_settings(generator.sampler, **settings), seed=seed)
    return to_uint8(generator.tokenizer.decode(tokens)).movedim(1, -1).cpu().numpy()
