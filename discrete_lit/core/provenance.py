"""Provenance of a result: its settings as plain data, the commit, versions, device and date."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch


def describe(setting: Any) -> Any:
    """Turn a settings object into plain data: its class path and its public attributes, nested ones likewise."""
    if setting is None or isinstance(setting, bool | int | float | str):
        return setting
    if isinstance(setting, Mapping):
        return {str(name): describe(value) for name, value in setting.items()}
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


@cache
def git_commit() -> str | None:
    """Find the commit that this package is of, `-dirty` if its files were changed since; None where nothing says so.

    It is looked for once in a process: what is committed while that runs is not what it runs.

    It is that of the source tree that the package runs from, or the one that pip installed from a git address. A
    package that was installed inside somebody's own repository is not of that repository.
    """
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return _installed_commit()


def _installed_commit() -> str | None:
    """Read the commit from what pip notes beside a package that it installed from a git address (PEP 610)."""
    try:
        installed = distribution("discrete-lit")
    except PackageNotFoundError:
        return None
    # Another copy of the package may be the one that runs.
    if Path(str(installed.locate_file("discrete_lit"))).resolve() != Path(__file__).resolve().parents[1]:
        return None
    return json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")


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
