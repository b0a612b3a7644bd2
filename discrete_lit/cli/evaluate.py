"""`discrete-lit evaluate`: sets of images against a reference, to a report.

Everything is opened and checked first (`evaluation/inputs.py`), then each set is measured, on all ranks
(`evaluation/shares.py`), and becomes a row (`evaluation/rows.py`) of the report.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discrete_lit.core.array_parts import Part, PartsFolder, check_join, find_part, tell_missing, tell_part
from discrete_lit.core.distributed import on_first_rank, rank
from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import ImageSize, from_uint8, normal_size, to_uint8
from discrete_lit.core.provenance import describe, environment
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.inputs import PERTURBED_NEIGHBOURS, OpenedInputs, Run, open_inputs
from discrete_lit.evaluation.protocols import ProtocolName, labels_of
from discrete_lit.evaluation.shares import Shares, whole_metrics
from discrete_lit.metrics.extractors import LOGITS, SPATIAL, FeatureExtractor

# The other imports stand in the functions: torchmetrics and Lightning take seconds, which
# `discrete-lit evaluate --help` does not wait for.
if TYPE_CHECKING:
    from discrete_lit.evaluation.feature_statistics import Measurement, Reference
    from discrete_lit.evaluation.held_out_likelihood import LikelihoodFigures
    from discrete_lit.evaluation.report_table import PerturbedDistance, Row
    from discrete_lit.metrics.precision_recall import ClassSpread, Manifold


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
    perturbed: list[float] | None = None,
    perturbed_neighbours: int = PERTURBED_NEIGHBOURS,
    apply_exif: bool = False,
    batch_size: int = 16,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    protocol: ProtocolName | None = None,
    prompts: str | None = None,
    captions: dict[str, str] | None = None,
    part: str | None = None,
    join: int | None = None,
    missing: bool = False,
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
        reconstructions: name in the table to the checkpoint of a tokenizer, or of a diffusion decoder of its tokens,
            which reconstructs the held-out images, or to those of several runs.
        likelihoods: name of samples to the checkpoint of their generator, to measure its log-likelihood of the held-out
            images, or to one for each run, in their order; a checkpoint that is named several times is measured once.
        held_out: real images that are not in the reference; their own row is the floor of the distance.
        num_reference: images of the reference; all by default.
        extractor: that of the protocol, or else EfficientNetLite0, by default; `InceptionV3` gives FID.
        classifier: checkpoint of an ImageClassifier, or name to checkpoint of several, each with its own label
            accuracy: a generator that pleases one classifier need not please another, trained on other images.
        lpips_weights: VGG-16's weights (torchvision's `vgg16-397923af.pth`), to measure LPIPS of reconstructions too.
        perturbed: rates in [0, 1], such as `[0.1, 0.3]`: measure the distance of the reconstructions also with each id
            replaced, with that probability, by a near one (pFID; Qiu et al., 2025), in a column for each rate. A
            KL-VAE, and other autoencoders without codes behind their ids, are left out with a note.
        perturbed_neighbours: how many ids count as near ones: those of the nearest codes, all as likely.
        apply_exif: turn image files as their EXIF orientation says: give it where the DataModule of the training has
            `apply_exif: true`. Published figures do not.
        batch_size: images at a time.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        devices: on each node; more than one starts a process for each.
        num_nodes: nodes that run this command.
        protocol: name of a published protocol, which then names the distance; inputs that do not meet it are refused.
            See `discrete_lit.evaluation.protocols`.
        prompts: a `.jsonl` that says which class each prompt of the samples asks for, a line for each as
            `{"prompt": "a dark coat", "include": [{"class": "Coat", "count": 1}]}` (GenEval's form): the samples, drawn
            by `discrete-lit sample` of prompts, are labelled so, and label accuracy is how often the classifier finds
            the class of the prompt.
        captions: name to a file that `discrete-lit caption` wrote: the share of its captions that are one of those
            beside their images, but for spaces and capitals.
        part: `i/n`, to measure the i-th of n parts of every set, i from 1, and report nothing; `slurm` for the number
            of this job in its SLURM array.
        join: n, to report what n parts measured; the images and networks are read, but no image is measured again.
        missing: measure nothing, and print the numbers of the parts that are left, as an array of sbatch takes them;
            the exit status is 1 if there are any.

    Returns:
        What `report.json` holds, on every rank; nothing for a part; `{"missing": [...]}` where that is asked for.

    Raises:
        ValueError: no row, a set that is missing, too small or of another image size, classes that cannot be matched,
            a classifier of other classes or for samples without labels, a reference that is no mean and covariance or
            of another extractor, a checkpoint of the wrong kind, a row without runs, or with one of them twice,
            parts that are not there, rates out of [0, 1] or of ids that no row has, prompts of an unknown class or
            that do not fit the number of images, an image without a caption, or inputs that do not meet the protocol.
    """
    from discrete_lit.cli.devices import make_fabric
    from discrete_lit.evaluation.caption_match import match_captions
    from discrete_lit.evaluation.report import Report

    if missing:
        return tell_missing(output, "evaluate", "report.json")
    check_join(part, join)
    own_part, parts = find_part(part, output, "evaluate"), PartsFolder(output, "evaluate")
    shares = _shares(Path(output) / "shares", own_part, join)
    settings = {
        "reference": reference,
        "image_size": normal_size(image_size),
        "image_channels": image_channels,
        "num_images": num_images,
        "samples": samples,
        "reconstructions": reconstructions,
        "likelihoods": likelihoods,
        "held_out": held_out,
        "num_reference": num_reference,
        "extractor": describe(extractor),
        "classifier": classifier,
        "lpips_weights": lpips_weights,
        "perturbed": perturbed,
        "perturbed_neighbours": perturbed_neighbours,
        "apply_exif": apply_exif,
        "batch_size": batch_size,
        "protocol": protocol,
        "prompts": prompts,
    }
    if join is not None and parts.plan is not None:
        parts.check_complete(join, settings)
    fabric = make_fabric(accelerator, devices=devices, num_nodes=num_nodes)
    opened = open_inputs(
        reference,
        image_size=image_size,
        image_channels=image_channels,
        num_images=num_images,
        samples=samples,
        reconstructions=reconstructions,
        likelihoods=likelihoods,
        held_out=held_out,
        num_reference=num_reference,
        extractor=extractor,
        classifier=classifier,
        lpips_weights=lpips_weights,
        apply_exif=apply_exif,
        batch_size=batch_size,
        protocol=protocol,
        perturbed=perturbed,
        perturbed_neighbours=perturbed_neighbours,
        prompts=prompts,
    )
    matches = {name: match_captions(file, f"captions.{name}") for name, file in (captions or {}).items()}
    # From here on every rank goes its own way through its shares.
    fabric.launch()
    if own_part is not None:
        on_first_rank(lambda: parts.begin(own_part, settings, lambda: None))
    measured = _Evaluation(opened, reference, folder=Path(output), batch_size=batch_size, shares=shares)
    measured.run(fabric.device, held_out=held_out, lpips_weights=lpips_weights)
    if own_part is not None:
        on_first_rank(lambda: parts.finish(own_part, {}))
        return tell_part(own_part, output)

    def write() -> dict[str, Any]:
        assert measured.reference is not None
        report = Report(
            measured.rows,
            measured.reference,
            manifold=measured.manifold,
            image_size=normal_size(image_size),
            classifiers=opened.classifier_paths,
            image_channels=image_channels,
            apply_exif=apply_exif,
            protocol=protocol,
            notes=measured.notes,
            captions=matches,
            environment=environment(fabric.device),
        )
        report.write(Path(output))
        shares.clear()
        if join is not None:
            parts.clear()
        print(f"{report.markdown()}\nReport: {Path(output) / 'report.md'} and report.json")
        return report.to_dict()

    return on_first_rank(write)


