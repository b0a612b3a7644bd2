"""What a recipe of ours does: its schedule, its decay, its EMA, its parameter groups."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from discrete_lit import optimization
from discrete_lit.callbacks import ExponentialMovingAverage
from training_proof.laws import Average, Decays, Schedule
from training_proof.recipes import build, class_name, settings_of

UPDATES = (10, 1_000, 100_000)


def schedule_of(recipe: str) -> Schedule:
    """Give the ratio of the learning rate at each step, of the recipe's scheduler itself."""
    scheduler = settings_of(recipe)["model"]["init_args"].get("scheduler")
    if scheduler is None:
        return lambda step: 1.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=1.0)
    kind = getattr(optimization, scheduler["class_path"], None) or getattr(
        torch.optim.lr_scheduler, scheduler["class_path"]
    )
    made: Any = kind(optimizer, **scheduler["init_args"])
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return _on_a_constant_loss(made, steps_of(recipe)[-1])
    if hasattr(made, "lr_lambdas"):
        return made.lr_lambdas[0]

    def closed_form(step: int) -> float:
        made.last_epoch = step
        return made._get_closed_form_lr()[0]

    return closed_form


def _on_a_constant_loss(scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau, last: int) -> Schedule:
    ratios = [scheduler.optimizer.param_groups[0]["lr"]]
    for _ in range(last):
        scheduler.step(1.0)
        ratios.append(scheduler.optimizer.param_groups[0]["lr"])
    return ratios.__getitem__


def steps_of(recipe: str) -> list[int]:
    """Ten steps, in the middle of each tenth of the run, and its last one."""
    total = settings_of(recipe)["trainer"]["max_steps"]
    return [round((tenth + 0.5) * total / 10) for tenth in range(10)] + [total - 1]


def average_of(recipe: str) -> Average | None:
    """Give the decay at the n-th update, of the recipe's callback itself; None if it has none."""
    found = [
        entry["init_args"]
        for entry in settings_of(recipe)["trainer"].get("callbacks+", [])
        if class_name(entry) == "ExponentialMovingAverage"
    ]
    if not found:
        return None

    def decay(update: int) -> float:
        callback, model = ExponentialMovingAverage(**found[0]), nn.Linear(1, 1, bias=False).double()
        # The averages are 1 and the weight is 0: what is left of the 1 is the decay.
        callback.averages = {"weight": torch.ones_like(model.weight)}
        callback._averaged_steps = (update - 1) // callback.every
        nn.init.zeros_(model.weight)
        trainer: Any = SimpleNamespace(global_step=update)
        callback.on_train_batch_end(trainer, model, None, None, 0)  # type: ignore[arg-type]
        return float(callback.averages["weight"].detach())

    return decay


def groups_of(recipe: str, decays: Decays | None = None) -> dict[float, int]:
    """Count the trained numbers of each weight decay, the largest decay first; by our groups, or by a law.

    Args:
        recipe: of `recipes`.
        decays: the law; None for the recipe's own optimizer.
    """
    module: Any = build(recipe)
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    counts: dict[float, int] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    largest = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decay = group.get("weight_decay", 0.0)
            if decays is not None:
                by_law = decays(names[id(parameter)], parameter)
                decay = by_law * largest if isinstance(by_law, bool) else by_law
            counts[decay] = counts.get(decay, 0) + parameter.numel()
    return dict(sorted(counts.items(), reverse=True))
