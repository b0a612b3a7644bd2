"""Emoji both ways: how often a drawn emoji is the one that was named, and how often a name is right.

  python docs/experiments/emoji.py

Needs `make quickstart-emoji`. One model draws an emoji for each of 300 names of three kinds, and names 300 pictures of
each: `seen`, of training; `words known`, whose names training does not have, but each of their words; `new`, the test
set, most of whose names have a word that no training name has. A drawn picture is looked up among all emoji, of every
split, by the distance of their pixels: it is right where the nearest has the name that was asked for (top 1), or one of
the five nearest (top 5). A name is right where it is one of the emoji's own; the share of its words that are says how
near the others are.

Beside it stands what copying would do: as a picture that of the training name with most words in common, as a name that
of the nearest training picture. It writes emoji.md beside this file, and emoji.png: real emoji above drawn ones.

`--guidance 1 1.5 2 3` writes nothing: it draws names that the table does not use, up to 60 of each kind, with each
scale of guidance, and prints how often they are right. The recipe's scale was chosen so.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shared import processor_minutes, stamp
from torch import Tensor

import discrete_lit
from discrete_lit.core.allocator import keep_freed_memory
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.images import from_uint8, height_and_width, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.sources import Emoji, PartOfSource
from discrete_lit.data.sources.emoji import words_of
from discrete_lit.generators import Unified
from discrete_lit.samplers import SegmentSampler

RUNS = Path("runs/quickstart_emoji")
CLASSES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion")
KINDS = {"train": "seen", "combinations": "words known", "test": "new"}
SHOWN = 12
AT_ONCE = 60
# The precision of training, in which pictures are drawn and named too.
PRECISION = resolve_precision("auto", "cpu")


class Pictures:
    """The emoji of a split: pixels `(M, 3, S, S)` in [-1, 1], and the names of each."""

    def __init__(self, package: Path, split: str, size: int) -> None:
        whole = Emoji(package, split, combinations_fraction=0.15, captions=True)  # type: ignore[arg-type]
        source = PartOfSource(whole, classes=[*CLASSES, "Travel & Places"])
        files = [Image.open(io.BytesIO(source.read(number))) for number in range(len(source))]
        arrays = [np.asarray(file.resize((size, size), Image.Resampling.BOX)) for file in files]
        self.pixels = from_uint8(torch.from_numpy(np.stack(arrays))).permute(0, 3, 1, 2)
        self.names = [source.captions(number) for number in range(len(source))]

    def some(self, count: int) -> list[int]:
        """Choose emoji that are spread over the split."""
        return torch.linspace(0, len(self.names) - 1, min(count, len(self.names))).long().tolist()

    def others(self, count: int, most: int = 60) -> list[int]:
        """Choose emoji that `some(count)` leaves out, spread over the split."""
        left = sorted(set(range(len(self.names))) - set(self.some(count)))
        return [left[place] for place in torch.linspace(0, len(left) - 1, min(most, len(left))).long().tolist()]


def nearest(images: Tensor, among: Tensor, count: int = 5) -> Tensor:
    """Find the numbers `(B, count)` of the pictures nearest to each image by the distance of pixels."""
    return torch.cdist(images.flatten(1), among.flatten(1)).topk(count, largest=False).indices


def common(a: str, b: str) -> float:
    """Give the share of words that two names have in common, of the words of both."""
    first, second = set(words_of(a)), set(words_of(b))
    return len(first & second) / max(len(first | second), 1)


def share(right: list[bool] | list[float]) -> str:
    return f"{sum(right) / len(right):.1%}"


def found(images: Tensor, asked: list[str], among: Tensor, names: list[tuple[str, ...]]) -> tuple[list[bool], ...]:
    """Say of each image whether the nearest picture has the name that was asked for, and one of the nearest five."""
    rows = [
        [name in names[number] for number in row]
        for row, name in zip(nearest(images, among).tolist(), asked, strict=True)
    ]
    return [row[0] for row in rows], [any(row) for row in rows]


def row_of(
    kind: str, images: Tensor, said: list[str], *, asked: list[str], own: list[tuple[str, ...]], every: tuple
) -> list[str]:
    top1, top5 = found(images, asked, *every)
    exact = [text in names for text, names in zip(said, own, strict=True)]
    words = [max(common(text, name) for name in names) for text, names in zip(said, own, strict=True)]
    return [kind, share(top1), share(top5), share(exact), share(words)]


def quickly() -> torch.autocast:
    """Compute in bfloat16 where the processor multiplies it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16-mixed")


