"""`discrete-lit evaluate`: sets of images against a reference, to a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.provenance import environment
from discrete_lit.data.transforms import MODES
from discrete_lit.evaluation.image_sets import NO_CLASS, ImageSet, Selection, match_classes, open_image_set
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor

# The other imports stand in the functions: torchmetrics and Lightning take seconds, which
# `discrete-lit evaluate --help` does not wait for.
if TYPE_CHECKING:
    from discrete_lit.evaluation.classifier import ImageClassifier
    from discrete_lit.evaluation.feature_statistics import Measurement, Reference
    from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
    from discrete_lit.evaluation.report import Row
    from discrete_lit.generators import Generator
    from discrete_lit.metrics.precision_recall import Manifold
    from discrete_lit.metrics.reconstruction import ReconstructionMeter


NEIGHBOURS = 3
"""k of precision and recall, as in ADM's evaluator."""


def evaluate(
    reference: str,
    output: str,
    *,
    image_size: ImageSize,
    image_channels: int = 3,
    num_images: int | None = None,
    samples: dict[str, str | list[str]] | None = None,
    reconstructions: dict[str, str | list[str]] | None = None,
    likelihoods: dict[str, str | list[str]] | None = None,
    held_out: str | None = None,
    num_reference: int | None = None,
    extractor: FeatureExtractor | None = None,
    classifier: str | dict[str, str] | None = None,
    lpips_weights: str | None = None,
    apply_exif: bool = False,
    batch_size: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure sets of images at one count against one reference, and report them in one table.

    Each set is a row with a Fréchet distance, and with precision and recall where the reference is images; with a
    classifier, the fraction of images that show the intended class; with held-out images, how much the images of a
    class differ from each other, and how likely they are under the generators of the samples; of a tokenizer's
    reconstructions, PSNR, SSIM, the usage and the entropy of its ids beside their capacity; and what `run.json` beside
    the samples says of their cost. A set of images is a folder of shards, a folder of images (one subfolder per class,
    or images alone) or a `.npz` with uint8 `arr_0` (N, H, W, C) and `labels`. Files get ADM's centre crop to
    `image_size`. Of a labelled set the first `num_images / num_classes` of each class are taken, in order; of samples
    that have too few of a class, such as ones with random labels, images at even distances over the whole set.

    A row may have several runs, such as those of three training seeds: a list of sample sets, or of checkpoints, under
    its name. Each run is measured by itself; the table gives means ± standard deviations, a sentence for each pair of
    rows says which of their differences lie within the spread, and `report.json` holds every value.

    Classes of folders and shards are matched by name: those of the reference, or else of the held-out images, number
    them. The labels of an `.npz` are matched by position; the label after the last, a generator's null label, means no
    class. The report says how labels were matched, and where samples do not show every class.

    Writes `report.json` and `report.md` into `output`, prints the table, and keeps the reference's moments and up to
    10,000 of its features there, so that the next evaluation need not compute them again. They are kept for the
    content of the images, which is read to be recognised, and for every setting that they depend on.

    Args:
        reference: images to measure against, or their moments: an .npz with `mu` and `sigma`, such as ADM's.
        output: folder of the report.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        image_channels: of the images: 3, or 1 for grey, 4 for RGBA, as the tokenizers that reconstruct them take. What
            saw colour images alone (the extractor, LPIPS) is shown grey repeated and RGBA laid over white.
        num_images: images of each row; a set with fewer is refused. By default as many as there are held-out images,
            which are then all taken, whatever their classes.
        samples: name in the table to generated images, for instance `{masked: runs/masked/samples.npz}`, or to those of
            several runs, `{masked: [seed_0/masked/samples.npz, seed_1/masked/samples.npz]}`.
        reconstructions: name in the table to the checkpoint of a tokenizer, or of a diffusion decoder of its tokens,
            which reconstructs the held-out images, or to those of several runs.
        likelihoods: name of samples to the checkpoint of their generator, to measure its log-likelihood of the held-out
            images, or to one for each run, in their order; a checkpoint that is named several times is measured once.
        held_out: real images that are not in the reference; their own row is the floor of the distance.
        num_reference: images of the reference; all by default.
        extractor: EfficientNetLite0 by default; `InceptionV3` with its weight file gives FID.
        classifier: checkpoint of an ImageClassifier, or name to checkpoint of several, each with its own label
            accuracy: a generator that pleases one classifier need not please another, trained on other images.
        lpips_weights: VGG-16's weights (torchvision's `vgg16-397923af.pth`), to measure LPIPS of reconstructions too.
        apply_exif: turn image files as their EXIF orientation says: give it where the DataModule of the training has
            `apply_exif: true`. Published figures do not.
        batch_size: images at a time.
        device: for instance `cpu` or `cuda:1`; `auto` takes a GPU where there is one.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: no row, a set that is missing, too small or of another image size, classes that cannot be matched,
            a classifier of other classes or for samples without labels, a reference that is no mean and covariance or
            of another extractor, a checkpoint of the wrong kind, or a row without runs, or with one of them twice.
    """
    from discrete_lit.evaluation.feature_statistics import measure, reference_from_images, reference_from_moments
    from discrete_lit.evaluation.held_out_likelihood import measure_likelihood
    from discrete_lit.evaluation.report import Report
    from discrete_lit.metrics.frechet import compare, holds_moments
    from discrete_lit.metrics.precision_recall import precision_and_recall

    image_size = normal_size(image_size)
    if image_channels not in MODES:
        raise ValueError(f"image_channels is {image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    sample_runs, made_runs = _runs("samples", samples), _runs("reconstructions", reconstructions)
    likelihood_runs = _runs("likelihoods", likelihoods)
    _check_arguments(sample_runs, made_runs, likelihood_runs, held_out, num_images, num_reference, batch_size)
    if lpips_weights is not None and not made_runs:
        raise ValueError("lpips_weights measure reconstructions: give some, or leave lpips_weights out")
    try:
        compute_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {error}") from error

    # Everything is opened before anything is computed: a mistake in the last row must not cost the time of the first.
    def opened(path: str) -> ImageSet:
        return open_image_set(path, image_size, image_channels=image_channels, apply_exif=apply_exif)

    reference_images = None if holds_moments(reference) else opened(reference)
    real = None if held_out is None else opened(held_out)
    generated = {run.label: opened(run.path) for run in sample_runs}
    beside = {run.label: _read_run(run.path) for run in sample_runs}
    real_sets = {"reference": reference_images, "held_out": real}
    sample_sets = {f"samples.{label}": images for label, images in generated.items()}
    checkpoints = {"": classifier} if isinstance(classifier, str) else dict(classifier or {})
    if checkpoints:
        _check_labels(generated, {})
    classifiers = {
        name: _load_classifier(path, real_sets, compute_device, image_channels) for name, path in checkpoints.items()
    }
    known = {path: classifiers[name].num_classes for name, path in checkpoints.items()}
    if len(set(known.values())) > 1:
        raise ValueError(f"the classifiers are of different numbers of classes: {known}")
    classes = match_classes(real_sets, sample_sets, next(iter(known.values()), None))
    if checkpoints:
        _check_labels(generated, classes.numbering)

    def selected(name: str, num_images: int | None, **settings: Any) -> Selection | None:
        images = (real_sets | sample_sets)[name]
        if images is None:
            return None
        numbering = classes.numbering.get(name)
        return Selection(images, num_images, num_classes=classes.count, numbering=numbering, **settings)

    real_selection = selected("held_out", num_images)
    count = num_images if real is None else (num_images or real.count)
    selections = [selected(name, count, allow_uneven=True) for name in sample_sets]
    reference_selection = selected("reference", num_reference)
    meters = _load_meters(made_runs, lpips_weights, compute_device, image_size, image_channels)
    generators = _load_generators(likelihood_runs, image_size, image_channels)
    extractor = (extractor or EfficientNetLite0()).to(compute_device)

    def run(selection: Selection, name: str, transform: Callable[[Tensor], Tensor] | None = None) -> Measurement:
        return measure(
            selection,
            extractor,
            num_classes=classes.count,
            batch_size=batch_size,
            device=compute_device,
            transform=transform,
            classifiers=classifiers,
            description=name,
        )

    notes = [*classes.notes, *_setting_notes(sample_runs, beside)]
    if reference_selection is None:
        measured_against = reference_from_moments(reference, extractor, apply_exif=apply_exif)
    else:
        folder = Path(output)
        measured_against = reference_from_images(
            reference,
            reference_selection,
            extractor=extractor,
            image_size=image_size,
            batch_size=batch_size,
            device=compute_device,
            folder=folder,
        )
        left_out = reference_selection.count - (measured_against.moments.count or 0)
        if left_out:
            notes.append(f"reference: {left_out:,} broken images were left out")
    manifold, reason = _manifold(measured_against, count, compute_device)
    if manifold is None:
        notes.append(f"precision and recall are not measured: {reason}")
    rows: list[Row] = []
    floor: Measurement | None = None

    def add(run: _Run, kind: Any, selection: Selection, measured: Measurement, **figures: Any) -> None:
        found = compare(extractor, measured.moments.compute(), measured_against.moments, reference)
        if manifold is not None:
            precision, recall = precision_and_recall(measured.features.compute(), manifold)
            figures |= {"precision": precision, "recall": recall}
        rows.append(_row(run.row, kind, run.path, found, measured, floor, figures))
        if kind != "reconstructions":
            notes.extend(selection.notes(run.label))
        if kind == "samples":
            notes.extend(_class_notes(run.label, selection, classes.count, rows[-1]))

    likelihood: dict[str, LikelihoodFigures] = {}
    if real_selection is not None:
        assert held_out is not None
        real_run = _Run("held-out real images", "held-out real images", held_out)
        floor = run(real_selection, real_run.label)
        add(real_run, "real", real_selection, floor)
        for made in made_runs:
            meter = meters[made.label]
            measured = run(real_selection, made.label, meter)
            add(made, "reconstructions", real_selection, measured, reconstruction=meter.figures())
        for path, generator in generators.items():
            likelihood[path] = measure_likelihood(
                generator.to(compute_device),
                real_selection,
                checkpoint=path,
                batch_size=batch_size,
                device=compute_device,
                description=path,
            )
    generator_of = {run.label: run.path for run in likelihood_runs}
    for sampled, selection in zip(sample_runs, selections, strict=True):
        assert selection is not None
        figures = {"likelihood": likelihood.get(generator_of.get(sampled.label, "")), **beside[sampled.label]}
        add(sampled, "samples", selection, run(selection, sampled.label), **figures)

    report = Report(
        rows,
        measured_against,
        manifold=manifold,
        image_size=image_size,
        classifiers=checkpoints,
        image_channels=image_channels,
        apply_exif=apply_exif,
        notes=notes,
        environment=environment(compute_device),
    )
    report.write(Path(output))
    print(f"{report.markdown()}\nReport: {Path(output) / 'report.md'} and report.json")
    return report.to_dict()


class _Run(NamedTuple):
    """One run of a row: a set of samples, or a checkpoint."""

    row: str
    label: str
    """The name of the row, and of which run where it has several."""
    path: str


def _runs(setting: str, rows: dict[str, str | list[str]] | None) -> list[_Run]:
    """List the runs of each row that a setting names, in order.

    Raises:
        ValueError: a row without runs.
    """
    from discrete_lit.evaluation.report import run_name

    found = []
    for name, given in (rows or {}).items():
        paths = [given] if isinstance(given, str) else list(given)
        if not paths:
            raise ValueError(f"{setting}.{name} is empty: give a path, or a list with one for each run")
        found += [_Run(name, run_name(name, run, len(paths)), path) for run, path in enumerate(paths, start=1)]
    return found


def _setting_notes(sample_runs: list[_Run], beside: Mapping[str, dict[str, Any]]) -> list[str]:
    """Say where the runs of one row were not drawn alike: then their spread is not one over seeds alone."""
    notes = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in sample_runs:
        rows.setdefault(run.row, []).append(beside[run.label].get("sampling", {}))
    for name, settings in rows.items():
        different = [
            key for key in ("generator", "sampler") if any(s.get(key) != settings[0].get(key) for s in settings)
        ]
        if different:
            notes.append(f"{name}: its runs differ in {' and '.join(different)}, so their spread is not that of seeds")
    return notes


def _check_arguments(
    samples: list[_Run],
    reconstructions: list[_Run],
    likelihoods: list[_Run],
    held_out: str | None,
    num_images: int | None,
    num_reference: int | None,
    batch_size: int,
) -> None:
    if not samples and held_out is None:
        raise ValueError("nothing to evaluate: give samples (name: path), held_out, or both")
    if reconstructions and held_out is None:
        raise ValueError("reconstructions are made of the held-out images: give held_out")
    if likelihoods and held_out is None:
        raise ValueError("likelihoods are of the held-out images: give held_out")
    for setting, runs in (("samples", samples), ("reconstructions", reconstructions)):
        for (name, path), times in Counter((run.row, run.path) for run in runs).items():
            if times > 1:
                raise ValueError(f"{setting}.{name} has {path!r} {times} times: each run of a row is another one")
    sampled, modelled = (Counter(run.row for run in runs) for runs in (samples, likelihoods))
    if unknown := sorted(set(modelled) - set(sampled)):
        raise ValueError(f"likelihoods.{unknown[0]} is of no row: its name must be one of samples, {sorted(sampled)}")
    for name, count in modelled.items():
        if count != sampled[name]:
            raise ValueError(
                f"likelihoods.{name} has {count} checkpoints, samples.{name} has {sampled[name]} runs: give one for "
                "each"
            )
    if num_images is None and held_out is None:
        raise ValueError("num_images is as many as there are held-out images by default: give num_images or held_out")
    if (
        (num_images is not None and num_images < 2)
        or batch_size < 1
        or (num_reference is not None and num_reference < 2)
    ):
        raise ValueError(
            f"num_images and num_reference must be at least 2 and batch_size at least 1, got "
            f"num_images={num_images}, num_reference={num_reference}, batch_size={batch_size}"
        )
    if both := {run.row for run in reconstructions} & {run.row for run in samples}:
        raise ValueError(f"a name stands for one row, {sorted(both)} is of reconstructions and of samples")


def _check_labels(generated: dict[str, ImageSet], numbering: Mapping[str, np.ndarray]) -> None:
    """Refuse a classifier where not one of the samples has a class, as far as that is known."""
    reasons = []
    for name, images in generated.items():
        known = numbering.get(f"samples.{name}")
        if images.num_classes is None:
            reason = "has no labels"
        elif known is not None and images.labels is not None and bool((known[images.labels] == NO_CLASS).all()):
            reason = f"has the label {len(known) - 1} alone, which is no class"
        else:
            return
        reasons.append(f"samples.{name}={str(images.path)!r} {reason}")
    if reasons:
        raise ValueError(
            f"{'; '.join(reasons)}: the classifier needs labels, of an .npz with `labels`, shards, or one subfolder "
            "per class"
        )


def _class_notes(name: str, selection: Selection, num_classes: int | None, row: Row) -> list[str]:
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


def _manifold(reference: Reference, count: int | None, device: torch.device) -> tuple[Manifold | None, str]:
    """Span the reference's manifold; None, and why, where its features are unknown or too few."""
    from discrete_lit.metrics.precision_recall import Manifold

    if reference.features is None:
        return None, "the reference is a file of moments, without features of its images"
    assert count is not None
    if min(count, len(reference.features)) <= NEIGHBOURS:
        return None, f"they need more than k = {NEIGHBOURS} images in every set"
    return Manifold(reference.features, NEIGHBOURS, device=device), ""


