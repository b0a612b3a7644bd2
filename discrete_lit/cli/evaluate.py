"""`discrete-lit evaluate`: sets of images against a reference, to a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.provenance import environment
from discrete_lit.data.transforms import MODES
from discrete_lit.evaluation.image_sets import ImageSet, NpzImages, Selection, open_image_set
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor

# The other imports stand in the functions: torchmetrics and Lightning take seconds, which
# `discrete-lit evaluate --help` does not wait for.
if TYPE_CHECKING:
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
    samples: dict[str, str] | None = None,
    reconstructions: dict[str, str] | None = None,
    likelihoods: dict[str, str] | None = None,
    held_out: str | None = None,
    num_reference: int | None = None,
    extractor: FeatureExtractor | None = None,
    classifier: str | None = None,
    lpips_weights: str | None = None,
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
    `image_size`. Of a labelled set the first `num_images / num_classes` of each class are taken, in order.

    Writes `report.json` and `report.md` into `output`, prints the table, and keeps the reference's moments and up to
    10,000 of its features there, so that the next evaluation need not compute them again.

    Args:
        reference: images to measure against, or their moments: an .npz with `mu` and `sigma`, such as ADM's.
        output: folder of the report.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        image_channels: of the images: 3, or 1 for grey, 4 for RGBA, as the tokenizers that reconstruct them take. What
            saw colour images alone (the extractor, LPIPS) is shown grey repeated and RGBA laid over white.
        num_images: images of each row; a set with fewer is refused. By default as many as there are held-out images,
            which are then all taken, whatever their classes.
        samples: name in the table to generated images, for instance `{masked: runs/masked/samples.npz}`.
        reconstructions: name in the table to a tokenizer's checkpoint, which reconstructs the held-out images.
        likelihoods: name of samples to the checkpoint of their generator, to measure its log-likelihood of the held-out
            images; a checkpoint that is named several times is measured once.
        held_out: real images that are not in the reference; their own row is the floor of the distance.
        num_reference: images of the reference; all by default.
        extractor: EfficientNetLite0 by default; `InceptionV3` with its weight file gives FID.
        classifier: checkpoint of an ImageClassifier.
        lpips_weights: VGG-16's weights (torchvision's `vgg16-397923af.pth`), to measure LPIPS of reconstructions too.
        batch_size: images at a time.
        device: for instance `cpu` or `cuda:1`; `auto` takes a GPU where there is one.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: no row, a set that is missing, too small or of another image size, samples without labels for the
            classifier, a reference of another extractor, or a checkpoint of the wrong kind.
    """
    from discrete_lit.evaluation.feature_statistics import measure, reference_from_images, reference_from_moments
    from discrete_lit.evaluation.held_out_likelihood import measure_likelihood
    from discrete_lit.evaluation.report import Report
    from discrete_lit.metrics.frechet import compare, holds_moments
    from discrete_lit.metrics.precision_recall import precision_and_recall

    image_size = normal_size(image_size)
    if image_channels not in MODES:
        raise ValueError(f"image_channels is {image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    samples, reconstructions, likelihoods = samples or {}, reconstructions or {}, likelihoods or {}
    _check_arguments(samples, reconstructions, likelihoods, held_out, num_images, num_reference, batch_size)
    compute_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    # Everything is opened before anything is computed: a mistake in the last row must not cost the time of the first.
    open_set = partial(open_image_set, image_size=image_size, image_channels=image_channels)
    reference_images = None if holds_moments(reference) else open_set(reference)
    real = None if held_out is None else open_set(held_out)
    generated = {name: open_set(path) for name, path in samples.items()}
    num_classes = _num_classes([real, reference_images, *generated.values()])
    if classifier is not None:
        _check_labels(generated)
    real_selection = None if real is None else Selection(real, num_images, num_classes=num_classes)
    count = num_images if real is None else (num_images or real.count)
    selections = {name: Selection(images, count, num_classes=num_classes) for name, images in generated.items()}
    reference_selection = (
        None if reference_images is None else Selection(reference_images, num_reference, num_classes=num_classes)
    )
    meters = _load_meters(reconstructions, lpips_weights, compute_device, image_size, image_channels)
    generators = _load_generators(likelihoods, image_size, image_channels)
    predict = None if classifier is None else _load_classifier(classifier, num_classes, compute_device, image_channels)
    extractor = (extractor or EfficientNetLite0()).to(compute_device)

    def run(selection: Selection, name: str, transform: Callable[[Tensor], Tensor] | None = None) -> Measurement:
        return measure(
            selection,
            extractor,
            num_classes=num_classes,
            batch_size=batch_size,
            device=compute_device,
            transform=transform,
            classifier=predict,
            description=name,
        )

    if reference_selection is None:
        measured_against = reference_from_moments(reference, extractor)
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
    manifold = _manifold(measured_against, count, compute_device)
    rows: list[Row] = []
    floor: Measurement | None = None

    def add(name: str, kind: Any, source: str, measured: Measurement, **figures: Any) -> None:
        found = compare(extractor, measured.moments.compute(), measured_against.moments, reference)
        if manifold is not None:
            precision, recall = precision_and_recall(measured.features.compute(), manifold)
            figures |= {"precision": precision, "recall": recall}
        rows.append(_row(name, kind, source, found, measured, floor, figures))

    likelihood: dict[str, LikelihoodFigures] = {}
    if real_selection is not None:
        assert held_out is not None
        floor = run(real_selection, "held-out real images")
        add("held-out real images", "real", held_out, floor)
        for name, meter in meters.items():
            measured = run(real_selection, name, meter)
            add(name, "reconstructions", reconstructions[name], measured, reconstruction=meter.figures())
        for path, generator in generators.items():
            likelihood[path] = measure_likelihood(
                generator.to(compute_device),
                real_selection,
                checkpoint=path,
                batch_size=batch_size,
                device=compute_device,
                description=path,
            )
    for name, selection in selections.items():
        add(name, "samples", samples[name], run(selection, name), likelihood=likelihood.get(likelihoods.get(name, "")))

    report = Report(
        rows,
        measured_against,
        manifold=manifold,
        image_size=image_size,
        classifier=classifier,
        image_channels=image_channels,
        environment=environment(compute_device),
    )
    report.write(Path(output))
    print(f"{report.markdown()}\nReport: {Path(output) / 'report.md'} and report.json")
    return report.to_dict()


def _check_arguments(
    samples: dict[str, str],
    reconstructions: dict[str, str],
    likelihoods: dict[str, str],
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
    if unknown := sorted(set(likelihoods) - set(samples)):
        raise ValueError(f"likelihoods.{unknown[0]} is of no row: its name must be one of samples, {sorted(samples)}")
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
    names = [*reconstructions, *samples]
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands for one row, got {names}")


def _num_classes(sets: list[ImageSet | None]) -> int | None:
    """Count the classes: those of the first set that states them; of samples alone, the most that a label needs."""
    labelled = [images for images in sets if images is not None and images.num_classes is not None]
    stated = [images for images in labelled if not isinstance(images, NpzImages)]
    counts = [images.num_classes or 0 for images in stated[:1] or labelled]
    return max(counts, default=None)


def _check_labels(generated: dict[str, ImageSet]) -> None:
    for name, images in generated.items():
        if images.num_classes is None:
            raise ValueError(
                f"samples.{name}={str(images.path)!r} has no labels, which the classifier needs: "
                "an .npz with `labels`, shards, or one subfolder per class"
            )


def _manifold(reference: Reference, count: int | None, device: torch.device) -> Manifold | None:
    """Span the reference's manifold; None where its features are unknown or too few for the k-th neighbour."""
    from discrete_lit.metrics.precision_recall import Manifold

    if reference.features is None or count is None or min(count, len(reference.features)) <= NEIGHBOURS:
        return None
    return Manifold(reference.features, NEIGHBOURS, device=device)


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

    accuracy = by_class = diversity = diversity_by_class = None
    if measured.correct is not None and measured.spread is not None:
        counts = measured.spread.count
        accuracy = float(measured.correct.sum() / counts.sum())
        by_class = _finite(measured.correct / counts)
    if measured.spread is not None and floor is not None and floor.spread is not None:
        ratios = within_class_diversity(measured.spread, floor.spread)
        diversity_by_class = _finite(ratios)
        diversity = float(ratios.nanmean()) if bool(ratios.isfinite().any()) else None
    folder = Path(source).parent
    run, picture = folder / "run.json", folder / "grid.png"
    beside = kind == "samples" and source.endswith(".npz")
    return Row(
        name=name,
        kind=kind,
        source=source,
        frechet=frechet,
        label_accuracy=accuracy,
        label_accuracy_by_class=by_class,
        within_class_diversity=diversity,
        within_class_diversity_by_class=diversity_by_class,
        sampling=json.loads(run.read_text(encoding="utf-8")) if beside and run.is_file() else {},
        picture=str(picture) if beside and picture.is_file() else None,
        **figures,
    )


def _finite(values: Tensor) -> list[float | None]:
    """Plain numbers for JSON, which has no NaN."""
    return [float(value) if value.isfinite() else None for value in values]


def _load_meters(
    checkpoints: dict[str, str],
    lpips_weights: str | None,
    device: torch.device,
    image_size: ImageSize,
    image_channels: int,
) -> dict[str, ReconstructionMeter]:
    """Make a meter on `device` for each named checkpoint of an autoencoder, all with LPIPS where its weights are given.

    Raises:
        ValueError: a checkpoint that cannot be read, holds a generator or takes other channels; weights that are not
            LPIPS's, or images too small for it.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator
    from discrete_lit.metrics.reconstruction import ReconstructionMeter
    from discrete_lit.tokenizers.losses.perceptual import LPIPS

    lpips = None
    if lpips_weights is not None and checkpoints:
        lpips = LPIPS(lpips_weights).to(device)
        lpips.prepare()
        lpips.check_size(image_size)
    meters = {}
    for name, path in checkpoints.items():
        autoencoder = files.load(path)
        if isinstance(autoencoder, Generator):
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
    checkpoint: str, num_classes: int | None, device: torch.device, image_channels: int
) -> Callable[[Tensor], Tensor]:
    """Load a classifier to `device`: from images in [-1, 1] to logits.

    Raises:
        ValueError: a checkpoint that holds no classifier, or one of other classes or channels.
    """
    from discrete_lit.evaluation.classifier import load_classifier

    classifier = load_classifier(checkpoint)
    _check_channels(classifier, image_channels, f"classifier={checkpoint!r}")
    if num_classes is not None and classifier.num_classes != num_classes:
        raise ValueError(
            f"classifier={checkpoint!r} knows {classifier.num_classes} classes, the images have {num_classes}"
        )
    return classifier.to(device)


def _load_generators(likelihoods: dict[str, str], image_size: ImageSize, image_channels: int) -> dict[str, Generator]:
    """Load the generator of each checkpoint of a dictionary from names to checkpoints, on the CPU.

    Raises:
        ValueError: a checkpoint that holds no generator, or one of another image size or other channels.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator

    generators: dict[str, Generator] = {}
    for name, path in likelihoods.items():
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
