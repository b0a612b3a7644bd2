"""Absorb against Uniform against Absorb-2D on a CPU: train, sample in several numbers of steps, write table and figure.

  python docs/experiments/diffusion.py

The three variants of "Discrete Diffusion for Image Generation", `lightning_configs/experiments/sedd_*.yaml`, on the
quickstart's tokens (`make quickstart` makes them, and the classifier), with several seeds each: a bound of the
likelihood of held-out images, the Fréchet distance and the label accuracy of samples, against the number of steps of
the ancestral (SEDD's analytic) sampler; and MaskGIT's confidence sampling of the same checkpoints, where noise masks.
Without guidance. Finished runs and samples are kept: the command goes on where it stopped. Time on two cores:
under 60 minutes. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from shared import fit, minutes_of, seeded, spread, stamp

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.samplers import AncestralSampler, MaskGITSampler, Sampler

CONFIGS = Path("lightning_configs/experiments")
QUICKSTART = Path("runs/quickstart")
# Name to the recipes, one laid over the other.
VARIANTS = {
    "Absorb": ("sedd_absorb",),
    "Uniform": ("sedd_absorb", "sedd_uniform"),
    "Absorb-2D": ("sedd_absorb", "sedd_absorb_2d"),
}
MASKING = ("Absorb", "Absorb-2D")
SAMPLERS = ("ancestral", "MaskGIT")


def train(variant: str, seed: int, batches: int, folder: Path) -> Path:
    """The checkpoint of a run."""
    settings = seeded(seed, batches)
    return fit(folder / f"{variant.lower()}_{seed}", [CONFIGS / f"{name}.yaml" for name in VARIANTS[variant]], settings)


def draw(checkpoint: Path, variant: str, seed: int, steps: Iterable[int], images: int) -> dict[str, Path]:
    """The samples of a checkpoint by sampler and steps, for instance `ancestral 8`."""
    made: dict[str, Path] = {}
    for count in steps:
        samplers: dict[str, Sampler] = {"ancestral": AncestralSampler(steps=count, guidance_law="score")}
        if variant in MASKING:
            samplers["MaskGIT"] = MaskGITSampler(steps=count)
        for name, sampler in samplers.items():
            output = checkpoint.parents[1] / f"{name}_{count}_{images}"
            if not (output / "run.json").is_file():
                sample(str(checkpoint), str(output), images, sampler=sampler, seed=seed, batch_size=100)
            made[f"{name} {count}"] = output / "samples.npz"
    return made


def measure(checkpoint: Path, samples: dict[str, Path], images: int, folder: Path) -> dict[str, Any]:
    """The report of a run's samples; kept beside them."""
    file = checkpoint.parents[1] / f"report_{'_'.join(name.replace(' ', '_') for name in samples)}_{images}.json"
    if not file.is_file():
        report = evaluate(
            reference=str(QUICKSTART / "shards" / "train"),
            num_reference=1000,
            held_out=str(QUICKSTART / "shards" / "test"),
            num_images=images,
            samples={name: str(path) for name, path in samples.items()},
            likelihoods={next(iter(samples)): str(checkpoint)},
            classifier=str(QUICKSTART / "classifier" / "checkpoints" / "last.ckpt"),
            image_size=32,
            image_channels=1,
            batch_size=10,
            output=str(folder / "evaluation"),
        )
        file.write_text(json.dumps(report))
    return json.loads(file.read_text())


def likelihoods(reports: dict[tuple[str, int], dict[str, Any]], minutes: dict[tuple[str, int], float]) -> list[str]:
    """Rows of a table: the bound of each variant."""
    lines = [
        "| variant | bits per token, at most | standard error of one seed | minutes to train |",
        "|:--|--:|--:|--:|",
    ]
    for variant in VARIANTS:
        rows = [report["rows"] for (name, _), report in reports.items() if name == variant]
        found = [next(row["likelihood"] for row in of_run if row.get("likelihood")) for of_run in rows]
        bits = spread([one["bits_per_token"] for one in found], ".3f")
        errors = [one["standard_error"] / one["nats"] * one["bits_per_token"] for one in found]
        times = mean(value for (name, _), value in minutes.items() if name == variant)
        lines.append(f"| {variant} | {bits} | {mean(errors):.3f} | {times:.1f} |")
    return lines


