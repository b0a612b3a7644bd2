"""The report of an evaluation: its rows as a table in Markdown and, with all that they say of themselves, as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import combinations
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.images import ImageSize, size_text
from discrete_lit.evaluation.feature_statistics import Reference
from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
from discrete_lit.evaluation.protocols import CROP, QUANTISATION
from discrete_lit.evaluation.seed_spread import CONFIDENCE, Difference, compare_means, spread_of
from discrete_lit.metrics.frechet import FrechetResult
from discrete_lit.metrics.precision_recall import Manifold
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


def _columns(metric: str, classifiers: Sequence[str]) -> Columns:
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


def _perturbed_columns(rows: Sequence[Row]) -> Columns:
    def value(row: Row, rate: float) -> float | None:
        return next((found.value for found in row.perturbed if found.rate == rate), None)

    names = {perturbed_metric(row.frechet.metric, found.rate): found.rate for row in rows for found in row.perturbed}
    return {name: Column(partial(value, rate=rate), ".2f", compared=True) for name, rate in names.items()}


def _made(number: Callable[[ReconstructionFigures], float | None], form: str, compared: bool = False) -> Column:
    return Column(
        lambda row: None if row.reconstruction is None else number(row.reconstruction), form, compared=compared
    )


_RECONSTRUCTION_COLUMNS: Columns = {
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
        rows: in the order of the table, at least one; several of one name are the runs of one row of it.
        reference: what they were measured against.
        manifold: the manifold of its features, where they are known.
        image_size: of the measured images in pixels.
        classifiers: name to checkpoint of each classifier that label accuracy is by; "" names the only one.
        image_channels: of the measured images.
        apply_exif: whether image files were turned as their EXIF orientation says.
        protocol: name of the protocol that the inputs met; it stands over the distance's column.
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
        classifiers: Mapping[str, str] | None = None,
        image_channels: int = 3,
        apply_exif: bool = False,
        protocol: str | None = None,
        notes: Sequence[str] = (),
        environment: dict[str, Any],
    ) -> None:
        self.rows = rows
        self.protocol = protocol
        self.metric = protocol or rows[0].frechet.metric
        self.reference = reference
        self.manifold = manifold
        self.image_size = image_size
        self.image_channels = image_channels
        self.classifiers = dict(classifiers or {})
        self.apply_exif = apply_exif
        self.further_notes = tuple(notes)
        self.environment = environment

    def to_dict(self) -> dict[str, Any]:
        """Give every figure, and what it is of, as data that JSON holds.

        JSON has no number that is not finite: in its place stands None, and a note says where and which.
        """
        first = self.rows[0].frechet
        report = {
            "protocol": self.protocol,
            "metric": self.metric,
            "extractor": {
                "name": first.extractor,
                "weights_sha256": first.weights_sha256,
                "protocol": first.protocol,
            },
            "quantisation": QUANTISATION,
            "crop": CROP,
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
            "classifier": _unnamed(self.classifiers),
            "notes": self.notes(),
            "environment": self.environment,
            "rows": [
                {
                    "name": row.name,
                    "run": run,
                    "kind": row.kind,
                    "source": row.source,
                    "count": row.frechet.count,
                    self.metric: row.frechet.value,
                    "sfid": row.sfid,
                    "inception_score": row.inception_score,
                    "precision": row.precision,
                    "recall": row.recall,
                    "label_accuracy": _unnamed(row.label_accuracy),
                    "label_accuracy_by_class": _unnamed(row.label_accuracy_by_class),
                    "within_class_diversity": row.within_class_diversity,
                    "within_class_diversity_by_class": row.within_class_diversity_by_class,
                    "sampling": row.sampling,
                    "picture": row.picture,
                    "reconstruction": None if row.reconstruction is None else row.reconstruction.to_dict(),
                    "likelihood": None if row.likelihood is None else row.likelihood.to_dict(),
                    "record": self.record(row),
                    "perturbed": [
                        {**found.perturbation, "value": found.value, "record": self.perturbed_record(row, found)}
                        for found in row.perturbed
                    ],
                }
                for runs in self.grouped().values()
                for run, row in enumerate(runs, start=1)
            ],
            "spread": {
                name: {
                    header: spread.to_dict()
                    for header, column in self._all_columns().items()
                    if (spread := spread_of([column.value(run) for run in runs])) is not None
                }
                for name, runs in self.grouped().items()
                if len(runs) > 1
            },
            "differences": [
                {
                    "rows": [first, second],
                    "figures": {
                        header: {"difference": found.value, "margin": found.margin, "within_the_spread": found.within}
                        for header, found in figures.items()
                    },
                }
                for first, second, figures in self.differences()
            ],
        }
        replaced: dict[str, float] = {}
        finite = _finite(report, "", replaced)
        finite["notes"] += [
            f"{where} is {value}, which JSON has no number for: it is null" for where, value in replaced.items()
        ]
        return finite

    def record(self, row: Row) -> dict[str, Any]:
        """Give all that the distance of a row depends on: two numbers are comparable where these agree.

        `protocol` to `count` say how it was measured, the others of what.
        """
        found, sampling = row.frechet, row.sampling
        made = row.kind == "reconstructions"
        return {
            "value": found.value,
            "mean_term": row.mean_term,
            "covariance_term": None if row.mean_term is None else found.value - row.mean_term,
            "protocol": self.protocol,
            "metric": self.metric,
            "extractor": found.extractor,
            "extractor_sha256": found.weights_sha256,
            "resize": found.protocol,
            "crop": CROP,
            "quantisation": QUANTISATION,
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "apply_exif": self.apply_exif,
            "reference": found.reference,
            "reference_sha256": self.reference.sha256,
            "reference_count": found.reference_count,
            "count": found.count,
            "labels": row.labels,
            "images_sha256": None if made else row.source_sha256,
            "checkpoint": row.source if made else sampling.get("checkpoint"),
            "checkpoint_sha256": row.source_sha256 if made else sampling.get("checkpoint_sha256"),
            "sampler": sampling.get("sampler"),
            "seed": sampling.get("seed"),
            "sampled_by_commit": sampling.get("commit"),
            "evaluated_by_commit": self.environment.get("commit"),
        }

    def perturbed_record(self, row: Row, found: PerturbedDistance) -> dict[str, Any]:
        """Give all that the distance at a rate of perturbed ids depends on."""
        name = perturbed_metric(row.frechet.metric, found.rate)
        own = {"value": found.value, "mean_term": None, "covariance_term": None, "metric": name}
        return {**self.record(row), **own, "perturbation": found.perturbation}

    def notes(self) -> list[str]:
        """List what limits the figures, each said once."""
        notes = [note for row in self.rows for note in row.frechet.notes]
        notes += self.further_notes
        if len({row.frechet.count for row in self.rows}) > 1:
            notes.append("the rows are of different counts, at which distances are not comparable: see the column")
        for name, row in self._named_runs():
            if row.reconstruction is not None and row.reconstruction.psnr == inf:
                notes.append(f"{name}: a reconstruction equals its image in every pixel, so the mean PSNR is infinite")
            if row.likelihood is not None:
                notes += [f"{name}: {note}" for note in row.likelihood.notes]
        return list(dict.fromkeys(notes))

    def grouped(self) -> dict[str, list[Row]]:
        """Gather the runs of each row of the table, by its name, in the order of the table."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.name, []).append(row)
        return groups

    def _named_runs(self) -> list[tuple[str, Row]]:
        return [
            (run_name(name, run, len(runs)), row)
            for name, runs in self.grouped().items()
            for run, row in enumerate(runs, start=1)
        ]

    def differences(self) -> list[tuple[str, str, dict[str, Difference]]]:
        """Compare the means of every two rows of one kind that have several runs.

        Returns:
            For each pair the two names and, by header, the difference of each figure that both have.
        """
        several = {name: runs for name, runs in self.grouped().items() if len(runs) > 1}
        found = []
        for (first, own), (second, others) in combinations(several.items(), 2):
            if own[0].kind != others[0].kind:
                continue
            figures = {}
            for header, column in self._all_columns().items():
                spreads = [spread_of([column.value(run) for run in runs]) for runs in (own, others)]
                if column.compared and spreads[0] is not None and spreads[1] is not None:
                    difference = compare_means(spreads[0], spreads[1])
                    if difference is not None:
                        figures[header] = difference
            if figures:
                found.append((first, second, figures))
        return found

    def _columns(self) -> Columns:
        return _columns(self.metric, list(self.classifiers))

    def _all_columns(self) -> Columns:
        return {**self._columns(), **self._made_columns()}

    def _made_columns(self) -> Columns:
        """Columns of reconstructions alone."""
        return {**_perturbed_columns(self.rows), **_RECONSTRUCTION_COLUMNS}

    def table(self) -> str:
        """Write the rows as aligned Markdown, without columns that are empty in every row.

        A row of several runs gives means ± standard deviations. The figures of reconstructions stand in a table of
        their own where there are samples too.
        """
        groups = self.grouped()
        if all(row.kind != "samples" for row in self.rows):
            return _table(groups, self._all_columns())
        tables = [_table(groups, self._columns())]
        if made := {name: runs for name, runs in groups.items() if runs[0].reconstruction is not None}:
            tables.append(_table(made, self._made_columns()))
        return "\n\n".join(tables)

    def _spread_facts(self) -> list[str]:
        """Say what the ± of the table is, or that there is none."""
        groups = self.grouped()
        if all(len(runs) == 1 for runs in groups.values()):
            if all(row.kind == "real" for row in self.rows):
                return []
            return [
                "one run of each row: the spread over training seeds is not measured, and a difference between rows "
                "may be no more than that"
            ]
        return [
            "a row of several runs, such as training seeds: mean ± sample standard deviation over them, their number "
            "in the column 'runs'; every value is in report.json; a row of one run says nothing of its spread"
        ]

    def _judgements(self) -> list[str]:
        """Say of each pair of rows, in a sentence, which differences lie within the spread over their runs."""
        columns, groups = self._all_columns(), self.grouped()
        judgements = []
        for first, second, figures in self.differences():
            parts = []
            for words, inside in (("beyond the spread", False), ("within it", True)):
                said = [
                    f"{header} ({columns[header].cell(groups[first])} and {columns[header].cell(groups[second])})"
                    for header, difference in figures.items()
                    if difference.within == inside
                ]
                parts.append(f"{words}: {', '.join(said) or 'none'}")
            judgements.append(f"{first} and {second}: {'; '.join(parts)}")
        return judgements

    def markdown(self) -> str:
        """Write the table and what its figures are."""
        first = self.rows[0].frechet
        named = "" if self.protocol is None else f" ({first.metric})"
        size = "an unrecorded number of" if first.reference_count is None else f"{first.reference_count:,}"
        facts = [
            f"{self.metric}: squared Fréchet distance{named}, lower is better; {first.count:,} images a row of "
            f"{size_text(self.image_size)} pixels{_SHOWN_AS.get(self.image_channels, '')} against {size} images of "
            f"{first.reference}",
            f"extractor: {first.extractor}, weights sha256 {first.weights_sha256[:16]}; {first.protocol}",
        ]
        if any(row.sfid is not None for row in self.rows):
            facts.append(
                "sFID (Nash et al., 2021): over the first 7 channels of mixed_6/conv at 17x17 positions; Inception "
                "Score (Salimans et al., 2016): mean over 10 consecutive splits, not permuted; both as ADM's evaluator "
                "has them"
            )
        if self.manifold is not None:
            facts.append(
                f"precision and recall (Kynkäänniemi et al., 2019): k = {self.manifold.neighbours} nearest neighbours, "
                f"the features of {len(self.manifold.features):,} images of the reference and of all images of a row"
            )
        if self.protocol is not None:
            labels = sorted({row.labels for row in self.rows if row.kind == "samples" and row.labels})
            facts.append(f"protocol {self.protocol}: {CROP}; {QUANTISATION}; labels: {'; '.join(labels) or 'none'}")
        facts[1:1] = self._spread_facts()
        facts += [
            f"label accuracy{f' ({name})' if name else ''}: fraction whose class, according to {path}, is the intended "
            "one"
            for name, path in self.classifiers.items()
        ]
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
        if rates := _perturbed_columns(self.rows):
            neighbours = next(found.neighbours for row in self.rows for found in row.perturbed)
            facts.append(
                f"{', '.join(rates)} (pFID: Qiu et al., 2025): the distance of the reconstructions where each id was "
                f"replaced, with that probability, by one of the {neighbours} ids whose codes are nearest to its own, "
                "all as likely"
            )
        if any(row.likelihood is not None for row in self.rows):
            facts.append(
                "-log p: of the tokens of held-out images given their labels, in nats an image; of one run mean ± its "
                "standard error over the images; exact, or ≤ where its expectation is an upper bound (noise is drawn "
                "for it: one value may lie below, by about its standard error), ≈ where it is estimated; comparable "
                "between generators of one tokenizer alone"
            )
        costs = [text for key, text in COSTS.items() if any(key in row.sampling for row in self.rows)]
        if costs:
            facts.append("; ".join(costs))
        facts += [
            f"{name}, of each component of its ids: {_components(row)}"
            for name, row in self._named_runs()
            if _components(row)
        ]
        pictures = [f"{name}: {row.picture}" for name, row in self._named_runs() if row.picture]
        lines = [*facts, *(f"note: {note}" for note in self.notes())]
        text = self.table() + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
        if judgements := self._judgements():
            text += (
                f"\nDifferences between rows, at {CONFIDENCE:.0%} (Welch's t-test: within the spread where the means "
                "differ by at most t · √(s₁²/n₁ + s₂²/n₂); each a comparison of its own):\n\n"
            )
            text += "\n".join(f"- {judgement}" for judgement in judgements) + "\n"
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


def run_name(name: str, run: int, runs: int) -> str:
    """Name run 1 to `runs` of a row."""
    return name if runs == 1 else f"{name}, run {run}"


def _unnamed(by_classifier: Mapping[str, Any]) -> Any:
    """Give what is of the only classifier, which has no name, as it is; of named ones, by their names."""
    return by_classifier.get("") if set(by_classifier) <= {""} else dict(by_classifier)


def _sign(row: Row) -> str:
    """Write what stands before -log p: a bound on log p makes it an upper bound."""
    return "" if row.likelihood is None else {"exact": "", "bound": "≤ ", "estimate": "≈ "}[row.likelihood.kind]


def _nats(row: Row) -> str:
    found = row.likelihood
    return "" if found is None else f"{_sign(row)}{found.nats:,.1f} ± {found.standard_error:.1f}"


def _table(groups: Mapping[str, Sequence[Row]], columns: Columns) -> str:
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
