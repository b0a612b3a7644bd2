"""The report of an evaluation: its rows as a table in Markdown and, with all that they say of themselves, as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.images import ImageSize, size_text
from discrete_lit.evaluation.feature_statistics import Reference
from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
from discrete_lit.metrics.frechet import FrechetResult
from discrete_lit.metrics.precision_recall import Manifold
from discrete_lit.metrics.reconstruction import ReconstructionFigures


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one set of images; None where one does not apply."""

    name: str
    kind: Literal["real", "reconstructions", "samples"]
    source: str
    """Path of the images, or of the tokenizer's checkpoint."""
    frechet: FrechetResult
    precision: float | None = None
    """Fraction of the images that the reference's manifold covers, in [0, 1]."""
    recall: float | None = None
    """Fraction of the reference's images that the manifold of these covers, in [0, 1]."""
    label_accuracy: float | None = None
    """Fraction of images whose predicted class is the intended one, in [0, 1]."""
    label_accuracy_by_class: list[float | None] | None = None
    within_class_diversity: float | None = None
    """Mean over classes of `discrete_lit.metrics.precision_recall.within_class_diversity`."""
    within_class_diversity_by_class: list[float | None] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """The run.json beside the samples."""
    picture: str | None = None
    reconstruction: ReconstructionFigures | None = None
    """Figures of a row of reconstructions."""
    likelihood: LikelihoodFigures | None = None
    """Likelihood of held-out images under the generator of a row of samples."""

    @property
    def least_diversity(self) -> float | None:
        """The diversity of the class whose samples differ least."""
        classes = self.within_class_diversity_by_class or []
        return min((value for value in classes if value is not None), default=None)


Columns = dict[str, Callable[[Row], str]]
"""The cell of a row under each header; empty where there is nothing to say."""


def _columns(metric: str) -> Columns:
    return {
        "images of": lambda row: row.name,
        "count": lambda row: f"{row.frechet.count:,}",
        metric: lambda row: _number(row.frechet.value, ".2f"),
        "precision": lambda row: _number(row.precision, ".3f"),
        "recall": lambda row: _number(row.recall, ".3f"),
        "label accuracy": lambda row: _number(row.label_accuracy, ".1%"),
        "within-class diversity": lambda row: _number(row.within_class_diversity, ".2f"),
        "lowest class": lambda row: _number(row.least_diversity, ".2f"),
        "-log p (nats)": lambda row: _nats(row.likelihood),
        "bits/token": lambda row: _number(row.likelihood and row.likelihood.bits_per_token, ".2f"),
        "network calls": lambda row: _number(row.sampling.get("network_calls"), ","),
        "sequential passes": lambda row: _number(row.sampling.get("sequential_passes"), ","),
        "GFLOPs/image": lambda row: _number(_giga(row.sampling.get("flops_per_image")), ",.2f"),
        "images/s": lambda row: _number(row.sampling.get("images_per_second"), ",.1f"),
        "images/s of tokens": lambda row: _number(row.sampling.get("images_per_second_without_decoding"), ",.1f"),
    }


