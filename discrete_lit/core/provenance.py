"""What a result says of where it came from."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import discrete_lit


def describe(setting: Any) -> Any:
    """A settings object as plain data: its class path and its public attributes, nested ones likewise."""
    if setting is None or isinstance(setting, bool | int | float | str):
        return setting
    if isinstance(setting, list | tuple):
        return [describe(entry) for entry in setting]
    public = {name: describe(value) for name, value in vars(setting).items() if not name.startswith("_")}
    return {"class_path": f"{type(setting).__module__}.{type(setting).__qualname__}", **public}


def git_commit() -> str | None:
    """The commit of the source tree that this package runs from, with `-dirty` if it was changed; None if installed."""
    try:
        command = [
            "git",
            "-C",
            str(Path(discrete_lit.__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("discrete-lit", "torch", "lightning")},
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
