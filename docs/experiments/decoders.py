"""Four decoders of the same frozen tokens on a CPU: train, decode true, sampled and shuffled ids; table and figures.

  python docs/experiments/decoders.py

The quickstart's FSQ ids (49 ids of 512 values) are decoded by the tokenizer's own decoder, by diffusion over pixels
given the ids (`lightning_configs/quickstart/decoder.yaml`), by diffusion of the residual, which is the image minus the
tokenizer's own reconstruction, and by DisCon, which draws KL latents given the ids and the class (`discon.yaml`). A
fifth is trained by the consistency objective, for one network call or a few, a sixth is diffusion over pixels by a
U-Net (`decoder_unet.yaml`), and a seventh is distilled from that (`decoder_distilled.yaml`). Needs `make quickstart`,
then the KL tokenizer and its scale, which `make comparison` makes, and matplotlib. Finished runs, images and
reports are kept: the command goes on where it stopped.

  python docs/experiments/decoders.py --calls diffusion_unet distilled consistency

measures these by network calls and true ids alone, which needs the tokenizer of `make quickstart`, and writes no page.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from shared import fit, minutes_of, spread, stamp
from torch import Tensor

from discrete_lit.checkpoints import load
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.solvers import ConsistencySampler, Euler
from discrete_lit.evaluation.classifier import load_classifier
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.metrics.reconstruction import pixel_fidelity
from discrete_lit.samplers import GuidedSolver

CONFIGS = Path("lightning_configs/quickstart")
QUICKSTART = Path("runs/quickstart")
TOKENIZER = QUICKSTART / "tokenizer" / "checkpoints" / "last.ckpt"
GENERATOR = QUICKSTART / "masked" / "checkpoints" / "last.ckpt"
CLASSIFIER = QUICKSTART / "classifier_apart" / "checkpoints" / "last.ckpt"
CLASSES = 10
OWN = "own decoder"
# Name to the recipes, one laid over the other, and further settings. The scale brings the residuals' deviation near 1.
RECIPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "diffusion": (("decoder",), {}),
    "residual": (("decoder",), {"model.init_args.target": "residual", "model.init_args.residual_scale": 9.0}),
    "DisCon": (("discon",), {}),
    "consistency": (("decoder", "decoder_consistency"), {}),
    "diffusion_unet": (("decoder_unet",), {}),
    "distilled": (("decoder_unet", "decoder_distilled"), {}),
}
TEACHER = {"distilled": "diffusion_unet"}
TABLE = (OWN, "diffusion", "residual", "DisCon")
ON_THE_PAGE = ("diffusion", "residual", "DisCon", "consistency", "diffusion_unet", "distilled")
KINDS = ("true", "sampled", "shuffled")
# Steps of Euler in the table, and the network calls of the figure.
STEPS = {"diffusion": 20, "residual": 20}
FEW, MANY = (1, 2, 4), (1, 2, 4, 8, 20)
CALLS = {"diffusion": MANY, "residual": MANY, "consistency": FEW, "diffusion_unet": MANY, "distilled": FEW}
CONSISTENCY = ("consistency", "distilled")


def train(name: str, batches: int | None, folder: Path) -> Path:
    """The checkpoint of a decoder; that of its teacher is made first."""
    recipes, settings = RECIPES[name]
    if name in TEACHER:
        settings = settings | {"model.init_args.teacher": train(TEACHER[name], batches, folder)}
    if batches is not None:
        settings = settings | {
            "model.init_args.scheduler.init_args.total_steps": batches,
            "trainer.max_steps": batches,
            "trainer.val_check_interval": batches,
        }
    return fit(folder / name, [CONFIGS / f"{recipe}.yaml" for recipe in recipes], settings)


# --- Ids and their images ---


@cache
def test_images(count: int) -> Tensor:
    """`(count, 1, 32, 32)` uint8: the first test images of each class, image i of class i % 10."""
    by_class: dict[int, list[np.ndarray]] = {number: [] for number in range(CLASSES)}
    for label, decode in open_image_set(QUICKSTART / "shards" / "test", 32, image_channels=1).stream():
        assert label is not None
        if len(by_class[label]) < count // CLASSES:
            by_class[label].append(decode())
    rows = [by_class[number][row] for row in range(count // CLASSES) for number in range(CLASSES)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def next_class(count: int) -> Tensor:
    """The number of the image whose ids image i gets when they are shuffled: that beside it, of the next class."""
    numbers = torch.arange(count)
    return numbers - numbers % CLASSES + (numbers + 1) % CLASSES


def ids_of(kind: str, count: int, folder: Path) -> Tensor:
    """`(count, 7, 7)` ids: of the test images, drawn by the masked generator, or of images of the next class."""
    file = folder / f"ids_{kind}_{count}.npy"
    if not file.is_file():
        if kind == "sampled":
            random = CounterRandom(0, torch.arange(count))
            found = load(GENERATOR).eval().draw(labels_of(count), random).tokens
        else:
            found = load(TOKENIZER).eval().encode(from_uint8(test_images(count)))
            found = found[next_class(count)] if kind == "shuffled" else found
        np.save(file, found.numpy())
    return torch.from_numpy(np.load(file))


def decoding(name: str, checkpoint: Path | None, calls: int | None) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """A function of ids, labels, the numbers of the images and a seed to images in [-1, 1]."""
    if checkpoint is None:
        tokenizer = load(TOKENIZER).eval()
        return lambda ids, labels, numbers, seed: tokenizer.decode(ids)
    decoder = load(checkpoint).eval()
    if name == "DisCon":
        return lambda ids, labels, numbers, seed: decoder.tokenizer.decode(
            decoder.draw(labels, CounterRandom(seed, numbers), tokens=ids).tokens
        )
    solver = None if calls is None else (ConsistencySampler if name in CONSISTENCY else Euler)(calls)
    sampler = None if solver is None else GuidedSolver(solver)
    return lambda ids, labels, numbers, seed: decoder.decode(ids, sampler=sampler, seed=seed, indices=numbers)


@torch.no_grad()
def decode(
    name: str, kind: str, seed: int, *, checkpoint: Path | None, count: int, folder: Path, calls: int | None = None
) -> Path:
    """The decoded images, `samples.npz`, and beside it `seconds.txt`, the processor time of an image."""
    output = folder / f"{name}_{kind}_{seed}_{count}{'' if calls is None else f'_{calls}'}".replace(" ", "_")
    file = output / "samples.npz"
    if not file.is_file():
        made = decoding(name, checkpoint, calls)
        ids, labels, numbers = ids_of(kind, count, folder), labels_of(count), torch.arange(count)
        begun = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision("auto") == "bf16-mixed"):
            images = [to_uint8(made(ids[part], labels[part], part, seed)) for part in numbers.split(100)]
        output.mkdir(parents=True, exist_ok=True)
        (output / "seconds.txt").write_text(f"{(time.process_time() - begun) / count:.5f}\n")
        np.savez(file, arr_0=torch.cat(images).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return file


def pixels(file: Path) -> Tensor:
    """`(N, 1, 32, 32)` uint8."""
    return torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2)


# --- Measures ---


def high_frequency_power(images: Tensor) -> float:
    """The power above half of the Nyquist frequency, the mean over images: |F|^2 of pixels in [0, 1], summed where the
    radial frequency is at least 1/4 cycle per pixel."""
    power = torch.fft.fft2(images.double() / 255).abs().square().mean(dim=(0, 1))
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in power.shape)
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    return float(power[radius >= 0.25].sum())


@torch.no_grad()
def figures_of(file: Path, kind: str) -> dict[str, float]:
    """PSNR in decibels, the high-frequency power over that of the test images, and who is recognised, in per cent."""
    images = pixels(file)
    real = test_images(len(images))
    found = {"high frequencies": high_frequency_power(images) / high_frequency_power(real)}
    if kind != "sampled":
        whose = next_class(len(images)) if kind == "shuffled" else torch.arange(len(images))
        found["PSNR"] = float(pixel_fidelity(images, real[whose])[0].mean())
    shown = load_classifier(CLASSIFIER)(from_uint8(images)).argmax(dim=1)
    labels = labels_of(len(images))
    found["label"] = float((shown == labels).float().mean()) * 100
    found["ids"] = float((shown == labels[next_class(len(images))]).float().mean()) * 100
    return found


def distances(
    samples: dict[str, list[Path]], count: int, folder: Path, name: str
) -> tuple[str, float, dict[str, list[float]]]:
    """The name of the distance, that of the test images, and that of each run of each row; kept."""
    file = folder / f"report_{name}_{count}.json"
    wanted = {row: [str(path) for path in paths] for row, paths in samples.items()}
    if not file.is_file() or json.loads(file.read_text())["wanted"] != wanted:
        report = evaluate(
            reference=str(QUICKSTART / "shards" / "train"),
            num_reference=1000,
            held_out=str(QUICKSTART / "shards" / "test"),
            num_images=count,
            samples=dict(wanted),
            image_size=32,
            image_channels=1,
            batch_size=10,
            output=str(folder / f"evaluation_{name}"),
        )
        file.write_text(json.dumps({"wanted": wanted, "report": report}))
    report = json.loads(file.read_text())["report"]
    metric, (real, *rows) = report["metric"], report["rows"]
    return metric, real[metric], {name: [row[metric] for row in rows if row["name"] == name] for name in wanted}


# --- The page ---


def table(files: dict[tuple[str, str], list[Path]], found: dict[str, list[float]], metric: str) -> list[str]:
    lines = [
        f"| ids | decoder | PSNR (dB) | high frequencies | {metric} | shows the label (%) | shows the ids' class (%) |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for (name, kind), paths in files.items():
        each = [figures_of(path, kind) for path in paths]
        psnr = spread([one["PSNR"] for one in each], ".2f") if kind != "sampled" else ""
        share = spread([one["high frequencies"] for one in each], ".3f")
        label = spread([one["label"] for one in each], ".1f")
        of_ids = spread([one["ids"] for one in each], ".1f") if kind == "shuffled" else ""
        distance = spread(found[f"{name}, {kind}"], ".2f")
        lines.append(f"| {kind} | {name} | {psnr} | {share} | {distance} | {label} | {of_ids} |")
    return lines


def draw_pictures(files: dict[tuple[str, str], list[Path]], path: Path) -> None:
    """Rows of the same ten images, one of each class: a block for each kind of ids."""
    from matplotlib import pyplot

    chosen = slice(CLASSES, 2 * CLASSES)
    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(14, 3.4), constrained_layout=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        count = len(pixels(files[OWN, "true"][0]))
        rows: dict[str, Tensor] = {}
        if kind == "true":
            rows["original"] = test_images(count)[chosen]
        if kind == "shuffled":
            rows["of the label"] = test_images(count)[chosen]
            rows["of the ids"] = test_images(count)[next_class(count)][chosen]
        for name in TABLE:
            for seed, file in enumerate(files.get((name, kind), [])[:2]):
                rows[name if seed == 0 else f"{name}, other noise"] = pixels(file)[chosen]
        image = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows.values()])
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_yticks([16 + 32 * row for row in range(len(rows))], list(rows), fontsize="small")
        axis.set_xticks([])
        axis.set_title(f"{kind} ids")
        axis.set_anchor("N")
    figure.savefig(path, dpi=130)


def draw_calls(by_calls: dict[str, dict[int, float]], lines: dict[str, float], metric: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), constrained_layout=True)
    for name, values in by_calls.items():
        axis.plot(list(values), list(values.values()), marker="o", label=name)
    for number, (name, value) in enumerate(lines.items()):
        axis.axhline(value, color="grey", linewidth=0.8, linestyle=("-", "--", ":")[number], label=name)
    axis.set_xscale("log", base=2)
    ticks = sorted({calls for values in by_calls.values() for calls in values})
    axis.set_xticks(ticks, [str(calls) for calls in ticks])
    axis.set(xlabel="network calls", ylabel=f"{metric}, true ids")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def by_calls_alone(names: list[str], given: argparse.Namespace) -> None:
    """Print what some decoders make of true ids in several numbers of network calls, beside the own decoder."""
    checkpoints = {name: train(name, given.batches, given.runs) for name in names}
    count, seed = given.images, given.seeds[0]
    files = {OWN: decode(OWN, "true", 0, checkpoint=None, count=count, folder=given.runs)}
    for name in names:
        for calls in CALLS[name]:
            files[f"{name}, {calls}"] = decode(
                name, "true", seed, checkpoint=checkpoints[name], count=count, folder=given.runs, calls=calls
            )
    rows = {row: [file] for row, file in files.items()}
    metric, real, found = distances(rows, count, given.runs, "_".join(names))
    print(f"{metric} of {count} images; {real:.2f} of as many test images")
    for row, file in files.items():
        figures = figures_of(file, "true")
        others = f"PSNR {figures['PSNR']:.2f} dB, high frequencies {figures['high frequencies']:.3f}"
        print(f"{row}: {metric} {found[row][0]:.2f}, {others}, shows the label {figures['label']:.1f}%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the noise of the decoders")
    parser.add_argument("--images", type=int, default=500, help="of each set, a multiple of 10, 1,000 at most")
    parser.add_argument("--batches", type=int, default=None, help="of each training; those of the recipes by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/decoders"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    parser.add_argument("--calls", nargs="+", choices=sorted(CALLS), help="decoders to measure by network calls alone")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    if given.calls:
        by_calls_alone(given.calls, given)
        return
    checkpoints = {name: train(name, given.batches, given.runs) for name in ON_THE_PAGE}
    minutes = {name: f"{minutes_of(checkpoint):.1f}" for name, checkpoint in checkpoints.items()}

    def images(name: str, kind: str, seed: int, calls: int | None = None) -> Path:
        calls = calls or STEPS.get(name)
        of = checkpoints.get(name)
        return decode(name, kind, seed, checkpoint=of, count=given.images, folder=given.runs, calls=calls)

    files: dict[tuple[str, str], list[Path]] = {}
    for kind in KINDS:
        for name in TABLE:
            # The tokenizer's own decoder draws no noise, and only DisCon is told a class that shuffled ids contradict.
            once = name == OWN or (kind == "shuffled" and name != "DisCon")
            files[name, kind] = [images(name, kind, seed) for seed in (given.seeds[:1] if once else given.seeds)]
    rows = {f"{name}, {kind}": paths for (name, kind), paths in files.items()}
    metric, real, found = distances(rows, given.images, given.runs, "table")
    few = {f"{name}, {calls}": (name, calls) for name in ON_THE_PAGE for calls in CALLS.get(name, ())}
    made = {row: [images(name, "true", given.seeds[0], calls)] for row, (name, calls) in few.items()}
    of_calls = distances(made, given.images, given.runs, "calls")[2]
    by_calls: dict[str, dict[int, float]] = {}
    for row, (name, calls) in few.items():
        by_calls.setdefault(name, {})[calls] = of_calls[row][0]
    own = found[f"{OWN}, true"][0]
    pictures, curves = given.page.with_suffix(".png"), given.page.with_name(f"{given.page.stem}_calls.png")
    draw_pictures(files, pictures)
    draw_calls(by_calls, {OWN: own, "test images": real}, metric, curves)
    seconds = {
        name: mean(float((path.parent / "seconds.txt").read_text()) for path in files[name, "true"]) for name in TABLE
    }
    options = f"--seeds {' '.join(map(str, given.seeds))} --images {given.images}"
    options += "" if given.batches is None else f" --batches {given.batches}"
    ticks = sorted({calls for values in by_calls.values() for calls in values})
    lines = [
        "# Four decoders of the same tokens",
        "",
        f"`python docs/experiments/decoders.py {options}`, {stamp()}. Mean ± standard deviation over the noise.",
        "",
        f"{metric} of {given.images} images, lower is better; {real:.2f} of as many test images.",
        "",
        *table(files, found, metric),
        "",
        "| decoder | minutes to train | ms of a processor for an image |",
        "|:--|--:|--:|",
        *(f"| {name} | {minutes.get(name, '')} | {1000 * seconds[name]:.1f} |" for name in TABLE),
        "",
        f"{metric} against network calls, true ids, one seed of the noise. The consistency decoder took "
        f"{minutes['consistency']} minutes to train, the U-Net {minutes['diffusion_unet']}, and what is distilled from "
        f"that {minutes['distilled']} more.",
        "",
        f"| network calls | {' | '.join(map(str, ticks))} |",
        f"|:--|{'--:|' * len(ticks)}",
        *(
            f"| {name} | {' | '.join(f'{values[count]:.2f}' if count in values else '' for count in ticks)} |"
            for name, values in by_calls.items()
        ),
        "",
        f"![]({pictures.name})",
        "",
        f"![]({curves.name})",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print(f"Wrote {given.page}, {pictures} and {curves}")


if __name__ == "__main__":
    main()