def _made(number: Callable[[ReconstructionFigures], float | None], form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.reconstruction is None else _number(number(row.reconstruction), form)


_RECONSTRUCTION_COLUMNS: Columns = {
    "PSNR": _made(lambda made: made.psnr, ".2f"),
    "SSIM": _made(lambda made: made.ssim, ".3f"),
    "LPIPS": _made(lambda made: made.lpips, ".3f"),
    "tokens L": _made(lambda made: made.tokens, ","),
    "ids K": _made(lambda made: made.vocab_size, ","),
    "usage": _made(lambda made: made.ids and made.ids.usage, ".1%"),
    "perplexity": _made(lambda made: made.ids and made.ids.perplexity, ",.1f"),
    "L log2 K": _made(lambda made: made.capacity_bits, ",.0f"),
    "L entropy": _made(lambda made: made.entropy_bits, ",.0f"),
    "bits/pixel": _made(lambda made: made.bits_per_pixel, ".3f"),
}
COSTS = {
    "network_calls": "network calls: evaluations of the network for an image, two for a guided step",
    "sequential_passes": "sequential passes: those that wait for one another",
    "flops_per_image": "GFLOPs/image: of the draw, without decoding, two for a multiply-add",
    "images_per_second": "images/s: with decoding to pixels",
    "images_per_second_without_decoding": "images/s of tokens: the draw without decoding",
}
"""The keys of `run.json` that tell the cost of samples, and their meaning in words."""


# How the extractor, which saw colour images alone, is shown images of other channels.
_SHOWN_AS = {1: ", grey, repeated to three channels,", 4: ", RGBA, laid over white,"}


class Report:
    """Report rows that were measured at one count against one reference.

    Args:
        rows: in the order of the table; at least one.
        reference: what they were measured against.
        manifold: the manifold of its features, where they are known.
        image_size: of the measured images in pixels.
        classifier: checkpoint of the classifier that label accuracy is by.
        image_channels: of the measured images.
        apply_exif: whether image files were turned as their EXIF orientation says.
        notes: what else limits the figures, in words.
        environment: versions, commit, device and date.
    """

    def __init__(
        self,
        rows: list[Row],
        reference: Reference,
        *,
        manifold: Manifold | None,
        image_size: ImageSize,
        classifier: str | None,
        image_channels: int = 3,
        apply_exif: bool = False,
        notes: Sequence[str] = (),
        environment: dict[str, Any],
    ) -> None:
        self.rows = rows
        self.reference = reference
        self.manifold = manifold
        self.image_size = image_size
        self.image_channels = image_channels
        self.classifier = classifier
        self.apply_exif = apply_exif
        self.further_notes = tuple(notes)
        self.environment = environment

    def to_dict(self) -> dict[str, Any]:
        """Give every figure, and what it is of, as data that JSON holds.

        JSON has no number that is not finite: in its place stands None, and a note says where and which.
        """
        first = self.rows[0].frechet
        report = {
            "metric": first.metric,
            "extractor": {
                "name": first.extractor,
                "weights_sha256": first.weights_sha256,
                "protocol": first.protocol,
            },
            "quantisation": "clamp to [-1, 1], round to 8 bits",
            "reference": {
                "name": first.reference,
                "sha256": self.reference.sha256,
                "count": first.reference_count,
                "manifold_features": None if self.manifold is None else len(self.manifold.features),
                "manifold_neighbours": None if self.manifold is None else self.manifold.neighbours,
            },
            "num_images": first.count,
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "apply_exif": self.apply_exif,
            "classifier": self.classifier,
            "notes": self.notes(),
            "environment": self.environment,
            "rows": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "source": row.source,
                    "count": row.frechet.count,
                    first.metric: row.frechet.value,
                    "precision": row.precision,
                    "recall": row.recall,
                    "label_accuracy": row.label_accuracy,
                    "label_accuracy_by_class": row.label_accuracy_by_class,
                    "within_class_diversity": row.within_class_diversity,
                    "within_class_diversity_by_class": row.within_class_diversity_by_class,
                    "sampling": row.sampling,
                    "picture": row.picture,
                    "reconstruction": None if row.reconstruction is None else row.reconstruction.to_dict(),
                    "likelihood": None if row.likelihood is None else row.likelihood.to_dict(),
                }
                for row in self.rows
            ],
        }
        replaced: dict[str, float] = {}
        finite = _finite(report, "", replaced)
        finite["notes"] += [
            f"{where} is {value}, which JSON has no number for: it is null" for where, value in replaced.items()
        ]
        return finite

    def notes(self) -> list[str]:
        """List what limits the figures, each said once."""
        notes = [note for row in self.rows for note in row.frechet.notes]
        notes += self.further_notes
        if len({row.frechet.count for row in self.rows}) > 1:
            notes.append("the rows are of different counts, at which distances are not comparable: see the column")
        for row in self.rows:
            if row.reconstruction is not None and row.reconstruction.psnr == inf:
                notes.append(
                    f"{row.name}: a reconstruction equals its image in every pixel, so the mean PSNR is infinite"
                )
            if row.likelihood is not None:
                notes += [f"{row.name}: {note}" for note in row.likelihood.notes]
        return list(dict.fromkeys(notes))

    def table(self) -> str:
        """Write the rows as aligned Markdown, without columns that are empty in every row.

        The figures of reconstructions stand in a table of their own where there are samples too.
        """
        columns = _columns(self.rows[0].frechet.metric)
        if all(row.kind != "samples" for row in self.rows):
            return _table(self.rows, {**columns, **_RECONSTRUCTION_COLUMNS})
        tables = [_table(self.rows, columns)]
        if reconstructions := [row for row in self.rows if row.reconstruction is not None]:
            tables.append(_table(reconstructions, {"images of": columns["images of"], **_RECONSTRUCTION_COLUMNS}))
        return "\n\n".join(tables)

    def markdown(self) -> str:
        """Write the table and what its figures are."""
        first = self.rows[0].frechet
        size = "an unrecorded number of" if first.reference_count is None else f"{first.reference_count:,}"
        facts = [
            f"{first.metric}: squared Fréchet distance, lower is better; {first.count:,} images a row of "
            f"{size_text(self.image_size)} pixels{_SHOWN_AS.get(self.image_channels, '')} against {size} images of "
            f"{first.reference}",
            f"extractor: {first.extractor}, weights sha256 {first.weights_sha256[:16]}; {first.protocol}",
        ]
        if self.manifold is not None:
            facts.append(
                f"precision and recall (Kynkäänniemi et al., 2019): k = {self.manifold.neighbours} nearest neighbours, "
                f"the features of {len(self.manifold.features):,} images of the reference and of all images of a row"
            )
        if self.classifier is not None:
            facts.append(f"label accuracy: fraction whose class, according to {self.classifier}, is the intended one")
        if any(row.within_class_diversity is not None for row in self.rows):
            facts.append(
                "within-class diversity: mean squared feature distance between two images of a class, as a ratio to "
                "that of the held-out real images (1 as varied, 0 the same image)"
            )
        if any(row.reconstruction is not None for row in self.rows):
            facts.append(
                "PSNR in decibels and SSIM: means over the images, on 8-bit pixels; L log2 K: bits that the L ids of "
                "an image can carry, bits/pixel: the same over its pixels; L entropy: bits by the measured entropy of "
                "the ids over all images and positions (plug-in estimate); perplexity: exp of that entropy in nats"
            )
        if any(row.likelihood is not None for row in self.rows):
            facts.append(
                "-log p: of the tokens of held-out images given their labels, in nats an image, mean and its standard "
                "error; exact, or ≤ where its expectation is an upper bound (noise is drawn for it: one value may lie "
                "below, by about its standard error), ≈ where it is estimated; comparable between generators of one "
                "tokenizer alone"
            )
        costs = [text for key, text in COSTS.items() if any(key in row.sampling for row in self.rows)]
        if costs:
            facts.append("; ".join(costs))
        facts += [
            f"{row.name}, of each component of its ids: {_components(row)}" for row in self.rows if _components(row)
        ]
        pictures = [f"{row.name}: {row.picture}" for row in self.rows if row.picture]
        lines = [*facts, *(f"note: {note}" for note in self.notes())]
        text = self.table() + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
        if pictures:
            text += "\nPictures:\n\n" + "\n".join(f"- {picture}" for picture in pictures) + "\n"
        return text

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        atomic_write_text(folder / "report.json", text)
        atomic_write_text(folder / "report.md", self.markdown())


