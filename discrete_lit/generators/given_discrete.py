"""Models that are given discrete tokens d of an image by a frozen generator of d: p(x) = sum over d of p(d) p(x | d).

`GivenDiscrete` holds that generator for DisCon, whose x are latents, and for Muse's super-resolution, whose x are the
tokens of a larger image.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.training import ClassConditionalTraining


class GivenDiscrete(ClassConditionalTraining):
    """Hold the frozen generator that draws d, checked against the model that is given d, and saved with it."""

    discrete: Generator

    def take_discrete(self, discrete: Generator) -> None:
        """Freeze the generator of d and keep it; the texts of both must be read alike.

        Raises:
            ValueError: it reads texts by another encoder.
        """
        check_same_texts(self, discrete)
        self.discrete = discrete.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but keep the frozen generator of d in eval mode."""
        super().train(mode)
        if "discrete" in self._modules:
            self.discrete.eval()
        return self

    def setup(self, stage: str) -> None:
        """Refuse a generator of d whose text encoder has other weights."""
        super().setup(stage)
        check_same_texts(self, self.discrete, weights=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe tokenizer and generator of d in the checkpoint, so that it loads without their files."""
        super().on_save_checkpoint(checkpoint)
        if self.discrete.hparams:
            checkpoint["discrete_config"] = described_alone(self.discrete)

    def drawing_networks(self) -> Iterable[Any]:
        return (*self.discrete.drawing_networks(), *super().drawing_networks())


def spread_over_squares(ids: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Spread ids `(B, h, w)` over the places of a larger grid `(H, W)`, `(B, H W)`, each over the square of places that
    it stands for."""
    rows, columns = (side // of for side, of in zip(grid, ids.shape[1:], strict=True))
    return ids.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2).flatten(1)


def described_alone(generator: Generator) -> dict[str, Any]:
    """Describe a generator with its frozen parts, so that it can be built without their files."""
    described = dict(generator.hparams)
    parts = {"tokenizer": generator.tokenizer, "text_encoder": generator.text_encoder}
    known = {name: dict(part.hparams) for name, part in parts.items() if part is not None and part.hparams}
    return {**described, "init_args": {**described["init_args"], **known}}


def check_same_texts(model: ClassConditionalTraining, discrete: Generator, *, weights: bool = False) -> None:
    """Refuse a generator of tokens d that reads other vectors of a text than the model that is given d.

    Args:
        model: given d.
        discrete: draws d.
        weights: compare the weights of both text encoders too, which a model that is being loaded does not have yet.

    Raises:
        ValueError: another text encoder, none here, or a text transformer in one of the two.
    """
    if discrete.text_encoder is None:
        return
    transforms = not (discrete.text_transformer is None and model.text_transformer is None)
    own, other = (
        None if encoder is None else encoder.fingerprint() if weights else encoder.hparams
        for encoder in (model.text_encoder, discrete.text_encoder)
    )
    if transforms or own != other:
        raise ValueError(
            f"the generator of d reads texts by another text_encoder than this {type(model).__name__}, or one of them "
            "by a text_transformer; both are given the same vectors"
        )


def told_to(discrete: Generator, condition: Condition) -> Condition | Tensor:
    """Give what a generator of tokens d is told of a condition: labels, and vectors of a text where it reads them."""
    if discrete.text_encoder is None:
        return condition.labels
    told = replace(condition, grid=None)
    if discrete.num_classes > 1:
        return told
    # No text is its null condition.
    return replace(told, labels=torch.where(told.valid().any(dim=1), told.labels, discrete.num_classes))
