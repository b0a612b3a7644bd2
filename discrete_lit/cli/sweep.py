"""`discrete-lit sweep`: the settings of a sampler, each measured on samples of one checkpoint, to the best of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from discrete_lit.checkpoints import load, weights_of
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.distributed import all_reduce_sum, failing_together, on_first_rank, rank
from discrete_lit.core.files import atomic_write_text, content_sha256, file_sha256
from discrete_lit.core.images import from_uint8
from discrete_lit.core.provenance import describe, environment
from discrete_lit.evaluation.classifier import load_classifier
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.drawn_images import draw_images, own_numbers
from discrete_lit.evaluation.feature_statistics import (
    FeatureMeter,
    Reference,
    reference_from_images,
    reference_from_moments,
)
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.evaluation.prompts import Prompts, chosen_prompts, class_of_prompts
from discrete_lit.evaluation.rows import manifold_for
from discrete_lit.evaluation.sampler_sweep import (
    Settings,
    SweepPoint,
    best_point,
    configuration,
    golden_section,
    grid,
    sweep_page,
    sweep_table,
    takes_whole_numbers,
    with_settings,
)
from discrete_lit.generators import Generator, LatentGenerator
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import holds_moments
from discrete_lit.metrics.precision_recall import precision_and_recall
from discrete_lit.samplers import GuidedSolver, MARSampler, Sampler


def sweep(
    ckpt_path: str,
    reference: str,
    *,
    output: str,
    settings: dict[str, list[int | float]],
    search: Literal["grid", "golden"] = "grid",
    evaluations: int = 8,
    sampler: Sampler | GuidedSolver | MARSampler | None = None,
    prompt: list[str] | None = None,
    prompt_file: str | None = None,
    negative_prompt: str | None = None,
    classifier: str | None = None,
    num_samples: int = 1000,
    num_reference: int | None = None,
    seed: int = 0,
    extractor: FeatureExtractor | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    precision: str = "32-true",
) -> dict[str, Any]:
    """Draw samples of one checkpoint with every combination of a sampler's settings, and find the nearest to real ones.

    All combinations draw with the same random numbers, so that their differences are those of the settings. What was
    measured is kept in `output/settings`: the same command goes on after an interruption, and a finer grid measures
    what is new in it alone.

    Writes `sweep.md`, `sweep.html` (with the figure of distance against network calls), `sweep.json`, and `best.yaml`,
    the best setting as `discrete-lit sample --config` takes it. The best of many is chosen on these samples: report its
    distance on samples of another seed.

    Args:
        ckpt_path: checkpoint of a generator of images; it carries its tokenizer.
        reference: images (shards, or a folder), or their moments, an npz.
        output: folder to write.
        settings: name of each setting to its values, for instance `{guidance_scale: [1, 1.5, 2], temperature: [0.9, 1],
            steps: [8, 16]}`; `solver.steps` is one of the sampler's solver.
        search: `grid` tries every combination; `golden` narrows the interval of the first setting, given as its two
            ends, by golden section, for every combination of the others: for a distance with one minimum there.
        evaluations: of each golden section.
        sampler: whose settings these are; the generator's own by default.
        prompt: texts to cycle through, sample i has prompt[i % len(prompt)], for a generator with a text encoder; the
            option repeated, or a list.
        prompt_file: a file with a prompt on each line, or GenEval's `.jsonl`, in place of `prompt`.
        negative_prompt: what guidance leads away from, in place of no text.
        classifier: checkpoint of an ImageClassifier, for the fraction of samples that show the intended class: that of
            their label, or the one that the prompts of a `.jsonl` include.
        num_samples: of each combination.
        num_reference: images of the reference; all by default.
        seed: of the draws.
        extractor: EfficientNetLite0 by default.
        batch_size: images at a time on each device.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        devices: on each node; more than one starts a process for each.
        num_nodes: nodes that run this command.
        precision: Lightning's, or `auto`.

    Returns:
        What `sweep.json` holds, on every rank.

    Raises:
        ValueError: no generator of images, a sampler of another kind, no settings, one that the sampler does not have,
            a value out of its range, an interval that is none; no prompts where they are read, a num_samples that does
            not have as many of each, or a classifier that knows no class of theirs.
    """
    generator = load(ckpt_path)
    if not isinstance(generator, Generator | LatentGenerator) or not generator.tokenizer.makes_images:
        raise ValueError(f"ckpt_path={ckpt_path!r} holds a {type(generator).__name__}, not a generator of images")
    if sampler is not None and not isinstance(sampler, generator.sampler_kind):
        raise ValueError(f"sampler={type(sampler).__name__} does not draw from a {type(generator).__name__}")
    if num_samples < 2 or batch_size < 1:
        raise ValueError(f"num_samples must be at least 2 and batch_size 1, got {num_samples} and {batch_size}")
    base = sampler or generator.sampler
    _check_settings(base, settings, search, evaluations)
    prompts = chosen_prompts(generator, prompt, prompt_file, negative_prompt)
    if prompts is not None:
        prompts.check_count(num_samples, "num_samples")
    network = extractor or EfficientNetLite0()
    selection = None
    if holds_moments(reference):
        known: Reference | None = reference_from_moments(reference, network, image_size=generator.image_size)
    else:
        channels = getattr(generator.tokenizer, "image_channels", 3)
        images = open_image_set(reference, generator.image_size, image_channels=channels)
        selection, known = Selection(images, num_reference, num_classes=images.num_classes), None
    judge, intended = None, torch.arange(generator.num_classes)
    if classifier is not None:
        judge = load_classifier(classifier)
        if prompts is not None:
            names = () if selection is None else selection.images.classes
            intended = _intended_classes(prompts, prompt_file, names)
        if int(intended.max()) >= judge.num_classes:
            raise ValueError(
                f"classifier={classifier!r} knows {judge.num_classes} classes, and the samples show one of number "
                f"{int(intended.max())}"
            )

    precision = resolve_precision(precision, accelerator)
    fabric = make_fabric(accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    fabric.launch()
    fabric.strategy.precision.convert_module(generator)
    judge = None if judge is None else judge.to(fabric.device)
    generator, network = generator.to(fabric.device).eval(), network.to(fabric.device)
    folder = Path(output)
    if selection is not None:
        known = reference_from_images(
            reference,
            selection,
            extractor=network,
            image_size=generator.image_size,
            batch_size=batch_size,
            device=fabric.device,
            folder=folder,
        )
    assert known is not None
    manifold = manifold_for(known, num_samples, fabric.device)[0] if rank() == 0 else None
    made_by: tuple[Any, ...] = (
        file_sha256(weights_of(ckpt_path)),
        known.sha256,
        known.moments.count,
        network.name,
        network.weights_sha256,
    )
    told = () if prompts is None else (prompts.texts, negative_prompt)
    judged_by = () if classifier is None else (file_sha256(classifier), intended.tolist())
    points: list[SweepPoint] = []

    def measure(changes: Settings) -> float:
        drawer: Any = with_settings(base, changes)
        identity = (*made_by, describe(drawer), num_samples, seed, batch_size, precision, *told, *judged_by)
        file = folder / "settings" / f"{content_sha256(repr(identity))[:16]}.json"
        found = on_first_rank(lambda: read_json(file) if file.is_file() else None)
        if found is None:
            meter = FeatureMeter(network, num_samples, most_features=None if known.features is not None else 0)
            cost, shown = (0, 0.0), torch.zeros((), device=fabric.device)
            with failing_together(), torch.inference_mode(), fabric.autocast():
                for numbers, _ in own_numbers(num_samples, batch_size):
                    drawn, out = draw_images(
                        generator,
                        numbers.to(fabric.device),
                        seed=seed,
                        sampler=drawer,
                        prompts=prompts,
                        negative=negative_prompt,
                    )
                    meter.update(drawn, None, numbers)
                    if judge is not None:
                        found_classes = judge(from_uint8(drawn)).argmax(dim=1)
                        wanted = intended[numbers % len(intended)].to(fabric.device)
                        shown += (found_classes == wanted).sum()
                    cost = (out.network_calls, float(out.flops))
            meter.restore(meter.tally().over_ranks(fabric.device))
            measured = meter.measurement()
            accuracy = None if judge is None else float(all_reduce_sum(shown)) / num_samples

            def compare() -> dict[str, Any]:
                distance = frechet_distance(measured.moments, known.moments)
                both = (None, None) if manifold is None else precision_and_recall(measured.features, manifold)
                point = SweepPoint(
                    settings=changes,
                    distance=distance,
                    precision=both[0],
                    recall=both[1],
                    accuracy=accuracy,
                    network_calls=cost[0],
                    flops_per_image=cost[1],
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(file, json.dumps(asdict(point)) + "\n")
                return asdict(point)

            # Rank 0 has the first batch always, and so the cost.
            found = on_first_rank(compare)
        points.append(SweepPoint(**{**found, "settings": changes}))
        return points[-1].distance

    if search == "grid":
        for changes in grid(settings):
            measure(changes)
    else:
        (name, (low, high)), *others = settings.items()
        for rest in grid(dict(others)):
            golden_section(lambda value, rest=rest: measure({name: value, **rest}), low, high, evaluations)

    def write() -> dict[str, Any]:
        fact = (
            f"{network.metric_name} of {num_samples:,} samples of {ckpt_path} against {known.moments.count or 'ADM'} "
            f"images of {reference}; seed {seed}, the same random numbers for every setting"
        )
        if prompts is not None:
            fact += f"; {len(prompts.texts):,} prompts in turn"
        if classifier is not None:
            fact += f"; accuracy: the fraction that shows the intended class, according to {classifier}"
        best = best_point(points)
        header, *lines = sweep_table(points, network.metric_name)
        table = [
            f"| {' | '.join(header)} |",
            f"|{'--:|' * len(header)}",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
        result = {
            "metric": network.metric_name,
            "fact": fact,
            "checkpoint_sha256": made_by[0],
            "reference_sha256": known.sha256,
            "prompts": None if prompts is None else list(prompts.texts),
            "negative_prompt": negative_prompt,
            "classifier": classifier,
            "best": asdict(best),
            "points": [asdict(point) for point in points],
            **environment(fabric.device),
        }
        sampler_settings = yaml.safe_dump(
            {"sampler": configuration(with_settings(base, best.settings))}, sort_keys=False
        )
        atomic_write_text(
            folder / "best.yaml", f"# {network.metric_name} {best.distance:.4g}: {fact}\n{sampler_settings}"
        )
        atomic_write_text(folder / "sweep.json", json.dumps(result, indent=2) + "\n")
        atomic_write_text(folder / "sweep.md", "\n".join(table) + f"\n\n- {fact}\n")
        atomic_write_text(folder / "sweep.html", sweep_page(points, network.metric_name, fact))
        print("\n".join(table) + f"\n\n{fact}\nBest: {best.name}, in {folder / 'best.yaml'}")
        return result

    return on_first_rank(write)


def _intended_classes(prompts: Prompts, file: str | None, names: Sequence[str]) -> torch.Tensor:
    """Number the class that each prompt asks for, int64 `(prompts,)`.

    Raises:
        ValueError: prompts that do not say their classes, a reference without names of classes, or an unknown class.
    """
    if prompts.metadata is None or file is None:
        raise ValueError("classifier needs to know what each prompt asks for: give a prompt_file of GenEval's .jsonl")
    if not names:
        raise ValueError(
            f"prompt_file={file!r} names classes, and the reference does not: give images in one subfolder per class, "
            "or shards with a manifest"
        )
    labels = class_of_prompts(file, names)
    return torch.tensor([labels[text] for text in prompts.texts])


def _check_settings(base: Any, settings: dict[str, list[int | float]], search: str, evaluations: int) -> None:
    """Refuse what cannot be swept before anything is drawn.

    Raises:
        ValueError: the reasons of `sweep`.
    """
    if not settings or not all(settings.values()):
        raise ValueError(f"settings={settings!r}: give each setting a list of values, such as guidance_scale: [1, 2]")
    for changes in grid(settings):
        with_settings(base, changes)
    if search == "golden":
        name, values = next(iter(settings.items()))
        if len(values) != 2 or not values[0] < values[1]:
            raise ValueError(f"settings.{name}={values}: search=golden takes the two ends of its interval")
        if evaluations < 2:
            raise ValueError(f"evaluations={evaluations}: search=golden needs at least 2")
        if takes_whole_numbers(base, name):
            raise ValueError(f"settings.{name} takes whole numbers: search=golden is for others, search=grid for these")
