"""The landscape of tokenizers on a CPU: tokens of an image, reconstruction, bits of an autoregressive model; a figure.

  python docs/experiments/landscape.py fashion_mnist
  python docs/experiments/landscape.py emoji

Twelve tokenizers, of several grids, vocabularies and quantizers, are trained alike by the recipe
`lightning_configs/experiments/landscape.yaml`, and on the tokens of each the same small autoregressive model, by
`landscape_autoregressive.yaml` beside it. Measured are

    rFD    the Fréchet distance between held-out images and their reconstructions
    pFD    the same where a share of the ids is replaced by near ones
    bits   -log2 p of the ids of a held-out image, given its class, against the L log2 K that they could carry
    gFD    the Fréchet distance between training images and samples of the model, without guidance

and how far each of them orders the tokenizers as gFD does. The shards are those of the quickstarts. What is finished is
kept: the command goes on where it stopped. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log2
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from shared import fit, minutes_of, processor_minutes, spread, stamp

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.cli.tokenize import tokenize
from discrete_lit.data import ImageShards

CONFIGS = Path("lightning_configs")
LEVELS = {64: [8, 8], 1000: [8, 5, 5, 5], 15360: [8, 8, 8, 6, 5]}
# Channels from the highest resolution down, of the encoder and of the decoder.
WIDTHS, DECODER_WIDTHS = [32, 64, 128, 128], [16, 48, 96, 128, 128]
EMA_CODES = {"codebook_update": "ema", "codebook_init": "kmeans", "decay": 0.95}
Box = tuple[float, float, float, float]
# The colours of Okabe and Ito, which colour-blind readers tell apart, and a marker for each kind.
STYLES = {
    "FSQ": ("#0072B2", "o"),
    "LFQ": ("#56B4E9", "s"),
    "VQ": ("#D55E00", "X"),
    "VQ revived": ("#E69F00", "D"),
    "RQ": ("#009E73", "^"),
    "multi-scale": ("#CC79A7", "v"),
    "TiTok": ("#000000", "P"),
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set and what depends on it."""

    shards: str
    """Folder of the splits `train`, `validation` and `test`."""
    image_size: int
    image_channels: int
    batch_size: int
    """Images of a batch of the tokenizers."""
    images: int | None
    """Held-out images, and as many samples; None for all of the test split."""
    reference: int | None
    """Training images that samples are compared with; None for all."""
    labels: list[int] | None
    """Classes of the samples, in turn; None for all classes."""

    @property
    def samples(self) -> int:
        """How many images are drawn of each model."""
        return self.images or json.loads(Path(self.shards, "test", "manifest.json").read_text())["count"]


