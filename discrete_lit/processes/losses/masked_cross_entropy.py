"""Cross-entropy of masked tokens (Sahoo et al., "MDLM", 2024; Shi et al., "MD4", 2024; Ou et al., "RADD", 2024)."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, LossKind
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.random import random_subset
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.processes.schedules import MaskSchedule

Variable = Literal["time", "mask_ratio", "mask_count"]


class MaskedCrossEntropy(DiffusionLoss):
    """-log p of the masked tokens, weighted so that its mean is the bound of the absorbing process.

    The mean is over one of three variables, which give the same bound (RADD, theorem 3):

    - `"time"`: t uniform, weight m'(t) / m(t) (t-DCE; MDLM eq. 10, MD4 eq. 6);
    - `"mask_ratio"`: m itself uniform in (0, 1), weight 1 / m, whatever the schedule (lambda-DCE);
    - `"mask_count"`: k of N tokens masked, k uniform in 1 ... N, weight N / k (k-DCE).

    The last two go all the way to m = 1, so they are bounds with every schedule, which only tells a timed network the
    time at which m is so large.

    Args:
        variable: what the mean is over.

    Raises:
        ValueError: an unknown variable.
    """

    heads = frozenset({"posterior", "cavity"})
    kind = "bound"

    def __init__(self, variable: Variable = "time") -> None:
        if variable not in ("time", "mask_ratio", "mask_count"):
            raise ValueError(f"variable must be 'time', 'mask_ratio' or 'mask_count', got {variable!r}")
        self.variable = variable

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        if self.variable == "time":
            return super().level(schedule, uniforms, length)
        share = uniforms.double()
        if self.variable == "mask_count":
            share = ((share * length).floor() + 1).clamp(max=length) / length
        t = schedule.inverse(share.clamp(*schedule.ends()))
        # The slope of m against itself is 1.
        return NoiseLevel(t, 1 - share, share, 1 / (1 - share))

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        if self.variable != "mask_count":
            return super().corrupt(process, tokens, level, uniforms)
        assert process.mask_id is not None
        masked = random_subset(uniforms, (level.noise * tokens.shape[1]).round())
        return tokens.masked_fill(masked, process.mask_id)

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not is_absorbing(process):
            raise ValueError(
                f"MaskedCrossEntropy is for AbsorbingProcess, got {type(process).__name__}: use ContinuousBound"
            )

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return super().label(process, schedule) if self.variable == "time" else self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        log_probabilities = head(logits, states, level)
        cost = F.nll_loss(log_probabilities.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        weight = level.mask_weight if self.variable == "time" else 1 / level.noise
        return weight * cost.double()
