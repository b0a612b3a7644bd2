"""Discrete diffusion of text: masks, any other character, or next-character prediction, on one text; table and samples.

  python docs/experiments/text_diffusion.py

"Discrete Diffusion for Image Generation" begins from text, where masks beat uniform noise and both trail next-token
prediction. Here three small models of the same network learn the same 256 characters at a time of this repository's own
prose (27 symbols, as text8): `lightning_configs/experiments/char_prose.yaml` (masks), `char_prose_uniform.yaml` and
`char_prose_autoregressive.yaml`. Bits per character of held-out chunks are exact for next-character prediction and an
upper bound for the other two; beside them stands what the frequencies of the characters alone give. The text is in
`tokens/prose`, which this makes where it is not there; its pages change with the repository, so the figures do a
little. Finished runs are kept.
"""

import argparse
from math import log
from pathlib import Path
from statistics import mean
from subprocess import run
from sys import executable
from typing import Any

import numpy as np
import torch
from shared import fit, minutes_of, processor_minutes, seeded, spread, stamp

import discrete_lit
from discrete_lit.samplers import AncestralSampler, RasterSampler, Sampler

CONFIGS, TOKENS = Path("lightning_configs"), Path("tokens/prose")
# Name to the recipes, one laid over the other.
MODELS = {
    "next character": ("experiments/char_prose_autoregressive",),
    "masks": ("generators/char_text", "experiments/char_prose"),
    "any other character": (
        "generators/char_text",
        "experiments/char_prose",
        "experiments/char_prose_uniform",
    ),
}


def train(name: str, seed: int, batches: int, folder: Path) -> Path:
    """The checkpoint of a model."""
    settings = {**seeded(seed, batches), "trainer.val_check_interval": min(200, batches)}
    recipes = [CONFIGS / f"{recipe}.yaml" for recipe in MODELS[name]]
    return fit(folder / f"{name.replace(' ', '_')}_{seed}", recipes, settings)


def held_out(count: int) -> torch.Tensor:
    """The first chunks of the test split, `(count, 256)` int64."""
    chunks = np.load(TOKENS / "test" / "tokens.npy", mmap_mode="r")
    if len(chunks) < count:
        raise SystemExit(f"{TOKENS / 'test'} has {len(chunks)} chunks, --chunks is {count}")
    return torch.from_numpy(chunks[:count].astype(np.int64)).reshape(count, -1)


def bits_per_character(generator: Any, chunks: torch.Tensor) -> tuple[float, float, str]:
    """The mean over chunks, its standard error, and whether it is exact."""
    labels = torch.zeros(len(chunks), dtype=torch.int64)
    found = generator.log_likelihood(chunks, labels)
    bits = -found.nats / (log(2) * chunks.shape[1])
    return float(bits.mean()), float(bits.std() / len(bits) ** 0.5), found.kind


def bits_by_frequency(chunks: torch.Tensor) -> float:
    """What it takes who knows how often each character is in the training text, and nothing of its neighbours."""
    counts = np.bincount(np.load(TOKENS / "train" / "tokens.npy", mmap_mode="r").reshape(-1))
    return float(-np.log2(counts / counts.sum())[chunks.numpy()].mean())


def written(generator: Any, sampler: Sampler, seed: int) -> list[str]:
    """Three drawn chunks, their first 120 characters."""
    tokens = generator.sample(torch.zeros(3, dtype=torch.int64), sampler=sampler, seed=seed)
    return [text[:120] for text in generator.tokenizer.texts(tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=400, help="of 16 chunks, at least 41")
    parser.add_argument("--chunks", type=int, default=100, help="of the test split, that are measured")
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 256], help="of the diffusion's samples")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/text_diffusion"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    if not (TOKENS / "train").is_dir():
        run([executable, "data/text.py", "--output", str(TOKENS)], check=True)
    chunks = held_out(given.chunks)
    lines = [
        "# Discrete diffusion of text",
        "",
        "| noise | bits per character of held-out text | standard error | minutes to train |",
        "|:--|--:|--:|--:|",
        f"| frequencies of the characters alone | {bits_by_frequency(chunks):.3f} |  |  |",
    ]
    texts = []
    for name in MODELS:
        checkpoints = [train(name, seed, given.batches, given.runs) for seed in given.seeds]
        generators = [discrete_lit.load(checkpoint) for checkpoint in checkpoints]
        bits, errors, kinds = zip(*(bits_per_character(one, chunks) for one in generators), strict=True)
        sign = "at most " if kinds[0] == "bound" else ""
        minutes = mean(minutes_of(checkpoint) for checkpoint in checkpoints)
        lines.append(f"| {name} | {sign}{spread(bits)} | {mean(errors):.3f} | {minutes:.1f} |")
        samplers: dict[str, Sampler] = {f"{name}, {steps} steps": AncestralSampler(steps) for steps in given.steps}
        if kinds[0] == "exact":
            samplers = {f"{name}, {chunks.shape[1]} steps": RasterSampler()}
        for title, sampler in samplers.items():
            texts += ["", f"{title}:", "", *(f"    {text}" for text in written(generators[0], sampler, seed=1))]
    options = " ".join(f"--{key} {' '.join(map(str, getattr(given, key)))}" for key in ("seeds", "steps"))
    command = f"python docs/experiments/text_diffusion.py {options} --batches {given.batches} --chunks {given.chunks}"
    machine = f"{stamp()}, {processor_minutes():.0f} minutes of processor"
    lines[2:2] = [f"`{command}`, {machine}. Mean ± standard deviation over the seeds.", ""]
    given.page.write_text("\n".join([*lines, *texts, ""]))
    print(f"Wrote {given.page}")


if __name__ == "__main__":
    main()
