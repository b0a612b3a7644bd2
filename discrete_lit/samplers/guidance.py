"""Classifier-free guidance (CFG; Ho & Salimans, 2022), and how its scale changes while sampling.

Every scale here is the s of `uncond + s (cond - uncond)`. The scales of the published repositories, at step i of T:

| source | ours |
|---|---|
| LlamaGen `cfg_scale` s, Halton-MaskGIT `w` | `constant`, s; 1 + w |
| LlamaGen `cfg_interval` k | `guidance_interval=(0, k + 2)`: token 0 is its prefill, token k + 1 is still guided |
| VAR `cfg` c, the confidence sampler of Halton-MaskGIT `w` | `scale_linear`, 1 + c: s = 1 + c i / (T - 1) |
| TiTok `linear` g; MaskBit `linear` g | `linear`, 1 + g: s = 1 + g i / T (TiTok sets it after a step, for the next) |
| TiTok `constant` g, MaskBit `constant` g | `constant`, 1 + g |
| TiTok `power-cosine` g; RAR g | `power_cosine`, g: r = i / T, and no guidance at step 0 |
| MaskBit `cosine` g | `power_cosine`, 1 + g: r = i / T |
"""

from collections.abc import Sequence
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

GuidanceSchedule = Literal["constant", "linear", "scale_linear", "cosine", "power_cosine"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guide logits: `uncond + scale * (cond - uncond)`, unnormalised log-probabilities.

    Logits are log-probabilities up to a constant of each row, and so is the result: its softmax is
    `p_u (p_c / p_u)^scale`, normalised. Some may be -inf: what is impossible given the label stays so, and what is
    impossible without it is not guided. Where that leaves nothing in a row, the row is not guided at all.

    Args:
        conditional: logits `(..., K)` given the label.
        unconditional: logits given the null label.
        scale: 1 is the conditional model itself, 0 the unconditional one.

    Returns:
        `(..., K)`, to be normalised by a softmax.
    """
    if scale in (0, 1):
        return conditional if scale else unconditional
    guided = torch.lerp(unconditional, conditional, scale)
    guided = torch.where(unconditional == -torch.inf, conditional, guided)
    guided = guided.masked_fill_(conditional == -torch.inf, -torch.inf)
    return torch.where((guided == -torch.inf).all(dim=-1, keepdim=True), conditional, guided)


def guide_twice(full: Tensor, image: Tensor, null: Tensor, *, image_scale: float, text_scale: float) -> Tensor:
    """Guide by an image and by a text, each with a scale of its own: `u + s_img (i - u) + s_txt (full - i)`.

    (Brooks, Holynski & Efros, "InstructPix2Pix", 2023, eq. 3; Chameleon's sampler.) Of logits, which must be finite, or
    of what a network predicts of vectors.

    Args:
        full: given both `(..., K)`.
        image: given the image alone.
        null: given neither.
        image_scale: s_img.
        text_scale: s_txt; with both 1 the result is `full`.
    """
    return null + image_scale * (image - null) + text_scale * (full - image)


def guided_steps(scales: Sequence[float]) -> int:
    """Count the steps up to the last guided one of `scales`, itself included; 0 if none is."""
    return max((step + 1 for step, scale in enumerate(scales) if scale != 1), default=0)


def guidance_scales(
    schedule: GuidanceSchedule,
    scale: float,
    steps: int,
    power: float = 1.0,
    interval: tuple[int, int] | None = None,
) -> list[float]:
    """List the guidance scale of each of T steps.

    With r = i / T at step i of T: `constant` is `scale`; `linear` is 1 + (scale - 1) r; `scale_linear` the same with
    r = i / (T - 1), which reaches `scale` (VAR); `power_cosine` is 1 + (scale - 1) (1 - cos(pi r^power)) / 2 (MDT,
    RAR), and `cosine` that of power 1. Power 0 is constant.

    Args:
        schedule: its name.
        scale: s where the schedule is at its end.
        steps: T, the steps, tokens or scales of the sampler.
        power: exponent of `power_cosine`, >= 0.
        interval: the first guided step and the one after the last; the scale is 1 elsewhere (Kynkäänniemi et al.,
            "Applying Guidance in a Limited Interval", 2024); `(0, n)` is a cut-off.

    Raises:
        ValueError: an interval that ends after the last step.
    """
    first, end = interval or (0, steps)
    if end > steps:
        raise ValueError(f"guidance_interval={[first, end]} is longer than the sampling: it has {steps} steps")
    scales = []
    for step in range(steps):
        r = step / steps
        shape = {
            "constant": 1.0,
            "linear": r,
            "scale_linear": step / max(steps - 1, 1),
            "cosine": (1 - cos(pi * r)) / 2,
            "power_cosine": (1 - cos(pi * r**power)) / 2,
        }[schedule]
        scales.append(1 + (scale - 1) * shape if first <= step < end else 1.0)
    return scales
