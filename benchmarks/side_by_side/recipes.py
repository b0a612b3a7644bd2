"""Generators and tokenizers as the recipes of `lightning_configs` describe them, with random weights.

Their tokenizers' files are not needed: a generator gets a tokenizer with as many ids on a grid as large, which computes
nothing, or, where it predicts scales, the scales' quantizer behind a network of a few channels. With `tiny` everything
is as small as its kind allows.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule
from torch import nn

from discrete_lit.checkpoints import instantiate
from discrete_lit.generators import Generator
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer

RECIPES = Path(__file__).resolve().parents[2] / "lightning_configs"
# Ids of the tokenizers that the generators' recipes name, and the recipe of the one with scales.
VOCABULARIES = {"weights/maskgit_vqgan.ckpt": 1024, "weights/llamagen_vq16.ckpt": 16_384}
SCALES = {"weights/var.ckpt": "tokenizers/var_imagenet256"}
# Images of 256 pixels are 16 x 16 tokens in all of them; a tiny grid has as few places as 8 steps of MaskGIT need.
SIDE, TINY_SIDE = 16, 4
TINY_BACKBONE = {"width": 32, "depth": 2, "heads": 2}
TINY_VOCABULARY = 32


def read_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe, such as `generators/rar_b_imagenet256`."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def make_generator(
    name: str,
    *,
    device: torch.device,
    tiny: bool = False,
    backbone: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
    **changes: Any,
) -> Generator:
    """Build a recipe's generator on a device, its weights drawn with seed 0, in eval mode.

    Args:
        name: such as `rar_b_imagenet256`.
        device: where it is made.
        tiny: two blocks of width 32, and 16 places of 32 ids, or three scales.
        backbone: settings that replace the recipe's.
        sampler: settings that replace the recipe's.
        changes: settings of the generator that replace the recipe's.
    """
    model = read_recipe(f"generators/{name}")["model"]
    settings = model["init_args"]
    settings["tokenizer"], settings["image_size"] = _stand_in(settings["tokenizer"]["init_args"]["checkpoint"], tiny)
    settings["backbone"]["init_args"] |= (TINY_BACKBONE if tiny else {}) | (backbone or {})
    settings.setdefault("sampler", {}).setdefault("init_args", {}).update(sampler or {})
    settings |= changes
    made = _make(model, device)
    assert isinstance(made, Generator)
    return made


def make_tokenizer(
    name: str, *, device: torch.device, tiny: bool = False, changes: dict[str, Any] | None = None
) -> AutoencoderTokenizer:
    """Build a recipe's tokenizer on a device, its weights drawn with seed 0, in eval mode.

    Those of a perceptual loss are random too: what it costs does not depend on them.

    Args:
        name: such as `llamagen_vq16_imagenet256`.
        device: where it is made.
        tiny: networks of 32 channels.
        changes: settings of the tokenizer that replace the recipe's.
    """
    model = read_recipe(f"tokenizers/{name}")["model"]
    settings = model["init_args"]
    settings["perceptual_loss"]["init_args"] = {"weights_path": "random"}
    settings["quantizer"]["init_args"]["codebook_init"] = "normal"  # there is no data to begin with
    if tiny:
        settings["network"]["init_args"] |= {"channels": 32, "blocks": 1}
        settings["quantizer"]["init_args"]["codebook_size"] = 256
    settings |= changes or {}
    made = _make(model, device)
    assert isinstance(made, AutoencoderTokenizer)
    return made


def _stand_in(checkpoint: str, tiny: bool) -> tuple[dict[str, Any], int]:
    """The configuration of a tokenizer with the ids of a checkpoint's, and the size of its images."""
    if checkpoint in VOCABULARIES:
        levels = TINY_VOCABULARY if tiny else VOCABULARIES[checkpoint]
        arguments = {"levels": levels, "image_channels": 1}
        return {
            "class_path": "discrete_lit.tokenizers.PixelLevels",
            "init_args": arguments,
        }, TINY_SIDE if tiny else SIDE
    recipe = read_recipe(SCALES[checkpoint])["model"]["init_args"]
    arguments = {name: recipe[name] for name in ("codebook_size", "code_dim", "scales")}
    if tiny:
        arguments |= {"codebook_size": TINY_VOCABULARY, "scales": [1, 2, 4]}
    halvings = 2 if tiny else len(recipe["network"]["init_args"]["multipliers"]) - 1
    network = {"channels": 32, "multipliers": [1] * (halvings + 1), "blocks": 1, "attention": False}
    arguments["network"] = {"class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder", "init_args": network}
    size = arguments["scales"][-1] * 2**halvings
    return {"class_path": "discrete_lit.tokenizers.MultiScaleVQ", "init_args": arguments}, size


def _make(model: dict[str, Any], device: torch.device) -> LightningModule:
    torch.manual_seed(0)
    with torch.device(device):
        made = instantiate(model)
    draw_zeros(made)
    return made.eval().to(device)


@torch.no_grad()
def draw_zeros(module: nn.Module) -> None:
    """Draw the weights that begin at zero: products with zeros are faster than those of a trained network."""
    for parameter in module.parameters():
        if parameter.ndim >= 2 and not parameter.is_meta and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
