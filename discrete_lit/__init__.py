"""Discrete image generation in PyTorch Lightning.

`load(path)` gives back the Tokenizer or Generator of any checkpoint, or of a published model by its name;
`save_pretrained(module, folder)` writes one for the Hugging Face Hub. Importing this package imports neither torch nor
Lightning: subpackages do, when they are asked for.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discrete_lit.checkpoints import load, save_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save_pretrained"]

# Modules of earlier versions that users import; those that configurations name are in `core/configuration.py`.
_MOVED = {
    "discrete_lit.backbones.positions": ("discrete_lit.backbones.embeddings",),
    "discrete_lit.processes": ("discrete_lit.diffusion", "discrete_lit.core.random"),
    "discrete_lit.data.tar_samples": ("discrete_lit.data.tars",),
    "discrete_lit.data.token_writer": ("discrete_lit.data.token_arrays",),
    "discrete_lit.evaluation.selection": (
        "discrete_lit.evaluation.image_sets",
        "discrete_lit.evaluation.compared_images",
    ),
    "discrete_lit.processes.losses": ("discrete_lit.diffusion.losses",),
    "discrete_lit.provenance": ("discrete_lit.core.provenance",),
    "discrete_lit.tokenizers.networks.transformer_blocks": ("discrete_lit.tokenizers.networks.vit",),
    "discrete_lit.verbs": ("discrete_lit.cli",),
    "discrete_lit.verbs.evaluate": ("discrete_lit.cli.evaluate",),
    "discrete_lit.verbs.sample": ("discrete_lit.cli.sample",),
    "discrete_lit.verbs.tokenize": ("discrete_lit.cli.tokenize",),
}


def __getattr__(name: str) -> Any:
    if name in ("load", "save_pretrained"):
        return getattr(importlib.import_module("discrete_lit.checkpoints"), name)
    raise AttributeError(f"module 'discrete_lit' has no attribute {name!r}")


class _MovedModules(MetaPathFinder, Loader):
    """Import a module under the name that it had in an earlier version, with a warning that says the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = " and ".join(_MOVED[spec.name])
        warnings.warn(f"{spec.name} is now {now}", FutureWarning, stacklevel=2)
        return ModuleType(spec.name, f"The old name of {now}.")

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__

        def find(attribute: str) -> Any:
            # Whoever walks over all modules asks each for `__file__` and the like: that must import nothing.
            for new in _MOVED[name] if not attribute.startswith("__") else ():
                if hasattr(importlib.import_module(new), attribute):
                    return getattr(sys.modules[new], attribute)
            raise AttributeError(f"{attribute!r} is not in {' or '.join(_MOVED[name])}, which {name} is now")

        module.__getattr__ = find  # type: ignore[method-assign]  # PEP 562: a module's own lookup


sys.meta_path.append(_MovedModules())
