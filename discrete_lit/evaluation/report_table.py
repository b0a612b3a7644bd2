"""The table of a report: its rows, its columns, and how a figure of one run or of several is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal

from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
from discrete_lit.evaluation.seed_spread import spread_of
from discrete_lit.metrics.frechet import FrechetResult
from discrete_lit.metrics.reconstruction import ReconstructionFigures


@dataclass(frozen=True, kw_only=True)
class PerturbedDistance:
    """The distance of reconstructions from ids of which some were replaced by near ones (pFID; Qiu et al., 2025)."""

    rate: float
    """The probability that an id is replaced, in [0, 1]."""
    neighbours: int
    """How many near ids it may become."""
    seed: int
    """Seed of the choices."""
    value: float

    @property
    def perturbation(self) -> dict[str, float]:
        """Rate, neighbours and seed, for records."""
        return {"rate": self.rate, "neighbours": self.neighbours, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one set of images; None where one does not apply.

    Sets of one name are the runs of one row of the table, such as training seeds.
    """

    name: str
    kind: Literal["real", "reconstructions", "samples"]
    source: str
    """Path of the images, or of the tokenizer's checkpoint."""
    frechet: FrechetResult
    mean_term: float | None = None
    """The part of the distance that is between the means; the rest is between the covariances."""
    source_sha256: str | None = None
    """The hash of the images themselves, or of the checkpoint's file."""
    labels: str | None = None
    """How the labels of the images are distributed, in words."""
    sfid: float | None = None
    """The distance over spatial features."""
    inception_score: float | None = None
    precision: float | None = None
    """Fraction of the images that the reference's manifold covers, in [0, 1]."""
    recall: float | None = None
    """Fraction of the reference's images that the manifold of these covers, in [0, 1]."""
    label_accuracy: Mapping[str, float | None] = field(default_factory=dict)
    """By the name of each classifier the fraction of images whose predicted class is the intended one, in [0, 1]; a
    classifier that is the only one has the name ""."""
    label_accuracy_by_class: Mapping[str, list[float | None]] = field(default_factory=dict)
    within_class_diversity: float | None = None
    """Mean over classes of `discrete_lit.metrics.precision_recall.within_class_diversity`."""
    within_class_diversity_by_class: list[float | None] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """The run.json beside the samples."""
    picture: str | None = None
    reconstruction: ReconstructionFigures | None = None
    """Figures of a row of reconstructions."""
    perturbed: tuple[PerturbedDistance, ...] = ()
    """The distance of these at each rate of perturbed ids."""
    likelihood: LikelihoodFigures | None = None
    """Likelihood of held-out images under the generator of a row of samples."""

    @property
    def least_diversity(self) -> float | None:
        """The diversity of the class whose samples differ least."""
        classes = self.within_class_diversity_by_class or []
        return min((value for value in classes if value is not None), default=None)


@dataclass(frozen=True)
class Column:
    """One figure of the table: from a row to a number, and how it is written."""

    value: Callable[[Row], float | None]
    form: str
    """A format specification."""
    _: KW_ONLY
    text: Callable[[Row], str] | None = None
    """Writes a row of one run, where that is more than the number."""
    sign: Callable[[Row], str] = lambda row: ""
    """Writes what stands before the mean over several runs."""
    compared: bool = False
    """Whether the differences between rows are judged by it."""

    def cell(self, runs: Sequence[Row]) -> str:
        """Write the figure of one run, or its mean ± standard deviation over several; empty where there is none."""
        if len(runs) == 1 and self.text is not None:
            return self.text(runs[0])
        spread = spread_of([self.value(run) for run in runs])
        if spread is None:
            return ""
        mean, deviation = format(spread.mean, self.form), spread.standard_deviation
        if len(runs) > 1:
            mean = self.sign(runs[0]) + mean
        # A setting, such as the network calls, is the same in every run: it has no spread to speak of.
        return f"{mean} ± {format(deviation, self.form)}" if deviation else mean


Columns = dict[str, Column]
"""The figure under each header."""


