"""The recipes of published generators build the published networks: names, sizes and samplers."""

import re
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any

import pytest
import torch
from helpers import published_generators as published
from helpers.recipe_files import ROOT, header_command, layered
from test_generator_layouts import PUBLISHED, backbone

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.pretrained.conversion import FAMILIES, Conversion
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

RECIPES = {
    "llamagen_b": ("llamagen_gpt_c2i", "B"),
    "llamagen_l": ("llamagen_gpt_c2i", "L"),
    "llamagen_xl": ("llamagen_gpt_c2i", "XL"),
    "rar_b": ("rar", "B"),
    "rar_l": ("rar", "L"),
    "rar_xl": ("rar", "XL"),
    "rar_xxl": ("rar", "XXL"),
    "titok_l32_generator": ("titok_imagebert", "L32"),
    "halton_s": ("halton_maskgit", "S"),
    "halton_b": ("halton_maskgit", "B"),
    "halton_l": ("halton_maskgit", "L"),
    "maskbit_14bit": ("maskbit_lfqbert", "14 bits"),
    "var_d16": ("var_transformer", "d16"),
    "var_d20": ("var_transformer", "d20"),
    "var_d24": ("var_transformer", "d24"),
    "var_d30": ("var_transformer", "d30"),
}
# What the weights do not tell.
REFERENCE = {
    "llamagen_gpt_c2i": {"block_size": 256},
    "taming_net2net": {"cond_stage_config": {"n_classes": 1000}},
}
# Those that no published weights are loaded for, by their number of parameters alone.
OTHERS = ["taming_gpt", "maskgit", "ibq_ar_b"]
# What trains a network and is in no published file of weights.
TRAINING = {
    *("dropout", "dropout_places", "drop_path", "activation_checkpointing"),
    *("initialization", "initial_gates"),
}


def config_of(recipe: str) -> str:
    return f"lightning_configs/generators/{recipe}_imagenet256.yaml"


def settings_of(recipe: str) -> dict[str, Any]:
    return layered(config_of(recipe))["model"]


def switches(recipe: str) -> dict[str, Any]:
    own = settings_of(recipe)["init_args"]["backbone"]["init_args"]
    return {name: value for name, value in own.items() if name not in TRAINING}


@cache
def published_conversion(recipe: str) -> Conversion:
    """Of the published names at the published sizes, on the meta device."""
    family, size = RECIPES[recipe]
    shapes = getattr(published, family)(**PUBLISHED[family, size][0])
    tensors = published.tensors(shapes, lambda shape: torch.empty(shape, device="meta"))
    return FAMILIES[family].convert(State(tensors, family), Settings(REFERENCE.get(family)))


