"""The Fréchet distance beside torchmetrics' and SciPy's, and what evaluations cost beside the features they are of.

    OMP_NUM_THREADS=2 python benchmarks/feature_metrics.py
    OMP_NUM_THREADS=2 python benchmarks/feature_metrics.py --parts distance --width 512

`distance`: first `compute` of `FrechetDistance` and of torchmetrics' `FrechetInceptionDistance`, both in float64 from
the sums over two sets of 5,000 features whose variances fall as 1/k, in turns; then the distance by SciPy's `sqrtm` of
the same moments, once. Then all three for a set of half as many images as features, at a quarter of the width.

`measures`: batches of 16 images of 224 pixels through EfficientNet-Lite0 and through Inception with random weights, at
256 pixels: what the updates of the Fréchet distance, KID, precision and recall, density and coverage and MIND together,
and with Inception sFID and the Inception Score, take beside the features that they are given.

`evaluation`: `discrete-lit evaluate` of an npz of samples, from reading them to the report, with precision and recall,
against a reference that an earlier evaluation kept; beside it the features that it extracts itself meanwhile, which a
busy machine slows as much, and the features alone, of the same images in memory. By EfficientNet-Lite0, and by
Inception with random weights a fifth of the images.

`ranks`: the same samples measured by two gloo ranks of one thread each, and by one of one thread; and what extraction
alone gains, whose processes share caches and memory.

`callback`: `ImageDistance` behind a training step of a masked generator, with precision and recall; beside it drawing,
decoding and extracting alone.

The table at the end has every figure beside its target. All parts take about twenty minutes on two cores.
"""

import argparse
import io
import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from side_by_side.timing import Seconds, alternate, clock, milliseconds, ratio, since
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from discrete_lit.backbones import Transformer
from discrete_lit.callbacks import ImageDistance
from discrete_lit.callbacks.image_grids import undisturbed
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.core.allocator import keep_freed_memory
from discrete_lit.core.files import file_sha256
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.drawn_images import draw_images, own_numbers
from discrete_lit.evaluation.feature_statistics import measure
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.generators import Masked
from discrete_lit.metrics import (
    DensityCoverage,
    EfficientNetLite0,
    FeatureMoments,
    FeatureSet,
    FeatureSpace,
    FrechetDistance,
    ImageMetrics,
    InceptionScore,
    InceptionV3,
    KernelDistance,
    Moments,
    PrecisionRecall,
    SlicedWasserstein,
)
from discrete_lit.metrics import extractors as extractor_file
from discrete_lit.metrics.extractors import FeatureExtractor, FeatureSource
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

SPEED_TARGET, ERROR_TARGET, ADDED_TARGET, RANKS_TARGET = 3.0, 1e-6, 0.05, 1.8
BATCH = 16
SIZE = 64
"""Pixels of the images of whole evaluations; the extractor resizes them."""
PARTS = ("distance", "measures", "evaluation", "ranks", "callback")


class Figure(NamedTuple):
    """A figure beside its target."""

    name: str
    value: str
    target: str
    met: bool


def at_least(name: str, numerator: list[Seconds], denominator: list[Seconds], target: float) -> Figure:
    """How many times as long the numerator takes, by the wall clock: the median of the rounds."""
    value = median_ratio(numerator, denominator)
    return Figure(name, f"{value:.2f}x", f"at least {target:g}x", value >= target)


def at_most(name: str, numerator: list[Seconds], denominator: list[Seconds], target: float) -> Figure:
    value = median_ratio(numerator, denominator)
    return Figure(name, f"{value:.3f}x", f"at most {target:g}x", value <= target)


def median_ratio(numerator: list[Seconds], denominator: list[Seconds]) -> float:
    return median(above.wall / below.wall for above, below in zip(numerator, denominator, strict=True))


def features(count: int, width: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, width + 1).rsqrt()
    return torch.randn(count, width, generator=random) * deviations * (1 + 0.1 * seed) + 0.3


def space(width: int) -> FeatureSpace:
    return FeatureSpace(name="random", dim=width, protocol="none", weights_sha256="0" * 64, metric_name="FD-random")


