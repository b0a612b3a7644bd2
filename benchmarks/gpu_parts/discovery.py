"""Import the modules of this package, which register their parts; one that fails takes no other along."""

import sys
from importlib import import_module
from pathlib import Path

from gpu_parts.part import Kind

# Measurements in the order in which they matter, for a run that has no time for all; other modules follow.
FIRST = (
    "right_golden",
    "right_sampling",
    "right_training",
    "fast_sampling",
    "fast_training",
    "fast_tokenizers",
    "fast_evaluation",
)


def import_parts() -> dict[str, str]:
    """Import every module of parts; the error of each that could not be, by its name."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem.startswith(("right", "fast_")))
    helpers = str(Path(__file__).parents[2] / "tests")
    if helpers not in sys.path:
        sys.path.append(helpers)  # for the cases that tests and checks share
    broken = {}
    for name in sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        try:
            import_module(f"gpu_parts.{name}")
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return broken


def kind_of(module: str) -> Kind:
    """The kind of the parts of a module, by its name."""
    return "right" if module.startswith("right") else "fast"
