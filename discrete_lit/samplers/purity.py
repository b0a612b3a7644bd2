"""Improved VQ-Diffusion's inference (Tang et al., "Improved Vector Quantized Diffusion Models", 2022, section 3.3): as
many tokens in each step, and first those that the network is sure of."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose, random_subset
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.samplers.categorical import draw_filtered, filter_logits
from discrete_lit.samplers.diffusion import NoisyTokens, checked_denoiser, finite_noise
from discrete_lit.samplers.sampler import Sampler, SamplingContext


class PuritySampler(Sampler):
    """Unmask an equal number of tokens in each of T steps, chosen by their purity.

    Tokens that a step of ancestral sampling unmasks are drawn apart, so that many in one step do not fit one another.
    Here each step unmasks the same number (the paper's high-quality inference). A masked token is among them with a
    probability proportional to its purity, that of its most probable id (the purity prior); and its id is drawn from
    its distribution p to the power of `1 + purity_weight q`, where q is its purity divided by the largest (eq. 11).
    What is unmasked stays, also where noise replaces ids.

    Args:
        steps: T, at least 1; where there are more of them than tokens, some unmask none, and ask for no pass.
        choice: masked tokens are chosen by their `"purity"`, or all alike (`"uniform"`: high-quality inference alone).
        purity_weight: r >= 0; with `"uniform"`, q is 1 for all tokens.
        settings: of `Sampler`. Temperature and filters act on the distribution before it is raised to a power; r of the
            guidance schedules is i / T at step i from 0.

    Raises:
        ValueError: a setting out of its range; in use, a generator whose noise does not mask, guidance on a model
            without classes, or logits that are no numbers.
    """

    attention = "bidirectional"

    def __init__(
        self, steps: int = 100, *, choice: str = "purity", purity_weight: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if choice not in ("purity", "uniform"):
            raise ValueError(f"choice must be 'purity' or 'uniform', got {choice!r}")
        if purity_weight < 0:
            raise ValueError(f"purity_weight must be >= 0, got {purity_weight}")
        self.steps = steps
        self.choice = choice
        self.purity_weight = purity_weight

    def draw(self, context: SamplingContext) -> Tensor:
        denoiser = checked_denoiser(context, self)
        if not denoiser.process.masks:
            raise ValueError(f"PuritySampler unmasks tokens, {type(denoiser.process).__name__} has no mask")
        scales, schedule, device = self.scales(self.steps), denoiser.schedule, context.labels.device
        times = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64, device=device)[:, None, None]
        levels = NoiseLevel.at(schedule, times)
        x = NoisyTokens(context, denoiser, level=levels.take(0), steps=self.steps)
        x.tokens = context.start()  # masks alone, whatever else noise does
        context.begin(x.tokens)
        counts = set(context.unknown_counts())
        unknown = context.unknown().sum(dim=1, keepdim=True)
        for number in range(self.steps):
            if all(each * (number + 1) // self.steps == each * number // self.steps for each in counts):
                continue  # of no sequence is a token unmasked
            count = unknown * (number + 1) // self.steps - unknown * number // self.steps
            prediction = x.predict(finite_noise(levels.take(number)), scales[number])
            clean = prediction.clean(self._filtered).log_softmax(dim=-1)
            masked = x.masked
            purity = clean.amax(dim=-1).double().masked_fill(~masked, -torch.inf)
            purity = purity - purity.amax(dim=1, keepdim=True)  # log q
            if self.choice == "uniform":
                purity = torch.zeros_like(purity)
            gumbel = -torch.log(-torch.log(x.random.uniform(Purpose.CONFIDENCE, x.length, number)))
            here = random_subset(-(purity + gumbel).masked_fill(~masked, -torch.inf), count) & masked
            power = (1 + self.purity_weight * purity.exp()).nan_to_num(1.0)[..., None].to(clean.dtype)
            uniforms = x.random.uniform(Purpose.TOKEN, x.length, number)
            ids, log_probability = draw_filtered(clean * power, uniforms, where=here)
            x.write(here, ids, log_probability)
        return x.tokens

    def _filtered(self, clean: Tensor) -> Tensor:
        """The distribution of the clean id at this sampler's temperature, after its filters."""
        return filter_logits(clean / self.temperature, self.top_k, self.top_p).log_softmax(dim=-1)
