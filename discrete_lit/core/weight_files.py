"""Published weight files: where they are looked for, how they are recognised, and read without executing code.

Nothing is downloaded: a run on a compute node without a network must fail at its start or not at all, and a number must
say which file it came from. So a file is found where the user says, or where `torch.hub` left it, and its hash decides.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.files import check_published, file_sha256


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A weight file that somebody published: its address, its hash, and the variable that says where it lies."""

    url: str
    sha256: str
    variable: str
    """Name of an environment variable with the path of the file."""

    @property
    def cached(self) -> Path:
        """The place where `torch.hub` keeps the file once it has downloaded it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]

    def find(self, path: str | None, setting: str) -> str:
        """Find the file: at `path`, or where the environment variable says, or in the cache of `torch.hub`.

        Args:
            path: where the user says it is; None to look for it.
            setting: name of that setting, for messages.

        Raises:
            ValueError: it is in none of these places; the message says where to get it.
        """
        given = path or os.environ.get(self.variable)
        found = Path(given).expanduser() if given else self.cached
        if found.is_file():
            return str(found)
        where = f"{setting}={path!r}" if path else f"{self.variable}={given!r}" if given else f"{self.cached}"
        raise ValueError(
            f"{where} does not exist, and nothing is downloaded here: download {self.url} (SHA-256 {self.sha256}) and "
            f"give its path as {setting} or in the environment variable {self.variable}"
        )


def checked_sha256(path: str, expected: str | None, setting: str) -> str:
    """Compute the SHA-256 of a weight file before anything of it is loaded.

    Args:
        path: of the file.
        expected: the hash that it must have; any if None.
        setting: name of the setting with its path, for the message.

    Raises:
        ValueError: no such file, or one with another hash.
    """
    if not Path(path).is_file():
        raise ValueError(f"{setting}={path!r} does not exist")
    found = file_sha256(path)
    if expected is not None and found != expected:
        raise ValueError(f"{setting}={path!r} has SHA-256 {found}, expected {expected}: it was not loaded")
    return found


def read_weights(path: str, setting: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a PyTorch file without executing code.

    Args:
        path: of the file.
        setting: where the user gave the path, for the message.

    Raises:
        ValueError: no such file, no state dict in it, or weights that are not finite.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{setting}={path!r}: there is no such file, and nothing is downloaded while training")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(file)
        else:
            check_published(file)
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{setting}={path!r} is not a readable file of weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{setting}={path!r} does not hold a flat state dict of tensors")
    broken = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"{setting}={path!r} has weights that are not finite numbers, the first are of {broken[0]}")
    return weights
