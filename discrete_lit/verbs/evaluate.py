"""`discrete-lit evaluate`: sets of images against a reference, to a report."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discrete_lit.evaluation.diversity import within_class_diversity
from discrete_lit.evaluation.efficientnet import EfficientNetLite0
from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.frechet import check_reference, compare
from discrete_lit.evaluation.image_sets import ImageSet, NpzImages, open_image_set
from discrete_lit.evaluation.measure import Measurement, measure
from discrete_lit.evaluation.moments import Moments, holds_moments
from discrete_lit.evaluation.reconstruction import ReconstructionFigures, ReconstructionMeter
from discrete_lit.evaluation.report import Report, Row
from discrete_lit.evaluation.selection import Selection
from discrete_lit.provenance import environment, file_sha256

_log = logging.getLogger(__name__)


def evaluate(
    reference: str,
    output: str,
    image_size: int,
    num_images: int | None = None,
    samples: dict[str, str] | None = None,
    reconstructions: dict[str, str] | None = None,
    held_out: str | None = None,
    num_reference: int | None = None,
    extractor: FeatureExtractor | None = None,
    classifier: str | None = None,
    lpips_weights: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure sets of images at one count against one reference, and report them in one table.

    Each set is a row with a Fréchet distance; with a classifier, the share of images that show the intended class;
    with held-out images, how much the images of a class differ from each other; of a tokenizer's reconstructions, PSNR,
    SSIM, the usage and the entropy of its ids beside their capacity; and what `run.json` beside the
    samples says of their cost. A set of images is a folder of shards, a folder of images (one subfolder per class, or
    images alone) or a `.npz` with uint8 `arr_0` (N, H, W, 3) and `labels`. Files get ADM's centre crop to `image_size`.
    Of a labelled set the first `num_images / num_classes` of each class are taken, in order.

    Writes `report.json` and `report.md` into `output`, prints the table, and keeps the reference's moments there, so
    that the next evaluation need not compute them again.

    Args:
        reference: images to measure against, or their moments: an .npz with `mu` and `sigma`, such as ADM's.
        output: folder of the report.
        image_size: side of the images in pixels.
        num_images: images of each row; a set with fewer is refused. By default as many as there are held-out images,
            which are then all taken, whatever their classes.
        samples: name in the table to generated images, for instance `{masked: runs/masked/samples.npz}`.
        reconstructions: name in the table to a tokenizer's checkpoint, which reconstructs the held-out images.
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
    samples, reconstructions = samples or {}, reconstructions or {}
    _check_arguments(samples, reconstructions, held_out, num_images, num_reference, batch_size)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    # Everything is opened before anything is computed: a mistake in the last row must not cost the time of the first.
    reference_images = None if holds_moments(reference) else open_image_set(reference, image_size)
    real = None if held_out is None else open_image_set(held_out, image_size)
    generated = {name: open_image_set(path, image_size) for name, path in samples.items()}
    num_classes = _num_classes([real, reference_images, *generated.values()])
    if classifier is not None:
        _check_labels(generated)
    real_selection = None if real is None else Selection(real, num_images, num_classes)
    count = num_images if real is None else (num_images or real.count)
    selections = {name: Selection(images, count, num_classes) for name, images in generated.items()}
    reference_selection = None if reference_images is None else Selection(reference_images, num_reference, num_classes)
    meters = _meters(reconstructions, lpips_weights, place)
    judge = None if classifier is None else _judge(classifier, num_classes, place)
    extractor = (extractor or EfficientNetLite0()).to(place)

    def run(selection: Selection, name: str, transform: Callable[[Tensor], Tensor] | None = None) -> Measurement:
        return measure(
            selection,
            extractor,
            num_classes=num_classes,
            batch_size=batch_size,
            device=place,
            transform=transform,
            classifier=judge,
            description=name,
        )

    reference_sha256 = file_sha256(reference) if reference_images is None else reference_images.fingerprint()
    reference_moments = _reference_moments(
        reference, reference_selection, reference_sha256, extractor, image_size, batch_size, place, Path(output)
    )
    check_reference(extractor, reference_moments, reference)
    rows: list[Row] = []
    floor: Measurement | None = None

    def add(name: str, kind: Any, source: str, measured: Measurement, meter: ReconstructionMeter | None = None) -> None:
        found = compare(extractor, measured.moments.compute(), reference_moments, reference)
        figures = None if meter is None else meter.figures()
        rows.append(_row(name, kind, source, found, measured, floor, figures))

    if real_selection is not None:
        assert held_out is not None
        floor = run(real_selection, "held-out real images")
        add("held-out real images", "real", held_out, floor)
        for name, meter in meters.items():
            add(name, "reconstructions", reconstructions[name], run(real_selection, name, meter), meter)
    for name, selection in selections.items():
        add(name, "samples", samples[name], run(selection, name))

    report = Report(rows, reference_sha256, image_size, classifier, environment(place))
    report.write(Path(output))
    print(f"{report.markdown()}\nReport: {Path(output) / 'report.md'} and report.json")
    return report.to_dict()


def _check_arguments(
    samples: dict[str, str],
    reconstructions: dict[str, str],
    held_out: str | None,
    num_images: int | None,
    num_reference: int | None,
    batch_size: int,
) -> None:
    if not samples and held_out is None:
        raise ValueError("nothing to evaluate: give samples (name: path), held_out, or both")
    if reconstructions and held_out is None:
        raise ValueError("reconstructions are made of the held-out images: give held_out")
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
    """Of the first set that states its classes; of samples alone, the largest count that their labels need."""
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


def _meters(
    checkpoints: dict[str, str], lpips_weights: str | None, device: torch.device
) -> dict[str, ReconstructionMeter]:
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator
    from discrete_lit.tokenizers.losses.perceptual import LPIPS

    lpips = None
    if lpips_weights is not None and checkpoints:
        lpips = LPIPS(lpips_weights).to(device)
        lpips.prepare()
    meters = {}
    for name, path in checkpoints.items():
        autoencoder = files.load(path)
        if isinstance(autoencoder, Generator):
            raise ValueError(
                f"reconstructions.{name}={path!r} holds a {type(autoencoder).__name__}, which is a generator; give the "
                "checkpoint of a tokenizer or of a continuous autoencoder"
            )
        meters[name] = ReconstructionMeter(autoencoder.to(device), lpips)
    return meters


def _judge(checkpoint: str, num_classes: int | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    from discrete_lit.evaluation.classifier import load_classifier

    classifier = load_classifier(checkpoint)
    if num_classes is not None and classifier.num_classes != num_classes:
        raise ValueError(
            f"classifier={checkpoint!r} knows {classifier.num_classes} classes, the images have {num_classes}"
        )
    return classifier.to(device)


def _reference_moments(
    reference: str,
    selection: Selection | None,
    sha256: str,
    extractor: FeatureExtractor,
    image_size: int,
    batch_size: int,
    device: torch.device,
    output: Path,
) -> Moments:
    """Loaded from a moments file, from an earlier evaluation, or computed and kept for the next one."""
    if selection is None:
        return Moments.load(reference)
    settings = (sha256, selection.count, image_size, extractor.weights_sha256, extractor.protocol)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()
    kept = output / f"reference-{key[:16]}.npz"
    if kept.is_file():
        try:
            return Moments.load(kept)
        except ValueError as error:
            _log.warning("computing the reference again: %s", error)
    measured = measure(
        selection, extractor, num_classes=None, batch_size=batch_size, device=device, description="reference"
    )
    moments = measured.moments.compute()
    output.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial.npz")
    moments.save(partial)
    partial.replace(kept)
    return moments


def _row(
    name: str,
    kind: Any,
    source: str,
    frechet: Any,
    measured: Measurement,
    floor: Measurement | None,
    reconstruction: ReconstructionFigures | None,
) -> Row:
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
        reconstruction=reconstruction,
    )


def _finite(values: Tensor) -> list[float | None]:
    """Plain numbers for JSON, which has no NaN."""
    return [float(value) if value.isfinite() else None for value in values]
