"""Generators of continuous latents in `make comparison`: of the size and training of the others, on one tokenizer."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.recipe_files import make_commands, read

FOLDER = "lightning_configs/quickstart"
COMPARISON = read(f"{FOLDER}/comparison.yaml")
ROWS = {name: paths for name, paths in COMPARISON["samples"].items() if "latents" in name}
# The recipe of a run is named after its folder.
NAMES = sorted({Path(path).parent.name for paths in ROWS.values() for path in paths})
COMMON_TRAINER = ("precision", "max_steps", "gradient_clip_val")


@pytest.mark.parametrize("name", NAMES)
def test_as_many_blocks_and_batches_as_the_others_and_their_optimizer(name: str) -> None:
    settings, bits = read(f"{FOLDER}/{name}.yaml"), read(f"{FOLDER}/maskbit.yaml")
    model, of_bits = settings["model"]["init_args"], bits["model"]["init_args"]
    for key in ("optimizer", "scheduler", "image_size", "num_classes"):
        assert model[key] == of_bits[key]
    assert {key: settings["trainer"][key] for key in COMMON_TRAINER} == {
        key: bits["trainer"][key] for key in COMMON_TRAINER
    }
    assert settings["data"]["init_args"]["batch_size"] == bits["data"]["init_args"]["batch_size"]
    backbone, wanted = model["backbone"], of_bits["backbone"]["init_args"]
    stacks = 2 if backbone["class_path"] == "MaskedAutoencoder" else 1
    assert stacks * backbone["init_args"]["depth"] == wanted["depth"]
    assert (backbone["init_args"]["width"], backbone["init_args"]["heads"]) == (wanted["width"], wanted["heads"])


def test_their_tokenizer_is_trained_as_the_others_are() -> None:
    settings, first = read(f"{FOLDER}/tokenizer_kl.yaml"), read(f"{FOLDER}/tokenizer.yaml")
    for key in ("network", "reconstruction_loss", "optimizer", "scheduler"):
        assert settings["model"]["init_args"][key] == first["model"]["init_args"][key]
    assert settings["data"] == first["data"] and settings["trainer"] == first["trainer"]


@pytest.mark.parametrize("name", NAMES)
def test_they_read_what_the_scaled_tokenizer_made(name: str) -> None:
    settings, scale = read(f"{FOLDER}/{name}.yaml"), read(f"{FOLDER}/latents_scale.yaml")
    assert settings["run_dir"] == f"runs/quickstart/{name}"
    checkpoint = settings["model"]["init_args"]["tokenizer"]["init_args"]["checkpoint"]
    assert checkpoint == scale["output"] == read(f"{FOLDER}/latents.yaml")["ckpt_path"]
    assert scale["ckpt_path"] in COMPARISON["reconstructions"].values()
    data = settings["data"]["init_args"]
    folder = "shards" if name == "discon" else "latents_kl"  # DisCon's images are encoded by both tokenizers
    assert [data[split] for split in ("train", "validation")] == [
        f"runs/quickstart/{folder}/{split}" for split in ("train", "validation")
    ]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of `make comparison` for a checkout without runs, in order."""
    return make_commands(tmp_path_factory.mktemp("make") / "runs", "comparison/report.md")


def place(steps: list[str], *parts: str) -> int:
    """Where the one step stands whose command has all these parts."""
    (found,) = [number for number, step in enumerate(steps) if all(part in step for part in parts)]
    return found


def test_make_scales_the_latents_before_it_stores_them_and_trains_on_them(steps: list[str]) -> None:
    order = [
        place(steps, "tokenizer_kl.yaml"),
        place(steps, "measure_latents", "latents_scale.yaml"),
        place(steps, "tokenize", "latents.yaml", "--split train", "--output runs/quickstart/latents_kl/train"),
        place(steps, "quickstart/mar.yaml", "--seed_everything 0"),
    ]
    assert order == sorted(order)
    assert place(steps, "tokenize", "--output runs/quickstart/latents_kl/validation") < order[-1]


@pytest.mark.parametrize("name", NAMES)
def test_make_trains_and_samples_every_seed(name: str, steps: list[str]) -> None:
    (paths,) = [paths for paths in ROWS.values() if Path(paths[0]).parent.name == name]
    assert len(paths) == 3
    for path in paths:
        folder = str(Path(path).parent)
        seed = re.search(r"seed_(\d)", path)
        assert seed is not None
        trained = place(steps, f"{name}.yaml", f"--run_dir {folder} ", f"--seed_everything {seed[1]} ")
        sampled = place(steps, "sample --config", f"--output {folder}", f"--seed {seed[1]} ")
        assert trained < sampled and f"--ckpt_path {folder}/checkpoints/last.ckpt" in steps[sampled]


def test_discon_is_given_the_masked_generator_of_its_seed(steps: list[str]) -> None:
    for seed in range(3):
        folder = f"runs/quickstart/comparison/seed_{seed}"
        discon = place(steps, "discon.yaml", f"--run_dir {folder}/discon")
        assert f"--model.init_args.discrete.init_args.checkpoint {folder}/masked/checkpoints/last.ckpt" in steps[discon]
        masked = place(steps, "masked.yaml", f"--run_dir {folder}/masked ")
        assert masked < discon and "discrete.init_args" not in steps[masked]


def test_mar_and_discon_train_on_as_many_draws_of_time(steps: list[str]) -> None:
    fits = [step for step in steps if re.search(r"--run_dir \S+/seed_\d/(mar|discon) ", step)]
    assert len(fits) == 6
    assert {tuple(re.findall(r"\.head\.init_args\.(\S+ \S+)", step)) for step in fits} == {
        ("repeats 4", "stratified true")
    }


def test_there_is_no_likelihood_of_latents() -> None:
    """A density of latents compares with no probability of ids."""
    assert not set(ROWS) & set(COMPARISON["likelihoods"])
    assert ROWS.keys() == {name for name, paths in COMPARISON["samples"].items() if Path(paths[0]).parent.name in NAMES}


def settings_of(model: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(model["init_args"][key] for key in ("head", "mask_schedule"))


def test_discon_is_mar_with_tokens_added() -> None:
    mar, discon = (read(f"{FOLDER}/{name}.yaml")["model"] for name in ("mar", "discon"))
    assert settings_of(mar) == settings_of(discon)
    assert {**mar["init_args"]["backbone"]["init_args"], "fusion": "add"} == discon["init_args"]["backbone"][
        "init_args"
    ]
