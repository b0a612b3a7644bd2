"""Scale by scale, or token by token? Both on the tokens of one multi-scale tokenizer; table and figure.

  python docs/experiments/next_scale.py

VAR (Tian et al., 2024) draws all tokens of a scale at once, and compares itself with raster models on other
tokenizers. Here the 104 tokens of the quickstart's multi-scale tokenizer are learned twice, with one network, as many
batches, three seeds and one guidance: `quickstart/next_scale.yaml`, as `make comparison` trains it, and next-token
prediction of the same sequence, `experiments/raster_of_scales.yaml`. The first asks the network 6 times for an image,
the second 104 times. Needs `make comparison` and matplotlib; what is finished is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared import compared_samples, number_of_make, processor_minutes, run, spread, stamp

CONFIGS, RUNS = Path("lightning_configs"), Path("runs/quickstart")
TOKENIZER = "multi-scale tokenizer"
# Name to the recipe, and the folder in which each seed has one of its name.
MODELS = {
    "scale by scale": ("quickstart/next_scale", RUNS / "comparison"),
    "token by token": ("experiments/raster_of_scales", Path("runs/experiments/next_scale")),
}
COLUMNS = {"FD-EffNetLite0": ".1f", "precision": ".3f", "recall": ".3f"}


def measured(seeds: list[int], batches: int, output: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the report by name, one for each seed."""
    samples: dict[str, list[str]] = {}
    likelihoods: dict[str, list[str]] = {}
    for name, (recipe, runs) in MODELS.items():
        for seed in seeds:
            folder = runs / f"seed_{seed}" / Path(recipe).name
            made = compared_samples(CONFIGS / f"{recipe}.yaml", folder, seed=seed, batches=batches)
            samples.setdefault(name, []).append(str(made))
            likelihoods.setdefault(name, []).append(str(folder / "checkpoints" / "last.ckpt"))
    reconstructions = {TOKENIZER: str(RUNS / "tokenizer_multi_scale" / "checkpoints" / "last.ckpt")}
    run([
        *("evaluate", "--config", str(CONFIGS / "quickstart" / "comparison.yaml"), "--output", str(output)),
        *("--samples", json.dumps(samples), "--reconstructions", json.dumps(reconstructions)),
        *("--likelihoods", json.dumps(likelihoods)),
    ])  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((output / "report.json").read_text())["rows"]:
        rows.setdefault(row["name"], []).append(row)
    return rows


def cells(rows: list[dict[str, Any]]) -> list[str]:
    found = [spread([row[column] for row in rows], form) for column, form in COLUMNS.items()]
    found.append(spread([100 * row["label_accuracy"]["apart"] for row in rows], ".1f") + "%")
    cost = rows[0]["sampling"]
    if not cost:
        return [*found, "", "", "", ""]
    speeds = [row["sampling"]["images_per_second_without_decoding"] for row in rows]
    nats = spread([row["likelihood"]["nats"] for row in rows], ".1f")
    return [*found, nats, str(cost["sequential_passes"]), f"{cost['flops_per_image'] / 1e9:.2f}", spread(speeds, ".0f")]


def draw_figure(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for name in MODELS:
        distances = [row["FD-EffNetLite0"] for row in rows[name]]
        axes[0].plot([row["sampling"]["sequential_passes"] for row in rows[name]], distances, "o", label=name)
        axes[1].plot([row["recall"] for row in rows[name]], [row["precision"] for row in rows[name]], "o")
    ceiling = rows[TOKENIZER][0]
    axes[0].axhline(ceiling["FD-EffNetLite0"], color="grey", linewidth=0.8, label=TOKENIZER)
    axes[1].plot(ceiling["recall"], ceiling["precision"], "^", color="grey")
    axes[0].set(xscale="log", xlabel="passes that follow one another", ylabel="FD-EffNetLite0")
    axes[0].set_ylim(bottom=0)
    axes[1].set(xlabel="recall", ylabel="precision")
    axes[0].legend(fontsize="small")
    pyplot.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=number_of_make("BATCHES"), help="of training")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments/next_scale/evaluation"))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    rows = measured(given.seeds, given.batches, given.output)
    picture = given.page.with_suffix(".png")
    draw_figure(rows, picture)
    command = (
        f"python docs/experiments/next_scale.py --seeds {' '.join(map(str, given.seeds))} --batches {given.batches}"
    )
    heads = [*COLUMNS, "label accuracy", "-log p (nats)", "passes", "GFLOPs/image", "images/s of tokens"]
    lines = [
        "# Scale by scale, or token by token?",
        "",
        f"`{command}`, {stamp()}, {processor_minutes():.0f} minutes of processor. Mean ± standard deviation over the "
        "seeds; 1,000 images a row.",
        "",
        f"| images of | {' | '.join(heads)} |",
        f"|:--|{'--:|' * len(heads)}",
        *(f"| {name} | {' | '.join(cells(rows[name]))} |" for name in (TOKENIZER, *MODELS)),
        "",
        f"![]({picture.name})",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
