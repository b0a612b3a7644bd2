"""The YAML files of lightning_configs, read as their own opening comments say to."""

import re
import shlex
import subprocess
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def read(config: str) -> dict[str, Any]:
    return deepcopy(_parsed(config))


@cache
def _parsed(config: str) -> dict[str, Any]:
    return yaml.load((ROOT / config).read_text(), Loader=yaml.CSafeLoader)


def header_command(config: str) -> list[str]:
    """The command of the opening comment, as arguments of `discrete-lit`."""
    lines = (ROOT / config).read_text().splitlines()
    command = ""
    for line in lines:
        command += line.removeprefix("#").strip()
        if not command.endswith("\\"):
            break
        command = command.removesuffix("\\")
    found = re.match(r"discrete-lit (.*)", command)
    assert found, f"{config} does not open with the command that runs it"
    return shlex.split(found[1])


def configs_of(command: list[str]) -> list[str]:
    return [value for flag, value in pairwise(command) if flag == "--config"]


def merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`other` laid over `into`; another class comes without the arguments of the one before."""
    for key, value in other.items():
        under = into.get(key) or {}
        if isinstance(value, dict):
            another = "class_path" in value and value["class_path"] != under.get("class_path")
            value = merge({} if another else under, value)
        into[key] = value
    return into


def layered(config: str) -> dict[str, Any]:
    """What the recipe's command says, less its trainer's hardware: its files, one over the other."""
    settings: dict[str, Any] = {}
    for part in configs_of(header_command(config)):
        if "/trainer/" not in part:
            settings = merge(settings, read(part))
    return settings


def make_commands(runs: Path, report: str) -> list[str]:
    """List the commands of `make` for a report below `runs`, a folder without any, in order and without the program;
    the folder is given its usual name."""
    command = ["make", "--dry-run", f"RUNS={runs}", f"{runs}/{report}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.replace("\\\n", " ").splitlines() if "bin/discrete-lit " in line]
    return [line.split("discrete-lit ")[1].replace(str(runs), "runs/quickstart") for line in lines]
