"""Folders as the Hugging Face Hub has them: `config.json`, `model.safetensors` and a model card.

They hold what a checkpoint of Lightning holds for use: the module's configuration, those of its frozen parts, and the
weights. Nothing of a training is in them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import UNFINISHED_SUFFIX, atomic_write_text, naming, publish

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PIPELINE_INDEX, GENERATOR = "model_index.json", "generator"
"""The file that a pipeline of diffusers begins with, and the folder in it where ours has the generator."""
_LIBRARY = "discrete-lit"
# Keys by which the configurations of other libraries are known.
_OTHERS = {"model_type": "transformers", "architecture": "timm", "_diffusers_version": "diffusers"}


def is_hub_folder(path: str | Path) -> bool:
    """Whether a path is a folder of this kind, of any library: a sharded checkpoint has no such file."""
    return any((Path(path) / name).is_file() for name in (CONFIG, PIPELINE_INDEX))


def module_folder(folder: str | Path) -> Path:
    """Return the folder with the module: the one that is given, or of a pipeline the one of its generator."""
    place = Path(folder)
    return place / GENERATOR if (place / PIPELINE_INDEX).is_file() else place


def write_hub_folder(checkpoint: Mapping[str, Any], folder: str | Path, *, card: str) -> None:
    """Write a checkpoint as a folder; `config.json` comes last, so that a folder with one is whole.

    Args:
        checkpoint: `state_dict`, `hyper_parameters`, and the configurations of frozen parts.
        folder: made where it is not there; other files in it stay.
        card: the text of `README.md`.

    Raises:
        ValueError: the module has a state that is no tensor.
    """
    from safetensors.torch import save_file

    place = Path(folder)
    state = checkpoint["state_dict"]
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{other[0]} is a {type(state[other[0]]).__name__}, which safetensors does not hold")
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / f"{WEIGHTS}{UNFINISHED_SUFFIX}"
    with naming(temporary):
        # Parameters that share memory are written each by itself.
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, temporary)
    publish(temporary, place / WEIGHTS)
    atomic_write_text(place / CARD, card)
    parts = {name: checkpoint[name] for name in checkpoint if name.endswith("_config")}
    described = {"library_name": _LIBRARY, **checkpoint["hyper_parameters"], **parts}
    atomic_write_text(place / CONFIG, json.dumps(described, indent=2) + "\n")


def read_hub_folder(folder: str | Path) -> dict[str, Any]:
    """Read a folder as a checkpoint, without executing code.

    Raises:
        ValueError: another library's folder, a `config.json` that is none, or weights that are missing or truncated.
    """
    from safetensors.torch import load_file

    place = module_folder(folder)
    if not (place / CONFIG).is_file():
        check_hub_config(read_json(Path(folder) / PIPELINE_INDEX), str(folder))
    config = read_json(place / CONFIG)
    check_hub_config(config, str(folder))
    parts = {name: config.pop(name) for name in [*config] if name.endswith("_config")}
    config.pop("library_name")
    weights = place / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS}")
    try:
        state = load_file(weights)
    except Exception as error:  # a broken file raises almost anything
        raise ValueError(f"{str(weights)!r} is truncated or no safetensors file: {error}") from error
    return {"state_dict": state, "hyper_parameters": config, **parts}


def check_hub_config(config: Any, where: str, guess: str = "") -> None:
    """Check that a `config.json` is ours.

    Raises:
        ValueError: it is another library's; the message says whose, and `guess`.
    """
    if isinstance(config, dict) and config.get("library_name") == _LIBRARY:
        return
    named = config.get("library_name") if isinstance(config, dict) else None
    keys = config if isinstance(config, dict) else {}
    whose = named or next((library for key, library in _OTHERS.items() if key in keys), "another library")
    raise ValueError(
        f"{where!r} is a folder of {str(whose)[:40]!r}, and not one that discrete_lit.save_pretrained wrote{guess}. "
        "Published weights of other libraries are read by `discrete-lit import --weights FOLDER --family FAMILY`"
    )
