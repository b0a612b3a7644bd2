"""Discrete image generation in PyTorch Lightning.

`load(path)` gives back the Tokenizer or Generator of any checkpoint. Importing this package imports neither torch nor
Lightning: subpackages do, when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discrete_lit.checkpoints import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from discrete_lit.checkpoints import load

        return load
    raise AttributeError(f"module 'discrete_lit' has no attribute {name!r}")
