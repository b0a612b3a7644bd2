"""`make comparison`: what it compares is of equal size and training, and every step's files are there."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.recipe_files import make_commands, read

FOLDER = "lightning_configs/quickstart"
COMPARISON = read(f"{FOLDER}/comparison.yaml")
# The recipe of a run is named after its folder.
GENERATORS = sorted({Path(path).parents[1].name for paths in COMPARISON["likelihoods"].values() for path in paths})
# Generators of latents have no likelihood in the table; `test_comparison_of_latents.py` has their tests.
WITH_LIKELIHOOD = {name: paths for name, paths in COMPARISON["samples"].items() if "latents" not in name}
TOKENIZERS = sorted({Path(path).parts[2] for path in COMPARISON["reconstructions"].values()})


def sizes_and_training(name: str) -> dict[str, Any]:
    """Of a recipe, what all in the comparison have in common."""
    settings = read(f"{FOLDER}/{name}.yaml")
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    backbone = (
        {key: model["backbone"]["init_args"][key] for key in ("width", "depth", "heads")} if name in GENERATORS else 0
    )
    common = {key: model.get(key) for key in ("network", "reconstruction_loss", "optimizer", "scheduler")}
    if name in GENERATORS:  # `make comparison` says how many batches: a test below
        del settings["trainer"]["max_steps"], common["scheduler"]["init_args"]["total_steps"]
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
    assert {name: [Path(path).parent for path in paths] for name, paths in WITH_LIKELIHOOD.items()} == {
        name: [Path(path).parents[1] for path in paths] for name, paths in COMPARISON["likelihoods"].items()
    }


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of `make comparison`."""
    return make_commands(tmp_path_factory.mktemp("make") / "runs", "comparison/report.md")


def made_by(steps: list[str]) -> set[str]:
    """List the folders that commands write into."""
    made = set()
    for step in steps[:-1]:
        settings = {}
        for config in re.findall(r"--config (\S+)", step):
            settings |= read(config)
        output = re.search(r"--(?:output|run_dir) (\S+)", step)
        made.add(output[1] if output else str(settings.get("run_dir") or settings["output"]))
    return made


def test_make_makes_every_file_that_is_compared(steps: list[str]) -> None:
    assert steps[-1] == f"evaluate --config {FOLDER}/comparison.yaml --devices 2"
    made = made_by(steps)
    runs = [path for kind in ("samples", "likelihoods") for paths in COMPARISON[kind].values() for path in paths]
    for path in (*runs, *COMPARISON["reconstructions"].values(), *COMPARISON["classifier"].values()):
        assert path.removesuffix("/samples.npz").removesuffix("/checkpoints/last.ckpt") in made
    for name in GENERATORS:
        assert set(read(f"{FOLDER}/{name}.yaml")["data"]["init_args"].values()) & made


def test_all_generators_see_as_many_batches(steps: list[str]) -> None:
    trained = [step for step in steps if step.startswith("fit") and "/comparison/seed_" in step]
    assert {re.search(r"/seed_\d/(\w+)", step)[1] for step in trained} >= set(GENERATORS)  # type: ignore[index]
    counts = {tuple(re.findall(r"(?:max_steps|total_steps) (\d+)", step)) for step in trained}
    assert len(counts) == 1 and len(set(*counts)) == 1 and len(*counts) == 2


def test_the_samplers_are_compared_on_the_masked_generators(tmp_path: Path) -> None:
    steps = make_commands(tmp_path / "runs", "comparison/samplers/report.md")
    settings = read(f"{FOLDER}/comparison_samplers.yaml")
    assert steps[-1] == f"evaluate --config {FOLDER}/comparison_samplers.yaml --devices 2"
    made = made_by(steps)
    for name, paths in settings.pop("samples").items():
        assert len(paths) == 3, name
        assert {path.removesuffix("/samples.npz") for path in paths} <= made
    # Two tables with one way of measuring.
    alone = {"samples", "reconstructions", "likelihoods"}
    assert {**settings, "output": COMPARISON["output"]} == {
        key: value for key, value in COMPARISON.items() if key not in alone
    }
    trained = [step for step in steps if step.startswith("fit") and "/comparison/" in step]
    assert len(trained) == 3 and all("quickstart/masked.yaml" in step for step in trained)
