"""Train small tokenizers side by side on the CPU, and write the table and the figure of the comparison.

  python docs/experiments/compare_tokenizers.py collapse emoji
  python docs/experiments/compare_tokenizers.py compression fashion_mnist

`collapse`: one network with quantizers of about 16,000 ids: how many ids are still in use? `compression`: FSQ at three
downsampling factors and three vocabularies: what do the bits buy? Each run is the recipe
`lightning_configs/experiments/autoencoder.yaml` with the settings in `variants` below, on the shards that
`lightning_configs/experiments/<data>.yaml` names. Finished runs are kept: the command goes on where it stopped.
Time on one core: under 30 minutes a comparison. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared import fit, minutes_of, processor_minutes, stamp

from discrete_lit.cli.evaluate import evaluate

CONFIGS = Path("lightning_configs/experiments")
VECTOR = {"codebook_size": 16384, "dim": 8, "codebook_update": "gradient", "codebook_init": "uniform"}
LEVELS = {"64": [8, 8], "1k": [8, 5, 5, 5], "16k": [8, 8, 8, 6, 5]}
# Batches of training, which keep every comparison under 30 minutes of processor time.
STEPS = {"collapse": 400, "compression": 250}
MULTIPLIERS = {2: [1, 2], 4: [1, 2, 4], 8: [1, 2, 4, 4]}


def variants(experiment: str) -> dict[str, tuple[dict[str, Any], list[int]]]:
    """Name of each run to its quantizer and its network's multipliers."""

    def quantizer(name: str, **settings: Any) -> dict[str, Any]:
        return {"class_path": name, "init_args": settings}

    if experiment == "compression":
        return {
            f"f{factor} {vocabulary}": (quantizer("FiniteScalarQuantizer", levels=levels), multipliers)
            for factor, multipliers in MULTIPLIERS.items()
            for vocabulary, levels in LEVELS.items()
        }
    quantizers = {
        "VQ": quantizer("VectorQuantizer", **VECTOR),
        "VQ, revival": quantizer("VectorQuantizer", **VECTOR, decay=0.9, revive_below=0.02),
        "FSQ 8,8,8,6,5": quantizer("FiniteScalarQuantizer", levels=[8, 8, 8, 6, 5]),
        "LFQ 14 bits": quantizer("LookupFreeQuantizer", bits=14, entropy_weight=0.05, entropy_temperature=0.1),
    }
    return {name: (chosen, MULTIPLIERS[4]) for name, chosen in quantizers.items()}


def train(
    name: str, quantizer: dict[str, Any], multipliers: list[int], data: str, folder: Path, seed: int, steps: int
) -> Path:
    """The checkpoint of a run."""
    settings = {
        "seed_everything": seed,
        "model.init_args.quantizer": json.dumps(quantizer),
        "model.init_args.network.init_args.multipliers": json.dumps(multipliers),
        "model.init_args.scheduler.init_args.total_steps": steps,
        "trainer.max_steps": steps,
    }
    configs = [CONFIGS / f"{file}.yaml" for file in (data, "autoencoder")]
    return fit(folder / name.replace(", ", "_").replace(" ", "_"), configs, settings)


def usage_by_step(run: Path) -> tuple[list[int], list[float]]:
    """Validation usage in the TensorBoard log of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = next(path.parent for path in run.rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(log), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = accumulator.Scalars("validation/codebook_usage")
    return [event.step for event in events], [event.value for event in events]


def draw_collapse(rows: list[dict[str, Any]], figure: Path) -> None:
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for row in rows:
        steps, usage = usage_by_step(Path(row["source"]).parents[1])
        left.plot(steps, [100 * value for value in usage], marker="o", label=row["name"])
        made = row["reconstruction"]
        right.scatter(100 * made["ids"]["usage"], made["psnr"], label=row["name"])
    left.set(xlabel="training step", ylabel="usage of the ids in validation (%)", ylim=(0, 100))
    right.set(xlabel="usage of the ids, held-out images (%)", ylabel="PSNR (dB)", xlim=(0, 100))
    left.legend()
    pyplot.savefig(figure, dpi=100)


def draw_compression(rows: list[dict[str, Any]], figure: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for factor in MULTIPLIERS:
        of_factor = [row for row in rows if row["name"].startswith(f"f{factor} ")]
        made = [row["reconstruction"] for row in of_factor]
        bits = [figures["bits_per_pixel"] for figures in made]
        distance = next(key for key in of_factor[0] if key.startswith("FD-"))
        axes[0].plot(bits, [figures["psnr"] for figures in made], marker="o", label=f"f = {factor}")
        axes[1].plot(bits, [row[distance] for row in of_factor], marker="o", label=f"f = {factor}")
        axes[1].set(xlabel="bits per pixel", xscale="log", ylabel=f"r{distance}", yscale="log")
    axes[0].set(xlabel="bits per pixel", xscale="log", ylabel="PSNR (dB)")
    axes[0].legend()
    pyplot.savefig(figure, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("collapse", "compression"))
    parser.add_argument("data", choices=("emoji", "fashion_mnist"))
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.runs / f"{given.experiment}_{given.data}"
    steps = STEPS[given.experiment]
    checkpoints = {
        name: train(name, quantizer, multipliers, given.data, folder, given.seed, steps)
        for name, (quantizer, multipliers) in variants(given.experiment).items()
    }
    image_size, shards = (64, "shards/emoji") if given.data == "emoji" else (32, "runs/quickstart/shards")
    begun = processor_minutes()
    report = evaluate(
        reference=f"{shards}/test",
        held_out=f"{shards}/test",
        num_images=None if given.data == "emoji" else 1000,
        num_reference=None if given.data == "emoji" else 1000,
        reconstructions={name: str(path) for name, path in checkpoints.items()},
        image_size=image_size,
        output=str(folder / "evaluation"),
    )
    evaluated = processor_minutes() - begun
    rows = [row for row in report["rows"] if row["kind"] == "reconstructions"]
    page = Path(__file__).with_name(f"{given.experiment}_{given.data}.md")
    {"collapse": draw_collapse, "compression": draw_compression}[given.experiment](rows, page.with_suffix(".png"))
    minutes = {name: minutes_of(path) for name, path in checkpoints.items()}
    times = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    command = f"python docs/experiments/compare_tokenizers.py {given.experiment} {given.data} --seed {given.seed}"
    page.write_text(
        f"# {given.experiment.capitalize()}: {given.data}\n\n"
        f"`{command}`, {steps} batches, {stamp()}; "
        f"{sum(minutes.values()):.0f} minutes of processor time to train ({times}) and {evaluated:.0f} to evaluate.\n\n"
        f"{(folder / 'evaluation' / 'report.md').read_text()}\n![]({page.with_suffix('.png').name})\n"
    )
    print(f"Wrote {page} and {page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