def _finite(value: Any, where: str, replaced: dict[str, float]) -> Any:
    """Put None for numbers that are not finite, and note where each stood."""
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}" if where else key, replaced) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}[{index}]", replaced) for index, item in enumerate(value)]
    if isinstance(value, float) and not isfinite(value):
        replaced[where] = value
        return None
    return value


def _components(row: Row) -> str:
    """Usage and perplexity of each codebook, scale or bit, in words."""
    components = {} if row.reconstruction is None else row.reconstruction.parts
    return "; ".join(
        f"{name} {ids.usage:.1%} of {ids.size:,}, perplexity {ids.perplexity:,.1f}" for name, ids in components.items()
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _nats(likelihood: LikelihoodFigures | None) -> str:
    """Write -log p with its kind: a bound on log p makes it an upper bound."""
    if likelihood is None:
        return ""
    sign = {"exact": "", "bound": "≤ ", "estimate": "≈ "}[likelihood.kind]
    return f"{sign}{likelihood.nats:,.1f} ± {likelihood.standard_error:.1f}"


def _table(rows: list[Row], columns: Columns) -> str:
    cells = [(header, *(cell(row) for row in rows)) for header, cell in columns.items()]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(3, *map(len, column)) for column in cells]
    lines = [_line(line, widths) for line in zip(*cells, strict=True)]
    rule = "|".join(["", ":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"
