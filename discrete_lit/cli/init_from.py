"""Beginning a run from the weights of another: what a new model takes, and what begins anew."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from torch import Tensor

from discrete_lit.checkpoints import FROZEN_PARTS, load_weights, local, read_checkpoint
from discrete_lit.core.trust import printable
from discrete_lit.tokenizers.quantizers.codebook import Codebook

_MOST_NAMED = 3
_PUBLISHED = frozenset({".safetensors", ".pt", ".pth", ".bin", ".npz"})


def read_start(path: str) -> dict[str, Any]:
    """Read the checkpoint that a run begins from.

    Raises:
        ValueError: there is none, or it is none; of a run's folder and of published weights it says what to give.
    """
    newest = Path(path) / "checkpoints" / "last.ckpt"
    if newest.exists():
        raise ValueError(f"init_from={path!r} is the folder of a run: its last checkpoint is {str(newest)!r}")
    try:
        return read_checkpoint(local(path), whole=True)
    except ValueError as error:
        if Path(path).suffix not in _PUBLISHED:
            raise
        raise ValueError(
            f"init_from={path!r} is no checkpoint. If it holds published weights, `discrete-lit import --weights "
            f"{path} --family FAMILY --output FILE.ckpt` makes one of them ({error})"
        ) from error


def take_weights(
    module: LightningModule, checkpoint: Mapping[str, Any], path: str, *, anew: Collection[str] = ()
) -> list[str]:
    """Put the weights of a checkpoint into a new module, wherever it has weights of the same name and shape.

    What the checkpoint does not have begins as the module made it: a discriminator, counts for the revival of codes,
    further blocks. A class table of another number of classes begins anew but for the row of the null label, which
    stands for no class as before. Codes that were taken are not drawn from data again, and the running means that an
    EMA codebook adds begin with them. A `first_stage` is not read. Of a run with an EMA the checkpoint's weights are
    the averages.

    Args:
        module: the new one; changed.
        checkpoint: as `read_checkpoint` gives it.
        path: its file, for messages.
        anew: names of weights, or of modules with all theirs, that begin as the new module made them whatever the
            checkpoint has.

    Returns:
        Lines that say how many weights were taken, which are new and which were left out.

    Raises:
        ValueError: weights of another shape, none that fits, or weights that `load_weights` refuses; a name in `anew`
            that the module does not have.
    """
    own, saved = module.state_dict(), checkpoint["state_dict"]
    # A generator's frozen parts are the configuration's; `check_tokenizer` compared the tokenizers before.
    frozen = tuple(f"{part}." for part in FROZEN_PARTS if hasattr(module, part))
    classes = _classes(checkpoint), getattr(module, "num_classes", None)
    begun, new = dict(own), []
    wrong: dict[str, str] = {}
    mine = [name for name in own if not name.startswith(frozen)]
    begin_anew = {name for name in mine if any(_is_of(name, part) for part in anew)}
    if unknown := [part for part in anew if not any(_is_of(name, part) for name in mine)]:
        raise ValueError(f"init_anew: this {type(module).__name__} has no weights named {', '.join(unknown)}")
    offered = saved.keys() - begin_anew
    for name in mine:
        value, other = own[name], saved.get(name)
        if name not in offered:
            new.append(name)
        elif not isinstance(value, Tensor) or not isinstance(other, Tensor) or other.shape == value.shape:
            begun[name] = other
        elif _is_class_table(value, other, classes):
            begun[name] = value.clone()
            begun[name][-1] = other[-1].to(value.dtype)
            new.append(f"{name} ({classes[1]} classes in place of {classes[0]}; the row of the null label was taken)")
        else:
            wrong[name] = f"{name} has shape {tuple(other.shape)} instead of {tuple(value.shape)}"
    taken = len(mine) - len(new)
    if wrong:
        raise ValueError(
            f"init_from={path!r} does not fit this {type(module).__name__}: {_first(list(wrong.values()))}. Weights "
            "may be missing or left over, and the number of classes may be another, but not other sizes; `--init_anew "
            f"{json.dumps(_modules(wrong))}` begins without the checkpoint's there"
        )
    if not taken:
        raise ValueError(f"init_from={path!r} has no weight of this {type(module).__name__}: it is of another model")
    load_weights(module, {**checkpoint, "state_dict": begun}, path)
    for name, part in module.named_modules():
        if isinstance(part, Codebook) and f"{name}.codes" in offered:
            part.go_on_from_codes({own_name for own_name in part.state_dict() if f"{name}.{own_name}" not in offered})
    lines = [f"init_from {path}: took {taken} of {len(mine)} weights{_source(checkpoint)}"]
    left = [printable(name) for name in saved if name not in own and not name.startswith(frozen)]
    staged: Any = module
    if getattr(staged, "begins_from_first_stage", False):
        staged.begins_from_first_stage = False
        lines.append("model.init_args.first_stage is not read: the weights of init_from go on")
    lines += [f"{what}: {', '.join(_grouped(names))}" for what, names in (("new", new), ("left out", left)) if names]
    return lines


def _source(checkpoint: Mapping[str, Any]) -> str:
    return ", the averages of its EMA" if "current_model_state" in checkpoint else ""


def _classes(checkpoint: Mapping[str, Any]) -> int | None:
    found = ((checkpoint.get("hyper_parameters") or {}).get("init_args") or {}).get("num_classes")
    return found if isinstance(found, int) else None


def _is_class_table(own: Tensor, saved: Tensor, classes: tuple[int | None, int | None]) -> bool:
    """Say whether these are tables of a vector for each class, and one for no class, of two numbers of classes."""
    before, now = classes
    if before is None or now is None or before == now or own.ndim != 2 or own.shape[1:] != saved.shape[1:]:
        return False
    return (len(saved), len(own)) == (before + 1, now + 1)


def _first(problems: list[str]) -> str:
    more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
    return f"{'; '.join(problems[:_MOST_NAMED])}{more}"


def _is_of(name: str, part: str) -> bool:
    """Say whether a weight has a name, or is of the module that has it."""
    return f"{name}.".startswith(f"{part}.")


def _modules(names: Iterable[str]) -> list[str]:
    """Name the modules that hold weights, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def _grouped(names: Iterable[str]) -> list[str]:
    """Name weights one by one, or of a module that has more of them the module and their number."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[".".join(name.split(".")[:3])].append(name)
    return [
        line
        for group, members in groups.items()
        for line in (members if len(members) <= _MOST_NAMED else [f"{group} ({len(members)} weights)"])
    ]
