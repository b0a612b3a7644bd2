"""What a loss of discrete diffusion is."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head, HeadKind
from discrete_lit.processes.losses.by_rows import by_rows
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.processes.schedules import MaskSchedule

LossKind = Literal["bound", "not a bound"]


class DiffusionLoss(ABC):
    """Draws a level of noise and the noisy tokens, and says what their prediction costs in nats.

    Summed over a sequence and averaged over the level and the noise, a `"bound"` is at least -log p of the clean
    sequence less the prior's term, `ForwardProcess.prior_divergence` at t = 1, which nothing learned changes.
    """

    heads: frozenset[HeadKind]
    """The kinds of head that it can take."""
    kind: LossKind
    """Whether it is a bound where noise goes all the way; `label` also looks at the schedule."""

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        """The level of each sequence.

        Args:
            schedule: of training.
            uniforms: `(B, 1)` float64 in (0, 1).
            length: N.
        """
        return NoiseLevel.at(schedule, uniforms)

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        """x_t `(B, N)` of clean `tokens (B, N)`; `uniforms (B, N)` float64 in (0, 1) decide it."""
        return process.corrupt(tokens, level.alpha, uniforms)

    def check(self, head: Head, process: ForwardProcess) -> None:
        """Whether it can be used with them.

        Raises:
            ValueError: it cannot.
        """
        if head.kind not in self.heads:
            raise ValueError(
                f"{type(self).__name__} needs a head of kind {' or '.join(sorted(self.heads))}, "
                f"{type(head).__name__} is of kind {head.kind}"
            )
        if head.kind == "score" and head.mask_output != process.masks:
            raise ValueError(
                f"scores are of all states: mask_output of {type(head).__name__} must be {process.masks} for "
                f"{type(process).__name__}, got {head.mask_output}"
            )

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        """Whether it bounds -log p with this schedule.

        A schedule whose m starts above 0 leaves out what the last tokens cost; where noise only masks, one that ends
        below 1 leaves out a prior's term that is infinite.
        """
        first, last = schedule.ends()
        cut = first > 0 or (last < 1 and is_absorbing(process))
        return "not a bound" if cut else self.kind

    def __call__(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """The integrand at the level.

        Args:
            logits: `(B, N, K)`, or `(B, N, S)` of heads with the mask's output, float32 or float64.
            head: what the logits mean.
            tokens: clean, `(B, N)` int64.
            states: x_t, `(B, N)` int64.
            process: that made the states.
            level: of the states, as `level` drew it.

        Returns:
            `(B, N)` nats of the logits' precision, whose mean over the level of the sum over N is the loss.

        Raises:
            ValueError: a head or process that this loss is not for.
        """
        self.check(head, process)
        length = tokens.shape[1]
        # Where noise only masks, a token that it left is known.
        counted = states == process.mask_id if is_absorbing(process) else torch.ones_like(states, dtype=torch.bool)
        places = counted.flatten().nonzero()[:, 0]
        clean, noisy = tokens.flatten()[places, None], states.flatten()[places, None]
        levels = level.take(places // length)

        def of_rows(rows: Tensor, part: slice) -> Tensor:
            arguments = clean[part], noisy[part], process, levels.take(part)
            return self.integrand(rows[:, None], head, *arguments)[:, 0]

        return by_rows(of_rows, logits.flatten(0, 1), places).view_as(tokens)

    @abstractmethod
    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """As `__call__`, of all tokens it is given, in float64."""


def gather(values: Tensor, ids: Tensor) -> Tensor:
    """`values (..., S)` at `ids (...)`."""
    return values.gather(-1, ids[..., None])[..., 0]