def _read_run(samples: str) -> dict[str, Any]:
    """Read `run.json` beside an npz of samples, and find the picture there: fields of its row.

    Raises:
        ValueError: a run.json that cannot be read.
    """
    from discrete_lit.evaluation.report import COSTS

    if not samples.endswith(".npz"):
        return {}
    run, picture = (Path(samples).expanduser().parent / name for name in ("run.json", "grid.png"))
    found: dict[str, Any] = {"picture": str(picture)} if picture.is_file() else {}
    if run.is_file():
        try:
            found["sampling"] = json.loads(run.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(run)!r} cannot be read as JSON: {error}") from error
        if not isinstance(found["sampling"], dict):
            raise ValueError(f"{str(run)!r} must hold an object, it holds {type(found['sampling']).__name__}")
        for key in COSTS:
            value = found["sampling"].get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{str(run)!r}: {key} is {value!r}, it must be a number")
    return found


def _row(
    name: str,
    kind: Any,
    source: str,
    frechet: Any,
    measured: Measurement,
    floor: Measurement | None,
    figures: dict[str, Any],
) -> Row:
    from discrete_lit.evaluation.report import Row
    from discrete_lit.metrics.precision_recall import within_class_diversity

    diversity = diversity_by_class = None
    accuracy: dict[str, float | None] = {}
    by_class: dict[str, list[float | None]] = {}
    if measured.spread is not None:
        counts = measured.spread.count
        by_class = {name: _finite(correct / counts) for name, correct in measured.correct.items()}
        accuracy = {name: _finite(correct.sum() / counts.sum()) for name, correct in measured.correct.items()}
    if measured.spread is not None and floor is not None and floor.spread is not None:
        ratios = within_class_diversity(measured.spread, floor.spread)
        diversity_by_class = _finite(ratios)
        diversity = _finite(ratios.nanmean())
    return Row(
        name=name,
        kind=kind,
        source=source,
        frechet=frechet,
        label_accuracy=accuracy,
        label_accuracy_by_class=by_class,
        within_class_diversity=diversity,
        within_class_diversity_by_class=diversity_by_class,
        **figures,
    )


