"""Rows of an evaluation's report: from what was counted of a set of images to its figures, and what is said of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discrete_lit.evaluation.compared_images import NO_CLASS, Selection
from discrete_lit.evaluation.feature_statistics import Measurement, Reference, reference_manifold
from discrete_lit.evaluation.report_table import Row
from discrete_lit.evaluation.shares import whole_metrics
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.frechet import compare, frechet_distance
from discrete_lit.metrics.moments import Moments
from discrete_lit.metrics.precision_recall import ClassSpread, Manifold, precision_and_recall, within_class_diversity

NEIGHBOURS = 3
"""k of precision and recall, as in ADM's evaluator."""


def manifold_for(reference: Reference, count: int | None, device: torch.device) -> tuple[Manifold | None, str]:
    """Span the reference's manifold for sets of a size; None, and why, where its features are unknown or too few."""
    if reference.features is None:
        return None, "the reference is a file of moments, without features of its images"
    assert count is not None
    if min(count, len(reference.features)) <= NEIGHBOURS:
        return None, f"they need more than k = {NEIGHBOURS} images in every set"
    return reference_manifold(reference, NEIGHBOURS, device=device), ""


def make_row(
    run: tuple[str, Any, str],
    extractor: FeatureExtractor,
    measured: Measurement,
    reference: Reference,
    manifold: Manifold | None,
    *,
    floor: ClassSpread | None,
    spatial: Moments | None = None,
    figures: dict[str, Any],
) -> Row:
    """Compare what was measured of a set with the reference.

    Args:
        run: name of the row, kind of its images, and their path.
        extractor: of the features.
        measured: of the set.
        reference: what it is compared with.
        manifold: of the reference's features, where precision and recall are measured.
        floor: spread of the classes of held-out real images.
        spatial: moments of the reference's spatial features, where sFID and the Inception Score are measured.
        figures: what else is known of the row.

    Raises:
        ValueError: a reference of another extractor.
    """
    name, kind, source = run
    mean_term = float((measured.moments.mean - reference.moments.mean).square().sum())
    found = compare(extractor, measured.moments, reference.moments, reference.name)
    if manifold is not None:
        precision, recall = precision_and_recall(measured.features, manifold)
        figures = figures | {"precision": precision, "recall": recall}
    if spatial is not None:
        figures = figures | {
            "sfid": frechet_distance(measured.scores["spatial"], spatial, names=("the samples", reference.name)),
            "inception_score": float(measured.scores["inception"]["inception_score"]),
        }
    diversity = diversity_by_class = None
    accuracy: dict[str, float | None] = {}
    by_class: dict[str, list[float | None]] = {}
    if measured.spread is not None:
        counts = measured.spread.count
        by_class = {name: _finite(correct / counts) for name, correct in measured.correct.items()}
        accuracy = {name: _finite(correct.sum() / counts.sum()) for name, correct in measured.correct.items()}
    if measured.spread is not None and floor is not None:
        with whole_metrics():
            ratios = within_class_diversity(measured.spread, floor)
        diversity_by_class = _finite(ratios)
        diversity = _finite(ratios.nanmean())
    return Row(
        name=name,
        kind=kind,
        source=source,
        frechet=found,
        mean_term=mean_term,
        label_accuracy=accuracy,
        label_accuracy_by_class=by_class,
        within_class_diversity=diversity,
        within_class_diversity_by_class=diversity_by_class,
        **figures,
    )


def class_notes(name: str, selection: Selection, num_classes: int | None, row: Row) -> list[str]:
    """Say which classes samples show, where they are not as many of each."""
    if selection.images.num_classes is None or num_classes is None:
        return []
    notes = []
    total, without = selection.by_class.total(), selection.by_class[NO_CLASS]
    if without:
        notes.append(
            f"{name}: {without:,} of {total:,} images have the null label and so no class; label accuracy and "
            "within-class diversity leave them out"
        )
    counts = [count for label, count in selection.by_class.items() if label != NO_CLASS and count]
    if counts and len(counts) < num_classes:
        notes.append(
            f"{name} shows {len(counts)} of {num_classes} classes: its distance, precision and recall are not those "
            "of samples of all classes"
        )
    elif counts and max(counts) - min(counts) > 1:
        notes.append(
            f"{name} has {min(counts):,} to {max(counts):,} images of a class: label accuracy is a mean over images, "
            "within-class diversity one over classes"
        )
    compared = [value for value in row.within_class_diversity_by_class or [] if value is not None]
    if compared and len(compared) < num_classes:
        notes.append(
            f"{name}: within-class diversity is a mean over {len(compared)} of {num_classes} classes, those with two "
            "images or more here and real images that differ"
        )
    return notes


def _finite(values: Tensor) -> Any:
    """A number, or a list of them, with None for NaN: where there is nothing to measure."""
    return [_finite(value) for value in values] if values.ndim else float(values) if values.isfinite() else None
