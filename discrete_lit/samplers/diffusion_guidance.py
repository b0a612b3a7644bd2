"""What a network says of noisy sequences, as samplers of diffusion use it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.diffusion.parameterization import (
    Denoiser,
    leave_one_out_from_posterior,
    leave_one_out_from_score,
    score_from_leave_one_out,
)
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.reverse import Jumps
from discrete_lit.diffusion.schedules import NoiseLevel
from discrete_lit.samplers.guidance import guide
from discrete_lit.samplers.sampler import SamplingContext

# Sums of their exponentials are finite in float64.
_LARGEST_LOG_SCORE = 500.0


@dataclass(frozen=True)
class Prediction:
    """The head's output given the labels, and where a step is guided given the null label too.

    Three laws of guidance are in use, here with s, the scale (1 + w in the papers):

    - clean: the distribution of the clean id is `p_c^s p_u^(1 - s) / Z` (Schiff et al., UDLM, 2024, of masks);
    - score: the scores are `s_c^s s_u^(1 - s)`, with nothing to normalise them, so that tokens change Z times as fast;
    - transition: the law of a step is `q_c^s q_u^(1 - s)`, normalised over all states, see `guide_jumps`.
    """

    denoiser: Denoiser
    states: Tensor
    """`(B, N)`, what was seen."""
    level: NoiseLevel
    """Its noise."""
    outputs: tuple[Tensor, ...]
    """Of the head: given the labels, and given the null label."""
    scale: float

    @classmethod
    def of(
        cls, context: SamplingContext, denoiser: Denoiser, states: Tensor, level: NoiseLevel, scale: float
    ) -> "Prediction":
        """One pass of the the context's backbone, two evaluations where the scale is not 1.

        Raises:
            ValueError: logits that are no numbers.
        """
        conditional, unconditional = context.evaluate(states, scale != 1, level)
        logits = [conditional] if unconditional is None else [conditional, unconditional]
        for values in logits:
            if bool(values.sum(dim=-1).isnan().any()):
                raise ValueError(
                    f"the backbone's logits are NaN at t = {float(level.t.max()):.4g}: its weights or its precision "
                    "are broken, nothing can be drawn from them"
                )
        return cls(denoiser, states, level, tuple(denoiser.head(values, states, level) for values in logits), scale)

    def each(self) -> list["Prediction"]:
        """The conditional and the unconditional prediction, neither guided."""
        return [Prediction(self.denoiser, self.states, self.level, (output,), 1.0) for output in self.outputs]

    def clean(self) -> Tensor:
        """`(B, N, K)` log-probabilities of the clean ids given the other tokens, guided by the clean law.

        Of absorbing processes they have a meaning at masked tokens alone.
        """
        clean = self._guided([self._cavity(output) for output in self.outputs])
        return clean if len(self.outputs) == 1 else clean.log_softmax(dim=-1)

    def clean_weights(self) -> Tensor:
        """Of an absorbing process `(B, N, K)`: log-scores over those of certainty, guided by the score law.

        `s_y (1 - alpha) / alpha` of a masked token is the probability of y where the scores are true; then nothing has
        to normalise it.
        """
        return self._guided([self._weights(output) for output in self.outputs])

    def scores(self) -> Tensor:
        """`(B, N, S)` log-scores in float64, guided by the score law."""
        return self._guided([self._score(output.double()) for output in self.outputs]).clamp(max=_LARGEST_LOG_SCORE)

    def _guided(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else guide_where_possible(parts[0], parts[1], self.scale)

    def _cavity(self, output: Tensor) -> Tensor:
        process, kind = self.denoiser.process, self.denoiser.head.kind
        if kind == "score":
            if is_absorbing(process):
                return output[..., : process.vocab_size].log_softmax(dim=-1)
            return leave_one_out_from_score(output, self.states, process, self.level)
        if kind == "posterior" and not is_absorbing(process):
            return leave_one_out_from_posterior(output, self.states, process, self.level)
        return output

    def _weights(self, output: Tensor) -> Tensor:
        if self.denoiser.head.kind != "score":
            return output
        odds = self.level.odds.log()[..., None].to(output.dtype)
        return output[..., : self.denoiser.process.vocab_size] - odds

    def _score(self, output: Tensor) -> Tensor:
        if self.denoiser.head.kind == "score":
            return output
        return score_from_leave_one_out(self._cavity(output), self.states, self.denoiser.process, self.level)


def guide_where_possible(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """`guide`, for log-probabilities of -inf too: what is impossible given the label stays so, and what is impossible
    without it is not guided. Where that leaves nothing, nothing is guided.
    """
    guided = guide(conditional, unconditional, scale)
    guided = torch.where(unconditional == -torch.inf, conditional, guided)
    guided = guided.masked_fill(conditional == -torch.inf, -torch.inf)
    return torch.where((guided == -torch.inf).all(dim=-1, keepdim=True), conditional, guided)


def guide_jumps(conditional: Jumps, unconditional: Jumps, scale: float) -> Jumps:
    """The transition law: `q_c^s q_u^(1 - s)` of all states, the one that is left included, normalised.

    With an unmasking probability u in both and `Z = sum p_c^s p_u^(1 - s)` it becomes `u Z / (1 - u + u Z)`.
    """
    with_label, without = (part.targets.log_softmax(dim=-1) for part in (conditional, unconditional))
    targets = guide_where_possible(with_label, without, scale)
    with_label, without = (
        torch.stack((part.probability.log(), (-part.probability).log1p()), dim=-1)
        for part in (conditional, unconditional)
    )
    leave, stay = guide_where_possible(with_label, without, scale).unbind(dim=-1)
    leave = leave + targets.double().logsumexp(dim=-1)
    return Jumps(torch.sigmoid(leave - stay), targets)