def drawn(model: Unified, names: list[str], sampler: SegmentSampler | None = None, *, seed: int = 0) -> Tensor:
    """Draw a picture `(B, 3, S, S)` of each name, some at a time, which takes less memory."""
    parts = []
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        indices = torch.arange(first, first + len(some))
        with quickly():
            made = model.sample(model.condition_of_texts(some), sampler, seed=seed, indices=indices)
        parts.append(model.tokenizer.decode(made))
    return torch.cat(parts)


def compare_guidance(
    scales: list[float], model: Unified, splits: dict[str, Pictures], *, count: int, every: tuple
) -> None:
    """Print how often pictures by each scale of guidance are right, of names that the table does not use."""
    print("guidance: top 1 and top 5 of", ", ".join(KINDS.values()))
    for scale in scales:
        image = replace(model.sampler.of("image"), guidance_scale=scale)
        sampler = SegmentSampler({**model.sampler.settings, "image": image}, solver=model.sampler.solver)
        shares = []
        for pictures in splits.values():
            asked = [pictures.names[number][0] for number in pictures.others(count)]
            shares += [share(right) for right in found(drawn(model, asked, sampler, seed=1), asked, *every)]
        print(f"{scale}: {' '.join(shares)}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path("runs/quickstart_colour/package"))
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "transfusion" / "checkpoints" / "last.ckpt")
    parser.add_argument("--count", type=int, default=300, help="names, and pictures, of each kind")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    parser.add_argument("--guidance", type=float, nargs="+", help="scales to compare, in place of a page")
    given = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    model = discrete_lit.load(given.checkpoint)
    assert isinstance(model, Unified)
    splits = {split: Pictures(given.package, split, height_and_width(model.image_size)[0]) for split in KINDS}
    every = torch.cat([each.pixels for each in splits.values()]), [n for each in splits.values() for n in each.names]
    if given.guidance:
        compare_guidance(given.guidance, model, splits, count=given.count, every=every)
        return
    train, rows = splits["train"], list[list[str]]()
    shown: list[Tensor] = []
    for split, kind in KINDS.items():
        chosen = splits[split].some(given.count)
        own = [splits[split].names[number] for number in chosen]
        real, asked = splits[split].pixels[chosen], [names[0] for names in own]
        images = drawn(model, asked)
        with quickly():
            said = model.caption(model.data_of({"image": real}, CounterRandom(0, torch.arange(len(chosen)))))
        rows.append(row_of(kind, images, said, asked=asked, own=own, every=every))
        if split != "train":
            closest = [max(range(len(train.names)), key=lambda n: common(train.names[n][0], name)) for name in asked]
            copied = [train.names[number][0] for number in nearest(real, train.pixels, 1)[:, 0].tolist()]
            rows.append(row_of(f"{kind}, copied", train.pixels[closest], copied, asked=asked, own=own, every=every))
        some = torch.linspace(0, len(chosen) - 1, SHOWN).long()
        shown += [real[some], images[some]]
    tiles = torch.stack([to_uint8(row).permute(2, 0, 3, 1).flatten(1, 2) for row in shown]).flatten(0, 1)
    picture = Image.fromarray(tiles.numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(
        given.page.with_suffix(".png")
    )
    heads = ["names", "picture, top 1", "picture, top 5", "name exact", "words of the name"]
    chosen = "" if given.count == 300 else f" --count {given.count}"
    lines = [
        "# Emoji both ways",
        "",
        f"`python docs/experiments/emoji.py{chosen}`, {stamp()}, {PRECISION}, {processor_minutes():.1f} minutes of "
        f"processor. {given.count} names and {given.count} pictures a row; {len(every[1]):,} emoji to find among.",
        "",
        *(f"| {' | '.join(row)} |" for row in [heads, [":--", *["--:"] * 4], *rows]),
        "",
        f"![Real emoji of each kind, and below them what the model draws of their names]({given.page.stem}.png)",
        "",
    ]
    given.page.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
