"""The wheel of this tree, the interpreters at hand, and what a user does first in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "discrete_lit", "lightning_configs")
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("audio", "bench", "demo", "docs", "imagenet", "offline", "ray", "s3", "site", "text", "video")
"""All but `dev`, which is for a checkout."""

_IMAGES = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
for split in ("train", "validation"):
    for label in ("dark", "light"):
        folder = Path(sys.argv[1]) / split / label
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 128, (16, 16, 3)) + 127 * (label == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
"""
_DATA = {
    "class_path": "ImageFolder",
    "init_args": {"train": "images/train", "validation": "images/validation", "image_size": 16, "batch_size": 4},
}
_TRAINER = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
_NETWORK = {"channels": 8, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2}
_ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
TOKENIZER: dict[str, Any] = {
    "model": {
        "class_path": "FSQ",
        "init_args": {
            "levels": [4, 3],
            "network": {"class_path": "ConvAutoencoder", "init_args": _NETWORK},
            "optimizer": _ADAMW,
        },
    },
    "data": _DATA,
    "trainer": _TRAINER,
}
GENERATOR: dict[str, Any] = {
    "model": {
        "class_path": "Masked",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": "runs/tokenizer/checkpoints/last.ckpt"},
            },
            "image_size": 16,
            "num_classes": 2,
            "backbone": {"class_path": "Transformer", "init_args": {"width": 16, "depth": 1, "heads": 2}},
            "optimizer": _ADAMW,
        },
    },
    "data": _DATA,
    "trainer": _TRAINER,
}


def interpreter(version: str) -> str | None:
    """Find an interpreter of a version, such as `3.12`, on the path or among those of pyenv."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    # A shim may stand for a version that is not there.
    runs = (path for path in found if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode)
    return next((str(path) for path in runs), None)


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the tree, as what setuptools leaves behind would get into the next wheel."""
    for name in SHIPPED:
        source, target = ROOT / name, folder / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(folder / "tree")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def called(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program outside the checkout, without the tests' own paths."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)


def commands_without_torch(bin: Path, folder: Path) -> None:
    """Give the commands that need no dependency: the version, the help, the recipes."""
    program = str(bin / "discrete-lit")
    assert re.fullmatch(r"discrete-lit \d+\.\d+\.\d+\n", called(program, "--version", folder=folder).stdout)
    helped = called(program, "--help", folder=folder)
    assert helped.returncode == 0 and helped.stdout.startswith("usage: discrete-lit COMMAND"), helped.stderr


def first_steps(bin: Path, folder: Path) -> None:
    """Do what a user does first: look at recipes and models, train a tokenizer and a generator, and draw.

    Raises:
        AssertionError: a command failed, with what it said.
    """

    def run(*arguments: str) -> str:
        done = called(*arguments, folder=folder)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    program = str(bin / "discrete-lit")
    commands_without_torch(bin, folder)
    assert "quickstart/masked.yaml" in run(program, "recipes")
    assert "rar_b" in run(program, "models")
    printed = yaml.safe_load(run(program, "fit", "--config", "quickstart/masked.yaml", "--print_config"))
    assert printed["model"]["class_path"] == "discrete_lit.generators.Masked"
    run(str(bin / "python"), "-c", _IMAGES, "images")
    for name, settings in {"tokenizer": TOKENIZER, "generator": GENERATOR}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        run(program, "fit", "--config", f"{name}.yaml", "--run_dir", f"runs/{name}")
    checkpoint = "runs/generator/checkpoints/last.ckpt"
    run(program, "sample", "--ckpt_path", checkpoint, "--num_samples", "4", "--output", "samples")
    assert (folder / "samples" / "grid.png").is_file() and (folder / "samples" / "samples.npz").is_file()
    run(program, "export", "--ckpt_path", checkpoint, "--family", "hub", "--output", "hub")
    run(program, "sample", "--ckpt_path", "hub", "--num_samples", "4", "--output", "again")
    assert (folder / "again" / "grid.png").read_bytes() == (folder / "samples" / "grid.png").read_bytes()
