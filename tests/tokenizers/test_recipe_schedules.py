"""The learning rates of the tokenizers' recipes, against the schedules of the authors' training code in closed form."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import pytest
import torch
from helpers.recipe_files import read
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

from discrete_lit import optimization
from discrete_lit.optimization import configure_apart

Rates = Callable[[int], float]
"""Of an optimizer step, the learning rate as a share of the full one."""

TOLERANCES = {"var": 5e-3}
"""Ours is one step of the warm-up ahead, as the first of theirs does nothing: 1e-3 of the full rate at most. That of
vaex begins at 0.005 of it."""


def recipe(name: str) -> dict[str, Any]:
    return read(f"lightning_configs/tokenizers/{name}_imagenet256.yaml")


def made(settings: dict[str, Any] | None, optimizer: torch.optim.Optimizer) -> Any:
    if settings is None:
        return None
    name = settings["class_path"]
    kind = MultiStepLR if name == "MultiStepLR" else getattr(optimization, name)
    return kind(optimizer, **settings["init_args"])


def shares(name: str) -> tuple[Rates, Rates]:
    """What a recipe makes of the rates of autoencoder and discriminator."""
    model = recipe(name)["model"]["init_args"]
    adversarial = model["adversarial_loss"]["init_args"]
    players = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [player]} for player in players], lr=2.0)
    scheduler = made(model.get("scheduler"), optimizer)
    configured: Any = optimizer
    if scheduler is not None:
        configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    apart = adversarial.get("scheduler")
    configured = configure_apart(
        configured,
        players[1:],
        scheduler=None if apart is None else lambda optimizer: made(apart, optimizer),
        first_step=adversarial.get("start_step", 0),
    )
    found = configured["lr_scheduler"]["scheduler"]

    def at(player: int, step: int) -> float:
        if isinstance(found, LambdaLR):
            return found.lr_lambdas[player](step)
        found.last_epoch = step
        return found._get_closed_form_lr()[player] / 2.0

    return lambda step: at(0, step), lambda step: at(1, step)


def cosine(step: float, warmup: float, total: float, end: float) -> float:
    if step < warmup:
        return step / warmup
    return end + (1 - end) * 0.5 * (1 + cos(pi * (step - warmup) / (total - warmup)))


def titok(step: int) -> float:
    return cosine(step, 5_000, 500_000, 0.1)


def titok_discriminator(step: int, processes: int = 8) -> float:
    """`create_lr_scheduler`: it steps once for each process, and only the start is not multiplied by them."""
    own = processes * (step - 20_000)
    return cosine(own, processes * 5_000, processes * 500_000 - 20_000, 0.1)


def vaex(epoch_share: float, warmup_share: float, steps: int) -> Rates:
    """`lr_wd_annealing`: a warm-up from 0.005, then to 0.3 along half a cosine at the last step of all."""

    def share(step: int) -> float:
        own, total, warmup = step - epoch_share * steps, (1 - epoch_share) * steps, warmup_share * steps
        if own < warmup:
            return 0.005 + 0.995 * own / warmup
        return 0.3 + 0.7 * (0.5 + 0.5 * cos(pi * (own - warmup) / (total - 1 - warmup)))

    return share


def rqvae(step: int) -> float:
    return min(1.0, step / (0.5 * 1_281_167 // 128))


def dropped(epochs: tuple[int, int], images: int) -> Rates:
    """A tenth from each of these epochs of `images` a step on."""
    return lambda step: 0.1 ** sum(step >= epoch * (1_281_167 // images) for epoch in epochs)


THEIRS: dict[str, tuple[Rates, Rates, int]] = {
    **{f"titok_{size}_stage2": (titok, titok_discriminator, 20_000) for size in ("l32", "b64", "s128")},
    "var": (vaex(0, 0.01, 417_000), vaex(0.2, 0.02, 417_000), 83_400),
    "rqvae": (rqvae, rqvae, 0),
    "ibq_16384": (dropped((250, 300), 256), dropped((250, 300), 256), 0),
    "magvit2_lfq18": (dropped((200, 250), 256), dropped((200, 250), 256), 0),
}


@pytest.mark.parametrize("name", THEIRS)
def test_rates_are_those_of_the_authors_code(name: str) -> None:
    autoencoder, discriminator, start = THEIRS[name]
    tolerance = TOLERANCES.get(name, 1e-3)
    ours, ours_of_discriminator = shares(name)
    last = recipe(name)["trainer"]["max_steps"] - 1
    # From the first step to the last, and around the drops.
    steps = {last * place // 9 for place in range(10)} | {1, 10, 100, 1_000, 10_000}
    steps |= {epoch * 5_004 + side for epoch in (200, 250, 300) for side in (-1, 0) if epoch * 5_004 <= last}
    for step in sorted(steps):
        assert ours(step) == pytest.approx(autoencoder(step), abs=tolerance), step
        if step >= start:
            assert ours_of_discriminator(step) == pytest.approx(discriminator(step), abs=tolerance), step
    assert ours_of_discriminator(start) <= tolerance or discriminator(start) == 1


@pytest.mark.parametrize(
    "name",
    ["taming_f16_1024", "taming_f16_16384", "ldm_f8", "kl16", "llamagen_vq16"],
)
def test_constant_rates(name: str) -> None:
    settings = recipe(name)["model"]["init_args"]
    assert "scheduler" not in settings and "scheduler" not in settings["adversarial_loss"]["init_args"]


@pytest.mark.parametrize(
    ("name", "images"), [("taming_f16_1024", 96), ("taming_f16_16384", 96), ("ldm_f8", 80), ("kl16", 192)]
)
def test_rates_follow_the_images_of_a_step(name: str, images: int) -> None:
    """taming and LDM: 4.5e-6 for each of the images of 8 GPUs and of the batches that are accumulated."""
    settings = recipe(name)
    accumulated = settings["trainer"].get("accumulate_grad_batches", 1)
    assert images == 8 * accumulated * settings["data"]["init_args"]["batch_size"]
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == pytest.approx(4.5e-6 * images)