def columns_of(metric: str, classifiers: Sequence[str]) -> Columns:
    """List the columns of any images.

    Args:
        metric: header of the distance.
        classifiers: names of those that label accuracy is by.
    """
    accuracies = {
        f"label accuracy ({name})" if name else "label accuracy": Column(
            lambda row, name=name: row.label_accuracy.get(name), ".1%", compared=True
        )
        for name in classifiers
    }
    return {
        "count": Column(lambda row: row.frechet.count, ",.0f"),
        metric: Column(lambda row: row.frechet.value, ".2f", compared=True),
        "sFID": Column(lambda row: row.sfid, ".2f", compared=True),
        "Inception Score": Column(lambda row: row.inception_score, ".2f", compared=True),
        "precision": Column(lambda row: row.precision, ".3f", compared=True),
        "recall": Column(lambda row: row.recall, ".3f", compared=True),
        **accuracies,
        "within-class diversity": Column(lambda row: row.within_class_diversity, ".2f", compared=True),
        "lowest class": Column(lambda row: row.least_diversity, ".2f"),
        "-log p (nats)": Column(lambda row: row.likelihood and row.likelihood.nats, ",.1f", text=_nats, sign=_sign),
        "bits/token": Column(lambda row: row.likelihood and row.likelihood.bits_per_token, ".2f"),
        "network calls": _cost("network_calls", ",.0f"),
        "sequential passes": _cost("sequential_passes", ",.0f"),
        "GFLOPs/image": _cost("flops_per_image", ",.2f", unit=1e9),
        "images/s": _cost("images_per_second", ",.1f"),
        "images/s of tokens": _cost("images_per_second_without_decoding", ",.1f"),
    }


def _cost(key: str, form: str, unit: float = 1) -> Column:
    def value(row: Row) -> float | None:
        known = row.sampling.get(key)
        return None if known is None else known / unit

    return Column(value, form)


def perturbed_metric(metric: str, rate: float) -> str:
    """Name the distance at a rate of perturbed ids: `pFID 0.1`, `pFD-EffNetLite0 0.1`."""
    return f"p{metric} {rate:g}"


def perturbed_columns(rows: Sequence[Row]) -> Columns:
    """List the columns of the distance at each rate of perturbed ids that some rows have."""

    def value(row: Row, rate: float) -> float | None:
        return next((found.value for found in row.perturbed if found.rate == rate), None)

    names = {perturbed_metric(row.frechet.metric, found.rate): found.rate for row in rows for found in row.perturbed}
    return {name: Column(partial(value, rate=rate), ".2f", compared=True) for name, rate in names.items()}


def _made(number: Callable[[ReconstructionFigures], float | None], form: str, compared: bool = False) -> Column:
    return Column(
        lambda row: None if row.reconstruction is None else number(row.reconstruction), form, compared=compared
    )


RECONSTRUCTION_COLUMNS: Columns = {
    "PSNR": _made(lambda made: made.psnr, ".2f", compared=True),
    "SSIM": _made(lambda made: made.ssim, ".3f", compared=True),
    "LPIPS": _made(lambda made: made.lpips, ".3f", compared=True),
    "tokens L": _made(lambda made: made.tokens, ",.0f"),
    "ids K": _made(lambda made: made.vocab_size, ",.0f"),
    "usage": _made(lambda made: made.ids and made.ids.usage, ".1%"),
    "perplexity": _made(lambda made: made.ids and made.ids.perplexity, ",.1f"),
    "L log2 K": _made(lambda made: made.capacity_bits, ",.0f"),
    "L entropy": _made(lambda made: made.entropy_bits, ",.0f"),
    "bits/pixel": _made(lambda made: made.bits_per_pixel, ".3f"),
}
"""The columns of reconstructions alone."""

COSTS = {
    "network_calls": "network calls: evaluations of the network for an image, two for a guided step",
    "sequential_passes": "sequential passes: those that wait for one another",
    "flops_per_image": "GFLOPs/image: of the draw, without decoding, two for a multiply-add",
    "images_per_second": "images/s: with decoding to pixels",
    "images_per_second_without_decoding": "images/s of tokens: the draw without decoding",
}
"""The keys of `run.json` that tell the cost of samples, and their meaning in words."""


def run_name(name: str, run: int, runs: int) -> str:
    """Name run 1 to `runs` of a row."""
    return name if runs == 1 else f"{name}, run {run}"


def _sign(row: Row) -> str:
    """Write what stands before -log p: a bound on log p makes it an upper bound."""
    return "" if row.likelihood is None else {"exact": "", "bound": "≤ ", "estimate": "≈ "}[row.likelihood.kind]


def _nats(row: Row) -> str:
    found = row.likelihood
    return "" if found is None else f"{_sign(row)}{found.nats:,.1f} ± {found.standard_error:.1f}"


def markdown_table(groups: Mapping[str, Sequence[Row]], columns: Columns) -> str:
    """Write aligned Markdown, without columns that are empty in every row.

    Args:
        groups: the runs of each row, by its name.
        columns: in their order.
    """
    cells = [("images of", *groups)]
    if any(len(runs) > 1 for runs in groups.values()):
        cells.append(("runs", *(str(len(runs)) for runs in groups.values())))
    cells += [(header, *map(column.cell, groups.values())) for header, column in columns.items()]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(3, *map(len, column)) for column in cells]
    lines = [_line(line, widths) for line in zip(*cells, strict=True)]
    rule = "|".join(["", ":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"
