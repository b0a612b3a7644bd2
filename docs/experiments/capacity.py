"""How many bits does an image need? Capacity of the ids, their entropy, a model's bits, lossless files; table, figure.

  python docs/experiments/capacity.py

An estimate in "Do we need discrete tokens and diffusion?" says that L ids out of V can stand for an image only if
L log2 V is at least the entropy of the image (7,056 bits for three channels of 28 x 28 latents at 3 bits each; with 256
ids V must then be 2^28, not the 2^27 of the text, since 256 x 27 is 6,912). Beside the capacity of each tokenizer of
`make comparison` this sets what their ids of the test images really take: 49 or 104 times the entropy of one id, and
-log2 p of the whole by the generators on them, exact or a bound. And the bits of the images themselves: as pixels, as
the smallest lossless PNG and WebP files that Pillow makes, and the distortion at which the ids are so few. Needs
`make comparison` and matplotlib.
"""

import argparse
import io
import json
from math import log, log2
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image
from shared import processor_minutes, stamp

from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.image_sets import open_image_set

QUICKSTART = Path("runs/quickstart")
# The families on the tokens of each tokenizer, by the names of the comparison's report.
ON = {
    "FSQ tokenizer": ("autoregressive on FSQ", "RAR on FSQ", "masked on FSQ"),
    "LFQ tokenizer": ("BAR on LFQ", "MaskBit on LFQ"),
    "multi-scale tokenizer": ("next-scale on multi-scale VQ",),
}


def file_bits(pictures: list[np.ndarray], kind: str, **settings: Any) -> float:
    """The mean size of grey pictures `(H, W)` uint8 as lossless files of their own, headers included."""
    sizes = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind, **settings)
        sizes.append(8 * len(file.getvalue()))
    return mean(sizes)


def of_images(count: int) -> dict[str, float]:
    """Bits of an image of the test split, by how it is written."""
    shards = open_image_set(QUICKSTART / "shards" / "test", 32, image_channels=1)
    chosen = Selection(shards, count, num_classes=10)
    pictures = [
        image[0].numpy()
        for batch in chosen.read(chosen.positions(), 100)
        if batch.images is not None
        for image in batch.images
    ]
    assert len(pictures) == count, "as many as were asked for"
    return {
        "pixels of 8 bits": 8.0 * pictures[0].size,
        "PNG, each a file": file_bits(pictures, "PNG", optimize=True),
        "WebP lossless, each a file": file_bits(pictures, "WEBP", lossless=True, quality=100, method=6),
        "entropy of one pixel x pixels": pixel_entropy(pictures),
    }


def pixel_entropy(pictures: list[np.ndarray]) -> float:
    shares = np.bincount(np.concatenate([picture.ravel() for picture in pictures]), minlength=256).astype(float)
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log2(shares)).sum() * pictures[0].size)


def of_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each tokenizer its distortion, the capacity and entropy of its ids, and the bits by each model."""
    found = []
    for name, families in ON.items():
        reconstruction = next(row for row in rows if row["name"] == name)["reconstruction"]
        models = {}
        for family in families:
            runs = [row["likelihood"] for row in rows if row["name"] == family and row["likelihood"]]
            if runs:
                models[family.split(" on ")[0]] = (mean(run["nats"] for run in runs) / log(2), runs[0]["kind"])
        found.append({"name": name, "models": models, **reconstruction})
    return found


def draw_figure(images: dict[str, float], tokenizers: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    _, axis = pyplot.subplots(figsize=(8, 4.2), constrained_layout=True)
    names, values, colours = [], [], []
    for label, bits in images.items():
        names.append(label)
        values.append(bits)
        colours.append("grey")
    for number, tokenizer in enumerate(tokenizers):
        kinds = {"L log2 V": tokenizer["capacity_bits"], "L x entropy of an id": tokenizer["entropy_bits"]}
        kinds |= {model: bits for model, (bits, _) in tokenizer["models"].items()}
        for label, bits in kinds.items():
            names.append(f"{tokenizer['name'].removesuffix(' tokenizer')}: {label}")
            values.append(bits)
            colours.append(f"C{number}")
    axis.barh(names, values, color=colours)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="bits for each image")
    axis.bar_label(axis.containers[0], fmt="%.0f", fontsize="x-small", padding=2)
    pyplot.savefig(path, dpi=100)


def page(images: dict[str, float], tokenizers: list[dict[str, Any]], command: str, machine: str) -> list[str]:
    lines = [
        "# How many bits does an image need?",
        "",
        f"`{command}`, {machine}. Bits for each test image of the embedded set (grey, 32x32).",
        "",
        "| the image itself | bits |",
        "|:--|--:|",
        *(f"| {name} | {bits:,.0f} |" for name, bits in images.items()),
        "",
        "| tokenizer | L, V | PSNR of its reconstructions | L log2 V | L x entropy of one id | -log2 p of all ids "
        "given the class |",
        "|:--|:--|--:|--:|--:|:--|",
    ]
    for tokenizer in tokenizers:
        models = ", ".join(
            f"{'≤ ' if kind == 'bound' else ''}{bits:.0f} ({model})"
            for model, (bits, kind) in tokenizer["models"].items()
        )
        ids = f"{tokenizer['tokens']}, {tokenizer['vocab_size']:,}"
        bits = f"{tokenizer['capacity_bits']:.0f} | {tokenizer['entropy_bits']:.0f}"
        lines.append(f"| {tokenizer['name']} | {ids} | {tokenizer['psnr']:.1f} dB | {bits} | {models} |")
    return [*lines, "", f"The class, one of ten, is {log2(10):.1f} bits more."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=QUICKSTART / "comparison" / "report.json")
    parser.add_argument("--images", type=int, default=1000, help="that files are made of")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    images = of_images(given.images)
    tokenizers = of_ids(json.loads(given.report.read_text())["rows"])
    picture = given.page.with_suffix(".png")
    draw_figure(images, tokenizers, picture)
    command = f"python docs/experiments/capacity.py --images {given.images}"
    machine = f"{stamp()}, {processor_minutes():.1f} minutes of processor"
    lines = page(images, tokenizers, command, machine)
    given.page.write_text("\n".join([*lines, "", f"![]({picture.name})", ""]))
    print(f"Wrote {given.page} and {picture}")


if __name__ == "__main__":
    main()
