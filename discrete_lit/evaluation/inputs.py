"""The inputs of an evaluation: runs of each row, sets of images, classes, checkpoints; checked before one is measured.

A mistake in the last row must not cost the time of the first: `open_inputs` opens and checks everything, and
`cli/evaluate.py` measures then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.data.transforms import MODES
from discrete_lit.evaluation.compared_images import NO_CLASS, ClassMatch, Selection, match_classes
from discrete_lit.evaluation.image_sets import ImageSet, NpzImages, open_image_set
from discrete_lit.evaluation.prompts import PromptedImages, Prompts, class_of_prompts
from discrete_lit.evaluation.protocols import PROTOCOLS, EvaluationInputs
from discrete_lit.metrics.extractors import SPATIAL, EfficientNetLite0, FeatureExtractor

# The other imports stand in the functions: torchmetrics and Lightning take seconds, which
# `discrete-lit evaluate --help` does not wait for.
if TYPE_CHECKING:
    from discrete_lit.evaluation.classifier import ImageClassifier
    from discrete_lit.evaluation.feature_statistics import Reference
    from discrete_lit.generators import Generator
    from discrete_lit.metrics.moments import Moments
    from discrete_lit.tokenizers import PerturbedTokenizer
    from discrete_lit.tokenizers.losses.perceptual import LPIPS


PERTURBED_NEIGHBOURS = 10
"""How many near ids one that is perturbed may become, by default."""


@dataclass(frozen=True, kw_only=True)
class OpenedInputs:
    """Everything that an evaluation compares: sets whose images are not yet read, and networks on the CPU."""

    samples: list[Run]
    reconstructions: list[Run]
    likelihoods: list[Run]
    selections: dict[str, Selection]
    """The images of each run of samples, by its label."""
    beside: dict[str, dict[str, Any]]
    """The cost and the picture that stand beside each run of samples, by its label: fields of its row."""
    held_out: Selection | None
    count: int | None
    """Images of a row."""
    reference_images: Selection | None
    reference_moments: Reference | None
    """None of a reference of images."""
    reference_batch: Selection | None
    """Images that such a file of ADM holds too, for precision and recall."""
    reference_spatial: Moments | None
    """Moments of spatial features of such a file, for sFID."""
    classes: ClassMatch
    extractor: FeatureExtractor
    classifiers: dict[str, ImageClassifier]
    classifier_paths: dict[str, str]
    autoencoders: dict[str, Any]
    """The autoencoder of each run of reconstructions, by its label."""
    perturbed: dict[str, list[PerturbedTokenizer]]
    """Tokenizers among them whose ids have codes, at each rate of perturbed ids that was asked for."""
    lpips: LPIPS | None
    generators: dict[str, Generator]
    """The generator of each checkpoint of a likelihood, by its path."""
    notes: list[str]


def open_inputs(
    reference: str,
    *,
    image_size: ImageSize,
    image_channels: int,
    num_images: int | None,
    samples: dict[str, str | list[str]] | None,
    reconstructions: dict[str, str | list[str]] | None,
    likelihoods: dict[str, str | list[str]] | None,
    held_out: str | None,
    num_reference: int | None,
    extractor: FeatureExtractor | None,
    classifier: str | dict[str, str] | None,
    lpips_weights: str | None,
    apply_exif: bool,
    batch_size: int,
    protocol: str | None,
    perturbed: list[float] | None = None,
    perturbed_neighbours: int = PERTURBED_NEIGHBOURS,
    prompts: str | None = None,
) -> OpenedInputs:
    """Open everything that an evaluation names; arguments as for `evaluate`.

    Raises:
        ValueError: the reasons of `evaluate` that are known before an image is read.
    """
    from discrete_lit.evaluation.feature_statistics import reference_from_moments
    from discrete_lit.metrics.moments import Moments, holds_moments

    image_size = normal_size(image_size)
    rules = None if protocol is None else PROTOCOLS[protocol]
    num_images = num_images if rules is None or num_images is not None else rules.count
    if image_channels not in MODES:
        raise ValueError(f"image_channels is {image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    sample_runs, made_runs = _list_runs("samples", samples), _list_runs("reconstructions", reconstructions)
    likelihood_runs = _list_runs("likelihoods", likelihoods)
    _check_arguments(sample_runs, made_runs, likelihood_runs, held_out, num_images, num_reference, batch_size)
    if lpips_weights is not None and not made_runs:
        raise ValueError("lpips_weights measure reconstructions: give some, or leave lpips_weights out")
    _check_rates(perturbed, perturbed_neighbours, made_runs)

    def opened(path: str) -> ImageSet:
        return open_image_set(path, image_size, image_channels=image_channels, apply_exif=apply_exif)

    reference_images = None if holds_moments(reference) else opened(reference)
    real = None if held_out is None else opened(held_out)
    generated = {run.label: opened(run.path) for run in sample_runs}
    beside = {run.label: _read_run(run.path) for run in sample_runs}
    count = num_images if real is None else (num_images or real.count)
    if extractor is None:
        extractor = EfficientNetLite0() if rules is None else rules.default_extractor()
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
                sizes={f"samples.{label}": images.count for label, images in generated.items()},
                num_reference=num_reference,
                image_size=image_size,
                image_channels=image_channels,
                apply_exif=apply_exif,
            )
        )

    real_sets = {"reference": reference_images, "held_out": real}
    if prompts is not None:
        generated = _label_by_prompts(prompts, sample_runs, beside, real_sets, count, image_channels=image_channels)
    checkpoints = {"": classifier} if isinstance(classifier, str) else dict(classifier or {})
    if checkpoints:
        _check_labels(generated, {})
    classifiers = {name: _open_classifier(path, real_sets, image_channels) for name, path in checkpoints.items()}
    known = {path: classifiers[name].num_classes for name, path in checkpoints.items()}
    if len(set(known.values())) > 1:
        raise ValueError(f"the classifiers are of different numbers of classes: {known}")
    sample_sets = {f"samples.{label}": images for label, images in generated.items()}
    classes = match_classes(real_sets, sample_sets, next(iter(known.values()), None))
    if checkpoints:
        _check_labels(generated, classes.numbering)

    def selected(name: str, images: ImageSet, num_images: int | None, *, allow_uneven: bool = False) -> Selection:
        numbering = classes.numbering.get(name)
        return Selection(images, num_images, num_classes=classes.count, numbering=numbering, allow_uneven=allow_uneven)

    real_selection = None if real is None else selected("held_out", real, num_images)
    selections = {
        label: selected(f"samples.{label}", images, count, allow_uneven=True) for label, images in generated.items()
    }
    of_reference = None if reference_images is None else selected("reference", reference_images, num_reference)
    autoencoders, lpips = _load_autoencoders(made_runs, image_channels), _load_lpips(lpips_weights, image_size)
    generators = _load_generators(likelihood_runs, image_size, image_channels)
    disturbed, without_codes = _perturb(autoencoders, perturbed or [], perturbed_neighbours)
    moments = batch = spatial = None
    if reference_images is None:
        moments = reference_from_moments(reference, extractor, apply_exif=apply_exif, image_size=image_size)
        if rules is not None and rules.reference == "adm":
            # Its images serve precision and recall, its moments the distance.
            batch = Selection(NpzImages(Path(reference), image_size), None, num_classes=None)
            spatial = Moments.load(reference, extractor.space(SPATIAL))
    return OpenedInputs(
        samples=sample_runs,
        reconstructions=made_runs,
        likelihoods=likelihood_runs,
        selections=selections,
        beside=beside,
        held_out=real_selection,
        count=count,
        reference_images=of_reference,
        reference_moments=moments,
        reference_batch=batch,
        reference_spatial=spatial,
        classes=classes,
        extractor=extractor,
        classifiers=classifiers,
        classifier_paths=checkpoints,
        autoencoders=autoencoders,
        perturbed=disturbed,
        lpips=lpips,
        generators=generators,
        notes=[*classes.notes, *_setting_notes(sample_runs, beside), *without_codes],
    )


class Run(NamedTuple):
    """One run of a row: a set of samples, or a checkpoint."""

    row: str
    label: str
    """The name of the row, and of which run where it has several."""
    path: str


def _list_runs(setting: str, rows: dict[str, str | list[str]] | None) -> list[Run]:
    """List the runs of each row that a setting names, in order.

    Raises:
        ValueError: a row without runs.
    """
    from discrete_lit.evaluation.report_table import run_name

    found = []
    for name, given in (rows or {}).items():
        paths = [given] if isinstance(given, str) else list(given)
        if not paths:
            raise ValueError(f"{setting}.{name} is empty: give a path, or a list with one for each run")
        found += [Run(name, run_name(name, run, len(paths)), path) for run, path in enumerate(paths, start=1)]
    return found


def _label_by_prompts(
    file: str,
    sample_runs: list[Run],
    beside: Mapping[str, dict[str, Any]],
    real_sets: Mapping[str, ImageSet | None],
    count: int | None,
    *,
    image_channels: int,
) -> dict[str, ImageSet]:
    """Open samples of prompts, labelled by the classes that a file names of their prompts.

    Raises:
        ValueError: real images without names of classes, samples that were not drawn of prompts, a number of images
            that does not have as many of each prompt, or the reasons of `class_of_prompts` and `PromptedImages`.
    """
    named = next((images for images in real_sets.values() if images is not None and images.classes), None)
    if named is None:
        raise ValueError(
            f"prompts={file!r} names classes, and neither reference nor held_out does: give images in one subfolder "
            "per class, or shards with a manifest"
        )
    labels, found = class_of_prompts(file, named.classes), {}
    for run in sample_runs:
        texts = beside[run.label].get("sampling", {}).get("prompts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"samples.{run.label}={run.path!r} has no run.json beside it that says its prompts: draw it by "
                "`discrete-lit sample --prompt_file`"
            )
        if count is not None:
            Prompts(texts=tuple(texts)).check_count(count, "num_images")
        found[run.label] = PromptedImages(
            Path(run.path).expanduser(),
            named.image_size,
            image_channels=image_channels,
            prompts=texts,
            classes=named.classes,
            labels=labels,
        )
    return found


def _setting_notes(sample_runs: list[Run], beside: Mapping[str, dict[str, Any]]) -> list[str]:
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
    samples: list[Run],
    reconstructions: list[Run],
    likelihoods: list[Run],
    held_out: str | None,
    num_images: int | None,
    num_reference: int | None,
    batch_size: int,
) -> None:
    if reconstructions and held_out is None:
        raise ValueError("reconstructions are made of the held-out images: give held_out")
    if likelihoods and held_out is None:
        raise ValueError("likelihoods are of the held-out images: give held_out")
    if not samples and held_out is None:
        raise ValueError("nothing to evaluate: give samples (name: path), held_out, or both")
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


def _read_run(samples: str) -> dict[str, Any]:
    """Read `run.json` beside an npz of samples, and find the picture there: fields of its row.

    Raises:
        ValueError: a run.json that cannot be read.
    """
    from discrete_lit.evaluation.report_table import COSTS

    if not samples.endswith(".npz"):
        return {}
    run, picture = (Path(samples).expanduser().parent / name for name in ("run.json", "grid.png"))
    found: dict[str, Any] = {"picture": str(picture)} if picture.is_file() else {}
    if run.is_file():
        try:
            found["sampling"] = read_json(run)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(run)!r} cannot be read as JSON: {error}") from error
        if not isinstance(found["sampling"], dict):
            raise ValueError(f"{str(run)!r} must hold an object, it holds {type(found['sampling']).__name__}")
        for key in COSTS:
            value = found["sampling"].get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{str(run)!r}: {key} is {value!r}, it must be a number")
    return found


def _load_autoencoders(checkpoints: list[Run], image_channels: int) -> dict[str, Any]:
    """Load the autoencoder of each checkpoint, on the CPU.

    Raises:
        ValueError: a checkpoint that cannot be read, holds a generator or takes other channels.
    """
    from discrete_lit import checkpoints as files
    from discrete_lit.generators import Generator, LatentGenerator, TokenDiffusionDecoder

    autoencoders = {}
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
        autoencoders[name] = autoencoder
    return autoencoders


def _check_rates(rates: list[float] | None, neighbours: int, reconstructions: list[Run]) -> None:
    if rates is None:
        if neighbours != PERTURBED_NEIGHBOURS:
            raise ValueError(f"perturbed_neighbours={neighbours} has no effect: give the rates, perturbed, too")
        return
    if not reconstructions:
        raise ValueError(f"perturbed={rates} is of the ids of reconstructions: give some, or leave perturbed out")
    if not rates or not all(0 <= rate <= 1 for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ValueError(f"perturbed={rates}: accepted are rates in [0, 1], each once, such as [0.1, 0.3]")


def _perturb(
    autoencoders: Mapping[str, Any], rates: list[float], neighbours: int
) -> tuple[dict[str, list[PerturbedTokenizer]], list[str]]:
    """Perturb each tokenizer at each rate: by the label of its run, and notes of those that cannot be.

    Raises:
        ValueError: not one can be.
    """
    from discrete_lit.tokenizers import PerturbedTokenizer

    found, notes = {}, []
    for label, autoencoder in autoencoders.items() if rates else ():
        try:
            found[label] = [PerturbedTokenizer(autoencoder, rate, neighbours=neighbours) for rate in rates]
        except ValueError as error:
            notes.append(f"{label} is not measured with perturbed ids: {error}")
    if notes and not found:
        raise ValueError(f"perturbed={rates} can be measured of no row: {'; '.join(notes)}")
    return found, notes


def _load_lpips(weights: str | None, image_size: ImageSize) -> LPIPS | None:
    """Load LPIPS, on the CPU, where its weights are given.

    Raises:
        ValueError: weights that are not LPIPS's, or images too small for it.
    """
    from discrete_lit.tokenizers.losses.perceptual import LPIPS

    if weights is None:
        return None
    lpips = LPIPS(weights)
    lpips.prepare()
    lpips.check_size(image_size)
    return lpips


def _check_channels(module: Any, image_channels: int, what: str) -> None:
    """Raise a ValueError where it is known that a module takes images of other channels."""
    expected = getattr(module, "image_channels", None)
    if expected not in (None, image_channels):
        raise ValueError(f"{what} takes images of {expected} channels, image_channels is {image_channels}")


def _open_classifier(checkpoint: str, sets: dict[str, ImageSet | None], image_channels: int) -> ImageClassifier:
    """Load a classifier, on the CPU.

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
    return classifier


def _load_generators(likelihoods: list[Run], image_size: ImageSize, image_channels: int) -> dict[str, Generator]:
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
