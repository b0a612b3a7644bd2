"""Recipes of generators ask for what their authors' code does where docs/training.md has no column for it.

Places of dropout, how many tokens are masked and the like are tested where they are implemented, against their own law.
"""

from typing import Any

import pytest
from helpers.recipe_files import layered


def settings_of(recipe: str) -> dict[str, Any]:
    return layered(f"lightning_configs/generators/{recipe}_imagenet256.yaml")


LINE = {"embeddings", "attention_output", "mlp_output"}
ASKED: dict[str, dict[str, Any]] = {
    "maskgit": {"initialization": "maskgit"},
    "maskbit_14bit": {"initialization": "maskbit", "weight_decay_rule": "all"},
    "halton_b": {
        "initialization": "xavier",
        "dropout_places": {"attention_weights", "attention_output", "mlp_hidden"},
        "weight_decay_rule": "all",
        "mask_count": "bernoulli",
    },
    "titok_l32_generator": {"initialization": "bert", "mask_count": "round"},
    "rar_b": {
        "initialization": "bert",
        "dropout_places": {"attention_weights", "attention_output", "mlp_hidden", "mlp_output"},
        "weight_decay_rule": "rar",
    },
    "bar_b": {"initialization": "bar", "weight_decay_rule": "bar"},
    "llamagen_b": {"initialization": "llamagen", "dropout_places": LINE, "weight_decay_rule": "matrices"},
    "ibq_ar_b": {
        "initialization": "ibq",
        "dropout_places": LINE,
        "weight_decay_rule": "matrices",
        "norm_affine": True,
    },
    "open_magvit2_ar_b": {"initialization": "llamagen", "dropout_places": LINE, "weight_decay_rule": "matrices"},
    "taming_gpt": {"initialization": "taming"},
    "var_d16": {"initialization": "var", "initial_gates": 1e-3, "weight_decay_rule": "linear_and_classes"},
    "var_d20": {"initialization": "var", "initial_gates": 1e-3, "weight_decay_rule": "linear_and_classes"},
    "var_d24": {"initialization": "var", "initial_gates": 1e-4, "weight_decay_rule": "linear_and_classes"},
    "var_d30": {"initialization": "var", "initial_gates": 1e-5, "weight_decay_rule": "linear_and_classes"},
}


@pytest.mark.parametrize("recipe", ASKED)
def test_what_the_recipe_asks_for(recipe: str) -> None:
    arguments = settings_of(recipe)["model"]["init_args"]
    given = {**arguments, **arguments["backbone"]["init_args"]}
    for name, value in ASKED[recipe].items():
        assert (set(given[name]) if isinstance(value, set) else given[name]) == value, name


def test_what_sedd_asks_for() -> None:
    for recipe in ("sedd_absorb", "sedd_absorb_2d", "sedd_uniform"):
        settings = layered(f"lightning_configs/generators/{recipe}.yaml")
        arguments = settings["model"]["init_args"]
        backbone = arguments["backbone"]["init_args"]
        assert arguments["gradient_of"] == "sequence" and settings["trainer"]["gradient_clip_val"] == 1.0
        assert backbone["initialization"] == "sedd" and set(backbone["dropout_places"]) == LINE - {"embeddings"}
