"""Provenance of a result: its settings as plain data, the commit, versions, device and date."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe(setting: Any) -> Any:
    """Turn a settings object into plain data: its class path and its public attributes, nested ones likewise."""
    if setting is None or isinstance(setting, bool | int | float | str):
        return setting
    if isinstance(setting, list | tuple):
        return [describe(entry) for entry in setting]
    public = {name: describe(value) for name, value in vars(setting).items() if not name.startswith("_")}
    return {"class_path": class_path(type(setting)), **public}


def class_path(kind: type) -> str:
    """Return the shortest path that a class is imported by, which stays when its file moves inside a package."""
    packages = kind.__module__.split(".")
    for length in range(1, len(packages)):
        package = ".".join(packages[:length])
        if getattr(sys.modules.get(package), kind.__qualname__, None) is kind:
            return f"{package}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def git_commit() -> str | None:
    """Find the commit of the source tree that this package runs from, `-dirty` if it was changed; None if installed."""
    try:
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where a result is computed: versions, commit, device and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("discrete-lit", "torch", "lightning")},
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
