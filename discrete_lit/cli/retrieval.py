"""`discrete-lit retrieval`: how often CLIP finds the prompt that a sample was drawn of."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import Npz, atomic_write_text, file_sha256
from discrete_lit.core.provenance import environment
from discrete_lit.evaluation.prompt_retrieval import ClipTexts, prompt_retrieval
from discrete_lit.metrics.extractors import TimmExtractor


def retrieval(
    samples: str,
    clip: str,
    *,
    image_tower: str = "vit_base_patch32_clip_quickgelu_224.openai",
    image_weights: str | None = None,
    output: str | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Measure how well the samples of prompts show what these say, by CLIP.

    Prints the share of images that CLIP finds nearer to their own prompt than to every other of the run, and CLIPScore,
    and writes them with both towers' files into a JSON file.

    Args:
        samples: the `samples.npz` that `discrete-lit sample` drew of prompts, which the `run.json` beside it says.
        clip: a folder of Hugging Face with `model.safetensors`, `config.json` and `tokenizer.json` of a CLIP model:
            its text tower is read.
        image_tower: timm's name of the image tower of the same model.
        image_weights: its file in timm's layout; by default where `TimmExtractor` looks.
        output: the JSON file; `retrieval.json` beside the samples by default.
        batch_size: images at a time.
        accelerator: Lightning's; `auto` takes a GPU where there is one.

    Returns:
        What the file holds.

    Raises:
        ValueError: no samples, samples that were not drawn of prompts, a model that is no CLIP, or towers of two.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    path = Path(samples).expanduser()
    prompts = _prompts_of(path)
    device = make_fabric(accelerator).device
    texts = ClipTexts(clip).to(device)
    tower = TimmExtractor(image_tower, image_weights, output="head").to(device)
    found = prompt_retrieval(_batches(path, batch_size), prompts, image_tower=tower, texts=texts)
    report = {
        **asdict(found),
        "samples": str(path),
        "samples_sha256": file_sha256(path),
        "image_tower": tower.name,
        "image_tower_sha256": tower.weights_sha256,
        "clip": str(clip),
        "clip_sha256": file_sha256(Path(clip).expanduser() / "model.safetensors"),
        **environment(device),
    }
    print(
        f"{found.count:,} images of {found.prompts:,} prompts: the own one is the nearest of {100 * found.top_1:.1f}%, "
        f"among the five nearest of {100 * found.top_5:.1f}%; CLIPScore {found.clip_score:.3f}"
    )
    file = path.with_name("retrieval.json") if output is None else Path(output).expanduser()
    atomic_write_text(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _prompts_of(samples: Path) -> list[str]:
    """Read the prompts of samples from the record beside them."""
    if not samples.is_file():
        raise ValueError(f"samples={str(samples)!r}: no such file; `discrete-lit sample` writes samples.npz")
    record = samples.with_name("run.json")
    content = read_json(record) if record.is_file() else {}
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(
            f"samples={str(samples)!r} has no run.json beside it that says its prompts: draw it by `discrete-lit "
            "sample --prompt_file FILE`"
        )
    return [str(prompt) for prompt in prompts]


def _batches(samples: Path, batch_size: int) -> Iterator[Tensor]:
    with Npz(samples) as file:
        if "arr_0" not in file.headers or file.headers["arr_0"][1] != np.uint8:
            raise ValueError(f"samples={str(samples)!r} holds no uint8 arr_0 (N, H, W, C)")
        rows = file.rows("arr_0")
        while batch := list(islice(rows, batch_size)):
            yield torch.from_numpy(np.stack(batch)).movedim(-1, 1)
