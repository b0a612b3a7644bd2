"""The report of an evaluation: what its table is of, in Markdown, and every figure and its record, as JSON.

The table itself is that of `report_table.py`.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import inf, isfinite
from pathlib import Path
from typing import Any

from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.images import ImageSize, size_text
from discrete_lit.evaluation.caption_match import CaptionMatch
from discrete_lit.evaluation.feature_statistics import Reference
from discrete_lit.evaluation.protocols import CROP, QUANTISATION
from discrete_lit.evaluation.report_table import (
    COSTS,
    RECONSTRUCTION_COLUMNS,
    Columns,
    PerturbedDistance,
    Row,
    columns_of,
    markdown_table,
    perturbed_columns,
    perturbed_metric,
    run_name,
)
from discrete_lit.evaluation.seed_spread import CONFIDENCE, Difference, compare_means, pairs_within, spread_of
from discrete_lit.metrics.precision_recall import Manifold

# Of more pairs of rows than these the report lists those within the spread, figure by figure.
_MOST_PAIRS = 6
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
        captions: how many captions of a model are those of their images, by name.
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
        captions: Mapping[str, CaptionMatch] | None = None,
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
        self.captions = dict(captions or {})
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
            "captions": {
                name: {"source": match.source, "count": match.count, "exact": match.fraction}
                for name, match in self.captions.items()
            },
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
        return columns_of(self.metric, list(self.classifiers))

    def _all_columns(self) -> Columns:
        return {**self._columns(), **self._made_columns()}

    def _made_columns(self) -> Columns:
        """Columns of reconstructions alone."""
        return {**perturbed_columns(self.rows), **RECONSTRUCTION_COLUMNS}

    def table(self) -> str:
        """Write the rows as aligned Markdown, without columns that are empty in every row.

        A row of several runs gives means ± standard deviations. The figures of reconstructions stand in a table of
        their own where there are samples too.
        """
        groups = self.grouped()
        if all(row.kind != "samples" for row in self.rows):
            return markdown_table(groups, self._all_columns())
        tables = [markdown_table(groups, self._columns())]
        if made := {name: runs for name, runs in groups.items() if runs[0].reconstruction is not None}:
            tables.append(markdown_table(made, self._made_columns()))
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
        """Say which differences lie within the spread over runs: of each pair of rows, or of each figure if many."""
        columns, groups = self._all_columns(), self.grouped()
        differences = self.differences()
        if len(differences) > _MOST_PAIRS:
            return pairs_within(differences)
        judgements = []
        for first, second, figures in differences:
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
        if rates := perturbed_columns(self.rows):
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
        facts += [
            f"captions, {name}: {match.fraction:.1%} of {match.count:,} are exactly one of their image's own, but for "
            f"spaces and capitals ({match.source})"
            for name, match in self.captions.items()
        ]
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


def _unnamed(by_classifier: Mapping[str, Any]) -> Any:
    """Give what is of the only classifier, which has no name, as it is; of named ones, by their names."""
    return by_classifier.get("") if set(by_classifier) <= {""} else dict(by_classifier)
