"""Digits both ways, and sums with and without a thought: how often pictures show what was asked, and captions say it.

  python docs/experiments/digits.py

Needs `make quickstart-digits`. Each model draws ten pictures of each of the 20 pairs of digits that no training picture
shows, and of 20 that some do, and writes the caption of 500 pictures of either, whose digits no training picture has.
A picture counts as right where both halves show the digits that were asked for, in the eyes of a classifier that shares
nothing with the models: the vote of the 3 nearest neighbours, in pixels, among the digits that training leaves out. It
writes digits.md beside this file; the last rows say how often the classifier itself is right, of real digits and of
the tokenizer's reconstructions.

`--settings` adds what settings of Chameleon and of its sampling do, with three seeds of training each, of 1,000
pictures and captions: the softmax of training over the ids that may stand in a place, or over the vocabulary; ids of
images embedded, and predicted, with those of texts, or apart (Janus); and guidance. The seeds and settings that
`make quickstart-digits` does not have it trains itself, and keeps. Sampling draws from the ids that may stand in a
place, whatever training did; what drawing from the whole vocabulary would do is computed beside it.
"""

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from shared import fit, processor_minutes, seeded, spread, stamp
from torch import Tensor

import discrete_lit
from discrete_lit.core.images import from_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.sources import DigitCompositions
from discrete_lit.data.sources.digit_compositions import WORDS, held_out, read_digits
from discrete_lit.generators import Unified
from discrete_lit.samplers import SegmentSampler

RUNS, CONFIGS = Path("runs/quickstart_digits"), Path("lightning_configs/quickstart_digits")
MODELS = {
    "chameleon": "Chameleon",
    "transfusion": "Transfusion",
    "sums": "sums",
    "sums_thought": "sums, with a thought",
}
_BACKBONE = "model.init_args.backbone.init_args."
_APART = {"own_embeddings": "{image: 8}", "own_heads": "{image: 96}", "aligner_layers": 2}
# What `--settings` compares, by name: the recipe, and what is laid over it.
SETTINGS: dict[str, tuple[str, Mapping[str, object]]] = {
    "Chameleon": ("chameleon", {}),
    "softmax over the vocabulary": ("chameleon", {"model.init_args.softmax_over": "vocabulary"}),
    "images embedded apart": ("chameleon", {f"{_BACKBONE}{key}": value for key, value in _APART.items()}),
    "Transfusion": ("transfusion", {}),
}
SEEDS, BATCHES = (0, 1, 2), 1000
SCALES = (1.0, 2.0, 3.0, 5.0)
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


def prompt(a: int, b: int) -> str:
    """Ask for a digit left of another."""
    return f"{WORDS[a]} left of {WORDS[b]}"


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


def digits_of(captions: Sequence[tuple[str, ...]]) -> Tensor:
    """Read the digits `(B, 2)` that captions name."""
    words = [own[0].split() for own in captions]
    return torch.tensor([(WORDS.index(each[0]), WORDS.index(each[-1])) for each in words])


def captions_right(model: Unified, file: Path, *, held: bool, count: int = 500) -> Tensor:
    """Say which captions `(count,)` of pictures of digits that training does not show are right."""
    real, captions = pictures("test" if held else "validation", file, count)
    written = model.caption(model.data_of({"image": real}, CounterRandom(0, torch.arange(count))))
    return torch.tensor([text in own for text, own in zip(written, captions, strict=True)])


def share(right: Tensor) -> str:
    return f"{right.float().mean().item():.1%}"


def rows_of(name: str, classify: Classifier, file: Path) -> list[list[str]]:
    """The rows of a model: seen pairs, held-out pairs; and of thoughts, with the right one given."""
    model = discrete_lit.load(RUNS / name / "checkpoints" / "last.ckpt")
    assert isinstance(model, Unified)
    sums, rows = name.startswith("sums"), []
    for held in (False, True):
        asked = pairs(held) * 10
        prompts = [f"{a}+{b}" if sums else prompt(a, b) for a, b in asked]
        wanted = torch.tensor([shown(a, b, sums=sums) for a, b in asked])
        images, thoughts = drawn(model, prompts)
        right = (classify.both(images) == wanted).all(dim=1)
        said = ""
        if thoughts:
            said = share(torch.tensor([text == str(a + b) for text, (a, b) in zip(thoughts, asked, strict=True)]))
        elif not sums:
            said = share(captions_right(model, file, held=held))
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
    wanted = digits_of(captions)
    tokenizer = discrete_lit.load(RUNS / "tokenizer" / "checkpoints" / "last.ckpt")
    found = {"real pictures": real, "their reconstructions": tokenizer.decode(tokenizer.encode(real))}
    return [[name, "seen", share((classify.both(images) == wanted).all(dim=1)), ""] for name, images in found.items()]


# What settings do.


