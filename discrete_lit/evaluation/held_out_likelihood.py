"""Likelihood of held-out images under a generator, in nats, bits per token and bits per dimension."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, log, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discrete_lit.core.images import from_uint8
from discrete_lit.evaluation.compared_images import NO_CLASS, Selection
from discrete_lit.evaluation.shares import Shares, Tally, measure_in_shares

if TYPE_CHECKING:
    from discrete_lit.generators import Generator

FEW_IMAGES = 30
"""Below this count a standard error is too uncertain for an interval of two of them to be taken at its word."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodFigures:
    """Negative log-likelihood -log p(tokens | label) of images.

    It is that of their tokens, so it is comparable between generators of one tokenizer alone.
    """

    checkpoint: str
    kind: str
    """`exact`, `bound` or `estimate`.

    A bound is one in expectation over the noise that is drawn for it: the expectation of `nats` is at least -log p of
    the model, while one value may lie below by about its standard error.
    """
    nats: float
    """-log p, mean over the images."""
    standard_error: float
    """Standard error of that mean: over the images, and over the noise that a bound or an estimate draws."""
    count: int
    """Images."""
    tokens: int
    """L, ids of one image."""
    dimensions: int | None
    """H·W·C of the images where each id is one colour value of a pixel; None for the codes of other tokenizers, whose
    likelihood is not that of the pixels."""
    tokenizer_fingerprint: str

    @property
    def notes(self) -> list[str]:
        """Limits of the figures, in words."""
        notes = []
        if self.nats == inf:
            notes.append("a held-out image has probability 0 under the generator, so -log p is infinite")
        if self.count < FEW_IMAGES:
            notes.append(f"the standard error of -log p is itself estimated from only {self.count} images")
        return notes

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


class LikelihoodMeter:
    """Encode images by a generator's tokenizer, and gather their likelihoods given their labels.

    Images without a class are given the null label.

    Args:
        generator: on the device of the images, in eval mode.
        checkpoint: the generator's, for messages.
        source: names the images in an error.
    """

    def __init__(self, generator: Generator, checkpoint: str, *, source: str) -> None:
        self.generator, self.checkpoint, self.source = generator, checkpoint, source
        self.values: list[Tensor] = []
        self.kind = ""

    def update(self, images: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Compute the likelihood of a batch, see `Meter`.

        Raises:
            ValueError: a label that the generator has no class for.
        """
        generator = self.generator
        if labels is None:
            labels = torch.full((len(images),), NO_CLASS)
        if int(labels.max()) >= generator.num_classes:
            raise ValueError(
                f"{self.source} has label {int(labels.max())}, {self.checkpoint!r} has {generator.num_classes} classes"
            )
        labels = torch.where(labels == NO_CLASS, generator.num_classes, labels).to(images.device)
        tokens = generator.tokenizer.encode(from_uint8(images))
        found = generator.log_likelihood(tokens, labels, indices=indices.to(images.device))
        self.values.append(found.nats.double().cpu())
        self.kind = found.kind

    def tally(self) -> Tally:
        values = torch.cat(self.values) if self.values else torch.zeros(0, dtype=torch.float64)
        return Tally(rows={"nats": values}, facts={"kind": self.kind} if self.kind else {})

    def restore(self, tally: Tally) -> None:
        self.values = [tally.rows["nats"]] if "nats" in tally.rows else []
        self.kind = tally.facts.get("kind", "")


def measure_likelihood(
    generator: Generator,
    selection: Selection,
    *,
    checkpoint: str,
    batch_size: int,
    device: torch.device | str,
    shares: Shares | None = None,
    identity: Iterable[object] = (),
    description: str = "",
) -> LikelihoodFigures | None:
    """Encode a selection's images by the generator's tokenizer, and average their likelihoods given their labels.

    Args:
        generator: on `device`, in eval mode.
        selection: at least two images.
        checkpoint: the generator's, for the report.
        batch_size: images at once.
        device: where the generator runs.
        shares: which share is this job's; everything by default.
        identity: what names the images and the generator, for shares that are kept.
        description: of the progress bar.

    Returns:
        The figures, on every rank; None where this job measured one part alone.

    Raises:
        ValueError: a label that the generator has no class for, or what `measure_in_shares` raises.
    """
    # Its import takes seconds, which `discrete-lit evaluate --help` does not have to wait for.
    from discrete_lit.tokenizers import PixelLevels

    meter = LikelihoodMeter(generator, checkpoint, source=repr(str(selection.images.path)))
    whole = measure_in_shares(
        selection,
        meter,
        batch_size=batch_size,
        device=device,
        shares=shares,
        identity=("likelihood", *identity),
        description=description,
    )
    if not whole:
        return None
    nats = -torch.cat(meter.values)
    return LikelihoodFigures(
        checkpoint=checkpoint,
        kind=meter.kind,
        nats=float(nats.mean()),
        standard_error=float(nats.std() / len(nats) ** 0.5),
        count=len(nats),
        tokens=prod(generator.token_shape),
        dimensions=prod(generator.token_shape) if isinstance(generator.tokenizer, PixelLevels) else None,
        tokenizer_fingerprint=generator.tokenizer.fingerprint(),
    )
