"""From a configuration to a module, and from a checkpoint alone back to the module that it was.

A module made from a configuration carries it as plain data (`{"class_path": ..., "init_args": ...}`) in Lightning's
`hyper_parameters`; a generator's checkpoint also carries its tokenizer's configuration and weights. So `load` needs
nothing beside the file. A file can execute no code: it is read with `weights_only=True`, the two pickles of a sharded
checkpoint by an unpickler that knows their classes alone, and `core/trust.py` decides what a configuration may build.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch import Tensor

from discrete_lit.core.bounded_reading import check_nesting
from discrete_lit.core.configuration import build
from discrete_lit.core.files import atomic_write, check_records
from discrete_lit.core.hub_folders import (
    CONFIG,
    WEIGHTS,
    is_hub_folder,
    module_folder,
    read_hub_folder,
    write_hub_folder,
)
from discrete_lit.core.trust import (
    NotBuildable,
    NotTrusted,
    check_config,
    only_trusted_imports,
    printable,
    refusal,
    trusting,
)
from discrete_lit.fsdp2 import META, check_shards, is_sharded, read_shards

_log = logging.getLogger(__name__)
_MOST_SHOWN = 3
# Settings that only training reads, wherever they stand in a configuration.
_OF_TRAINING = (
    "optimizer",
    "scheduler",
    "weight_decay_rule",
    "gradient_of",
    "mask_count",
    "min_mask_ratio",
    "initialization",
    "initial_gates",
    "dropout_places",
    "augmentation",
    "consistency_weight",
    "idle_steps",
    "running_norms",
    "initial_deviation",
)
# Frozen parts of a module, whose configurations stand in its checkpoint beside its own.
FROZEN_PARTS = ("tokenizer", "audio_tokenizer", "discrete", "text_encoder", "text_tokenizer")
_NOT_PARSED = "cannot read the configuration of"
# The files whose modules are being built, a generator's before its tokenizer's.
_loading: ContextVar[tuple[Path, ...]] = ContextVar("loading", default=())
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
    """Build the module that a configuration of your own describes, and record the configuration on it.

    It may name any class. A checkpoint's configuration is another's word: `rebuild` builds that.

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
        raise ValueError(f"{_NOT_PARSED} {config.get('class_path')!r}: {error}") from error
    module = build(parser, parsed)["model"]
    record_config(module, yaml.safe_load(parser.dump(parsed, skip_unset=False))["model"])
    return module


def rebuild(
    checkpoint: Mapping[str, Any], path: str | Path, base: type[LightningModule] = LightningModule
) -> LightningModule:
    """Build the module of a checkpoint, without its weights, from what its configuration may name.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        path: its file, for messages.
        base: the class that it must be a subclass of.

    Raises:
        ValueError: the module was not built from a configuration; the configuration names what a checkpoint may not
            build, as `discrete_lit.core.trust` says; or no module can be built from it.
    """
    config = module_config(checkpoint, path)
    try:
        with only_trusted_imports():
            return instantiate(config, base)
    # A file may be wrong in any way: sizes that no memory holds, a tokenizer that is the file itself.
    except Exception as error:
        raise (refusal(error, str(path)) or ValueError(_cannot_build(config, path, error))) from error


def _cannot_build(config: Mapping[str, Any], path: str | Path, error: BaseException) -> str:
    """Say why a file's module cannot be built, without the configuration, which the parser repeats in full."""
    if str(error).startswith(_NOT_PARSED) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.partition("Got value:")[0].strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Given value", "Subtypes:"))]
    reason = printable(" ".join(kept) or type(error).__name__, limit=400)
    return f"cannot build the {printable(config['class_path'])} of {str(path)!r}: {reason}"