def by_steps(
    reports: dict[tuple[str, int], dict[str, Any]], steps: list[int], figure: str
) -> dict[str, dict[int, list[float]]]:
    """A figure of each variant and sampler, `Absorb, MaskGIT` for instance, by steps; a value for each seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for (variant, _), report in reports.items():
        values = {row["name"]: row[figure] for row in report["rows"]}
        for sampler in SAMPLERS:
            for count in steps:
                if f"{sampler} {count}" in values:
                    line = found.setdefault(f"{variant}, {sampler}", {})
                    line.setdefault(count, []).append(values[f"{sampler} {count}"])
    return found


def table(found: dict[str, dict[int, list[float]]], steps: list[int], form: str) -> list[str]:
    lines = [f"| steps | {' | '.join(map(str, steps))} |", f"|:--|{'--:|' * len(steps)}"]
    return lines + [
        f"| {name} | {' | '.join(spread(values[count], form) for count in steps)} |" for name, values in found.items()
    ]


def draw_figure(panels: dict[str, dict[str, dict[int, list[float]]]], floors: dict[str, float], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for axis, (label, found) in zip(axes, panels.items(), strict=True):
        colours: dict[str, str] = {}
        for name, values in found.items():
            variant, sampler = name.split(", ")
            errors = [stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in values.values()]
            drawn = axis.errorbar(
                list(values),
                [mean(of_seeds) for of_seeds in values.values()],
                errors,
                color=colours.get(variant),
                linestyle="-" if sampler == "ancestral" else "--",
                marker="o",
                capsize=2,
                label=name,
            )
            colours[variant] = drawn[0].get_color()
        axis.axhline(floors[label], color="grey", linewidth=0.8, label="held-out images")
        steps = sorted({count for values in found.values() for count in values})
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, [str(count) for count in steps])
        axis.set(xlabel="steps", ylabel=label)
    axes[0].legend(fontsize="small")
    pyplot.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="of the samplers")
    parser.add_argument("--batches", type=int, default=250, help="of training, at least 51")
    parser.add_argument("--images", type=int, default=300, help="of each set of samples, a multiple of 10")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/diffusion"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    minutes: dict[tuple[str, int], float] = {}
    for seed in given.seeds:
        for variant in VARIANTS:
            checkpoint = train(variant, seed, given.batches, given.runs)
            samples = draw(checkpoint, variant, seed, given.steps, given.images)
            reports[variant, seed] = measure(checkpoint, samples, given.images, given.runs)
            minutes[variant, seed] = minutes_of(checkpoint)
    first = next(iter(reports.values()))
    metric, real = first["metric"], first["rows"][0]
    distances, accuracies = (by_steps(reports, given.steps, name) for name in (metric, "label_accuracy"))
    accuracies = {
        name: {count: [100 * value for value in of_seeds] for count, of_seeds in values.items()}
        for name, values in accuracies.items()
    }
    panels = {metric: distances, "label accuracy (%)": accuracies}
    floors = {metric: real[metric], "label accuracy (%)": 100 * real["label_accuracy"]}
    draw_figure(panels, floors, given.page.with_suffix(".png"))
    options = f"--seeds {' '.join(map(str, given.seeds))} --steps {' '.join(map(str, given.steps))}"
    command = f"python docs/experiments/diffusion.py {options} --batches {given.batches} --images {given.images}"
    lines = [
        "# Absorb, Uniform, Absorb-2D",
        "",
        f"`{command}`, {stamp()}. Mean ± standard deviation over the seeds.",
        "",
        *likelihoods(reports, minutes),
        "",
        f"{metric} of {given.images} samples, lower is better; {real[metric]:.2f} of as many held-out images:",
        "",
        *table(distances, given.steps, ".1f"),
        "",
        f"Label accuracy in per cent; {100 * real['label_accuracy']:.1f} of held-out images:",
        "",
        *table(accuracies, given.steps, ".1f"),
        "",
        f"![]({given.page.with_suffix('.png').name})",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print(f"Wrote {given.page} and {given.page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