def trained(name: str) -> list[Path]:
    """Train a setting with each seed, and give the checkpoints; seed 0 of a recipe is the quickstart's."""
    recipe, over = SETTINGS[name]
    quickstart = RUNS / recipe / "checkpoints" / "last.ckpt"
    return [
        quickstart
        if seed == 0 and not over
        else fit(
            RUNS / "settings" / f"{name.replace(' ', '_').lower()}_{seed}",
            [CONFIGS / f"{recipe}.yaml"],
            {**seeded(seed, BATCHES), **over},
        )
        for seed in SEEDS
    ]


def loaded(checkpoints: Sequence[Path]) -> list[Unified]:
    models = [discrete_lit.load(each) for each in checkpoints]
    assert all(isinstance(model, Unified) for model in models)
    return models  # type: ignore[return-value]


def of_pairs(model: Unified, *, held: bool, scale: float | None = None, each: int = 50) -> tuple[Tensor, Tensor]:
    """Draw pictures of 20 pairs, by default with the recipe's guidance: ids or latents, and the digits `(B, 2)`."""
    image = model.sampler.of("image")
    image = replace(image, guidance_scale=image.guidance_scale if scale is None else scale)
    sampler = SegmentSampler({**model.sampler.settings, "image": image}, solver=model.sampler.solver)
    asked = pairs(held) * each
    condition = model.condition_of_texts([prompt(a, b) for a, b in asked])
    return model.draw(condition, CounterRandom(0, torch.arange(len(asked))), sampler).tokens, torch.tensor(asked)


def bits_of_pictures(
    model: Unified, file: Path, *, split: Literal["train", "validation", "test"], count: int = 1000
) -> float:
    """Give the mean bits of the ids of a picture of a split, given its caption: by the law that sampling draws from."""
    real, captions = pictures(split, file, count)
    tokens = model.data_of({"image": real}, CounterRandom(0, torch.arange(count)))
    nats = model.log_likelihood(tokens, model.captions_of([own[0] for own in captions])).nats
    return -nats.mean().item() / log(2)


def variety(images: Tensor, digits: Tensor) -> float:
    """Give the root mean square of how far pixels are from the mean picture of their pair of digits."""
    number = digits[:, 0] * 10 + digits[:, 1]
    return torch.stack([images[number == each].var(dim=0).mean() for each in number.unique()]).mean().sqrt().item()


def invalid_pictures(model: Unified, scale: float) -> float:
    """Give the probability that a picture of a held-out pair, drawn from the whole vocabulary, has an invalid id.

    All its ids are valid with the probability `E prod_i m_i`, where m_i is the mass of the ids that may stand at place
    i, given valid ones before it, and the mean is over pictures that are drawn from these ids alone. It is no count.
    """
    tokens, asked = of_pairs(model, held=True, scale=scale)
    condition = model.condition_of_texts([prompt(a, b) for a, b in asked.tolist()])
    logits = []
    for captions in (condition, model.null_captions(condition)):
        sequence = model.sequences(tokens, captions)
        inside = model.grammar.segment_of[sequence.states] == model.layout.number("image")
        inside &= model.grammar.place_of[sequence.states] >= 0
        rows, columns = inside.nonzero(as_tuple=True)
        logits.append(
            model.backbone.logits(model.backbone(sequence)[rows, columns - 1]).unflatten(0, (len(tokens), -1))
        )
    full, null = logits
    valid = (null + scale * (full - null)).softmax(dim=-1)[..., model.codes].sum(dim=-1)
    return 1 - valid.prod(dim=1).mean().item()


def invalid_captions(model: Unified, file: Path, count: int = 1000) -> float:
    """Give the share of captions of held-out pairs that the best ids of the whole vocabulary would make invalid."""
    real, _ = pictures("test", file, count)
    random = CounterRandom(0, torch.arange(count))
    data = model.data_of({"image": real}, random)
    drawn = model.sampler(model.backbone, [model.given_image(data)], random, segments=("text",)).sequence
    first = torch.ones(count, dtype=torch.bool)
    sequence = model.sequences(data, model.text_in(drawn, "text"), image_first=first)
    best = model.backbone.logits(model.backbone(sequence)[:, :-1]).argmax(dim=-1)
    segment = model.grammar.segment_of[sequence.states[:, 1:]]
    behind = (segment == model.layout.number("image")).cumsum(dim=1) > 0
    # The recipe writes the best of the ids that may stand in a place, so another one may not.
    written = behind & (segment == model.layout.number("text")) & (sequence.sample[:, 1:] >= 0)
    return (written & (best != sequence.ids[:, 1:])).any(dim=1).float().mean().item()


def over_seeds(models: Sequence[Unified], figure: Callable[..., float], *, form: str = ".1%", **settings: Any) -> str:
    """Write the mean of a figure over the seeds, and its standard deviation."""
    return spread([figure(model, **settings) for model in models], form)


