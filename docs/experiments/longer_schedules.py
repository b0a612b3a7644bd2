"""Does a longer schedule of discrete diffusion reach MaskGIT? One masked checkpoint, two samplers; table and figure.

  python docs/experiments/longer_schedules.py

"Discrete Diffusion for Image Generation" expects that longer schedules would reach MaskGIT's quality. The quickstart's
masked generator, 0.93M parameters on 49 ids of 512, is drawn from by MaskGIT's confidence and by the ancestral steps of
the absorbing process, whose law is the model's own the more exactly, the more steps there are; with the same guidance,
and without. 1,000 images a row against the test split, as in the quickstart's table. Finished samples are kept: the
command goes on where it stopped. Needs `make quickstart` and matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared import processor_minutes, stamp

from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.samplers import AncestralSampler, MaskGITSampler, Sampler

QUICKSTART = Path("runs/quickstart")
LENGTH = 49  # ids of an image: more rounds of MaskGIT than these have nothing to draw
COLUMNS = {"FD-EffNetLite0": ".1f", "precision": ".3f", "recall": ".3f", "within_class_diversity": ".2f"}


def samplers(rounds: list[int], steps: list[int], guidance: float) -> dict[tuple[str, int], Sampler]:
    """The sampler of each row; MaskGIT's are those of the quickstart, but for their rounds."""
    settings: dict[str, Any] = {"guidance_scale": guidance, "guidance_schedule": "linear"}
    made: dict[tuple[str, int], Sampler] = {}
    for count in rounds:
        made["MaskGIT", count] = MaskGITSampler(steps=count, choice_temperature=10.0, **settings)
    for count in steps:
        made["ancestral", count] = AncestralSampler(steps=count, **settings)
    return made


def drawn(checkpoint: Path, folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """The samples of each row by its name, for instance `MaskGIT, 8, guidance 2.0`."""
    made = {}
    for guidance in given.guidance:
        for (name, count), sampler in samplers(given.rounds, given.steps, guidance).items():
            output = folder / f"{name.lower()}_{count}_{guidance}_{given.images}"
            if not (output / "run.json").is_file():
                sample(
                    str(checkpoint),
                    str(output),
                    num_samples=given.images,
                    sampler=sampler,
                    batch_size=200,
                    precision="auto",
                )
            made[f"{name}, {count}, guidance {guidance}"] = output / "samples.npz"
    return made


def measured(samples: dict[str, Path], images: int, folder: Path) -> list[dict[str, Any]]:
    return evaluate(
        reference=str(QUICKSTART / "shards" / "train"),
        output=str(folder / "evaluation"),
        num_reference=1000,
        held_out=str(QUICKSTART / "shards" / "test"),
        num_images=images,
        samples={name: str(path) for name, path in samples.items()},
        reconstructions={"tokenizer": str(QUICKSTART / "tokenizer" / "checkpoints" / "last.ckpt")},
        classifier={"apart": str(QUICKSTART / "classifier_apart" / "checkpoints" / "last.ckpt")},
        image_size=32,
        image_channels=1,
        batch_size=10,
    )["rows"]


def accuracy(row: dict[str, Any]) -> float:
    return row["label_accuracy"]["apart"]


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "samples":
            name, _, guidance = row["name"].split(", ")
            lines.setdefault((name, guidance), []).append(row)
    ceiling = next(row for row in rows if row["kind"] == "reconstructions")
    scales = sorted({guidance for _, guidance in lines})
    for axis, column in zip(axes, ("FD-EffNetLite0", "recall", "within_class_diversity"), strict=True):
        for (name, guidance), of_line in lines.items():
            axis.plot(
                [row["sampling"]["sequential_passes"] for row in of_line],
                [row[column] for row in of_line],
                marker="s" if name == "MaskGIT" else "o",
                linestyle="--" if name == "MaskGIT" else "-",
                color=f"C{scales.index(guidance)}",
                label=f"{name}, {guidance}",
            )
        axis.axhline(ceiling[column], color="grey", linewidth=0.8, label="tokenizer")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="passes that follow one another", ylabel=column.replace("_", "-"))
    axes[0].legend(fontsize="x-small")
    pyplot.savefig(path, dpi=100)


def page(rows: list[dict[str, Any]], command: str, machine: str) -> list[str]:
    heads = [name.replace("_", "-") for name in COLUMNS]
    lines = [
        "# Does a longer schedule reach MaskGIT?",
        "",
        f"`{command}`, {machine}. One checkpoint, one seed of the draws.",
        "",
        f"| images of | passes | {' | '.join(heads)} | label accuracy |",
        f"|:--|--:|{'--:|' * (len(COLUMNS) + 1)}",
    ]
    for row in rows:
        passes = row["sampling"].get("sequential_passes", "")
        values = " | ".join(f"{row[column]:{form}}" for column, form in COLUMNS.items())
        lines.append(f"| {row['name']} | {passes} | {values} | {accuracy(row):.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 16, 32], help=f"of MaskGIT, at most {LENGTH}")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="of the ancestral sampler")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0], help="scales; 1 is none")
    parser.add_argument("--images", type=int, default=1000, help="of each row, a multiple of 10")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/longer_schedules"), help="kept samples")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    samples = drawn(QUICKSTART / "masked" / "checkpoints" / "last.ckpt", given.runs, given)
    rows = measured(samples, given.images, given.runs)
    picture = given.page.with_suffix(".png")
    draw_figure(rows, picture)
    options = " ".join(
        f"--{name} {' '.join(map(str, getattr(given, name)))}" for name in ("rounds", "steps", "guidance")
    )
    command = f"python docs/experiments/longer_schedules.py {options} --images {given.images}"
    machine = f"{stamp()}, {processor_minutes():.0f} minutes of processor"
    given.page.write_text("\n".join([*page(rows, command, machine), "", f"![]({picture.name})", ""]))
    (given.runs / "rows.json").write_text(json.dumps(rows))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
