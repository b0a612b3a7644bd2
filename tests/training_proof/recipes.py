"""The recipes that name a published number, and the modules that they build: whole without data, or tiny.

No file of weights is needed. A frozen tokenizer is stood in for by one of as many ids, or of latents as wide, on as
large a grid; perceptual networks have random weights.
"""

import json
import re
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from helpers.recipe_files import ROOT, layered
from lightning import LightningModule
from torch.overrides import TorchFunctionMode

import discrete_lit.cli.train  # noqa: F401, so that the short names of recipes are known
from discrete_lit.checkpoints import instantiate

FOLDERS = ("tokenizers", "generators")
_NUMBERED = re.compile(r"^discrete-lit fit\b.*\b(Published|Others quote)\b")


@cache
def recipes() -> tuple[str, ...]:
    """List the recipes that train a tokenizer or a generator and whose comment gives a published number, in order."""
    folder = ROOT / "lightning_configs"
    files = [path for part in FOLDERS for path in sorted((folder / part).glob("*.yaml"))]
    return tuple(f"{path.parent.name}/{path.stem}" for path in files if _NUMBERED.match(comment(path.read_text())))


def comment(text: str) -> str:
    """Give the opening comment of a recipe as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def settings_of(recipe: str) -> dict[str, Any]:
    """Read a recipe over those that its command names before it."""
    return layered(f"lightning_configs/{recipe}.yaml")


def class_name(config: dict[str, Any]) -> str:
    return config["class_path"].rpartition(".")[2]


def _grid(vocab_size: int, *shape: int) -> dict[str, Any]:
    return {"class_path": "TokenGrid", "init_args": {"vocab_size": vocab_size, "token_shape": list(shape)}}


def _network(halvings: int, **settings: Any) -> dict[str, Any]:
    sizes = {"channels": 32, "multipliers": [1] * (halvings + 1), "blocks": 1, "attention": False}
    return {"class_path": "ConvAutoencoder", "init_args": sizes | settings}


def _latents(channels: int, halvings: int) -> dict[str, Any]:
    arguments = {"latent_channels": channels, "kl_weight": 0.0, "network": _network(halvings)}
    return {"class_path": "KLVAE", "init_args": arguments}


def _scales(kind: str) -> dict[str, Any]:
    sizes = {"codebook_size": 4096, "code_dim": 32, "scales": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]}
    return {"class_path": kind, "init_args": sizes | {"network": _network(4)}}


def _codes() -> dict[str, Any]:
    quantizer = {"class_path": "VectorQuantizer", "init_args": {"codebook_size": 16384, "dim": 4}}
    return {"class_path": "VQGAN", "init_args": {"network": _network(3), "quantizer": quantizer}}


def _masked() -> dict[str, Any]:
    backbone = {"class_path": "Transformer", "init_args": {"width": 16, "depth": 1, "heads": 2}}
    settings = {"tokenizer": _grid(1024, 16, 16), "image_size": 256, "num_classes": 1000, "backbone": backbone}
    return {"class_path": "Masked", "init_args": settings}


# What stands in for a checkpoint, by the name of its file or its run.
STAND_INS = {
    "maskgit_vqgan": _grid(1024, 16, 16),
    "llamagen_vq16": _grid(16384, 16, 16),
    "titok_l32": _grid(4096, 32),
    "maskbit_14bit": _grid(2**14, 16, 16),
    "maskbit_16bit": _grid(2**16, 16, 16),
    "ibq_16384": _grid(16384, 16, 16),
    "magvit2_lfq18": _grid(2**18, 16, 16),
    "taming_16384": _grid(16384, 16, 16),
    "rqvae": _grid(16384, 8, 8, 4),
    "bitdance_ae": _grid(2**32, 16, 16),
    "var": _scales("MultiScaleVQ"),
    "hart_tokenizer_imagenet256": _scales("HybridVQ"),
    "kl16": _latents(16, 4),
    "kl8": _latents(4, 3),
    "va_vae": _latents(32, 4),
    "ldm_vq8": _codes(),
    "maskgit_imagenet256": _masked(),
}
LOADERS = ("from_checkpoint", "continuous_from_checkpoint", "generator_from_checkpoint")
# Weights of perceptual networks; the checkpoints of a first stage are read when training starts, not before.
FILES = {"weights_path": "random"}


def stand_in(config: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Give the configuration of what stands in for a checkpoint; a KeyError where `STAND_INS` has none."""
    path = config["init_args"]["checkpoint"]
    name = re.sub(r"^weights/|\.ckpt$|^runs/|/checkpoints/.*", "", path)
    found = deepcopy(STAND_INS[name])
    if class_name(found) == "TokenGrid" and image_size != 256 and len(found["init_args"]["token_shape"]) == 2:
        found["init_args"]["token_shape"] = [side * image_size // 256 for side in found["init_args"]["token_shape"]]
    return found


def without_files(settings: Any, image_size: int) -> Any:
    """Copy settings with stand-ins for checkpoints and random weights for those of perceptual networks."""
    if isinstance(settings, list):
        return [without_files(value, image_size) for value in settings]
    if not isinstance(settings, dict):
        return settings
    if "class_path" in settings and class_name(settings) in LOADERS:
        return stand_in(settings, image_size)
    return {name: FILES.get(name, without_files(value, image_size)) for name, value in settings.items()}


# Sizes at which initial weights are measured, by class; all else is the recipe's.
TINY_TRANSFORMER = {"width": 192, "depth": 3, "heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "Transformer": TINY_TRANSFORMER,
    "DiT": TINY_TRANSFORMER,
    "MaskedAutoencoder": TINY_TRANSFORMER,
    "CellTransformer": TINY_TRANSFORMER,
    "ScaleTransformer": TINY_TRANSFORMER,
    "UNet": {"channels": 64, "blocks": 1, "class_width": 64},
    "TokenDiffusionHead": {"width": 192, "depth": 3},
    "BinaryFlowHead": {"width": 192, "depth": 3, "modulations": 1},
    "ChannelHead": {"width": 192, "depth": 2},
    "MaskedBitHead": {"width": 192, "depth": 2},
    "FactorisedHead": {"sizes": [64, 4096]},
    "ConvAutoencoder": {"channels": 32, "blocks": 1},
    "TiTokAutoencoder": {"encoder": TINY_TRANSFORMER, "decoder": TINY_TRANSFORMER},
    "ViTAutoencoder": {"encoder": TINY_TRANSFORMER, "decoder": TINY_TRANSFORMER},
}


def shrunk(settings: Any) -> Any:
    """Copy settings with the sizes of `TINY`."""
    if isinstance(settings, list):
        return [shrunk(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    made = {name: shrunk(value) for name, value in settings.items()}
    if "class_path" in made and class_name(made) in TINY:
        given = made.get("init_args", {})
        if class_name(made) != "UNet":
            for name in ("mlp_hidden", "head_dim", "drop_path"):
                given.pop(name, None)
        made["init_args"] = given | TINY[class_name(made)]
    return made


def model_of(recipe: str, tiny: bool = False) -> dict[str, Any]:
    """Give the configuration of a recipe's model, which needs no files."""
    model = settings_of(recipe)["model"]
    model = without_files(model, model["init_args"].get("image_size", 256))
    if tiny:
        for name in ("perceptual_loss", "alignment_loss", "sampler", "optimizer", "scheduler"):
            model["init_args"].pop(name, None)
        model = shrunk(model)
    return model


class WithoutData(TorchFunctionMode):
    """Makes what `torch.empty` makes, as all large weights are, on the meta device; computed tables stay real."""

    LEAST = 4096

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty and made.numel() >= self.LEAST and made.device.type == "cpu":
            return made.to("meta")
        return made


def build(recipe: str, tiny: bool = False) -> LightningModule:
    """Build a recipe's module: at its size without data; or tiny, with seed 0, once for recipes that differ in size."""
    return _build(json.dumps(model_of(recipe, tiny)), tiny)


@cache
def _build(model: str, tiny: bool) -> LightningModule:
    torch.manual_seed(0)
    with nullcontext() if tiny else WithoutData():
        return instantiate(json.loads(model))
