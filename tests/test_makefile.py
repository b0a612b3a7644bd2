"""`make` finds a Python that is new enough, whatever it is called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "sh", "make", "ls", "grep", "awk", "getconf", "touch", "test", "echo")


def make_setup(tmp_path: Path, pythons: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Ask for the commands of `make setup` where only these Pythons, each a script, are on the path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (commands / tool).symlink_to(found)
    for name, script in pythons.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    return subprocess.run(
        ["make", "setup"],
        cwd=tmp_path,
        env={**environment, "PATH": str(commands)},
        capture_output=True,
        text=True,
    )


NEW = f'case "$1" in -c) exec {sys.executable} "$@";; esac; echo ran $0 "$@"; exit 3'
OLD = "exit 1"


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": NEW}, "python3"),
        ({"python": NEW}, "python"),
        ({"python3.12": NEW}, "python3.12"),
        ({"python3": OLD, "python3.13": NEW}, "python3.13"),
    ],
)
def test_any_python_that_is_new_enough(tmp_path: Path, pythons: dict[str, str], taken: str) -> None:
    done = make_setup(tmp_path, pythons)
    assert f"/bin/{taken} -m venv .venv" in done.stdout, done.stdout + done.stderr


def test_none_is_said(tmp_path: Path) -> None:
    done = make_setup(tmp_path, {"python3": OLD})
    assert done.returncode != 0
    assert "no Python 3.11 or newer is on the path" in done.stdout + done.stderr