class _Evaluation:
    """Measure what was opened, set by set, and gather rows and notes; those of a part alone stay empty."""

    def __init__(
        self, opened: OpenedInputs, reference_name: str, *, folder: Path, batch_size: int, shares: Shares
    ) -> None:
        self.opened, self.reference_name = opened, reference_name
        self.folder, self.batch_size, self.shares = folder, batch_size, shares
        self.device = torch.device("cpu")
        self.reference: Reference | None = None
        self.manifold: Manifold | None = None
        """The manifold of the reference's features, on rank 0."""
        self.floor: ClassSpread | None = None
        """The spread of the classes of the held-out images."""
        self.rows: list[Row] = []
        self.notes = list(opened.notes)
        self._fingerprints: dict[Path, str] = {}

    def run(self, device: torch.device, *, held_out: str | None, lpips_weights: str | None) -> None:
        """Measure the reference, the held-out images and what is made of them, and the samples."""
        opened, self.device = self.opened, device
        opened.extractor.to(device)
        for classifier in opened.classifiers.values():
            classifier.to(device)
        self._measure_reference()
        likelihoods: dict[str, LikelihoodFigures | None] = {}
        if opened.held_out is not None:
            assert held_out is not None
            self._measure_held_out(opened.held_out, held_out, lpips_weights)
            likelihoods = self._measure_likelihoods(opened.held_out)
        generator_of = {run.label: run.path for run in opened.likelihoods}
        for sampled in opened.samples:
            selection = opened.selections[sampled.label]
            figures = {
                "likelihood": likelihoods.get(generator_of.get(sampled.label, "")),
                **opened.beside[sampled.label],
            }
            self._add(sampled, "samples", selection, self._measure(selection, sampled.label), **figures)

    def _measure_reference(self) -> None:
        from discrete_lit.evaluation.feature_statistics import reference_from_images
        from discrete_lit.evaluation.rows import manifold_for

        opened = self.opened
        self.reference = opened.reference_moments
        if opened.reference_images is not None:
            self.reference = reference_from_images(
                self.reference_name,
                opened.reference_images,
                extractor=opened.extractor,
                image_size=opened.reference_images.images.image_size,
                batch_size=self.batch_size,
                device=self.device,
                folder=self.folder,
                shares=self.shares,
            )
            if self.reference is not None:
                left_out = opened.reference_images.count - (self.reference.moments.count or 0)
                if left_out:
                    self.notes.append(f"reference: {left_out:,} broken images were left out")
        if opened.reference_batch is not None:
            assert self.reference is not None
            batch = self._measure(opened.reference_batch, "images of the reference")
            self.reference = None if batch is None else replace(self.reference, features=batch.features)
        if self.reference is not None and rank() == 0:
            self.manifold, reason = manifold_for(self.reference, self.opened.count, self.device)
            if self.manifold is None:
                self.notes.append(f"precision and recall are not measured: {reason}")

    def _measure_held_out(self, selection: Selection, path: str, lpips_weights: str | None) -> None:
        """Measure the held-out images, the floor of the distance, and their reconstructions."""
        from discrete_lit.metrics.reconstruction import ReconstructionMeter

        real = Run("held-out real images", "held-out real images", path)
        measured = self._measure(selection, real.label)
        self.floor = None if measured is None else measured.spread
        self._add(real, "real", selection, measured)
        lpips = None if self.opened.lpips is None else self.opened.lpips.to(self.device)
        for made in self.opened.reconstructions:
            meter = ReconstructionMeter(self.opened.autoencoders[made.label].to(self.device), lpips)
            made_by = made.path, _hash(made.path), _hash(lpips_weights)
            measured = self._measure(selection, made.label, meter, made_by)
            with whole_metrics():
                figures = None if measured is None else meter.figures()
            disturbed = self._measure_perturbed(selection, made)
            self._add(made, "reconstructions", selection, measured, reconstruction=figures, perturbed=disturbed)

    def _measure_perturbed(self, selection: Selection, made: Run) -> tuple[PerturbedDistance, ...]:
        """Measure the distance of a tokenizer's reconstructions at each rate of perturbed ids."""
        from discrete_lit.evaluation.report_table import PerturbedDistance
        from discrete_lit.metrics.frechet import frechet_distance

        found = []
        for tokenizer in self.opened.perturbed.get(made.label, []):
            tokenizer.to(self.device)

            def reconstruct(images: Tensor, tokenizer: Any = tokenizer) -> Tensor:
                return to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(images))))

            how = tokenizer.rate, tokenizer.neighbours, tokenizer.seed
            name = f"{made.label}, {tokenizer.rate:g} of its ids perturbed"
            made_by = made.path, _hash(made.path), "perturbed", *how
            measured = self._measure(selection, name, reconstruct, made_by, distance_alone=True)
            if measured is not None and self.reference is not None:
                both = measured.moments, self.reference.moments
                value = on_first_rank(partial(frechet_distance, *both, names=(name, self.reference.name)))
                rate, neighbours, seed = how
                found.append(PerturbedDistance(rate=rate, neighbours=neighbours, seed=seed, value=value))
        return tuple(found)

    def _measure_likelihoods(self, selection: Selection) -> dict[str, LikelihoodFigures | None]:
        from discrete_lit.evaluation.held_out_likelihood import measure_likelihood

        return {
            path: measure_likelihood(
                generator.to(self.device),
                selection,
                checkpoint=path,
                batch_size=self.batch_size,
                device=self.device,
                shares=self.shares,
                identity=(self._fingerprint(selection), path, _hash(path)),
                description=path,
            )
            for path, generator in self.opened.generators.items()
        }

    def _measure(
        self,
        selection: Selection,
        name: str,
        transform: Any = None,
        made_by: object = None,
        *,
        distance_alone: bool = False,
    ) -> Measurement | None:
        from discrete_lit.evaluation.feature_statistics import measure
        from discrete_lit.metrics.classifier_scores import InceptionScore
        from discrete_lit.metrics.moments import FeatureMoments

        opened = self.opened
        # Precision and recall alone need features, and they need those of the reference.
        keeps = not distance_alone and (opened.reference_images is not None or opened.reference_batch is not None)
        scores = {}
        if not distance_alone and opened.reference_spatial is not None and selection is not opened.reference_batch:
            scores["spatial"] = FeatureMoments(opened.extractor.space(SPATIAL))
            scores["inception"] = InceptionScore(opened.extractor.space(LOGITS), selection.count)
        classifiers = [(name, path, _hash(path)) for name, path in opened.classifier_paths.items()]
        return measure(
            selection,
            opened.extractor,
            num_classes=None if distance_alone else opened.classes.count,
            batch_size=self.batch_size,
            device=self.device,
            most_features=None if keeps else 0,
            transform=transform,
            classifiers=opened.classifiers,
            scores=scores,
            shares=self.shares,
            identity=(self._fingerprint(selection), made_by, classifiers),
            description=name,
        )

    def _fingerprint(self, selection: Selection) -> str:
        path = selection.images.path
        if path not in self._fingerprints:
            self._fingerprints[path] = on_first_rank(selection.images.fingerprint)
        return self._fingerprints[path]

    def _add(self, run: Run, kind: Any, selection: Selection, measured: Measurement | None, **figures: Any) -> None:
        """Make a row of what was measured of a set, where that is the whole of it."""
        from discrete_lit.evaluation.rows import class_notes, make_row

        reference = self.reference
        if measured is None or reference is None:
            return
        classes = self.opened.classes.count
        figures["source_sha256"] = _hash(run.path) if kind == "reconstructions" else self._fingerprint(selection)
        figures["labels"] = labels_of(selection, classes)
        spatial = self.opened.reference_spatial
        row = on_first_rank(
            lambda: make_row(
                (run.row, kind, run.path),
                self.opened.extractor,
                measured,
                reference,
                self.manifold,
                floor=self.floor,
                spatial=spatial,
                figures=figures,
            )
        )
        self.rows.append(row)
        if kind != "reconstructions":
            self.notes.extend(selection.notes(run.label))
        if kind == "samples":
            self.notes.extend(class_notes(run.label, selection, classes, row))


def _shares(folder: Path, part: Part | None, join: int | None) -> Shares:
    """Say which share of the evaluation this job has."""
    if join is not None:
        return Shares(folder=folder, parts=join, join=True)
    return Shares(folder=folder) if part is None else Shares(folder=folder, part=part.number, parts=part.parts)


def _hash(path: str | None) -> str | None:
    """Hash a file of weights; None where there is none."""
    return file_sha256(path) if path is not None and Path(path).is_file() else None