class Settings:
    """Compares settings by models of each, one for each seed."""

    def __init__(self, models: Mapping[str, Sequence[Unified]], classify: Classifier, file: Path) -> None:
        self.models, self.classify, self.file = models, classify, file
        real, captions = pictures("test", file, 1000)
        self.variety_of_real = variety(real, digits_of(captions))

    def right(self, model: Unified, *, held: bool, scale: float | None = None) -> float:
        """Give the share of pictures that show the digits that were asked for."""
        tokens, asked = of_pairs(model, held=held, scale=scale)
        return (self.classify.both(model.tokenizer.decode(tokens)) == asked).all(dim=1).float().mean().item()

    def named(self, model: Unified, *, held: bool) -> float:
        """Give the share of captions that are right."""
        return captions_right(model, self.file, held=held, count=1000).float().mean().item()

    def varied(self, model: Unified, *, scale: float) -> float:
        """Give the variety of pictures of held-out pairs, as a share of that of real ones."""
        tokens, asked = of_pairs(model, held=True, scale=scale)
        return variety(model.tokenizer.decode(tokens), asked) / self.variety_of_real

    def trainings(self) -> list[list[str]]:
        """Compare what was trained."""
        heads = ["pictures, seen", "held out", "captions, seen", "held out", "bits of training digits", "held out"]
        table = [["model", *heads]]
        for name, models in self.models.items():
            shares = [
                over_seeds(models, figure, held=held) for figure in (self.right, self.named) for held in (False, True)
            ]
            bits = ["", ""]
            if models[0].patches is None:
                bits = [
                    over_seeds(models, bits_of_pictures, form=".1f", file=self.file, split=split)
                    for split in ("train", "test")
                ]
            table.append([name, *shares, *bits])
        return table

    def whole_vocabulary(self) -> list[list[str]]:
        """Say how often draws from the whole vocabulary would be invalid."""
        table = [["model", *(f"pictures, guidance {scale:g}" for scale in SCALES), "captions, the best ids"]]
        for name in ("Chameleon", "softmax over the vocabulary"):
            models = self.models[name]
            invalid = [over_seeds(models, invalid_pictures, form=".2%", scale=scale) for scale in SCALES]
            table.append([name, *invalid, over_seeds(models, invalid_captions, form=".2%", file=self.file)])
        return table

    def guidance(self) -> list[list[str]]:
        """Compare scales of guidance."""
        table = [["model", "guidance", "pictures, seen", "held out", "variety, held out"]]
        for name in ("Chameleon", "Transfusion"):
            models = self.models[name]
            for scale in SCALES:
                shares = [over_seeds(models, self.right, held=held, scale=scale) for held in (False, True)]
                varied = over_seeds(models, self.varied, form=".2f", scale=scale)
                table.append([name, f"{scale:g}", *shares, varied])
        return table

    def lines(self) -> list[str]:
        """Write the tables."""
        return [
            "## What settings do",
            "",
            f"Trained with {len(SEEDS)} seeds each; means and standard deviations over these, of 1,000 pictures and",
            "captions. The bits are those of a picture's ids, given its caption, by the law that sampling draws from:",
            "of digits that training shows, and of held-out pairs of others. Uniform ids have 72.",
            "",
            *markdown(self.trainings()),
            "",
            "Sampling draws from the ids that may stand in a place: no picture and no caption has another. Were",
            "pictures of held-out pairs drawn from the whole vocabulary, so many would have an id that may not stand",
            "where it does (a probability, not a count), and so many captions of the best ids of the whole vocabulary:",
            "",
            *markdown(self.whole_vocabulary()),
            "",
            "Guidance, of the same models. Variety is how far pixels are from the mean picture of their pair, as a",
            "share of how far those of real pictures are.",
            "",
            *markdown(self.guidance()),
            "",
        ]


def markdown(table: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Write a table whose first columns are words and whose others are numbers."""
    rows = [table[0], [":--"] * words + ["--:"] * (len(table[0]) - words), *table[1:]]
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", action="store_true", help="compare settings of Chameleon, and guidance, too")
    parser.add_argument("--file", type=Path, default=RUNS / "sklearn/datasets/data/digits.csv.gz")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    checkpoints = {name: trained(name) for name in SETTINGS} if given.settings else {}
    chosen = "" if given.models == list(MODELS) else f" --models {' '.join(given.models)}"
    if given.settings:
        chosen += " --settings"
    classify = Classifier(given.file)
    with torch.inference_mode():
        rows = [row for name in given.models for row in rows_of(name, classify, given.file)]
        rows += limits(classify, given.file)
        models = {name: loaded(paths) for name, paths in checkpoints.items()}
        settings = Settings(models, classify, given.file).lines() if models else []
    lines = [
        "# Digits both ways, and sums with and without a thought",
        "",
        f"`python docs/experiments/digits.py{chosen}`, {stamp()}, {processor_minutes():.1f} minutes of processor. "
        "200 pictures and 500 captions a row.",
        "",
        *markdown([["model", "pairs", "pictures right", "captions, or thoughts, right"], *rows], words=2),
        "",
        *settings,
    ]
    given.page.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