def class_name(config: dict[str, Any]) -> str:
    """The name of a configuration's class, by which recipes give it."""
    return config["class_path"].rpartition(".")[2]


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def as_published(conversion: Conversion, settings: dict[str, Any], sizes: dict[str, Any]) -> Transformer:
    """Ours on the meta device, with other switches than the conversion's."""
    transformer = {"class_path": "discrete_lit.backbones.Transformer", "init_args": settings}
    config = {**conversion.config, "init_args": {**conversion.config["init_args"], "backbone": transformer}}
    with torch.device("meta"):
        return backbone(replace(conversion, config=config), sizes.get("sides", ()), sizes.get("code_dim", 0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_is_the_published_one(recipe: str) -> None:
    """Every name and size that the published weights fill, and every setting that they do not tell; so the recipe has
    the published number of parameters, which test_generator_layouts.py compares."""
    sizes, heads, _ = PUBLISHED[RECIPES[recipe]]
    conversion = published_conversion(recipe)
    theirs, ours = conversion.config["init_args"], settings_of(recipe)
    own = as_published(conversion, switches(recipe), sizes)
    reference = as_published(conversion, theirs["backbone"]["init_args"], sizes)
    assert ours["class_path"] == class_name(conversion.config)
    assert shapes_of(own) == shapes_of(reference) and own.heads == heads
    assert filled(switches(recipe)) == filled(theirs["backbone"]["init_args"])
    for name in ("num_classes", "bit_groups", "order"):
        assert ours["init_args"].get(name) == theirs.get(name)


def filled(given: dict[str, Any]) -> dict[str, Any]:
    """All switches, without the inner width, which shapes tell and a recipe may leave to its default."""
    defaults = {name: value.default for name, value in signature(Transformer).parameters.items()}
    return {**defaults, **given, "layout": None, "mlp_hidden": None, "head_dim": None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_sampler_is_the_published_one(recipe: str) -> None:
    theirs = published_conversion(recipe).config["init_args"]["sampler"]
    ours = settings_of(recipe)["init_args"]["sampler"]
    assert ours["class_path"] == class_name(theirs)
    assert theirs["init_args"].items() <= ours["init_args"].items()


def count(recipe: str, layout: SequenceLayout) -> int:
    with torch.device("meta"):
        own = Transformer(layout, **switches(recipe))
    return sum(parameter.numel() for parameter in own.parameters())


def test_tamings_gpt() -> None:
    """The published shapes, 1.4 billion; ours has rows of their own for the 1,000 classes and no class."""
    theirs = published.taming_net2net(1536, 48, 16384, 256)
    own = count("taming_gpt", SequenceLayout(16384, (16, 16), num_classes=1000, attention="causal"))
    assert own == published.parameter_count(theirs) + 1001 * 1536
    assert round(published.parameter_count(theirs) / 1e9, 1) == 1.4


def test_maskgit() -> None:
    """172.5 million by its code, whose one table has the ids, the classes and the mask; ours has no class as well."""
    own = count("maskgit", SequenceLayout(1024, (16, 16), num_classes=1000, attention="bidirectional", mask_token=True))
    assert f"{own / 1e6:.1f}" == "172.5"


def test_ibq() -> None:
    """342 million are published."""
    own = count("ibq_ar_b", SequenceLayout(16384, (16, 16), num_classes=1000, attention="causal"))
    assert own // 10**6 == 342


@pytest.mark.parametrize("recipe", [*RECIPES, *OTHERS])
def test_every_parameter_is_trained(recipe: str) -> None:
    """With several processes a parameter without a gradient would end the run."""
    settings = settings_of(recipe)
    small = {**switches(recipe), "width": 16, "depth": 3, "heads": 2, "mlp_hidden": 8}
    if "head_dim" in small:
        small["head_dim"] = 5
    tokens, labels = torch.randint(4, (2, 5)), torch.tensor([0, 2])
    kind = settings["class_path"].rpartition(".")[2]
    if kind == "Autoregressive":
        own = Transformer(
            SequenceLayout(4, (2, 3), num_classes=2, attention="causal", any_order="order" in settings["init_args"]),
            **small,
        )
    elif kind == "NextScale":
        own = Transformer(
            SequenceLayout(4, (5,), num_classes=2, attention="block_causal", scales=(1, 4), input_dim=3), **small
        )
        tokens = torch.randn(2, 4, 3)
    else:
        parts = settings["init_args"].get("bit_groups", 1)
        grid = (6,) if recipe.startswith("titok") else (2, 3)
        own = Transformer(
            SequenceLayout(4, grid, num_classes=2, attention="bidirectional", mask_token=True, sub_tokens=parts),
            **small,
        )
        tokens = torch.randint(5, (2, 6 * parts))
    own(tokens, labels).square().sum().backward()
    assert [name for name, parameter in own.named_parameters() if parameter.grad is None] == []


def after(flag: str, command: list[str]) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("recipe", [*RECIPES, *OTHERS])
def test_the_other_commands_of_the_comment(recipe: str) -> None:
    """50,000 samples of the run's checkpoint; and of a whole recipe its tokenizer, and the crops of its tokens."""
    from discrete_lit.cli.sample import sample

    lines = (ROOT / config_of(recipe)).read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip(" \\") for line in lines if line.startswith("#"))
    run_dir = after("--run_dir", header_command(config_of(recipe)))
    command = comment.partition("Then: discrete-lit sample ")[2].split()
    assert after("--ckpt_path", command) == f"{run_dir}/checkpoints/last.ckpt" and after("--output", command) == run_dir
    assert after("--num_samples", command) == "50000"
    assert {flag.removeprefix("--") for flag in command[::2]} <= set(signature(sample).parameters)
    assert "ot run at full length" in comment
    imported = re.search(r"discrete-lit import --weights \S+ --family (\S+) --output ([^`\s]+)`", comment)
    settings = layered(config_of(recipe))
    if imported is None:
        assert re.search(r"\w+_imagenet256\.yaml", comment), "a recipe laid over another names it"
        return
    assert imported[1] in FAMILIES
    assert imported[2] == settings["model"]["init_args"]["tokenizer"]["init_args"]["checkpoint"]
    crops = re.search(r"--crops (\w+)", comment)
    tokens = settings["data"]["init_args"]["train"]
    assert tokens.startswith("shards/") if crops is None else tokens.endswith(f"_{crops[1]}/train")