def ours(samples: Tensor, reference: Tensor) -> tuple[Callable[[], float], Moments, Moments]:
    summed = [FeatureMoments(space(samples.shape[1])) for _ in range(2)]
    for moments, given in zip(summed, (samples, reference), strict=True):
        moments.update(given)
    metric = FrechetDistance(space(samples.shape[1]), summed[1].compute())
    metric.update(samples)

    def compute() -> float:
        metric._computed = None  # it remembers
        return float(metric.compute())

    return compute, summed[0].compute(), summed[1].compute()


def of_torchmetrics(samples: Tensor, reference: Tensor) -> Callable[[], float]:
    """Compute their distance, with features given to it as if they were images."""
    network = nn.Identity()
    network.num_features = samples.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    for given, real in ((samples, False), (reference, True)):
        metric.update(given.double(), real=real)

    def compute() -> float:
        metric._computed = None
        return float(metric.compute())

    return compute


def of_scipy(first: Moments, second: Moments) -> float:
    root = np.real(np.asarray(scipy.linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy())))
    traces = np.trace(first.covariance.numpy() + second.covariance.numpy() - 2 * root)
    return float((first.mean - second.mean).square().sum()) + float(traces)


def measure_distance(width: int, rounds: int) -> list[Figure]:
    samples, reference = features(5000, width, 0), features(5000, width, 1)
    compute, *moments = ours(samples, reference)
    arms = {"ours": compute, "torchmetrics": of_torchmetrics(samples, reference)}
    taken = alternate(arms, rounds, warmup=0)
    print(f"\nFréchet distance of {width:,} features, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    print(f"  torchmetrics / ours: {ratio(taken['torchmetrics'], taken['ours'], f'at least {SPEED_TARGET}')}")
    exact = of_scipy(*moments)
    error = abs(compute() - exact) / exact
    print(f"  ours {compute():.9f}, SciPy {exact:.9f}: relative difference {error:.1e}; target {ERROR_TARGET:.0e}")
    return [
        at_least("torchmetrics' compute() / ours", taken["torchmetrics"], taken["ours"], SPEED_TARGET),
        Figure(
            "relative difference from SciPy in float64",
            f"{error:.0e}",
            f"at most {ERROR_TARGET:.0e}",
            error <= ERROR_TARGET,
        ),
    ]


def measure_few(width: int) -> None:
    """Compare the distances where there are half as many images as features."""
    few, reference = features(width // 2, width, 0), features(5000, width, 1)
    compute, *moments = ours(few, reference)
    theirs, exact = of_torchmetrics(few, reference)(), of_scipy(*moments)
    print(f"\n{width:,} features of {len(few):,} images")
    print(f"  ours {compute():.9f}, torchmetrics {theirs:.9f}, SciPy {exact:.9f}")


def random_inception(folder: str) -> InceptionV3:
    torch.manual_seed(0)
    path = Path(folder) / "inception.pth"
    torch.save(extractor_file._InceptionLayers().state_dict(), path)
    return InceptionV3(str(path), sha256=file_sha256(path))


def every_measure(extractor: FeatureExtractor) -> ImageMetrics:
    def moments(source: FeatureSource) -> Moments:
        dim = source.dim
        return Moments(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))

    kept = FeatureSet(torch.randn(100, extractor.dim))
    made: dict[str, FrechetDistance | KernelDistance | PrecisionRecall | SlicedWasserstein | InceptionScore] = {
        "fd": FrechetDistance(extractor, moments(extractor)),
        "kid": KernelDistance(extractor, kept),
        "pr": PrecisionRecall(extractor, kept),
        "dc": DensityCoverage(extractor, kept),
        "mind": SlicedWasserstein(extractor, kept),
    }
    if isinstance(extractor, InceptionV3):
        spatial = extractor.space("spatial")
        made |= {"sfid": FrechetDistance(spatial, moments(spatial))}
        made |= {"is": InceptionScore(extractor.space("logits"), 10**7)}
    return ImageMetrics(extractor, made)


def measure_added(extractor: FeatureExtractor, size: int, rounds: int) -> list[Figure]:
    images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    measures = every_measure(extractor)
    parts = tuple(measures.collections)
    given = extractor.features(images, parts)

    def update() -> None:
        for part, collection in measures.collections.items():
            collection.update(given[part])

    for _ in range(2):  # the second finds which measures share what they keep
        update()
    taken = alternate({"features": lambda: extractor.features(images, parts), "measures": update}, rounds)
    print(
        f"\n{BATCH} images of {size} pixels through {extractor.name}, "
        f"{torch.get_num_threads()} threads, {rounds} rounds"
    )
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    print(f"  measures / features: {ratio(taken['measures'], taken['features'], f'at most {ADDED_TARGET}')}")
    name = f"updates of all measures / features of {extractor.name}"
    return [at_most(name, taken["measures"], taken["features"], ADDED_TARGET)]


def quietly(run: Callable[[], object]) -> None:
    """Call without progress bars and tables."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run()


def write_images(path: Path, count: int, seed: int) -> str:
    images = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(path, arr_0=images)
    return str(path)


def measure_evaluation(folder: str, extractor: FeatureExtractor, count: int, rounds: int) -> list[Figure]:
    samples, reference = (write_images(Path(folder) / f"{count}-{seed}.npz", count, seed) for seed in (0, 1))
    images = torch.from_numpy(np.load(samples)["arr_0"]).movedim(-1, 1).contiguous()

    extract, extractions = extractor.features, list[Seconds]()

    def timed(*batch: Any) -> Any:
        start = clock()
        found = extract(*batch)
        extractions.append(since(start))
        return found

    own: list[Seconds] = []

    def evaluated() -> None:
        extractions.clear()
        settings = {"samples": {"mine": samples}, "image_size": SIZE, "num_images": count, "batch_size": BATCH}
        evaluate(reference, f"{folder}/report", **settings, extractor=extractor, accelerator="cpu", devices=1)
        own.append(Seconds(*map(sum, zip(*extractions, strict=True))))

    def extracted() -> None:
        with torch.inference_mode():
            for batch in images.split(BATCH):
                extractor(batch)

    extractor.features = timed  # type: ignore[method-assign]
    taken = alternate({"features alone": extracted, "evaluation": partial(quietly, evaluated)}, rounds)
    taken["its features"] = own[-rounds:]
    with_what = f"by {extractor.name}, {torch.get_num_threads()} threads"
    print(f"\nEvaluation of {count:,} images {with_what}, {rounds} rounds")
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    for beside in ("its features", "features alone"):
        print(f"  evaluation / {beside}: {ratio(taken['evaluation'], taken[beside], f'at most {1 + ADDED_TARGET}')}")
    name = f"evaluation of {count:,} images / its features of {extractor.name}"
    return [at_most(name, taken["evaluation"], taken["its features"], 1 + ADDED_TARGET)]


def measure_share(rank: int, ranks: int, samples: str, address: str, results: Any) -> None:
    """Measure the samples with others, in one thread, then extract alone, and tell how long all took for each."""
    keep_freed_memory(torch.device("cpu"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    extractor = EfficientNetLite0()
    extractor(torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8))
    selection = Selection(open_image_set(samples, SIZE), None, num_classes=None)
    dist.barrier()
    start = clock()
    settings = {"num_classes": None, "batch_size": BATCH, "device": "cpu", "description": "samples"}
    quietly(lambda: measure(selection, extractor, **settings))
    dist.barrier()
    measured = since(start)
    own = torch.from_numpy(np.load(samples)["arr_0"]).movedim(-1, 1).tensor_split(ranks)[rank].contiguous()
    dist.barrier()
    start = clock()
    with torch.inference_mode():
        for batch in own.split(BATCH):
            extractor(batch)
    dist.barrier()
    if rank == 0:
        results.put((tuple(measured), tuple(since(start))))
    dist.destroy_process_group()


def measure_ranks(folder: str, count: int, rounds: int) -> list[Figure]:
    samples = write_images(Path(folder) / "ranks.npz", count, 2)
    context = multiprocessing.get_context("spawn")
    taken: dict[int, list[Seconds]] = {1: [], 2: []}
    alone: dict[int, list[Seconds]] = {1: [], 2: []}
    for round in range(rounds):
        for ranks, times in taken.items():
            results, address = context.Queue(), f"file://{folder}/rendezvous-{round}-{ranks}"
            processes = [
                context.Process(target=measure_share, args=(rank, ranks, samples, address, results))
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            measured, extracted = results.get()
            times.append(Seconds(*measured))
            alone[ranks].append(Seconds(*extracted))
            for process in processes:
                process.join()
    print(f"\n{count:,} images on 1 and 2 ranks of one thread each, {rounds} rounds")
    for ranks, times in taken.items():
        print(f"  {ranks} ranks                  {milliseconds(times)}")
    print(f"  1 rank / 2 ranks: {ratio(taken[1], taken[2], f'at least {RANKS_TARGET}')}")
    print(f"  extraction alone, the most that this machine gives: {ratio(alone[1], alone[2])}")
    return [at_least("1 rank / 2 ranks of one thread each", taken[1], taken[2], RANKS_TARGET)]


class TimedDistance(ImageDistance):
    """Take the time of every measurement, and behind it that of drawing, decoding and extracting the same samples."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.taken: list[Seconds] = []
        self.parts: list[Seconds] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        start = clock()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.taken.append(since(start))
        assert isinstance(pl_module, Masked) and self.extractor is not None
        start = clock()
        with undisturbed(pl_module), torch.no_grad():
            for numbers, _ in own_numbers(self.num_samples, self.batch_size):
                self.extractor(draw_images(pl_module, numbers, seed=self.seed)[0])
        self.parts.append(since(start))


def measure_callback(folder: str, count: int, rounds: int) -> list[Figure]:
    torch.manual_seed(0)
    tokenizer = FSQ(partial(ConvAutoencoder, channels=32, multipliers=(1, 2, 2), blocks=1, attention=False), [8, 8, 8])
    backbone = partial(Transformer, width=128, depth=4, heads=4)
    generator = Masked(tokenizer, SIZE, num_classes=10, backbone=backbone, optimizer=partial(torch.optim.SGD, lr=0.0))
    reference = write_images(Path(folder) / "reference.npz", count, 3)
    distance = TimedDistance(reference, count, every_n_steps=1, extractor=EfficientNetLite0())
    batch = {"image": torch.rand(4, 3, SIZE, SIZE) * 2 - 1, "label": torch.arange(4)}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=rounds + 1,  # the first one measures the reference too
        callbacks=[distance],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch] * (rounds + 1)
    quietly(lambda: trainer.fit(generator, torch.utils.data.DataLoader(batches, batch_size=None)))
    taken, parts = distance.taken[1:], distance.parts[1:]
    print(f"\nImageDistance of {count:,} samples, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"  callback                 {milliseconds(taken)}\n  draw, decode, extract    {milliseconds(parts)}")
    print(f"  callback / draw, decode, extract: {ratio(taken, parts, f'at most {1 + ADDED_TARGET}')}")
    return [at_most(f"ImageDistance of {count:,} / draw, decode, extract", taken, parts, 1 + ADDED_TARGET)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of the features")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--images", type=int, default=1000, help="of an evaluation, and samples of the callback")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found: list[Figure] = []
    # As evaluation and training do.
    keep_freed_memory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        if "distance" in options.parts:
            found += measure_distance(options.width, options.rounds)
            measure_few(options.width // 4)
        if "measures" in options.parts:
            found += measure_added(EfficientNetLite0(), 224, options.rounds)
            found += measure_added(random_inception(folder), 256, options.rounds)
        if "evaluation" in options.parts:
            # Of the quick network more rounds: a processor that others share changes by more than is measured.
            found += measure_evaluation(folder, EfficientNetLite0(), options.images, 3 * options.rounds)
            found += measure_evaluation(folder, random_inception(folder), options.images // 5, options.rounds)
        if "ranks" in options.parts:
            found += measure_ranks(folder, options.images, options.rounds)
        if "callback" in options.parts:
            found += measure_callback(folder, options.images, options.rounds)
    print("\n| figure | measured | target | met |\n|:--|--:|--:|:--|")
    for figure in found:
        print(f"| {figure.name} | {figure.value} | {figure.target} | {'yes' if figure.met else 'NO'} |")


if __name__ == "__main__":
    main()
