"""GIDD's self-correction: a model that was trained on wrong ids finds and replaces those of a sample (von Rütte et al.,
"Generalized Interpolating Discrete Diffusion", 2025, section 5.3).
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import host_sees
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.samplers.categorical import draw_categorical
from discrete_lit.samplers.diffusion import DiffusionSampler, NoisyTokens, finite_noise


class SelfCorrectionSampler(DiffusionSampler):
    """Sample by ancestral steps, then let the model correct what it drew.

    A correction tells the model that there is a little noise, draws an id for each position from what it predicts, and
    replaces, of the ids that differ from those that stand there, the ones that were drawn with the largest
    probabilities. A sequence is done when a correction changes nothing in it, or when for `patience` corrections its
    share of ids that are the most probable ones has not risen.

    Args:
        correction_steps: corrections at most, at least 1; each costs a pass.
        correction_tokens: ids that one replaces, at least 1.
        correction_temperature: divides the log-probabilities that they are drawn from, > 0.
        correction_time: t of the noise that the model is told, in (0, 1).
        patience: corrections without progress, at least 1; None goes on to the last.
        settings: of `DiffusionSampler` and `Sampler`, for the steps before. The defaults are those of GIDD's code.

    Raises:
        ValueError: a setting out of its range; in use, a generator whose noise only masks, which never sees wrong ids.
    """

    def __init__(
        self,
        correction_steps: int = 128,
        correction_tokens: int = 1,
        *,
        correction_temperature: float = 0.1,
        correction_time: float = 0.01,
        patience: int | None = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        for name, value in (("correction_steps", correction_steps), ("correction_tokens", correction_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if correction_temperature <= 0:
            raise ValueError(f"correction_temperature must be > 0, got {correction_temperature}")
        if not 0 < correction_time < 1:
            raise ValueError(f"correction_time must lie in (0, 1), got {correction_time}")
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, or null, got {patience}")
        self.correction_steps = correction_steps
        self.correction_tokens = correction_tokens
        self.correction_temperature = correction_temperature
        self.correction_time = correction_time
        self.patience = patience

    def last_number(self, steps: int) -> int:
        return steps + self.correction_steps - 1

    def finish(self, x: NoisyTokens) -> Tensor:
        time = torch.full((1, 1), self.correction_time, dtype=torch.float64, device=x.tokens.device)
        level = finite_noise(NoiseLevel.at(x.denoiser.schedule, time))
        first = x.steps - self.correction_steps
        active = torch.ones(len(x.tokens), 1, dtype=torch.bool, device=x.tokens.device)
        best, waited = torch.zeros_like(active, dtype=torch.float64), torch.zeros_like(active, dtype=torch.int64)
        for number in range(first, x.steps):
            clean = x.predict(level, self.guidance_scale).clean()
            uniforms = x.random.uniform(Purpose.TOKEN, x.length, number)
            ids, log_probability = self.corrected(clean, x.tokens, uniforms, known=x.known)
            agreed = (ids == clean.argmax(dim=-1)).double().mean(dim=1, keepdim=True)
            waited = torch.where(agreed > best, 0, waited + 1)
            best = torch.maximum(best, agreed)
            changed = ids != x.tokens
            active = active & changed.any(dim=1, keepdim=True)
            if self.patience is not None:
                active = active & (waited <= self.patience)
            x.write(changed & active, ids, log_probability)
            if host_sees(active) and not bool(active.any()):
                break
        return x.tokens

    def corrected(
        self, clean: Tensor, tokens: Tensor, uniforms: Tensor, *, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make one correction.

        Args:
            clean: log-probabilities of the clean ids, `(B, N, K)`.
            tokens: `(B, N)` int64.
            uniforms: `(B, N)` float64, which decide the draw.
            known: `(B, N)` bool, tokens that stay; none by default.

        Returns:
            Tokens `(B, N)`, and the log-probability `(B, N)` that each position's new id was drawn with.
        """
        log_probabilities = (clean / self.correction_temperature).log_softmax(dim=-1)
        ids = draw_categorical(log_probabilities, uniforms)
        log_probability = log_probabilities.gather(-1, ids[..., None])[..., 0]
        same = ids == tokens if known is None else (ids == tokens) | known
        score = log_probability.exp().masked_fill(same, 0.0)
        chosen = score.topk(min(self.correction_tokens, tokens.shape[1]), dim=1).indices
        replaced = torch.zeros_like(same).scatter(1, chosen, True) & ~same
        return torch.where(replaced, ids, tokens), log_probability

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if is_absorbing(denoiser.process):
            raise ValueError(
                "SelfCorrectionSampler is for models that were trained on wrong ids, as those of GIDDProcess or "
                f"UniformProcess; {type(denoiser.process).__name__} only masks"
            )
