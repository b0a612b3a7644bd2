"""Recipes of generators that name a published number train as their authors' code does, as far as it is public.

Schedules are compared with the authors' formulas, written out here from their code, at ten steps of the run. What else
their code decides and no formula shows (initialisation, places of dropout, what decays, how many tokens are masked) is
tested where it is implemented, against its own law; here, that the recipe asks for it.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.recipe_files import layered

from discrete_lit import optimization

EPOCH = 1_281_167


def cosine(warmup: int, total: int, end: float = 0.0) -> Callable[[int], float]:
    """1d-tokenizer and MaskBit: `get_cosine_schedule_with_warmup` of utils/lr_schedulers.py."""
    return lambda step: (
        step / warmup
        if step < warmup
        else end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    )


def line(warmup_epochs: float, epochs: int, batch: int, end: float) -> Callable[[int], float]:
    """VAR, IBQ, Open-MAGVIT2: `lr_wd_annealing` with `wp` in epochs, `wp0=0.005` and `wpe`."""
    steps = EPOCH // batch
    warmup, total = round(warmup_epochs * steps), epochs * steps

    def ratio(step: int) -> float:
        if step < warmup:
            return 0.005 + 0.995 * step / warmup
        done = (step - warmup) / (total - 1 - warmup)
        return 1.0 if done < 0.05 else end + (1 - end) * (1 - done) / 0.95

    return ratio


def last_tenth(warmup: int, total: int) -> Callable[[int], float]:
    """Halton-MaskGIT: `adapt_learning_rate` of Trainer/abstract_trainer.py."""

    def ratio(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - 0.9 * total) / (0.1 * total)
        return 1.0 if done < 0 else max((1 + math.cos(math.pi * done)) / 2, 0.01)

    return ratio


def constant(warmup: int) -> Callable[[int], float]:
    return lambda step: min(1.0, step / warmup) if warmup else 1.0


# Rate, schedule, what gradients are clipped at, EMA.
SCHEDULES: dict[str, tuple[float, Callable[[int], float], float | None, float | None]] = {
    "maskgit": (1e-4, constant(5000), None, 0.999),  # of its configuration; its training code is not public
    "maskbit_14bit": (1e-4, cosine(5000, 1_350_000, 0.1), 1.0, 0.999),
    "halton_b": (1e-4, last_tenth(2500, 1_500_000), 1.0, None),
    "titok_l32_generator": (2e-4, cosine(10_000, 500_000, 0.05), 1.0, 0.999),
    "rar_b": (4e-4, cosine(62_500, 250_000, 0.025), 1.0, None),
    "llamagen_b": (1e-4, constant(0), 1.0, None),
    "ibq_ar_b": (3e-4, line(6, 300, 768, 0.1), 1.0, None),
    "open_magvit2_ar_b": (3e-4, line(6, 300, 768, 0.1), 1.0, None),
    "var_d16": (3e-4, line(4, 200, 768, 0.1), 2.0, None),
    "var_d20": (3e-4, line(5, 250, 768, 0.1), 2.0, None),
    "var_d24": (2.4e-4, line(7, 350, 768, 0.01), 2.0, None),
    "var_d30": (3.2e-4, line(7, 350, 1024, 0.01), 2.0, None),
}


def settings_of(recipe: str) -> dict[str, Any]:
    return layered(f"lightning_configs/generators/{recipe}_imagenet256.yaml")


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_schedules(recipe: str) -> None:
    settings = settings_of(recipe)
    rate, expected, clip, average = SCHEDULES[recipe]
    arguments, trainer = settings["model"]["init_args"], settings["trainer"]
    assert arguments["optimizer"]["init_args"]["lr"] == pytest.approx(rate)
    assert trainer.get("gradient_clip_val") == clip
    averages = [entry["init_args"]["decay"] for entry in trainer.get("callbacks+", [])]
    assert averages == ([] if average is None else [average])
    scheduler, total = arguments.get("scheduler"), trainer["max_steps"]

    def ours(step: int) -> float:
        if scheduler is None:
            return 1.0
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        made = getattr(optimization, scheduler["class_path"])(optimizer, **scheduler["init_args"])
        return made.lr_lambdas[0](step)

    for tenth in range(10):
        step = round((tenth + 0.5) * total / 10)
        assert ours(step) == pytest.approx(expected(step), abs=0.006), step
    assert ours(total - 1) == pytest.approx(expected(total - 1), abs=0.006)


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


def test_crops_and_mirror_images() -> None:
    """MaskBit's random part, VAR's resize to 288, and no flips where the authors' data has none."""
    data = {recipe: settings_of(recipe)["data"]["init_args"] for recipe in (*SCHEDULES, "taming_gpt")}
    part = data["maskbit_14bit"]
    assert (part["crop"], part["crop_area"], part["crop_aspect"]) == ("random_resized", [0.8, 1.0], [1.0, 1.0])
    assert part["flip"] is True
    for recipe in ("var_d16", "var_d20", "var_d24", "var_d30"):
        assert math.ceil(256 / data[recipe]["minimum_crop"]) == math.ceil(256 / data[recipe]["maximum_crop"]) == 288
    for recipe in ("ibq_ar_b", "open_magvit2_ar_b", "taming_gpt", "var_d16"):
        assert data[recipe]["flip"] is False and data[recipe]["crop"] == "random"
    assert data["halton_b"]["train"].endswith("_center/train")
