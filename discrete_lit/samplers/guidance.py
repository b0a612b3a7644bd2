"""Classifier-free guidance (Ho & Salimans, 2022) on log-probabilities, and how its scale grows while sampling."""

from math import cos, pi
from typing import Literal

from torch import Tensor

GuidanceSchedule = Literal["constant", "linear", "cosine"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guided, unnormalised log-probabilities: `uncond + scale * (cond - uncond)`.

    Args:
        conditional: float32 logits `(..., K)` given the label.
        unconditional: logits given the null label.
        scale: 1 is the conditional model itself, 0 the unconditional one.

    Returns:
        `(..., K)`, to be normalised by a softmax.
    """
    conditional, unconditional = conditional.log_softmax(dim=-1), unconditional.log_softmax(dim=-1)
    return unconditional + scale * (conditional - unconditional)


def scale_at(schedule: GuidanceSchedule, scale: float, progress: float) -> float:
    """The guidance scale when a share `progress` in [0, 1] of the sampling is done.

    `constant` is `scale` throughout; `linear` grows from 1 as 1 + (scale - 1) r; `cosine` from 1 as
    1 + (scale - 1) (1 - cos(pi r)) / 2.
    """
    shape = {"constant": 1.0, "linear": progress, "cosine": (1 - cos(pi * progress)) / 2}[schedule]
    return 1 + (scale - 1) * shape