def _finite(values: Tensor) -> Any:
    """A number, or a list of them, with None for NaN: where there is nothing to measure."""
    return [_finite(value) for value in values] if values.ndim else float(values) if values.isfinite() else None


def _load_meters(
    checkpoints: list[_Run],
    lpips_weights: str | None,
    device: torch.device,
    image_size: ImageSize,
    image_channels: int,
) -> dict[str, ReconstructionMeter]:
    """Make a meter on `device` for each checkpoint of an autoencoder, all with LPIPS where its weights are given.

    Raises:
        ValueError: a checkpoint that cannot be read, holds a generator or takes other channels; weights that are not
            LPIPS's, or images too small for it.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator, LatentGenerator, TokenDiffusionDecoder
    from discrete_lit.metrics.reconstruction import ReconstructionMeter
    from discrete_lit.tokenizers.losses.perceptual import LPIPS

    lpips = None
    if lpips_weights is not None and checkpoints:
        lpips = LPIPS(lpips_weights).to(device)
        lpips.prepare()
        lpips.check_size(image_size)
    meters = {}
    for _, name, path in checkpoints:
        autoencoder = files.load(path)
        if isinstance(autoencoder, TokenDiffusionDecoder):
            autoencoder = autoencoder.autoencoder()
        if isinstance(autoencoder, Generator | LatentGenerator):
            raise ValueError(
                f"reconstructions.{name}={path!r} holds a {type(autoencoder).__name__}, which is a generator; give the "
                "checkpoint of a tokenizer or of a continuous autoencoder"
            )
        _check_channels(autoencoder, image_channels, f"reconstructions.{name}={path!r}")
        meters[name] = ReconstructionMeter(autoencoder.to(device), lpips)
    return meters


def _check_channels(module: Any, image_channels: int, what: str) -> None:
    """Raise a ValueError where it is known that a module takes images of other channels."""
    expected = getattr(module, "image_channels", None)
    if expected not in (None, image_channels):
        raise ValueError(f"{what} takes images of {expected} channels, image_channels is {image_channels}")


def _load_classifier(
    checkpoint: str, sets: dict[str, ImageSet | None], device: torch.device, image_channels: int
) -> ImageClassifier:
    """Load a classifier to `device`.

    Raises:
        ValueError: a checkpoint that holds no classifier, or one of other classes or channels than the images have.
    """
    from discrete_lit.evaluation.classifier import load_classifier

    classifier = load_classifier(checkpoint)
    _check_channels(classifier, image_channels, f"classifier={checkpoint!r}")
    known = classifier.num_classes
    for images in sets.values():
        if images is None or images.num_classes is None:
            continue
        # Without names there may be classes that the set has no image of.
        if images.num_classes > known or (images.classes and images.num_classes < known):
            raise ValueError(
                f"classifier={checkpoint!r} knows {known} classes, the images have {images.num_classes}: "
                f"{str(images.path)!r}"
            )
        break
    return classifier.to(device)


def _load_generators(likelihoods: list[_Run], image_size: ImageSize, image_channels: int) -> dict[str, Generator]:
    """Load the generator of each checkpoint, on the CPU.

    Raises:
        ValueError: a checkpoint that holds no generator, or one of another image size or other channels.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator

    generators: dict[str, Generator] = {}
    for _, name, path in likelihoods:
        if path in generators:
            continue
        module = files.load(path)
        if not isinstance(module, Generator):
            raise ValueError(f"likelihoods.{name}={path!r} holds a {type(module).__name__}, not a Generator")
        if module.image_size != image_size:
            raise ValueError(
                f"likelihoods.{name}={path!r} models images of {module.image_size} pixels, image_size is {image_size}"
            )
        _check_channels(module.tokenizer, image_channels, f"likelihoods.{name}={path!r}")
        generators[path] = module
    return generators
