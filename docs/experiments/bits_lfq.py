"""Bits three ways on images, on a CPU: a softmax, a masked-bit head and a binary flow head on the quickstart's LFQ ids.

  python docs/experiments/bits_lfq.py

The second half of `bits.py`: 49 ids of 8 bits, `lightning_configs/quickstart/{bar,binary_flow}.yaml` and, for the
softmax over 256 ids, `experiments/bits_softmax.yaml`; one backbone, and the same batches and optimizer. The guidance
scale of each head is the one with the lowest distance on the split of `select.yaml`; the table is of the test split.
Needs the LFQ ids of `make comparison`, the classifiers of `make quickstart`, and matplotlib. Finished runs and samples
are kept: the command goes on where it stopped.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from shared import fit, minutes_of, seeded, spread, stamp

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.samplers import BARSampler, BinaryFlowSampler, RasterSampler, Sampler

CONFIGS = Path("lightning_configs")
SHARDS = Path("runs/quickstart/shards")
CLASSIFIER = Path("runs/quickstart/classifier_apart/checkpoints/last.ckpt")
# Head to the recipes, one laid over the other, and further settings: nothing but the head differs.
HEADS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "softmax": (("quickstart/bar", "experiments/bits_softmax"), {}),
    "masked bits": (("quickstart/bar",), {}),
    "binary flow": (("quickstart/binary_flow",), {"model.init_args.perturb_rate": 0.0}),
}


def samplers(head: str, scale: float) -> dict[tuple[str, int], Sampler]:
    """The samplers of a head by their name and the calls of the head for an id; guidance is chosen for the first."""
    if head == "softmax":
        return {(head, 1): RasterSampler(guidance_scale=scale)}
    if head == "masked bits":
        return {
            (f"{head}, by confidence", 3): BARSampler(
                (2, 2, 4), 2.0, guidance_scale=scale, guidance_schedule="constant"
            ),
            (f"{head}, in turn", 8): RasterSampler(guidance_scale=scale),
        }
    return {
        (head, steps): BinaryFlowSampler(
            EulerMaruyama(steps, last_step=0.05, last_drift="velocity"),
            guidance_scale=scale,
            guidance_schedule="constant",
        )
        for steps in (21, 8)
    }


def train(head: str, seed: int, batches: int, folder: Path) -> Path:
    """The checkpoint of a head."""
    recipes, over = HEADS[head]
    settings = {**over, **seeded(seed, batches)}
    return fit(
        folder / f"{head.replace(' ', '_')}_{seed}", [CONFIGS / f"{recipe}.yaml" for recipe in recipes], settings
    )


def draw(checkpoint: Path, name: str, sampler: Sampler, *, seed: int, count: int) -> Path:
    """The samples of a checkpoint."""
    output = checkpoint.parents[1] / f"{name}_{count}".replace(" ", "_").replace(",", "")
    if not (output / "run.json").is_file():
        sample(
            str(checkpoint),
            str(output),
            num_samples=count,
            sampler=sampler,
            seed=seed,
            batch_size=100,
            precision="auto",
        )
    return output / "samples.npz"


def measure(name: str, samples: Mapping[str, Any], folder: Path, **given: Any) -> dict[str, Any]:
    """The report of samples against images; kept."""
    file = folder / f"report_{name}.json"
    wanted = {row: [str(path) for path in paths] for row, paths in samples.items()}
    if not file.is_file() or json.loads(file.read_text())["wanted"] != wanted:
        report = evaluate(
            samples=dict(wanted),
            classifier=str(CLASSIFIER),
            image_size=32,
            image_channels=1,
            batch_size=10,
            output=str(folder / f"evaluation_{name}"),
            **given,
        )
        file.write_text(json.dumps({"wanted": wanted, "report": report}))
    return json.loads(file.read_text())["report"]


def choose(
    checkpoints: dict[str, Path], scales: list[float], count: int, folder: Path
) -> dict[tuple[str, float], float]:
    """The distance of each head and guidance scale, on the split of `select.yaml`."""
    rows = {}
    for head, checkpoint in checkpoints.items():
        for scale in scales:
            (name, calls), sampler = next(iter(samplers(head, scale).items()))
            rows[f"{head}/{scale}"] = [draw(checkpoint, f"{name} {calls} {scale}", sampler, seed=0, count=count)]
    report = measure(
        f"select_{count}",
        rows,
        folder,
        reference=str(SHARDS / "validation_reference"),
        held_out=str(SHARDS / "validation"),
        num_images=count,
    )
    found = {row["name"]: row[report["metric"]] for row in report["rows"]}
    return {(head, scale): found[f"{head}/{scale}"] for head in checkpoints for scale in scales}


def table(
    rows: dict[str, list[dict[str, Any]]], calls: dict[str, int], scales: dict[str, float], metric: str
) -> list[str]:
    lines = [
        f"| head | calls of it | guidance scale | {metric} | precision | recall | label accuracy (%) | images/s |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in rows.items():
        if name not in calls:
            continue
        cells = [
            spread([run[metric] for run in runs], ".1f"),
            *(spread([run[figure] for run in runs], ".3f") for figure in ("precision", "recall")),
            spread([100 * run["label_accuracy"] for run in runs], ".1f"),
            spread([run["sampling"]["images_per_second_without_decoding"] for run in runs], ".0f"),
        ]
        lines.append(f"| {name} | {calls[name]} | {scales[name]:g} | {' | '.join(cells)} |")
    return lines


def draw_figure(
    rows: dict[str, list[dict[str, Any]]], calls: dict[str, int], real: float, metric: str, path: Path
) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for name, count in calls.items():
        values = [run[metric] for run in rows[name]]
        speeds = [run["sampling"]["images_per_second_without_decoding"] for run in rows[name]]
        error = stdev(values) if len(values) > 1 else 0.0
        label = f"{name}, {count} calls" if count > 1 else name
        axes[0].errorbar([count], [mean(values)], [error], marker="o", capsize=2, linestyle="", label=label)
        axes[1].errorbar([mean(speeds)], [mean(values)], [error], marker="o", capsize=2, linestyle="")
    for axis in axes:
        axis.axhline(real, color="grey", linewidth=0.8, label="test images")
        axis.set_ylim(bottom=0)
    ticks = sorted(set(calls.values()))
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0].set(xlabel="calls of the head for an id", ylabel=metric)
    axes[1].set(xlabel="images/s, without decoding", ylabel=metric)
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training and samples")
    parser.add_argument("--batches", type=int, default=400, help="of training, at least 41")
    parser.add_argument("--images", type=int, default=1000, help="of each set of samples, a multiple of 10")
    parser.add_argument("--chosen-by", type=int, default=300, help="samples by which the guidance scale is chosen")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 2.5], help="of guidance")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/bits_lfq"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    checkpoints = {(head, seed): train(head, seed, given.batches, given.runs) for seed in given.seeds for head in HEADS}
    first = {head: checkpoints[head, given.seeds[0]] for head in HEADS}
    chosen = choose(first, given.scales, given.chosen_by, given.runs)
    files: dict[str, list[Path]] = {}
    calls: dict[str, int] = {}
    scales: dict[str, float] = {}
    likelihoods: dict[str, list[str]] = {}
    for head in HEADS:
        scale = min(given.scales, key=lambda scale, head=head: chosen[head, scale])
        for number, ((name, count), sampler) in enumerate(samplers(head, scale).items()):
            row = name if name not in calls else f"{name}, {count}"
            calls[row], scales[row] = count, scale
            for seed in given.seeds:
                checkpoint = checkpoints[head, seed]
                made = draw(checkpoint, f"{name} {count} {scale}", sampler, seed=seed, count=given.images)
                files.setdefault(row, []).append(made)
                if number == 0:
                    likelihoods.setdefault(row, []).append(str(checkpoint))
    report = measure(
        f"table_{given.images}",
        files,
        given.runs,
        reference=str(SHARDS / "train"),
        num_reference=1000,
        held_out=str(SHARDS / "test"),
        num_images=given.images,
        likelihoods=likelihoods,
    )
    metric = report["metric"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in report["rows"]:
        rows.setdefault(one["name"], []).append(one)
    real = report["rows"][0]
    draw_figure(rows, calls, real[metric], metric, given.page.with_suffix(".png"))
    options = f"--seeds {' '.join(map(str, given.seeds))} --batches {given.batches} --images {given.images}"
    options += f" --chosen-by {given.chosen_by} --scales {' '.join(f'{scale:g}' for scale in given.scales)}"
    lines = [
        "# Bits three ways, on images",
        "",
        f"`python docs/experiments/bits_lfq.py {options}`, {stamp()}.",
        "",
        f"{given.batches} batches of 128 for each head. Samples against 1,000 training images; of {given.images} test "
        f"images {metric} is {real[metric]:.1f}, precision {real['precision']:.3f}, recall {real['recall']:.3f}, label "
        f"accuracy {100 * real['label_accuracy']:.1f}%.",
        "",
        *table(rows, calls, scales, metric),
        "",
        "| head | -log p of a test image (nats) | standard error | bits per id | minutes to train |",
        "|:--|--:|--:|--:|--:|",
    ]
    for head, name in zip(HEADS, likelihoods, strict=True):
        found = [run["likelihood"] for run in rows[name]]
        sign = {"exact": "", "bound": "at most "}[found[0]["kind"]]
        minutes = mean(minutes_of(checkpoints[head, seed]) for seed in given.seeds)
        lines.append(
            f"| {head} | {sign}{spread([one['nats'] for one in found], '.1f')} "
            f"| {mean(one['standard_error'] for one in found):.1f} "
            f"| {sign}{spread([one['bits_per_token'] for one in found], '.3f')} | {minutes:.1f} |"
        )
    lines += [
        "",
        f"{metric} of {given.chosen_by} samples on the split of `select.yaml`, by which the guidance scale was chosen:",
        "",
        f"| guidance scale | {' | '.join(f'{scale:g}' for scale in given.scales)} |",
        f"|:--|{'--:|' * len(given.scales)}",
        *(f"| {head} | {' | '.join(f'{chosen[head, scale]:.1f}' for scale in given.scales)} |" for head in HEADS),
        "",
        f"![]({given.page.with_suffix('.png').name})",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print(f"Wrote {given.page} and {given.page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
