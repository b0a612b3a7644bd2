"""Random weights for tests of networks, none of which would show anything at a zero initialisation."""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, spread: float) -> Module:
    """Normal parameters of deviation `spread` (gains around 1), so that nothing stays at a zero initialisation."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module
