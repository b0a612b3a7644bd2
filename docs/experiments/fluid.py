"""Discrete or continuous, random or raster order (Fan et al., "Fluid", 2024): four small models; table and figure.

  python docs/experiments/fluid.py

Four generators of the embedded set with as many blocks of the same width, batches and optimizer: next-token and masked
prediction of FSQ's ids, and the same of a KL-VAE's latents by a diffusion head. Each training is `discrete-lit fit` on
a recipe of `lightning_configs/quickstart/`, with the batches and in the folders of `make comparison`, and what is
finished there is not done again. Every row is read beside the reconstructions of its own tokenizer. Needs
`make quickstart`, then the latents that `make comparison` makes, and matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from shared import compared_samples, number_of_make, processor_minutes, run, spread, stamp

CONFIGS, RUNS = Path("lightning_configs/quickstart"), Path("runs/quickstart")
TOKENIZERS = {
    "FSQ tokenizer": RUNS / "tokenizer/checkpoints/last.ckpt",
    "KL tokenizer": RUNS / "tokenizer_kl/checkpoints/last.ckpt",
}


@dataclass(frozen=True)
class Model:
    """One of the four: its name in the table, its recipe, and whose reconstructions bound it."""

    name: str
    recipe: str
    tokenizer: str


MODELS = (
    Model("raster, discrete", "autoregressive", "FSQ tokenizer"),
    Model("random, discrete", "masked", "FSQ tokenizer"),
    Model("raster, continuous", "causal_mar", "KL tokenizer"),
    Model("random, continuous", "mar", "KL tokenizer"),
)
# The figures of a row by the heads of their columns, and how they are written.
COLUMNS = {
    "FD-EffNetLite0": ".1f",
    "precision": ".3f",
    "recall": ".3f",
    "label accuracy (plain)": ".1%",
    "label accuracy (apart)": ".1%",
}


BATCHES = number_of_make("BATCHES")


def samples_of(model: Model, seed: int, batches: int) -> Path:
    folder = RUNS / "comparison" / f"seed_{seed}" / model.recipe
    return compared_samples(CONFIGS / f"{model.recipe}.yaml", folder, seed=seed, batches=batches)


def measured(seeds: Sequence[int], batches: int, output: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the report by name, one for each seed."""
    samples = {model.name: [str(samples_of(model, seed, batches)) for seed in seeds] for model in MODELS}
    reconstructions = {name: str(path) for name, path in TOKENIZERS.items()}
    run([
        *("evaluate", "--config", str(CONFIGS / "comparison.yaml"), "--output", str(output), "--likelihoods", "null"),
        *("--samples", json.dumps(samples), "--reconstructions", json.dumps(reconstructions)),
    ])  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((output / "report.json").read_text())["rows"]:
        rows.setdefault(row["name"], []).append(row)
    return rows


def values_of(rows: list[dict[str, Any]], column: str) -> list[float]:
    if column.startswith("label accuracy"):
        classifier = column.removeprefix("label accuracy (").removesuffix(")")
        return [row["label_accuracy"][classifier] for row in rows]
    return [row[column] for row in rows]


def draw_figure(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for model in MODELS:
        order, kind = model.name.split(", ")
        found = {column: values_of(rows[model.name], column) for column in COLUMNS}
        style = {
            "marker": "s" if order == "raster" else "o",
            "color": "C0" if kind == "discrete" else "C1",
            "linestyle": "none",
        }
        ceiling = mean(values_of(rows[model.tokenizer], "FD-EffNetLite0"))
        axes[0].plot(found["FD-EffNetLite0"], [value - ceiling for value in found["FD-EffNetLite0"]], **style)
        axes[1].plot(found["recall"], found["precision"], label=model.name, **style)
    for number, (name, style) in enumerate(zip(TOKENIZERS, ("^", "v"), strict=True)):
        axes[1].plot(
            values_of(rows[name], "recall"), values_of(rows[name], "precision"), style, color=f"C{number}", label=name
        )
    axes[0].set(xlabel="FD-EffNetLite0", ylabel="above the tokenizer's reconstructions")
    axes[1].set(xlabel="recall", ylabel="precision")
    axes[1].legend(fontsize="x-small")
    pyplot.savefig(path, dpi=100)


def page(rows: dict[str, list[dict[str, Any]]], command: str, machine: str, picture: str) -> list[str]:
    lines = [
        "# Discrete or continuous, random or raster",
        "",
        f"`{command}`, {machine}. Mean ± standard deviation over the training seeds; 1,000 images a row, of the test "
        "split's classes.",
        "",
        f"| images of | {' | '.join(COLUMNS)} | FD above its tokenizer's | passes of the network | GFLOPs/image |",
        f"|:--|{'--:|' * (len(COLUMNS) + 3)}",
    ]
    for name in (*TOKENIZERS, *(model.name for model in MODELS)):
        cells = [spread(values_of(rows[name], column), form) for column, form in COLUMNS.items()]
        model = next((model for model in MODELS if model.name == name), None)
        if model is None:
            cells += ["", "", ""]
        else:
            ceiling = mean(values_of(rows[model.tokenizer], "FD-EffNetLite0"))
            above = [value - ceiling for value in values_of(rows[name], "FD-EffNetLite0")]
            cost = rows[name][0]["sampling"]
            cells += [spread(above, ".1f"), str(cost["sequential_passes"]), f"{cost['flops_per_image'] / 1e9:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"![]({picture})", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--batches", type=int, default=BATCHES, help=f"of training, of {number_of_make('BATCH_SIZE')} images"
    )
    parser.add_argument("--output", type=Path, default=RUNS / "fluid", help="folder of the evaluation's report")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    rows = measured(given.seeds, given.batches, given.output)
    picture = given.page.with_suffix(".png")
    draw_figure(rows, picture)
    command = f"python docs/experiments/fluid.py --seeds {' '.join(map(str, given.seeds))} --batches {given.batches}"
    machine = f"{stamp()}, {processor_minutes():.0f} minutes of processor"
    given.page.write_text("\n".join(page(rows, command, machine, picture.name)))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
