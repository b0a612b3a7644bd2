"""What a published configuration says beside the weights, in the reference's own argument names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Reference = Mapping[str, Any]

# Where published files keep the arguments of the model: taming and LDM, Lightning's CLI.
_AROUND = ("config", "model", "params", "init_args")


def read_reference(config: Reference | str | Path | None, section: str | None = "vq_model") -> dict[str, Any]:
    """The arguments of a reference model's constructor.

    Args:
        config: the arguments, or a published configuration around them, or the path of its YAML or JSON file.
        section: the part that is asked for, where the configuration has several, as those of 1d-tokenizer and MaskBit;
            None for all of it.

    Raises:
        ValueError: no such file, or one that holds no mapping.
    """
    if config is None:
        return {}
    found = _read_file(Path(config)) if isinstance(config, str | Path) else dict(config)
    while section and (inner := [name for name in (*_AROUND, section) if isinstance(found.get(name), Mapping)]):
        found = dict(found[inner[0]])
    return found


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no reference_config at {str(path)!r}")
    try:
        read = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"reference_config={str(path)!r} is neither YAML nor JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"reference_config={str(path)!r} holds a {type(read).__name__}, not settings")
    return read


def agree(reference: Reference, found: Mapping[str, Any], who: str = "the tensors have") -> None:
    """Refuse a configuration that contradicts the tensors, or what every model of ours in that layout is.

    Args:
        reference: the given arguments.
        found: the same arguments as the shapes of the tensors have them.
        who: has them so, for the message.

    Raises:
        ValueError: an argument that is given with another value.
    """
    for name, value in found.items():
        given = reference.get(name, value)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise ValueError(f"reference_config has {name}={given}, but {who} {value}")
