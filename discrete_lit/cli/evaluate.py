"""`discrete-lit evaluate`: sets of images against a reference, to a report.

Everything is opened and checked first (`evaluation/inputs.py`), then each set is measured, on all ranks
(`evaluation/shares.py`), and becomes a row (`evaluation/rows.py`) of the report.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discrete_lit.core.distributed import on_first_rank, rank
from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.provenance import environment
from discrete_lit.data.transforms import MODES
from discrete_lit.evaluation.image_sets import ImageSet, NpzImages, Selection, match_classes, open_image_set
from discrete_lit.evaluation.inputs import (
    Run,
    check_arguments,
    check_labels,
    list_runs,
    load_autoencoders,
    load_generators,
    load_lpips,
    open_classifier,
    read_run,
    setting_notes,
)
from discrete_lit.evaluation.protocols import PROTOCOLS, EvaluationInputs, ProtocolName, labels_of
from discrete_lit.evaluation.shares import Shares, whole_metrics
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor

# The other imports stand in the function: torchmetrics and Lightning take seconds, which
# `discrete-lit evaluate --help` does not wait for.
if TYPE_CHECKING:
    from discrete_lit.evaluation.feature_statistics import Measurement
    from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
    from discrete_lit.evaluation.report import Row


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
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    protocol: ProtocolName | None = None,
    part: str | None = None,
    join: int | None = None,
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

    Several devices, and nodes, measure shares of every set: whole batches by the number of the image, so that the
    figures do not depend on how many there are. What was measured is kept in `output/shares` while the command runs,
    and the same command goes on from there after an interruption. An evaluation can be cut into n jobs of an array:
    each runs the command with `part: i/n`, and behind them the command with `join: n` reads what they measured, and
    reports.

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
        reconstructions: name in the table to a tokenizer's checkpoint, which reconstructs the held-out images, or to
            those of several runs.
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
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        devices: on each node; more than one starts a process for each.
        num_nodes: nodes that run this command.
        protocol: name of a published protocol, which then names the distance; inputs that do not meet it are refused.
            See `discrete_lit.evaluation.protocols`.
        part: `i/n`, to measure the i-th of n parts of every set, i from 1, and report nothing.
        join: n, to report what n parts measured; the images and networks are read, but no image is measured again.

    Returns:
        What `report.json` holds, on every rank; nothing for a part.

    Raises:
        ValueError: no row, a set that is missing, too small or of another image size, classes that cannot be matched,
            a classifier of other classes or for samples without labels, a reference that is no mean and covariance or
            of another extractor, a checkpoint of the wrong kind, a row without runs, or with one of them twice,
            parts that are not there, or inputs that do not meet the protocol.
    """
    from lightning.fabric import Fabric

    from discrete_lit.evaluation.feature_statistics import measure, reference_from_images, reference_from_moments
    from discrete_lit.evaluation.held_out_likelihood import measure_likelihood
    from discrete_lit.evaluation.report import Report
    from discrete_lit.evaluation.rows import class_notes, make_row, reference_manifold
    from discrete_lit.metrics.frechet import holds_moments
    from discrete_lit.metrics.reconstruction import ReconstructionMeter

    image_size = normal_size(image_size)
    rules = None if protocol is None else PROTOCOLS[protocol]
    num_images = num_images if rules is None or num_images is not None else rules.count
    if image_channels not in MODES:
        raise ValueError(f"image_channels is {image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    sample_runs, made_runs = list_runs("samples", samples), list_runs("reconstructions", reconstructions)
    likelihood_runs = list_runs("likelihoods", likelihoods)
    check_arguments(sample_runs, made_runs, likelihood_runs, held_out, num_images, num_reference, batch_size)
    if lpips_weights is not None and not made_runs:
        raise ValueError("lpips_weights measure reconstructions: give some, or leave lpips_weights out")
    shares = _shares(Path(output) / "shares", part, join)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)  # type: ignore[arg-type]

    # Everything is opened before anything is computed: a mistake in the last row must not cost the time of the first.
    def opened(path: str) -> ImageSet:
        return open_image_set(path, image_size, image_channels=image_channels, apply_exif=apply_exif)

    reference_images = None if holds_moments(reference) else opened(reference)
    real = None if held_out is None else opened(held_out)
    generated = {run.label: opened(run.path) for run in sample_runs}
    beside = {run.label: read_run(run.path) for run in sample_runs}
    real_sets = {"reference": reference_images, "held_out": real}
    sample_sets = {f"samples.{label}": images for label, images in generated.items()}
    count = num_images if real is None else (num_images or real.count)
    extractor = extractor or EfficientNetLite0()
    if rules is not None:
        rules.check(
            EvaluationInputs(
                extractor=extractor,
                reference=reference,
                reference_images=reference_images,
                held_out=real,
                samples=tuple(run.row for run in sample_runs),
                reconstructions=tuple(run.row for run in made_runs),
                count=count,
                sizes={name: images.count for name, images in sample_sets.items()},
                num_reference=num_reference,
                image_size=image_size,
                image_channels=image_channels,
                apply_exif=apply_exif,
            )
        )
    checkpoints = {"": classifier} if isinstance(classifier, str) else dict(classifier or {})
    if checkpoints:
        check_labels(generated, {})
    classifiers = {name: open_classifier(path, real_sets, image_channels) for name, path in checkpoints.items()}
    known = {path: classifiers[name].num_classes for name, path in checkpoints.items()}
    if len(set(known.values())) > 1:
        raise ValueError(f"the classifiers are of different numbers of classes: {known}")
    classes = match_classes(real_sets, sample_sets, next(iter(known.values()), None))
    if checkpoints:
        check_labels(generated, classes.numbering)

    def selected(name: str, num_images: int | None, **settings: Any) -> Selection | None:
        images = (real_sets | sample_sets)[name]
        if images is None:
            return None
        numbering = classes.numbering.get(name)
        return Selection(images, num_images, num_classes=classes.count, numbering=numbering, **settings)

    real_selection = selected("held_out", num_images)
    selections = [selected(name, count, allow_uneven=True) for name in sample_sets]
    reference_selection = selected("reference", num_reference)
    autoencoders, lpips = load_autoencoders(made_runs, image_channels), load_lpips(lpips_weights, image_size)
    generators = load_generators(likelihood_runs, image_size, image_channels)
    reference_moments = reference_batch = None
    if reference_selection is None:
        reference_moments = reference_from_moments(reference, extractor, apply_exif=apply_exif)
    if rules is not None and rules.reference == "adm":
        # Its images serve precision and recall, its moments the distance.
        reference_batch = Selection(NpzImages(Path(reference), image_size), None, num_classes=None)

    # From here on every rank goes its own way through its shares.
    fabric.launch()
    device = fabric.device
    extractor = extractor.to(device)
    classifiers = {name: network.to(device) for name, network in classifiers.items()}
    classifier_hashes = [(name, path, _hash(path)) for name, path in checkpoints.items()]

    @cache
    def fingerprint(selection: Selection) -> str:
        return on_first_rank(selection.images.fingerprint)

    def run(selection: Selection, name: str, transform: Any = None, made_by: object = None) -> Measurement | None:
        return measure(
            selection,
            extractor,
            num_classes=classes.count,
            batch_size=batch_size,
            device=device,
            # Precision and recall alone need them, and they need those of the reference.
            most_features=None if reference_selection is not None or reference_batch is not None else 0,
            transform=transform,
            classifiers=classifiers,
            shares=shares,
            identity=(fingerprint(selection), made_by, classifier_hashes),
            description=name,
        )

    notes = [*classes.notes, *setting_notes(sample_runs, beside)]
    measured_against = reference_moments
    if reference_selection is not None:
        measured_against = reference_from_images(
            reference,
            reference_selection,
            extractor=extractor,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            folder=Path(output),
            shares=shares,
        )
        left_out = reference_selection.count - (measured_against.moments.count or 0) if measured_against else 0
        if left_out:
            notes.append(f"reference: {left_out:,} broken images were left out")
    if reference_batch is not None:
        assert reference_moments is not None
        batch = run(reference_batch, "images of the reference")
        measured_against = None if batch is None else replace(reference_moments, features=batch.features)
    manifold, reason = None, ""
    if measured_against is not None and rank() == 0:
        manifold, reason = reference_manifold(measured_against, count, device)
        if manifold is None:
            notes.append(f"precision and recall are not measured: {reason}")
    rows: list[Row] = []
    floor = None

    def add(run: Run, kind: Any, selection: Selection, measured: Measurement | None, **figures: Any) -> None:
        if measured is None or measured_against is None:
            return
        figures["source_sha256"] = _hash(run.path) if kind == "reconstructions" else fingerprint(selection)
        figures["labels"] = labels_of(selection, classes.count)
        found = on_first_rank(
            lambda: make_row(
                (run.row, kind, run.path), extractor, measured, measured_against, manifold, floor=floor, figures=figures
            )
        )
        rows.append(found)
        if kind != "reconstructions":
            notes.extend(selection.notes(run.label))
        if kind == "samples":
            notes.extend(class_notes(run.label, selection, classes.count, found))

    likelihood: dict[str, LikelihoodFigures | None] = {}
    if real_selection is not None:
        assert held_out is not None
        real_run = Run("held-out real images", "held-out real images", held_out)
        measured = run(real_selection, real_run.label)
        floor = measured and measured.spread
        add(real_run, "real", real_selection, measured)
        for made in made_runs:
            meter = ReconstructionMeter(
                autoencoders[made.label].to(device), None if lpips is None else lpips.to(device)
            )
            measured = run(real_selection, made.label, meter, (made.path, _hash(made.path), _hash(lpips_weights)))
            with whole_metrics():
                reconstruction = None if measured is None else meter.figures()
            add(made, "reconstructions", real_selection, measured, reconstruction=reconstruction)
        for path, generator in generators.items():
            likelihood[path] = measure_likelihood(
                generator.to(device),
                real_selection,
                checkpoint=path,
                batch_size=batch_size,
                device=device,
                shares=shares,
                identity=(fingerprint(real_selection), path, _hash(path)),
                description=path,
            )
    generator_of = {run.label: run.path for run in likelihood_runs}
    for sampled, selection in zip(sample_runs, selections, strict=True):
        assert selection is not None
        figures = {"likelihood": likelihood.get(generator_of.get(sampled.label, "")), **beside[sampled.label]}
        add(sampled, "samples", selection, run(selection, sampled.label), **figures)
    if shares.partial:
        if rank() == 0:
            print(f"Part {part} of {output!r}: `--join {shares.parts}` reports when all {shares.parts} parts are there")
        return {}
    assert measured_against is not None

    def write() -> dict[str, Any]:
        report = Report(
            rows,
            measured_against,
            manifold=manifold,
            image_size=image_size,
            classifiers=checkpoints,
            image_channels=image_channels,
            apply_exif=apply_exif,
            protocol=protocol,
            notes=notes,
            environment=environment(device),
        )
        report.write(Path(output))
        shares.clear()
        print(f"{report.markdown()}\nReport: {Path(output) / 'report.md'} and report.json")
        return report.to_dict()

    return on_first_rank(write)


def _shares(folder: Path, part: str | None, join: int | None) -> Shares:
    """Read which share of the evaluation this job has.

    Raises:
        ValueError: a part that is not one of several, or both of part and join.
    """
    if part is None and join is None:
        return Shares(folder=folder)
    if part is not None and join is not None:
        raise ValueError(f"part={part!r} measures, join={join} reports what all parts measured: give one of them")
    if join is not None:
        if join < 2:
            raise ValueError(f"join={join}: accepted is the number of parts, at least 2")
        return Shares(folder=folder, parts=join, join=True)
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or "")
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts or parts < 2:
        raise ValueError(f"part={part!r}: accepted is `i/n`, the i-th of n parts, such as 1/8, with 1 <= i <= n")
    return Shares(folder=folder, part=number, parts=parts)


def _hash(path: str | None) -> str | None:
    """Hash a file of weights; None where there is none."""
    return file_sha256(path) if path is not None and Path(path).is_file() else None
