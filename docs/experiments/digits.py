"""Digits both ways, and sums with and without a thought: how often pictures show what was asked, and captions say it.

  python docs/experiments/digits.py

Needs `make quickstart-digits`. Each model draws ten pictures of each of the 20 pairs of digits that no training picture
shows, and of 20 that some do, and writes the caption of 500 pictures of either, whose digits no training picture has.
A picture counts as right where both halves show the digits that were asked for, in the eyes of a classifier that shares
nothing with the models: the vote of the 3 nearest neighbours, in pixels, among the digits that training leaves out. It
writes digits.md beside this file; the last rows say how often the classifier itself is right, of real digits and of
the tokenizer's reconstructions.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from shared import processor_minutes, stamp
from torch import Tensor

import discrete_lit
from discrete_lit.core.images import from_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.sources import DigitCompositions
from discrete_lit.data.sources.digit_compositions import WORDS, held_out, read_digits
from discrete_lit.generators import Unified

RUNS = Path("runs/quickstart_digits")
MODELS = {
    "chameleon": "Chameleon",
    "transfusion": "Transfusion",
    "sums": "sums",
    "sums_thought": "sums, with a thought",
}
_BLANK, _SIDE = 10, 8
# Darker than this on average is no digit. The darkest of the set is at -0.64; an empty half is at -1, and at -0.86 to
# -0.77 as the tokenizer reconstructs it, which has seen pictures of two digits alone.
_DARKEST_DIGIT = -0.7


class Classifier:
    """Tells digits in pictures by their nearest neighbours among digits that no training picture shows."""

    def __init__(self, file: Path) -> None:
        images, labels = read_digits(file)
        first = round(0.8 * len(images))
        self.pixels = torch.tensor(images / 8 - 1, dtype=torch.float32)[first:].flatten(1)
        self.labels = torch.tensor(labels)[first:]
        self.others = torch.tensor(images / 8 - 1, dtype=torch.float32)[:first], torch.tensor(labels)[:first]

    def __call__(self, images: Tensor) -> Tensor:
        """Name the digit `(B,)` of images `(B, 8, 8)` in [-1, 1]; 10 where there is none."""
        flat = images.flatten(1)
        nearest = torch.cdist(flat, self.pixels).topk(3, largest=False).indices
        digit = self.labels[nearest].mode(dim=1).values
        return torch.where(flat.mean(dim=1) < _DARKEST_DIGIT, _BLANK, digit)

    def both(self, images: Tensor) -> Tensor:
        """Name the digits `(B, 2)` of pictures `(B, 1, 8, 16)`."""
        return torch.stack([self(images[:, 0, :, :_SIDE]), self(images[:, 0, :, _SIDE:])], dim=1)


def pairs(held: bool) -> list[tuple[int, int]]:
    """The 20 held-out pairs of digits, or 20 of the others."""
    found = [(a, b) for a in range(10) for b in range(10) if held_out(a, b) == held]
    return found if held else found[::4]


def shown(a: int, b: int, *, sums: bool) -> tuple[int, int]:
    """The digits that a picture of a pair must show."""
    return ((a + b) // 10 or _BLANK, (a + b) % 10) if sums else (a, b)


def drawn(model: Unified, prompts: Sequence[str], thoughts: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """Draw a picture for each prompt, and give the thoughts that these follow."""
    condition = model.condition_of_texts(prompts, thoughts=thoughts)
    output = model.draw(condition, CounterRandom(0, torch.arange(len(prompts))))
    return model.tokenizer.decode(output.tokens), [] if output.thoughts is None else model.texts_of(output.thoughts)


def pictures(
    split: Literal["train", "validation", "test"], file: Path, count: int = 500
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Pictures `(B, 1, 8, 16)` of a split, put together otherwise than those of training, and their captions."""
    source = DigitCompositions(split, count=count, seed=1, file=file)
    arrays = [np.asarray(Image.open(io.BytesIO(source.read(number)))) for number in range(count)]
    return from_uint8(torch.from_numpy(np.stack(arrays)))[:, None], [source.captions(each) for each in range(count)]


def share(right: Tensor) -> str:
    return f"{right.float().mean().item():.1%}"


def rows_of(name: str, classify: Classifier, file: Path) -> list[list[str]]:
    """The rows of a model: seen pairs, held-out pairs; and of thoughts, with the right one given."""
    model = discrete_lit.load(RUNS / name / "checkpoints" / "last.ckpt")
    assert isinstance(model, Unified)
    sums, rows = name.startswith("sums"), []
    for held in (False, True):
        asked = pairs(held) * 10
        prompts = [f"{a}+{b}" if sums else f"{WORDS[a]} left of {WORDS[b]}" for a, b in asked]
        wanted = torch.tensor([shown(a, b, sums=sums) for a, b in asked])
        images, thoughts = drawn(model, prompts)
        right = (classify.both(images) == wanted).all(dim=1)
        said = ""
        if thoughts:
            said = share(torch.tensor([text == str(a + b) for text, (a, b) in zip(thoughts, asked, strict=True)]))
        elif not sums:
            real, captions = pictures("test" if held else "validation", file)
            written = model.caption(model.data_of({"image": real}, CounterRandom(0, torch.arange(len(real)))))
            said = share(torch.tensor([text in own for text, own in zip(written, captions, strict=True)]))
        where = "held out" if held else "seen"
        rows.append([MODELS[name], where, share(right), said])
        if thoughts:
            images, _ = drawn(model, prompts, [str(a + b) for a, b in asked])
            right = (classify.both(images) == wanted).all(dim=1)
            rows.append([f"{MODELS[name]}, the right one given", where, share(right), ""])
    return rows


def limits(classify: Classifier, file: Path) -> list[list[str]]:
    """How often the classifier is right: of pictures of training digits, and of their reconstructions."""
    real, captions = pictures("train", file)
    words = [own[0].split() for own in captions]
    wanted = torch.tensor([(WORDS.index(each[0]), WORDS.index(each[-1])) for each in words])
    tokenizer = discrete_lit.load(RUNS / "tokenizer" / "checkpoints" / "last.ckpt")
    found = {"real pictures": real, "their reconstructions": tokenizer.decode(tokenizer.encode(real))}
    return [[name, "seen", share((classify.both(images) == wanted).all(dim=1)), ""] for name, images in found.items()]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--file", type=Path, default=RUNS / "sklearn/datasets/data/digits.csv.gz")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    classify = Classifier(given.file)
    rows = [row for name in given.models for row in rows_of(name, classify, given.file)] + limits(classify, given.file)
    chosen = "" if given.models == list(MODELS) else f" --models {' '.join(given.models)}"
    heads = ["model", "pairs", "pictures right", "captions, or thoughts, right"]
    table = [heads, [":--", ":--", "--:", "--:"], *rows]
    lines = [
        "# Digits both ways, and sums with and without a thought",
        "",
        f"`python docs/experiments/digits.py{chosen}`, {stamp()}, {processor_minutes():.1f} minutes of processor. "
        "200 pictures and 500 captions a row.",
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
    ]
    given.page.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