def data_set(name: str) -> DataSet:
    if name == "fashion_mnist":
        return DataSet(
            shards="runs/quickstart/shards",
            image_size=32,
            image_channels=1,
            batch_size=64,
            images=500,
            reference=1000,
            labels=None,
        )
    # Six emoji in ten are people, in training, in the test set and here.
    labels = yaml.safe_load((CONFIGS / "quickstart_colour" / "sample.yaml").read_text())["labels"]
    return DataSet(
        shards="runs/quickstart_colour/shards",
        image_size=64,
        image_channels=3,
        batch_size=32,
        images=None,
        reference=None,
        labels=labels,
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A tokenizer of the comparison."""

    kind: str
    tokens: int
    """L, ids of an image."""
    vocab_size: int
    """K."""
    quantizer: dict[str, Any]
    network: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.tokens}x{self.vocab_size}"


def variants(data: DataSet) -> list[Variant]:
    """List the tokenizers: FSQ on three grids, and at 64 positions or a similar capacity what competes with it."""

    def grid(side: int) -> dict[str, Any]:
        """The network whose latents are a grid of this side: the smaller the grid, the more halvings."""
        halvings = int(log2(data.image_size // side))
        settings = {
            "image_channels": data.image_channels,
            "widths": WIDTHS[:halvings],
            "blocks": [0] * (halvings - 1) + [1],
            "decoder_widths": DECODER_WIDTHS[: halvings + 1],
            "decoder_blocks": [0] + [1] * (halvings - 1) + [2],
        }
        return {"class_path": "LowResolutionAutoencoder", "init_args": settings}

    def row(tokens: int) -> dict[str, Any]:
        """The network whose latents are a row in no spatial order, of 8x8 patches."""
        size = {"width": 96, "depth": 2, "heads": 4}
        settings = {
            "image_size": data.image_size,
            "image_channels": data.image_channels,
            "patch_size": data.image_size // 8,
            "latent_tokens": tokens,
            "encoder": size,
            "decoder": size,
        }
        return {"class_path": "TiTokAutoencoder", "init_args": settings}

    def make(kind: str, tokens: int, vocab_size: int, network: dict[str, Any], name: str, **settings: Any) -> Variant:
        quantizer = {"class_path": name, "init_args": settings}
        return Variant(kind=kind, tokens=tokens, vocab_size=vocab_size, quantizer=quantizer, network=network)

    def fsq(side: int, vocab_size: int) -> Variant:
        return make("FSQ", side**2, vocab_size, grid(side), "FiniteScalarQuantizer", levels=LEVELS[vocab_size])

    vector = {"codebook_size": 1024, "dim": 8}
    small = {"codebook_size": 256, "dim": 16, **EMA_CODES, "revive_below": 1.0}
    return [
        *(fsq(side, vocab_size) for side, vocab_size in ((16, 64), (16, 1000), (8, 64), (8, 1000))),
        *(fsq(4, vocab_size) for vocab_size in (1000, 15360)),
        # As in taming-transformers: random codes, moved by gradients, and dead ones stay dead.
        make("VQ", 64, 1024, grid(8), "VectorQuantizer", **vector, codebook_update="gradient", codebook_init="uniform"),
        make("VQ revived", 64, 1024, grid(8), "VectorQuantizer", **vector, **EMA_CODES, revive_below=0.5),
        make("LFQ", 64, 1024, grid(8), "LookupFreeQuantizer", bits=10, entropy_weight=0.05, entropy_temperature=0.1),
        make("RQ", 64, 256, grid(4), "ResidualQuantizer", **small, depth=4),
        make("multi-scale", 85, 256, grid(8), "MultiScaleResidualQuantizer", **small, scales=[1, 2, 4, 8]),
        make("TiTok", 32, 1000, row(32), "FiniteScalarQuantizer", levels=LEVELS[1000]),
    ]


# --- Training, tokens, samples ---


@dataclass(frozen=True, kw_only=True)
class Run:
    """A tokenizer and the autoregressive model on its tokens, of one seed."""

    variant: Variant
    tokenizer: Path
    generator: Path
    samples: Path


def train(variant: Variant, seed: int, data: DataSet, given: argparse.Namespace) -> Run:
    """Train a tokenizer and the model on its tokens, and sample from that, as far as it is not done."""
    folder = given.runs / variant.name.replace(" ", "_")
    tokenizer = train_tokenizer(folder / f"tokenizer_{given.batches}_{seed}", variant, seed, data, given)
    run = folder / f"autoregressive_{given.batches}_{given.generator_batches}_{seed}"
    generator = train_generator(run, tokenizer, seed, data, given)
    output = run / f"samples_{data.samples}"
    if not (output / "run.json").is_file():
        sample(
            str(generator),
            str(output),
            num_samples=data.samples,
            labels=data.labels,
            seed=seed,
            batch_size=100,
            precision="auto",
        )
    return Run(
        variant=variant,
        tokenizer=tokenizer,
        generator=generator,
        samples=output / "samples.npz",
    )


def train_tokenizer(run: Path, variant: Variant, seed: int, data: DataSet, given: argparse.Namespace) -> Path:
    settings = {
        "seed_everything": seed,
        "model.init_args.quantizer": json.dumps(variant.quantizer),
        "model.init_args.network": json.dumps(variant.network),
        "model.init_args.scheduler.init_args.total_steps": given.batches,
        "data.init_args.train": f"{data.shards}/train",
        "data.init_args.validation": f"{data.shards}/validation",
        "data.init_args.image_size": data.image_size,
        "data.init_args.image_channels": data.image_channels,
        "data.init_args.batch_size": data.batch_size,
        "data.init_args.seed": seed,
        "trainer.max_steps": given.batches,
        "trainer.val_check_interval": given.batches,
    }
    return fit(run, [CONFIGS / "experiments" / "landscape.yaml"], settings)


def train_generator(run: Path, tokenizer: Path, seed: int, data: DataSet, given: argparse.Namespace) -> Path:
    """Encode the images, and train the autoregressive model on their tokens."""
    for split in ("train", "validation"):
        images = ImageShards(
            train=f"{data.shards}/train",
            validation=f"{data.shards}/validation",
            image_size=data.image_size,
            image_channels=data.image_channels,
            batch_size=100,
            num_workers=1,
        )
        output = tokenizer.parents[1] / "tokens" / split
        if not (output / "manifest.json").is_file():
            tokenize(str(tokenizer), images, output=str(output), split=split, precision="auto")
    tokens = tokenizer.parents[1] / "tokens"
    num_classes = json.loads((tokens / "train" / "manifest.json").read_text())["num_classes"]
    settings = {
        "seed_everything": seed,
        "model.init_args.seed": seed,
        "model.init_args.tokenizer.init_args.checkpoint": tokenizer,
        "model.init_args.image_size": data.image_size,
        "model.init_args.num_classes": num_classes,
        "model.init_args.scheduler.init_args.total_steps": given.generator_batches,
        "data.init_args.train": tokens / "train",
        "data.init_args.validation": tokens / "validation",
        "data.init_args.seed": seed,
        "trainer.max_steps": given.generator_batches,
        "trainer.val_check_interval": given.generator_batches,
    }
    recipes = ("quickstart/autoregressive.yaml", "experiments/landscape_autoregressive.yaml")
    return fit(run, [CONFIGS / recipe for recipe in recipes], settings)


# --- Measuring ---


def measure(runs: Sequence[Run], seed: int, data: DataSet, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Give the figures of each tokenizer, and of `held-out images`, as numbers by the header of their column."""
    lengths = f"{given.batches}_{given.generator_batches}_{seed}"
    common: dict[str, Any] = {
        "held_out": f"{data.shards}/test",
        "num_images": data.images,
        "image_size": data.image_size,
        "image_channels": data.image_channels,
        "batch_size": 10,
    }
    names = [run.variant.name for run in runs]
    made = report(
        given.runs / f"reconstructions_{lengths}_{given.rate}",
        set(names),
        reference=f"{data.shards}/test",
        num_reference=data.images,
        reconstructions={run.variant.name: str(run.tokenizer) for run in runs},
        perturbed=[given.rate],
        **common,
    )
    drawn = report(
        given.runs / f"samples_{lengths}",
        set(names),
        reference=f"{data.shards}/train",
        num_reference=data.reference,
        samples={run.variant.name: str(run.samples) for run in runs},
        likelihoods={run.variant.name: str(run.generator) for run in runs},
        **common,
    )
    metric = made["metric"]
    of_made, of_drawn = ({row["name"]: row for row in found["rows"]} for found in (made, drawn))
    figures: dict[str, dict[str, Any]] = {"held-out images": {"gFD": drawn["rows"][0][metric], "metric": metric}}
    for run in runs:
        name = run.variant.name
        reconstruction, likelihood = of_made[name]["reconstruction"], of_drawn[name]["likelihood"]
        assert (reconstruction["tokens"], reconstruction["vocab_size"]) == (run.variant.tokens, run.variant.vocab_size)
        figures[name] = {
            "L log2 K": reconstruction["capacity_bits"],
            "L entropy": reconstruction["entropy_bits"],
            "usage": 100 * reconstruction["ids"]["usage"],
            "bits": likelihood["nats"] / np.log(2),
            "error of bits": likelihood["standard_error"] / np.log(2),
            "perplexity": 2 ** likelihood["bits_per_token"],
            "PSNR": reconstruction["psnr"],
            "rFD": of_made[name][metric],
            "pFD": of_made[name]["perturbed"][0]["value"],
            "gFD": of_drawn[name][metric],
            "minutes": minutes_of(run.tokenizer) + minutes_of(run.generator),
        }
    return figures


def report(folder: Path, names: set[str], **settings: Any) -> dict[str, Any]:
    """Evaluate, unless the folder holds a report of the same rows. Its `minutes.txt` is the processor time."""
    file = folder / "report.json"
    if file.is_file():
        found = json.loads(file.read_text())
        if {row["name"] for row in found["rows"] if row["kind"] != "real"} == names:
            return found
    begun = processor_minutes()
    found = evaluate(output=str(folder), **settings)
    (folder / "minutes.txt").write_text(f"{processor_minutes() - begun:.1f}\n")
    return found


# --- Does it predict gFD? ---


def ranks(values: Sequence[float]) -> np.ndarray:
    """Rank values from 0, equal ones by their mean."""
    array = np.asarray(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def agreement(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Compare two orders: Spearman's correlation, its least and greatest with one tokenizer left out, pairs alike."""
    without = [
        rank_correlation(
            *([value for number, value in enumerate(values) if number != left] for values in (first, second))
        )
        for left in range(len(first))
    ]
    pairs = list(combinations(range(len(first)), 2))
    alike = sum((first[a] - first[b]) * (second[a] - second[b]) > 0 for a, b in pairs)
    return {
        "all": rank_correlation(first, second),
        "least": min(without),
        "greatest": max(without),
        "alike": alike,
        "pairs": len(pairs),
    }


# What may predict gFD, and its sign: a higher PSNR is better.
PREDICTORS = {"rFD": 1, "pFD": 1, "PSNR": -1, "bits": 1, "perplexity": 1, "L log2 K": 1}


# --- The page ---

COLUMNS: dict[str, tuple[str, str]] = {
    # Header to key and form.
    "L log2 K": ("L log2 K", ",.0f"),
    "L entropy": ("L entropy", ",.0f"),
    "AR bits/image": ("bits", ",.0f"),
    "perplexity/token": ("perplexity", ",.1f"),
    "usage (%)": ("usage", ".1f"),
    "PSNR (dB)": ("PSNR", ".2f"),
    "rFD": ("rFD", ".1f"),
    "pFD": ("pFD", ".1f"),
    "gFD": ("gFD", ".1f"),
    "minutes": ("minutes", ".1f"),
}


def page(
    title: str, command: str, chosen: Sequence[Variant], by_seed: Sequence[dict[str, Any]], minutes: str, figure: str
) -> list[str]:
    """Write the page: `by_seed` has the figures of `measure` for each seed."""
    metric = by_seed[0]["held-out images"]["metric"]
    floor = spread([found["held-out images"]["gFD"] for found in by_seed], ".1f")
    several = " Mean ± standard deviation over the seeds." if len(by_seed) > 1 else ""
    lines = [
        f"# {title}",
        "",
        f"`{command}`, {stamp()}. {minutes}{several}",
        "",
        f"Distances are {metric}, of 8-bit pixels; {floor} of held-out images against the training images of gFD. The "
        "bits are those of a held-out image given its class, by the autoregressive model.",
        "",
        f"| tokenizer | {' | '.join(COLUMNS)} |",
        f"|:--|{'--:|' * len(COLUMNS)}",
    ]
    for variant in chosen:
        cells = [spread([found[variant.name][key] for found in by_seed], form) for key, form in COLUMNS.values()]
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    if len(chosen) > 2:
        lines += [
            "",
            "Does it order the tokenizers as gFD does? Spearman's rank correlation, in brackets the least and the "
            "greatest with any one tokenizer left out, and the pairs of tokenizers in the same order:",
            "",
            "| figure | rank correlation with gFD | pairs alike |",
            "|:--|--:|--:|",
        ]
        for name, sign in PREDICTORS.items():
            found = predicted(name, sign, chosen, by_seed)
            lines.append(
                f"| {name}{' (higher is better)' if sign < 0 else ''} | {found['all']:.2f} ({found['least']:.2f} to "
                f"{found['greatest']:.2f}) | {found['alike']:.0f} of {found['pairs']:.0f} |"
            )
    return [*lines, "", f"![]({figure})", ""]


def predicted(name: str, sign: int, chosen: Sequence[Variant], by_seed: Sequence[dict[str, Any]]) -> dict[str, float]:
    value = averages(by_seed)
    return agreement([sign * value(variant, name) for variant in chosen], [value(variant, "gFD") for variant in chosen])


def averages(by_seed: Sequence[dict[str, Any]]) -> Callable[[Variant, str], float]:
    """From a tokenizer and a figure to its mean over the seeds."""
    return lambda variant, key: mean(found[variant.name][key] for found in by_seed)


def draw_figure(chosen: Sequence[Variant], by_seed: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    value = averages(by_seed)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9.5), constrained_layout=True)
    for axis in axes.flat:
        axis.margins(x=0.2, y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    compression, carried, *predictions = axes.flat
    labels: dict[Any, list[Label]] = {axis: [] for axis in axes.flat}

    def point(axis: Any, variant: Variant, x: float, y: float, label: str, end: float | None = None) -> None:
        colour, marker = STYLES[variant.kind]
        axis.scatter(x, y, color=colour, marker=marker, s=55, zorder=3)
        labels[axis].append(Label(text=label, x=x, y=y, end=x if end is None else end, colour=colour))

    for variant in chosen:
        used, capacity, distance = (value(variant, key) for key in ("bits", "L log2 K", "rFD"))
        colour, marker = STYLES[variant.kind]
        point(compression, variant, variant.tokens, distance, f"{variant.kind}, K {variant.vocab_size:,}")
        carried.plot((used, capacity), (distance, distance), color=colour, linewidth=1, alpha=0.6)
        carried.scatter(capacity, distance, facecolors="none", edgecolors=colour, marker=marker, s=45)
        point(carried, variant, used, distance, variant.name, end=capacity)
        for axis, key in zip(predictions, ("rFD", "pFD"), strict=True):
            point(axis, variant, value(variant, key), value(variant, "gFD"), variant.name)
    compression.set(xlabel="tokens of an image, L", ylabel="rFD", title="More compression, worse reconstruction?")
    compression.set_xscale("log", base=2)
    ticks = sorted({variant.tokens for variant in chosen})
    compression.set_xticks(ticks, [str(tick) for tick in ticks])
    bits = "bits of an image: of the autoregressive model (filled), L log2 K (hollow)"
    carried.set(xlabel=bits, ylabel="rFD", xscale="log", title="What the tokens carry, and what they could")
    floor = mean(found["held-out images"]["gFD"] for found in by_seed)
    for axis, key in zip(predictions, ("rFD", "pFD"), strict=True):
        title = f"Does {key} predict gFD?"
        if len(chosen) > 2:
            title += f" Rank correlation {predicted(key, 1, chosen, by_seed)['all']:.2f}"
        axis.set(xlabel=key, ylabel=f"gFD (of held-out images: {floor:.0f})", title=title)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axis, of_axis in labels.items():
        place_labels(axis, of_axis)
    figure.savefig(path, dpi=100)


@dataclass(frozen=True, kw_only=True)
class Label:
    """The name of a point, or of a line from it to the right."""

    text: str
    x: float
    y: float
    end: float
    """Where the line ends."""
    colour: str


def place_labels(axis: Any, labels: Sequence[Label]) -> None:
    """Write labels beside their points, where they cover no point, line or label, as far as there is room."""
    starts = axis.transData.transform([(label.x, label.y) for label in labels])
    ends = axis.transData.transform([(label.end, label.y) for label in labels])
    # Boxes in pixels: left, bottom, right, top.
    taken = [(left - 6, y - 6, right + 6, y + 6) for (left, y), (right, _) in zip(starts, ends, strict=True)]
    inside = axis.get_window_extent()
    ways = [
        (side * reach, rise) for reach in (9, 24, 40) for rise in (0, 12, -12, 25, -25, 38, -38) for side in (1, -1)
    ]
    for label, (left, y) in zip(labels, starts, strict=True):
        written = axis.annotate(label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset pixels", fontsize=8)
        written.set(va="center", color=label.colour)
        extent = written.get_window_extent()

        def box_of(way: tuple[float, float], left: float = left, y: float = y, extent: Any = extent) -> Box:
            begin, height = left + way[0] - (extent.width if way[0] < 0 else 0), extent.height / 2
            return begin, y + way[1] - height, begin + extent.width, y + way[1] + height

        def badness(way: tuple[float, float], box_of: Callable[[tuple[float, float]], Box] = box_of) -> Any:
            box = box_of(way)
            covered = sum(overlap(box, other) for other in taken)
            outside = max(0.0, inside.x0 - box[0]) + max(0.0, box[2] - inside.x1)
            return outside > 0, covered > 0, covered, abs(way[0]) + 2 * abs(way[1])

        way = min(ways, key=badness)
        written.set(position=way, ha="right" if way[0] < 0 else "left")
        if abs(way[0]) + abs(way[1]) > 25:
            line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            axis.annotate("", (label.x, label.y), xytext=way, textcoords="offset pixels", arrowprops=line)
        taken.append(box_of(way))


def overlap(one: Box, other: Box) -> float:
    """Compute the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("fashion_mnist", "emoji"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", type=int, default=300, help="of training of a tokenizer, at least 51")
    parser.add_argument("--generator-batches", type=int, default=250, help="of training of a generator, at least 41")
    parser.add_argument("--rate", type=float, default=0.2, help="of ids that pFD replaces")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tokenizers, such as 'FSQ 64x64'; all by default")
    parser.add_argument("--runs", type=Path, help="folder of the runs; runs/experiments/landscape_DATA by default")
    parser.add_argument("--page", type=Path, help="what is written; landscape_DATA.md beside this file by default")
    given = parser.parse_args()
    given.runs = given.runs or Path("runs/experiments") / f"landscape_{given.data}"
    given.page = given.page or Path(__file__).with_name(f"landscape_{given.data}.md")
    data = data_set(given.data)
    chosen = variants(data)
    if given.only:
        names = [variant.name for variant in chosen]
        if unknown := sorted(set(given.only) - set(names)):
            parser.error(f"--only: no tokenizer {unknown[0]!r}, accepted are {names}")
        chosen = [variant for variant in chosen if variant.name in given.only]
    begun = processor_minutes()
    by_seed = []
    for seed in given.seeds:
        runs = [train(variant, seed, data, given) for variant in chosen]
        by_seed.append(measure(runs, seed, data, given))
    print(f"{processor_minutes() - begun:.1f} minutes of processor time in this call")
    total = sum(found[variant.name]["minutes"] for found in by_seed for variant in chosen)
    measuring = sum(float(file.read_text()) for file in given.runs.glob("*/minutes.txt"))
    minutes = (
        f"{total:.0f} minutes of processor time to train, {measuring:.0f} to evaluate; tokenizing and sampling not "
        "counted."
    )
    options = f"--seeds {' '.join(map(str, given.seeds))} --batches {given.batches} "
    options += f"--generator-batches {given.generator_batches} --rate {given.rate}"
    command = f"python docs/experiments/landscape.py {given.data} {options}"
    picture = given.page.with_suffix(".png")
    draw_figure(chosen, by_seed, picture)
    given.page.write_text("\n".join(page(f"Landscape: {given.data}", command, chosen, by_seed, minutes, picture.name)))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
