"""Prompts: which texts samples are drawn of, GenEval's files of them, and which class each prompt asks for.

GenEval (Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", 2023) has a JSON
object on each line of `evaluation_metadata.jsonl`: the `prompt`, the `tag` of its task, and what a picture of it must
`include`, as `[{"class": "bench", "count": 1}]`. Its evaluator reads `00000/metadata.jsonl`, one such object, and
`00000/samples/00000.png` and so on, for each prompt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discrete_lit.core.bounded_reading import parse_json, read_text
from discrete_lit.core.files import atomic_write, atomic_write_text, content_sha256
from discrete_lit.core.images import ImageSize
from discrete_lit.evaluation.image_sets import NpzImages

GENEVAL_FOLDER = "geneval"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Texts that samples are drawn of in turn: sample i of prompt i modulo their number.

    Attributes:
        texts: the prompts.
        metadata: GenEval's object of each; None of a file of plain lines.
    """

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] | None = None

    def of(self, indices: Sequence[int]) -> list[str]:
        """Give the prompt of each sample, by its number."""
        return [self.texts[index % len(self.texts)] for index in indices]

    def check_count(self, count: int, setting: str) -> None:
        """Raise a ValueError where a number of samples does not have as many of each prompt."""
        number = len(self.texts)
        if count % number:
            raise ValueError(
                f"{setting}={count:,} does not fit {number:,} prompts: some would have {count // number} samples and "
                f"others {count // number + 1}; take a multiple of {number:,}"
            )


def read_prompts(file: str) -> Prompts:
    """Read a file of prompts: of GenEval's objects where it ends with `.jsonl`, or else of a prompt on each line.

    Raises:
        ValueError: no such file, no prompt in it, or a line that is none of GenEval's.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"prompt_file={file!r}: no such file; it has a prompt on each line")
    lines = [line.strip() for line in read_text(path).splitlines()]
    if path.suffix != ".jsonl":
        texts = tuple(line for line in lines if line)
        return Prompts(texts=texts)
    metadata = tuple(_metadata(line, f"prompt_file={file!r}, line {n}") for n, line in enumerate(lines, 1) if line)
    return Prompts(texts=tuple(each["prompt"] for each in metadata), metadata=metadata)


def _metadata(line: str, where: str) -> dict[str, Any]:
    found = parse_json(line, where)
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{where} is no object with a text "prompt", as GenEval\'s: {line[:100]}')
    return found


def chosen_prompts(reader: Any, prompt: Sequence[str] | None, file: str | None, negative: str | None) -> Prompts | None:
    """Choose the prompts that a model draws, of those that an option or a file names; None for a model of classes.

    Raises:
        ValueError: prompts for a model that reads no text, none for one that does, or both kinds of them.
    """
    options = (("prompt", prompt), ("prompt_file", file), ("negative_prompt", negative))
    given = [name for name, value in options if value is not None]
    if not reader.reads_text:
        if given:
            raise ValueError(
                f"{given[0]} is given, and this {type(reader).__name__} reads no text: it was trained without a "
                "text_encoder. Draw from it by labels"
            )
        return None
    if prompt is not None and file is not None:
        raise ValueError("prompt and prompt_file are given: take one of them")
    found = Prompts(texts=tuple(prompt or ())) if file is None else read_prompts(file)
    if not found.texts:
        raise ValueError(
            f"this {type(reader).__name__} draws what a text says: give --prompt 'a text', several times for several, "
            "or a prompt_file with one on each line; '' stands for no text"
        )
    return found


def write_geneval(folder: Path, images: np.ndarray, prompts: Prompts) -> None:
    """Write samples as GenEval's evaluator reads them, in place of those that an earlier command wrote there.

    Args:
        folder: made here, with a folder for each prompt.
        images: uint8 `(N, H, W, C)` of 1, 3 or 4 channels, N a multiple of the prompts; image i is of prompt i modulo
            their number.
        prompts: with GenEval's metadata.
    """
    assert prompts.metadata is not None and len(images) % len(prompts.texts) == 0
    if folder.is_dir():
        shutil.rmtree(folder)
    for number, metadata in enumerate(prompts.metadata):
        of_prompt = folder / f"{number:05}"
        (of_prompt / "samples").mkdir(parents=True)
        atomic_write_text(of_prompt / "metadata.jsonl", json.dumps(metadata, ensure_ascii=False))
        for count, image in enumerate(images[number :: len(prompts.texts)]):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            with atomic_write(of_prompt / "samples" / f"{count:05}.png") as file:
                Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").save(file, "PNG")


def class_of_prompts(file: str, classes: Sequence[str]) -> dict[str, int]:
    """Read which class each prompt of a `.jsonl` asks for: the one that its metadata includes.

    Args:
        file: lines as `{"prompt": "a photo of a dark coat", "include": [{"class": "Coat", "count": 1}]}`.
        classes: the names that there are.

    Returns:
        Each prompt to the number of its class.

    Raises:
        ValueError: a file of plain lines, a prompt that includes no class or several, or a class that is unknown.
    """
    found = read_prompts(file)
    if found.metadata is None or not found.texts:
        raise ValueError(
            f"prompts={file!r} must be a .jsonl with a line for each prompt, which says its class: "
            '{"prompt": "a dark coat", "include": [{"class": "Coat", "count": 1}]}'
        )
    labels: dict[str, int] = {}
    for text, metadata in zip(found.texts, found.metadata, strict=True):
        included = metadata.get("include")
        names = [each.get("class") for each in included or () if isinstance(each, dict)]
        if len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(
                f"prompts={file!r}: {text!r} includes {', '.join(map(repr, names)) or 'no class'}; a classifier of one "
                "class an image needs one for each prompt. GenEval's own evaluator counts several objects"
            )
        if names[0] not in classes:
            raise ValueError(
                f"prompts={file!r}: the class {names[0]!r} of {text!r} is unknown; there are "
                f"{', '.join(map(repr, classes[:20]))}{', …' if len(classes) > 20 else ''}"
            )
        labels[text] = classes.index(names[0])
    return labels


class PromptedImages(NpzImages):
    """Samples of prompts, each labelled by the class that its prompt asks for.

    Args:
        path, image_size, image_channels: as of `NpzImages`.
        prompts: of the samples, in turn, as `run.json` beside them says.
        classes: names of the classes.
        labels: number of the class of each prompt.

    Raises:
        ValueError: a prompt whose class is not known.
    """

    def __init__(
        self,
        path: Path,
        image_size: ImageSize,
        *,
        image_channels: int,
        prompts: Sequence[str],
        classes: Sequence[str],
        labels: Mapping[str, int],
    ) -> None:
        super().__init__(path, image_size, image_channels=image_channels)
        if missing := [text for text in prompts if text not in labels]:
            raise ValueError(
                f"{str(path)!r} was drawn of {missing[0]!r}, which the file of prompts does not have: it names the "
                f"classes of {len(labels):,} others"
            )
        of_prompts = np.array([labels[text] for text in prompts], np.int64)
        self.labels = of_prompts[np.arange(self.count) % len(prompts)]
        self.classes, self.num_classes = tuple(classes), len(classes)

    def fingerprint(self) -> str:
        """Hash the file, and the classes of its images."""
        assert self.labels is not None
        return content_sha256(f"{super().fingerprint()} {self.labels.tolist()} {self.classes}")
