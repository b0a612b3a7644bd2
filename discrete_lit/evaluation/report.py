"""Rows of an evaluation as a JSON file and as a table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from discrete_lit.evaluation.frechet import FrechetResult
from discrete_lit.evaluation.reconstruction import ReconstructionFigures


@dataclass(frozen=True)
class Row:
    """What was measured of one set of images; None where it does not apply."""

    name: str
    kind: Literal["real", "reconstructions", "samples"]
    source: str
    """Path of the images, or of the tokenizer's checkpoint."""
    frechet: FrechetResult
    label_accuracy: float | None = None
    """Share of images whose predicted class is the intended one, in [0, 1]."""
    label_accuracy_by_class: list[float | None] | None = None
    within_class_diversity: float | None = None
    """Mean over classes of `discrete_lit.evaluation.diversity.within_class_diversity`."""
    within_class_diversity_by_class: list[float | None] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """The run.json beside the samples."""
    picture: str | None = None
    reconstruction: ReconstructionFigures | None = None
    """Of a row of reconstructions."""

    @property
    def least_diversity(self) -> float | None:
        """Of the class whose samples differ least."""
        classes = self.within_class_diversity_by_class or []
        return min((value for value in classes if value is not None), default=None)

    def cells(self) -> list[str]:
        """The row of the table, as text."""
        return [
            self.name,
            f"{self.frechet.count:,}",
            _number(self.frechet.value, ".2f"),
            _number(self.label_accuracy, ".1%"),
            _number(self.within_class_diversity, ".2f"),
            _number(self.least_diversity, ".2f"),
            _number(self.sampling.get("network_calls"), ","),
            _number(self.sampling.get("sequential_passes"), ","),
            _number(self.sampling.get("images_per_second"), ",.1f"),
            *self._reconstruction_cells(),
        ]

    def _reconstruction_cells(self) -> list[str]:
        made = self.reconstruction
        ids = None if made is None else made.ids
        return [
            _number(made and made.psnr, ".2f"),
            _number(made and made.ssim, ".3f"),
            _number(made and made.lpips, ".3f"),
            _number(made and made.tokens, ","),
            _number(made and made.vocab_size, ","),
            _number(ids and ids.usage, ".1%"),
            _number(ids and ids.perplexity, ",.1f"),
            _number(made and made.capacity_bits, ",.0f"),
            _number(made and made.entropy_bits, ",.0f"),
            _number(made and made.bits_per_pixel, ".3f"),
        ]


class Report:
    """Rows measured at one count against one reference.

    Args:
        rows: in the order of the table; at least one.
        reference_sha256: of the reference: a hash that changes when its images or moments do.
        image_size: side of the measured images in pixels.
        classifier: checkpoint that judged the labels.
        environment: versions, commit, device and date.
    """

    def __init__(
        self,
        rows: list[Row],
        reference_sha256: str,
        image_size: int,
        classifier: str | None,
        environment: dict[str, Any],
    ) -> None:
        self.rows = rows
        self.reference_sha256 = reference_sha256
        self.image_size = image_size
        self.classifier = classifier
        self.environment = environment

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every figure and what it is of."""
        first = self.rows[0].frechet
        return {
            "metric": first.metric,
            "extractor": {
                "name": first.extractor,
                "weights_sha256": first.weights_sha256,
                "protocol": first.protocol,
            },
            "quantisation": "clamp to [-1, 1], round to 8 bits",
            "reference": {
                "name": first.reference,
                "sha256": self.reference_sha256,
                "count": first.reference_count,
            },
            "num_images": first.count,
            "image_size": self.image_size,
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
                    "label_accuracy": row.label_accuracy,
                    "label_accuracy_by_class": row.label_accuracy_by_class,
                    "within_class_diversity": row.within_class_diversity,
                    "within_class_diversity_by_class": row.within_class_diversity_by_class,
                    "sampling": row.sampling,
                    "picture": row.picture,
                    "reconstruction": None if row.reconstruction is None else row.reconstruction.to_dict(),
                }
                for row in self.rows
            ],
        }

    def notes(self) -> list[str]:
        """What limits the figures, each said once."""
        return list(dict.fromkeys(note for row in self.rows for note in row.frechet.notes))

    def table(self) -> str:
        """The rows as aligned Markdown; columns that are empty in every row are left out."""
        header = [
            "images of",
            "count",
            self.rows[0].frechet.metric,
            "label accuracy",
            "within-class diversity",
            "lowest class",
            "network calls",
            "sequential passes",
            "images/s",
            "PSNR",
            "SSIM",
            "LPIPS",
            "tokens L",
            "ids K",
            "usage",
            "perplexity",
            "L log2 K",
            "L entropy",
            "bits/pixel",
        ]
        columns = list(zip(header, *(row.cells() for row in self.rows), strict=True))
        columns = [column for column in columns if any(column[1:])]
        widths = [max(3, *map(len, column)) for column in columns]
        lines = [_line(cells, widths) for cells in zip(*columns, strict=True)]
        rule = "|".join(["", ":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
        return "\n".join([lines[0], rule, *lines[1:]])

    def markdown(self) -> str:
        """The table and what its figures are."""
        first = self.rows[0].frechet
        size = "an unrecorded number of" if first.reference_count is None else f"{first.reference_count:,}"
        facts = [
            f"{first.metric}: squared Fréchet distance, lower is better; {first.count:,} images a row of "
            f"{self.image_size}x{self.image_size} pixels against {size} images of {first.reference}",
            f"extractor: {first.extractor}, weights sha256 {first.weights_sha256[:16]}; {first.protocol}",
        ]
        if self.classifier is not None:
            facts.append(f"label accuracy: share whose class, as judged by {self.classifier}, is the intended one")
        if any(row.within_class_diversity is not None for row in self.rows):
            facts.append(
                "within-class diversity: mean squared feature distance between two images of a class, as a share of "
                "that of the held-out real images (1 as varied, 0 the same image)"
            )
        if any(row.reconstruction is not None for row in self.rows):
            facts.append(
                "PSNR in decibels and SSIM: means over the images, on 8-bit pixels; L log2 K: bits that the L ids of "
                "an image can carry, bits/pixel: the same over its pixels; L entropy: bits by the measured entropy of "
                "the ids over all images and positions (plug-in estimate); perplexity: exp of that entropy in nats"
            )
        facts += [f"{row.name}, of each part of its ids: {_parts(row)}" for row in self.rows if _parts(row)]
        pictures = [f"{row.name}: {row.picture}" for row in self.rows if row.picture]
        lines = [*facts, *(f"note: {note}" for note in self.notes())]
        text = self.table() + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
        if pictures:
            text += "\nPictures:\n\n" + "\n".join(f"- {picture}" for picture in pictures) + "\n"
        return text

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")


def _parts(row: Row) -> str:
    """Usage and perplexity of each codebook, scale or bit, in words."""
    parts = {} if row.reconstruction is None else row.reconstruction.parts
    return "; ".join(
        f"{name} {ids.usage:.1%} of {ids.size:,}, perplexity {ids.perplexity:,.1f}" for name, ids in parts.items()
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"
