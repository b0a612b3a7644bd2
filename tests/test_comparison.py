"""`make comparison`: what it compares is of equal size and training, and every step's files are there."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.recipe_files import layered, make_commands, read

FOLDER = "lightning_configs/quickstart"
COMPARISON = read(f"{FOLDER}/comparison.yaml")
FURTHER = read(f"{FOLDER}/comparison_further.yaml")
# The recipe of a run is named after its folder.
GENERATORS = sorted({Path(path).parents[1].name for paths in COMPARISON["likelihoods"].values() for path in paths})
# Generators of latents have no likelihood in the table; `test_comparison_of_latents.py` has their tests.
WITH_LIKELIHOOD = {name: paths for name, paths in COMPARISON["samples"].items() if "latents" not in name}
TOKENIZERS = sorted({Path(path).parts[2] for path in COMPARISON["reconstructions"].values()})

# The recipes that `make comparison` leaves out.
OTHERS = sorted(Path(path).parent.name for path in FURTHER["samples"].values())


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


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of `make comparison-further`."""
    return make_commands(tmp_path_factory.mktemp("make") / "runs", "comparison/further/report.md")


def test_the_further_families_are_measured_as_the_others_are() -> None:
    alone = {"samples", "reconstructions", "likelihoods", "output"}
    assert {key: value for key, value in FURTHER.items() if key not in alone} == {
        key: value for key, value in COMPARISON.items() if key not in alone
    }
    known = {name: path for name, path in FURTHER["reconstructions"].items() if name != "hybrid tokenizer"}
    assert known.items() <= COMPARISON["reconstructions"].items()
    assert not set(OTHERS) & {Path(path).parent.name for paths in COMPARISON["samples"].values() for path in paths}
    for name, path in FURTHER["likelihoods"].items():
        assert Path(path).parents[1] == Path(FURTHER["samples"][name]).parent


def test_make_makes_every_file_of_the_further_families(further: list[str]) -> None:
    assert further[-1] == f"evaluate --config {FOLDER}/comparison_further.yaml --devices 2"
    made = made_by(further)
    for path in (*FURTHER["samples"].values(), *FURTHER["likelihoods"].values(), *FURTHER["reconstructions"].values()):
        assert path.removesuffix("/samples.npz").removesuffix("/checkpoints/last.ckpt") in made


def test_the_further_families_see_the_batches_of_the_others(steps: list[str], further: list[str]) -> None:
    """One seed, the batches, their size and the schedule's length as `make comparison` gives them."""

    def given(step: str) -> list[str]:
        return re.findall(r"--(?:seed_everything|\S+\.seed|\S+batch_size|\S+_steps|trainer\.limit\S+) \S+", step)

    (first,) = [given(step) for step in steps if "/comparison/seed_0/masked " in step and step.startswith("fit")]
    trained = [step for step in further if step.startswith("fit") and "/comparison/seed_" in step]
    assert {re.search(r"/seed_0/(\w+)", step)[1] for step in trained} == {"masked", *OTHERS}  # type: ignore[index]
    assert all(given(step) == first for step in trained) and len(first) == 7


@pytest.mark.parametrize("name", OTHERS)
def test_the_further_families_have_the_width_and_the_depth_of_the_others(name: str) -> None:
    settings = layered(f"{FOLDER}/{name}.yaml")
    model, of_masked = settings["model"]["init_args"], read(f"{FOLDER}/masked.yaml")["model"]["init_args"]
    assert model["optimizer"] == of_masked["optimizer"]
    backbone, wanted = model["backbone"]["init_args"], of_masked["backbone"]["init_args"]
    stacks = 2 if model["backbone"]["class_path"] in ("MaskedAutoencoder", "CellTransformer") else 1
    assert stacks * backbone["depth"] == wanted["depth"]
    assert (backbone["width"], backbone["heads"]) == (wanted["width"], wanted["heads"])


def test_mixar_is_given_the_masked_generator_of_its_seed(further: list[str]) -> None:
    (mixar,) = [step for step in further if "mixar.yaml" in step]
    given = (
        "--model.init_args.discrete.init_args.checkpoint runs/quickstart/comparison/seed_0/masked/checkpoints/last.ckpt"
    )
    assert f"--config {FOLDER}/discon.yaml --config {FOLDER}/mixar.yaml" in mixar and given in mixar
