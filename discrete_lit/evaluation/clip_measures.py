"""Measures of sets of clips beside real ones, and their table: for `discrete-lit evaluate_video`.

A set is one of four kinds. *Real* clips that the reference does not hold are the floor of the distances.
*Reconstructions* of them by a tokenizer, and *continuations* of their first frames, are compared with them frame by
frame. *Samples* have nothing to be compared with, but for the distances and the class that they show.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from discrete_lit.core.images import frames_of, from_uint8
from discrete_lit.evaluation.classifier import ImageClassifier
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.frechet import FrechetResult, compare
from discrete_lit.metrics.moments import FeatureMoments, Moments
from discrete_lit.metrics.video import VideoFidelity, VideoFigures

ClipKind = Literal["real", "reconstructions", "continuations", "samples"]


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """The figures of one set."""

    name: str
    kind: ClipKind
    count: int
    distances: list[FrechetResult] = field(default_factory=list)
    fidelity: VideoFigures | None = None
    """Beside the real clips, of reconstructions and continuations."""
    usage: float | None = None
    """The fraction of the ids that occur in the tokens of the real clips, of reconstructions."""
    perplexity: float | None = None
    accuracy: float | None = None
    """The fraction whose class the classifier finds; None without one, or without labels."""

    def to_dict(self) -> dict[str, Any]:
        fidelity = None if self.fidelity is None else self.fidelity._asdict()
        return {**asdict(self), "fidelity": fidelity}


class ClipFeatureSource(FeatureSource, Protocol):
    """Gives features of clips, and says what they are: `ClipFeatures` or `I3D`."""

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features `(B, dim)` of uint8 clips `(B, C, T, H, W)`."""
        ...


@dataclass(frozen=True)
class ClipInstruments:
    """The extractors, references and judges that measure sets of clips.

    Args:
        extractors: of features of clips.
        references: the moments of the reference by each of them.
        reference_name: what the reference is.
        frames: T.
        classifier: of single frames, on the device; a clip has the class of the largest mean log-probability.
        lpips: from reconstructions and images `(B, C, H, W)` in [-1, 1] to their mean distance.
        device: that everything is on.
    """

    extractors: Sequence[ClipFeatureSource]
    _: KW_ONLY
    references: Sequence[Moments]
    reference_name: str
    frames: int
    classifier: ImageClassifier | None
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    device: torch.device


class ClipMeter:
    """Measure one set of clips, batch by batch.

    Args:
        instruments: what it is measured by.
        name: of the set.
        kind: of the set.
        vocab_size: K of the tokenizer of reconstructions.
    """

    def __init__(
        self, instruments: ClipInstruments, name: str, *, kind: ClipKind, vocab_size: int | None = None
    ) -> None:
        self.instruments, self.name = instruments, name
        self.kind: ClipKind = kind
        self.moments = [FeatureMoments(extractor) for extractor in instruments.extractors]
        self.fidelity = None
        if kind in ("reconstructions", "continuations"):
            self.fidelity = VideoFidelity(instruments.frames, instruments.lpips)
        self.usage = None if vocab_size is None else CodebookUsage(vocab_size)
        self.count = self.labelled = self.right = 0

    @torch.no_grad()
    def update(
        self,
        clips: Tensor,
        labels: Tensor | None,
        *,
        originals: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Add uint8 clips `(B, C, T, H, W)` with their labels `(B,)`, originals and ids."""
        device = self.instruments.device
        clips = clips.to(device)
        for extractor, moments in zip(self.instruments.extractors, self.moments, strict=True):
            moments.update(extractor(clips))
        if self.fidelity is not None:
            assert originals is not None
            self.fidelity.update(clips, originals.to(device))
        if self.usage is not None and tokens is not None:
            self.usage.update(tokens.cpu())
        classifier = self.instruments.classifier
        if classifier is not None and labels is not None:
            found = classes_of(classifier, clips)
            self.right += int((found == labels.to(device)).sum())
            self.labelled += int((labels < classifier.num_classes).sum())  # the null label is none
        self.count += len(clips)

    def row(self) -> ClipRow:
        """Give the figures; of one clip at least."""
        made = self.instruments
        usage, perplexity = (None, None) if self.usage is None else map(float, self.usage.compute())
        return ClipRow(
            name=self.name,
            kind=self.kind,
            count=self.count,
            distances=[
                compare(extractor, moments.compute(), reference, made.reference_name)
                for extractor, moments, reference in zip(made.extractors, self.moments, made.references, strict=True)
            ],
            fidelity=None if self.fidelity is None else self.fidelity.compute(),
            usage=usage,
            perplexity=perplexity,
            accuracy=self.right / self.labelled if self.labelled else None,
        )


@torch.no_grad()
def classes_of(classifier: ImageClassifier, clips: Tensor) -> Tensor:
    """Find the classes `(B,)` of uint8 clips by a classifier of images: the mean log-probability of their frames."""
    logits = classifier(from_uint8(frames_of(clips)))
    return logits.log_softmax(dim=1).view(len(clips), clips.shape[2], -1).mean(dim=1).argmax(dim=1)


def markdown(rows: Sequence[ClipRow], *, reference_name: str, reference_count: int) -> str:
    """Lay out the figures as a table, and PSNR by frame as another."""
    metrics = [result.metric for result in rows[0].distances]
    columns = ["set", "clips", *metrics, "accuracy", "PSNR", "SSIM", "LPIPS", "temporal difference", "usage"]
    lines = [_line(columns), _line(["---"] + ["--:"] * (len(columns) - 1))]
    for row in rows:
        made = row.fidelity
        lines.append(
            _line(
                [
                    row.name,
                    f"{row.count:,}",
                    *(f"{result.value:.2f}" for result in row.distances),
                    _said(row.accuracy, ".1%"),
                    _said(made and made.psnr, ".2f"),
                    _said(made and made.ssim, ".3f"),
                    _said(made and made.lpips, ".3f"),
                    _said(made and made.temporal_difference, ".4f"),
                    _said(row.usage, ".1%"),
                ]
            )
        )
    lines += ["", f"Distances to {reference_count:,} clips of {reference_name}.", ""]
    compared = [row for row in rows if row.fidelity is not None]
    if compared:
        first = compared[0].fidelity
        assert first is not None
        frames = range(len(first.psnr_by_frame))
        lines += [_line(["PSNR of frame", *map(str, frames)]), _line(["---"] + ["--:"] * len(frames))]
        for row in compared:
            assert row.fidelity is not None
            lines.append(_line([row.name, *(f"{psnr:.1f}" for psnr in row.fidelity.psnr_by_frame)]))
        if first.lpips_by_frame is not None:
            lines += ["", _line(["LPIPS of frame", *map(str, frames)]), _line(["---"] + ["--:"] * len(frames))]
            for row in compared:
                assert row.fidelity is not None and row.fidelity.lpips_by_frame is not None
                lines.append(_line([row.name, *(f"{each:.3f}" for each in row.fidelity.lpips_by_frame)]))
        lines.append("")
    return "\n".join(
        [*lines, *dict.fromkeys(note for row in rows for result in row.distances for note in result.notes)]
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _said(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
