"""Closed forms of the authors' codes: learning-rate schedules, decays of an EMA, which weights decay.

Steps count from 0, updates of an EMA from 1. A schedule is a ratio of the full learning rate.
"""

import math
import re
from collections.abc import Callable

from torch import Tensor

Schedule = Callable[[int], float]
Average = Callable[[int], float]
# From the name and the value of a parameter of ours to whether it decays, or by how much where that is not the same.
Decays = Callable[[str, Tensor], bool | float]

IMAGES = 1_281_167


def constant(warmup: int = 0) -> Schedule:
    """Rise along a line, then stay."""
    return lambda step: min(1.0, step / warmup) if warmup else 1.0


def cosine(warmup: int, total: int, end: float = 0.0, hold: int = 0) -> Schedule:
    """Rise along a line, stay until `warmup + hold`, fall along half a cosine until `total`."""
    start = warmup + hold

    def ratio(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = min(1.0, max(0, step - start) / (total - start))
        return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

    return ratio


def var_line(warmup_epochs: float, epochs: int, batch: int, end: float) -> Schedule:
    """`lin0` of VAR's `lr_wd_annealing` with `wp` in epochs, `wp0=0.005` and `wpe`; also IBQ's and Open-MAGVIT2's."""
    steps = IMAGES // batch
    warmup, total = round(warmup_epochs * steps), epochs * steps

    def ratio(step: int) -> float:
        if step < warmup:
            return 0.005 + 0.995 * step / warmup
        done = (step - warmup) / (total - 1 - warmup)
        return 1.0 if done < 0.05 else end + (1 - end) * (1 - done) / 0.95

    return ratio


def last_tenth(warmup: int, total: int) -> Schedule:
    """`adapt_learning_rate` of Halton-MaskGIT's Trainer/abstract_trainer.py."""

    def ratio(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - 0.9 * total) / (0.1 * total)
        return 1.0 if done < 0 else max((1 + math.cos(math.pi * done)) / 2, 0.01)

    return ratio


def drops(*steps: int) -> Schedule:
    """A tenth of the rate at each step."""
    return lambda step: math.prod(0.1 for drop in steps if step >= drop)


def vaex_cosine(warmup: int, total: int, end: float) -> Schedule:
    """`cos` of vaex's utils/lr_control.py with `wp0=0.005`."""

    def ratio(step: int) -> float:
        if step < warmup:
            return 0.005 + 0.995 * step / warmup
        return end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (total - 1 - warmup))) / 2

    return ratio


def plateau(warmup: int, patience: int, factor: float = 0.5, start: float = 0.0) -> Schedule:
    """Rise along a line from `start`; on a loss that never falls, `factor` after each `patience` + 1 steps.

    `ReduceLROnPlateauWithWarmup` of VQ-Diffusion's engine/lr_scheduler.py. The first loss behind the warm-up is the
    lowest so far.
    """

    def ratio(step: int) -> float:
        if step <= warmup:
            return start + (1 - start) * step / warmup
        return factor ** ((step - warmup - 1) // (patience + 1))

    return ratio


def fixed(decay: float) -> Average:
    """The same decay from the first update on."""
    return lambda update: decay


def every(steps: int, decay: float) -> Average:
    """VQ-Diffusion's `EMA.update`: at each of so many steps, and no move between them."""
    return lambda update: decay if update % steps == 0 else 1.0


def counted_after(decay: float) -> Average:
    """LitEma and SEDD's: the count includes the update, min(decay, (1 + n) / (10 + n))."""
    return lambda update: min(decay, (1 + update) / (10 + update))


def counted_before(decay: float) -> Average:
    """1d-tokenizer's and MaskBit's EMAModel: the count is of the updates before, and the first one sets the average."""
    return lambda update: min(decay, update / (9 + update)) if update > 1 else 0.0


def vaex_average(decay: float) -> Average:
    """vaex's `ema_update`, whose count is of every other step, from 0."""
    return lambda update: min(decay, ((update - 1) // 2 + 1) / ((update - 1) // 2 + 10))


def vector(name: str, value: Tensor) -> bool:
    """Say whether a parameter is a bias, or the gain or sharpness of a norm: one-dimensional in the authors' codes.

    The vector of masked positions has leading dimensions of 1 there, and the biases of queries and values none.
    """
    return name.endswith(("bias", "log_sharpness")) or (value.ndim < 2 and not name.endswith("mask_vector"))


def all_decay(name: str, value: Tensor) -> bool:
    return True


def matrices(name: str, value: Tensor) -> bool:
    """`p.dim() >= 2` of nanoGPT, LlamaGen, IBQ, Open-MAGVIT2; MAR's and xAR's `len(param.shape) == 1` the other way."""
    return not vector(name, value)


def without(decays: Decays, pattern: str) -> Decays:
    """Leave names of ours that match out."""
    return lambda name, value: decays(name, value) and not re.search(pattern, name)


def vaex_decays(name: str, value: Tensor) -> float:
    """0.005, of the discriminator 0.0005; no one-dimensional parameter, and no embedding."""
    if vector(name, value) or name.startswith("quantizer.codebook"):
        return 0.0
    return 5e-4 if "discriminator" in name else 5e-3