def read_checkpoint(path: str | Path, *, whole: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU without executing code, and check that no record of it is damaged.

    Of a sharded checkpoint, a folder, it reads all but the weights and the optimizers' states, and checks that PyTorch
    will execute no code when it reads these. A folder of `save_pretrained` is read whole.

    Args:
        path: the file, or folder of shards.
        whole: put the weights and optimizers' states of a sharded one together too.

    Raises:
        ValueError: no such file, a truncated, compressed or damaged one, pickled code, or a file that holds no module.
    """
    if is_hub_folder(path):
        return _checked_entries(read_hub_folder(path), path)
    sharded = is_sharded(path)
    if sharded and not (Path(path) / ".metadata").is_file():
        raise ValueError(f"{str(path)!r} is a folder, and not a finished sharded checkpoint")
    file = Path(path) / META if sharded else Path(path)
    if not file.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    try:
        check_records(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a readable checkpoint, it {printable(error, limit=300)}") from error
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if sharded:
            check_shards(Path(path))
            if whole and isinstance(checkpoint, dict):
                checkpoint |= read_shards(path)
    except Exception as error:
        reason = printable(error, limit=300)
        raise ValueError(f"{str(path)!r} is not a readable checkpoint (not weights only): {reason}") from error
    if not isinstance(checkpoint, dict) or not (sharded or "state_dict" in checkpoint):
        raise ValueError(f"{str(path)!r} holds no 'state_dict': it is not a checkpoint of `discrete-lit fit`")
    return _checked_entries(checkpoint, path)


def _checked_entries(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a checkpoint whose entries are of the kinds that others take them for.

    Raises:
        ValueError: one is not, or it is nested too deeply.
    """
    # Configurations have bounds of their own, in `check_plain`.
    described = ("hyper_parameters", *(f"{part}_config" for part in FROZEN_PARTS))
    check_nesting({name: value for name, value in checkpoint.items() if name not in described}, str(path))
    for name, (kind, words) in _ENTRIES.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise ValueError(f"{str(path)!r} holds a {found} as {name!r}, where a checkpoint has {words}")
    return checkpoint


# What Lightning, or a module here, takes each entry of a checkpoint for.
_ENTRIES: dict[str, tuple[Any, str]] = {
    "state_dict": (Mapping, "weights by their names"),
    "hyper_parameters": (Mapping | None, "settings by their names"),
    "tokenizer_config": (Mapping, "settings by their names"),
    "audio_tokenizer_config": (Mapping, "settings by their names"),
    "discrete_config": (Mapping, "settings by their names"),
    "text_encoder_config": (Mapping, "settings by their names"),
    "text_tokenizer_config": (Mapping, "settings by their names"),
    "epoch": (int, "a number"),
    "global_step": (int, "a number"),
    "loops": (Mapping, "the state of each loop by its name"),
    "callbacks": (Mapping, "the state of each callback by its name"),
    "optimizer_states": (Sequence, "a list"),
    "lr_schedulers": (Sequence, "a list"),
}


def module_config(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the configuration of the module in a checkpoint, in today's names, self-contained, and safe to build.

    A frozen tokenizer, or generator of discrete tokens, is described by its own configuration, not by the file that it
    came from.

    Raises:
        ValueError: the module was not built from a configuration, or from one that names what no checkpoint may build.
    """
    return check_config(_whole_config(checkpoint, path), str(path))


def _whole_config(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Put the configurations of a module's frozen parts into its own, as the checkpoint has them."""
    config = checkpoint.get("hyper_parameters") or {}
    if "class_path" not in config:
        raise ValueError(
            f"{str(path)!r} does not say how to build its module. Build the module by `discrete-lit fit` or by "
            "`discrete_lit.checkpoints.instantiate`, or use the class's own `load_from_checkpoint` with its arguments."
        )
    init_args = config.get("init_args") or {}
    if not isinstance(init_args, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(init_args).__name__} for the arguments of its module")
    for part in FROZEN_PARTS:
        if f"{part}_config" in checkpoint:
            init_args = {**init_args, part: checkpoint[f"{part}_config"]}
    return {"class_path": config["class_path"], "init_args": init_args}


def check_parses(config: dict[str, Any], path: str | Path) -> None:
    """Check that a checkpoint's configuration can be read, with nothing imported but what it may name.

    For whoever lets another parser read it together with settings of the user's own.

    Raises:
        ValueError: as `rebuild`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    try:
        with only_trusted_imports():
            parser.parse_object({"model": config})
    except Exception as error:
        raise (refusal(error, str(path)) or ValueError(_cannot_build(config, path, error))) from error


def save(module: LightningModule, path: str | Path) -> None:
    """Write a module that was built from a configuration as a checkpoint that `load` reads; it is complete or absent.

    Raises:
        ValueError: the module was not built from a configuration.
    """
    checkpoint = _as_checkpoint(module, path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def save_pretrained(module: LightningModule, folder: str | Path, *, licence: str = "") -> None:
    """Write a module as a folder for the Hugging Face Hub: `config.json`, `model.safetensors` and a model card.

    `load(folder)` reads it, and so does `load("hf://owner/name")` once it is there. A generator's holds its tokenizer.

    Args:
        module: a tokenizer or generator that was built from a configuration.
        folder: made where it is not there; other files in it stay.
        licence: for the card, as the Hub names it, such as `apache-2.0`.

    Raises:
        ValueError: the module was not built from a configuration, or has a state that is no tensor.
    """
    checkpoint = _as_checkpoint(module, folder)
    write_hub_folder(checkpoint, folder, card=_card(module, checkpoint["hyper_parameters"], licence))


def weights_of(path: str | Path) -> Path:
    """Return the file with the weights of a checkpoint or address: itself, or the one in a folder for the Hub."""
    path = local(path)
    return module_folder(path) / WEIGHTS if is_hub_folder(path) else Path(path)


def _card(module: LightningModule, config: Mapping[str, Any], licence: str) -> str:
    """Write the model card of a module: what it is, and the commands that use it."""
    kind = type(module).__name__
    count = sum(parameter.numel() for parameter in module.parameters())
    use = (
        "discrete-lit sample --ckpt_path hf://OWNER/NAME --num_samples 16 --output samples"
        if hasattr(module, "sampler_kind")
        else "discrete-lit tokenize --ckpt_path hf://OWNER/NAME --output tokens --config data.yaml"
    )
    return (
        "---\nlibrary_name: discrete-lit\n"
        + (f"license: {licence}\n" if licence else "")
        + f"tags:\n- discrete-lit\n- image-generation\n---\n\n# {kind}\n\n"
        f"A `{config['class_path']}` of {count:,} parameters. `{CONFIG}` has every setting.\n\n"
        '```python\nimport discrete_lit\n\nmodel = discrete_lit.load("hf://OWNER/NAME")\n```\n\n'
        f"```bash\n{use}\n```\n"
    )


def _as_checkpoint(module: LightningModule, path: str | Path) -> dict[str, Any]:
    """Describe a module as a checkpoint.

    Raises:
        ValueError: it was not built from a configuration.
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
    return checkpoint


def local(path: str | Path, *, accept_licence: bool = False) -> str | Path:
    """Return the path of a checkpoint: of one on the web, `model://NAME` or `hf://owner/name`, its place in the cache.

    Args:
        path: of a checkpoint, or one of these addresses.
        accept_licence: that you accept the licence of a published model.

    Raises:
        ValueError: as `discrete_lit.pretrained.obtaining.obtain`.
    """
    if isinstance(path, str) and path.startswith(("model://", "hf://")):
        # By name, since that package stands on this file.
        return importlib.import_module("discrete_lit.pretrained.obtaining").obtain(path, accept_licence=accept_licence)
    return path


def load(path: str | Path, trust: Sequence[str] = ()) -> Any:
    """Load the Tokenizer, ContinuousTokenizer or Generator of a checkpoint, on the CPU, in eval mode.

    A setting that only training reads and that is not known here, such as an optimizer's of another version of PyTorch,
    keeps no checkpoint from being read: the module is built without such settings, and a warning says so.

    Args:
        path: a file, or a folder of shards, written by `discrete-lit fit`; a folder by `save_pretrained`; or
            `model://NAME`, a published model, or `hf://owner/name`, a folder on the Hugging Face Hub: these two are
            downloaded where they are not in the cache.
        trust: modules of your own whose classes the checkpoint may name, such as `("my_tokenizer",)`.

    Raises:
        ValueError: no such file, truncated or damaged, or of another kind of module; a configuration that names what no
            checkpoint may build, or classes of modules that are not trusted; missing or unexpected keys; weights that
            are not finite.
    """
    path = local(path)
    file = Path(path).resolve()
    if file in _loading.get():
        raise ValueError(f"{str(path)!r} names itself as a part of itself, such as its tokenizer")
    token = _loading.set((*_loading.get(), file))
    try:
        with trusting(*([trust] if isinstance(trust, str) else trust)):
            checkpoint = read_checkpoint(path, whole=True)
            # By name, since these packages stand on this file: they mark what is loadable.
            for package in ("discrete_lit.tokenizers", "discrete_lit.generators"):
                importlib.import_module(package)
            module = _rebuild_to_use(checkpoint, path)
    finally:
        _loading.reset(token)
    if not isinstance(module, tuple(_LOADABLE)):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(f"{str(path)!r} holds a {kind}, not a Tokenizer, a ContinuousTokenizer or a Generator")
    load_weights(module, checkpoint, path)
    return module.eval()


def _rebuild_to_use(checkpoint: Mapping[str, Any], path: str | Path) -> LightningModule:
    """Build the module of a checkpoint; where it cannot be, try without what only training reads."""
    try:
        return rebuild(checkpoint, path)
    except NotBuildable:
        raise
    except ValueError as error:
        config = _whole_config(checkpoint, path)
        with suppress(NotTrusted):  # such a class is left out; what may not be built at all is refused
            check_config(config, str(path))
        used = _without_training(config)
        if used == config:
            raise
        parts = {f"{part}_config": used["init_args"][part] for part in FROZEN_PARTS if f"{part}_config" in checkpoint}
        try:
            module = rebuild({**checkpoint, "hyper_parameters": used, **parts}, path)
        except ValueError:
            raise error from None
        _log.warning("%s; it was built without what only training reads", error)
        return module


def _without_training(config: Any) -> Any:
    """Leave out of a configuration the settings that only training reads."""
    if isinstance(config, list):
        return [_without_training(entry) for entry in config]
    if not isinstance(config, Mapping):
        return config
    return {name: _without_training(value) for name, value in config.items() if name not in _OF_TRAINING}


def load_weights(module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Put the weights of a checkpoint into a module.

    Raises:
        ValueError: they do not fit, or are not finite, as `check_weights` says.
    """
    check_weights(module, checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def check_weights(module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Compare the weights of a checkpoint with those of a module, without loading them.

    Raises:
        ValueError: missing or unexpected keys, other shapes, values that a conversion would change into others (such as
            integers for fractions), or parameters that are not finite; it names them.
    """
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"{str(path)!r} is sharded: `discrete-lit export --ckpt_path {path} --family checkpoint --output FILE` "
            "makes one file of it"
        )
    own, saved = module.state_dict(), checkpoint["state_dict"]
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{printable(name)} is unexpected" for name in saved if name not in own]
    both = [(name, value, saved[name]) for name, value in own.items() if name in saved]
    wrong += [f"{name} {why}" for name, value, other in both if (why := _misfit(value, other))]
    if wrong:
        raise ValueError(f"the weights of {str(path)!r} do not fit this {type(module).__name__}: {_first(wrong)}")
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    broken = [
        f"{name} has {int((~other.isfinite()).sum()):,} of {other.numel():,}"
        for name, _, other in both
        if name in parameters and other.is_floating_point() and not bool(other.isfinite().all())
    ]
    if broken:
        raise ValueError(
            f"{str(path)!r} has weights that are not finite numbers, as training leaves them when it diverges: "
            f"{_first(broken)}; use an earlier checkpoint"
        )


def _first(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return f"{'; '.join(problems[:_MOST_SHOWN])}{more}"


def _misfit(own: Any, saved: Any) -> str | None:
    """Say why a saved value cannot take the place of a module's own; None if it can."""
    if not isinstance(own, Tensor):  # the extra state of a module
        return None
    if not isinstance(saved, Tensor) or saved.layout is not torch.strided or saved.is_quantized:
        what = "sparse or quantized tensor" if isinstance(saved, Tensor) else type(saved).__name__
        return f"is a {what} instead of an ordinary tensor"
    if saved.shape != own.shape:
        return f"has shape {tuple(saved.shape)} instead of {tuple(own.shape)}"
    # Between precisions a value is rounded; between kinds of numbers it becomes another.
    kinds = [(value.dtype.is_floating_point, value.dtype.is_complex) for value in (own, saved)]
    whole = not any(own_kind for own_kind in kinds[0])
    if kinds[0] != kinds[1] or (whole and torch.promote_types(own.dtype, saved.dtype) != own.dtype):
        return f"is {saved.dtype} instead of {own.dtype}"
    return None
