"""From a configuration to a module, and from a checkpoint alone back to the module that it was.

A module made from a configuration carries it as plain data (`{"class_path": ..., "init_args": ...}`) in Lightning's
`hyper_parameters`; a generator's checkpoint also carries its tokenizer's configuration and weights. So `load` needs
nothing beside the file, and the file is read with `weights_only=True`: it can execute no code.
"""

import importlib
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule

from discrete_lit.core.configuration import build, current_names
from discrete_lit.core.files import atomic_write

_MOST_SHOWN = 3
_LOADABLE: list[type[LightningModule]] = []
_Kind = TypeVar("_Kind", bound=type[LightningModule])


def loadable(kind: _Kind) -> _Kind:
    """Mark a class, by decorating it, as one that `load` gives back: itself and its subclasses."""
    _LOADABLE.append(kind)
    return kind


def record_config(module: LightningModule, config: dict[str, Any]) -> None:
    """Attach `{"class_path": ..., "init_args": ...}`, plain data, to a module: its checkpoints will hold it.

    A module that has described itself, because its arguments name a file, keeps its description.
    """
    if "class_path" not in module.hparams:
        described = {"class_path": config["class_path"], "init_args": config["init_args"]}
        module.save_hyperparameters(described, logger=False)


def instantiate(config: dict[str, Any], base: type[LightningModule] = LightningModule) -> LightningModule:
    """Build the module that a configuration describes, and record the configuration on it.

    Args:
        config: `{"class_path": "package.Class", "init_args": {...}}` as in a YAML file.
        base: the class that it must be a subclass of.

    Raises:
        ValueError: unknown class, wrong or missing argument.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "model", required=True)
    try:
        parsed = parser.parse_object({"model": config})
    except Exception as error:
        raise ValueError(f"cannot build {config.get('class_path')!r} from its configuration: {error}") from error
    module = build(parser, parsed)["model"]
    record_config(module, yaml.safe_load(parser.dump(parsed, skip_unset=False))["model"])
    return module


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU without executing code.

    Of a sharded checkpoint, a folder, it reads all but the `state_dict` and the optimizers' states.

    Raises:
        ValueError: no such file, a truncated file, pickled code, or a file that holds no module.
    """
    sharded = Path(path).is_dir()
    if sharded and not (Path(path) / ".metadata").is_file():
        raise ValueError(f"{str(path)!r} is a folder, and not a finished sharded checkpoint")
    file = Path(path) / "meta.pt" if sharded else Path(path)
    if not file.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a readable checkpoint (truncated, or not weights only): {error}"
        ) from error
    if not isinstance(checkpoint, dict) or not (sharded or "state_dict" in checkpoint):
        raise ValueError(f"{str(path)!r} holds no 'state_dict': it is not a checkpoint of `discrete-lit fit`")
    return checkpoint


def module_config(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the configuration of the module in a checkpoint, in today's names and self-contained.

    A frozen tokenizer is described by its own configuration, not by the file that it came from.

    Raises:
        ValueError: the module was not built from a configuration.
    """
    config = checkpoint.get("hyper_parameters", {})
    if "class_path" not in config:
        raise ValueError(
            f"{str(path)!r} does not say how to build its module. Build the module by `discrete-lit fit` or by "
            "`discrete_lit.checkpoints.instantiate`, or use the class's own `load_from_checkpoint` with its arguments."
        )
    init_args = dict(config["init_args"])
    if "tokenizer_config" in checkpoint:
        init_args["tokenizer"] = checkpoint["tokenizer_config"]
    return current_names({"class_path": config["class_path"], "init_args": init_args})


def save(module: LightningModule, path: str | Path) -> None:
    """Write a module that was built from a configuration as a checkpoint that `load` reads; it is complete or absent.

    Raises:
        ValueError: the module was not built from a configuration.
    """
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(checkpoint)
    module_config(checkpoint, path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load(path: str | Path) -> Any:
    """Load the Tokenizer, Generator or KLVAE of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a file written by `discrete-lit fit`.

    Raises:
        ValueError: no such file, truncated, or of another kind of module; missing or unexpected keys.
    """
    checkpoint = read_checkpoint(path)
    config = module_config(checkpoint, path)
    # By name, since these packages stand on this file: they mark what is loadable.
    for package in ("discrete_lit.tokenizers", "discrete_lit.generators"):
        importlib.import_module(package)
    module = instantiate(config)
    if not isinstance(module, tuple(_LOADABLE)):
        raise ValueError(f"{str(path)!r} holds a {config['class_path']}, not a Tokenizer, a Generator or a KLVAE")
    load_weights(module, checkpoint, path)
    return module.eval()


def load_weights(module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Put the weights of a checkpoint into a module.

    Raises:
        ValueError: they do not fit, as `check_weights` says.
    """
    check_weights(module, checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def check_weights(module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Compare the weights of a checkpoint with those of a module, without loading them.

    Raises:
        ValueError: missing or unexpected keys, or other shapes; it names them.
    """
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"{str(path)!r} is sharded: only `discrete-lit` with its own model in the configuration reads it"
        )
    own, saved = module.state_dict(), checkpoint["state_dict"]
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{name} is unexpected" for name in saved if name not in own]
    wrong += [
        f"{name} has shape {tuple(saved[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise ValueError(
            f"the weights of {str(path)!r} do not fit this {type(module).__name__}: "
            f"{'; '.join(wrong[:_MOST_SHOWN])}{more}"
        )
