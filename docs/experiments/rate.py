"""Do bits explain the gap between discrete and continuous tokenizers? Rate and distortion of both; table and figure.

  python docs/experiments/rate.py

BAR (Yu et al., 2026, https://arxiv.org/abs/2602.09024) claims that discrete tokenizers reconstruct worse than
continuous ones because they are given fewer bits. Here both are given theirs on one axis. The rate of ids is their
capacity L log2 V, and the entropy of one id times L; that of a KL-VAE is the divergence of its posterior from the
standard normal law, which is what its latents cost when they are sent by that law (bits back; Hinton and van Camp,
1993), and bounds the information in them from above. It is the rate of sampled latents, so the reconstructions are of
these.

The quickstart's FSQ and KL tokenizers, and FSQ with further numbers of bits, have one network, batches and optimizer
but for the bottleneck; LFQ's and the multi-scale tokenizer are of `make comparison` too. Distances are of 1,000 test
images to themselves. Needs the tokenizers of `make comparison` and matplotlib; finished trainings are kept.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log, log2, prod
from pathlib import Path
from typing import Any

import torch
from shared import fit, processor_minutes, stamp
from torch import Tensor

from discrete_lit.checkpoints import load
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.metrics import EfficientNetLite0, FeatureMoments
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import Moments
from discrete_lit.metrics.reconstruction import pixel_fidelity
from discrete_lit.tokenizers import KLVAE

QUICKSTART, CONFIGS = Path("runs/quickstart"), Path("lightning_configs/quickstart")
KEPT = {"LFQ": "tokenizer_lfq", "multi-scale VQ": "tokenizer_multi_scale", "KL": "tokenizer_kl"}
BATCH = 100


@dataclass(frozen=True)
class Point:
    """A tokenizer's rate, in bits for an image, and its distortion."""

    name: str
    capacity: float | None
    """L log2 V; None of continuous latents."""
    rate: float
    """L times the entropy of an id (too low where V is not far below the number of ids), or the divergence."""
    psnr: float
    distance: float

    @property
    def bits(self) -> float:
        """The most that it can say of an image."""
        return self.rate if self.capacity is None else self.capacity


def test_images(count: int) -> list[Tensor]:
    """Batches of the test split, uint8."""
    chosen = Selection(open_image_set(QUICKSTART / "shards" / "test", 32, image_channels=1), count, num_classes=10)
    return [batch.images for batch in chosen.read(chosen.positions(), BATCH) if batch.images is not None]


def moments(batches: Iterator[Tensor], extractor: EfficientNetLite0) -> Moments:
    gathered = FeatureMoments(extractor)
    for images in batches:
        gathered.update(extractor(images))
    return gathered.compute()


def reconstructed(tokenizer: Any, batches: list[Tensor], see: Callable[[Any], None]) -> Iterator[Tensor]:
    """Reconstruct batches, uint8; `see` is given the ids, or the law of the latents."""
    for number, images in enumerate(batches):
        given = from_uint8(images)
        if isinstance(tokenizer, KLVAE):
            see(tokenizer.posterior(given))
            code = tokenizer.encode(given, CounterRandom(0, torch.arange(len(given)) + BATCH * number))
        else:
            code = tokenizer.encode(given)
            see(code)
        yield to_uint8(tokenizer.decode(code))


def measured(name: str, checkpoint: Path, batches: list[Tensor], extractor: EfficientNetLite0, real: Moments) -> Point:
    tokenizer: Any = load(checkpoint)
    continuous = isinstance(tokenizer, KLVAE)
    usage = None if continuous else CodebookUsage(tokenizer.vocab_size)
    nats: list[Tensor] = []
    see = (lambda law: nats.append(law.kl())) if usage is None else usage.update
    with torch.inference_mode():
        made = list(reconstructed(tokenizer, batches, see))
        psnr = torch.cat([pixel_fidelity(own, images)[0] for images, own in zip(batches, made, strict=True)])
        distance = frechet_distance(moments(iter(made), extractor), real)
    length = None if continuous else prod(tokenizer.token_shape(32))
    if usage is None or length is None:
        return Point(name, None, float(torch.cat(nats).mean()) / log(2), float(psnr.mean()), distance)
    entropy = float(usage.compute()[1].log2())
    return Point(name, length * log2(tokenizer.vocab_size), length * entropy, float(psnr.mean()), distance)


def draw_figure(points: list[Point], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for axis, value, title in ((axes[0], "psnr", "PSNR (dB)"), (axes[1], "distance", "FD-EffNetLite0")):
        line = [point for point in points if point.name.startswith("FSQ")]
        axis.plot([point.bits for point in line], [getattr(point, value) for point in line], color="C0")
        for point in points:
            colour = "C0" if point.name.startswith("FSQ") else "C1" if point.capacity is None else "C2"
            axis.plot(point.bits, getattr(point, value), "s" if point.capacity is None else "o", color=colour)
            where = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": "x-small"}
            axis.annotate(point.name, (point.bits, getattr(point, value)), **where)
        axis.set(xlabel="bits for each image, at most", ylabel=title)
        axis.margins(x=0.15)
    pyplot.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="*", default=["8,8,8,8", "8,8,8,8,8"], help="of further FSQ tokenizers")
    parser.add_argument("--batches", type=int, default=1900, help="of training of these")
    parser.add_argument("--images", type=int, default=1000, help="of the test split, a multiple of 100")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/rate"), help="folder of the trainings")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    checkpoints = {"FSQ 8,8,8": QUICKSTART / "tokenizer" / "checkpoints" / "last.ckpt"}
    for levels in given.levels:
        settings = {
            "model.init_args.levels": f"[{levels}]",
            "model.init_args.scheduler.init_args.total_steps": given.batches,
            "trainer.max_steps": given.batches,
            "trainer.val_check_interval": given.batches,
        }
        run = given.runs / f"fsq_{levels.replace(',', '_')}"
        checkpoints[f"FSQ {levels}"] = fit(run, [CONFIGS / "tokenizer.yaml"], settings)
    checkpoints |= {name: QUICKSTART / run / "checkpoints" / "last.ckpt" for name, run in KEPT.items()}
    batches, extractor = test_images(given.images), EfficientNetLite0()
    with torch.inference_mode():
        real = moments(iter(batches), extractor)
    points = [measured(name, checkpoint, batches, extractor, real) for name, checkpoint in checkpoints.items()]
    picture = given.page.with_suffix(".png")
    draw_figure(points, picture)
    lines = [
        "# Do bits explain the gap between discrete and continuous?",
        "",
        f"`python docs/experiments/rate.py --levels {' '.join([*given.levels, '--batches'])} {given.batches} --images "
        f"{given.images}`, {stamp()}, {processor_minutes():.0f} minutes of processor. One training seed; "
        f"{given.images:,} test images (grey, 32x32) and their reconstructions.",
        "",
        "| tokenizer | L log2 V | bits: L x entropy of an id, or divergence of the latents | PSNR | FD-EffNetLite0 |",
        "|:--|--:|--:|--:|--:|",
    ]
    for point in points:
        capacity = "" if point.capacity is None else f"{point.capacity:.0f}"
        lines.append(f"| {point.name} | {capacity} | {point.rate:.0f} | {point.psnr:.1f} dB | {point.distance:.1f} |")
    given.page.write_text("\n".join([*lines, "", f"![]({picture.name})", ""]))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
