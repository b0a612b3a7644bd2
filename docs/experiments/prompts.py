"""Pictures of Fashion-MNIST by a text: how often they show the class and the tone that a prompt names.

  python docs/experiments/prompts.py

Needs both models of lightning_configs/quickstart_text and the quickstart's classifiers. Each model draws 33 pictures of
each of two sets of prompts, every class in three tones: in the words of the captions, "a photo of a dark coat", and in
words that no caption has, "a photo of a dark jacket". The class is right where an independent classifier finds it
(`discrete-lit evaluate --prompts`), the tone where the mean of the pixels that are not black lies within the limits by
which captions call it dark, grey or bright. What the classifiers find of real pictures, and what the tokenizers keep of
class and tone, says what can be reached. It writes prompts.md beside this file; finished samples are kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import processor_minutes, stamp

import discrete_lit
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.data.sources.fashion_mnist import PADDING, TONES, tone_of

QUICKSTART, RUNS = Path("runs/quickstart"), Path("runs/quickstart_text")
DATA = Path("data/fashion_mnist.npz")
MODELS = {"masked": "masked", "dit": "diffusion"}
TOKENIZERS = {"FSQ tokenizer": "tokenizer/checkpoints/last.ckpt", "KL tokenizer": "tokenizer_kl/scaled.ckpt"}
WORDS = {
    "T-shirt/top": ("t-shirt", "tee"),
    "Trouser": ("pair of trousers", "pair of jeans"),
    "Pullover": ("pullover", "sweater"),
    "Dress": ("dress", "gown"),
    "Coat": ("coat", "jacket"),
    "Sandal": ("sandal", "flip-flop"),
    "Shirt": ("shirt", "blouse"),
    "Sneaker": ("sneaker", "running shoe"),
    "Bag": ("bag", "handbag"),
    "Ankle boot": ("ankle boot", "bootie"),
}
"""A word of the captions for each class, and one that no caption has."""
SETS = ("words of the captions", "other words")
BLACK = 16
"""Pixels of a drawn picture up to this are its background: it is not quite black, as that of the data is."""


def prompts(number: int) -> list[dict[str, Any]]:
    """The prompts of a set in GenEval's form, every class in each tone."""
    return [
        {"prompt": f"a photo of a {tone} {words[number]}", "include": [{"class": name, "count": 1}], "tone": tone}
        for _, tone in TONES
        for name, words in WORDS.items()
    ]


def share(right: list[bool]) -> str:
    return f"{sum(right) / len(right):.1%}"


@torch.inference_mode()
def reconstructed(pictures: np.ndarray, checkpoint: Path, count: int = 1000) -> list[bool]:
    """Say of every tenth test picture `(N, 28, 28)` whether a tokenizer keeps its tone."""
    chosen = pictures[:: len(pictures) // count]
    padded = np.pad(chosen, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    tokenizer = discrete_lit.load(checkpoint)
    data = from_uint8(torch.from_numpy(padded))[:, None]
    made = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in data.split(100)])
    again = to_uint8(made)[:, 0].numpy()
    return [tone_of(new, BLACK) == tone_of(old) for new, old in zip(again, chosen, strict=True)]


def page(rows: list[dict[str, Any]], tones: dict[str, list[bool]], made: str) -> list[str]:
    """The lines of the page: all measures of each row, and how often each word is drawn."""
    lines = [
        "# Pictures by a text",
        "",
        made,
        "",
        "| images of | class right (apart) | class right (plain) | tone right | FD-EffNetLite0 | precision | recall |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = row["label_accuracy"]
        tone = share(tones[row["name"]]) if row["name"] in tones else ""
        lines.append(
            f"| {row['name']} | {found['apart']:.1%} | {found['plain']:.1%} | {tone} | {row['FD-EffNetLite0']:.1f} | "
            f"{row['precision']:.3f} | {row['recall']:.3f} |"
        )
    lines += ["", "How often the class of each word is right (apart):", ""]
    lines += [f"| words | {' | '.join(MODELS.values())} |", f"|:--|{'--:|' * len(MODELS)}"]
    by_class = {row["name"]: row["label_accuracy_by_class"]["apart"] for row in rows}
    for number, words in enumerate(SETS):
        for label, names in enumerate(WORDS.values()):
            shares = [f"{by_class[f'{model}, {words}'][label]:.0%}" for model in MODELS.values()]
            lines.append(f"| {names[number]} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=33, help="pictures of each of the 30 prompts")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    count = 3 * len(WORDS) * given.each
    asked = [prompts(number) for number in range(len(SETS))]
    files = [RUNS / f"prompts_{number}.jsonl" for number in range(len(SETS))]
    every = RUNS / "prompts.jsonl"
    texts = ["".join(f"{json.dumps(each)}\n" for each in of_set) for of_set in asked]
    for file, text in ((every, "".join(texts)), *zip(files, texts, strict=True)):
        file.write_text(text)
    samples, tones = {}, {}
    for model, name in MODELS.items():
        for number, words in enumerate(SETS):
            output = RUNS / model / f"measured_{number}_{count}"
            if not (output / "run.json").is_file():
                checkpoint = RUNS / model / "checkpoints" / "last.ckpt"
                settings = {"prompt_file": str(files[number]), "batch_size": 110, "precision": "auto"}
                sample(str(checkpoint), str(output), num_samples=count, **settings)  # type: ignore[arg-type]
            row = f"{name}, {words}"
            samples[row] = str(output / "samples.npz")
            images = np.load(output / "samples.npz")["arr_0"]
            wanted = [asked[number][index % len(asked[number])]["tone"] for index in range(count)]
            tones[row] = [tone_of(image, BLACK) == tone for image, tone in zip(images, wanted, strict=True)]
    pictures = np.load(DATA)["test_images"]
    for name, file in TOKENIZERS.items():
        tones[name] = reconstructed(pictures, QUICKSTART / file)
    rows = evaluate(
        reference=str(QUICKSTART / "shards" / "train"),
        output=str(RUNS / "evaluation"),
        num_reference=1000,
        held_out=str(QUICKSTART / "shards" / "test"),
        num_images=count,
        samples=samples,
        prompts=str(every),
        reconstructions={name: str(QUICKSTART / file) for name, file in TOKENIZERS.items()},
        classifier={
            name: str(QUICKSTART / folder / "checkpoints" / "last.ckpt")
            for name, folder in (("plain", "classifier"), ("apart", "classifier_apart"))
        },
        image_size=32,
        image_channels=1,
        batch_size=30,
    )["rows"]
    number = "" if given.each == 33 else f" --each {given.each}"
    command = f"`python docs/experiments/prompts.py{number}`"
    machine = f"{stamp()}, {processor_minutes():.1f} minutes of processor. {count} pictures a row, one seed"
    lines = page(rows, tones, f"{command}, {machine}.")
    given.page.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
