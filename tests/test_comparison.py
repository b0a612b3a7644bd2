"""`make comparison`: what it compares is of equal size and training, and every step's files are there."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.recipe_files import ROOT, read

FOLDER = "lightning_configs/quickstart"
COMPARISON = read(f"{FOLDER}/comparison.yaml")
# The recipe of a run is named after its folder.
GENERATORS = sorted({Path(path).parts[2] for path in COMPARISON["likelihoods"].values()})
TOKENIZERS = sorted({Path(path).parts[2] for path in COMPARISON["reconstructions"].values()})


def sizes_and_training(name: str) -> dict[str, Any]:
    """Of a recipe, what all in the comparison have in common."""
    settings = read(f"{FOLDER}/{name}.yaml")
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    backbone = (
        {key: model["backbone"]["init_args"][key] for key in ("width", "depth", "heads")} if name in GENERATORS else 0
    )
    common = {key: model.get(key) for key in ("network", "reconstruction_loss", "optimizer", "scheduler")}
    return {**common, "backbone": backbone, "batch_size": data["batch_size"], "trainer": settings["trainer"]}


@pytest.mark.parametrize(
    ("name", "first"), [(name, "masked") for name in GENERATORS] + [(name, "tokenizer") for name in TOKENIZERS]
)
def test_equal_size_and_training(name: str, first: str) -> None:
    assert sizes_and_training(name) == sizes_and_training(first)


def test_each_generator_reads_the_tokens_of_its_tokenizer() -> None:
    for name in GENERATORS:
        settings = read(f"{FOLDER}/{name}.yaml")
        tokenizer = Path(settings["model"]["init_args"]["tokenizer"]["init_args"]["checkpoint"]).parts[2]
        tokens = tokenizer.replace("tokenizer", "tokens")
        assert tokenizer in TOKENIZERS and settings["run_dir"] == f"runs/quickstart/{name}"
        for split in ("train", "validation"):
            assert settings["data"]["init_args"][split] == f"runs/quickstart/{tokens}/{split}"


def test_each_likelihood_is_of_the_generator_of_the_samples() -> None:
    own = {name: path for name, path in COMPARISON["samples"].items() if not re.search("masked_", path)}
    assert {name: Path(path).parent for name, path in own.items()} == {
        name: Path(path).parents[1] for name, path in COMPARISON["likelihoods"].items()
    }


def test_make_makes_every_file_that_is_compared(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = ["make", "--dry-run", f"RUNS={runs}", f"{runs}/comparison/report.md"]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    steps = [line.split("discrete-lit ")[1] for line in commands if "bin/discrete-lit " in line]
    assert steps[-1] == f"evaluate --config {FOLDER}/comparison.yaml"
    made = set()
    for step in steps[:-1]:
        settings = {}
        for config in re.findall(r"--config (\S+)", step):
            settings |= read(config)
        output = re.search(r"--output (\S+)", step)
        folder = output[1] if output else settings.get("run_dir") or settings["output"]
        made.add(str(folder).replace(str(runs), "runs/quickstart"))
    classifiers = COMPARISON["classifier"].values()
    for path in (*COMPARISON["samples"].values(), *COMPARISON["likelihoods"].values(), *classifiers):
        assert path.removesuffix("/samples.npz").removesuffix("/checkpoints/last.ckpt") in made
    for path in COMPARISON["reconstructions"].values():
        assert path.removesuffix("/checkpoints/last.ckpt") in made
    for name in GENERATORS:
        assert set(read(f"{FOLDER}/{name}.yaml")["data"]["init_args"].values()) & made
