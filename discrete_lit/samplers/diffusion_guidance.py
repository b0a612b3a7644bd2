"""Guidance of discrete diffusion: of the distribution of the clean id, of the scores, or of the law of a step.

`Prediction` holds a network's answer about noisy tokens and gives it in the terms that a sampler's step is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import (
    Denoiser,
    leave_one_out_from_posterior,
    leave_one_out_from_score,
    score_from_leave_one_out,
)
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.reverse import Jumps
from discrete_lit.samplers.guidance import guide

# Sums of their exponentials are finite in float64.
_LARGEST_LOG_SCORE = 500.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The head's output for noisy tokens x_t, given the labels and, where a step is guided, given the null label too.

    Three laws of guidance are in use, here with s, the scale (1 + w in the papers), c given the label, u without it:

    - clean: the distribution of the clean id is `p_c^s p_u^(1 - s) / Z` (Schiff et al., UDLM, 2024, of masks);
    - score: the scores are `s_c^s s_u^(1 - s)`, with nothing to normalise them, so that tokens change Z times as fast;
    - transition: the law of a step is `q_c^s q_u^(1 - s)`, normalised over all states, see `guide_jumps`.
    """

    denoiser: Denoiser
    x_t: Tensor
    """`(B, N)`, the tokens that the network saw."""
    level: NoiseLevel
    """Their noise, as the network was told it."""
    outputs: tuple[Tensor, ...]
    """The head's, given the labels, and given the null label."""
    scale: float
    """The guidance scale s."""

    def each(self) -> list["Prediction"]:
        """The conditional and the unconditional prediction, neither guided."""
        return [
            Prediction(denoiser=self.denoiser, x_t=self.x_t, level=self.level, outputs=(output,), scale=1.0)
            for output in self.outputs
        ]

    def clean(self, filtered: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`(B, N, K)` log-probabilities of the clean ids given the other tokens, guided by the clean law.

        For absorbing processes they have a meaning at masked tokens alone.

        Args:
            filtered: changes the distribution of the clean id as the head predicts it, guided: that given all tokens
                of a posterior head (VQ-Diffusion truncates it), else that given the others.
        """
        process = self.denoiser.process
        if filtered is not None and self.denoiser.head.kind == "posterior" and not is_absorbing(process):
            posterior = filtered(self._guided(list(self.outputs)).log_softmax(dim=-1))
            return leave_one_out_from_posterior(posterior, self.x_t, process, self.level)
        clean = self._guided([self._clean(output) for output in self.outputs])
        clean = clean if len(self.outputs) == 1 else clean.log_softmax(dim=-1)
        return clean if filtered is None else filtered(clean)

    def clean_weights(self) -> Tensor:
        """`(B, N, K)` log-weights of the clean ids for an absorbing process, guided by the score law.

        The weight of y at a masked token is `s_y (1 - alpha) / alpha`, its probability where the scores are true; then
        nothing has to normalise it.
        """
        return self._guided([self._weights(output) for output in self.outputs])

    def scores(self) -> Tensor:
        """`(B, N, S)` log-scores in float64, guided by the score law."""
        return self._guided([self._score(output.double()) for output in self.outputs]).clamp(max=_LARGEST_LOG_SCORE)

    def _guided(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else guide(parts[0], parts[1], self.scale)

    def _clean(self, output: Tensor) -> Tensor:
        process, kind = self.denoiser.process, self.denoiser.head.kind
        if kind == "score":
            if is_absorbing(process):
                return output[..., : process.vocab_size].log_softmax(dim=-1)
            return leave_one_out_from_score(output, self.x_t, process, self.level)
        if kind == "posterior" and not is_absorbing(process):
            return leave_one_out_from_posterior(output, self.x_t, process, self.level)
        return output

    def _weights(self, output: Tensor) -> Tensor:
        if self.denoiser.head.kind != "score":
            return output
        odds = self.level.odds.log()[..., None].to(output.dtype)
        return output[..., : self.denoiser.process.vocab_size] - odds

    def _score(self, output: Tensor) -> Tensor:
        if self.denoiser.head.kind == "score":
            return output
        return score_from_leave_one_out(self._clean(output), self.x_t, self.denoiser.process, self.level)


def guide_jumps(conditional: Jumps, unconditional: Jumps, scale: float) -> Jumps:
    """Guide the law of a step: `q_c^s q_u^(1 - s)` over all states, the one that is left included, normalised.

    With an unmasking probability u in both and `Z = sum p_c^s p_u^(1 - s)` it becomes `u Z / (1 - u + u Z)`.
    """
    with_label, without = (part.targets.log_softmax(dim=-1) for part in (conditional, unconditional))
    targets = guide(with_label, without, scale)
    with_label, without = (
        torch.stack((part.probability.log(), (-part.probability).log1p()), dim=-1)
        for part in (conditional, unconditional)
    )
    leave, stay = guide(with_label, without, scale).unbind(dim=-1)
    leave = leave + targets.double().logsumexp(dim=-1)
    return Jumps(torch.sigmoid(leave - stay), targets)
