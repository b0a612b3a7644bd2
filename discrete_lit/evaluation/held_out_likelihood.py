"""Likelihood of held-out images under a generator, in nats, bits per token and bits per dimension."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log, prod
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from discrete_lit.core.images import from_uint8
from discrete_lit.evaluation.image_sets import Selection

if TYPE_CHECKING:
    from discrete_lit.generators import Generator


@dataclass(frozen=True, kw_only=True)
class LikelihoodFigures:
    """Negative log-likelihood -log p(tokens | label) of images.

    It is that of their tokens, so it is comparable between generators of one tokenizer alone.
    """

    checkpoint: str
    kind: str
    """`exact`, `bound` (drawn or exact, a value that in expectation is at least the model's) or `estimate`."""
    nats: float
    """-log p, mean over the images."""
    standard_error: float
    """Standard error of that mean."""
    count: int
    """Images."""
    tokens: int
    """L, ids of one image."""
    dimensions: int | None
    """H·W·C of the images where each id is one colour value of a pixel; None for the codes of other tokenizers, whose
    likelihood is not that of the pixels."""
    tokenizer_fingerprint: str

    @property
    def bits_per_token(self) -> float:
        return self.nats / log(2) / self.tokens

    @property
    def bits_per_dimension(self) -> float | None:
        """Bits for each colour value of a pixel; None where the ids are codes."""
        return None if self.dimensions is None else self.nats / log(2) / self.dimensions

    def to_dict(self) -> dict[str, Any]:
        """Give every figure as plain data."""
        bits = {"bits_per_token": self.bits_per_token, "bits_per_dimension": self.bits_per_dimension}
        return {**asdict(self), **bits}


def measure_likelihood(
    generator: Generator,
    selection: Selection,
    *,
    checkpoint: str,
    batch_size: int,
    device: torch.device | str,
    description: str = "",
) -> LikelihoodFigures:
    """Encode a selection's images by the generator's tokenizer, and average their likelihoods given their labels.

    Images without labels are given the null label.

    Args:
        generator: on `device`, in eval mode.
        selection: at least two images.
        checkpoint: the generator's, for the report.
        batch_size: images at once.
        device: where the generator runs.
        description: of the progress bar.

    Raises:
        ValueError: a label that the generator has no class for, or what `Selection.batches` raises.
    """
    # Its import takes seconds, which `discrete-lit evaluate --help` does not have to wait for.
    from discrete_lit.tokenizers import PixelLevels

    values: list[torch.Tensor] = []
    kind, done = "", 0
    with torch.inference_mode(), tqdm(total=selection.count, desc=description, unit="image", disable=None) as progress:
        for images, labels in selection.batches(batch_size):
            if labels is None:
                labels = torch.full((len(images),), generator.num_classes)
            elif int(labels.max()) >= generator.num_classes:
                raise ValueError(
                    f"{str(selection.images.path)!r} has label {int(labels.max())}, "
                    f"{checkpoint!r} has {generator.num_classes} classes"
                )
            tokens = generator.tokenizer.encode(from_uint8(images.to(device)))
            indices = torch.arange(done, done + len(images), device=device)
            found = generator.log_likelihood(tokens, labels.to(device), indices=indices)
            values.append(found.nats.double().cpu())
            kind, done = found.kind, done + len(images)
            progress.update(len(images))
    nats = -torch.cat(values)
    return LikelihoodFigures(
        checkpoint=checkpoint,
        kind=kind,
        nats=float(nats.mean()),
        standard_error=float(nats.std() / len(nats) ** 0.5),
        count=len(nats),
        tokens=prod(generator.token_shape),
        dimensions=prod(generator.token_shape) if isinstance(generator.tokenizer, PixelLevels) else None,
        tokenizer_fingerprint=generator.tokenizer.fingerprint(),
    )
