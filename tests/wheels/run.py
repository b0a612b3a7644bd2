"""Install the wheel into fresh environments and use it: `PYTHONPATH=tests python -m wheels.run [VERSION ...]`.

For each version of Python, 3.11 to 3.13 by default, as far as an interpreter is at hand: a new environment, the wheel
with `pip install` and all its dependencies from the package index (5 GB with CUDA, deleted afterwards), the first steps
of a user (`fresh.py`) and the import of every module; then the same with all extras but `dev`. The exit status is 1
where something failed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wheels.fresh import EXTRAS, PYTHONS, build_wheel, called, first_steps, interpreter

EVERY_MODULE = """
import importlib, pkgutil
import discrete_lit
for module in pkgutil.walk_packages(discrete_lit.__path__, "discrete_lit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def attempt(version: str, wheel: Path, folder: Path, *, extras: bool) -> str:
    """Try one version, with or without extras, in a folder of its own; returns what went wrong, or nothing."""
    python = interpreter(version)
    if python is None:
        return "no interpreter at hand"
    where = folder / "environment"
    subprocess.run([python, "-m", "venv", str(where)], check=True)
    wanted = f"{wheel}[{','.join(EXTRAS)}]" if extras else str(wheel)
    pip = [str(where / "bin" / "pip"), "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run([*pip, wanted], capture_output=True, text=True)
    if done.returncode:
        return f"pip install: {done.stderr[-2000:]}"
    work = folder / "work"
    work.mkdir()
    try:
        first_steps(where / "bin", work)
    except AssertionError as error:
        return str(error)
    imported = called(str(where / "bin" / "python"), "-c", EVERY_MODULE, folder=work)
    return imported.stderr[-2000:] if imported.returncode else ""


def main() -> None:
    """Try all that was asked for, one after the other, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=PYTHONS)
    failed = False
    with tempfile.TemporaryDirectory() as built:
        wheel = build_wheel(Path(built))
        for version in parser.parse_args().versions:
            for extras in (False, True):
                start = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    wrong = attempt(version, wheel, Path(folder), extras=extras)
                failed |= bool(wrong)
                kind = "with extras" if extras else "without extras"
                print(f"{version} {kind}: {wrong or 'works'} ({time.monotonic() - start:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
