"""Gradient norms of a training run, beside its losses."""

from collections import defaultdict

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from discrete_lit.core.lightning_internals import logs_this_step


class GradientNorm(Callback):
    """Logs Euclidean norms of the gradient on the logger's schedule; other steps cost nothing.

    `gradient_norm/total` is the norm over all parameters, after accumulation and before clipping;
    `gradient_norm/<submodule>` that over each submodule at the first level where there are several.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not logs_this_step(trainer):
            return
        norms = {name: _norm(gradients) for name, gradients in _by_submodule(pl_module).items()}
        if not norms:
            return
        named = {"gradient_norm/total": torch.stack(list(norms.values())).norm()}
        if len(norms) > 1:
            named |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        pl_module.log_dict(named)


def _by_submodule(module: LightningModule) -> dict[str, list[Tensor]]:
    """The gradients of each submodule at the first level where there are several."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    depth = 1
    while len({_head(name, depth) for name in gradients}) == 1 and any(name.count(".") >= depth for name in gradients):
        depth += 1
    groups = defaultdict(list)
    for name, gradient in gradients.items():
        groups[_head(name, depth)].append(gradient)
    return dict(groups)


def _head(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives the norm as a partial sum over ranks.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
